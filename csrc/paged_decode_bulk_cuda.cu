// Attention of one new token a row over the paged cache, for many rows: made for bandwidth.
//
//     out[t, h] = softmax(scale · q[t, h] · K_rowᵀ) · V_row       key/value head h / group
//
// The keys that rows see are cut into tiles of 16 tokens, the tiles of all rows are laid end to end,
// and the line is cut into equal bins, by a plan that a step's layers share. A block of threads takes
// one bin for all key/value heads, or for `heads` of them where there are more than eight: one
// warp asks for its tiles, and one warp a head multiplies them. A tile of a layer lies together in the
// cache, so that memory is read in long pieces.
//
//     copying warp     K 0 │ V 0 │ K 1 │ V 1 │ …   bulk copies into a ring of stages
//     warp of head 0       scores of tile 0, softmax, values of tile 0, scores of tile 1, …
//     warp of head 1       the same of its columns of the same stages
//     …
//
// The copying warp runs ahead over the ends of rows, as far as the ring has stages. With each stage of
// keys it says what the tile is: whose, which of its tokens are seen, and whether it is the first or
// the last of its row's tiles in this bin.
//
// A stage holds [columns][16 tokens][64 numbers], a column being 64 numbers of a head; the copy puts
// the 16 bytes c of token t at place c ^ (t & 7) of its 128, so that ldmatrix meets all banks at once.
//
// Scores are Q (A, 16 rows of which `group` are heads) times Kᵀ (B), values are Vᵀ (A) times weights
// (B), which is how the scores lie already. lane = 4n + q:
//
//     scores[h][2i + e]: head n, token 8h + 2q + e           out[j][2i + e]: head 2q + e,
//                        (i = 0)                                             number 16j + 8i + n
//
// Rows that a bin's end cuts leave parts: maxima, sums, weighted values as they lie in registers. Of a
// few bins, all but the first give their part when they are through with it (the last one does so near
// its beginning), and the first adds them to its own at its end. Of more, each gives its part and at
// its end merges a share of all, so a long row's merge is not one warp's. Whoever waits, waits for
// blocks that run already: the grid is not larger than what fits on the GPU at once. What is added up
// is added in a fixed order.
//
// The order of launches (`kernels/launch.py`) lets a block start while kernels before it still run.
// With `early`, lists, lengths, tables and all tokens but a row's newest are read before the wait: a
// kernel since they were written must have been launched without the attribute, as in
// `paged_decode_cuda.cu`.
//
// Needs sm_90: bulk copies of tensors.

#include <cuda.h>

#include "decode_cuda.h"

