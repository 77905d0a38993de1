// The OpenMP runtime functions that GCC calls, implemented with std::thread. ThreadSanitizer does not understand the
// barriers of libgomp, which use futexes, and would report false races.
//
// Only what OpenMP orders is ordered here: distributing the iterations of a loop is relaxed.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Barrier {
  public:
    explicit Barrier(unsigned threads) : threads_(threads) {}

    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        const unsigned round = round_;
        if (++waiting_ == threads_) {
            waiting_ = 0, ++round_;
            all_here_.notify_all();
        } else {
            all_here_.wait(lock, [&] { return round != round_; });
        }
    }

  private:
    std::mutex mutex_;
    std::condition_variable all_here_;
    unsigned threads_, waiting_ = 0, round_ = 0;
};

// Shared by the threads of one `parallel`; `taken` belongs to its loops, in program order.
struct Team {
    explicit Team(unsigned threads) : threads(threads), barrier(threads) {}
    static constexpr int most_constructs = 4096;
    unsigned threads;
    Barrier barrier;
    std::atomic<long> taken[most_constructs] = {};
};

struct Member {
    Team* team = nullptr;
    unsigned number = 0;
    int constructs = 0;  // met so far
    long start = 0, end = 0, step = 1, chunk = 1;
};
thread_local Member member;

std::atomic<long>& next_construct() {
    if (member.constructs == Team::most_constructs) std::puts("too many constructs in a parallel region"), std::abort();
    return member.team->taken[member.constructs++];
}

std::atomic<long>& latest_construct() { return member.team->taken[member.constructs - 1]; }

void run_as_member(Team& team, unsigned number, void (*body)(void*), void* data) {
    const Member outer = member;
    member = Member{&team, number};
    body(data);
    member = outer;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return int(member.number); }

int omp_get_num_threads() { return member.team ? int(member.team->threads) : 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
    Team team(threads ? threads : 1);
    std::vector<std::thread> others;
    for (unsigned number = 1; number < team.threads; ++number)
        others.emplace_back([&team, number, body, data] { run_as_member(team, number, body, data); });
    run_as_member(team, 0, body, data);
    for (std::thread& other : others) other.join();
}

// Without barriers the kernels have races, which the sanitizer must detect.
void GOMP_barrier() {
#if !defined(KDDP_WITHOUT_BARRIERS)
    member.team->barrier.wait();
#endif
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
    const long begin =
        member.start + member.step * latest_construct().fetch_add(member.chunk, std::memory_order_relaxed);
    if (begin >= member.end) return false;
    *first = begin;
    *last = begin + member.step * member.chunk < member.end ? begin + member.step * member.chunk : member.end;
    return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first, long* last) {
    next_construct();
    member.start = start, member.end = end, member.step = step, member.chunk = chunk;
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}

void GOMP_loop_end() { GOMP_barrier(); }

void GOMP_loop_end_nowait() {}

}  // extern "C"
