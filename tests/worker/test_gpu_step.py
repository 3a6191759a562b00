"""What the host makes of a GPU step's results; the numbers themselves need no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from pagedserve.worker.gpu_runner import Buffers, GpuStep  # noqa: E402
from pagedserve.worker.sampler import LogprobColumns  # noqa: E402


class Done:
    def synchronize(self) -> None:
        pass


def step(sampled: list[int] | None, slots: list[int], **changes: object) -> GpuStep:
    """A stage of four rows that drew 10, 11, 12, 13, the third from logits that were not finite."""
    results = torch.tensor([10, 11, 12, 13, 1, 1, 0, 1, 99, 99], dtype=torch.int32)
    message = torch.zeros(1, dtype=torch.int32)
    buffers = Buffers(message, message.numpy(), results, Done())
    fields = {"logprobs": None, "prompt": []} | changes
    return GpuStep(buffers, 4, sampled, slots, **fields)


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
    columns = LogprobColumns(
        torch.tensor([-0.5]),
        torch.tensor([1]),
        torch.tensor([[12]]),
        torch.tensor([[-0.5]]),
        [1],
    )
    output = step([1, 3], [7, 2], logprobs=([1], columns)).result()
    assert output.logprobs[0] is None
    assert output.logprobs[1] is not None and output.logprobs[1].top_ids == [12]
