"""When a stage becomes a graph, and what becomes of a step whose graph cannot be made."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("triton")

from pagedserve.kernels.sample_gpu import Needs  # noqa: E402
from pagedserve.worker import stages  # noqa: E402
from pagedserve.worker.sizes import Size, Sizes  # noqa: E402
from pagedserve.worker.stages import Made, Stage, Stages  # noqa: E402

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

    def compute(self, size: Size, needs: Needs) -> Made:
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


def rehearsing(
    monkeypatch: pytest.MonkeyPatch, *, capturable: bool = True, error: Exception | None = None
) -> tuple[Stages, list[Any]]:
    """Stages over nothing, and what they are asked to do, in a capture that records nothing."""
    asked: list[Any] = []

    def sample(logits: Any, slots: Any, places: Any, needs: Needs) -> None:
        assert (logits, slots, places) == ("logits", "slots", "places")
        asked.append(needs)

    @contextmanager
    def graph(graph: Any, capture_error_mode: str) -> Iterator[None]:
        torch.cuda.set_stream(cast(Any, "of the capture"))
        yield
        torch.cuda.set_stream(cast(Any, "of the steps"))

    def compute(stages: Stages, size: Size, needs: Needs) -> Any:
        if error is not None:
            raise error
        asked.append((stages.decoder, size, needs))
        return SimpleNamespace(logits="logits", hidden="hidden")

    monkeypatch.setattr(stages, "rehearsal", nullcontext)
    monkeypatch.setattr(Stages, "compute", compute)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a graph")
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: None)
    inputs = SimpleNamespace(cut=lambda *size: SimpleNamespace(slots="slots", places="places"))
    return Stages(
        cast(Any, SimpleNamespace(inputs=inputs)),
        cast(Any, SimpleNamespace(capturable=capturable, excerpt=lambda: "excerpt")),
        cast(Any, "backend"),
        cast(Any, SimpleNamespace(sample=sample)),
        Sizes(2, 16),
        eager=False,
    ), asked


def test_a_rehearsal_goes_through_every_size_once_and_the_sampler_for_every_need(
    monkeypatch: pytest.MonkeyPatch, streams: list[Any]
) -> None:
    found, asked = rehearsing(monkeypatch)
    drawn, both = Needs(True, False, False), Needs(True, True, True)
    found.rehearse([SMALL, LARGE], [NEEDS, drawn, both])
    assert asked == [("excerpt", SMALL, NEEDS), ("excerpt", LARGE, NEEDS), drawn, both]
    assert found.known == {} and found.num_graphs == 0 and streams[-1] == "of the steps"


def test_a_rehearsal_that_fails_is_only_said(
    monkeypatch: pytest.MonkeyPatch, streams: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    found, asked = rehearsing(monkeypatch, error=RuntimeError("no such thing in a capture"))
    found.rehearse([SMALL, LARGE], [NEEDS])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "no such thing in a capture" in record.message
    assert asked == [] and streams[-1] == "of the steps"
    found, asked = rehearsing(monkeypatch, capturable=False)
    found.rehearse([SMALL], [NEEDS])
    assert asked == []


def test_sizes_to_rehearse_reach_from_the_smallest_to_the_largest_in_steps() -> None:
    for max_rows, max_tokens in ((1, 1), (2, 16), (7, 100), (256, 8192), (300, 5000)):
        sizes = Sizes(max_rows, max_tokens)
        found = sizes.sample()
        plain = [size.rows for size in found if not size.mixed]
        mixed = [size.tokens for size in found if size.mixed][::-1]
        assert [size.mixed for size in found] == [True] * len(mixed) + [False] * len(plain)
        for numbers, known, factor in ((plain, sizes.one_token, 2), (mixed, sizes.tokens, 4)):
            assert numbers[0] == known[0] and numbers[-1] == known[-1]
            assert set(numbers) <= set(known) and numbers == sorted(numbers)
            left_out = [n for n in known if n not in numbers]
            assert all(any(m <= n < factor * m for m in numbers) for n in left_out)
        assert all(sizes.of(size.rows, size.tokens) == size for size in found)
