// Runs the CPU kernels on one thread, on several threads, and from several concurrent callers, and compares every byte
// that they write. Prints the number of jobs; exits with 1 if two results differ.
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kddp/gather_slices.h"
#include "kddp/gradient_products.h"
#include "kddp/kd_l1_loss.h"

namespace {

using namespace kddp;

struct alignas(64) Line {
    char bytes[64];
};

// Memory with torch's alignment.
class Buffer {
  public:
    explicit Buffer(int64_t bytes) : bytes_(bytes), lines_(bytes / 64 + 1) {}
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(const_cast<Line*>(lines_.data()));
    }
    std::string bytes() const { return std::string(as<char>(), bytes_); }

  private:
    int64_t bytes_;
    std::vector<Line> lines_;
};

// `count` random numbers of a type; for 16 bits, random patterns with a small exponent.
Buffer numbers(ElementType type, int64_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    Buffer buffer(count * size_of(type));
    for (int64_t i = 0; i < count; ++i) {
        if (type == ElementType::float64) buffer.as<double>()[i] = normal(random);
        if (type == ElementType::float32) buffer.as<float>()[i] = float(normal(random));
        if (size_of(type) == 2) buffer.as<uint16_t>()[i] = uint16_t(0x3000 + random() % 0x0fff);
    }
    return buffer;
}

struct LossCase {
    const char* name;
    int64_t rows, classes, neurons;
    ElementType type;
    Divergence divergence;
    bool standardize, statistics;
};

std::string loss(const LossCase& given, int threads) {
    const int64_t logits = given.rows * given.classes, activations = given.rows * given.neurons;
    const Buffer student = numbers(given.type, logits, 1), teacher = numbers(given.type, logits, 2);
    const Buffer activation = numbers(given.type, activations, 3);
    Buffer labels(given.rows * 8), logits_gradient(logits * size_of(given.type));
    Buffer gradient(activations * size_of(given.type)), statistics(statistics_rows * given.neurons * 8);
    Buffer value(8), terms(32);
    for (int64_t row = 0; row < given.rows; ++row) labels.as<int64_t>()[row] = row % 5 ? row % given.classes : -100;

    const ActivationLayer layer{{activation.as<void>(), given.type, given.neurons},
                                given.rows,
                                given.neurons,
                                double(given.rows),
                                1e-3,
                                gradient.as<void>(),
                                given.statistics ? statistics.as<double>() : nullptr};
    KdL1Loss job{};
    job.rows = given.rows, job.classes = given.classes;
    job.student = {student.as<void>(), given.type, given.classes};
    job.teacher = {teacher.as<void>(), given.type, given.classes};
    job.labels = labels.as<int64_t>();
    job.activations = {&layer, given.neurons ? 1 : 0, given.neurons};
    job.temperature = 4, job.alpha = 0.5, job.label_smoothing = 0.1, job.ignore_index = -100;
    job.divergence = given.divergence, job.mixture = {0.5, 0.5, 0.5};
    job.dkd_target_weight = 1, job.dkd_non_target_weight = 8;
    job.standardize_logits = given.standardize;
    job.logits_gradient = logits_gradient.as<void>();
    job.result_type = given.type == ElementType::float64 ? ElementType::float64 : ElementType::float32;
    job.loss = value.as<void>(), job.terms = terms.as<void>();
    job.threads = threads;
    const Buffer workspace(kd_l1_loss_workspace(job));
    job.workspace = workspace.as<void>();
    if (kd_l1_loss(job).code != Status::ok) return "an error";
    return value.bytes() + terms.bytes() + logits_gradient.bytes() + gradient.bytes() + statistics.bytes();
}

