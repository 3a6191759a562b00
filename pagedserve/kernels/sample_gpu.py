"""From logits to tokens on a GPU, without sorting: what `worker.sampler` means.

    survey   (row, tile)  penalties, mask, bias, bans; maximum, Σ exp; the maxima of groups of 128
             │            tokens; for rows that nothing filters, the keyed race itself
    draw     (row)        the tiles put together: argmax, or the race's winner, or
             │            a bound below which nothing of the top k can lie: the k-th largest group
             │            maximum. Tokens from there up, a few dozen, are ranked pair by pair
    search   (row)        where they do not suffice (a flat row with top-p alone): the exact
                          threshold by search over the whole row, four ways a pass

Exact in both ways, ties by the lower token id, as a stable sort gives them. Randomness is
`sample.exponentials`: keyed by seed, position and token. Parameters are read by slot from permanent
rows; nothing is read back, and every grid is fixed by the number of rows.

    scaled = logit / temperature
    min_p: scaled ≥ max + log(min_p) ──▶ top_k ──▶ top_p of the rest ──▶ argmax(scaled - log E)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagedserve.kernels.aot import Variant, older
from pagedserve.kernels.launch import dependent, launch_dependents, power_of_2, wait

TILE = 4096
GROUP = 128
CANDIDATES = 1024
GATHERED = 32  # groups looked through at once
PAIRS = 32
SCAN = 4096  # columns of a search's block, 16 bytes a thread
SCANS = 2  # its rows
MOST_GROUPS = 512  # top_k whose bound is taken from the groups
FEW_GROUPS = 64  # where there is no top_k, at first
NUCLEUS_GROUPS = 384  # and then

GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)
SEEN = 1024  # tokens of a sequence counted at once
SPARSE = 128  # bias entries and bans applied at once


@triton.jit
def mix(x):
    """`sample.mix`. x: uint64."""
    x = (x ^ (x >> 30)) * FIRST
    x = (x ^ (x >> 27)) * SECOND
    return x ^ (x >> 31)


@triton.jit
def uniform(token, seed, position):
    """(k + ½) / 2²³ of each token, as `sample.exponentials` has it. seed, position: int64 scalars.

    The 23 bits become the digits of a float between 1 and 2; what is taken off is exact.
    """
    key = mix(mix(seed.to(tl.uint64) + GAMMA) + position.to(tl.uint64) * GAMMA)
    bits = (mix(key + token.to(tl.uint64) * GAMMA) >> 41).to(tl.int32)
    return (bits | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375


@triton.jit
def race(scaled, token, seed, position):
    """scaled - log E of each token, see `sample.race`."""
    return scaled - tl.log(-tl.log(1.0 - uniform(token, seed, position)))  # 1 - u is exact


@triton.jit
def log2_about(x, FAST: tl.constexpr):
    """By the GPU's own approximation, a dozen instructions less."""
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def race_about(scaled, token, seed, position, FAST: tl.constexpr):
    """`race` within 0.003: enough to tell which tokens cannot win a tile."""
    u = uniform(token, seed, position)
    exponential = -0.6931471805599453 * log2_about(1.0 - u, FAST)
    # Where u is small the logarithm has no digits left, and its argument is the answer.
    exponential = tl.where(u < 0.00390625, u, exponential)
    return scaled - 0.6931471805599453 * log2_about(exponential, FAST)


@triton.jit
def race_of_tile(x, i, temperature, first, seed, position, FAST: tl.constexpr, TILE: tl.constexpr):
    """The winner among x [TILE], tokens from `first` on: (its value, its place in the tile).

    Exact for those that come close to the best by approximation: one or two.
    """
    scaled = x * tl.div_rn(1.0, temperature)
    about = race_about(scaled, first + i, seed, position, FAST)
    top = tl.max(about, 0)
    close = (about >= top - 0.01 - 1e-6 * tl.abs(top)) & (x > float("-inf"))
    best = tl.zeros([], tl.float32) + float("-inf")
    winner = tl.zeros([], tl.int32)
    at = tl.min(tl.where(close, i, TILE), 0)
    while at < TILE:
        raw = tl.sum(tl.where(i == at, x, 0.0), 0)
        value = race(tl.div_rn(raw, temperature), first + at, seed, position)
        winner = tl.where(value > best, at, winner)
        best = tl.maximum(value, best)
        at = tl.min(tl.where(close & (i > at), i, TILE), 0)
    return best, winner


