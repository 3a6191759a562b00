"""What the formats share: a vocabulary with the ids that files name, and what stands around a text.

`tokenizers` gives a token that is added later the next free id; here ids are those that the
checkpoint was trained with, so added tokens are in the model's vocabulary before it is built.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from pagedserve.errors import StartupError
from pagedserve.text.files import added_tokens, flag, more_specials, named_specials

Vocabulary = dict[str, int]


def place_added(vocabulary: Vocabulary, config: Mapping[str, Any]) -> None:
    """Put the tokens that the settings name into `vocabulary`, under their ids.

    Where an id has a token already, the settings name it anew, as for the unused pieces of a
    vocabulary that later training gave a meaning. A token without an id follows the last one.
    Raises StartupError for a token that already has another id.
    """
    by_id = {id: token for token, id in vocabulary.items()}
    for id, token in added_tokens(config):
        text = token.content
        if vocabulary.get(text, id) != id:
            raise StartupError(
                f"added_tokens_decoder gives {text!r} the id {id}, the vocabulary has it at "
                f"{vocabulary[text]}"
            )
        if by_id.get(id, text) != text:
            del vocabulary[by_id[id]]
        vocabulary[text], by_id[id] = id, text
    place_tail(vocabulary, [*named_specials(config).values(), *more_specials(config)])


def with_class_specials(config: dict[str, Any], vocabulary: Container[str]) -> dict[str, Any]:
    """`config` with the special tokens of its tokenizer class, where `vocabulary` has them."""
    usual = config.get("specials") or {}
    return {name: text for name, text in usual.items() if text in vocabulary} | config


def place_tail(vocabulary: Vocabulary, tokens: Iterable[str]) -> None:
    """Give those of `tokens` that have no id the ids after the last one."""
    after = max(vocabulary.values(), default=-1) + 1
    for token in tokens:
        if token not in vocabulary:
            vocabulary[token] = after
            after += 1


def add_specials(backend: Backend, tokens: Iterable[str], *, words_alone: bool = False) -> None:
    """Have `tokens` of the vocabulary found in texts as they stand, and hidden in answers.

    With `words_alone` one that is a mere word is not found inside of longer ones.
    """
    backend.add_special_tokens(
        [
            AddedToken(
                text, special=True, normalized=False, single_word=words_alone and text.isalnum()
            )
            for text in dict.fromkeys(tokens)
        ]
    )


def surround(backend: Backend, config: Mapping[str, Any], *, add_bos: bool) -> None:
    """Have texts begin and end with the tokens that the settings say.

    `add_bos`: whether the beginning token is added where `add_bos_token` says nothing. Raises
    StartupError for a token that the vocabulary does not have.
    """
    named = named_specials(config)
    before = list(config.get("prefix_tokens") or ())
    after = []
    if flag(config, "add_bos_token", add_bos) and "bos_token" in named:
        before.insert(0, named["bos_token"])
    if flag(config, "add_eos_token", False) and "eos_token" in named:
        after.append(named["eos_token"])
    around = dict.fromkeys([*before, *after])
    missing = [token for token in around if backend.token_to_id(token) is None]
    if missing:
        raise StartupError(
            f"texts for {config.get('tokenizer_class')} begin with {' '.join(missing)}, which its "
            "vocabulary and added_tokens_decoder do not have"
        )
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, backend.token_to_id(token)) for token in around],
    )
