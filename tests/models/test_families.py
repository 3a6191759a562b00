"""What holds for every family's function and its place in the suite."""

from __future__ import annotations

import inspect

import pytest

from pagedserve.models.architectures.registry import ARCHITECTURES
from tests.models.families import CASES
from tests.models.references import REFERENCES

MOST_LINES = 40
FAMILIES = {family.build.__name__: family for family in ARCHITECTURES.values()}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_says_what_differs_in_forty_lines(name: str) -> None:
    lines = inspect.getsource(FAMILIES[name].build).splitlines()
    assert len(lines) <= MOST_LINES


def test_there_are_more_than_sixty() -> None:
    assert len(FAMILIES) >= 60


def test_every_family_is_compared_with_somebody() -> None:
    """With transformers (`CASES`) or with a reference; the text part of a family as that family."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    compared = {case.architecture or names[case.family] for case in CASES.values()}
    compared |= {one.config["architectures"][0] for one in REFERENCES.values()}
    # Compared by suites of their own.
    compared |= {"MiMoForCausalLM", "BailingMoeV2ForCausalLM"}  # test_twins
    left = [
        name
        for name, family in FAMILIES.items()
        if compared.isdisjoint(family.classes)
        and not any(one.endswith("ForConditionalGeneration") for one in family.classes)
    ]
    assert not left
