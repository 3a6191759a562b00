"""generation_config.json: defaults of sampling and end tokens; what is not applied is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pagedserve.device import pick
from pagedserve.errors import RequestError, StartupError
from pagedserve.models.generation_config import GenerationConfig, read
from pagedserve.models.loading import load_model
from pagedserve.request import SamplingParams


def write(directory: Path, values: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(values))
    return directory


def ends(directory: Path, config: dict[str, Any], **options: Any) -> list[int]:
    return read(directory, config, **options).end_token_ids


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert ends(tmp_path, {}) == []
    assert ends(tmp_path, {"eos_token_id": 2}) == [2]
    assert ends(tmp_path, {"eos_token_id": [2, 3, 2]}) == [2, 3]
    write(tmp_path, {"temperature": 1.0})
    assert ends(tmp_path, {"eos_token_id": 2}) == [2]
    write(tmp_path, {"eos_token_id": [7, 8]})
    assert ends(tmp_path, {"eos_token_id": 2}) == [7, 8]
    assert ends(tmp_path, {"eos_token_id": 2}, source="none") == [2]
    assert ends(tmp_path, {}, override={"eos_token_id": 5}) == [5]


def test_the_tokenizers_end_is_one_more_unless_the_user_chose_them(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token_id": [7, 8]})
    found = read(tmp_path, {})
    assert found.ending_with(9).end_token_ids == [7, 8, 9]
    assert found.ending_with(8) is found.ending_with(None) is found
    chosen = read(tmp_path, {}, override={"eos_token_id": []})
    assert chosen.ending_with(9).end_token_ids == []


@pytest.mark.parametrize("value", ["x", "2", [2, "x"], 2.0, True, {}])
def test_an_end_token_that_is_none_names_its_file(value: Any, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"/config\.json: eos_token_id must be"):
        read(tmp_path, {"eos_token_id": value})
    write(tmp_path, {"eos_token_id": value})
    with pytest.raises(StartupError, match=r"/generation_config\.json: eos_token_id must be"):
        read(tmp_path, {"eos_token_id": 2})
    with pytest.raises(StartupError, match="--override-generation-config: eos_token_id must be"):
        read(tmp_path, {}, source="none", override={"eos_token_id": value})


def test_defaults_are_read_by_our_names(tmp_path: Path) -> None:
    values = {
        "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1,
        "max_new_tokens": 300, "do_sample": True, "num_beams": 1, "transformers_version": "5.0",
    }  # fmt: skip
    found = read(write(tmp_path, values), {})
    assert found.sampling_params() == SamplingParams(
        temperature=0.6, top_p=0.9, top_k=20, min_p=0.05, repetition_penalty=1.1, max_tokens=300
    )
    assert (found.not_applied, found.source) == ({}, "generation_config.json")
    assert read(tmp_path, {}, source="none") == GenerationConfig("")
    assert read(write(tmp_path, {"top_k": None}), {}).sampling_params() == SamplingParams()


def test_stop_strings_and_the_least_of_tokens_are_defaults_too(tmp_path: Path) -> None:
    found = read(write(tmp_path, {"stop_strings": "</s>", "min_new_tokens": 40}), {})
    assert found.defaults == {"min_tokens": 40, "stop": ["</s>"]}
    assert found.not_applied == {} and found.min_tokens == 40
    assert found.sampling_params(max_tokens=50).min_tokens == 40
    assert found.sampling_params(max_tokens=30).min_tokens == 30  # a default gives way
    assert found.sampling_params(max_tokens=None).min_tokens == 40
    assert found.sampling_params().min_tokens == found.sampling_params().max_tokens == 16
    assert found.sampling_params(min_tokens=3, max_tokens=9, stop=[]) == SamplingParams(
        min_tokens=3, max_tokens=9
    )
    with pytest.raises(RequestError, match="min_tokens is 9, above max_tokens"):
        found.sampling_params(min_tokens=9, max_tokens=8)
    textless = found.without_text()
    assert textless.defaults == {"min_tokens": 40}
    assert textless.not_applied == {"stop_strings": ["</s>"]}
    neutral = read(write(tmp_path, {"stop_strings": [], "min_new_tokens": 0}), {})
    assert (neutral.defaults, neutral.not_applied) == ({}, {})
    assert neutral.without_text() is neutral


def test_without_sampling_the_likeliest_token_is_the_default(tmp_path: Path) -> None:
    values = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "repetition_penalty": 1.2}
    found = read(write(tmp_path, values), {})
    assert found.defaults == {"temperature": 0.0, "repetition_penalty": 1.2}
    assert found.not_applied == {"temperature": 0.9, "top_p": 0.6}


def test_what_is_not_applied_is_shown(tmp_path: Path) -> None:
    values = {"num_beams": 4, "bad_words_ids": [[5]], "max_length": 4096, "chat_format": "chatml",
              "no_repeat_ngram_size": 0, "typical_p": 1.0, "temperature": 0.5}  # fmt: skip
    found = read(write(tmp_path, values), {})
    assert found.not_applied.keys() == {"num_beams", "bad_words_ids", "max_length", "chat_format"}
    assert found.lines() == [
        "sampling defaults: temperature 0.5 (generation_config.json)",
        "not applied from generation_config.json: num_beams 4, bad_words_ids [[5]], "
        'max_length 4096, chat_format "chatml"',
    ]
    assert read(tmp_path, {}, source="none").lines() == []


def test_another_directory_and_overrides(tmp_path: Path) -> None:
    write(tmp_path, {"temperature": 0.5, "top_k": 5})
    other = write(tmp_path / "other", {"temperature": 0.7})
    assert read(tmp_path, {}, source=str(other)).defaults == {"temperature": 0.7}
    found = read(tmp_path, {}, override={"top_k": None, "top_p": 0.5})
    assert found.defaults == {"temperature": 0.5, "top_p": 0.5}
    assert found.source == "generation_config.json with --override-generation-config"
    with pytest.raises(StartupError, match="--generation-config nowhere: there is no file nowhere"):
        read(tmp_path, {}, source="nowhere")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": -1}, "temperature must be between 0.0 and 100.0"),
        ({"top_k": "many"}, "top_k must be an integer"),
        ({"max_new_tokens": 0}, "max_tokens must be between 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_tokens is 9, above max_tokens"),
        ({"min_new_tokens": -1}, "min_tokens must be between 0"),
        ({"stop_strings": [""]}, "each stop must be a string of 1 to"),
        ({"stop_strings": 5}, "stop must be a list"),
    ],
)
def test_a_value_that_no_request_could_have_names_the_file(
    values: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write(tmp_path, values)
    with pytest.raises(StartupError, match=f"generation_config.json: {says}"):
        read(tmp_path, {})


def test_the_engine_gets_the_same_end_tokens_without_files(tmp_path: Path) -> None:
    write(tmp_path, {"eos_token_id": [7, 8], "temperature": 0.5})
    found = read(tmp_path, {"eos_token_id": 1}).ending_with(9)
    options = found.engine_options()
    again = read(
        tmp_path,
        {"eos_token_id": 1},
        source=options["generation_config"],
        override=options["override_generation_config"],
    )
    assert again.end_token_ids == [7, 8, 9]


def test_end_tokens_outside_the_vocabulary_stay_out_of_the_engine(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "hidden_act": "silu", "eos_token_id": [2, 256, -1],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path, device=pick("cpu"), load_format="dummy")
    assert loaded.eos_token_ids == [2]
