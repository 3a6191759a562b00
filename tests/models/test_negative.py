"""Negative control: whatever is wrong in a spec moves the logits, so that parity means something.

Every family's spec is bent in one thing at a time (`bends`) and computed with the same weights.
The suite bends a sample; all of them, in minutes:

python -m tests.models.test_negative
"""

from __future__ import annotations

import dataclasses
import random
import zlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pagedserve.device import pick
from pagedserve.models.architectures import spec_of
from pagedserve.models.assembly import assemble
from pagedserve.spec import DecoderSpec
from tests.checkpoints import config_of
from tests.models.bends import BENDS, KINDS, NOT_BENT, bends
from tests.models.families import CASES
from tests.models.paged import PagedRun
from tests.models.test_defaults import normalised

PROMPT = torch.randint(3, 250, (43,), generator=torch.Generator().manual_seed(5)).tolist()
MOVED = 1e-4  # of the largest logit: ten times what parity allows
EACH = 10  # bends of a case in the sample
EMBED_SCALE, EXPERT_SCALE = "embed_scale of DecoderSpec", "layers.ffn.scale of Moe"
AFTER_ROPE = "layers.attn.norm_after_rope of Attn"
NORMED = "a norm behind the embedding takes out what scales it"
TURNED = "a norm without weights does not care how a head is turned"
# Bends that change nothing, and why.
STILL: dict[tuple[str, str], str] = {
    ("rope dynamic within the trained length", "layers.attn.rope.scaling of Rope"): "there is none",
    ("nanochat", EMBED_SCALE): NORMED,
    ("bloom", EMBED_SCALE): NORMED,
    ("bloom with 6 heads", EMBED_SCALE): NORMED,
    ("bloom with 12 heads, normed residuals", EMBED_SCALE): NORMED,
    ("nanochat", AFTER_ROPE): TURNED,
    ("llama4", AFTER_ROPE): TURNED,
    ("flex_olmo", EXPERT_SCALE): "a norm behind the experts takes out what scales them",
    ("flex_olmo", "layers.ffn.renorm of Moe"): "the same",
}


class Weights:
    """Any tensor that is asked for: random by its name, so that a bent spec gets the same ones."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def has(self, name: str) -> bool:
        return False

    def shape(self, name: str) -> tuple[int, ...] | None:
        return None

    def read(
        self,
        name: str,
        into: Tensor,
        *,
        transposed: bool = False,
        rows: Tensor | None = None,
        later: bool = False,
    ) -> None:
        """More rows are made than needed, for whoever reads another part of the tensor."""
        count = max(into.shape[0], 1024 if into.dim() == 2 else 16)
        shape = (count, *into.shape[1:]) if into.dim() > 1 else (1024,)
        if (name, shape) not in self.made:
            seeded = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            made = torch.randn(shape, generator=seeded)
            self.made[name, shape] = made * 0.12 if into.dim() > 1 else made * 0.3 + 0.5
        made = self.made[name, shape]
        into.copy_(made[: into.shape[0]] if rows is None else made[rows])

    def settle(self) -> None:
        """All is read at once."""

    def finish(self) -> None:
        """What a bent spec does not read is left."""


def logits(spec: DecoderSpec, weights: Weights, context: int | None) -> Tensor:
    """Of the prompt: [tokens, vocab]."""
    device = pick("cpu")
    decoder = assemble(spec, weights, device=device, dtype=torch.float32, context=context)
    run = PagedRun(SimpleNamespace(spec=spec, decoder=decoder), block_size=16)  # type: ignore[arg-type]
    run.allocate([PROMPT], random.Random(0))
    return decoder.logits(run.step([PROMPT], [0], [0], [len(PROMPT)]))


def spec_of_case(name: str) -> DecoderSpec:
    case = CASES[name]
    return spec_of(normalised(config_of(case.family, **case.config)))


def moves(name: str, chosen: set[str] | None = None) -> dict[str, float]:
    """How far each bend of a case (of those chosen) moves the logits, as a share of the largest."""
    spec, weights, context = spec_of_case(name), Weights(), CASES[name].context
    want = logits(spec, weights, context)
    assert torch.isfinite(want).all() and want.std() > 0
    return {
        where: float((logits(bent, weights, context) - want).abs().max() / want.abs().max())
        for where, _, bent in bends(spec)
        if chosen is None or where in chosen
    }


@pytest.fixture(scope="module")
def sample() -> dict[str, set[str]]:
    """Some bends of every case, by its name; and of every field at least one."""
    chosen: dict[str, set[str]] = {}
    bent: set[tuple[type, str]] = set()
    for name in CASES:
        found = [(where, what) for where, what, _ in bends(spec_of_case(name))]
        of_case = random.Random(name).sample(found, EACH)
        fresh = {what: where for where, what in found if what not in bent}
        chosen[name] = {where for where, _ in of_case} | set(fresh.values())
        bent |= fresh.keys()
    assert bent == {(kind, field) for kind, field, _ in BENDS}
    return chosen


@pytest.mark.parametrize("name", CASES)
def test_a_spec_with_one_thing_wrong_has_other_logits(
    name: str, sample: dict[str, set[str]]
) -> None:
    for where, moved in moves(name, sample[name]).items():
        assert (moved > MOVED) != ((name, where) in STILL), where


def test_every_field_of_a_spec_is_bent_or_says_why_not() -> None:
    fields = {(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)}
    bent = {(kind, field) for kind, field, _ in BENDS}
    assert bent | NOT_BENT.keys() == fields
    assert not bent & NOT_BENT.keys()


def test_nearly_every_bend_moves() -> None:
    everything = {(name, where) for name in CASES for where, _, _ in bends(spec_of_case(name))}
    assert STILL.keys() <= everything
    assert len(STILL) <= 0.05 * len(everything)


def main() -> None:
    """Bend everything; print what stands still, and what is said to and moves."""
    for name in CASES:
        for where, moved in moves(name).items():
            if (moved > MOVED) == ((name, where) in STILL):
                print(f"{name}: {where}: {moved:.0e}")


if __name__ == "__main__":
    main()
