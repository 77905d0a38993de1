// Who last wrote each byte of global memory in this launch, and whether a thread may know of it.
#include <unordered_map>

#include "state.h"

namespace emulator {

namespace {

// The thread's number in the launch, and the place of the write.
struct Written {
    uint32_t time = 0, writer = 0, site = 0;
};

constexpr uint64_t page_bytes = 4096;
struct Page {
    Written bytes[page_bytes];
};

// Kept between launches: what an earlier one wrote is older than this one.
std::unordered_map<uint64_t, std::unique_ptr<Page>> pages;
constexpr size_t most_pages = 4096;
struct {
    uint64_t number = ~0ull;
    Page* page = nullptr;
} last;

constexpr uint32_t threads_of_block = 1024;

Page* page_of(uint64_t number, bool create) {
    if (last.number == number && (last.page || !create)) return last.page;
    const auto found = pages.find(number);
    Page* page = found == pages.end() ? nullptr : found->second.get();
    if (!page && create) page = (pages[number] = std::make_unique<Page>()).get();
    last.number = number, last.page = page;
    return page;
}

uint32_t number_of(const Thread& thread) {
    return thread.warp->block->number * threads_of_block + uint32_t(thread.number);
}

std::string writer_text(const Thread& thread, const Written& written) {
    const uint32_t block = written.writer / threads_of_block, n = written.writer % threads_of_block;
    const dim3 size = launching->block;
    std::string text = "thread " + describe(uint3{n % size.x, n / size.x % size.y, n / size.x / size.y});
    if (block != thread.warp->block->number) text += " of block " + describe(index_of_block(block));
    return text + " wrote at " + describe(site_of(int(written.site)));
}

bool is_released(const Written& written) {
    const Launch& launch = *launching;
    const uint32_t number = written.writer / threads_of_block, thread = written.writer % threads_of_block;
    for (const Block* block : launch.blocks)
        if (block->number == number) return written.time < released_time(block->threads[thread]);
    const auto found = launch.released.find(number);
    return found != launch.released.end() && written.time < found->second[thread];
}

void check_written(const Thread& thread, const Written& written, bool is_store, Site site) {
    const char* what = is_store ? "race in global memory: writes what " : "race in global memory: reads what ";
    const uint32_t block = written.writer / threads_of_block, number = written.writer % threads_of_block;
    const bool same_block = block == thread.warp->block->number;
    if (same_block && is_ordered(thread, int(number / 32), bit(int(number % 32)), written.time)) return;
    // Warps of a block may tell each other as blocks do.
    const bool released = is_released(written);
    if (released && has_acquired(thread, written.time)) return;
    if (same_block) fail(what + writer_text(thread, written) + ", with no barrier between", site);
    if (!released) fail(what + writer_text(thread, written) + ", with no __threadfence behind it", site);
    fail(what + writer_text(thread, written) + ", without an atomic operation or __threadfence since", site);
}

}  // namespace

void forget_written() {
    if (pages.size() > most_pages || now < 2) pages.clear();
    last.number = ~0ull, last.page = nullptr;
}

void check_order(const Thread& thread, uint64_t address, size_t bytes, bool is_store, int access, Site site) {
    const uint32_t self = number_of(thread), start = launching->start_time;
    Page* const page = page_of(address / page_bytes, is_store);
    if (!page) return;
    Written* const of_bytes = page->bytes + address % page_bytes;  // an aligned access lies in one page
    Written passed;
    for (size_t i = 0; i < bytes; ++i) {
        Written& written = of_bytes[i];
        const bool same = written.time == passed.time && written.writer == passed.writer;
        if (written.time >= start && written.writer != self && !same) {
            check_written(thread, written, is_store, site);
            passed = written;
        }
        if (is_store) written = {now, self, uint32_t(access)};
    }
}

// So that a block that is over still tells what its threads have released.
void keep_released(const Block& block) {
    if (!block.has_fenced) return;
    auto& released = launching->released[block.number];
    for (const Thread& thread : block.threads) released.push_back(released_time(thread));
}

}  // namespace emulator
