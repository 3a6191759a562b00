"""tekken.json: ranks as in `ranks.py`, with the split pattern and the special tokens beside them.

id   0 … special tokens, those without a name filled up … │ rank 0, rank 1, …
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from pagedserve.errors import StartupError
from pagedserve.text.files import read_json
from pagedserve.text.formats import ranks

FILE = "tekken.json"
FILLER = "<SPECIAL_{id}>"
# By the names that every such file gives them.
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# What the first files of this format mean, which do not list theirs.
UNLISTED = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)


def load(file: Path, config: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    """The tokenizer in `file`, and its settings. Raises StartupError."""
    content = read_json(file)
    try:
        special = special_tokens(content)
        size = content["config"].get("default_vocab_size")
        kept = content["vocab"][: None if size is None else size - len(special)]
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in kept]
        pattern = str(content["config"]["pattern"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StartupError(
            f"{file} lacks something or holds a wrong type: {type(error).__name__}: {error}; give "
            "a directory with a tokenizer.json of this model with --tokenizer"
        ) from error
    named = {name: text for name, text in NAMED.items() if text in special}
    by_bytes = {token: rank for rank, token in enumerate(tokens)}
    settings = {**named, "split_pattern": pattern, **config}
    return ranks.build(file, by_bytes, settings, first=special, add_bos=True)


def special_tokens(content: dict[str, Any]) -> list[str]:
    """The special tokens in the order of their ids. Raises KeyError or ValueError."""
    by_rank = dict(enumerate(UNLISTED))
    if "special_tokens" in content:
        by_rank = {entry["rank"]: str(entry["token_str"]) for entry in content["special_tokens"]}
    if sorted(by_rank) != list(range(len(by_rank))):
        raise ValueError("the ranks of special_tokens are not 0, 1, 2, …")
    count = content["config"].get("default_num_special_tokens") or len(by_rank)
    return [by_rank.get(id, FILLER.format(id=id)) for id in range(count)]
