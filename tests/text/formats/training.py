"""Tiny tokenizers trained in a test, as files of a checkpoint."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

CORPUS = [
    "the server takes a request and answers with tokens, one after the other",
    "a block table says where the keys and values of a sequence lie",
    "naïve café 12345  67890 and some more: x = [1, 2, 3]; y = {'a': 1}",
    "日本語のテキストです。",
    "    indented code\n\tand tabs",
    "a" * 20,
    "=" * 30 + " -" * 9,
    "x" + " " * 24 + "y",
    "It's what they'd say, isn't it?",
] * 12

# Words of the corpus, runs, what normalisation changes, what has no piece, what looks special.
FRAGMENTS = [
    *("the ", "server", " tokens", "a", "aaa", "a" * 9, " ", "  ", " " * 7, "\n", "\n\n\n", "\t"),
    *(
        "é",
        "e\u0301",
        "ﬁ",
        "①",
        "日本",
        "語",
        "😀",
        "\u3000",
        "▁",
        "▁▁",
        "12",
        "345",
        "'s",
        "=" * 5,
    ),
    *("<0x41>", "<", ">", "<turn>", "<bb>", "<b>", "<unused", "<s", "Ünïcödé", "\u200d", "\x00"),
]
texts = st.lists(
    st.sampled_from(FRAGMENTS) | st.characters(exclude_categories=["Cs"]), max_size=14
).map("".join)

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
FALLBACK = {"byte_fallback": True, "character_coverage": 0.98}
MODELS: dict[str, dict[str, Any]] = {
    "bpe, bytes, as it stands": {
        **PLAIN, **FALLBACK, "model_type": "bpe", "vocab_size": 540, "split_digits": True,
        "allow_whitespace_only_pieces": True,
    },
    "bpe, unknown, normalised": {
        "model_type": "bpe", "vocab_size": 240, "character_coverage": 0.98,
    },
    "bpe, user-defined pieces, no prefix": {
        **PLAIN, **FALLBACK, "model_type": "bpe", "vocab_size": 550, "add_dummy_prefix": False,
        "user_defined_symbols": ["<turn>", "▁▁", "▁▁▁", "\n\n", "<b>", "<bb>"],
        "control_symbols": ["<ctl>"],
    },
    "unigram, bytes, as it stands": {
        **PLAIN, **FALLBACK, "model_type": "unigram", "hard_vocab_limit": False, "vocab_size": 400,
    },
    "unigram, unknown, normalised": {
        "model_type": "unigram", "hard_vocab_limit": False, "vocab_size": 140,
        "character_coverage": 0.98,
        "user_defined_symbols": ["<turn>", "xy"],
    },
}  # fmt: skip


@functools.cache
def sentencepiece_model(name: str) -> bytes:
    """A trained model file."""
    return train(**MODELS[name])


def train(**options: Any) -> bytes:
    """The model file that sentencepiece's trainer makes of the corpus."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=written, minloglevel=2, **options
    )
    return written.getvalue()


def write(directory: Path, files: dict[str, bytes | dict[str, Any]]) -> Path:
    """Files of a checkpoint: bytes as they are, objects as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / name).write_bytes(raw)
    return directory


@functools.cache
def byte_level_files(vocab_size: int = 400) -> tuple[bytes, bytes]:
    """vocab.json and merges.txt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return json.dumps(model["vocab"]).encode(), f"#version: 0.2\n{merges}\n".encode()
