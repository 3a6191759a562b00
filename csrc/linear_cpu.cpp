// y = x W^T (+ bias) (+ residual), x float32, W float32 or bfloat16, sums in float32.
//
// W [n, k] is packed once into panels of PANEL = 2 * LANES outputs, k-major, so that a panel is read
// as one stream, whatever the number of rows, and no sum is ever taken across a vector:
//
//     panel 0: k = 0 │ out 0 … PANEL-1 │ k = 1 │ out 0 … PANEL-1 │ …      panel 1: …
//
// In bfloat16 the 32-bit word i of a k holds output i in its low half, i + LANES in its high half:
// a shift and a mask make two vectors of float32. Outputs beyond n are zero.
#include "cpu.h"

constexpr int PANEL = 2 * LANES;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;  // rows of x to a pass: 16 sums, which both have registers for
#else
constexpr int ROWS = 4;
#endif

struct Float32 {
    typedef float Word;
    static constexpr int WORDS = PANEL;  // of one k
    static INLINE void load2(const Word *from, Vec &low, Vec &high) {
        low = load(from), high = load(from + LANES);
    }
};

struct BFloat16 {
    typedef uint32_t Word;
    static constexpr int WORDS = LANES;
    static INLINE void load2(const Word *from, Vec &low, Vec &high) {
        WordVec both;
        memcpy(&both, from, sizeof both);
        low = (Vec)(both << 16), high = (Vec)(both & 0xffff0000u);
    }
};

struct Linear {
    const float *x, *bias, *residual;
    float *y;
    int64_t k, n, x_stride, residual_stride;

    // Rows r … r + M - 1 of one panel. A few rows would leave the multipliers waiting for one
    // another's sums; they take several k at a time into sums of their own.
    template <class W, int M> INLINE void rows(const typename W::Word *panel, int64_t r, int64_t at) {
        constexpr int SPLIT = M == 1 ? 4 : M < 4 ? 2 : 1;
        Vec sums[SPLIT][M][2] = {}, low, high;
        const float *from = x + r * x_stride;
        int64_t i = 0;
        for (; i + SPLIT <= k; i += SPLIT)
            for (int s = 0; s < SPLIT; s++) {
                W::load2(panel + (i + s) * W::WORDS, low, high);
                for (int m = 0; m < M; m++) {
                    sums[s][m][0] += low * from[m * x_stride + i + s];
                    sums[s][m][1] += high * from[m * x_stride + i + s];
                }
            }
        for (; i < k; i++) {
            W::load2(panel + i * W::WORDS, low, high);
            for (int m = 0; m < M; m++) {
                sums[0][m][0] += low * from[m * x_stride + i];
                sums[0][m][1] += high * from[m * x_stride + i];
            }
        }
        for (int m = 0; m < M; m++) {
            for (int s = 1; s < SPLIT; s++)
                for (int h = 0; h < 2; h++) sums[0][m][h] += sums[s][m][h];
            finish(sums[0][m], r + m, at);
        }
    }

    INLINE void finish(const Vec *sums, int64_t r, int64_t at) {
        float *to = y + r * n + at;
        const float *more = residual ? residual + r * residual_stride + at : nullptr;
        if (at + PANEL <= n) {
            for (int h = 0; h < 2; h++) {
                Vec v = sums[h];
                if (bias) v += load(bias + at + h * LANES);
                if (more) v += load(more + h * LANES);
                store(to + h * LANES, v);
            }
            return;
        }
        for (int i = 0; i < n - at; i++)
            to[i] = sums[i / LANES][i % LANES] + (bias ? bias[at + i] : 0) + (more ? more[i] : 0);
    }

    template <class W> void panel(const typename W::Word *panel, int64_t count, int64_t at) {
        int64_t r = 0;
        for (; r + ROWS <= count; r += ROWS) rows<W, ROWS>(panel, r, at);
        switch (count - r) {
        case 7: return rows<W, 7>(panel, r, at);
        case 6: return rows<W, 6>(panel, r, at);
        case 5: return rows<W, 5>(panel, r, at);
        case 4: return rows<W, 4>(panel, r, at);
        case 3: return rows<W, 3>(panel, r, at);
        case 2: return rows<W, 2>(panel, r, at);
        case 1: return rows<W, 1>(panel, r, at);
        }
    }

    template <class W> void run(const void *packed, int64_t count, int threads) {
        auto words = (const typename W::Word *)packed;
        parallel((n + PANEL - 1) / PANEL, threads, 2.0 * count * n * k, [&](int64_t i) {
            panel<W>(words + i * k * W::WORDS, count, i * PANEL);
        });
    }
};

extern "C" int64_t linear_packed_bytes(int64_t n, int64_t k, int bfloat16) {
    return (n + PANEL - 1) / PANEL * PANEL * k * (bfloat16 ? 2 : 4);
}

// weight: [n, k] float32, contiguous; for bfloat16 its low halves must be zero.
extern "C" void linear_pack(const float *weight, int64_t n, int64_t k, int bfloat16, void *packed) {
    int64_t panels = (n + PANEL - 1) / PANEL;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < k; i++)
            for (int lane = 0; lane < PANEL; lane++) {
                int64_t out = p * PANEL + lane, word = p * k + i;
                float value = out < n ? weight[out * k + i] : 0;
                if (!bfloat16) {
                    ((float *)packed)[word * PANEL + lane] = value;
                    continue;
                }
                uint32_t bits;
                memcpy(&bits, &value, 4);
                uint16_t *half = (uint16_t *)packed + (word * LANES + lane % LANES) * 2;
                half[lane / LANES] = bits >> 16;  // little-endian: the low half comes first
            }
}

// x: [count, k], residual: [count, n], rows `*_stride` floats apart; y: [count, n], contiguous, may
// be `residual`. bias: [n]. bias and residual may be null.
extern "C" void linear(const float *x, int64_t x_stride, const void *packed, int bfloat16,
                       const float *bias, const float *residual, int64_t residual_stride, float *y,
                       int64_t count, int64_t n, int64_t k, int threads) {
    Linear it{x, bias, residual, y, k, n, x_stride, residual_stride};
    bfloat16 ? it.run<BFloat16>(packed, count, threads) : it.run<Float32>(packed, count, threads);
}
