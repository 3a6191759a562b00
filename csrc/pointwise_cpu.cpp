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

struct Silu {
    INLINE Vec operator()(Vec x) const { return x / (exp(-x) + 1.0f); }
};

// By its tanh approximation: 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.0447 x³)
struct GeluTanh {
    INLINE Vec operator()(Vec x) const {
        return x / (exp(x * (x * x * -0.0713548162726f - 1.59576912161f)) + 1.0f);
    }
};

template <class Act>
static INLINE void gated(Act act, const float *x, float *y, int64_t count, int64_t size) {
    for (int64_t r = 0; r < count; r++, x += 2 * size, y += size) {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(y + i, act(load(x + i)) * load(x + size + i));
        if (i < size) {
            Vec gate = {};
            memcpy(&gate, x + i, (size - i) * 4);
            gate = act(gate);
            for (int lane = 0; i < size; lane++, i++) y[i] = gate[lane] * x[size + i];
        }
    }
}

// y = silu(gate) * up. x: [count, 2 * size], gate then up; y: [count, size]; both contiguous.
extern "C" void silu_and_mul(const float *x, float *y, int64_t count, int64_t size) {
    gated(Silu(), x, y, count, size);
}

// The same with gelu_tanh.
extern "C" void gelu_tanh_and_mul(const float *x, float *y, int64_t count, int64_t size) {
    gated(GeluTanh(), x, y, count, size);
}

// x, y: [count].
extern "C" void gelu_tanh(const float *x, float *y, int64_t count) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(y + i, GeluTanh()(load(x + i)));
    if (i < count) {
        Vec rest = {};
        memcpy(&rest, x + i, (count - i) * 4);
        rest = GeluTanh()(rest);
        memcpy(y + i, &rest, (count - i) * 4);
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