namespace {

constexpr int TILE = 16;      // tokens, k of an mma
constexpr int MAX_GROUP = 8;  // n of an mma
constexpr int MAX_HEADS = 8;  // of a block of threads
constexpr int COLUMN = 64;                // numbers
constexpr int COLUMN_BYTES = TILE * 128;  // of a stage
constexpr int MAX_TAKEN = 3;              // parts that a row's first bin takes
constexpr int PLANNERS = 512;             // threads
constexpr int FLAGS = 3;                  // a bin and head: launches so far, parts given at them

// A bin's tiles and rows; without tiles, zeros.
struct alignas(16) Bin {
    int begin, stop, size;            // size: of all bins but the last
    int row, row_begin, row_stop;     // the first row
    int last, last_begin, last_stop;  // the last row
    int unused[3];
};

struct Arguments {
    const void* q;           // [tokens, kv_heads · group, D], q_stride numbers between tokens
    void* out;               // [tokens, kv_heads · group, D]
    const int* table;        // [rows, table_width], table_stride between rows
    const int* seq_lens;     // [rows]
    const int* query_start;  // [rows + 1]
    const int* starts;       // [rows + 1]: tiles before each row
    const Bin* bins;
    int* flags;              // [bins, kv_heads, FLAGS], zeros at the first launch
    float4* parts;           // [bins, 2, kv_heads, D / 16, 32]
    float2* sums;            // [bins, 2, kv_heads, MAX_GROUP]: maximum, sum of powers
    const float* sinks;      // [kv_heads · group] or null
    int64_t q_stride, table_stride;
    int rows, table_width, kv_heads, group;
    int heads, lanes;    // key/value heads of a block of threads; blocks that share a bin
    int page_shift;      // 16 << page_shift tokens a block of the cache
    int window, chunk;   // 0: none
    int stages, early;
    float scale;
};

enum Action : int { NONE, FINISH, GIVE_FIRST, GIVE_LAST, TAKE };

// What the copying warp says of a tile.
struct Tile {
    int token;      // of the queries
    int low, high;  // tokens low … high - 1 are seen
    int action;     // bins of its row · 16 + what follows it · 2 + whether its row begins here
};

__device__ __forceinline__ Bin read_bin(const Bin* bins, int bin) {
    const int4* at = reinterpret_cast<const int4*>(bins + bin);
    const int4 x = __ldcg(at), y = __ldcg(at + 1), z = __ldcg(at + 2);
    return {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w, z.x, {}};
}

// The first token that a row of so many sees.
__device__ __forceinline__ int first_seen(int length, int window, int chunk) {
    const int first = window > 0 ? max(length - window, 0) : 0;
    return chunk > 0 ? max((length - 1) / chunk * chunk, first) : first;
}

// Bins that a row is cut into.
struct Cut {
    int first, count;
    __device__ __forceinline__ Cut(int row_begin, int row_stop, int size)
        : first(row_begin / size), count((row_stop - 1) / size - row_begin / size + 1) {}
};

__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// One tile's keys (part 0) or values (part 1) of all heads. Read once: L2 lets go of it first.
__device__ __forceinline__ void copy(uint32_t to, const CUtensorMap& map, int token, int column,
                                     int part, int block, uint32_t barrier) {
    const uint64_t evict_first = 0x12f0000000000000;
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(to),
        "l"(&map), "r"(0), "r"(token), "r"(column), "r"(part), "r"(block), "r"(barrier),
        "l"(evict_first)
        : "memory");
}

// Four 8 × 8 matrices: tokens 0 … 7 and numbers 0 … 7, 8 … 15; then tokens 8 … 15.
__device__ __forceinline__ void load_keys(uint32_t (&x)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ void load_values(uint32_t (&x)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

__device__ __forceinline__ int read_flag(const int* flag) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
    return x;
}

__device__ __forceinline__ void write_flag(int* flag, int x) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(x) : "memory");
}

// The block's shared memory: stages, what is said of each, and two barriers for each.
struct Ring {
    uint32_t stages, full, empty;
    Tile* tiles;
    int count;
    uint32_t bytes;  // of a stage

    __device__ __forceinline__ Ring(uint8_t* memory, const Arguments& a, int dim)
        : count(a.stages), bytes(a.heads * dim / COLUMN * COLUMN_BYTES) {
        const uint32_t address = shared_address(memory), start = (address + 1023) & ~1023u;
        stages = start;
        tiles = reinterpret_cast<Tile*>(memory + (start - address) + count * bytes);
        full = shared_address(tiles + count);
        empty = full + 8 * count;
    }
};

// A place in the ring, and the parity of the barriers' phase there.
struct Place {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void advance(int count) {
        if (++stage == count) stage = 0, parity ^= 1;
    }
};

