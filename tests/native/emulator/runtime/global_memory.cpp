// Accesses to global memory: inside of what is allowed, aligned, and all that was needed.
#include <algorithm>
#include <cstdio>

#include "state.h"

namespace emulator {

namespace {

struct Allowed {
    uint64_t first, end;
    bool writable;
    std::string name;
};

std::vector<Allowed> allowed;  // by address
std::vector<Need> next_needs;

uint64_t number_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }

std::string access_text(uint64_t address, size_t bytes, bool is_store) {
    char text[80];
    std::snprintf(text, sizeof text, "%s %zu bytes at 0x%llx", is_store ? "writes" : "reads", bytes,
                  static_cast<unsigned long long>(address));
    return text;
}

std::string distance_text(uint64_t address) {
    std::string text;
    uint64_t nearest = 1 << 20;
    for (const Allowed& range : allowed) {
        const bool across = address >= range.first && address < range.end;
        const uint64_t distance = across ? 0 : address < range.first ? range.first - address : address - range.end;
        if (distance >= nearest) continue;
        nearest = distance;
        text = (across ? ", across the end of" : ", " + std::to_string(distance) + " bytes ") +
               (across                  ? ""
                : address < range.first ? "before"
                                        : "behind the end of") +
               " the " + std::to_string(range.end - range.first) + " bytes " +
               (range.name.empty() ? "" : "of " + range.name);
    }
    return text;
}

void check_allowed(uint64_t address, size_t bytes, bool is_store, Site site) {
    if (allowed.empty()) return;
    auto behind = std::upper_bound(allowed.begin(), allowed.end(), address,
                                   [](uint64_t value, const Allowed& range) { return value < range.first; });
    if (behind != allowed.begin()) {
        const Allowed& range = *--behind;
        if (address + bytes <= range.end) {
            if (is_store && !range.writable)
                fail("out of bounds: " + access_text(address, bytes, is_store) + ", which is read-only" +
                         (range.name.empty() ? "" : ": " + range.name),
                     site);
            return;
        }
    }
    fail("out of bounds: " + access_text(address, bytes, is_store) + distance_text(address), site);
}

void note_needed(uint64_t address, size_t bytes, bool is_store) {
    for (Need& need : launching->needs) {
        if (need.is_store != is_store || need.touched.empty()) continue;
        const uint64_t first = std::max(address, need.first), end = std::min(address + bytes, need.end);
        for (uint64_t at = first; at < end; ++at) need.touched[at - need.first] = true;
    }
}

}  // namespace

void allow(const void* address, size_t bytes, bool writable, const char* name) {
    const uint64_t first = number_of(address);
    const Allowed range{first, first + bytes, writable, name};
    allowed.insert(std::upper_bound(allowed.begin(), allowed.end(), range,
                                    [](const Allowed& a, const Allowed& b) { return a.first < b.first; }),
                   range);
}

void allow_everything() { allowed.clear(); }

void needs(const void* address, size_t bytes, bool is_store, bool checked) {
    const uint64_t first = number_of(address);
    next_needs.push_back({first, first + bytes, is_store, std::vector<bool>(checked ? bytes : 0)});
}

void take_needs(Launch& launch) {
    launch.needs.swap(next_needs);
    for (const Need& need : launch.needs)
        (need.is_store ? launch.report.needed_written : launch.report.needed_read) += need.end - need.first;
}

void check_needs(Launch& launch) {
    for (const Need& need : launch.needs) {
        const auto missing = std::find(need.touched.begin(), need.touched.end(), false);
        if (missing == need.touched.end()) continue;
        launch.error = "kernel " + launch.report.kernel + ": never " + (need.is_store ? "wrote" : "read") + " " +
                       std::to_string(std::count(need.touched.begin(), need.touched.end(), false)) + " of the " +
                       std::to_string(need.end - need.first) + " bytes that it has to, first byte " +
                       std::to_string(missing - need.touched.begin());
        return;
    }
}

void check_global(const void* address, size_t bytes, bool is_store, Site site) {
    const uint64_t at = number_of(address);
    if (at % bytes) fail("misaligned: " + access_text(at, bytes, is_store), site);
    check_allowed(at, bytes, is_store, site);
    if (!launching->needs.empty()) note_needed(at, bytes, is_store);
}

void global_access(const void* address, size_t bytes, bool is_store, Site site) {
    const Thread& thread = current_thread("global memory", site);
    if (in_arena(address)) fail("shared memory used as global memory", site);
    check_global(address, bytes, is_store, site);
    const int access = site_number(site, bytes, is_store, false);
    check_order(thread, number_of(address), bytes, is_store, access, site);
    add_to_group(*thread.warp, access, thread.lane, number_of(address));
    after_access(is_store);
}

void begin_atomic(const void* address, size_t bytes, Site site) {
    Thread& thread = current_thread("an atomic operation", site);
    yield();
    ++launching->report.atomics;
    if (in_arena(address)) {
        shared_touch(thread, address, bytes, true, true, site);
    } else {
        check_global(address, bytes, true, site);
        if (!launching->needs.empty()) note_needed(number_of(address), bytes, false);
        acquire(thread);
    }
}

void end_atomic(bool changed) {
    if (changed) launching->idle = 0;
}

}  // namespace emulator
