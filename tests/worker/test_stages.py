"""When a stage becomes a graph, and what becomes of a step whose graph cannot be made."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from pagedserve.kernels.sample_gpu import Needs  # noqa: E402
from pagedserve.worker.stages import Made, Size, Sizes, Stage, Stages  # noqa: E402

NEEDS = Needs(drawn=False, filtered=False, processed=False)
SMALL, LARGE = Size(1, 1, mixed=False), Size(2, 16, mixed=True)


class Watched(Stages):
    """Writes down what it does; captures of `cannot` fail, and leave another stream behind."""

    def __init__(self, cannot: tuple[Size, ...] = (), *, capturable: bool = True):
        decoder, nothing = SimpleNamespace(capturable=capturable), cast(Any, None)
        super().__init__(nothing, cast(Any, decoder), nothing, nothing, Sizes(2, 16), eager=False)
        self.cannot, self.done = cannot, []

    def compute(self, size: Size, needs: Needs) -> Made:
        self.done.append(("compute", size))
        return cast(Any, None)

    def capture(self, stage: Stage) -> torch.cuda.CUDAGraph:
        self.done.append(("capture", stage.size))
        if stage.size in self.cannot:
            torch.cuda.set_stream(cast(Any, "of the capture"))
            raise torch.OutOfMemoryError("out of memory: 7 MiB free")
        return cast(Any, SimpleNamespace(replay=lambda: self.done.append(("replay", stage.size))))


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The current stream is the last one."""
    current: list[Any] = ["of the steps"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    return current


def test_a_stage_is_a_graph_from_its_second_run_on() -> None:
    stages = Watched()
    for _ in range(3):
        stages.run(SMALL, NEEDS)
    assert [what for what, _ in stages.done] == ["compute", "capture", "replay", "replay"]


def test_what_asks_the_host_is_never_captured() -> None:
    stages = Watched(capturable=False)
    for _ in range(3):
        stages.run(SMALL, NEEDS)
    assert [what for what, _ in stages.done] == ["compute"] * 3


def test_a_step_whose_graph_cannot_be_made_runs_op_by_op_and_so_do_all_later_ones(
    streams: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    stages = Watched(cannot=(LARGE,))
    for _ in range(2):
        stages.run(SMALL, NEEDS)
    stages.done.clear()
    with caplog.at_level(logging.WARNING, "pagedserve"):
        for size in (LARGE, LARGE, LARGE, SMALL):
            stages.run(size, NEEDS)
    assert stages.done == [
        ("compute", LARGE),
        ("capture", LARGE),
        ("compute", LARGE),
        ("compute", LARGE),
        ("replay", SMALL),
    ]
    assert streams[-1] == "of the steps"
    [line] = caplog.messages
    assert "7 MiB free" in line and "Size(rows=2, tokens=16, mixed=True)" in line


def test_there_are_only_so_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedserve.worker.stages.MAX_GRAPHS", 1)
    stages = Watched()
    for _ in range(2):
        stages.run(SMALL, NEEDS)
    stages.done.clear()
    for size in (LARGE, LARGE, LARGE, SMALL):
        stages.run(size, NEEDS)
    assert stages.done == [*[("compute", LARGE)] * 3, ("replay", SMALL)]
