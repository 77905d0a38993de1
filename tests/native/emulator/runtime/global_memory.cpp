// Accesses to global memory: within the allowed bounds, aligned, complete, and ordered after the writes of others.
#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "state.h"

namespace emulator {

namespace {

struct Allowed {
    uint64_t first, end;
    bool writable;
    std::string name;
};

std::vector<Allowed> allowed;  // sorted by address
std::vector<Need> next_needs;

uint64_t number_of(const void* address) { return reinterpret_cast<uintptr_t>(address); }

std::string describe_access(uint64_t address, size_t bytes, bool is_store) {
    char text[80];
    std::snprintf(text, sizeof text, "%s %zu bytes at 0x%llx", is_store ? "writes" : "reads", bytes,
                  static_cast<unsigned long long>(address));
    return text;
}

// Where an address is relative to the nearest allowed range.
std::string describe_distance(uint64_t address) {
    std::string text;
    uint64_t nearest = 1 << 20;
    for (const Allowed& range : allowed) {
        const bool before = address < range.first, across = !before && address < range.end;
        const uint64_t distance = across ? 0 : before ? range.first - address : address - range.end;
        if (distance >= nearest) continue;
        nearest = distance;
        text = across ? ", across the end of"
                      : ", " + std::to_string(distance) + " bytes " + (before ? "before" : "behind the end of");
        text += " the " + std::to_string(range.end - range.first) + " bytes of " + range.name;
    }
    return text;
}

void check_allowed(uint64_t address, size_t bytes, bool is_store, Site site) {
    if (allowed.empty()) return;
    const auto next = std::upper_bound(allowed.begin(), allowed.end(), address,
                                       [](uint64_t value, const Allowed& range) { return value < range.first; });
    if (next == allowed.begin() || address + bytes > (next - 1)->end)
        fail("out of bounds: " + describe_access(address, bytes, is_store) + describe_distance(address), site);
    if (is_store && !(next - 1)->writable)
        fail("out of bounds: " + describe_access(address, bytes, is_store) + " of read-only " + (next - 1)->name, site);
}

void note_needed(uint64_t address, size_t bytes, bool is_store) {
    for (Need& need : launching->needs) {
        if (need.is_store != is_store) continue;
        const uint64_t first = std::max(address, need.first), end = std::min(address + bytes, need.end);
        for (uint64_t at = first; at < end; ++at) need.touched[at - need.first] = true;
    }
}

void check_access(const void* address, size_t bytes, bool is_store, Site site) {
    const uint64_t at = number_of(address);
    if (at % bytes) fail("misaligned: " + describe_access(at, bytes, is_store), site);
    check_allowed(at, bytes, is_store, site);
    note_needed(at, bytes, is_store);
}

// Who last wrote a byte: the thread's number in the launch, and the number of the site.
struct Written {
    uint32_t time = 0, writer = 0, site = 0;
};

constexpr uint64_t page_bytes = 4096;
struct Page {
    Written bytes[page_bytes];
};

// Kept from one launch to the next: a newer launch recognises older writes by their time.
std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
constexpr size_t max_pages = 4096;
constexpr uint32_t max_threads = 1024;  // per block

// Caches the last page, which the next access usually needs again.
struct {
    uint64_t number = ~0ull;
    Page* page = nullptr;
} last_page;

Page* find_page(uint64_t number, bool create) {
    if (last_page.number == number && (last_page.page || !create)) return last_page.page;
    const auto found = pages.find(number);
    Page* page = found == pages.end() ? nullptr : found->second.get();
    if (!page && create) page = (pages[number] = std::make_unique<Page>()).get();
    last_page = {number, page};
    return page;
}

std::string describe_writer(const Thread& thread, const Written& written) {
    const uint32_t block = written.writer / max_threads, number = written.writer % max_threads;
    return "thread " + std::to_string(number) +
           (block == thread.warp->block->number ? "" : " of block " + std::to_string(block)) + " wrote at " +
           describe(site_of(int(written.site)));
}

bool is_released(const Written& written) {
    const uint32_t number = written.writer / max_threads, thread = written.writer % max_threads;
    for (const Block* block : launching->blocks)
        if (block->number == number) return written.time < released_time(block->threads[thread]);
    const auto released = launching->released.find(number);
    return released != launching->released.end() && written.time < released->second[thread];
}

void check_written(const Thread& thread, const Written& written, bool is_store, Site site) {
    const uint32_t block = written.writer / max_threads, number = written.writer % max_threads;
    const bool same_block = block == thread.warp->block->number;
    if (same_block && is_ordered(thread, int(number / 32), bit(int(number % 32)), written.time)) return;
    // Warps of one block may communicate like blocks.
    const bool released = is_released(written);
    if (released && has_acquired(thread, written.time)) return;
    fail(std::string("race in global memory: ") + (is_store ? "writes" : "reads") + " what " +
             describe_writer(thread, written) +
             (same_block  ? ", with no barrier between"
              : !released ? ", with no __threadfence behind it"
                          : ", without an atomic operation or __threadfence since"),
         site);
}

void check_order(const Thread& thread, uint64_t address, size_t bytes, bool is_store, int access, Site site) {
    const uint32_t self = thread.warp->block->number * max_threads + uint32_t(thread.number);
    Page* const page = find_page(address / page_bytes, is_store);
    if (!page) return;
    Written* const first = page->bytes + address % page_bytes;  // an aligned access lies in one page
    Written checked;
    for (Written* written = first; written < first + bytes; ++written) {
        const bool same = written->time == checked.time && written->writer == checked.writer;
        if (written->time >= launching->start_time && written->writer != self && !same) {
            check_written(thread, *written, is_store, site);
            checked = *written;
        }
        if (is_store) *written = {now, self, uint32_t(access)};
    }
}

}  // namespace

void allow(const void* address, size_t bytes, bool writable, const char* name) {
    const Allowed range{number_of(address), number_of(address) + bytes, writable, name};
    allowed.insert(std::upper_bound(allowed.begin(), allowed.end(), range,
                                    [](const Allowed& a, const Allowed& b) { return a.first < b.first; }),
                   range);
}

void allow_everything() { allowed.clear(); }

void needs(const void* address, size_t bytes, bool is_store, const std::string& kernel) {
    next_needs.push_back({number_of(address), number_of(address) + bytes, is_store, kernel, std::vector<bool>(bytes)});
}

void take_needs(Launch& launch) {
    const auto of_others = [&](const Need& need) {
        return launch.report.kernel.find(need.kernel) == std::string::npos;
    };
    const auto own = std::partition(next_needs.begin(), next_needs.end(), of_others);
    launch.needs.assign(own, next_needs.end());
    next_needs.erase(own, next_needs.end());
}

void check_needs(Launch& launch) {
    for (const Need& need : launch.needs) {
        const auto missing = std::find(need.touched.begin(), need.touched.end(), false);
        if (missing == need.touched.end()) continue;
        launch.error = "kernel " + launch.report.kernel + ": never " + (need.is_store ? "wrote" : "read") + " " +
                       std::to_string(std::count(need.touched.begin(), need.touched.end(), false)) + " of " +
                       std::to_string(need.end - need.first) + " needed bytes, the first one at " +
                       std::to_string(missing - need.touched.begin());
        return;
    }
}

void forget_writes() {
    if (pages.size() > max_pages || now < 2) pages.clear();
    last_page = {};
}

// A finished block still tells what its threads have released.
void keep_released(const Block& block) {
    if (!block.has_fenced) return;
    auto& released = launching->released[block.number];
    for (const Thread& thread : block.threads) released.push_back(released_time(thread));
}

void global_access(const void* address, size_t bytes, bool is_store, Site site) {
    const Thread& thread = current_thread("global memory", site);
    if (in_arena(address)) fail("shared memory used as global memory", site);
    check_access(address, bytes, is_store, site);
    const int access = site_number(site, bytes, is_store, false);
    check_order(thread, number_of(address), bytes, is_store, access, site);
    add_access(*thread.warp, access, thread.lane, number_of(address));
    after_access(is_store);
}

void begin_atomic(const void* address, size_t bytes, Site site) {
    Thread& thread = current_thread("an atomic operation", site);
    yield();
    if (in_arena(address)) return touch_shared(thread, address, bytes, true, true, site);
    check_access(address, bytes, true, site);
    note_needed(number_of(address), bytes, false);
    acquire(thread);
}

void end_atomic(bool changed) {
    if (changed) launching->idle = 0;
}

}  // namespace emulator
