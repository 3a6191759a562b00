"""When a stage becomes a graph, and what becomes of a step whose graph cannot be made."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from pagedserve.kernels.sample_gpu import Needs  # noqa: E402
from pagedserve.worker.sizes import Size, Sizes  # noqa: E402
from pagedserve.worker.stages import Stage, Stages  # noqa: E402

NEEDS = Needs(drawn=False, filtered=False, processed=False)
SMALL, LARGE = Size(1, 1, mixed=False), Size(2, 16, mixed=True)


NO_MEMORY = torch.OutOfMemoryError("out of memory")


class Watched(Stages):
    """Writes down what it does; captures of `cannot` fail, and leave another stream behind."""

    def __init__(
        self,
        cannot: tuple[Size, ...] = (),
        *,
        capturable: bool = True,
        error: RuntimeError = NO_MEMORY,
    ):
        decoder, nothing = SimpleNamespace(capturable=capturable), cast(Any, None)
        super().__init__(nothing, cast(Any, decoder), nothing, nothing, Sizes(2, 16), eager=False)
        self.cannot, self.error, self.done = cannot, error, []

    def compute(self, size: Size, needs: Needs) -> torch.Tensor:
        self.done.append(("compute", size))
        return cast(Any, None)

    def capture(self, stage: Stage) -> torch.cuda.CUDAGraph:
        self.done.append(("capture", stage.size))
        if stage.size in self.cannot:
            torch.cuda.set_stream(cast(Any, "of the capture"))
            raise self.error
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


@pytest.mark.parametrize(
    "error", (torch.OutOfMemoryError("7 MiB free"), RuntimeError("7 MiB free")), ids=repr
)
def test_a_step_whose_graph_cannot_be_made_runs_op_by_op_and_so_do_later_ones(
    error: RuntimeError, streams: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    stages = Watched(cannot=(LARGE,), error=error)
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


@pytest.mark.parametrize(
    ("error", "captures"), ((NO_MEMORY, 2), (RuntimeError("a wait"), 1)), ids=repr
)
def test_graphs_are_tried_again_where_only_memory_was_short(
    error: RuntimeError, captures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagedserve.worker.stages.PAUSE_RUNS", 4)
    stages = Watched(cannot=(SMALL,), error=error)
    for _ in range(6):
        stages.run(SMALL, NEEDS)
    stages.cannot = ()
    for _ in range(2):
        stages.run(SMALL, NEEDS)
    done = [what for what, _ in stages.done]
    assert done.count("capture") == captures
    assert done.count("compute") + done.count("replay") == 8, "every step was computed once"


def test_dropped_graphs_are_captured_again() -> None:
    stages = Watched()
    for _ in range(2):
        stages.run(SMALL, NEEDS)
    stages.drop_graphs()
    stages.run(SMALL, NEEDS)
    assert [what for what, _ in stages.done] == ["compute", *["capture", "replay"] * 2]
    assert stages.num_graphs == 1


def test_there_are_only_so_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedserve.worker.stages.MAX_GRAPHS", 1)
    stages = Watched()
    for _ in range(2):
        stages.run(SMALL, NEEDS)
    stages.done.clear()
    for size in (LARGE, LARGE, LARGE, SMALL):
        stages.run(size, NEEDS)
    assert stages.done == [*[("compute", LARGE)] * 3, ("replay", SMALL)]
