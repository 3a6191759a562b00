"""Tokenizers made in a test, one for each family of decoders, and a checkpoint directory around
one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS = "<s>", "</s>"
WORDS = ["hello", "world", " the", " cat", " sat", "na", "ïve", "日本", "語", "😀", "stop", " end"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level() -> Tokenizer:
    """Byte-level BPE over all 256 bytes with a few merges, some across characters' borders."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        ((spelled, _),) = encoder.pre_tokenize_str(word)
        left = spelled[0]
        for char in spelled[1:]:
            if left + char not in vocab:
                merges.append((left, char))
                vocab[left + char] = len(vocab)
            left += char
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = encoder
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.add_tokens(["<tool>", "é"])  # added, not special; one of them is in the byte alphabet
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def byte_fallback(decoder: Any) -> Tokenizer:
    """Sentencepiece-like BPE: pieces with ▁ for spaces, `<0x..>` for bytes without a piece."""
    vocab = {"<unk>": 0, BOS: 1, EOS: 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in [
        "▁",
        "▁▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁hello",
        "日",
        "é",
        ".",
        "s",
        "t",
        "'",
        "\ufffd",
    ]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "▁"), ("▁", "a"), ("a", "b")], byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    tokenizer.decoder = decoder
    return tokenizer


def fused_decoder() -> Any:
    """What most sentencepiece checkpoints of decoders carry."""
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def metaspace_decoder() -> Any:
    """The older form."""
    return decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])


def word_piece() -> Tokenizer:
    """A decoder that no table describes: words with spaces between, `##` going on."""
    words = ["[UNK]", "[CLS]", "do", "n", "'", "t", "##ing", "go", ".", ",", "it", "s", "##s", "日"]
    tokenizer = Tokenizer(
        models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.add_special_tokens([AddedToken("[CLS]", special=True)])
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def word_level() -> Tokenizer:
    """No decoder at all: tokens joined with spaces."""
    words = ["[UNK]", "a", "b", "c", "é"]
    return Tokenizer(models.WordLevel({w: id for id, w in enumerate(words)}, unk_token="[UNK]"))


def write_checkpoint(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """A model directory as far as the API process reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT_TEMPLATE} | config
    kept = {name: value for name, value in fields.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    (directory / "config.json").write_text("{}")
    return directory
