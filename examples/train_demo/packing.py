"""Turns documents into one stream of tokens and cuts training rows from it; it knows no model.

    stream:  [doc][EOT][doc........][EOT][doc...][EOT]   uint16, top bit set on answer tokens
    starts:   ^         ^                 ^              a row begins at one of these

A row that begins where a document begins puts that document at position 0, as serving does.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from chat_format import ASSISTANT_HEADER, END_OF_TEXT, TURN_END, Document
from corpus import documents
from tokenizers import Tokenizer

ANSWER_BIT = 1 << 15
SHARD_TOKENS = 500_000
DOCUMENTS_PER_BATCH = 512


@dataclass(frozen=True, slots=True)
class TokenStream:
    """`tokens`: [num_tokens] uint16 with answer bits; `starts`: [num_documents] int64 offsets."""

    tokens: np.ndarray
    starts: np.ndarray


class Encoder:
    """Encodes documents and marks the tokens that the assistant has to write."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._header = np.array(tokenizer.encode(ASSISTANT_HEADER).ids)
        self._turn_end = tokenizer.token_to_id(TURN_END)
        self._end_of_text = tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, batch: Sequence[Document]) -> list[np.ndarray]:
        """One uint16 array a document, its end-of-text token included."""
        encodings = self._tokenizer.encode_batch_fast([document.render() for document in batch])
        return [
            self._mark(np.array([*encoding.ids, self._end_of_text], dtype=np.uint16), document)
            for encoding, document in zip(encodings, batch, strict=True)
        ]

    def _mark(self, ids: np.ndarray, document: Document) -> np.ndarray:
        """Sets the answer bit from after each assistant header through the end of its turn."""
        if not document.is_chat:
            return ids | np.uint16(ANSWER_BIT)
        width = len(self._header)
        windows = np.lib.stride_tricks.sliding_window_view(ids, width)
        begins = np.flatnonzero((windows == self._header).all(axis=1)) + width
        ends = np.flatnonzero(ids == self._turn_end)
        marked = ids.copy()
        for begin in begins:
            end = ends[np.searchsorted(ends, begin)]
            marked[begin : end + 1] |= ANSWER_BIT
        return marked


def pack(arrays: Iterable[np.ndarray]) -> TokenStream:
    """The arrays end to end."""
    arrays = list(arrays)
    lengths = np.array([len(array) for array in arrays], dtype=np.int64)
    return TokenStream(np.concatenate(arrays), np.cumsum(lengths) - lengths)


def write_shard(tokenizer: Tokenizer, seed: int) -> TokenStream:
    """About `SHARD_TOKENS` tokens of the corpus of `seed`."""
    encoder, stream = Encoder(tokenizer), documents(seed)
    arrays: list[np.ndarray] = []
    num_tokens = 0
    while num_tokens < SHARD_TOKENS:
        batch = encoder.encode(list(itertools.islice(stream, DOCUMENTS_PER_BATCH)))
        num_tokens += sum(map(len, batch))
        arrays += batch
    return pack(arrays)


def write_corpus(
    tokenizer: Tokenizer, seed: int, *, max_tokens: int, max_seconds: float, num_workers: int
) -> TokenStream:
    """Shards written in parallel, until there are enough or the time is up (at least one)."""
    deadline = time.monotonic() + max_seconds
    seeds = [seed * 1_000_003 + index for index in range(-(-max_tokens // SHARD_TOKENS))]
    shards: list[TokenStream] = []
    # fork: the workers start at once, and nothing here has touched CUDA yet.
    context = multiprocessing.get_context("fork")
    with context.Pool(num_workers, _start_worker, (tokenizer.to_str(),)) as pool:
        for shard in pool.imap(_work, seeds):
            shards.append(shard)
            if time.monotonic() > deadline:
                break
    return _join(shards)


def _join(shards: list[TokenStream]) -> TokenStream:
    offsets = np.cumsum([0, *(len(shard.tokens) for shard in shards)])[:-1]
    starts = [shard.starts + offset for shard, offset in zip(shards, offsets, strict=True)]
    return TokenStream(np.concatenate([s.tokens for s in shards]), np.concatenate(starts))


# A worker's tokenizer: set once by the pool's initializer, in the worker's own process.
_worker_tokenizer: list[Tokenizer] = []


def _start_worker(tokenizer_json: str) -> None:
    _worker_tokenizer.append(Tokenizer.from_str(tokenizer_json))


def _work(seed: int) -> TokenStream:
    return write_shard(_worker_tokenizer[0], seed)