// The copying warp.
__device__ __forceinline__ void copy_bin(const CUtensorMap& map, const Arguments& a,
                                         const Ring& ring, const Bin& bin, int column) {
    const int lane = threadIdx.x % 32;
    bool waited = !a.early;
    int base = bin.row, begins, ends, length, token;  // lane l: of row base + l
    const auto read_rows = [&] {
        const int row = min(base + lane, a.rows - 1);
        begins = __ldcg(a.starts + row), ends = __ldcg(a.starts + row + 1);
        length = __ldcg(a.seq_lens + row), token = __ldcg(a.query_start + row);
    };
    read_rows();
    Place place;
    for (int tile = bin.begin; tile < bin.stop;) {
        unsigned found;
        while (!(found = __ballot_sync(~0u, ends > tile))) base += 32, read_rows();
        const int r = __ffs(found) - 1;
        const int row_begin = __shfl_sync(~0u, begins, r), row_stop = __shfl_sync(~0u, ends, r);
        const int row_length = __shfl_sync(~0u, length, r), row_token = __shfl_sync(~0u, token, r);
        const int first = first_seen(row_length, a.window, a.chunk);
        const int* table = a.table + (base + r) * a.table_stride;
        const int start = tile, stop = min(row_stop, bin.stop);
        const int offset = first / TILE - row_begin;  // tile + offset: the tile's number in its row
        int after = FINISH << 1;
        if (row_begin < bin.begin || row_stop > bin.stop) {
            const Cut cut(row_begin, row_stop, bin.size);
            after = (row_begin < bin.begin       ? GIVE_FIRST
                     : cut.count <= MAX_TAKEN + 1 ? TAKE
                                                 : GIVE_LAST)
                        << 1 |
                    cut.count << 4;
        }
        int ids = 0;  // lane l: entry of tile start + (i & ~31) + l
        for (; tile < stop; ++tile) {
            const int i = tile - start, number = tile + offset;
            if (i % 32 == 0) {
                const int entry = min((number + lane) >> a.page_shift, a.table_width - 1);
                ids = __ldcg(table + entry);
            }
            const int id = __shfl_sync(~0u, ids, i % 32);
            if (!waited && tile == row_stop - 1) {  // the newest token is in it
                wait_for_earlier_kernels();
                waited = true;
            }
            if (lane == 0) {
                const int inside = (number & ((1 << a.page_shift) - 1)) * TILE;
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    const uint32_t full = ring.full + 8 * place.stage;
                    wait_for(ring.empty + 8 * place.stage, place.parity ^ 1);
                    if (part == 0)
                        ring.tiles[place.stage] = {row_token, max(first - number * TILE, 0),
                                                   min(row_length - number * TILE, TILE),
                                                   (tile == stop - 1 ? after : NONE << 1) | (i == 0)};
                    expect(full, ring.bytes);
                    copy(ring.stages + place.stage * ring.bytes, map, inside, column, part, id,
                         full);
                    place.advance(ring.count);
                }
            }
            __syncwarp();
        }
    }
}

// One head's softmax so far, in a warp's registers.
template <class T, int D>
struct Sums {
    using N = Numbers<T>;
    float top, sum;  // of head n; `sum`: over this lane's tokens, until `add_up`
    float out[D / 16][4];

    __device__ __forceinline__ void clear() {
        top = MASKED, sum = 0.0f;
#pragma unroll
        for (int j = 0; j < D / 16; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.0f;
    }

    // Multiply all of head n's numbers by its lanes' factor.
    __device__ __forceinline__ void rescale(float factor, int q) {
        const float factor0 = __shfl_sync(~0u, factor, 8 * q);
        const float factor1 = __shfl_sync(~0u, factor, 8 * q + 4);
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            out[j][0] *= factor0, out[j][1] *= factor1;
            out[j][2] *= factor0, out[j][3] *= factor1;
        }
    }

    __device__ __forceinline__ void add_up() {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
    }

    __device__ __forceinline__ void give(float4* part, float2* sums, int lane, int group) const {
        if (2 * (lane % 4) < group) {
#pragma unroll
            for (int j = 0; j < D / 16; ++j)
                __stcg(part + 32 * j + lane,
                       make_float4(out[j][0], out[j][1], out[j][2], out[j][3]));
        }
        if (lane % 4 == 0) __stcg(sums + lane / 4, make_float2(top, sum));
    }

