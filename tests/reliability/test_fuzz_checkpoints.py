"""Checkpoints bent in every file that is read before a weight is: a StartupError or a model.

A checkpoint comes from the net. Whatever its safetensors header, its config.json or its tokenizer's
files say, the server says what is wrong with it and exits; it does not crash, hang or read past an
end. Each case is a directory with one file bent.
"""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pagedserve.config import DEMO_MODEL
from pagedserve.errors import RequestError, StartupError
from pagedserve.models import config_json, generation_config
from pagedserve.models.architectures import spec_of
from pagedserve.models.shards import stored_tensors
from pagedserve.models.tokenizer_classes import tokenizer_classes
from pagedserve.text.chat import load_text
from tests.reliability.bending import bent, bent_bytes, fuzz, json_bytes
from tests.text.building import byte_fallback, byte_level, fused_decoder
from tests.text.formats import test_ranks, test_tekken, training

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
COUNTS = [2_000, pytest.param(1_000_000, marks=pytest.mark.marathon)]


def bent_json(value: Any, r: random.Random) -> bytes:
    """A JSON file, most of the time still JSON."""
    data = json_bytes(bent(value, r, r.choice([1, 1, 2, 4])))
    return bent_bytes(data, r, r.choice([1, 2])) if r.random() < 0.2 else data


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────


