// Causal attention of a step's tokens over the paged cache, float32, read where it lies.
//
// Each query makes two passes: scores of all its tokens with every key, then, after the softmax,
// the weighted sum of the values. Only slots of the query's own context are read, so memory that
// was never written may hold anything. Query heads that share a key/value head go together.
//
// Values may be the first numbers of their keys (latent attention, where many heads share one wide
// key): then the values' part is the keys' part.
#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

constexpr int64_t QUERIES = 16;  // of one task
constexpr int64_t AHEAD = 4 * LANES;  // tokens that are asked for before they are read
constexpr int64_t STRETCH = 128;  // tokens whose values many heads read before the next ones
constexpr int KEY_SHARERS = LANES / 4;  // heads that score a key at once: LANES sums in registers
#if defined(__AVX512F__)
constexpr int VALUE_SHARERS = 8;  // heads that sum up a value at once: 16 sums in registers
#else
constexpr int VALUE_SHARERS = 4;
#endif

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

#define NOINLINE __attribute__((noinline))

static INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

struct Arguments {
    const float *q, *kv, *slopes, *sinks;
    float *out;
    const int64_t *block_tables, *seq_lens, *query_start_loc;
    int64_t q_stride, table_stride, block_stride, part_stride;
    int64_t heads, kv_heads, size, value_size, block_size, window, chunk;
    float scale, softcap;

    // The first position that a query at `position` sees.
    int64_t start(int64_t position) const {
        int64_t first = window && position >= window ? position + 1 - window : 0;
        return chunk ? std::max(first, position - position % chunk) : first;
    }
};

