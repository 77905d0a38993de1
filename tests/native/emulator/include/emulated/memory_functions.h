// Atomic operations, and loads and stores that name a cache: checked and counted like other accesses.
#pragma once

#include <algorithm>
#include <type_traits>

#include "emulated/warp_functions.h"

namespace emulator {

// Replaces *address by change(*address); gives what was there.
template <class T, class Change>
T atomic(T* address, Site site, Change change) {
    begin_atomic(address, sizeof(T), site);
    const T before = *address, after = change(before);
    *address = after;
    end_atomic(std::memcmp(&before, &after, sizeof(T)) != 0);
    return before;
}

// An argument that takes no part in finding T.
template <class T>
struct Same {
    using type = T;
};
template <class T>
using same = typename Same<T>::type;

}  // namespace emulator

#define EMULATED_ATOMIC(name, expression)                                                                   \
    template <class T>                                                                                      \
    T name(T* address, emulator::same<T> value, EMULATED_SITE) {                                            \
        return emulator::atomic(address, site, [&]([[maybe_unused]] T old) -> T { return T(expression); }); \
    }
// Those of double and float add in an order drawn from the seed.
EMULATED_ATOMIC(atomicAdd, old + value)
EMULATED_ATOMIC(atomicSub, old - value)
EMULATED_ATOMIC(atomicExch, value)
EMULATED_ATOMIC(atomicMin, std::min(old, value))
EMULATED_ATOMIC(atomicMax, std::max(old, value))
EMULATED_ATOMIC(atomicAnd, old& value)
EMULATED_ATOMIC(atomicOr, old | value)
EMULATED_ATOMIC(atomicXor, old ^ value)
#undef EMULATED_ATOMIC

inline unsigned atomicInc(unsigned* address, unsigned last, EMULATED_SITE) {
    return emulator::atomic(address, site, [&](unsigned old) { return old >= last ? 0u : old + 1; });
}
inline unsigned atomicDec(unsigned* address, unsigned last, EMULATED_SITE) {
    return emulator::atomic(address, site, [&](unsigned old) { return old == 0 || old > last ? last : old - 1; });
}
template <class T>
T atomicCAS(T* address, emulator::same<T> expected, emulator::same<T> value, EMULATED_SITE) {
    return emulator::atomic(address, site, [&](T old) { return old == expected ? value : old; });
}

#define EMULATED_LOAD(name)                                       \
    template <class T>                                            \
    T name(const T* address, EMULATED_SITE) {                     \
        emulator::global_access(address, sizeof(T), false, site); \
        return *address;                                          \
    }
EMULATED_LOAD(__ldg)
EMULATED_LOAD(__ldca)
EMULATED_LOAD(__ldcg)
EMULATED_LOAD(__ldcs)
EMULATED_LOAD(__ldlu)
EMULATED_LOAD(__ldcv)
#undef EMULATED_LOAD

#define EMULATED_STORE(name)                                        \
    template <class T>                                              \
    void name(T* address, emulator::same<T> value, EMULATED_SITE) { \
        emulator::global_access(address, sizeof(T), true, site);    \
        *address = value;                                           \
    }
EMULATED_STORE(__stwb)
EMULATED_STORE(__stcg)
EMULATED_STORE(__stcs)
EMULATED_STORE(__stwt)
#undef EMULATED_STORE