@triton.jit
def ordered(x):
    """float32 → int32 in the same order; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def split(low, high):
    """Three keys that cut low … high into four; low, high: int64, high - low > 1."""
    step = tl.maximum((high - low) >> 2, 1)
    one = low + step
    return one, tl.minimum(one + step, high), tl.minimum(one + 2 * step, high)


@triton.jit
def narrow(low, high, one, two, three, reach_one, reach_two, reach_three):
    """The quarter whose low end still reaches what is wanted, and whose high end does not."""
    new_low = tl.where(reach_three, three, tl.where(reach_two, two, tl.where(reach_one, one, low)))
    new_high = tl.where(
        reach_three, high, tl.where(reach_two, three, tl.where(reach_one, two, one))
    )
    return new_low, new_high


@triton.jit
def kth_largest(keys, inside, k):
    """The k-th largest of `keys` where `inside`; k is at most their number."""
    low = tl.min(tl.where(inside, keys, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(tl.where(inside, keys, -0x7FFFFFFF), 0).to(tl.int64) + 1
    wide = keys.to(tl.int64)
    while high - low > 1:
        one, two, three = split(low, high)
        # Three counts in one sum; each is below 2²⁰.
        packed = (
            (wide >= one).to(tl.int64)
            + ((wide >= two).to(tl.int64) << 20)
            + ((wide >= three).to(tl.int64) << 40)
        )
        sums = tl.sum(tl.where(inside, packed, 0), 0)
        low, high = narrow(
            low,
            high,
            one,
            two,
            three,
            (sums & 0xFFFFF) >= k,
            ((sums >> 20) & 0xFFFFF) >= k,
            (sums >> 40) >= k,
        )
    return low


@triton.jit
def reached(
    source,
    vocab,
    inverse,
    floor,
    highest,
    one,
    two,
    three,
    MASS: tl.constexpr,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """How many tokens have keys of at least each of three, or with MASS their Σ exp.

    Multiplied by 1 / temperature, which keeps the order. Rows of a block add up within a thread.
    """
    at_one = unordered(one.to(tl.int32))
    at_two = unordered(two.to(tl.int32))
    at_three = unordered(three.to(tl.int32))
    first = tl.zeros([SCAN], tl.float32 if MASS else tl.int32)
    second = tl.zeros([SCAN], tl.float32 if MASS else tl.int32)
    third = tl.zeros([SCAN], tl.float32 if MASS else tl.int32)
    block = tl.arange(0, SCANS)[:, None] * SCAN + tl.arange(0, SCAN)[None, :]
    for start in range(0, vocab, SCANS * SCAN):
        token = start + block
        x = tl.load(source + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        x *= inverse
        x = tl.where(x >= floor, x, float("-inf"))
        if MASS:
            weight = tl.exp(x - highest)
            first += tl.sum(tl.where(x >= at_one, weight, 0.0), 0)
            second += tl.sum(tl.where(x >= at_two, weight, 0.0), 0)
            third += tl.sum(tl.where(x >= at_three, weight, 0.0), 0)
        else:
            first += tl.sum((x >= at_one).to(tl.int32), 0)
            second += tl.sum((x >= at_two).to(tl.int32), 0)
            third += tl.sum((x >= at_three).to(tl.int32), 0)
    return tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)


@triton.jit
def search(
    source,
    vocab,
    inverse,
    floor,
    highest,
    wanted,
    low,
    high,
    MASS: tl.constexpr,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The highest key from which up there are `wanted` tokens, or there is so much mass."""
    while high - low > 1:
        one, two, three = split(low, high)
        a, b, c = reached(
            source, vocab, inverse, floor, highest, one, two, three, MASS, SCANS, SCAN
        )
        low, high = narrow(low, high, one, two, three, a >= wanted, b >= wanted, c >= wanted)
    return low


