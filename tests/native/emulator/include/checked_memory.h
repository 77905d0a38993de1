// Memory that a kernel reads and writes through functions, so that the emulator sees it. Under nvcc they are plain
// accesses. For kernels that have no such functions of their own.
#pragma once

#if defined(KDDP_EMULATOR)

#include "cuda_runtime.h"

namespace checked {

template <class T>
T load(const T* address, emulator::Site site = emulator::site()) {
    emulator::global_access(address, sizeof(T), false, site);
    return *address;
}
template <class T>
void store(T* address, emulator::same<T> value, emulator::Site site = emulator::site()) {
    emulator::global_access(address, sizeof(T), true, site);
    *address = value;
}

template <class T>
struct Shared {
    T* data;
    T load(int i, emulator::Site site = emulator::site()) const {
        emulator::shared_access(data + i, sizeof(T), false, site);
        return data[i];
    }
    void store(int i, T value, emulator::Site site = emulator::site()) const {
        emulator::shared_access(data + i, sizeof(T), true, site);
        data[i] = value;
    }
};

}  // namespace checked

#define CHECKED_SHARED(T, name, count)                                                              \
    const checked::Shared<T> name {                                                                 \
        static_cast<T*>(emulator::shared_memory(emulator::site(), sizeof(T) * (count), alignof(T))) \
    }
#define CHECKED_DYNAMIC_SHARED(T, name) \
    const checked::Shared<T> name { static_cast<T*>(emulator::dynamic_shared_memory()) }
#define CHECKED_LAUNCH EMULATOR_LAUNCH

#else

namespace checked {

template <class T>
__device__ __forceinline__ T load(const T* address) {
    return *address;
}
template <class T, class V>
__device__ __forceinline__ void store(T* address, V value) {
    *address = static_cast<T>(value);
}
template <class T>
struct Shared {
    T* data;
    __device__ __forceinline__ T load(int i) const { return data[i]; }
    __device__ __forceinline__ void store(int i, T value) const { data[i] = value; }
};

}  // namespace checked

#define CHECKED_SHARED(T, name, count)  \
    __shared__ T name##_storage[count]; \
    const checked::Shared<T> name { name##_storage }
#define CHECKED_DYNAMIC_SHARED(T, name)                             \
    extern __shared__ __align__(16) unsigned char name##_storage[]; \
    const checked::Shared<T> name { reinterpret_cast<T*>(name##_storage) }
#define CHECKED_LAUNCH(kernel, grid, block, bytes, stream, ...) kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)

#endif
