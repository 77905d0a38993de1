// Which thread runs next: in an order drawn from the seed, each runs until it waits, yields or finishes.
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

// Reused by the next launch.
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

int draw_lane(unsigned mask) {
    const unsigned turn = unsigned(draw_now()) & 31, turned = mask >> turn | mask << (-turn & 31);
    return int((unsigned(__builtin_ctz(turned)) + turn) & 31);
}

void remove_from_ready(Warp& warp) {
    auto& ready = launching->ready;
    ready[size_t(warp.ready_index)] = ready.back();
    ready[size_t(warp.ready_index)]->ready_index = warp.ready_index;
    ready.pop_back();
    warp.ready_index = -1;
}

// Takes the next thread out of the ready ones. Returns null if there is none.
Thread* pick() {
    Launch& launch = *launching;
    if (launch.ready.empty()) return nullptr;
    Warp* warp = launch.current ? launch.current->warp : nullptr;
    if (!warp || warp->ready_index < 0 || (draw_now() & 255) >= launch.stay)
        warp = launch.ready[size_t(draw_now() % launch.ready.size())];
    const int lane = draw_lane(warp->ready);
    warp->ready &= ~bit(lane);
    if (!warp->ready) remove_from_ready(*warp);
    return &thread_of(*warp, lane);
}

void become(Thread* thread) {
    launching->current = thread;
    threadIdx.x = unsigned(thread->number);
    blockIdx.x = thread->warp->block->number;
}

// Switches to a ready thread, or to the host if there is none.
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
    thread.state = State::finished;
    warp.exited |= bit(thread.lane);
    launching->idle = 0;
    check_exit(thread);
    complete_operations(warp);
    if (++block.exited < int(block.threads.size())) return leave(thread, true);
    launching->finished.push_back(&block);
    switch_fibers(thread.fiber, launching->host, true);
}

// Unwinds the thread that failed. All other threads are abandoned.
struct Failed {};

void thread_entry() {
    begin_fiber();
    try {
        (*launching->body)();
        finish_thread();
    } catch (const Failed&) {  // NOLINT(bugprone-empty-catch): the launch has its error
    } catch (const std::exception& error) {
        launching->error = "kernel " + launching->report.kernel + " threw an exception: " + error.what();
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
    block.number = number;
    const int threads = int(launch.report.block), warps = (threads + 31) / 32;
    for (size_t i = size_t(threads); i < block.threads.size(); ++i) stacks.give(block.threads[i].fiber.stack);
    const size_t old_threads = std::min(block.threads.size(), size_t(threads));
    block.threads.resize(size_t(threads));
    block.warps.resize(size_t(warps));
    block.waiting = block.exited = 0;
    block.first_waiting = nullptr;
    block.start_time = block.barrier_time = ++now;
    block.fenced_time = block.last_acquire = block.acquired_time = 0, block.has_fenced = false;
    begin_arena(block);
    for (int w = 0; w < warps; ++w) {
        Warp& warp = block.warps[size_t(w)];
        warp.block = &block, warp.number = w, warp.first_thread = 32 * w;
        warp.size = std::min(32, threads - 32 * w);
        warp.ready = warp.waiting = 0, warp.ready_index = -1;
        warp.exited = warp.size == 32 ? 0 : ~0u << warp.size;
        warp.synchronized_time = block.start_time;
        warp.fenced_time = warp.last_acquire = warp.acquired_time = 0;
    }
    for (int i = 0; i < threads; ++i) {
        Thread& thread = block.threads[size_t(i)];
        if (size_t(i) >= old_threads) thread.fiber.stack = stacks.take();
        thread.fiber.stack_bytes = Stacks::bytes();
        thread.warp = &block.warps[size_t(i / 32)];
        thread.number = i, thread.lane = i % 32;
        thread.state = State::runs, thread.fence_time = thread.acquired_time = 0;
        prepare(thread.fiber, thread_entry);
        make_ready(thread);
    }
}

void end_block(Block& block) {
    for (Warp& warp : block.warps) close_accesses(warp);
    keep_released(block);
    auto& blocks = launching->blocks;
    blocks.erase(std::find(blocks.begin(), blocks.end(), &block));
    spare_blocks.push_back(&block);
}

// Lists how many threads wait, by site.
std::string describe_waiting() {
    struct Group {
        const Thread* first;
        int threads;
    };
    std::vector<Group> groups;
    for (const Block* block : launching->blocks)
        for (const Thread& thread : block->threads) {
            if (thread.state == State::finished) continue;
            const auto same = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
                return group.first->state == thread.state &&
                       (thread.state == State::runs || same_site(group.first->site, thread.site));
            });
            if (same == groups.end())
                groups.push_back({&thread, 1});
            else
                ++same->threads;
        }
    std::string text;
    for (const auto& [first, threads] : groups) {
        text += "\n  " + std::to_string(threads) + " thread(s) " +
                (first->state == State::runs ? "run" : "wait at " + describe(first->site));
        if (first->state == State::at_barrier) text += " (barrier)";
        if (first->state == State::in_warp_operation) text += " (lanes " + describe_mask(first->call.mask) + ")";
        text += ", one of them block " + std::to_string(first->warp->block->number) + ", " + describe(*first);
    }
    return text;
}

