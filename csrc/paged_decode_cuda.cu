// Attention of one new token a row over the paged cache, for a few rows: made for latency.
//
//     out[r, h] = softmax(scale · q[r, h] · K_rᵀ) · V_r        key/value head h / group
//
// A cluster of C blocks of threads computes one key/value head of one row. The row's tokens are cut
// into tiles of 16, which are dealt out to the cluster's warps in turn:
//
//     tile      0   1   2   3 │ 4   5   6   7 │ …            │ 4·C …
//     warp      0   1   2   3 │ 0   1   2   3 │              │ 0
//     block           0       │       1       │ … C - 1      │ 0 …
//
// so that a warp knows its tiles before it knows the row's length, and lengths are read on the
// device: a CUDA graph serves any. Each warp keeps tiles in its registers, where they come straight
// from memory in the order that mma.sync wants, and has a softmax of its own. Blocks merge their warps
// in shared memory, and send each block of the cluster the part of the output that it finishes
// (st.async, in distributed shared memory). What is added up is added in a fixed order.
//
// Scores are Q (A, 16 rows of which `group` are heads) times Kᵀ (B). The sum over a head's numbers
// may be taken in any order, so a thread's share of B is 16 bytes of a token that lie together:
// numbers 8q … 8q + 7 of every 32. Values are Vᵀ (A) times weights (B), which is how the scores lie
// already; a thread holds 16 bytes of each of four tokens and takes pairs of tokens out of them.
//
//     lane = 4n + q      K: tokens n and n + 8, numbers 32c + 8q …
//                        V: tokens 2q, 2q + 1, 2q + 8, 2q + 9, numbers 64c + 8n …
//                        out: heads 2q and 2q + 1, numbers 64c + 8n …
//
// The order of launches (`kernels/launch.py`) lets a block start while kernels before it still run.
// With `early` it uses that time: lengths, tables and all tokens but the newest are older than this
// step's layers, and are read before the wait. That is right only where a kernel since those were
// written was launched without the attribute, and so began when everything before it was complete;
// `early` = 0 demands nothing. These reads pass by L1, which may hold lines of an earlier step.
//
// Needs sm_90: clusters, st.async.

#include "decode_cuda.h"

namespace {

constexpr int TILE = 16;      // tokens, k of an mma
constexpr int MAX_GROUP = 8;  // n of an mma
constexpr int MAX_CLUSTER = 16;

// Strides in elements. Of `k` and `v` a token's heads lie together, its numbers too.
struct Arguments {
    const void* q;        // [rows, kv_heads · group, D], q_stride between rows
    const void* k;        // [blocks, page, kv_heads, D], block_stride between blocks
    const void* v;        // the same
    void* out;            // [rows, kv_heads · group, D]
    const int* table;     // [rows, table_width], table_stride between rows
    const int* seq_lens;  // [rows]
    const float* slopes;  // [kv_heads · group] or null: biases
    const float* sinks;   // [kv_heads · group] or null
    int64_t q_stride, table_stride, block_stride;
    int table_width, kv_heads, group, page_shift;  // 16 << page_shift tokens a block
    int window, chunk;                             // 0: none
    float scale, softcap;                          // softcap 0: none
    int share;  // fours of the output that a block of the cluster finishes
    float per_share;  // 1 / share
    int early, ahead;  // tiles a warp asks L2 for before the wait, beyond those it holds
};

__device__ __forceinline__ uint32_t address_in(uint32_t address, uint32_t rank) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ __forceinline__ void send(uint32_t to, float4 x, uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
        ::"r"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void send(uint32_t to, float2 x, uint32_t barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
        ::"r"(to), "f"(x.x), "f"(x.y), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void wait_for(uint32_t barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier)
        : "memory");
}

// softcap · tanh(x / softcap), in base 2. tanh x = 1 - 2 / (1 + e^2x), right at both infinities.
__device__ __forceinline__ float capped(float x, float softcap) {
    const float power = power_of_2(x * __fdividef(2.0f * LOG2E, softcap));
    return softcap * LOG2E * (1.0f - __fdividef(2.0f, 1.0f + power));
}

// 16 bytes past L1, zeros where they are not wanted: what was never written may be NaN.
__device__ __forceinline__ uint4 read(const void* p, bool wanted) {
    return wanted ? __ldcg(static_cast<const uint4*>(p)) : make_uint4(0, 0, 0, 0);
}

// The same into shared memory, at once or later; nothing unless `now`.
__device__ __forceinline__ void copy(uint32_t to, const void* from, bool wanted, bool now) {
    asm volatile(
        "{\n"
        ".reg .pred now;\n"
        "setp.ne.b32 now, %3, 0;\n"
        "@now cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
        "}\n" ::"r"(to),
        "l"(from), "r"(wanted ? 16 : 0), "r"(static_cast<int>(now))
        : "memory");
}

// The same number of two tokens: low halves, or high ones.
__device__ __forceinline__ uint32_t lows(uint32_t x, uint32_t y) {
    return __byte_perm(x, y, 0x5410);
}

__device__ __forceinline__ uint32_t highs(uint32_t x, uint32_t y) {
    return __byte_perm(x, y, 0x7632);
}

// Shared memory of a block. A head's numbers are padded, so that two heads meet other banks.
template <int D, int WARPS>
struct Shared {
    float part[WARPS][MAX_GROUP][D + 8];
    float2 sums[WARPS][MAX_GROUP];  // maximum, sum of powers
    float4 came[MAX_GROUP * D / 4];  // [block of the cluster][four numbers of this block's share]
    float2 came_sums[MAX_GROUP * D / 4];
    uint64_t all_came;
};

// One tile of keys and values in a warp's registers.
template <class T, int D>
struct Tile {
    uint4 k[2][D / 32];
    uint4 v[4][D / 64];