// Heads begin … end - 1. SIZE: numbers of a key, 0 for any.
template <int SIZE> struct PagedAttention : Arguments {
    int64_t begin, end;
    int64_t group = heads / kv_heads;  // query heads that share a key
    int64_t low = begin / group * size, high = ((end - 1) / group + 1) * size;  // of a token's keys

    PagedAttention(const Arguments &it, int64_t begin, int64_t end)
        : Arguments(it), begin(begin), end(end) {}

    // Queries first … first + count - 1 of a row, which share the places of their keys.
    void queries(int64_t row, int64_t first, int64_t count) {
        thread_local std::vector<int64_t> places;
        thread_local std::vector<float> scores, scaled, totals;
        int64_t token = query_start_loc[row], queries = query_start_loc[row + 1] - token;
        int64_t past = seq_lens[row] - queries;
        int64_t low = start(past + first), high = past + first + count;
        // The last place is repeated, so that scores can be computed LANES at a time.
        places.resize(high - low + LANES);
        const int64_t *table = block_tables + row * table_stride;
        for (int64_t at = low; at < high; at++)
            places[at - low] = table[at / block_size] * block_stride +
                               at % block_size * kv_heads * size;
        std::fill(places.end() - LANES, places.end(), places[high - low - 1]);
        int64_t stride = padded(high - low);
        scores.resize((end - begin) * stride);
        scaled.resize((end - begin) * padded(size));
        totals.resize(end - begin);
        for (int64_t i = first; i < first + count; i++) {
            int64_t own = start(past + i), length = past + i + 1 - own;
            const float *from = q + (token + i) * q_stride + begin * size;
            for (int64_t j = 0; j < end - begin; j++)
                prepare(from + j * size, scaled.data() + j * padded(size));
            const int64_t *seen = places.data() + own - low;
            score(scaled.data(), seen, length, scores.data(), stride, i == first);
            for (int64_t j = 0; j < end - begin; j++)
                totals[j] = weigh(scores.data() + j * stride, length, begin + j);
            float *to = out + ((token + i) * heads + begin) * value_size;
            mix(scores.data(), stride, seen, length, to);
            for (float total : totals) {
                float inverse = 1 / total;
                for (int64_t j = 0; j < value_size; j++) to[j] *= inverse;
                to += value_size;
            }
        }
    }

    // Scale a query. Where a vector does not divide its numbers, a last vector follows, zero but for
    // those left over, that fits the last LANES numbers of a key, or all of a shorter one.
    INLINE void prepare(const float *from, float *to) const {
        const int64_t size = SIZE ? SIZE : this->size;
        for (int64_t j = 0; j < size / LANES * LANES; j++) to[j] = from[j] * scale;
        int64_t rest = size % LANES;
        if (!rest) return;
        float *tail = to + size - rest, *at = size < LANES ? tail : tail + LANES - rest;
        std::fill(tail, tail + LANES, 0.0f);
        for (int64_t j = 0; j < rest; j++) at[j] = from[size - rest + j] * scale;
    }

    static INLINE Vec key_tail(const float *key, int64_t size) {
        if (size > LANES) return load(key + size - LANES);
        Vec v = {};
        for (int64_t lane = 0; lane < size; lane++) v[lane] = key[lane];
        return v;
    }

    // Scores of all keys, head by head in rows `stride` apart.
    void score(const float *q, const int64_t *places, int64_t length, float *scores, int64_t stride,
               bool ask) const {
        int64_t count = end - begin, first = std::min(group - begin % group, count);
        for (int64_t at = 0; at < length; at += LANES) {
            const int64_t *next = ask ? places + std::min(at + AHEAD, length) : nullptr;
            const float *keys = kv + low;
            for (int64_t i = 0, stop = first; i < count; keys += size) {
                score_heads(i, stop, q, keys, places + at, scores + at, stride, next);
                i = stop, stop = std::min(stop + group, count);
            }
        }
    }

    // Ask for some tokens' keys and values. The processor's own guesses end with every block, and
    // without this most of a decode step is spent waiting; asked for all at once, they would block
    // the loads of what is computed meanwhile.
    INLINE void fetch(const int64_t *from, const int64_t *to) const {
        for (; from < to; from++)
            for (int64_t j = low; j < high; j += 64 / sizeof(float)) {
                __builtin_prefetch(kv + *from + j);
                if (part_stride) __builtin_prefetch(kv + *from + part_stride + j, 0, 2);
            }
    }

    // Scores of LANES keys at `places` for the heads i … stop - 1, which share them.
    NOINLINE void score_heads(int64_t i, int64_t stop, const float *q, const float *keys,
                              const int64_t *places, float *scores, int64_t stride,
                              const int64_t *next) const {
        const int64_t size = SIZE ? SIZE : this->size, q_size = padded(size), count = end - begin;
        q += i * q_size, scores += i * stride;
        auto take = [&](auto heads) __attribute__((always_inline)) {
            constexpr int G = decltype(heads)::value;
            if (next) fetch(next + i * LANES / count, next + (i + G) * LANES / count);
            score_keys<G>(q, q_size, size, keys, places, scores, stride);
            i += G, q += G * q_size, scores += G * stride;
        };
        // Of short keys, reading is the smaller part, and one head at a time is faster.
        if (!SIZE && size >= LANES) {
            while (stop - i >= KEY_SHARERS) take(std::integral_constant<int, KEY_SHARERS>());
            while (stop - i >= 2) take(std::integral_constant<int, 2>());
        }
        for (; i < stop; i++, q += q_size, scores += stride) {
            if (next) fetch(next + i * LANES / count, next + (i + 1) * LANES / count);
            store(scores, sums([&](int i) __attribute__((always_inline)) {
                const float *key = keys + places[i];
                Vec part = {};
                int64_t j = 0;
                for (; j + LANES <= size; j += LANES) part += load(q + j) * load(key + j);
                if (j < size) part += load(q + j) * key_tail(key, size);
                return part;
            }));
        }
    }

    // Scores of LANES keys for G heads, which read LANES / G keys at once.
    template <int G>
    static NOINLINE void score_keys(const float *q, int64_t q_size, int64_t size, const float *keys,
                                  const int64_t *places, float *scores, int64_t stride) {
        constexpr int KEYS = LANES / G;
        for (int first = 0; first < LANES; first += KEYS, places += KEYS, scores += KEYS) {
            Vec parts[LANES] = {};
            auto add = [&](int64_t at, int64_t key_at) __attribute__((always_inline)) {
                Vec queries[G];
                for (int g = 0; g < G; g++) queries[g] = load(q + g * q_size + at);
                for (int i = 0; i < KEYS; i++) {
                    Vec key = load(keys + places[i] + key_at);
                    for (int g = 0; g < G; g++) parts[g * KEYS + i] += queries[g] * key;
                }
            };
            int64_t j = 0;
            for (; j + LANES <= size; j += LANES) add(j, j);
            if (j < size) add(j, size - LANES);  // see `prepare`
            Vec all = sums([&](int i) __attribute__((always_inline)) { return parts[i]; });
            float row[LANES];
            store(row, all);
            for (int g = 0; g < G; g++) memcpy(scores + g * stride, row + g * KEYS, KEYS * 4);
        }
    }

    // Scores of one head become weights, but for a division by their sum, which is returned.
    float weigh(float *scores, int64_t length, int64_t head) const {
        if (softcap)
            for (int64_t i = 0; i < length; i += LANES)
                store(scores + i, softcap * tanh(load(scores + i) / softcap));
        if (slopes) {
            Vec distance;  // from the key to the query
            for (int lane = 0; lane < LANES; lane++) distance[lane] = length - 1 - lane;
            for (int64_t i = 0; i < length; i += LANES, distance -= (float)LANES)
                store(scores + i, load(scores + i) - slopes[head] * distance);
        }
        return softmax(scores, length, sinks ? sinks + head : nullptr);
    }

    // `sink`: one more score, of no value. May be null.
    static float softmax(float *scores, int64_t length, const float *sink) {
        int64_t stop = padded(length);
        for (int64_t i = length; i < stop; i++) scores[i] = -INFINITY;
        Vec most = load(scores), total = {};
        for (int64_t i = LANES; i < stop; i += LANES) {
            Vec v = load(scores + i);
            most = v > most ? v : most;
        }
        float highest = max(most);
        if (sink) highest = std::max(highest, *sink);
        for (int64_t i = 0; i < stop; i += LANES) {
            Vec v = exp(load(scores + i) - highest);
            store(scores + i, v);
            total += v;  // exp(-inf) is 1e-38 here, which no total notices
        }
        return sum(total) + (sink ? std::exp(*sink - highest) : 0);
    }

    // Sums of all values, weighted by each head's own weights. Where more heads share values than
    // registers hold sums for, all of them read a stretch of tokens while it is near.
    void mix(const float *weights, int64_t stride, const int64_t *places, int64_t length,
             float *o) const {
        int64_t whole = value_size / LANES * LANES;
        for (int64_t head = begin; head < end;) {
            int64_t shared = head / group, count = std::min((shared + 1) * group, end) - head;
            const float *values = kv + part_stride + shared * size;
            int64_t step = count > VALUE_SHARERS ? STRETCH : length;
            for (int64_t at = 0; at < length; at += step) {
                Span span{weights + at, stride, places + at, std::min(step, length - at), at > 0};
                int64_t j = 0;
                for (; j + 2 * LANES <= value_size; j += 2 * LANES)
                    mix_heads<2>(span, values + j, count, o + j);
                if (j < whole) mix_heads<1>(span, values + j, count, o + j);
            }
            Span all{weights, stride, places, length, false};
            int64_t last = value_size - LANES;  // the rest, some of the others once more
            if (whole < value_size && last > 0) mix_heads<1>(all, values + last, count, o + last);
            else if (whole < value_size) mix_numbers(all, values, count, o);
            head += count, weights += count * stride, o += count * value_size;
        }
    }

    // Some tokens, and their weights, `stride` from one head's to the next's. `more`: the sums over
    // the tokens before them are there already.
    struct Span {
        const float *weights;
        int64_t stride;
        const int64_t *places;
        int64_t length;
        bool more;
    };

    // N vectors of the values for `count` heads.
    template <int N>
    INLINE void mix_heads(Span span, const float *values, int64_t count, float *o) const {
        auto take = [&](auto heads) __attribute__((always_inline)) {
            constexpr int G = decltype(heads)::value;
            mix_vectors<G, N>(span, values, o, value_size);
            count -= G, span.weights += G * span.stride, o += G * value_size;
        };
        while (count >= VALUE_SHARERS) take(std::integral_constant<int, VALUE_SHARERS>());
        if (VALUE_SHARERS > 4 && count >= 4) take(std::integral_constant<int, 4>());
        if (count >= 2) take(std::integral_constant<int, 2>());
        if (count) take(std::integral_constant<int, 1>());
    }

    // A function of its own: inlined, its loop would lack registers.
    template <int G, int N>
    static NOINLINE void mix_vectors(Span span, const float *values, float *o, int64_t o_stride) {
        Vec totals[G][N] = {};
        if (span.more)
            for (int g = 0; g < G; g++)
                for (int n = 0; n < N; n++) totals[g][n] = load(o + g * o_stride + n * LANES);
        const float *weights[G];
        for (int g = 0; g < G; g++) weights[g] = span.weights + g * span.stride;
        for (int64_t i = 0; i < span.length; i++) {
            Vec value[N];  // first of all: GCC would load them anew for every g
            for (int n = 0; n < N; n++) value[n] = load(values + span.places[i] + n * LANES);
            for (int g = 0; g < G; g++)
                for (int n = 0; n < N; n++) totals[g][n] += value[n] * weights[g][i];
        }
        for (int g = 0; g < G; g++)
            for (int n = 0; n < N; n++) store(o + g * o_stride + n * LANES, totals[g][n]);
    }

    // Values of less than one vector.
    void mix_numbers(const Span &span, const float *values, int64_t count, float *o) const {
        for (int64_t g = 0; g < count; g++)
            for (int64_t j = 0; j < value_size; j++) {
                float total = 0;
                for (int64_t i = 0; i < span.length; i++)
                    total += span.weights[g * span.stride + i] * values[span.places[i] + j];
                o[g * value_size + j] = total;
            }
    }
};

