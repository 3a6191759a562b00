// Causal attention of a step's tokens over the paged cache, float32, read where it lies.
//
// Each query makes two passes: scores of all its tokens with every key, then, after the softmax,
// the weighted sum of the values. Only slots of the query's own context are read, so memory that
// was never written may hold anything. Query heads that share a key/value head go together.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

constexpr int64_t QUERIES = 16;  // of one task
constexpr int64_t AHEAD = 4 * LANES;  // tokens that are asked for before they are read

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

#ifdef SHUFFLES
// Neighbours `S` lanes apart are added: those of a on the even places, those of b on the odd ones.
template <int S, size_t... I> static INLINE Vec fold(Vec a, Vec b, std::index_sequence<I...>) {
    return __builtin_shufflevector(a, b, (I / S % 2 ? LANES + I - S : I)...) +
           __builtin_shufflevector(a, b, (I / S % 2 ? LANES + I : I + S)...);
}

// Lane i of the result is the sum over part(i), by a tree of folds, COUNT leaves of it from FIRST.
template <int FIRST = 0, int COUNT = LANES, class Part> static INLINE Vec sums(const Part &part) {
    if constexpr (COUNT == 1) return part(FIRST);
    else
        return fold<COUNT / 2>(sums<FIRST, COUNT / 2>(part),
                               sums<FIRST + COUNT / 2, COUNT / 2>(part),
                               std::make_index_sequence<LANES>());
}
#else
template <class Part> static INLINE Vec sums(const Part &part) {
    Vec result;
    for (int i = 0; i < LANES; i++) result[i] = sum(part(i));
    return result;
}
#endif

// SIZE: numbers of a head, 0 for any.
template <int SIZE> struct PagedAttention {
    const float *q, *kv;
    float *out;
    const int64_t *block_tables, *seq_lens, *query_start_loc;
    int64_t q_stride, table_stride, block_stride, part_stride;
    int64_t heads, kv_heads, size, block_size, window;
    float scale;

    // Queries first … first + count - 1 of a row, which share the places of their keys.
    void queries(int64_t row, int64_t first, int64_t count) {
        thread_local std::vector<int64_t> places;
        thread_local std::vector<float> scores, scaled;
        int64_t begin = query_start_loc[row], queries = query_start_loc[row + 1] - begin;
        int64_t past = seq_lens[row] - queries;
        int64_t low = start(past + first), high = past + first + count;
        // The last place is repeated, so that scores can be computed LANES at a time.
        places.resize(high - low + LANES);
        const int64_t *table = block_tables + row * table_stride;
        for (int64_t at = low; at < high; at++)
            places[at - low] = table[at / block_size] * block_stride +
                               at % block_size * kv_heads * size;
        std::fill(places.end() - LANES, places.end(), places[high - low - 1]);
        int64_t padded = (high - low + LANES - 1) / LANES * LANES;
        scores.resize(heads * padded);
        scaled.resize(heads * size);
        for (int64_t i = first; i < first + count; i++) {
            int64_t own = start(past + i), length = past + i + 1 - own;
            const float *from = q + (begin + i) * q_stride;
            for (int64_t j = 0; j < heads * size; j++) scaled[j] = from[j] * scale;
            query(scaled.data(), places.data() + own - low, length, scores.data(), padded,
                  i == first, out + (begin + i) * heads * size);
        }
    }

    int64_t start(int64_t position) const {
        return window && position >= window ? position + 1 - window : 0;
    }

    void query(const float *q, const int64_t *places, int64_t length, float *scores, int64_t stride,
               bool ask, float *to) {
        int64_t group = heads / kv_heads;
        for (int64_t at = 0; at < length; at += LANES) {
            const int64_t *next = places + std::min(at + AHEAD, length);
            for (int64_t head = 0; head < heads; head++) {
                if (ask) fetch(next + head * LANES / heads, next + (head + 1) * LANES / heads);
                const float *keys = kv + head / group * size;
                store(scores + head * stride + at, score(q + head * size, keys, places + at));
            }
        }
        for (int64_t head = 0; head < heads; head++) softmax(scores + head * stride, length);
        for (int64_t head = 0; head < heads;) {
            const float *values = kv + part_stride + head / group * size;
            int64_t left = group - head % group;
            float *weights = scores + head * stride, *o = to + head * size;
            if (left >= 4) head += 4, mix<4>(weights, stride, values, places, length, o);
            else if (left >= 2) head += 2, mix<2>(weights, stride, values, places, length, o);
            else head += 1, mix<1>(weights, stride, values, places, length, o);
        }
    }

    // Ask for some tokens' keys and values. The processor's own guesses end with every block, and
    // without this most of a decode step is spent waiting; asked for all at once, they would block
    // the loads of what is computed meanwhile.
    INLINE void fetch(const int64_t *from, const int64_t *to) {
        for (; from < to; from++)
            for (int64_t j = 0; j < kv_heads * size; j += 64 / sizeof(float)) {
                __builtin_prefetch(kv + *from + j);
                __builtin_prefetch(kv + *from + part_stride + j, 0, 2);
            }
    }

    // Scores of LANES keys at `places`.
    INLINE Vec score(const float *q, const float *keys, const int64_t *places) {
        return sums([&](int i) __attribute__((always_inline)) {
            const float *key = keys + places[i];
            if constexpr (SIZE) {
                Vec part = load(q) * load(key);
                for (int j = LANES; j < SIZE; j += LANES) part += load(q + j) * load(key + j);
                return part;
            } else {
                Vec part = {};
                int64_t j = 0;
                for (; j + LANES <= size; j += LANES) part += load(q + j) * load(key + j);
                for (int lane = 0; j < size; j++, lane++) part[lane] += q[j] * key[j];
                return part;
            }
        });
    }

    static void softmax(float *scores, int64_t length) {
        int64_t padded = (length + LANES - 1) / LANES * LANES;
        for (int64_t i = length; i < padded; i++) scores[i] = -INFINITY;
        Vec most = load(scores), total = {};
        for (int64_t i = LANES; i < padded; i += LANES) {
            Vec v = load(scores + i);
            most = v > most ? v : most;
        }
        float highest = max(most);
        for (int64_t i = 0; i < padded; i += LANES) {
            Vec v = exp(load(scores + i) - highest);
            store(scores + i, v);
            total += v;  // exp(-inf) is 1e-38 here, which no total notices
        }
        float inverse = 1 / sum(total);
        for (int64_t i = 0; i < padded; i += LANES) store(scores + i, load(scores + i) * inverse);
    }

    // o[g] = sum of weights[g] * values, for G heads that share values.
    template <int G> INLINE void mix(const float *weights, int64_t stride, const float *values,
                                     const int64_t *places, int64_t length, float *o) {
        int64_t j = 0;
        for (; j + 2 * LANES <= size; j += 2 * LANES)
            mix_vectors<G, 2>(weights, stride, values + j, places, length, o + j);
        for (; j + LANES <= size; j += LANES)
            mix_vectors<G, 1>(weights, stride, values + j, places, length, o + j);
        for (; j < size; j++)
            for (int g = 0; g < G; g++) {
                float total = 0;
                for (int64_t i = 0; i < length; i++)
                    total += weights[g * stride + i] * values[places[i] + j];
                o[g * size + j] = total;
            }
    }

    template <int G, int N> INLINE void mix_vectors(const float *weights, int64_t stride,
                                                    const float *values, const int64_t *places,
                                                    int64_t length, float *o) {
        Vec totals[G][N] = {};
        for (int64_t i = 0; i < length; i++)
            for (int n = 0; n < N; n++) {
                Vec value = load(values + places[i] + n * LANES);
                for (int g = 0; g < G; g++) totals[g][n] += value * weights[g * stride + i];
            }
        for (int g = 0; g < G; g++)
            for (int n = 0; n < N; n++) store(o + g * size + n * LANES, totals[g][n]);
    }
};