    // `at`: this lane's first numbers of the tile's first token; `token`: that token.
    __device__ __forceinline__ void load_k(const T* at, int stride, int token, int n, int first,
                                           int end) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int t = token + 8 * h + n;
            const bool seen = t >= first && t < end;
#pragma unroll
            for (int c = 0; c < D / 32; ++c) k[h][c] = read(at + 8 * h * stride + 32 * c, seen);
        }
    }

    __device__ __forceinline__ void load_v(const T* at, int stride, int token, int q, int first,
                                           int end) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int place = (i & 1) + (i & 2) * 4, t = token + 2 * q + place;
            const bool seen = t >= first && t < end;
#pragma unroll
            for (int c = 0; c < D / 64; ++c) v[i][c] = read(at + place * stride + 64 * c, seen);
        }
    }
};

template <class T, int D, int WARPS, int TILES, int DEPTH>
__global__ void __launch_bounds__(32 * WARPS) decode_kernel(const __grid_constant__ Arguments a) {
    using N = Numbers<T>;
    __shared__ Shared<D, WARPS> shared;
    asm volatile("griddepcontrol.launch_dependents;");
    const int rank = blockIdx.x, blocks = gridDim.x;  // of the cluster: one is a row of the grid
    const int kv_head = blockIdx.y, row = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n = lane / 4, q = lane % 4;
    const int quads = a.group * (D / 4);  // the output in fours
    const uint32_t all_came = shared_address(&shared.all_came);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(all_came) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(all_came),
                     "r"(quads * 24)
                     : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
    if (!a.early) wait_for_earlier_kernels();

    // Tile i of this warp is start + i · step. Lane l holds the table's entry of tile (i & ~31) + l.
    const int start = rank * WARPS + warp, step = blocks * WARPS;
    const int* table = a.table + row * a.table_stride;
    const auto entry = [&](int tile) {
        return __ldcg(table + min((tile + lane * step) >> a.page_shift, a.table_width - 1));
    };
    int ids = entry(start);
    const int length = __ldcg(a.seq_lens + row);
    const int end_tile = (length + TILE - 1) / TILE;
    int first = 0, tile = start;  // of the first this turn
    if (a.window > 0) first = max(length - a.window, 0);
    if (a.chunk > 0) first = max((length - 1) / a.chunk * a.chunk, first);
    if (first >= TILE) {
        tile += max(first / TILE - start + step - 1, 0) / step * step;
        ids = entry(tile);
    }

    const int stride = a.kv_heads * D;
    const T* k_lane = static_cast<const T*>(a.k) + kv_head * D + n * stride + 8 * q;
    const T* v_lane = static_cast<const T*>(a.v) + kv_head * D + 2 * q * stride + 8 * n;
    int asked = 0;  // tiles whose entries were taken out of `ids`
    const auto offset = [&](int place, int wanted) {  // in the cache, of tile `wanted`
        const int64_t id = __shfl_sync(~0u, ids, place);
        const int inside = wanted & ((1 << a.page_shift) - 1);
        return id * a.block_stride + inside * (TILE * stride);
    };

    Tile<T, D> held[TILES];
    int64_t at[TILES];
    const auto look_up = [&](int from) {  // where the tiles of the turn at `from` are
        if (asked == 32) {
            ids = entry(from);
            asked = 0;
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) at[i] = offset(asked + i, from + i * step);
        asked += TILES;
    };
    const auto load_k = [&](int from, int end) {
#pragma unroll
        for (int i = 0; i < TILES; ++i)
            held[i].load_k(k_lane + at[i], stride, (from + i * step) * TILE, n, first, end);
    };
    const auto load_v = [&](int from, int end) {
#pragma unroll
        for (int i = 0; i < TILES; ++i)
            held[i].load_v(v_lane + at[i], stride, (from + i * step) * TILE, q, first, end);
    };
    // With DEPTH: turns that are on their way into shared memory. A lane reads only what it asked for.
    extern __shared__ uint4 ring[];
    constexpr int PIECES = D / 8;  // a lane's of a tile: keys, then values
    const uint4* mine = ring + warp * (DEPTH * TILES * PIECES * 32) + lane;
    int slot = 0;
    const auto fill = [&](int from, bool newest, bool others) {
        const uint32_t to = shared_address(mine + slot * (TILES * PIECES * 32));
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const int token = (from + i * step) * TILE;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int t = token + 8 * h + n;
                const bool seen = t >= first && t < length, now = t == length - 1 ? newest : others;
#pragma unroll
                for (int c = 0; c < D / 32; ++c)
                    copy(to + ((i * PIECES + h * (D / 32) + c) * 512),
                         k_lane + at[i] + 8 * h * stride + 32 * c, seen, now);
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int place = (j & 1) + (j & 2) * 4, t = token + 2 * q + place;
                const bool seen = t >= first && t < length, now = t == length - 1 ? newest : others;
#pragma unroll
                for (int c = 0; c < D / 64; ++c)
                    copy(to + ((i * PIECES + D / 16 + j * (D / 64) + c) * 512),
                         v_lane + at[i] + place * stride + 64 * c, seen, now);
            }
        }
    };
    const auto fetch = [&] {  // out of the ring
        const uint4* from = mine + slot * (TILES * PIECES * 32);
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
#pragma unroll
            for (int c = 0; c < D / 16; ++c)
                held[i].k[c / (D / 32)][c % (D / 32)] = from[(i * PIECES + c) * 32];
#pragma unroll
            for (int c = 0; c < D / 16; ++c)
                held[i].v[c / (D / 64)][c % (D / 64)] = from[(i * PIECES + D / 16 + c) * 32];
        }
    };
    const auto next_slot = [&] { slot = slot == DEPTH - 1 ? 0 : slot + 1; };
    if constexpr (DEPTH == 0) {
        if (tile < end_tile) {
            const int known = a.early ? length - 1 : length;
            look_up(tile);
            load_k(tile, known);
            load_v(tile, known);
        }
        if (a.early) {
            // A lane's token of a tile: its keys, or its values.
            const T* token = lane < TILE ? static_cast<const T*>(a.k) : static_cast<const T*>(a.v);
            token += kv_head * D + (lane % TILE) * stride;
            for (int i = TILES; i < TILES + a.ahead && i < 32; ++i) {
                const int later = tile + i * step;
                if (later >= end_tile) break;
                const T* line = token + offset(i, later);
#pragma unroll
                for (int c = 0; c < D; c += 64)
                    asm volatile("prefetch.global.L2 [%0];" ::"l"(line + c));
            }
            wait_for_earlier_kernels();
#pragma unroll
            for (int i = 0; i < TILES; ++i)  // the newest token is there now
                if (tile + i * step == end_tile - 1) {
                    const int at_token = (end_tile - 1) * TILE;
                    held[i].load_k(k_lane + at[i], stride, at_token, n, first, length);
                    held[i].load_v(v_lane + at[i], stride, at_token, q, first, length);
                }
        }
    } else {
        int last = end_tile, last_slot = 0;  // the turn that was asked for last
#pragma unroll
        for (int d = 0; d < DEPTH; ++d) {
            const int from = tile + d * TILES * step;
            if (from < end_tile) {
                look_up(from);
                fill(from, !a.early, true);
                last = from, last_slot = slot;
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
            next_slot();
        }
        if (a.early) {
            wait_for_earlier_kernels();
            if (last + (TILES - 1) * step >= end_tile - 1 && last < end_tile) {
                slot = last_slot;
                fill(last, true, false);  // the newest token is there now
                asm volatile("cp.async.wait_all;" ::: "memory");
                slot = 0;
            }
        }
    }

    uint4 queries[D / 32];
    {
        const T* at = static_cast<const T*>(a.q) + row * a.q_stride + (kv_head * a.group + n) * D;
#pragma unroll
        for (int c = 0; c < D / 32; ++c) queries[c] = read(at + 32 * c + 8 * q, n < a.group);
    }
    float slope = 0.0f;
    if (a.slopes && n < a.group) slope = a.slopes[kv_head * a.group + n] * LOG2E;

    float top = MASKED, sum = 0.0f;  // of head n; `sum`: over this lane's tokens
    float out[D / 16][4] = {};       // [4c + j]: numbers 64c + 8n + j, then + 4, of heads 2q, 2q + 1
    while (tile < end_tile) {
        if constexpr (DEPTH > 0) {
            asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
            fetch();
        }
        float scores[TILES][2][4] = {};
#pragma unroll
        for (int c = 0; c < D / 32; ++c)
#pragma unroll
            for (int i = 0; i < TILES; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint4 x = queries[c], y = held[i].k[h][c];
                    N::mma(scores[i][h], x.x, 0, x.y, 0, y.x, y.y);
                    N::mma(scores[i][h], x.z, 0, x.w, 0, y.z, y.w);
                }
        const int after = tile + TILES * step;
        if (DEPTH == 0 && after < end_tile) {
            look_up(after);
            load_k(after, length);
        }
        float weights[TILES][2][2], best = top;
        const auto each = [&](auto change) {
#pragma unroll
            for (int i = 0; i < TILES; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h)
#pragma unroll
                    for (int e = 0; e < 2; ++e)
                        change(weights[i][h][e], scores[i][h][e],
                               (tile + i * step) * TILE + 8 * h + 2 * q + e);
        };
        each([&](float& w, float score, int) { w = score * a.scale; });
        if (a.softcap > 0.0f) each([&](float& w, float, int) { w = capped(w, a.softcap); });
        each([&](float& w, float, int t) {
            w -= slope * static_cast<float>(length - 1 - t);
            w = t >= first && t < length ? w : MASKED;
            best = fmaxf(best, w);
        });
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
        const float factor = power_of_2(top - best);
        top = best;
        sum *= factor;
        each([&](float& w, float, int) {
            w = power_of_2(w - best);
            sum += w;
        });
        const float factor0 = __shfl_sync(~0u, factor, 8 * q);
        const float factor1 = __shfl_sync(~0u, factor, 8 * q + 4);
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            out[j][0] *= factor0, out[j][1] *= factor1;
            out[j][2] *= factor0, out[j][3] *= factor1;
        }
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const uint32_t b0 = N::pack(weights[i][0][0], weights[i][0][1]);
            const uint32_t b1 = N::pack(weights[i][1][0], weights[i][1][1]);
#pragma unroll
            for (int c = 0; c < D / 64; ++c) {
                const uint4 v0 = held[i].v[0][c], v1 = held[i].v[1][c];
                const uint4 v2 = held[i].v[2][c], v3 = held[i].v[3][c];
                N::mma(out[4 * c], lows(v0.x, v1.x), lows(v0.z, v1.z), lows(v2.x, v3.x),
                       lows(v2.z, v3.z), b0, b1);
                N::mma(out[4 * c + 1], highs(v0.x, v1.x), highs(v0.z, v1.z), highs(v2.x, v3.x),
                       highs(v2.z, v3.z), b0, b1);
                N::mma(out[4 * c + 2], lows(v0.y, v1.y), lows(v0.w, v1.w), lows(v2.y, v3.y),
                       lows(v2.w, v3.w), b0, b1);
                N::mma(out[4 * c + 3], highs(v0.y, v1.y), highs(v0.w, v1.w), highs(v2.y, v3.y),
                       highs(v2.w, v3.w), b0, b1);
            }
        }
        if (DEPTH == 0 && after < end_tile) load_v(after, length);
        if constexpr (DEPTH > 0) {
            const int later = tile + DEPTH * TILES * step;
            if (later < end_tile) {
                look_up(later);
                fill(later, true, true);
            }
            asm volatile("cp.async.commit_group;" ::: "memory");
            next_slot();
        }
        tile = after;
    }

    // The block's warps are merged, four numbers of a head a thread, and sent to who finishes them.
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (q == 0) shared.sums[warp][n] = make_float2(top, sum);
#pragma unroll
    for (int e = 0; e < 2; ++e)
        if (2 * q + e < a.group) {
            float* to = &shared.part[warp][2 * q + e][8 * n];
#pragma unroll
            for (int c = 0; c < D / 64; ++c) {
                const auto four = [&](int i) {
                    return make_float4(out[4 * c][i], out[4 * c + 1][i], out[4 * c + 2][i],
                                       out[4 * c + 3][i]);
                };
                *reinterpret_cast<float4*>(to + 64 * c) = four(e);
                *reinterpret_cast<float4*>(to + 64 * c + 4) = four(2 + e);
            }
        }
    __syncthreads();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");  // all have their barrier
    const int share = a.share;
    for (int i = threadIdx.x; i < quads; i += 32 * WARPS) {
        const int head = i / (D / 4);
        float most = MASKED, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, shared.sums[w][head].x);
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float2 part = shared.sums[w][head];
            const float4 y =
                *reinterpret_cast<const float4*>(&shared.part[w][head][4 * (i % (D / 4))]);
            const float factor = power_of_2(part.x - most);
            total += part.y * factor;
            x.x += y.x * factor, x.y += y.y * factor, x.z += y.z * factor, x.w += y.w * factor;
        }
        const int owner = static_cast<int>((static_cast<float>(i) + 0.5f) * a.per_share);
        const int to = (rank - owner) * share + i;
        const uint32_t barrier = address_in(all_came, owner);
        send(address_in(shared_address(&shared.came[to]), owner), x, barrier);
        send(address_in(shared_address(&shared.came_sums[to]), owner), make_float2(most, total),
             barrier);
    }

    // This block's share of the output, out of all blocks' parts.
    wait_for(all_came);
    T* to = static_cast<T*>(a.out) + (static_cast<int64_t>(row) * a.kv_heads + kv_head) * a.group * D;
    const float* came = reinterpret_cast<const float*>(shared.came);
    for (int i = threadIdx.x; i < 4 * share; i += 32 * WARPS) {
        float most = MASKED, total = 0.0f, x = 0.0f;
#pragma unroll 4
        for (int b = 0; b < blocks; ++b)
            most = fmaxf(most, shared.came_sums[b * share + i / 4].x);
        const int place = rank * share * 4 + i;
        if (a.sinks) {
            const float sink = a.sinks[kv_head * a.group + place / D] * LOG2E;
            most = fmaxf(most, sink);
            total = power_of_2(sink - most);
        }
#pragma unroll 4
        for (int b = 0; b < blocks; ++b) {
            const float2 part = shared.came_sums[b * share + i / 4];
            const float factor = power_of_2(part.x - most);
            total += part.y * factor;
            x += came[4 * b * share + i] * factor;
        }
        to[place] = N::round(__fdividef(x, fmaxf(total, 1e-30f)));
    }
}