    __device__ __forceinline__ void take(const float4* part, const float2* sums, int lane,
                                         int group) {
        const int q = lane % 4;
        const float2 theirs = __ldcg(sums + lane / 4);
        const float best = fmaxf(top, theirs.x);
        const float mine = power_of_2(top - best), other = power_of_2(theirs.x - best);
        top = best, sum = sum * mine + theirs.y * other;
        rescale(mine, q);
        const float other0 = __shfl_sync(~0u, other, 8 * q);
        const float other1 = __shfl_sync(~0u, other, 8 * q + 4);
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            if (2 * q >= group) break;
            const float4 x = __ldcg(part + 32 * j + lane);
            out[j][0] += x.x * other0, out[j][1] += x.y * other1;
            out[j][2] += x.z * other0, out[j][3] += x.w * other1;
        }
    }

    // `to`: this head's [group, D] of the output; `sinks`: its group's, or null.
    __device__ __forceinline__ void finish(T* to, const float* sinks, int lane, int group) {
        const int n = lane / 4, q = lane % 4;
        float factor = 1.0f;
        if (sinks && n < group) {
            const float sink = sinks[n] * LOG2E, best = fmaxf(top, sink);
            factor = power_of_2(top - best);
            sum = sum * factor + power_of_2(sink - best);
        }
        rescale(__fdividef(factor, fmaxf(sum, 1e-30f)), q);
#pragma unroll
        for (int j = 0; j < D / 16; ++j)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t pair = transpose(N::pack(out[j][2 * i], out[j][2 * i + 1]));
                if (n < group)
                    *reinterpret_cast<uint32_t*>(to + n * D + 16 * j + 8 * i + 2 * q) = pair;
            }
    }
};

// A maximum, its sum of powers and two weighted values, and another's: become those of both.
struct Merged {
    float top = MASKED, sum = 0.0f, x = 0.0f, y = 0.0f;

    __device__ __forceinline__ void add(const Merged& other) {
        const float best = fmaxf(top, other.top);
        const float mine = power_of_2(top - best), theirs = power_of_2(other.top - best);
        top = best, sum = sum * mine + other.sum * theirs;
        x = x * mine + other.x * theirs, y = y * mine + other.y * theirs;
    }

    __device__ __forceinline__ Merged across(int step) const {
        Merged other;
        other.top = __shfl_xor_sync(~0u, top, step);
        other.sum = __shfl_xor_sync(~0u, sum, step);
        other.x = __shfl_xor_sync(~0u, x, step);
        other.y = __shfl_xor_sync(~0u, y, step);
        return other;
    }
};

// This bin's share of a row that is cut into many: lanes take parts, fours of values, both.
template <class T, int D>
__device__ __forceinline__ void merge_share(const Arguments& a, const Cut& cut, int bin,
                                            int kv_head, int launch, T* to) {
    const int lane = threadIdx.x % 32;
    const auto slot = [&](int p) { return (cut.first + p) * 2 + (p == 0); };
    for (int p = lane; p < cut.count; p += 32) {
        const int* flag = a.flags + ((cut.first + p) * a.kv_heads + kv_head) * FLAGS + 1 + (p == 0);
        while (read_flag(flag) != launch) {
        }
    }
    __syncwarp();
    int lanes = 4;  // that take one four's parts
    while (lanes < 32 && lanes < cut.count) lanes *= 2;
    const int used = (a.group + 1) / 2, together = 32 / lanes;  // pairs of heads; fours at a time
    const int fours = D / 16 * 8 * used, share = bin - cut.first;
    const int stop = fours * (share + 1) / cut.count;
    constexpr int BATCH = 4;  // asked for before the first of them is there
    for (int f = fours * share / cut.count; f < stop; f += BATCH * together) {
        Merged heads[BATCH][2];
        for (int p = lane % lanes; p < cut.count; p += lanes) {
            const int64_t part = static_cast<int64_t>(slot(p)) * a.kv_heads + kv_head;
            float4 x[BATCH], sums[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int four = min(f + i * together + lane / lanes, stop - 1);
                const int q = four % used, n = four / used % 8, j = four / used / 8;
                x[i] = __ldcg(a.parts + (part * (D / 16) + j) * 32 + 4 * n + q);
                sums[i] = __ldcg(reinterpret_cast<const float4*>(a.sums + part * MAX_GROUP) + q);
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                heads[i][0].add({sums[i].x, sums[i].y, x[i].x, x[i].z});
                heads[i][1].add({sums[i].z, sums[i].w, x[i].y, x[i].w});
            }
        }
        for (int step = 1; step < lanes; step *= 2)
#pragma unroll
            for (int i = 0; i < 2 * BATCH; ++i)
                heads[i / 2][i % 2].add(heads[i / 2][i % 2].across(step));
#pragma unroll
        for (int i = 0; i < 2 * BATCH; ++i) {
            const int four = f + i / 2 * together + lane / lanes;
            const int head = 2 * (four % used) + i % 2;
            if (lane % lanes != 0 || four >= stop || head >= a.group) continue;
            Merged& all = heads[i / 2][i % 2];
            if (a.sinks) all.add({a.sinks[kv_head * a.group + head] * LOG2E, 1.0f, 0.0f, 0.0f});
            const float total = fmaxf(all.sum, 1e-30f);
            T* at = to + head * D + four / used / 8 * 16 + four / used % 8;
            at[0] = Numbers<T>::round(__fdividef(all.x, total));
            at[8] = Numbers<T>::round(__fdividef(all.y, total));
        }
    }
}

