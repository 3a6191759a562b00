// The small float32 ops between the matrices, a row at a time.
#include "cpu.h"

#include <cmath>

// y = x / sqrt(mean(x²) + eps) * weight. x, y: [count, size], contiguous.
extern "C" void rms_norm(const float *x, const float *weight, float eps, float *y, int64_t count,
                         int64_t size) {
    for (int64_t r = 0; r < count; r++, x += size, y += size) {
        Vec squares[4] = {};
        float rest = 0;
        int64_t i = 0;
        for (; i + 4 * LANES <= size; i += 4 * LANES)
            for (int s = 0; s < 4; s++) {
                Vec v = load(x + i + s * LANES);
                squares[s] += v * v;
            }
        for (; i < size; i++) rest += x[i] * x[i];
        float total = sum(squares[0] + squares[1] + squares[2] + squares[3]) + rest;
        float scale = 1.0f / std::sqrt(total / size + eps);
        for (i = 0; i < size; i++) y[i] = x[i] * scale * weight[i];
    }
}

static INLINE Vec silu(Vec x) { return x / (exp(-x) + 1.0f); }

// y = silu(gate) * up. x: [count, 2 * size], gate then up; y: [count, size]; both contiguous.
extern "C" void silu_and_mul(const float *x, float *y, int64_t count, int64_t size) {
    for (int64_t r = 0; r < count; r++, x += 2 * size, y += size) {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(y + i, silu(load(x + i)) * load(x + size + i));
        if (i < size) {
            Vec gate = {};
            memcpy(&gate, x + i, (size - i) * 4);
            gate = silu(gate);
            for (int lane = 0; i < size; lane++, i++) y[i] = gate[lane] * x[size + i];
        }
    }
}

// (a, b) → (a cos - b sin, b cos + a sin) over the halves of the first `rotated` numbers of each
// head; the others are copied. x: tokens `stride` floats apart, heads contiguous; cos, sin:
// [count, rotated], the first half of sin negated; y: [count, heads, size], contiguous.
extern "C" void rotary(const float *x, int64_t stride, const float *cos, const float *sin, float *y,
                       int64_t count, int64_t heads, int64_t size, int64_t rotated) {
    int64_t half = rotated / 2;
    for (int64_t t = 0; t < count; t++, cos += rotated, sin += rotated)
        for (int64_t h = 0; h < heads; h++, y += size) {
            const float *from = x + t * stride + h * size;
            for (int64_t i = 0; i < half; i++) {
                y[i] = from[i] * cos[i] + from[i + half] * sin[i];
                y[i + half] = from[i + half] * cos[i + half] + from[i] * sin[i + half];
            }
            for (int64_t i = rotated; i < size; i++) y[i] = from[i];
        }
}
