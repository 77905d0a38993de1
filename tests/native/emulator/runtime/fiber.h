// Fibers: separate stacks within one thread of the host, for x86-64.
#pragma once

#include <cstddef>
#include <vector>

namespace emulator {

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;  // the lowest byte
    size_t stack_bytes = 0;
    bool ended = false;
    void* sanitizer = nullptr;  // AddressSanitizer's state
};

// Stacks that are reused by the next launch. A page that must not be accessed lies below each of the first few
// thousand.
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

// Makes `fiber`, which has a stack, start with entry() when it is first switched to. entry() must not return.
void prepare(Fiber& fiber, void (*entry)());
// Continues `to`, and returns when something switches back. `is_last`: `from` will not be continued.
void switch_fibers(Fiber& from, Fiber& to, bool is_last);
// The first call on a new stack.
void begin_fiber();

}  // namespace emulator
