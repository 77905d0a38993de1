// Fibers: stacks of their own within one thread of the host, switched by hand.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;  // the lowest byte
    size_t stack_bytes = 0;
    bool ended = false;
    void* sanitizer = nullptr;  // AddressSanitizer's
#if defined(EMULATOR_USES_UCONTEXT)
    ucontext_t context;
#endif
};

// Stacks, kept for the next launch. Below each of the first few thousand is a page that may not be touched.
class Stacks {
  public:
    Stacks() = default;
    ~Stacks();
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    char* take();
    void give(char* stack) { free_.push_back(stack); }
    static size_t bytes();

  private:
    void allocate();
    std::vector<char*> free_;
    std::vector<void*> slabs_;
    size_t guarded_ = 0;
};

// Makes `fiber`, whose stack is set, begin with entry() when it is first switched to; entry() must not return.
void prepare(Fiber& fiber, void (*entry)());
// Goes on with `to`; returns when something switches back. `is_last`: `from` will not be gone on with.
void switch_fibers(Fiber& from, Fiber& to, bool is_last);
// The first thing on a new stack.
void begin_fiber();

}  // namespace emulator
