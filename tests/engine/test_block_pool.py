"""The block pool against a brute-force model of it."""

import random

import pytest

from pagedserve.engine.block_pool import BlockPool, chain_hash, root_hash


class NaivePool:
    """The same pool with lists and linear searches."""

    def __init__(self, num_blocks: int):
        self.free = list(range(num_blocks))
        self.refs = dict.fromkeys(range(num_blocks), 0)
        self.content: dict[int, bytes] = {}

    def take(self) -> int:
        block = self.free.pop(0)
        self.content.pop(block, None)
        self.refs[block] = 1
        return block

    def share(self, block: int) -> None:
        if block in self.free:
            self.free.remove(block)
        self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                if block in self.content:
                    self.free.append(block)
                else:
                    self.free.insert(0, block)

    def publish(self, block: int, prefix_hash: bytes) -> None:
        if prefix_hash not in self.content.values():
            self.content[block] = prefix_hash

    def lookup(self, hashes: list[bytes]) -> list[int]:
        found = []
        for prefix_hash in hashes:
            held = [block for block, content in self.content.items() if content == prefix_hash]
            if not held:
                break
            found += held
        return found


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_match_the_naive_pool(seed: int) -> None:
    r = random.Random(seed)
    num_blocks = r.randint(1, 20)
    pool, naive = BlockPool(num_blocks), NaivePool(num_blocks)
    chains = [[bytes([family, depth]) for depth in range(6)] for family in range(4)]
    held: list[list[int]] = []
    for _ in range(400):
        chain = r.choice(chains)
        hits = pool.lookup(chain)
        assert hits == naive.lookup(chain)
        if held and r.random() < 0.45:
            blocks = held.pop(r.randrange(len(held)))
            pool.release(blocks)
            naive.release(blocks)
        else:
            blocks = list(hits[: r.randint(0, len(hits))])
            for block in blocks:
                pool.share(block)
                naive.share(block)
            while pool.num_free and len(blocks) < len(chain) and r.random() < 0.8:
                block = pool.take()
                assert block == naive.take()
                blocks.append(block)
                if r.random() < 0.8:
                    pool.publish(block, chain[len(blocks) - 1])
                    naive.publish(block, chain[len(blocks) - 1])
            held.append(blocks)
        assert pool.num_free == len(naive.free)
        assert pool.num_used == sum(count > 0 for count in naive.refs.values())
        assert [pool.is_free(b) for b in range(num_blocks)] == [
            naive.refs[b] == 0 for b in range(num_blocks)
        ]
    for blocks in held:
        pool.release(blocks)
    assert pool.num_free == num_blocks


def test_a_double_release_is_caught() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.release([block])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([block])


def test_the_least_recently_released_prefix_is_evicted_first_and_its_end_before_its_beginning() -> (
    None
):
    pool = BlockPool(4)
    first, second = [pool.take(), pool.take()], [pool.take(), pool.take()]
    for number, blocks in enumerate((first, second)):
        for depth, block in enumerate(blocks):
            pool.publish(block, bytes([number, depth]))
    pool.release(first)
    pool.release(second)
    assert [pool.take() for _ in range(4)] == [first[1], first[0], second[1], second[0]]


def test_chain_hashes_depend_on_every_token_before() -> None:
    root = root_hash("")
    one = chain_hash(chain_hash(root, [1, 2]), [3, 4])
    assert one == chain_hash(chain_hash(root, [1, 2]), [3, 4])
    assert one != chain_hash(chain_hash(root, [1, 5]), [3, 4])
    assert one != chain_hash(root, [1, 2, 3, 4])
    assert one != chain_hash(chain_hash(root_hash("0"), [1, 2]), [3, 4])


def test_a_salt_is_no_beginning_of_another() -> None:
    salts = ["", "0", "1", "10", "1" + "\0" * 8, "1" + "\x01" + "\0" * 7, "é", "é" * 1000]
    chains = {chain_hash(root_hash(salt), tokens) for salt in salts for tokens in ([1], [1, 1])}
    assert len(chains) == 2 * len(salts)


def test_a_reset_forgets_content_and_keeps_holders() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.publish(block, b"x")
    pool.reset_cache()
    assert pool.lookup([b"x"]) == [] and not pool.is_free(block)
    pool.release([block])
    assert pool.num_free == 2
