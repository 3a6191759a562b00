"""Trains the tokenizer on generated text and writes its files; it knows no model.

Byte-level BPE: the 256 bytes are in the vocabulary, so every text can be encoded. Digits are split
one by one and never carry a space, so `12 + 34` reads the same wherever it stands.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from chat_format import CHAT_TEMPLATE, END_OF_TEXT, MARKER_TOKENS, SPECIAL_TOKENS, TURN_END
from corpus import documents
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 2048
MAX_POSITIONS = 2048
_MARKERS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + MARKER_TOKENS)))


def train_tokenizer(seed: int, num_documents: int, *, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A tokenizer trained on the first documents of the corpus of `seed`."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKER_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_unmarked_text(seed, num_documents), trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False) for marker in MARKER_TOKENS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, the chat template inside the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _unmarked_text(seed: int, num_documents: int) -> Iterator[str]:
    """The text between the markers: a merge must never learn a piece of one."""
    for document in itertools.islice(documents(seed), num_documents):
        yield from filter(None, _MARKERS.split(document.render()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model's tokenizer.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--documents", type=int, default=20_000)
    args = parser.parse_args()
    save_tokenizer(train_tokenizer(args.seed, args.documents), args.out)


if __name__ == "__main__":
    main()