struct Task {
    int64_t row, first, count, begin, end;
};

// Some queries of a row each; of much work, some heads only where there are fewer such than threads.
static std::vector<Task> divide(const Arguments &it, int64_t rows, int threads, double flops) {
    std::vector<Task> tasks, parts;
    for (int64_t row = 0; row < rows; row++) {
        int64_t queries = it.query_start_loc[row + 1] - it.query_start_loc[row];
        for (int64_t first = 0; first < queries; first += QUERIES)
            tasks.push_back({row, first, std::min(QUERIES, queries - first), 0, it.heads});
    }
    int64_t count = tasks.size();
    if (!count || count >= threads || flops < WORTH_A_THREAD) return tasks;
    int64_t unit = std::min<int64_t>(it.heads / it.kv_heads, KEY_SHARERS);
    int64_t wanted = (threads + count - 1) / count, step = (it.heads + wanted - 1) / wanted;
    step = (step + unit - 1) / unit * unit;
    for (const Task &task : tasks)
        for (int64_t at = 0; at < it.heads; at += step)
            parts.push_back({task.row, task.first, task.count, at, std::min(at + step, it.heads)});
    return parts;
}

static double flops(const Arguments &it, int64_t rows) {
    double pairs = 0;
    for (int64_t row = 0; row < rows; row++) {
        int64_t seen = it.seq_lens[row];
        if (it.window) seen = std::min(seen, it.window);
        if (it.chunk) seen = std::min(seen, it.chunk);
        pairs += (double)(it.query_start_loc[row + 1] - it.query_start_loc[row]) * seen;
    }
    return pairs * it.heads * (2 * (it.size + it.value_size) + 40);
}

