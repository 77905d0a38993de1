// Who runs next: threads go on in an order drawn from the seed until they wait, yield or finish.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Launch* launching = nullptr;
uint32_t now = 1;

namespace {

// Kept between launches.
Stacks stacks;
std::vector<std::unique_ptr<Block>> all_blocks;
std::vector<Block*> spare_blocks;
std::mutex one_launch;

uint64_t seed_of_environment() {
    const char* text = std::getenv("KDDP_EMULATOR_SEED");
    return text ? std::strtoull(text, nullptr, 10) : 0;
}
uint64_t seed_ = seed_of_environment();

uint64_t draw_now() { return draw(launching->random); }

// A bit of `mask`, any of them.
int draw_lane(unsigned mask) {
    const unsigned turn = unsigned(draw_now()) & 31, turned = mask >> turn | mask << (-turn & 31);
    return int((unsigned(__builtin_ctz(turned)) + turn) & 31);
}

void leave_ready(Warp& warp) {
    auto& ready = launching->ready;
    ready[size_t(warp.place)] = ready.back();
    ready[size_t(warp.place)]->place = warp.place;
    ready.pop_back();
    warp.place = -1;
}

// The thread to go on, taken out of the ready ones; null where none is.
Thread* pick() {
    Launch& launch = *launching;
    if (launch.ready.empty()) return nullptr;
    Warp* warp = launch.current ? launch.current->warp : nullptr;
    if (!warp || warp->place < 0 || (draw_now() & 255) >= launch.stay)
        warp = launch.ready[size_t(draw_now() % launch.ready.size())];
    const int lane = draw_lane(warp->ready);
    warp->ready &= ~bit(lane);
    if (!warp->ready) leave_ready(*warp);
    return &thread_of(*warp, lane);
}

void become(Thread* thread) {
    launching->current = thread;
    threadIdx = thread->index;
    blockIdx = thread->warp->block->index;
}

// From the thread that runs to another that may, or to the host where none may.
void leave(Thread& thread, bool is_last) {
    Thread* next = pick();
    if (next == &thread) return;
    if (next) become(next);
    switch_fibers(thread.fiber, next ? next->fiber : launching->host, is_last);
}

void finish_thread() {
    Thread& thread = *launching->current;
    Warp& warp = *thread.warp;
    Block& block = *warp.block;
    thread.waits = Waits::finished;
    warp.exited |= bit(thread.lane);
    launching->idle = 0;
    leave_barriers(thread);
    complete_operations(warp);
    if (++block.exited < int(block.threads.size())) return leave(thread, true);
    launching->finished.push_back(&block);
    switch_fibers(thread.fiber, launching->host, true);
}

// Thrown through the thread that failed, for the sake of what it holds; all others are given up where they are.
struct Failed {};

void thread_entry() {
    begin_fiber();
    try {
        (*launching->body)();
        finish_thread();
    } catch (const Failed&) {  // NOLINT(bugprone-empty-catch): the launch has its error
    } catch (const std::exception& error) {
        launching->error = "kernel " + launching->report.kernel + ": an exception left it: " + error.what();
    }
    switch_fibers(launching->current->fiber, launching->host, true);
    std::abort();
}

void begin_block(uint32_t number) {
    Launch& launch = *launching;
    if (spare_blocks.empty()) spare_blocks.push_back(all_blocks.emplace_back(std::make_unique<Block>()).get());
    Block& block = *spare_blocks.back();
    spare_blocks.pop_back();
    launch.blocks.push_back(&block);
    const dim3 size = launch.block;
    block.number = number, block.index = index_of_block(number);
    const int threads = int(size.x * size.y * size.z), warps = (threads + 31) / 32;
    for (size_t i = size_t(threads); i < block.threads.size(); ++i) stacks.give(block.threads[i].fiber.stack);
    const size_t had = std::min(block.threads.size(), size_t(threads));
    block.threads.resize(size_t(threads));
    block.warps.resize(size_t(warps));
    block.waiting = block.exited = block.predicates = block.barrier_value = 0;
    block.first_waiting = nullptr;
    block.start_time = block.barrier_time = ++now;
    block.fenced_time = block.last_acquire = block.acquired_time = 0, block.has_fenced = false;
    begin_arena(block);
    for (int w = 0; w < warps; ++w) {
        Warp& warp = block.warps[size_t(w)];
        warp.block = &block, warp.number = w, warp.first_thread = 32 * w;
        warp.size = std::min(32, threads - 32 * w);
        warp.ready = warp.waiting = 0, warp.place = -1;
        warp.exited = warp.size == 32 ? 0 : ~0u << warp.size;
        warp.together_time = block.start_time;
        warp.fenced_time = warp.last_acquire = warp.acquired_time = 0;
        warp.pair_times.clear();
    }
    for (int i = 0; i < threads; ++i) {
        Thread& thread = block.threads[size_t(i)];
        if (size_t(i) >= had) thread.fiber.stack = stacks.take();
        thread.fiber.stack_bytes = Stacks::bytes();
        thread.warp = &block.warps[size_t(i / 32)];
        const unsigned n = unsigned(i);
        thread.index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
        thread.number = i, thread.lane = i % 32;
        thread.waits = Waits::no, thread.atomic = nullptr, thread.fence_time = thread.acquired_time = 0;
        prepare(thread.fiber, thread_entry);
        make_ready(thread);
    }
}

void end_block(Block& block) {
    for (Warp& warp : block.warps) close_groups(warp);
    keep_released(block);
    auto& blocks = launching->blocks;
    for (auto& other : blocks)
        if (other == &block) {
            other = blocks.back();
            blocks.pop_back();
            break;
        }
    spare_blocks.push_back(&block);
}

// Every thread that waits, and for what; a line for each place.
std::string who_waits() {
    std::string text;
    struct Place {
        Site site;
        Waits waits;
        int threads;
        const Thread* first;
    };
    std::vector<Place> places;
    for (const Block* block : launching->blocks)
        for (const Thread& thread : block->threads) {
            if (thread.waits == Waits::finished) continue;
            Place* place = nullptr;
            for (Place& other : places)
                if (other.waits == thread.waits && (thread.waits == Waits::no || same_site(other.site, thread.site)))
                    place = &other;
            if (!place) place = &places.emplace_back(Place{thread.site, thread.waits, 0, &thread});
            ++place->threads;
        }
    for (const Place& place : places) {
        const bool waits = place.waits != Waits::no;
        text += "\n  " + std::to_string(place.threads) +
                (waits ? " thread(s) wait at " + describe(place.site) : " thread(s) run");
        if (place.waits == Waits::at_barrier) text += " (a barrier)";
        if (place.waits == Waits::in_warp) text += " (lanes " + lanes_text(place.first->call.mask) + " of a warp)";
        text += ", one of them block " + describe(place.first->warp->block->index) + ", " + describe(*place.first);
    }
    return text;
}

void run_launch(Launch& launch, size_t at_once) {
    while (!launch.order.empty() || !launch.blocks.empty()) {
        while (launch.blocks.size() < at_once && !launch.order.empty()) {
            const uint32_t number = launch.order.back();
            launch.order.pop_back();
            begin_block(number);
        }
        launch.current = nullptr;
        Thread* next = pick();
        if (!next) {
            launch.error = "kernel " + launch.report.kernel + ": deadlock, no thread can go on" + who_waits();
            return;
        }
        become(next);
        switch_fibers(launch.host, next->fiber, false);
        if (!launch.error.empty()) return;
        for (Block* block : launch.finished) end_block(*block);
        launch.finished.clear();
    }
}

void shuffle_blocks(Launch& launch, uint64_t blocks) {
    launch.order.resize(blocks);
    std::iota(launch.order.begin(), launch.order.end(), 0u);
    for (uint64_t i = blocks; i > 1; --i) std::swap(launch.order[i - 1], launch.order[draw(launch.random) % i]);
}

// Before the clock comes round.
void forget_times() {
    if (now < 1u << 31) return;
    for (auto& block : all_blocks) block->arena.bytes.clear();
    now = 1;
}

void launch_checked(const Kernel& kernel, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                    const std::function<void()>& body, bool cooperative) {
    const std::scoped_lock lock(one_launch);
    forget_times();
    Launch launch;
    launch.grid = grid, launch.block = block, launch.body = &body;
    take_needs(launch);
    if (check_launch(kernel, launch, grid, block, bytes, stream, cooperative) != cudaSuccess) return;
    launch.report.seed = seed_;
    launch.random = seed_ * 0x2545f4914f6cdd1du + 1;
    // Lanes far apart find other faults than lanes side by side; so each launch draws how far they go.
    static const unsigned stays[] = {0, 192, 250, 255}, preempts[] = {0, 0, 16, 64};
    launch.stay = stays[draw(launch.random) % 4], launch.preempt = preempts[draw(launch.random) % 4];
    const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
    const uint64_t at_once = cooperative ? blocks : std::min<uint64_t>(blocks, 1 + draw(launch.random) % 4);
    launch.idle_limit = 20000 + 2000 * at_once * block.x * block.y * block.z;
    shuffle_blocks(launch, blocks);
    blockDim = block, gridDim = grid;
    forget_written();
    launch.start_time = ++now;
    launching = &launch;
    run_launch(launch, size_t(at_once));
    for (Block* left : std::vector<Block*>(launch.blocks)) end_block(*left);
    if (launch.error.empty()) check_needs(launch);
    launching = nullptr;
    if (!launch.error.empty()) throw Error(launch.error);
    keep_report(launch);
}

}  // namespace

