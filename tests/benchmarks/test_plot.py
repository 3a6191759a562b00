"""The plot is drawn from whatever rows there are, the same file from the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plot
import pytest

MEASURED = plot.HERE / "measured.json"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(json.loads(MEASURED.read_text()) | {"decode": rows}))
    return path


def test_the_measured_rows_are_whole() -> None:
    rows = plot.read(MEASURED)["decode"]
    assert {row["engine"] for row in rows} == {"pagedserve", "vLLM"}
    points = [(row["series"], row["model"], row["batch"]) for row in rows]
    assert len(points) == len(set(points))


@pytest.mark.parametrize("change", [{"ms": 0}, {"batch": 0}, {"extra": 1}])
def test_a_row_that_is_not_whole_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    row = plot.read(MEASURED)["decode"][0] | change
    with pytest.raises(SystemExit, match="a row has batch, engine, how, model"):
        plot.read(write(tmp_path / "rows.json", [row]))


def test_a_series_looks_the_same_in_every_panel() -> None:
    rows = [{"engine": engine, "series": series} for engine, series in
            [("vLLM", "a"), ("ours", "b"), ("ours", "c"), ("ours", "b")]]  # fmt: skip
    looks = plot.looks_of(rows)
    assert list(looks) == ["a", "b", "c"] and len({colour for colour, _ in looks.values()}) == 3


def test_rows_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = plot.read(MEASURED)["decode"][:3]
    unknown = [rows[0] | {"model": "of no shape", "series": "new", "engine": "pagedserve"}]
    data = plot.read(write(tmp_path / "rows.json", rows + unknown))
    plot.draw(data, tmp_path / "plot.svg")
    first = (tmp_path / "plot.svg").read_bytes()
    plot.draw(data, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_bytes() == first
    assert all(name.encode() in first for name in ("of no shape", "vLLM 0.26.0", "roofline"))
