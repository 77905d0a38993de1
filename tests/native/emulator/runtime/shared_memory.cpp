// A block's shared memory: who wrote and read each byte, and whether anything orders them.
#include <algorithm>
#include <functional>

#include "state.h"

namespace emulator {

namespace {

constexpr size_t max_static = 48 << 10, static_capacity = 64 << 10;
constexpr size_t gap = 128;             // between variables, so that overruns are noticed
constexpr unsigned char poison = 0xff;  // a NaN in every type
constexpr int16_t several_warps = -2;

bool is_ordered_touch(const Thread& thread, const Touch& touch) {
    return touch.warp == -1 || touch.time < thread.warp->block->start_time ||
           is_ordered(thread, touch.warp, touch.lanes, touch.time);
}

// Adds this access to `touch`, which stands for several threads if nothing orders them.
void add_touch(const Thread& thread, Touch& touch, int site) {
    const int16_t warp = int16_t(thread.warp->number);
    if (is_ordered_touch(thread, touch))
        touch.warp = warp, touch.lanes = bit(thread.lane);
    else if (touch.warp == warp)
        touch.lanes |= bit(thread.lane);
    else
        touch.warp = several_warps;
    touch.time = now, touch.site = uint16_t(site);
}

[[noreturn]] void fail_race(const Thread& thread, const Touch& touch, const char* does, const char* did, Site site) {
    std::string who = "threads of several warps";
    if (touch.warp >= 0) {
        const unsigned others = touch.lanes & ~bit(thread.lane);
        const Warp& warp = thread.warp->block->warps[size_t(touch.warp)];
        who = describe(thread_of(warp, __builtin_ctz(others ? others : touch.lanes)));
    }
    fail(std::string("race in shared memory: ") + does + " what " + who + " " + did + " at " +
             describe(site_of(touch.site)) + ", with no barrier between",
         site);
}

void touch_byte(const Thread& thread, SharedByte& byte, bool is_store, bool is_atomic, int number, Site site) {
    const bool is_written = byte.write.warp != -1 && byte.write.time >= thread.warp->block->start_time;
    if (!is_written && (!is_store || is_atomic))
        fail("reads shared memory that no thread of the block has written", site);
    if (!(byte.atomic && is_atomic) && !is_ordered_touch(thread, byte.write))
        fail_race(thread, byte.write, is_store ? "writes" : "reads", "wrote", site);
    if (!is_store) return add_touch(thread, byte.read, number);
    if (!is_ordered_touch(thread, byte.read)) fail_race(thread, byte.read, "writes", "read", site);
    add_touch(thread, byte.write, number);
    byte.atomic = is_atomic;
}

void check_bounds(const Arena& arena, size_t offset, size_t bytes, Site site) {
    for (const SharedVariable& variable : arena.variables)
        if (offset >= variable.offset && offset + bytes <= variable.offset + variable.bytes) return;
    std::string text = std::to_string(bytes) + " bytes of shared memory outside of every variable";
    for (const SharedVariable& variable : arena.variables)
        if (offset + bytes > variable.offset && offset < variable.offset + variable.bytes + gap)
            text += ": at byte " + std::to_string(std::ptrdiff_t(offset) - std::ptrdiff_t(variable.offset)) +
                    " of the " + std::to_string(variable.bytes) + " declared " +
                    (variable.site.line ? "at " + describe(variable.site) : "by the launch");
    fail(text, site);
}

size_t add_variable(Arena& arena, Site site, size_t bytes, size_t alignment) {
    const size_t from = arena.end ? arena.end + gap : 0, offset = (from + alignment - 1) / alignment * alignment;
    if (offset + bytes + gap > arena.capacity) fail("too many variables in shared memory", site);
    arena.variables.push_back({site, offset, bytes});
    arena.end = offset + bytes;
    if (arena.bytes.size() < arena.end + gap) arena.bytes.resize(arena.end + gap);
    std::fill_n(arena.data + offset, bytes + gap, poison);
    return offset;
}

}  // namespace

// Dynamic shared memory comes first, because static variables become known only when threads reach them.
void begin_arena(Block& block) {
    Arena& arena = block.arena;
    const size_t dynamic = launching->report.dynamic_shared, capacity = dynamic + 2 * gap + static_capacity;
    arena.variables.clear();
    arena.end = 0;
    if (arena.capacity < capacity) {
        arena.storage.reset(new unsigned char[capacity + 1024]);  // not touched before it is used
        arena.capacity = capacity;
        const size_t address = reinterpret_cast<size_t>(arena.storage.get());
        arena.data = arena.storage.get() + (1024 - address % 1024) % 1024;
    }
    if (dynamic) add_variable(arena, {"", 0}, dynamic, 1024);
}

void* shared_memory(Site site, size_t bytes, size_t alignment) {
    Arena& arena = current_thread("shared memory", site).warp->block->arena;
    size_t used = bytes;
    for (const SharedVariable& variable : arena.variables) {
        if (variable.bytes == bytes && variable.site.line == site.line && same_site(variable.site, site))
            return arena.data + variable.offset;
        used += variable.site.line ? variable.bytes : 0;
    }
    const size_t dynamic = launching->report.dynamic_shared;
    if (used > max_static) fail(std::to_string(used) + " bytes of static shared memory exceed 48 KiB", site);
    if (used + dynamic > launching->shared_limit)
        fail(std::to_string(used) + " bytes of static and " + std::to_string(dynamic) +
                 " of dynamic shared memory exceed the limit of " + std::to_string(launching->shared_limit),
             site);
    return arena.data + add_variable(arena, site, bytes, alignment);
}

void* dynamic_shared_memory() {
    const Arena& arena = current_thread("shared memory", {"", 0}).warp->block->arena;
    if (!launching->report.dynamic_shared) fail("the launch has no dynamic shared memory");
    return arena.data;
}

bool in_arena(const void* address) {
    const Arena& arena = launching->current->warp->block->arena;
    const auto* at = static_cast<const unsigned char*>(address);
    return std::less_equal<>()(arena.data, at) && std::less<>()(at, arena.data + arena.capacity);
}

void touch_shared(const Thread& thread, const void* address, size_t bytes, bool is_store, bool is_atomic, Site site) {
    Arena& arena = thread.warp->block->arena;
    const int number = site_number(site, bytes, is_store, true);
    if (!in_arena(address)) fail("an address outside of the block's shared memory", site);
    const size_t offset = size_t(static_cast<const unsigned char*>(address) - arena.data);
    if (offset % bytes)
        fail("misaligned: " + std::to_string(bytes) + " bytes of shared memory at byte " + std::to_string(offset),
             site);
    check_bounds(arena, offset, bytes, site);
    SharedByte* const touched = arena.bytes.data() + offset;
    const SharedByte before = touched[0];
    touch_byte(thread, touched[0], is_store, is_atomic, number, site);
    for (size_t i = 1; i < bytes; ++i) {
        if (std::memcmp(&touched[i], &before, sizeof before) == 0)
            touched[i] = touched[0];
        else
            touch_byte(thread, touched[i], is_store, is_atomic, number, site);
    }
    if (!is_atomic) add_access(*thread.warp, number, thread.lane, offset);
}

void shared_access(const void* address, size_t bytes, bool is_store, Site site) {
    touch_shared(current_thread("shared memory", site), address, bytes, is_store, false, site);
    after_access(is_store);
}

}  // namespace emulator