void set_seed(uint64_t seed) { seed_ = seed; }
uint64_t seed() { return seed_; }

void launch(const Kernel& kernel, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
            const std::function<void()>& body) {
    launch_checked(kernel, grid, block, bytes, stream, body, false);
}
void launch_cooperative(const Kernel& kernel, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream,
                        const std::function<void()>& body) {
    launch_checked(kernel, grid, block, bytes, stream, body, true);
}

bool in_kernel() { return launching && launching->current; }

void make_ready(Thread& thread) {
    Warp& warp = *thread.warp;
    thread.waits = Waits::no;
    warp.ready |= bit(thread.lane);
    if (warp.place >= 0) return;
    warp.place = int(launching->ready.size());
    launching->ready.push_back(&warp);
}

void wait(Thread& thread, Waits why, Site site) {
    thread.waits = why, thread.site = site;
    leave(thread, false);
}

void run_others() {
    Thread& thread = *launching->current;
    make_ready(thread);
    leave(thread, false);
}

void yield() {
    if (!in_kernel()) return;
    if (++launching->idle > launching->idle_limit)
        fail("deadlock: threads wait in a loop for what no other thread writes" + who_waits(), {"", 0});
    run_others();
}

// A store may be what others wait for.
void after_access(bool is_store) {
    Launch& launch = *launching;
    if (is_store) launch.idle = 0;
    if (launch.preempt && draw_now() % launch.preempt == 0) run_others();
}

std::string describe(Site site) {
    if (!site.line) return "";
    const char* slash = std::strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}
std::string describe(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}
std::string describe(const Thread& thread) { return "thread " + describe(thread.index); }

uint3 index_of_block(uint32_t number) {
    const dim3 grid = launching->grid;
    return {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
}

std::string lanes_text(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

Thread& current_thread(const char* what, Site site) {
    if (!in_kernel()) throw Error(std::string(what) + " outside of a kernel, at " + describe(site));
    return *launching->current;
}

unsigned lane() { return unsigned(current_thread("a lane", {"", 0}).lane); }

void fail(const std::string& what, Site site) {
    if (!in_kernel()) throw Error(what + (site.line ? " at " + describe(site) : ""));
    Launch& launch = *launching;
    const Thread& thread = *launch.current;
    launch.error = "kernel " + launch.report.kernel + ", block " + describe(thread.warp->block->index) + ", " +
                   describe(thread) + (site.line ? ", " + describe(site) : "") + ": " + what;
    throw Failed();  // NOLINT(bugprone-std-exception-baseclass): no kernel is to catch it
}

}  // namespace emulator