@triton.jit
def draw_by_search(
    source,
    vocab,
    temperature,
    floor,
    highest,
    top_k,
    top_p,
    seed,
    position,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The token, by exact thresholds over the whole row. top_k: vocab where there is none."""
    inverse = tl.div_rn(1.0, temperature)
    # A product may be rounded below the quotient too: with a min-p of 1 even the highest.
    floor = tl.minimum(floor, highest - 5e-7 * tl.abs(highest))
    bound = tl.zeros([], tl.int64) - 0x7F800000  # key of the lowest finite number
    top = ordered(highest).to(tl.int64) + 4  # a product may be rounded above the quotient
    if top_k < vocab:
        bound = search(
            source, vocab, inverse, floor, highest, top_k, bound, top, False, SCANS, SCAN
        )
    up = bound + 1
    from_bound = tl.zeros([], tl.int32)
    equals = tl.zeros([], tl.int32) + 0x7FFFFFFF  # of those at the bound, how many are kept
    if top_k < vocab:
        from_bound, above, _above = reached(
            source, vocab, inverse, floor, highest, bound, up, up, False, SCANS, SCAN
        )
        equals = tl.minimum(from_bound, top_k) - above
    threshold = bound
    if top_p < 1.0:
        mass, mass_above, _mass = reached(
            source, vocab, inverse, floor, highest, bound, up, up, True, SCANS, SCAN
        )
        each = tl.exp(unordered(bound.to(tl.int32)) - highest)
        some = mass_above + equals.to(tl.float32) * each
        # More than nothing, or a key above all of them would do for a top_p of 0.
        wanted = tl.maximum(top_p * tl.where(from_bound > top_k, some, mass), 1e-20)
        threshold = search(
            source, vocab, inverse, floor, highest, wanted, bound, top, True, SCANS, SCAN
        )
        _mass, mass_above, _none = reached(
            source, vocab, inverse, floor, highest, threshold, threshold + 1, top, True, SCANS, SCAN
        )
        # The tie with j before it is kept while mass_above + j · each < wanted; one always is.
        each = tl.exp(unordered(threshold.to(tl.int32)) - highest)
        kept = tl.minimum(tl.ceil((wanted - mass_above) / each), 1.0e9)
        kept = tl.maximum(kept, 1.0).to(tl.int32)
        equals = tl.where(threshold > bound, kept, tl.minimum(kept, equals))
    at_least = unordered(threshold.to(tl.int32))
    ties = tl.zeros([], tl.int32)
    best = tl.zeros([], tl.float32) + float("-inf")
    chosen = tl.zeros([], tl.int32)
    for start in range(0, vocab, SCAN):
        token = start + tl.arange(0, SCAN)
        raw = tl.load(source + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        x = raw * inverse
        valid = (x >= floor) & (x > float("-inf"))
        equal = (valid & (x == at_least)).to(tl.int32)
        order = ties + tl.cumsum(equal, 0) - equal
        keep = valid & ((x > at_least) | ((equal > 0) & (order < equals)))
        value = race(tl.div_rn(raw, temperature), token, seed, position)
        here, at = tl.max(tl.where(keep, value, float("-inf")), 0, return_indices=True)
        chosen = tl.where(here > best, start + at, chosen)
        best = tl.maximum(best, here)
        ties += tl.sum(equal, 0)
    return chosen


@triton.jit
def processed(
    logits,
    work,
    tally,
    token,
    tile,
    vocab,
    length,
    slot,
    numbers,
    counts,
    seen_ids,
    seen_stride,
    bias_ids,
    bias_values,
    bias_stride,
    ban_ids,
    ban_stride,
    masks,
    mask_row,
    mask_stride,
    TILE: tl.constexpr,
    SEEN: tl.constexpr,
    SPARSE: tl.constexpr,
):
    """The tile's logits with all that the request asked for; left in `work` as well.

    tally: the same memory as int32.
    """
    inside = token < vocab
    x = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    repetition = tl.load(numbers + 3)
    presence = tl.load(numbers + 4)
    frequency = tl.load(numbers + 5)
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        # Counted where the logits will be: how often written, and a bit for the prompt.
        num_prompt = tl.load(counts + 1)
        tl.store(tally + token, tl.zeros([TILE], tl.int32), mask=inside)
        tl.debug_barrier()
        for start in range(0, length, SEEN):
            at = start + tl.arange(0, SEEN)
            ids = tl.load(seen_ids + slot * seen_stride + at, mask=at < length, other=-1)
            here = (ids >= tile * TILE) & (ids < (tile + 1) * TILE) & (ids < vocab)
            prompt = at < num_prompt
            tl.atomic_or(tally + ids, 1 << 30, mask=here & prompt, sem="relaxed")
            tl.atomic_add(tally + ids, 1, mask=here & (prompt == 0), sem="relaxed")
        tl.debug_barrier()
        seen = tl.load(tally + token, mask=inside, other=0, cache_modifier=".cg")
        tl.debug_barrier()
        written = seen & 0x3FFFFFFF
        changed = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where(seen != 0, changed, x)
        x -= frequency * written.to(tl.float32)
        x -= presence * (written > 0).to(tl.float32)
    if masks is not None:  # noqa: SIM102
        if mask_row >= 0:
            words = tl.load(masks + mask_row * mask_stride + token // 32, mask=inside, other=0)
            x = tl.where(((words >> (token % 32)) & 1) != 0, x, float("-inf"))
    tl.store(work + token, x, mask=inside)
    num_bias = tl.load(counts + 2)
    num_bans = tl.where(length < tl.load(counts + 4), tl.load(counts + 3), 0)
    if (num_bias > 0) | (num_bans > 0):
        tl.debug_barrier()
        for start in range(0, num_bias, SPARSE):
            at = start + tl.arange(0, SPARSE)
            ids = tl.load(bias_ids + slot * bias_stride + at, mask=at < num_bias, other=-1)
            here = (ids >= tile * TILE) & (ids < (tile + 1) * TILE) & (ids < vocab)
            value = tl.load(bias_values + slot * bias_stride + at, mask=here, other=0.0)
            value += tl.load(work + ids, mask=here, other=0.0)
            tl.store(work + ids, value, mask=here)
        tl.debug_barrier()
        for start in range(0, num_bans, SPARSE):
            at = start + tl.arange(0, SPARSE)
            ids = tl.load(ban_ids + slot * ban_stride + at, mask=at < num_bans, other=-1)
            here = (ids >= tile * TILE) & (ids < (tile + 1) * TILE) & (ids < vocab)
            tl.store(work + ids, float("-inf"), mask=here)
        tl.debug_barrier()
        x = tl.load(work + token, mask=inside, other=float("-inf"))
    return x


@triton.jit(do_not_specialize=["tiles"])
def survey_kernel(
    logits,
    slots,
    positions,
    numbers,
    counts,
    seeds,
    seen_ids,
    bias_ids,
    bias_values,
    ban_ids,
    masks,
    mask_rows,
    work,
    tally,
    tile_max,
    tile_arg,
    tile_sum,
    tile_best,
    tile_winner,
    group_max,
    vocab,
    tiles,
    row_stride,
    seen_stride,
    bias_stride,
    ban_stride,
    mask_stride,
    work_stride,
    group_stride,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    SEEN: tl.constexpr,
    SPARSE: tl.constexpr,
    PROCESS: tl.constexpr,
    FILTER: tl.constexpr,
    RACE: tl.constexpr,
    FAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, tiles). FILTER: rows may be filtered; RACE: rows may be drawn."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    wait(PDL)
    slot = tl.load(slots + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    mine = numbers + slot * 6
    temperature = tl.load(mine)
    if PROCESS:
        if masks is not None:
            mask_row = tl.load(mask_rows + row).to(tl.int64)
        else:
            mask_row = tl.zeros([], tl.int64)
        x = processed(
            logits + row * row_stride,
            work + row * work_stride,
            tally + row * work_stride,
            token,
            tile,
            vocab,
            position.to(tl.int32),
            slot,
            mine,
            counts + slot * 5,
            seen_ids,
            seen_stride,
            bias_ids,
            bias_values,
            bias_stride,
            ban_ids,
            ban_stride,
            masks,
            mask_row,
            mask_stride,
            TILE,
            SEEN,
            SPARSE,
        )
    else:
        at = logits + row * row_stride + token
        x = tl.load(at, mask=token < vocab, other=float("-inf")).to(tl.float32)
    divisor = tl.where(temperature > 0, temperature, 1.0)
    broken = tl.max((x != x).to(tl.int32), 0)
    highest = tl.max(x, 0)
    i = tl.arange(0, TILE)
    at = tl.min(tl.where(x == highest, i, TILE - 1), 0)
    highest = tl.div_rn(highest, divisor)
    # +inf tells `draw` that the row is lost; a comparison with NaN would tell it nothing.
    out = row * tiles + tile
    tl.store(tile_max + out, tl.where(broken != 0, float("inf"), highest))
    tl.store(tile_arg + out, tile * TILE + at)
    if FILTER:
        # Division keeps the order, so maxima are divided, not all.
        shift = tl.where(highest > float("-inf"), highest, 0.0)
        scaled = x * tl.div_rn(1.0, divisor)
        tl.store(tile_sum + out, tl.sum(tl.exp(scaled - shift), 0))
        groups = tl.div_rn(tl.max(tl.reshape(x, [TILE // GROUP, GROUP]), 1), divisor)
        at_group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
        tl.store(group_max + row * group_stride + at_group, groups)
    if RACE:
        free = temperature > 0
        if FILTER:
            filtered = (tl.load(counts + slot * 5) > 0) | (tl.load(mine + 1) > 0)
            free = free & ((filtered | (tl.load(mine + 2) < 1.0)) == 0)
        if free:
            best, winner = race_of_tile(
                x,
                i,
                temperature,
                tile * TILE,
                tl.load(seeds + slot),
                position,
                FAST,
                TILE,
            )
            tl.store(tile_best + out, best)
            tl.store(tile_winner + out, tile * TILE + winner)


@triton.jit(do_not_specialize=["tiles", "groups"])
def draw_kernel(
    source,
    slots,
    positions,
    numbers,
    counts,
    seeds,
    tile_max,
    tile_arg,
    tile_sum,
    tile_best,
    tile_winner,
    group_max,
    group_list,
    candidate_value,
    candidate_weight,
    candidate_token,
    token_ids,
    finite,
    vocab,
    tiles,
    groups,
    source_stride,
    group_stride,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GATHERED: tl.constexpr,
    PAIRS: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
    FEW_GROUPS: tl.constexpr,
    NUCLEUS_GROUPS: tl.constexpr,
    FILTER: tl.constexpr,
    RACE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows)."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    wait(PDL)
    t = tl.arange(0, TILES)
    at = row * tiles + t
    maxima = tl.load(tile_max + at, mask=t < tiles, other=float("-inf"))
    highest, best_tile = tl.max(maxima, 0, return_indices=True)
    token = tl.load(tile_arg + row * tiles + best_tile)
    fine = (highest > float("-inf")) & (highest < float("inf"))
    tl.store(finite + row, fine)
    if RACE:
        slot = tl.load(slots + row).to(tl.int64)
        temperature = tl.load(numbers + slot * 6)
        min_p = tl.load(numbers + slot * 6 + 1)
        top_p = tl.load(numbers + slot * 6 + 2)
        top_k = tl.load(counts + slot * 5)
        filtered = (top_k > 0) | (min_p > 0) | (top_p < 1.0)
        if fine & (temperature > 0):
            if FILTER:
                if filtered == 0:
                    token = winner_of(tile_best, tile_winner, at, t < tiles, row * tiles)
                else:
                    sums = tl.load(tile_sum + at, mask=t < tiles, other=0.0)
                    scale = tl.where(maxima > float("-inf"), tl.exp(maxima - highest), 0.0)
                    token = draw_filtered(
                        source + row * source_stride,
                        vocab,
                        temperature,
                        tl.where(min_p > 0, highest + tl.log(min_p), float("-inf")),
                        highest,
                        tl.sum(sums * scale, 0),
                        tl.where((top_k > 0) & (top_k < vocab), top_k, vocab),
                        top_p,
                        tl.load(seeds + slot),
                        tl.load(positions + row).to(tl.int64),
                        group_max + row * group_stride,
                        group_list + row * group_stride,
                        candidate_value + row * CANDIDATES,
                        candidate_weight + row * CANDIDATES,
                        candidate_token + row * CANDIDATES,
                        groups,
                        GROUPS,
                        GROUP,
                        CANDIDATES,
                        GATHERED,
                        PAIRS,
                        MOST_GROUPS,
                        FEW_GROUPS,
                        NUCLEUS_GROUPS,
                    )
            else:
                token = winner_of(tile_best, tile_winner, at, t < tiles, row * tiles)
    # Where a row holds NaN, its maximum may be anywhere.
    tl.store(token_ids + row, tl.minimum(token, vocab - 1).to(tl.int64))


@triton.jit
def winner_of(tile_best, tile_winner, at, inside, first):
    """The race over the tiles' winners."""
    _best, tile = tl.max(
        tl.load(tile_best + at, mask=inside, other=float("-inf")), 0, return_indices=True
    )
    return tl.load(tile_winner + first + tile)


@triton.jit
def gather(
    source,
    vocab,
    temperature,
    bound,
    maxima,
    alive,
    group_list,
    values,
    tokens,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GATHERED: tl.constexpr,
):
    """Tokens of at least `bound` in the order of their ids, the first CANDIDATES of them written.

    maxima, alive: [GROUPS], of the groups that hold anything. Returns their number, or, past
    CANDIDATES, some number that is larger.
    """
    g = tl.arange(0, GROUPS)
    holds = (alive & (maxima >= bound)).to(tl.int32)
    place = tl.cumsum(holds, 0) - holds
    tl.store(group_list + place, g, mask=holds > 0)
    num_groups = tl.sum(holds, 0)
    tl.debug_barrier()
    found = tl.zeros([], tl.int32)
    i = tl.arange(0, GATHERED * GROUP)
    start = tl.zeros([], tl.int32)
    while (start < num_groups) & (found <= CANDIDATES):
        listed = start + i // GROUP
        group = tl.load(group_list + listed, mask=listed < num_groups, other=0)
        token = group * GROUP + i % GROUP
        here = (listed < num_groups) & (token < vocab)
        x = tl.load(source + token, mask=here, other=float("-inf")).to(tl.float32)
        x = tl.div_rn(x, temperature)
        keep = (here & (x >= bound) & (x > float("-inf"))).to(tl.int32)
        to = found + tl.cumsum(keep, 0) - keep
        fits = (keep > 0) & (to < CANDIDATES)
        tl.store(values + to, x, mask=fits)
        tl.store(tokens + to, token, mask=fits)
        found += tl.sum(keep, 0)
        start += GATHERED
    return found


@triton.jit
def draw_filtered(
    source,
    vocab,
    temperature,
    floor,
    highest,
    total,
    top_k,
    top_p,
    seed,
    position,
    group_max,
    group_list,
    values,
    weights,
    tokens,
    groups,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GATHERED: tl.constexpr,
    PAIRS: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
    FEW_GROUPS: tl.constexpr,
    NUCLEUS_GROUPS: tl.constexpr,
):
    """The token of one row, -1 where it has to be searched for.

    total: Σ exp(scaled - highest) over the whole row.
    """
    g = tl.arange(0, GROUPS)
    maxima = tl.load(group_max + g, mask=g < groups, other=float("-inf"))
    alive = maxima > float("-inf")
    living = tl.sum(alive.to(tl.int32), 0)
    nucleus = tl.minimum(tl.maximum(living // 2, 1), NUCLEUS_GROUPS)
    last = tl.where(top_k < vocab, tl.minimum(top_k, MOST_GROUPS), nucleus)
    open_end = (top_k >= vocab) & (floor == float("-inf"))
    k = tl.where(open_end, tl.minimum(nucleus, FEW_GROUPS), last)
    c = tl.arange(0, CANDIDATES)
    everything = floor == float("inf")
    enough = everything
    found = tl.zeros([], tl.int32)
    trying = found == 0
    while trying:
        bound = tl.zeros([], tl.float32) + float("-inf")
        if k <= living:
            bound = unordered(kth_largest(ordered(maxima), alive, k).to(tl.int32))
        everything = floor >= bound
        bound = tl.maximum(bound, floor)
        found = gather(
            source,
            vocab,
            temperature,
            bound,
            maxima,
            alive,
            group_list,
            values,
            tokens,
            GROUPS,
            GROUP,
            CANDIDATES,
            GATHERED,
        )
        tl.debug_barrier()
        v = tl.load(values + c, mask=c < found, other=float("-inf"))
        mass = tl.sum(tl.where(c < found, tl.exp(v - highest), 0.0), 0)
        # All that min-p leaves, or the whole top k, or, without either, the nucleus.
        enough = everything | (found >= top_k) | (open_end & (mass >= top_p * total))
        trying = (enough == 0) & (k < last) & (found <= CANDIDATES)
        k = last
    there = c < found
    v = tl.load(values + c, mask=there, other=float("-inf"))
    weight = tl.where(there, tl.exp(v - highest), 0.0)
    if enough & (found <= CANDIDATES):
        rank = tl.zeros([CANDIDATES], tl.int32)
        for first in range(0, found, PAIRS):
            j = first + tl.arange(0, PAIRS)
            other = tl.load(values + j, mask=j < found, other=float("-inf"))
            rank += tl.sum(before(other, j, v, c).to(tl.int32), 0)
        in_k = there & (rank < top_k)
        keep = in_k
        if top_p < 1.0:
            weight = tl.where(in_k, weight, 0.0)
            if everything | (found >= top_k):
                total = tl.sum(weight, 0)
            tl.store(weights + c, weight, mask=there)
            tl.debug_barrier()
            mass = tl.zeros([CANDIDATES], tl.float32)
            for first in range(0, found, PAIRS):
                j = first + tl.arange(0, PAIRS)
                other = tl.load(values + j, mask=j < found, other=float("-inf"))
                its = tl.load(weights + j, mask=j < found, other=0.0)
                mass += tl.sum(tl.where(before(other, j, v, c), its[:, None], 0.0), 0)
            keep = in_k & ((mass < top_p * total) | (rank == 0))
        ids = tl.load(tokens + c, mask=there, other=0)
        value = tl.where(keep, race(v, ids, seed, position), float("-inf"))
        _best, winner = tl.max(value, 0, return_indices=True)
        token = tl.load(tokens + winner)
    else:
        token = tl.zeros([], tl.int32) - 1
    return token


@triton.jit(do_not_specialize=["tiles"])
def search_kernel(
    source,
    slots,
    positions,
    numbers,
    counts,
    seeds,
    tile_max,
    token_ids,
    vocab,
    tiles,
    source_stride,
    TILES: tl.constexpr,
    SCANS: tl.constexpr,
    SCAN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows). Draws for the rows that `draw_kernel` left at -1."""
    launch_dependents(PDL)
    row = tl.program_id(0).to(tl.int64)
    wait(PDL)
    if tl.load(token_ids + row) < 0:
        t = tl.arange(0, TILES)
        maxima = tl.load(tile_max + row * tiles + t, mask=t < tiles, other=float("-inf"))
        highest = tl.max(maxima, 0)
        slot = tl.load(slots + row).to(tl.int64)
        min_p = tl.load(numbers + slot * 6 + 1)
        top_k = tl.load(counts + slot * 5)
        token = draw_by_search(
            source + row * source_stride,
            vocab,
            tl.load(numbers + slot * 6),
            tl.where(min_p > 0, highest + tl.log(min_p), float("-inf")),
            highest,
            tl.where((top_k > 0) & (top_k < vocab), top_k, vocab),
            tl.load(numbers + slot * 6 + 2),
            tl.load(seeds + slot),
            tl.load(positions + row).to(tl.int64),
            SCANS,
            SCAN,
        )
        tl.store(token_ids + row, token.to(tl.int64))


@triton.jit
def before(other, j, v, c):
    """Whether candidate j comes before candidate c: [j, c]; sums over j stay in a thread."""
    o = other[:, None]
    mine = v[None, :]
    return (o > mine) | ((o == mine) & (j[:, None] < c[None, :]))


@dataclass(frozen=True, slots=True)
class SamplerRows:
    """Parameters by slot, permanent on the device; whoever joins a slot writes its row.

    numbers   [S, 6] fp32   temperature (0: greedy), min_p, top_p, repetition, presence, frequency
    counts    [S, 5] int32  top_k (≤ 0: all), prompt tokens, biases, bans, bans below this length
    seeds     [S] int64
    bias_ids  [S, B] int32, bias_values [S, B] fp32; ids of a row differ
    ban_ids   [S, N] int32
    seen_ids  [S, L] int64  the sequences themselves, for penalties (`worker.rows`)
    """

    numbers: Tensor
    counts: Tensor
    seeds: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    ban_ids: Tensor
    seen_ids: Tensor

    @classmethod
    def on(cls, seen_ids: Tensor, *, biases: int, bans: int) -> SamplerRows:
        """Neutral rows for the slots of `seen_ids`."""
        slots, device = seen_ids.shape[0], seen_ids.device
        neutral = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], device=device)
        return cls(
            neutral.repeat(slots, 1),
            torch.zeros((slots, 5), dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
            torch.zeros((slots, biases), dtype=torch.int32, device=device),
            torch.zeros((slots, biases), dtype=torch.float32, device=device),
            torch.zeros((slots, bans), dtype=torch.int32, device=device),
            seen_ids,
        )


@dataclass(frozen=True, slots=True)
class SamplerScratch:
    """Between the two kernels, for so many rows at most. `work`: logits that were processed."""

    tile_floats: Tensor  # [3, rows · tiles] maximum, sum, race's best
    tile_ints: Tensor  # [2, rows · tiles] their tokens
    group_max: Tensor  # [rows, groups] fp32
    group_list: Tensor  # [rows, groups] int32
    candidates: Tensor  # [2, rows, CANDIDATES] fp32
    candidate_tokens: Tensor  # [rows, CANDIDATES] int32
    work: Tensor  # [rows, vocab] fp32

    @classmethod
    def on(cls, device: torch.device, rows: int, vocab: int) -> SamplerScratch:
        """About vocab · 4.1 bytes a row."""
        tiles = triton.cdiv(vocab, TILE)
        groups = tiles * (TILE // GROUP)
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        return cls(
            torch.empty((3, rows * tiles), **floats),
            torch.empty((2, rows * tiles), **ints),
            torch.empty((rows, groups), **floats),
            torch.empty((rows, groups), **ints),
            torch.empty((2, rows, CANDIDATES), **floats),
            torch.empty((rows, CANDIDATES), **ints),
            torch.empty((rows, vocab), **floats),
        )


@dataclass(frozen=True, slots=True)
class Needs:
    """What a batch needs; a graph is captured for each. More than needed is right, only slower."""

    drawn: bool = True  # some row has a temperature
    filtered: bool = True  # some row has top_k, top_p or min_p
    processed: bool = True  # some row has penalties, biases, bans or a mask
    scored: bool = False  # some row wants log-probabilities, see `logprobs_gpu`


def sample(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    rows: SamplerRows,
    scratch: SamplerScratch,
    needs: Needs,
    *,
    masks: Tensor | None = None,
    mask_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row: (token ids [n] int64, whether the row was finite [n] bool).

    logits: [n, vocab] bf16, fp16 or fp32, unchanged; slots: [n]; positions: [n], the number of
    tokens before the one to draw; both int32 or int64. masks: [m, ⌈vocab / 32⌉] int32, a set bit
    allows a token; mask_rows: [n] int32, which of them row i has, or -1.
    """
    n, vocab = logits.shape
    assert logits.stride(1) == 1 and n <= scratch.group_max.shape[0]
    tiles = triton.cdiv(vocab, TILE)
    groups = tiles * (TILE // GROUP)
    token_ids = torch.empty(n, dtype=torch.int64, device=logits.device)
    finite = torch.empty(n, dtype=torch.bool, device=logits.device)
    if n == 0:
        return token_ids, finite
    assert (masks is None) == (mask_rows is None)
    filtered = needs.filtered and needs.drawn
    survey_kernel[(n, tiles)](
        logits,
        slots,
        positions,
        rows.numbers,
        rows.counts,
        rows.seeds,
        rows.seen_ids,
        rows.bias_ids,
        rows.bias_values,
        rows.ban_ids,
        masks,
        mask_rows,
        scratch.work,
        scratch.work.view(torch.int32),
        scratch.tile_floats[0],
        scratch.tile_ints[0],
        scratch.tile_floats[1],
        scratch.tile_floats[2],
        scratch.tile_ints[1],
        scratch.group_max,
        vocab,
        tiles,
        logits.stride(0),
        rows.seen_ids.stride(0),
        rows.bias_ids.stride(0),
        rows.ban_ids.stride(0),
        0 if masks is None else masks.stride(0),
        scratch.work.stride(0),
        scratch.group_max.stride(0),
        TILE=TILE,
        GROUP=GROUP,
        SEEN=SEEN,
        SPARSE=SPARSE,
        PROCESS=needs.processed,
        FILTER=filtered,
        RACE=needs.drawn,
        FAST=logits.is_cuda,
        num_warps=8,
        **dependent(logits),
    )
    source = scratch.work if needs.processed else logits
    draw_kernel[(n,)](
        source,
        slots,
        positions,
        rows.numbers,
        rows.counts,
        rows.seeds,
        scratch.tile_floats[0],
        scratch.tile_ints[0],
        scratch.tile_floats[1],
        scratch.tile_floats[2],
        scratch.tile_ints[1],
        scratch.group_max,
        scratch.group_list,
        scratch.candidates[0],
        scratch.candidates[1],
        scratch.candidate_tokens,
        token_ids,
        finite,
        vocab,
        tiles,
        groups,
        source.stride(0),
        scratch.group_max.stride(0),
        TILES=power_of_2(tiles),
        GROUPS=power_of_2(groups),
        GROUP=GROUP,
        CANDIDATES=CANDIDATES,
        GATHERED=GATHERED,
        PAIRS=PAIRS,
        MOST_GROUPS=MOST_GROUPS,
        FEW_GROUPS=FEW_GROUPS,
        NUCLEUS_GROUPS=NUCLEUS_GROUPS,
        FILTER=filtered,
        RACE=needs.drawn,
        num_warps=8,
        **dependent(logits),
    )
    if filtered:
        search_kernel[(n,)](
            source,
            slots,
            positions,
            rows.numbers,
            rows.counts,
            rows.seeds,
            scratch.tile_floats[0],
            token_ids,
            vocab,
            tiles,
            source.stride(0),
            TILES=power_of_2(tiles),
            SCANS=SCANS,
            SCAN=SCAN,
            num_warps=16,
            **dependent(logits),
        )
    return token_ids, finite


POINTERS = {
    "slots": "*i64",
    "positions": "*i64",
    "numbers": "*fp32",
    "counts": "*i32",
    "seeds": "*i64",
    "tile_max": "*fp32",
    "tile_arg": "*i32",
    "tile_sum": "*fp32",
    "tile_best": "*fp32",
    "tile_winner": "*i32",
    "group_max": "*fp32",
}


def survey_variant(label: str, dtype: str, *, process: bool, filter: bool, race: bool) -> Variant:
    """Of `survey_kernel`, by what the batch needs."""
    return Variant(
        f"survey {label} {dtype[1:]}",
        survey_kernel,
        {
            **POINTERS,
            "logits": dtype,
            "seen_ids": "*i64",
            "bias_ids": "*i32",
            "bias_values": "*fp32",
            "ban_ids": "*i32",
            "masks": "*i32" if process else None,
            "mask_rows": "*i32" if process else None,
            "work": "*fp32",
            "tally": "*i32",
            **dict.fromkeys(("vocab", "tiles", "row_stride", "seen_stride", "bias_stride"), "i32"),
            **dict.fromkeys(("ban_stride", "mask_stride", "work_stride", "group_stride"), "i32"),
        },
        {
            "TILE": TILE,
            "GROUP": GROUP,
            "SEEN": SEEN,
            "SPARSE": SPARSE,
            "PROCESS": process,
            "FILTER": filter,
            "RACE": race,
            "FAST": True,
            "PDL": True,
        },
        num_warps=8,
        unaligned=("tiles", "seen_stride", "mask_stride"),
        capability=90,
    )


def draw_variant(label: str, dtype: str, vocab: int, *, filter: bool, race: bool) -> Variant:
    """Of `draw_kernel`, by what the batch needs."""
    tiles = -(-vocab // TILE)
    return Variant(
        f"draw {label} {dtype[1:]} of {vocab}",
        draw_kernel,
        {
            **POINTERS,
            "source": dtype,
            "group_list": "*i32",
            "candidate_value": "*fp32",
            "candidate_weight": "*fp32",
            "candidate_token": "*i32",
            "token_ids": "*i64",
            "finite": "*i1",
            **dict.fromkeys(("vocab", "tiles", "groups"), "i32"),
            **dict.fromkeys(("source_stride", "group_stride"), "i32"),
        },
        {
            "TILES": power_of_2(tiles),
            "GROUPS": power_of_2(tiles * (TILE // GROUP)),
            "GROUP": GROUP,
            "CANDIDATES": CANDIDATES,
            "GATHERED": GATHERED,
            "PAIRS": PAIRS,
            "MOST_GROUPS": MOST_GROUPS,
            "FEW_GROUPS": FEW_GROUPS,
            "NUCLEUS_GROUPS": NUCLEUS_GROUPS,
            "FILTER": filter,
            "RACE": race,
            "PDL": True,
        },
        num_warps=8,
        unaligned=("tiles", "groups"),
        capability=90,
    )


AOT = [
    survey_variant("greedy", "*bf16", process=False, filter=False, race=False),
    survey_variant("drawn", "*bf16", process=False, filter=False, race=True),
    survey_variant("filtered", "*bf16", process=False, filter=True, race=True),
    survey_variant("all", "*bf16", process=True, filter=True, race=True),
    survey_variant("all", "*fp32", process=True, filter=True, race=True),
    draw_variant("greedy", "*bf16", 151936, filter=False, race=False),
    draw_variant("drawn", "*bf16", 151936, filter=False, race=True),
    draw_variant("filtered", "*bf16", 151936, filter=True, race=True),
    draw_variant("filtered", "*fp32", 262144, filter=True, race=True),
]
AOT += [
    Variant(
        f"draw by search {dtype[1:]}",
        search_kernel,
        {
            **{
                name: POINTERS[name]
                for name in ("slots", "positions", "numbers", "counts", "seeds")
            },
            "tile_max": "*fp32",
            "token_ids": "*i64",
            "source": dtype,
            **dict.fromkeys(("vocab", "tiles", "source_stride"), "i32"),
        },
        {"TILES": 64, "SCANS": SCANS, "SCAN": SCAN, "PDL": True},
        num_warps=16,
        unaligned=("tiles",),
        capability=90,
    )
    for dtype in ("*bf16", "*fp32")
]
AOT += [older(AOT[3]), older(AOT[7]), older(AOT[-1])]
