// Run with the sanitizers: reductions, then, where an argument names one, an access that only they can see.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "checked_memory.h"

extern "C" const char* run_sum_of_block(const float* values, float* sums, int rows, int columns, int threads);
extern "C" const char* run_fault(int which, float* out, const float* in, int count);

namespace {

// A plain access, of which the emulator knows nothing.
__global__ void read_beyond(const float* values, float* out, int count) {
    if (int(threadIdx.x) <= count) checked::store(out + threadIdx.x, values[threadIdx.x]);
}

__global__ void use_local_array(float* out, int index) {
    const float local[8] = {};
    __syncthreads();
    checked::store(out + threadIdx.x, local[index]);
}

__global__ void shift(int* out, int by) { checked::store(out + threadIdx.x, 1 << by); }

}  // namespace

int main(int count, char** arguments) {
    std::vector<float> values(20 * 100, 1), sums(20);
    for (int i = 0; i < 3; ++i) {
        emulator::set_seed(uint64_t(i));
        if (const char* error = run_sum_of_block(values.data(), sums.data(), 20, 100, 64)) return std::puts(error), 1;
        // Launches that fail leave stacks as they are.
        std::vector<float> out(4096);
        if (!run_fault(0, out.data(), out.data(), 20) || !run_fault(4, out.data(), out.data(), 20)) return 1;
    }
    std::printf("%g %g\n", sums[0], sums[19]);
    std::fflush(stdout);
    std::vector<float> out(64);
    std::vector<int> integers(32);
    const int size = 16;
    const char* fault = count > 1 ? arguments[1] : "";
    if (!std::strcmp(fault, "heap")) {
        const std::vector<float> few(16);
        EMULATOR_LAUNCH(read_beyond, 1, 32, 0, nullptr, few.data(), out.data(), size);
    }
    if (!std::strcmp(fault, "stack")) EMULATOR_LAUNCH(use_local_array, 1, 32, 0, nullptr, out.data(), size / 2);
    if (!std::strcmp(fault, "shift")) EMULATOR_LAUNCH(shift, 1, 32, 0, nullptr, integers.data(), size * 2);
}