// The warp of one key/value head.
template <class T, int D>
__device__ __forceinline__ void multiply(const Arguments& a, const Ring& ring, const Bin& bin,
                                         int number, int warp, int kv_head) {
    using N = Numbers<T>;
    const int lane = threadIdx.x % 32, n = lane / 4, q = lane % 4;
    if (a.early) wait_for_earlier_kernels();
    int* flags = a.flags + (number * a.kv_heads + kv_head) * FLAGS;
    const int launch = __ldcg(flags) + 1;
    __syncwarp();
    if (lane == 0) __stcg(flags, launch);

    // This lane's row of ldmatrix, in the head's first column.
    const int matrix = lane / 8, token = lane % 8;
    const uint32_t row = warp * (D / COLUMN) * COLUMN_BYTES + (token + 8 * (matrix / 2)) * 128;
    const uint32_t chunk = 16 * ((matrix % 2) ^ token);
    const auto address = [&](uint32_t stage, int j) {  // of numbers 16j … 16j + 15
        return stage + row + j / 4 * COLUMN_BYTES + (chunk ^ (j % 4 * 32));
    };
    const int first_head = kv_head * a.group;
    const auto heads_of = [&](int token) {  // in the output
        return static_cast<T*>(a.out) +
               (static_cast<int64_t>(token) * a.kv_heads * a.group + first_head) * D;
    };
    const auto part_of = [&](int bin, int slot) { return (bin * 2 + slot) * a.kv_heads + kv_head; };

    Place place;
    Sums<T, D> sums;
    uint32_t queries[D / 16][2];
    for (int left = bin.stop - bin.begin; left > 0; --left) {
        wait_for(ring.full + 8 * place.stage, place.parity);
        const Tile tile = ring.tiles[place.stage];
        if (tile.action & 1) {
            sums.clear();
            const uint32_t* at = reinterpret_cast<const uint32_t*>(
                static_cast<const T*>(a.q) + tile.token * a.q_stride + (first_head + n) * D + 2 * q);
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                queries[j][0] = n < a.group ? __ldcg(at + 8 * j) : 0;
                queries[j][1] = n < a.group ? __ldcg(at + 8 * j + 4) : 0;
            }
        }
        // Two sums a half tile: the chain of products is half as long.
        float scores[2][2][4] = {};
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t k[4];
            load_keys(k, address(ring.stages + place.stage * ring.bytes, j));
            N::mma(scores[0][j % 2], queries[j][0], 0, queries[j][1], 0, k[0], k[1]);
            N::mma(scores[1][j % 2], queries[j][0], 0, queries[j][1], 0, k[2], k[3]);
        }
        __syncwarp();
        if (lane == 0) arrive(ring.empty + 8 * place.stage);
        place.advance(ring.count);

        float weights[2][2], best = sums.top;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int t = 8 * h + 2 * q + e;
                const float x = (scores[h][0][e] + scores[h][1][e]) * a.scale;
                weights[h][e] = t >= tile.low && t < tile.high ? x : MASKED;
                best = fmaxf(best, weights[h][e]);
            }
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
        const float factor = power_of_2(sums.top - best);
        sums.top = best, sums.sum *= factor;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                weights[h][e] = power_of_2(weights[h][e] - best);
                sums.sum += weights[h][e];
            }
        const uint32_t b0 = N::pack(weights[0][0], weights[0][1]);
        const uint32_t b1 = N::pack(weights[1][0], weights[1][1]);
        sums.rescale(factor, q);

        // What is not seen may be NaN, which no weight of 0 makes 0.
        uint32_t seen[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int t = 8 * h + 2 * q;
            seen[h] = (t >= tile.low && t < tile.high ? 0xffffu : 0u) |
                      (t + 1 >= tile.low && t + 1 < tile.high ? 0xffff0000u : 0u);
        }
        wait_for(ring.full + 8 * place.stage, place.parity);
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t v[4];
            load_values(v, address(ring.stages + place.stage * ring.bytes, j));
            N::mma(sums.out[j], v[0] & seen[0], v[1] & seen[0], v[2] & seen[1], v[3] & seen[1], b0,
                   b1);
        }
        __syncwarp();
        if (lane == 0) arrive(ring.empty + 8 * place.stage);
        place.advance(ring.count);

        const int after = tile.action >> 1 & 7;
        if (after == NONE) continue;
        sums.add_up();
        if (after == GIVE_FIRST || after == GIVE_LAST) {
            const int slot = after == GIVE_LAST, part = part_of(number, slot);
            sums.give(a.parts + static_cast<int64_t>(part) * (D / 16 * 32),
                      a.sums + part * MAX_GROUP, lane, a.group);
            __threadfence();
            __syncwarp();
            if (lane == 0) write_flag(flags + 1 + slot, launch);
            continue;
        }
        for (int p = 1; after == TAKE && p < tile.action >> 4; ++p) {
            const int part = part_of(number + p, 0);
            while (read_flag(flags + p * a.kv_heads * FLAGS + 1) != launch) {
            }
            __syncwarp();
            sums.take(a.parts + static_cast<int64_t>(part) * (D / 16 * 32),
                      a.sums + part * MAX_GROUP, lane, a.group);
        }
        sums.finish(heads_of(tile.token), a.sinks ? a.sinks + first_head : nullptr, lane, a.group);
    }

    // Of a bin that lies in one row, both ends are this row's.
    const int ends = bin.begin >= bin.stop ? 0 : bin.last_begin == bin.row_begin ? 1 : 2;
