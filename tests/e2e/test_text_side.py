"""A real engine behind a tokenizer of another format: end tokens and overrides reach it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagedserve import LLM, SamplingParams
from tests.checkpoints import tiny_checkpoint
from tests.text.formats.training import sentencepiece_model, write

MODEL = "bpe, bytes, as it stands"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without generation_config.json, whose end only its tokenizer knows."""
    path = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), vocab_size=600)
    (path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": None}
    return write(path, {"config.json": config, "tokenizer.model": sentencepiece_model(MODEL)})


def test_the_tokenizers_end_ends_an_answer_and_the_prompt_keeps_its_space(directory: Path) -> None:
    biased = SamplingParams(temperature=0, max_tokens=6, logit_bias={2: 100})
    with LLM(directory, hf_overrides={"max_position_embeddings": 64}) as llm:
        assert llm.max_model_len == 64
        (output,) = llm.generate("the server", biased)
        assert output.prompt_token_ids == [1, *llm.get_tokenizer().encode("the server", False)]
        (ended,) = output.outputs
        assert (ended.finish_reason, ended.stop_reason, ended.token_ids) == ("stop", None, [2])
        the = llm.get_tokenizer().encode("the", False)
        assert len(the) == 1
        again = SamplingParams(temperature=0, max_tokens=2, logit_bias={the[0]: 100})
        assert llm.generate("the server", again)[0].outputs[0].text == " the the"
        assert llm.generate({"prompt_token_ids": [1]}, again)[0].outputs[0].text == "the the"


def test_end_tokens_that_the_user_names_are_the_only_ones(directory: Path) -> None:
    biased = SamplingParams(temperature=0, max_tokens=2, logit_bias={2: 100})
    with LLM(directory, override_generation_config={"eos_token_id": [7, 9999]}) as llm:
        (output,) = llm.generate("the server", biased)
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("length", [2, 2])
