// All accesses to global and shared memory, so that the emulator can check and count them.
#pragma once

#include <type_traits>

#include "cuda/platform.cuh"

namespace kddp {

#if defined(KDDP_EMULATOR)
#define KDDP_SITE , emulator::Site site = emulator::site()
#define KDDP_REPORT_GLOBAL(address, bytes, is_store) emulator::global_access(address, bytes, is_store, site)
#define KDDP_REPORT_SHARED(address, bytes, is_store) emulator::shared_access(address, bytes, is_store, site)
#define KDDP_LOAD_READ_ONLY(address) *(address)
#define KDDP_LOAD_UNCACHED(address) *(address)
#else
#define KDDP_SITE
#define KDDP_REPORT_GLOBAL(address, bytes, is_store)
#define KDDP_REPORT_SHARED(address, bytes, is_store)
#define KDDP_LOAD_READ_ONLY(address) __ldg(address)
#define KDDP_LOAD_UNCACHED(address) __ldcg(address)
#endif

// Words of 4 bytes in registers. The first one may hold fewer bytes.
template <int count>
struct Words {
    unsigned words[count];
};

// The type that moves 1, 2, 4, 8 or 16 bytes in one instruction.
template <int bytes>
using Access = std::conditional_t<
    bytes == 16, uint4,
    std::conditional_t<
        bytes == 8, uint2,
        std::conditional_t<bytes == 4, unsigned, std::conditional_t<bytes == 2, unsigned short, unsigned char>>>>;

// How an input is loaded: in the usual way if the thread overwrites it later, or through the cache of what no thread of
// the launch writes.
enum class Input { overwritten, read_only };

template <int bytes, Input input = Input::read_only>
KDDP_DEVICE Words<(bytes + 3) / 4> load_input(const void* from KDDP_SITE) {
    KDDP_REPORT_GLOBAL(from, bytes, false);
    const auto* const typed = static_cast<const Access<bytes>*>(from);
    const auto value = input == Input::read_only ? KDDP_LOAD_READ_ONLY(typed) : *typed;
    Words<(bytes + 3) / 4> words{};
    memcpy(&words, &value, bytes);
    return words;
}

template <int bytes>
KDDP_DEVICE void store_words(void* to, const Words<(bytes + 3) / 4>& words KDDP_SITE) {
    KDDP_REPORT_GLOBAL(to, bytes, true);
    Access<bytes> value;
    memcpy(&value, &words, bytes);
    *static_cast<Access<bytes>*>(to) = value;
}

// Loads a number of 4 or 8 bytes that no thread of the launch writes.
template <class V>
KDDP_DEVICE V load_global(const V* from KDDP_SITE) {
    KDDP_REPORT_GLOBAL(from, sizeof(V), false);
    return KDDP_LOAD_READ_ONLY(from);
}

template <class V>
KDDP_DEVICE void store_global(V* to, V value KDDP_SITE) {
    KDDP_REPORT_GLOBAL(to, sizeof(V), true);
    *to = value;
}

// Loads what another block of the launch has written: bypasses the first-level cache.
template <class V>
KDDP_DEVICE V load_workspace(const V* from KDDP_SITE) {
    KDDP_REPORT_GLOBAL(from, sizeof(V), false);
    return KDDP_LOAD_UNCACHED(from);
}

template <class T>
struct SharedArray {
    T* data;
    KDDP_DEVICE T load(int i KDDP_SITE) const {
        KDDP_REPORT_SHARED(data + i, sizeof(T), false);
        return data[i];
    }
    KDDP_DEVICE void store(int i, T value KDDP_SITE) const {
        KDDP_REPORT_SHARED(data + i, sizeof(T), true);
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
#define KDDP_SHARED(T, name, count)    \
    __shared__ T name##_memory[count]; \
    const ::kddp::SharedArray<T> name { name##_memory }
#define KDDP_DYNAMIC_SHARED(T, name)                   \
    extern __shared__ __align__(16) T name##_memory[]; \
    const ::kddp::SharedArray<T> name { name##_memory }
#endif

}  // namespace kddp