@st.composite
def headers(draw: st.DrawFn) -> dict[str, Any]:
    """The header of a file of few tensors without a gap."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    end = 0
    for at in range(draw(st.integers(0, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("I64", 8), ("BOOL", 1)]))
        begin, end = end, end + math.prod(shape) * size
        header[f"layer.{at}.weight"] = {
            "dtype": dtype, "shape": shape, "data_offsets": [begin, end],
        }  # fmt: skip
    return header


def shard(header: dict[str, Any], r: random.Random) -> bytes:
    """The file, bent in its header, its length, or anywhere."""
    data = b"x" * max([e["data_offsets"][1] for n, e in header.items() if n[0] != "_"], default=0)
    text = json_bytes(header) if r.random() < 0.1 else bent_json(header, r)
    length = len(text)
    if r.random() < 0.1:
        length = r.choice([0, length - 1, length + 1, 2**63, 2**64 - 1, r.randrange(1 << 40)])
    file = struct.pack("<Q", max(0, length)) + text + data
    return bent_bytes(file, r, 1) if r.random() < 0.1 else file


@pytest.mark.parametrize("cases", COUNTS)
def test_a_bent_safetensors_file_is_refused_or_read_within_its_bounds(
    cases: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"

    def outcome(header: dict[str, Any], r: random.Random) -> str:
        file = shard(header, r)
        path.write_bytes(file)
        try:
            found = stored_tensors(tmp_path)
        except StartupError:
            return "refused"
        places = sorted((each.start, each.start + each.num_bytes) for each in found.values())
        assert all(0 < begin <= end <= len(file) for begin, end in places)
        assert all(one[1] <= other[0] for one, other in zip(places, places[1:], strict=False))
        return "read"

    outcomes = fuzz("safetensors", cases, headers(), outcome)
    assert min(outcomes["read"], outcomes["refused"]) > cases // 50


@pytest.mark.parametrize("cases", COUNTS)
def test_a_bent_index_of_shards_is_refused_or_read(cases: int, tmp_path: Path) -> None:
    names = ("model-1.safetensors", "model-2.safetensors")
    for name in names:
        entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
        text = json.dumps({name[:7]: entry}).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(text)) + text + b"x")
    index = {"metadata": {"total_size": 2}, "weight_map": {name[:7]: name for name in names}}

    def outcome(index: dict[str, Any], r: random.Random) -> str:
        (tmp_path / "model.safetensors.index.json").write_bytes(bent_json(index, r))
        try:
            found = stored_tensors(tmp_path)
        except StartupError:
            return "refused"
        assert all(each.path.parent == tmp_path for each in found.values())
        return "read"

    assert fuzz("index", cases, st.just(index), outcome)["refused"]


# ── config.json and generation_config.json ───────────────────────────────────────────────────────

CONFIGS = [
    json.loads(path.read_text())
    for path in [Path(DEMO_MODEL) / "config.json", *sorted(SHAPES.glob("*/config.json"))]
]


@pytest.mark.parametrize("cases", COUNTS)
def test_a_bent_config_is_refused_or_describes_a_model(cases: int, tmp_path: Path) -> None:
    def outcome(config: dict[str, Any], r: random.Random) -> str:
        (tmp_path / "config.json").write_bytes(bent_json(config, r))
        try:
            spec = spec_of(config_json.read(tmp_path))
        except StartupError:
            return "refused"
        assert spec.layers
        return "read"

    outcomes = fuzz("config.json", cases, st.sampled_from(CONFIGS), outcome)
    assert min(outcomes["read"], outcomes["refused"]) > cases // 50


GENERATION = {
    "temperature": 0.6, "top_p": 0.9, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.1,
    "max_new_tokens": 256, "do_sample": True, "eos_token_id": [1, 2], "num_beams": 1,
    "transformers_version": "5.0", "stop_strings": None,
}  # fmt: skip


@pytest.mark.parametrize("cases", COUNTS)
def test_a_bent_generation_config_is_refused_or_read(cases: int, tmp_path: Path) -> None:
    def outcome(fields: dict[str, Any], r: random.Random) -> str:
        (tmp_path / "generation_config.json").write_bytes(bent_json(fields, r))
        config = {"eos_token_id": 2, "vocab_size": 99}
        try:
            generation_config.read(tmp_path, config, source="auto").sampling_params()
        except StartupError:
            return "refused"
        return "read"

    outcomes = fuzz("generation_config.json", cases, st.just(GENERATION), outcome)
    assert min(outcomes["read"], outcomes["refused"]) > cases // 50


# ── tokenizers ───────────────────────────────────────────────────────────────────────────────────

SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False, "special": True},
    "additional_special_tokens": ["<turn>"], "add_bos_token": True, "add_eos_token": False,
    "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
    "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "clean_up_tokenization_spaces": False, "legacy": False, "add_prefix_space": None,
}  # fmt: skip
BYTES, MERGES = training.byte_level_files(300)
TEXT = "the server's 12 tokens, naïve 日本語 <turn>\n\n<s>"
# The format's files as they should be; those that are JSON are bent as JSON.
FORMATS: dict[str, dict[str, Any]] = {
    "own, byte level": {"tokenizer.json": json.loads(byte_level().to_str())},
    "own, byte fallback": {"tokenizer.json": json.loads(byte_fallback(fused_decoder()).to_str())},
    "sentencepiece": {
        "tokenizer.model": training.sentencepiece_model("unigram, unknown, normalised")
    },
    "ranks": {
        "tokenizer.model": test_ranks.rank_file(),
        "tokenizer_config.json": SETTINGS | {"added_tokens_decoder": {}},
        "added_tokens.json": {},
    },
    "tekken": {"tekken.json": test_tekken.content()},
    "vocab and merges": {"vocab.json": json.loads(BYTES), "merges.txt": MERGES},
}
CLASSES = ["PreTrainedTokenizerFast", "QWenTokenizer", "LlamaTokenizer", "QWenTokenizer"]


# Ten milliseconds to build one: fewer of them.
@pytest.mark.parametrize("cases", [200, pytest.param(20_000, marks=pytest.mark.marathon)])
@pytest.mark.parametrize("name", FORMATS)
def test_a_bent_tokenizer_is_refused_or_encodes(name: str, cases: int, tmp_path: Path) -> None:
    whole: dict[str, Any] = {
        "tokenizer_config.json": SETTINGS,
        "added_tokens.json": {"<turn>": 400},
        "special_tokens_map.json": {"unk_token": "<unk>"},
        **FORMATS[name],
    }

    def outcome(class_name: str, r: random.Random) -> str:
        bent_one = r.choice([*FORMATS[name], *whole])  # the format's own twice as often
        for file, content in whole.items():
            if file == "tokenizer_config.json":
                content = content | {"tokenizer_class": class_name}
            if file != bent_one:
                data = content if isinstance(content, bytes) else json_bytes(content)
            elif isinstance(content, bytes):
                data = bent_bytes(content, r, r.choice([1, 1, 3, 9]))
            else:
                data = bent_json(content, r)
            (tmp_path / file).write_bytes(data)
        try:
            tokenizer, template = load_text(tmp_path, class_defaults=tokenizer_classes())
            ids = tokenizer.encode(TEXT)
            tokenizer.decode(ids)
            if template is not None:
                template.render([{"role": "user", "content": "hi"}])
        except StartupError:
            return "refused"
        except RequestError:
            return "a template that cannot be rendered"
        return "read"

    outcomes = fuzz(f"tokenizer, {name}", cases, st.sampled_from(CLASSES), outcome)
    assert outcomes["refused"]