void run_launch(Launch& launch, size_t max_blocks) {
    while (!launch.order.empty() || !launch.blocks.empty()) {
        while (launch.blocks.size() < max_blocks && !launch.order.empty()) {
            const uint32_t number = launch.order.back();
            launch.order.pop_back();
            begin_block(number);
        }
        launch.current = nullptr;
        Thread* next = pick();
        if (!next) {
            launch.error = "kernel " + launch.report.kernel + ": deadlock, no thread can run" + describe_waiting();
            return;
        }
        become(next);
        switch_fibers(launch.host, next->fiber, false);
        if (!launch.error.empty()) return;
        for (Block* block : launch.finished) end_block(*block);
        launch.finished.clear();
    }
}

}  // namespace

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, size_t bytes, cudaStream_t stream, bool cooperative,
                   const std::function<void()>& body) {
    const std::scoped_lock lock(one_launch);
    if (now >= 1u << 31) {  // before the clock overflows
        for (auto& known : all_blocks) known->arena.bytes.clear();
        now = 1;
    }
    Launch launch;
    launch.body = &body;
    const cudaError_t refused = check_launch(kernel, launch, grid, block, bytes, stream, cooperative);
    take_needs(launch);
    if (refused != cudaSuccess) return refused;
    launch.random = seed_ * 0x2545f4914f6cdd1du + 1;
    // Some faults need lanes that are far apart, others lanes that run side by side: each launch draws which it has.
    static const unsigned stays[] = {0, 192, 250, 255}, preempts[] = {0, 0, 16, 64};
    launch.stay = stays[draw(launch.random) % 4], launch.preempt = preempts[draw(launch.random) % 4];
    const size_t max_blocks = cooperative ? grid.x : std::min<size_t>(grid.x, 1 + draw(launch.random) % 4);
    launch.idle_limit = 20000 + 2000 * max_blocks * block.x;
    launch.order.resize(grid.x);
    std::iota(launch.order.begin(), launch.order.end(), 0u);
    for (size_t i = grid.x; i > 1; --i) std::swap(launch.order[i - 1], launch.order[draw(launch.random) % i]);
    blockDim = block, gridDim = grid;
    forget_writes();
    launch.start_time = ++now;
    launching = &launch;
    run_launch(launch, max_blocks);
    for (Block* left : std::vector<Block*>(launch.blocks)) end_block(*left);
    if (launch.error.empty()) check_needs(launch);
    launching = nullptr;
    if (!launch.error.empty()) throw Error(launch.error);
    keep_report(launch);
    return cudaSuccess;
}

void set_seed(uint64_t seed) { seed_ = seed; }
uint64_t seed() { return seed_; }

bool in_kernel() { return launching && launching->current; }

void make_ready(Thread& thread) {
    Warp& warp = *thread.warp;
    thread.state = State::runs;
    warp.ready |= bit(thread.lane);
    if (warp.ready_index >= 0) return;
    warp.ready_index = int(launching->ready.size());
    launching->ready.push_back(&warp);
}

void wait(Thread& thread, State state, Site site) {
    thread.state = state, thread.site = site;
    leave(thread, false);
}

void run_others() {
    Thread& thread = *launching->current;
    make_ready(thread);
    leave(thread, false);
}

void yield() {
    if (++launching->idle > launching->idle_limit)
        fail("deadlock: threads poll what no other thread writes" + describe_waiting());
    run_others();
}

void after_access(bool is_store) {
    Launch& launch = *launching;
    if (is_store) launch.idle = 0;  // others may wait for it
    if (launch.preempt && draw_now() % launch.preempt == 0) run_others();
}

std::string describe(Site site) {
    const char* slash = std::strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}
std::string describe(const Thread& thread) { return "thread " + std::to_string(thread.number); }
std::string describe_mask(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

Thread& current_thread(const char* what, Site site) {
    if (!in_kernel()) throw Error(std::string(what) + " outside of a kernel, at " + describe(site));
    return *launching->current;
}

void fail(const std::string& what, Site site) {
    const Thread& thread = *launching->current;
    launching->error = "kernel " + launching->report.kernel + ", block " + std::to_string(thread.warp->block->number) +
                       ", " + describe(thread) + (site.line ? ", " + describe(site) : "") + ": " + what;
    throw Failed();  // NOLINT(bugprone-std-exception-baseclass): no kernel is to catch it
}

}  // namespace emulator
