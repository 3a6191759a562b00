"""The blocks of one KV cache, as ids: who holds which, which may be reused, which may be evicted.

    held (reference count > 0)      free queue, oldest first
    ┌───┬───┬───┐                   ┌────────────┬──────────────────────────┐
    │ 4 │ 9 │ 2 │   ── release ──▶  │ no content │ cached, least recent … │ │ ── take ──▶
    └───┴───┴───┘   ◀── share ────  └────────────┴──────────────────────────┘

A full block of known tokens is published under the hash of the whole prefix it ends (a chain of
SHA-256 over block contents, begun with a salt), so an equal beginning with an equal salt finds it
again, held or free. A free block keeps its content until it is taken. The pool knows no tensors and
no sequences.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from pagedserve.step import BlockId


def root_hash(salt: str) -> bytes:
    """Where the chains of one salt begin; no chain of another salt has a hash of theirs."""
    return hashlib.sha256(b"pagedserve " + salt.encode()).digest()


def chain_hash(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a prefix that is a block longer: SHA-256 of the previous hash and the tokens."""
    return hashlib.sha256(previous + array("q", token_ids).tobytes()).digest()


class BlockPool:
    """`num_blocks` blocks with reference counts, prefix lookup and least-recently-used eviction."""

    def __init__(self, num_blocks: int, *, caching: bool = True):
        self.num_blocks = num_blocks
        self.caching = caching
        self._free: OrderedDict[BlockId, None] = OrderedDict.fromkeys(
            map(BlockId, range(num_blocks))
        )
        self._refs = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, BlockId] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds; some of them may still have reusable content."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks somebody holds."""
        return self.num_blocks - len(self._free)

    def is_free(self, block: BlockId) -> bool:
        """True when nobody holds `block`."""
        return self._refs[block] == 0

    def take(self) -> BlockId:
        """A block to write, its old content forgotten. There must be a free one."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._refs[block] = 1
        return block

    def share(self, block: BlockId) -> None:
        """Hold a block found by `lookup`, whoever else holds it."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def release(self, blocks: Iterable[BlockId]) -> None:
        """Let go of a sequence's blocks, given in order.

        The last go to the queue first, so that a prefix's beginning, which more prompts share,
        outlives its end. Blocks without content are taken again before any cached one is evicted.
        """
        for block in reversed(list(blocks)):
            assert self._refs[block] > 0, f"block {block} was released twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._hash[block] is None:
                    self._free.move_to_end(block, last=False)

    def publish(self, block: BlockId, prefix_hash: bytes) -> None:
        """Let others find `block`, which now holds the block that ends the prefix of that hash."""
        if self.caching and prefix_hash not in self._by_hash:
            self._forget(block)
            self._by_hash[prefix_hash] = block
            self._hash[block] = prefix_hash

    def lookup(self, prefix_hashes: Iterable[bytes]) -> list[BlockId]:
        """The blocks of the longest cached beginning of the chain; not held yet, see `share`."""
        found = []
        for prefix_hash in prefix_hashes:
            block = self._by_hash.get(prefix_hash)
            if block is None:
                break
            found.append(block)
        return found

    def reset_cache(self) -> None:
        """Forget all cached content; held blocks stay held."""
        self._by_hash.clear()
        self._hash = [None] * self.num_blocks

    def _forget(self, block: BlockId) -> None:
        old = self._hash[block]
        if old is not None:
            del self._by_hash[old]
            self._hash[block] = None
