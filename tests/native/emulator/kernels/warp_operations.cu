// Each warp operation by itself: a block of threads of which those in `mask` take part.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "checked_memory.h"

namespace {

enum Operation {
    idx,
    up,
    down,
    lane_xor,
    ballot,
    any,
    all,
    add,
    minimum,
    maximum,
    bit_and,
    bit_or,
    bit_xor,
    match_any
};

}  // namespace

__global__ void operate(int operation, unsigned mask, const int* values, const int* parameters, int width,
                        int* results) {
    const int lane = threadIdx.x % 32;
    if (!(mask >> lane & 1)) return;
    const int value = checked::load(values + lane), parameter = checked::load(parameters + lane);
    int result = 0;
    switch (operation) {
        case idx:
            result = __shfl_sync(mask, value, parameter, width);
            break;
        case up:
            result = __shfl_up_sync(mask, value, unsigned(parameter), width);
            break;
        case down:
            result = __shfl_down_sync(mask, value, unsigned(parameter), width);
            break;
        case lane_xor:
            result = __shfl_xor_sync(mask, value, parameter, width);
            break;
        case ballot:
            result = int(__ballot_sync(mask, value & 1));
            break;
        case any:
            result = __any_sync(mask, value & 1);
            break;
        case all:
            result = __all_sync(mask, value & 1);
            break;
        case add:
            result = __reduce_add_sync(mask, value);
            break;
        case minimum:
            result = __reduce_min_sync(mask, value);
            break;
        case maximum:
            result = __reduce_max_sync(mask, value);
            break;
        case bit_and:
            result = int(__reduce_and_sync(mask, unsigned(value)));
            break;
        case bit_or:
            result = int(__reduce_or_sync(mask, unsigned(value)));
            break;
        case bit_xor:
            result = int(__reduce_xor_sync(mask, unsigned(value)));
            break;
        case match_any:
            result = int(__match_any_sync(mask, value & 3));
            break;
        default:
            __trap();
    }
    checked::store(results + lane, result);
}

// Types of all sizes through a shuffle: each lane gets its neighbour's.
__global__ void exchange_types(double* doubles, long long* integers, unsigned short* halves) {
    const int lane = threadIdx.x, other = lane ^ 1;
    checked::store(doubles + lane, __shfl_xor_sync(0xffffffffu, lane + 0.5, 1));
    checked::store(integers + lane, __shfl_sync(0xffffffffu, (1ll << 40) + lane, other));
    const __half half = __shfl_xor_sync(0xffffffffu, __float2half(float(lane)), 1);
    checked::store(halves + lane, __half_as_ushort(half));
}

extern "C" {
const char* run_operate(int operation, unsigned mask, const int* values, const int* parameters, int width, int* results,
                        int threads) {
    return emulator::guarded(
        [&] { CHECKED_LAUNCH(operate, 1, threads, 0, nullptr, operation, mask, values, parameters, width, results); });
}
const char* run_exchange_types(double* doubles, long long* integers, unsigned short* halves) {
    return emulator::guarded([&] { CHECKED_LAUNCH(exchange_types, 1, 32, 0, nullptr, doubles, integers, halves); });
}

// Conversions, outside of kernels.
void to_16_bits(const float* from, uint16_t* to, int count, int brain) {
    for (int i = 0; i < count; ++i)
        to[i] = brain ? __bfloat16_as_ushort(__float2bfloat16_rn(from[i])) : __half_as_ushort(__float2half_rn(from[i]));
}
void from_16_bits(const uint16_t* from, float* to, int count, int brain) {
    for (int i = 0; i < count; ++i)
        to[i] = brain ? __bfloat162float(__ushort_as_bfloat16(from[i])) : __half2float(__ushort_as_half(from[i]));
}
void fused_multiply_add(const uint16_t* a, const uint16_t* b, const uint16_t* c, uint16_t* to, int count, int brain) {
    for (int i = 0; i < count; ++i)
        if (brain)
            to[i] = __bfloat16_as_ushort(
                __hfma(__ushort_as_bfloat16(a[i]), __ushort_as_bfloat16(b[i]), __ushort_as_bfloat16(c[i])));
        else
            to[i] = __half_as_ushort(__hfma(__ushort_as_half(a[i]), __ushort_as_half(b[i]), __ushort_as_half(c[i])));
}
}
