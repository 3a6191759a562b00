// A step's keys and values go to their slots in the paged cache.
#include <cstdint>
#include <cstring>

// k, v: [tokens, width], tokens `*_stride` floats apart. kv: blocks `block_stride` floats apart, keys
// [block_size, width], values `part_stride` behind them. slots: [tokens], block * block_size + offset.
// v may be null: only keys are kept.
extern "C" void kv_write(const float *k, int64_t k_stride, const float *v, int64_t v_stride,
                         float *kv, int64_t block_stride, int64_t part_stride,
                         const int64_t *slots, int64_t tokens, int64_t width, int64_t block_size) {
    for (int64_t t = 0; t < tokens; t++) {
        float *to = kv + slots[t] / block_size * block_stride + slots[t] % block_size * width;
        memcpy(to, k + t * k_stride, width * 4);
        if (v) memcpy(to + part_stride, v + t * v_stride, width * 4);
    }
}