// q: [tokens, heads, size], tokens `q_stride` floats apart. kv: blocks `block_stride` floats apart,
// values `part_stride` behind keys, [block_size, kv_heads, size] each. block_tables: [rows, ...];
// seq_lens: [rows]; query_start_loc: [rows + 1]. window: 0 for none. out: [tokens, heads, size].
extern "C" void paged_attention(const float *q, int64_t q_stride, const float *kv,
                                int64_t block_stride, int64_t part_stride,
                                const int64_t *block_tables, int64_t table_stride,
                                const int64_t *seq_lens, const int64_t *query_start_loc, float *out,
                                int64_t rows, int64_t heads, int64_t kv_heads, int64_t size,
                                int64_t block_size, int64_t window, float scale, int threads) {
    struct Task { int64_t row, first, count; };
    std::vector<Task> tasks;
    double pairs = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t queries = query_start_loc[row + 1] - query_start_loc[row];
        pairs += (double)queries * seq_lens[row];
        for (int64_t first = 0; first < queries; first += QUERIES)
            tasks.push_back({row, first, std::min(QUERIES, queries - first)});
    }
    auto run = [&](auto it) {
        parallel(tasks.size(), threads, pairs * heads * (4 * size + 40), [&](int64_t i) {
            it.queries(tasks[i].row, tasks[i].first, tasks[i].count);
        });
    };
#define RUN(SIZE)                                                                               \
    run(PagedAttention<SIZE>{q, kv, out, block_tables, seq_lens, query_start_loc, q_stride,     \
                             table_stride, block_stride, part_stride, heads, kv_heads, size,    \
                             block_size, window, scale})
    switch (size) {
    case 32: return RUN(32);
    case 64: return RUN(64);
    case 128: return RUN(128);
    default: return RUN(0);
    }
}

// Copy k, v [tokens, kv_heads * size], tokens `*_stride` floats apart, to their slots, which are
// block * block_size + offset; kv as above.
extern "C" void kv_write(const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                         float *kv, int64_t block_stride, int64_t part_stride,
                         const int64_t *slots, int64_t tokens, int64_t width, int64_t block_size) {
    for (int64_t t = 0; t < tokens; t++) {
        float *to = kv + slots[t] / block_size * block_stride + slots[t] % block_size * width;
        memcpy(to, k + t * k_stride, width * 4);
        memcpy(to + part_stride, v + t * v_stride, width * 4);
    }
}