using Kernel = void (*)(Arguments);

struct Variant {
    int half, dim, warps, tiles, depth;
    Kernel kernel;
    int ring_bytes() const { return warps * tiles * depth * 32 * dim * 2; }
};

#define VARIANTS(WARPS, TILES, DEPTH)                                                            \
    {0, 128, WARPS, TILES, DEPTH, decode_kernel<__nv_bfloat16, 128, WARPS, TILES, DEPTH>},       \
        {0, 64, WARPS, TILES, DEPTH, decode_kernel<__nv_bfloat16, 64, WARPS, TILES, DEPTH>},     \
        {1, 128, WARPS, TILES, DEPTH, decode_kernel<__half, 128, WARPS, TILES, DEPTH>},          \
        {1, 64, WARPS, TILES, DEPTH, decode_kernel<__half, 64, WARPS, TILES, DEPTH>}

const Variant variants[] = {VARIANTS(4, 1, 0), VARIANTS(4, 2, 0), VARIANTS(4, 1, 2),
                            VARIANTS(4, 2, 2)};

}  // namespace

// Ready every kernel on the current device; a CUDA error, or 0.
extern "C" int paged_decode_prepare() {
    for (const Variant& variant : variants) {
        const void* kernel = reinterpret_cast<const void*>(variant.kernel);
        cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         variant.ring_bytes());
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

// Launch on `stream`; a CUDA error, or 0. `cluster`: blocks of threads a row and key/value head, a
// power of two up to 16. `dependent`: launched with programmatic stream serialisation. See Arguments
// and the top of the file for the rest; what is wrong with them is the caller's to find.
extern "C" int paged_decode(const void* q, const void* k, const void* v, void* out,
                            const int* table, const int* seq_lens, const float* slopes,
                            const float* sinks, int64_t q_stride, int64_t table_stride,
                            int64_t block_stride, int rows, int table_width, int kv_heads,
                            int group, int dim, int half, int page_shift, int window, int chunk,
                            float scale, float softcap, int cluster, int warps, int tiles, int depth,
                            int early, int ahead, int dependent, cudaStream_t stream) {
    const Variant* chosen = nullptr;
    for (const Variant& variant : variants)
        if (variant.half == half && variant.dim == dim && variant.warps == warps &&
            variant.tiles == tiles && variant.depth == depth)
            chosen = &variant;
    if (!chosen || cluster < 1 || cluster > MAX_CLUSTER) return cudaErrorInvalidValue;
    const int share = group * (dim / 4) / cluster;
    const Arguments arguments{q,
                              k,
                              v,
                              out,
                              table,
                              seq_lens,
                              slopes,
                              sinks,
                              q_stride,
                              table_stride,
                              block_stride,
                              table_width,
                              kv_heads,
                              group,
                              page_shift,
                              window,
                              chunk,
                              softcap > 0.0f ? scale : scale * LOG2E,  // exp2 makes the weights
                              softcap,
                              share,
                              1.0f / static_cast<float>(share),
                              early,
                              ahead};
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(cluster), static_cast<unsigned>(kv_heads),
                          static_cast<unsigned>(rows));
    config.blockDim = dim3(static_cast<unsigned>(32 * warps));
    config.dynamicSmemBytes = static_cast<size_t>(chosen->ring_bytes());
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = dependent ? 2 : 1;
    return cudaLaunchKernelEx(&config, chosen->kernel, arguments);
}

extern "C" const char* cuda_error_name(int error) {
    return cudaGetErrorName(static_cast<cudaError_t>(error));
}
