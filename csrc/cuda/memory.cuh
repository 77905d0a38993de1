// Global and shared memory, read and written through these functions alone, so that the emulator can count and check.
#pragma once

#include "cuda/platform.cuh"

namespace kddp {

#if defined(KDDP_EMULATOR)
#define KDDP_SITE , emulator::Site site = emulator::site()
#define KDDP_REPORT_GLOBAL(address, bytes, is_store) emulator::global_access(address, bytes, is_store, site)
#else
#define KDDP_SITE
#define KDDP_REPORT_GLOBAL(address, bytes, is_store)
#endif

// So many words of 4 bytes, kept in registers; `words[0]` may hold less.
template <int count>
struct Words {
    unsigned words[count];
};

// An input, which no kernel of the launch changes: 1, 2, 4, 8 or 16 bytes.
template <int bytes>
__device__ __forceinline__ Words<(bytes + 3) / 4> load_input(const void* from KDDP_SITE) {
    KDDP_REPORT_GLOBAL(from, bytes, false);
    Words<(bytes + 3) / 4> value{};
#if defined(KDDP_EMULATOR)
    std::memcpy(&value, from, bytes);
#else
    if constexpr (bytes == 16) {
        const uint4 v = __ldg(static_cast<const uint4*>(from));
        value.words[0] = v.x, value.words[1] = v.y, value.words[2] = v.z, value.words[3] = v.w;
    } else if constexpr (bytes == 8) {
        const uint2 v = __ldg(static_cast<const uint2*>(from));
        value.words[0] = v.x, value.words[1] = v.y;
    } else if constexpr (bytes == 4) {
        value.words[0] = __ldg(static_cast<const unsigned*>(from));
    } else if constexpr (bytes == 2) {
        value.words[0] = __ldg(static_cast<const unsigned short*>(from));
    } else {
        value.words[0] = __ldg(static_cast<const unsigned char*>(from));
    }
#endif
    return value;
}

template <int bytes>
__device__ __forceinline__ void store_words(void* to, const Words<(bytes + 3) / 4>& value KDDP_SITE) {
    KDDP_REPORT_GLOBAL(to, bytes, true);
#if defined(KDDP_EMULATOR)
    std::memcpy(to, &value, bytes);
#else
    if constexpr (bytes == 16) {
        *static_cast<uint4*>(to) = make_uint4(value.words[0], value.words[1], value.words[2], value.words[3]);
    } else if constexpr (bytes == 8) {
        *static_cast<uint2*>(to) = make_uint2(value.words[0], value.words[1]);
    } else if constexpr (bytes == 4) {
        *static_cast<unsigned*>(to) = value.words[0];
    } else if constexpr (bytes == 2) {
        *static_cast<unsigned short*>(to) = static_cast<unsigned short>(value.words[0]);
    } else {
        *static_cast<unsigned char*>(to) = static_cast<unsigned char>(value.words[0]);
    }
#endif
}

// A number of 4 or 8 bytes.
template <class V>
__device__ __forceinline__ V load_global(const V* from KDDP_SITE) {
    KDDP_REPORT_GLOBAL(from, sizeof(V), false);
#if defined(KDDP_EMULATOR)
    return *from;
#else
    return __ldg(from);
#endif
}

template <class V>
__device__ __forceinline__ void store_global(V* to, V value KDDP_SITE) {
    KDDP_REPORT_GLOBAL(to, sizeof(V), true);
    *to = value;
}

// What another block of the launch has written: past the first-level cache.
template <class V>
__device__ __forceinline__ V load_workspace(const V* from KDDP_SITE) {
    KDDP_REPORT_GLOBAL(from, sizeof(V), false);
#if defined(KDDP_EMULATOR)
    return *from;
#else
    return __ldcg(from);
#endif
}

template <class T>
struct SharedArray {
    T* data;
    __device__ __forceinline__ T load(int i KDDP_SITE) const {
#if defined(KDDP_EMULATOR)
        emulator::shared_access(data + i, sizeof(T), false, site);
#endif
        return data[i];
    }
    __device__ __forceinline__ void store(int i, T value KDDP_SITE) const {
#if defined(KDDP_EMULATOR)
        emulator::shared_access(data + i, sizeof(T), true, site);
#endif
        data[i] = value;
    }
};

#if defined(KDDP_EMULATOR)
#define KDDP_SHARED(T, name, count)                                                                 \
    const ::kddp::SharedArray<T> name {                                                             \
        static_cast<T*>(emulator::shared_memory(emulator::site(), sizeof(T) * (count), alignof(T))) \
    }
#define KDDP_DYNAMIC_SHARED(T, name) \
    const ::kddp::SharedArray<T> name { static_cast<T*>(emulator::dynamic_shared_memory()) }
#else
#define KDDP_DYNAMIC_SHARED(T, name)                   \
    extern __shared__ __align__(16) T name##_memory[]; \
    const ::kddp::SharedArray<T> name { name##_memory }
#define KDDP_SHARED(T, name, count)    \
    __shared__ T name##_memory[count]; \
    const ::kddp::SharedArray<T> name { name##_memory }
#endif

}  // namespace kddp
