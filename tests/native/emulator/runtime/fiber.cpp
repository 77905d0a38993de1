// Stacks and the switch from one to another.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ADDRESS_SANITIZER 1
#endif
#endif

#if defined(EMULATOR_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

namespace {
#if defined(EMULATOR_ADDRESS_SANITIZER)
constexpr size_t stack_size = 256 << 10;  // the sanitizer's zones around variables enlarge frames
Fiber* arriving_from = nullptr;
#else
constexpr size_t stack_size = 64 << 10;
#endif
constexpr size_t stacks_per_slab = 64, max_guarded = 8192;  // a process may have 65530 mappings
}  // namespace

size_t Stacks::bytes() { return stack_size; }

void Stacks::allocate() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), step = stack_size + page;
    void* slab = mmap(nullptr, step * stacks_per_slab, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    slabs_.push_back(slab);
    for (size_t i = 0; i < stacks_per_slab; ++i) {
        char* guard = static_cast<char*>(slab) + i * step;
        if (guarded_ < max_guarded && mprotect(guard, page, PROT_NONE) == 0) ++guarded_;
        free_.push_back(guard + page);
    }
}

char* Stacks::take() {
    if (free_.empty()) allocate();
    char* stack = free_.back();
    free_.pop_back();
    return stack;
}

Stacks::~Stacks() {
    const size_t step = stack_size + static_cast<size_t>(sysconf(_SC_PAGESIZE));
    for (void* slab : slabs_) munmap(slab, step * stacks_per_slab);
}

// Clears AddressSanitizer's zones that the previous thread left on the stack: those of its last frames if it ended.
static void clean(Fiber& fiber) {
#if defined(EMULATOR_ADDRESS_SANITIZER)
    constexpr size_t last_frames = 4 << 10;
    const size_t used = fiber.ended ? last_frames : fiber.stack_bytes;
    __asan_unpoison_memory_region(fiber.stack + fiber.stack_bytes - used, used);
    fiber.sanitizer = nullptr;
    fiber.ended = false;
#else
    (void)fiber;
#endif
}

// Saves the registers that a call preserves, exchanges the stacks and restores them. swapcontext() would also make a
// system call for the signal mask.
extern "C" void kddp_emulator_exchange_stacks(void** from, void* to);
asm(R"(
.text
.p2align 4
.local kddp_emulator_exchange_stacks
.type kddp_emulator_exchange_stacks, @function
kddp_emulator_exchange_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size kddp_emulator_exchange_stacks, . - kddp_emulator_exchange_stacks
)");

void prepare(Fiber& fiber, void (*entry)()) {
    clean(fiber);
    // Six registers, the address for `ret`, and a return address of 0, at which stack traces end.
    auto** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes);
    for (int i = 1; i <= 8; ++i) top[-i] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    fiber.stack_pointer = static_cast<void*>(top - 8);
}

void switch_fibers(Fiber& from, Fiber& to, bool is_last) {
#if defined(EMULATOR_ADDRESS_SANITIZER)
    arriving_from = &from;
    from.ended = is_last;
    __sanitizer_start_switch_fiber(is_last ? nullptr : &from.sanitizer, to.stack, to.stack_bytes);
    kddp_emulator_exchange_stacks(&from.stack_pointer, to.stack_pointer);
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(from.sanitizer, &stack, &bytes);
#else
    (void)is_last;
    kddp_emulator_exchange_stacks(&from.stack_pointer, to.stack_pointer);
#endif
}

void begin_fiber() {
#if defined(EMULATOR_ADDRESS_SANITIZER)
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
    // The first switch away from the host's own stack tells where it is.
    if (!arriving_from->stack) {
        arriving_from->stack = static_cast<char*>(const_cast<void*>(stack));
        arriving_from->stack_bytes = bytes;
    }
#endif
}

}  // namespace emulator
