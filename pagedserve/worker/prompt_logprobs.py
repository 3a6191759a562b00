"""Log-probabilities of prompt tokens, for the sequences that asked for them."""

from __future__ import annotations

from torch import Tensor

from pagedserve.models.base import Model
from pagedserve.step import Join, Slot, Step, TokenLogprobs
from pagedserve.worker.sampler import LogprobColumns, logprob_columns

LOGITS_ROWS = 256  # positions whose logits are held at a time


class PromptLogprobs:
    """token_ids: [slots, length] int64, the sequences themselves."""

    def __init__(self, token_ids: Tensor, decoder: Model):
        self._token_ids = token_ids
        self._decoder = decoder
        self.wanted: dict[Slot, tuple[int, int]] = {}  # prompt length and number of likeliest

    def remember(self, join: Join) -> None:
        """A sequence takes a slot."""
        self.wanted.pop(join.slot, None)
        if join.params.prompt_logprobs is not None:
            self.wanted[join.slot] = join.num_prompt, join.params.prompt_logprobs

    def of(self, step: Step, order: list[int], hidden: Tensor) -> list[tuple[Slot, LogprobColumns]]:
        """Of the prompt tokens that follow this step's positions.

        hidden: [T, C], the rows of the step in `order`, one after the other.
        """
        found = []
        first = 0
        for row in order:
            slot, start, count = step.slots[row], step.starts[row], step.counts[row]
            if slot in self.wanted:
                num_prompt, wanted = self.wanted[slot]
                end = min(start + count, num_prompt - 1)  # the last prompt token precedes output
                for at in range(start, end, LOGITS_ROWS):
                    stop = min(at + LOGITS_ROWS, end)
                    logits = self._decoder.logits(hidden[first + at - start : first + stop - start])
                    targets = self._token_ids[slot, at + 1 : stop + 1]
                    columns = logprob_columns(logits, targets, [wanted] * (stop - at))
                    found.append((slot, columns))
            first += count
        return found


def by_slot(found: list[tuple[Slot, LogprobColumns]]) -> dict[Slot, list[TokenLogprobs]]:
    """On the host."""
    result: dict[Slot, list[TokenLogprobs]] = {}
    for slot, columns in found:
        entries = [entry for entry in columns.to_entries() if entry is not None]
        result.setdefault(slot, []).extend(entries)
    return result