#pragma unroll 1
    for (int end = 0; end < ends; ++end) {
        const int row = end ? bin.last : bin.row;
        const Cut cut(end ? bin.last_begin : bin.row_begin, end ? bin.last_stop : bin.row_stop,
                      bin.size);
        if (cut.count > MAX_TAKEN + 1)
            merge_share<T, D>(a, cut, number, kv_head, launch,
                              heads_of(__ldcg(a.query_start + row)));
    }
}

// The sum over threads up to this one, and over all of the block.
__device__ __forceinline__ int2 sums_to(int x) {
    __shared__ int warps[PLANNERS / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(~0u, x, step);
        if (lane >= step) x += before;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = x;
    __syncthreads();
    int all = 0;
#pragma unroll
    for (int w = 0; w < PLANNERS / 32; ++w) {
        if (w == warp) x += all;
        all += warps[w];
    }
    return {x, all};
}

// Lay out the tiles of rows of one token, cut them into bins of `least` tiles or more, and clear flags.
__global__ void __launch_bounds__(PLANNERS)
    plan_kernel(const int* seq_lens, const int* query_start, int* starts, Bin* bins, int* flags,
                int rows, int num_bins, int num_flags, int window, int chunk, int least) {
    asm volatile("griddepcontrol.launch_dependents;");
    wait_for_earlier_kernels();
    const int thread = threadIdx.x;
    for (int i = thread; i < num_flags; i += PLANNERS) flags[i] = 0;
    int total = 0;
    for (int from = 0; from < rows; from += PLANNERS) {
        const int row = from + thread;
        int tiles = 0;
        if (row < rows && query_start[row + 1] - query_start[row] == 1) {
            const int length = seq_lens[row];
            // A row without context has one tile of nothing, so that its output is written.
            tiles = max((length + TILE - 1) / TILE - first_seen(length, window, chunk) / TILE, 1);
        }
        const int2 sums = sums_to(tiles);
        if (row < rows) starts[row + 1] = total + sums.x;
        total += sums.y;
    }
    if (thread == 0) starts[0] = 0;
    __syncthreads();
    const int size = max((total + num_bins - 1) / num_bins, least);
    for (int b = thread; b < num_bins; b += PLANNERS) {
        if (b * size < total)
            bins[b].begin = b * size, bins[b].stop = min(b * size + size, total), bins[b].size = size;
        else
            bins[b] = {};
    }
    for (int row = thread; row < rows; row += PLANNERS) {
        const int begin = starts[row], stop = starts[row + 1];
        if (begin == stop) continue;
        for (int b = begin / size; b * size < stop; ++b) {
            if (b * size >= begin) {
                bins[b].row = row, bins[b].row_begin = begin, bins[b].row_stop = stop;
            }
            if (min(b * size + size, total) <= stop) {
                bins[b].last = row, bins[b].last_begin = begin, bins[b].last_stop = stop;
            }
        }
    }
}

template <class T, int D>
__global__ void __launch_bounds__(32 * (MAX_HEADS + 1), 128 / D)
    decode_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ Arguments a) {
    extern __shared__ uint8_t memory[];
    asm volatile("griddepcontrol.launch_dependents;");
    const Ring ring(memory, a, D);
    if (threadIdx.x == 0) {
        for (int s = 0; s < ring.count; ++s) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ring.full + 8 * s));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(ring.empty + 8 * s),
                         "r"(a.heads));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
    }
    __syncthreads();
    if (!a.early) wait_for_earlier_kernels();
    const int number = blockIdx.x / a.lanes, first_head = blockIdx.x % a.lanes * a.heads;
    const Bin bin = read_bin(a.bins, number);
    const int warp = threadIdx.x / 32;
    if (warp == a.heads)
        copy_bin(map, a, ring, bin, first_head * (D / COLUMN));
    else
        multiply<T, D>(a, ring, bin, number, warp, first_head + warp);
}

