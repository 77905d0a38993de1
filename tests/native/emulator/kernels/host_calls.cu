// Launches as a host makes them: with a device, a stream, and limits.
#include "checked_memory.h"

namespace {

__global__ void nothing(int) {}
__global__ void fill(int* out, int value) { checked::store(out + threadIdx.x, value); }

}  // namespace

extern "C" {
int launch_nothing(unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block, size_t shared,
                   cudaStream_t stream) {
    EMULATOR_LAUNCH(nothing, dim3(grid_x, grid_y, grid_z), block, shared, stream, 0);
    return cudaGetLastError();
}
int launch_nothing_together(unsigned grid, unsigned block) {
    EMULATOR_LAUNCH_COOPERATIVE(nothing, grid, block, 0, nullptr, 0);
    return cudaGetLastError();
}
int raise_shared_limit(int bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
int launch_packed(int* out, int value, int together) {
    void* arguments[] = {static_cast<void*>(&out), &value};
    return together ? cudaLaunchCooperativeKernel(fill, 1, 32, arguments, 0, nullptr)
                    : cudaLaunchKernel(fill, 1, 32, arguments, 0, nullptr);
}
int occupancy(int block, size_t shared) {
    int blocks = -1;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nothing, block, shared);
    return blocks;
}
// A launch on its device and stream, and the caller's device as it was.
int launch_guarded(int device, cudaStream_t stream) {
    int before;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    EMULATOR_LAUNCH(nothing, 1, 32, 0, stream, 0);
    const cudaError_t error = cudaGetLastError();
    cudaSetDevice(before);
    return error;
}
cudaStream_t make_stream() {
    cudaStream_t stream;
    cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    return stream;
}
// What a step of training must not do.
void allocate_and_synchronize() {
    void* memory;
    cudaMalloc(&memory, 16);
    cudaMemset(memory, 1, 16);
    cudaDeviceSynchronize();
    cudaFree(memory);
}
}