// q: [tokens, heads, size], tokens `q_stride` floats apart. kv: blocks `block_stride` floats apart,
// keys [block_size, kv_heads, size], values `part_stride` behind them, of which the first
// `value_size` numbers of each `size` are read; part_stride 0: values are in their keys.
// block_tables: [rows, ...]; seq_lens: [rows]; query_start_loc: [rows + 1]. window, chunk, softcap:
// 0 for none. slopes, sinks: [heads], null for none. out: [tokens, heads, value_size].
extern "C" void paged_attention(const float *q, int64_t q_stride, const float *kv,
                                int64_t block_stride, int64_t part_stride,
                                const int64_t *block_tables, int64_t table_stride,
                                const int64_t *seq_lens, const int64_t *query_start_loc,
                                int64_t rows, float *out, int64_t heads, int64_t kv_heads,
                                int64_t size, int64_t value_size, int64_t block_size,
                                int64_t window, int64_t chunk, float scale, float softcap,
                                const float *slopes, const float *sinks, int threads) {
    Arguments it{q, kv, slopes, sinks, out, block_tables, seq_lens, query_start_loc, q_stride,
                 table_stride, block_stride, part_stride, heads, kv_heads, size, value_size,
                 block_size, window, chunk, scale, softcap};
    double work = flops(it, rows);
    std::vector<Task> tasks = divide(it, rows, threads, work);
    auto run = [&](auto size) {
        parallel(tasks.size(), threads, work, [&](int64_t i) {
            const Task &task = tasks[i];
            PagedAttention<decltype(size)::value>(it, task.begin, task.end).queries(
                task.row, task.first, task.count);
        });
    };
    switch (size) {
    case 32: return run(std::integral_constant<int, 32>());
    case 64: return run(std::integral_constant<int, 64>());
    case 128: return run(std::integral_constant<int, 128>());
    default: return run(std::integral_constant<int, 0>());
    }
}