using Kernel = void (*)(CUtensorMap, Arguments);
using Encode = decltype(&cuTensorMapEncodeTiled);

Kernel kernel_of(int half, int dim) {
    if (dim == 64) return half ? decode_kernel<__half, 64> : decode_kernel<__nv_bfloat16, 64>;
    return half ? decode_kernel<__half, 128> : decode_kernel<__nv_bfloat16, 128>;
}

// `dependent`: with programmatic stream serialisation.
struct Launch {
    cudaLaunchAttribute attribute{};
    cudaLaunchConfig_t config{};

    Launch(int blocks, int threads, size_t shared, bool dependent, cudaStream_t stream) {
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.gridDim = dim3(static_cast<unsigned>(blocks));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = shared;
        config.stream = stream;
        config.attrs = &attribute;
        config.numAttrs = dependent ? 1 : 0;
    }
    Launch(const Launch&) = delete;  // `config` points here
};

// Of a block of threads: the ring, what is said of stages, barriers, and room to align it.
size_t shared_bytes(int dim, int heads, int stages) {
    const size_t stage = static_cast<size_t>(heads) * dim / COLUMN * COLUMN_BYTES;
    return 1024 + stages * (stage + sizeof(Tile) + 16);
}

}  // namespace

// Ready every kernel on the current device; a CUDA error, or 0.
extern "C" int paged_decode_bulk_prepare() {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    for (int i = 0; i < 4 && error == cudaSuccess; ++i)
        error = cudaFuncSetAttribute(
            reinterpret_cast<const void*>(kernel_of(i / 2, 64 << i % 2)),
            cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    return error;
}

// How many blocks of threads a multiprocessor holds at once, after `paged_decode_bulk_prepare`; less
// than 0: a CUDA error.
extern "C" int paged_decode_bulk_fit(int dim, int half, int heads, int stages) {
    int fit = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &fit, reinterpret_cast<const void*>(kernel_of(half, dim)), 32 * (heads + 1),
        shared_bytes(dim, heads, stages));
    return error == cudaSuccess ? fit : -static_cast<int>(error);
}

