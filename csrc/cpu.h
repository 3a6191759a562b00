// What the CPU kernels share: vectors, exp, and a loop over threads that never spins.
//
// Vectors are those of GCC and Clang (`vector_size`), which both compilers lower to whatever the
// machine has: AVX-512, pairs of AVX2 or NEON registers, or plain scalars. No intrinsics.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * LANES)));

#define INLINE inline __attribute__((always_inline))

static INLINE Vec load(const float *from) {
    Vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static INLINE void store(float *to, Vec v) { memcpy(to, &v, sizeof v); }

static INLINE float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

static INLINE float max(Vec v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// e^x to 2 ulp: x = n ln 2 + r, a polynomial in r (Cephes), n added to the exponent. Below -87 it
// stays at the smallest normal number, above 88 at the largest power; NaN stays NaN.
static INLINE Vec exp(Vec x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    x = x < -87.0f ? Vec{} - 87.0f : x;
    x = x > 88.0f ? Vec{} + 88.0f : x;
    Vec shifted = x * 1.44269504088896341f + round, n = shifted - round;
    Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Vec)(((IntVec)shifted << 23) + (127 << 23));
}

// tanh to 2 ulp: a polynomial where |x| is small (Cephes), else 1 - 2 / (e^2|x| + 1) with x's sign.
static INLINE Vec tanh(Vec x) {
    Vec z = x * x, size = x < 0.0f ? -x : x;
    Vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    Vec large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    large = x < 0.0f ? -large : large;
    return size < 0.625f ? p * z * x + x : large;
}

// Run task(0) ... task(tasks - 1), on up to `threads` threads. The caller takes tasks like the
// others and waits only for those that another thread has begun, so a core that is busy elsewhere
// costs nothing; idle threads sleep. One caller at a time.
class Threads {
    struct Job {
        const std::function<void(int64_t)> *task;
        int64_t tasks;
        std::atomic<int64_t> next{0}, done{0};
    };
    std::mutex mutex;
    std::condition_variable work, finished;
    std::shared_ptr<Job> job;
    uint64_t jobs = 0;
    int helpers = 0;

    void take(Job &job) {
        int64_t mine = 0;
        for (int64_t i; (i = job.next++) < job.tasks; mine++) (*job.task)(i);
        if (mine && (job.done += mine) == job.tasks) {
            std::lock_guard<std::mutex> lock(mutex);
            finished.notify_all();
        }
    }

    void help() {
        for (uint64_t seen = 0;;) {
            std::unique_lock<std::mutex> lock(mutex);
            work.wait(lock, [&] { return jobs != seen; });
            seen = jobs;
            std::shared_ptr<Job> current = job;
            lock.unlock();
            if (current) take(*current);
        }
    }

public:
    void run(int64_t tasks, int threads, const std::function<void(int64_t)> &task) {
        auto mine = std::make_shared<Job>();
        mine->task = &task, mine->tasks = tasks;
        {
            std::lock_guard<std::mutex> lock(mutex);
            for (; helpers < threads - 1; helpers++) std::thread(&Threads::help, this).detach();
            job = mine, jobs++;
        }
        work.notify_all();
        take(*mine);
        std::unique_lock<std::mutex> lock(mutex);
        finished.wait(lock, [&] { return mine->done == tasks; });
        job = nullptr;
    }
};

constexpr double WORTH_A_THREAD = 2e7;  // flops; about 0.3 ms of one core

// `flops`: the work of all tasks together. Less than WORTH_A_THREAD is done by the caller alone.
void parallel(int64_t tasks, int threads, double flops, const std::function<void(int64_t)> &task);
