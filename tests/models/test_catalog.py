"""The catalogue agrees with the code, and docs/models.md with the catalogue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagedserve.cli import main
from pagedserve.models import catalog
from pagedserve.models.architectures import supported
from pagedserve.models.catalog_page import whole
from tests.models.try_fallback import natives

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_is_the_generated_one() -> None:
    assert DOCS.read_text(encoding="utf-8") == whole(), "run `make docs`"


def test_every_class_of_transformers_is_in_the_catalogue_once() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    tried = json.loads(catalog.FILE.read_text(encoding="utf-8"))["fallback"]
    found = catalog.read()
    shown = [name for each in found.natives for name in each.names]
    shown += [each.name for each in found.others]
    assert len(shown) == len(set(shown))
    assert set(supported()) == {name for each in found.natives for name in each.names}
    if catalog_version_is_installed():
        assert set(NAMES.values()) == set(tried)


def catalog_version_is_installed() -> bool:
    """Other versions know other classes."""
    import transformers

    return bool(transformers.__version__ == catalog.read().transformers)


def test_what_the_tests_of_natives_are_is_written_down() -> None:
    table = json.loads(catalog.FILE.read_text(encoding="utf-8"))["native"]
    assert table == natives(), "run `python -m tests.models.try_fallback --native` and `make docs`"
    for each in catalog.read().natives:
        assert each.oracle, f"nothing tests {', '.join(each.names)}"


def test_what_is_served_through_transformers_lets_attention_be_replaced() -> None:
    import transformers

    for each in catalog.read().others:
        assert each.result in ("equal", "refused", "unbuilt")  # and none is "unequal"
        kind = getattr(transformers, each.name, None)
        if each.result == "equal" and kind is not None:
            assert kind._supports_attention_backend, each.name
            assert float(each.detail.split(";")[0]) <= 1e-4


def test_the_command_lists_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for name in ("LlamaForCausalLM", "AfmoeForCausalLM", "MambaForCausalLM", "QWenLMHeadModel"):
        assert name in out
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == catalog.plain(catalog.read())
    assert "MambaForCausalLM" in found["refused"]
    assert "AfmoeForCausalLM" in found["through_transformers"]