// Describe one layer's part of the cache, [blocks, 2, page, kv_heads, dim], in `map`, the 128 bytes,
// aligned to 64, of a CUtensorMap, for copies of `heads` heads; a CUDA error, or 0. Strides in
// numbers.
extern "C" int paged_decode_bulk_describe(void* map, const void* kv, int64_t blocks,
                                          int64_t block_stride, int64_t part_stride, int page,
                                          int kv_heads, int heads, int dim, int half) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) return error;
    if (result != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    const cuuint64_t columns = static_cast<cuuint64_t>(kv_heads) * dim / COLUMN, width = columns * 128;
    const cuuint64_t sizes[] = {COLUMN, static_cast<cuuint64_t>(page), columns, 2,
                                static_cast<cuuint64_t>(blocks)};
    const cuuint64_t strides[] = {width, 128, static_cast<cuuint64_t>(part_stride) * 2,
                                  static_cast<cuuint64_t>(block_stride) * 2};
    const cuuint32_t box[] = {COLUMN, TILE, static_cast<cuuint32_t>(heads * dim / COLUMN), 1, 1};
    const cuuint32_t steps[] = {1, 1, 1, 1, 1};
    const CUresult encoded = reinterpret_cast<Encode>(found)(
        static_cast<CUtensorMap*>(map),
        half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
        const_cast<void*>(kv), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return encoded == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Plan for the layers of one shape; a CUDA error, or 0. starts: [rows + 1]; bins: [num_bins], 48 bytes
// each, aligned to 16; flags: [num_flags], FLAGS a bin and key/value head.
extern "C" int paged_decode_bulk_plan(const int* seq_lens, const int* query_start, int* starts,
                                      void* bins, int* flags, int rows, int num_bins, int num_flags,
                                      int window, int chunk, int least, cudaStream_t stream) {
    const Launch launch(1, PLANNERS, 0, true, stream);
    return cudaLaunchKernelEx(&launch.config, plan_kernel, seq_lens, query_start, starts,
                              static_cast<Bin*>(bins), flags, rows, num_bins, num_flags, window,
                              chunk, least);
}

// Launch a block of threads a bin and `heads` key/value heads on `stream`; a CUDA error, or 0.
// `dependent`: as in Launch. See Arguments and the top of the file for the rest; what is wrong with
// them is the caller's to find.
extern "C" int paged_decode_bulk(const void* map, const void* q, void* out, const int* table,
                                 const int* seq_lens, const int* query_start, const int* starts,
                                 const void* records, int* flags, float* parts, float* sums,
                                 const float* sinks, int64_t q_stride, int64_t table_stride,
                                 int rows, int table_width, int kv_heads, int group, int heads,
                                 int dim, int half, int page_shift, int window, int chunk, float scale,
                                 int bins, int stages, int early, int dependent,
                                 cudaStream_t stream) {
    const Arguments arguments{q,
                              out,
                              table,
                              seq_lens,
                              query_start,
                              starts,
                              static_cast<const Bin*>(records),
                              flags,
                              reinterpret_cast<float4*>(parts),
                              reinterpret_cast<float2*>(sums),
                              sinks,
                              q_stride,
                              table_stride,
                              rows,
                              table_width,
                              kv_heads,
                              group,
                              heads,
                              kv_heads / heads,
                              page_shift,
                              window,
                              chunk,
                              stages,
                              early,
                              scale * LOG2E};  // exp2 makes the weights
    const Launch launch(bins * (kv_heads / heads), 32 * (heads + 1),
                        shared_bytes(dim, heads, stages), dependent, stream);
    return cudaLaunchKernelEx(&launch.config, kernel_of(half, dim),
                              *static_cast<const CUtensorMap*>(map), arguments);
}