std::string gather(int64_t rows, int64_t columns, int threads) {
    const Buffer weight = numbers(ElementType::float32, rows * columns, 4);
    const Buffer bias = numbers(ElementType::float32, rows, 5), means = numbers(ElementType::float64, columns / 2, 6);
    Buffer keep(columns * 8), pruned(columns * 8);
    int64_t kept = 0, removed = 0;
    for (int64_t column = 0; column < columns; ++column)
        column % 3 ? keep.as<int64_t>()[kept++] = column : pruned.as<int64_t>()[removed++] = column;
    Buffer small(rows * kept * 4), shift(rows * 8);
    const Block block{weight.as<void>(), columns * 4, 4, small.as<void>()};
    GatherSlices job{};
    job.blocks = &block, job.block_count = 1, job.columns = columns, job.kept_rows = rows;
    job.keep_columns = keep.as<int64_t>(), job.kept_columns = kept;
    job.compensation = {ElementType::float32, pruned.as<int64_t>(), removed, means.as<double>(), shift.as<double>()};
    job.threads = threads;
    gather_slices(job);
    return small.bytes() + shift.bytes();
}

// Entries of `after` elements, and runs of all entries.
std::string products(int64_t samples, int64_t runs, int64_t entries, int64_t after, int threads) {
    const int64_t elements = samples * runs * entries * after;
    const Buffer activation = numbers(ElementType::bfloat16, elements, 7);
    const Buffer gradient = numbers(ElementType::bfloat16, elements, 8);
    const Buffer mean = numbers(ElementType::float64, entries, 9), sums(samples * entries * 4);
    gradient_products({activation.as<void>(), gradient.as<void>(), ElementType::bfloat16, mean.as<double>(),
                       sums.as<void>(), samples, runs, entries, after, threads});
    return sums.bytes();
}

std::vector<std::function<std::string(int)>> jobs(std::vector<std::string>& names) {
    constexpr ElementType types[] = {ElementType::float32, ElementType::float64, ElementType::bfloat16,
                                     ElementType::float16};
    const LossCase cases[] = {
        {"many rows", 300, 10, 70, types[0], Divergence::forward_kl, false, true},
        {"partial statistics", 700, 3, 130, types[0], Divergence::forward_kl, false, true},
        {"no statistics", 65, 33, 257, types[0], Divergence::reverse_kl, false, false},
        {"standardised", 40, 100, 5, types[0], Divergence::forward_kl, true, true},
        {"one row of many chunks", 1, 60000, 3, types[0], Divergence::forward_kl, false, true},
        {"fewer rows than threads", 3, 50001, 0, types[0], Divergence::mixture, false, false},
        {"symmetric", 33, 100, 0, types[0], Divergence::symmetric_kl, true, false},
        {"fewer rows, standardised", 2, 40000, 9, types[0], Divergence::dkd, true, true},
    };
    std::vector<std::function<std::string(int)>> made;
    for (const ElementType type : types)
        for (LossCase each : cases) {
            each.type = type;
            names.emplace_back(std::string(each.name) + ", element type " + std::to_string(int(type)));
            made.emplace_back([each](int threads) { return loss(each, threads); });
        }
    names.emplace_back("gather");
    made.emplace_back([](int threads) { return gather(500, 1200, threads); });
    names.emplace_back("products of long entries");
    made.emplace_back([](int threads) { return products(5, 2, 13, 700, threads); });
    names.emplace_back("products of short entries");
    made.emplace_back([](int threads) { return products(150, 3, 1500, 2, threads); });
    return made;
}

}  // namespace

int main() {
    std::vector<std::string> names, expected;
    const auto all = jobs(names);
    int different = 0, runs = 0;
    const auto compare = [&](size_t i, const std::string& got, const char* how) {
        ++runs;
        if (got == expected[i]) return;
        std::printf("%s: another result %s\n", names[i].c_str(), how), ++different;
    };
    for (const auto& job : all) expected.push_back(job(1));
    for (const int threads : {2, 3, 7})
        for (size_t i = 0; i < all.size(); ++i) compare(i, all[i](threads), "on several threads");

    std::vector<std::string> results(all.size());
    std::vector<std::thread> callers;
    for (size_t i = 0; i < all.size(); ++i) callers.emplace_back([&, i] { results[i] = all[i](2); });
    for (std::thread& caller : callers) caller.join();
    for (size_t i = 0; i < all.size(); ++i) compare(i, results[i], "from callers at once");
    std::printf("%d jobs on several threads, %d different\n", runs, different);
    return different != 0;
}
