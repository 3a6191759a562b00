// One set of threads for all kernels; see cpu.h.
#include "cpu.h"

void parallel(int64_t tasks, int threads, double flops, const std::function<void(int64_t)> &task) {
    static Threads *pool = new Threads;  // never freed: its threads sleep in it until the end
    if (threads > 1 && tasks > 1 && flops >= WORTH_A_THREAD) return pool->run(tasks, threads, task);
    for (int64_t i = 0; i < tasks; i++) task(i);
}
