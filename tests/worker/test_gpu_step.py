"""What the host makes of a GPU step's results; the numbers themselves need no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pagedserve.step import TokenLogprobs  # noqa: E402
from pagedserve.worker.gpu_runner import Buffers, GpuStep  # noqa: E402
from pagedserve.worker.results import MOST, Results  # noqa: E402


class Done:
    def synchronize(self) -> None:
        pass


def step(sampled: list[int] | None, slots: list[int], **changes: object) -> GpuStep:
    """A stage of four rows that drew 10, 11, 12, 13, the third from logits that were not finite."""
    results = torch.full((Results(5, scored=True).size,), 99, dtype=torch.int32)
    results[:8] = torch.tensor([10, 11, 12, 13, 1, 1, 0, 1])
    message = torch.zeros(1, dtype=torch.int32)
    buffers = Buffers(message, message.numpy(), results, Done())
    layout = Results(4, scored="wanted" in changes)
    if layout.scored:
        scores = layout.scores(results)
        scores.logprobs[:] = torch.tensor([-0.5, -1.5, -2.5, -3.5])
        scores.ranks[:] = torch.tensor([1, 2, 3, 4])
        scores.top_ids[:] = torch.arange(4)[:, None] * 100 + torch.arange(MOST)
        scores.top_logprobs[:] = -(torch.arange(4)[:, None] + torch.arange(MOST) / 32)
    fields = {"wanted": [], "prompt": []} | changes
    return GpuStep(buffers, layout, sampled, slots, **fields)


def test_all_rows_of_the_step_drew_and_padding_is_left_out() -> None:
    output = step(None, [5, 7]).result()
    assert (output.token_ids, list(output.failed)) == ([10, 11], [])


def test_a_row_that_was_not_finite_is_named_by_its_slot() -> None:
    output = step(None, [5, 7, 9, 2]).result()
    assert (output.token_ids, list(output.failed)) == ([10, 11, 12, 13], [9])


def test_only_some_rows_drew() -> None:
    output = step([1, 2], [7, 9]).result()
    assert (output.token_ids, list(output.failed)) == ([11, 12], [9])


def test_log_probabilities_stand_beside_the_tokens_that_asked() -> None:
    output = step([1, 3], [7, 2], wanted=[None, 2]).result()
    assert output.token_ids == [11, 13]
    assert output.logprobs == [None, TokenLogprobs(-3.5, 4, [300, 301], [-3.0, -3.03125])]


def test_log_probabilities_of_every_row_and_as_many_as_may_be_asked_for() -> None:
    output = step(None, [5, 7, 9, 2], wanted=[0, 1, MOST, 3]).result()
    assert [entry.rank for entry in output.logprobs if entry] == [1, 2, 3, 4]
    assert [len(entry.top_ids) for entry in output.logprobs if entry] == [0, 1, MOST, 3]
    assert output.token_ids == [10, 11, 12, 13] and list(output.failed) == [9]


def test_none_of_those_that_drew_asked_for_log_probabilities() -> None:
    output = step([1, 3], [7, 2], wanted=[None, None]).result()
    assert output.token_ids == [11, 13] and output.logprobs == []


@pytest.mark.parametrize("rows", (1, 2, 3, 4, 7, 256))
def test_no_part_of_the_results_lies_on_another(rows: int) -> None:
    layout = Results(rows, scored=True)
    flat = torch.zeros(layout.size, dtype=torch.int32)
    scores = layout.scores(flat)
    parts = [layout.drawn(flat), scores.logprobs, scores.ranks, scores.top_ids]
    for value, part in enumerate([*parts, scores.top_logprobs], 1):
        assert not part.any() and part.data_ptr() % 4 == 0
        assert (
            part.data_ptr() - flat.data_ptr() < 16 or not (part.data_ptr() - flat.data_ptr()) % 16
        )
        part.fill_(value)
    assert layout.drawn(flat).tolist() == [[1] * rows] * 2
    assert (scores.logprobs == 2).all() and (scores.ranks == 3).all()
    assert (scores.top_ids == 4).all() and (scores.top_logprobs == 5).all()
    assert Results(rows, scored=False).size == 2 * rows <= layout.size
