"""Draws docs/performance.svg from benchmarks/measured.json: tokens a second against latency.

    pip install matplotlib        # or: pip install --editable '.[bench]'
    python benchmarks/plot.py [--data FILE] [--out FILE]

One panel a model. Across: milliseconds between two tokens of one sequence. Up: tokens a second of
the whole batch. Left and up is better. A point is a batch size, the dashed line the roofline at the
same sizes (docs/performance.md). Rows are drawn as they stand in the file: add what was measured,
with a `series` of its own, and run this again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pagedserve.commands.bench.roofline import Roofline, chip_named, read_spec

HERE = Path(__file__).parent
NEEDED = {"series", "engine", "version", "model", "batch", "ms", "how"}
FLOOR_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COLOURS = {"vLLM": "#c26a1b"}  # of other engines; ours below
OURS = ("#1b5fc2", "#1b9e77", "#7a3fb0")
MARKS = "osD^v"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE / "measured.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "performance.svg")
    args = parser.parse_args()
    data = read(args.data)
    draw(data, args.out)
    print(f"{args.out}: {len(data['decode'])} points", file=sys.stderr)


def read(path: Path) -> dict[str, Any]:
    """The file's data. Exits with what is wrong in it."""
    data: dict[str, Any] = json.loads(path.read_text())
    for row in data["decode"]:
        if set(row) != NEEDED or row["batch"] < 1 or row["ms"] <= 0:
            sys.exit(f"{path}: a row has {', '.join(sorted(NEEDED))}, and numbers above 0: {row}")
    return data


def draw(data: dict[str, Any], out: Path) -> None:
    """The whole figure."""
    models = list(dict.fromkeys(row["model"] for row in data["decode"]))
    looks = looks_of(data["decode"])
    with svg(out, len(models), (4.2 * len(models), 4.6)) as (figure, panels):
        for panel, model in zip(panels, models, strict=True):
            floor(panel, model, data)
            sizes = sorted({row["batch"] for row in data["decode"] if row["model"] == model})
            for series, (colour, mark) in looks.items():
                found = [r for r in data["decode"] if (r["model"], r["series"]) == (model, series)]
                line(panel, sorted(found, key=lambda r: r["batch"]), sizes, series, colour, mark)
            name = "ms between tokens of a sequence"
            panel.set(xscale="log", yscale="log", title=model, xlabel=name)
            plain_ticks(panel.xaxis, panel.yaxis)
            panel.grid(True, linewidth=0.3)
        panels[0].set_ylabel("output tokens/s of the batch")
        figure.suptitle(f"Decode on one {data['gpu']}, bf16, context {data['context']} (mean)")
        named = {
            label: handle
            for panel in panels
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named, loc="outside lower center", ncols=4, fontsize=9)


@contextlib.contextmanager
def svg(out: Path, panels: int, inches: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its panels, written behind the block as SVG whose text stays text.

    The same data gives the same bytes. Exits where there is no matplotlib.
    """
    if find_spec("matplotlib") is None:
        sys.exit("needs matplotlib; pip install matplotlib")
    import matplotlib
    import matplotlib.pyplot as plt

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pagedserve"})
    figure, grid = plt.subplots(1, panels, figsize=inches, squeeze=False, layout="constrained")
    yield figure, grid[0]
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def looks_of(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """series → colour and mark, the same in every panel."""
    looks: dict[str, tuple[str, str]] = {}
    ours = itertools.cycle(OURS)
    for row in rows:
        if row["series"] not in looks:
            colour = COLOURS.get(row["engine"]) or next(ours)
            looks[row["series"]] = colour, MARKS[len(looks) % len(MARKS)]
    return looks


def line(
    panel: Any, rows: list[dict[str, Any]], sizes: list[int], label: str, colour: str, mark: str
) -> None:
    """One series, its points labelled with their batch.

    Only neighbours among the panel's `sizes` are joined: nothing is claimed of what lies between.
    """
    if not rows:
        return
    points = {row["batch"]: (row["ms"], 1e3 * row["batch"] / row["ms"]) for row in rows}
    gap = (math.nan, math.nan)
    times, rates = zip(*(points.get(size, gap) for size in sizes), strict=True)
    panel.plot(times, rates, color=colour, marker=mark, markersize=4, linewidth=1.2, label=label)
    for batch, place in points.items():
        panel.annotate(
            str(batch),
            place,
            textcoords="offset points",
            xytext=(4, -9),
            fontsize=7,
            color=colour,
        )


def floor(panel: Any, model: str, data: dict[str, Any]) -> None:
    """The roofline, where the model's shape and the GPU's figures are known."""
    directory = HERE / "shapes" / model
    spec = read_spec(directory) if directory.is_dir() else None
    chip = chip_named(data["gpu"])
    if spec is None or chip is None:
        return
    roof = Roofline(spec, chip)
    times = [1e3 * roof.decode_seconds(batch, data["context"]) for batch in FLOOR_BATCHES]
    rates = [1e3 * batch / ms for batch, ms in zip(FLOOR_BATCHES, times, strict=True)]
    panel.plot(times, rates, color="#666666", linestyle="--", linewidth=1, label="roofline")


def plain_ticks(*axes: Any) -> None:
    """Numbers as people write them, also between powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in axes:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    main()
