// The compaction on the CPU: one parallel loop over the kept rows of each tensor.
//
// Memory decides its speed. So a row is read once, while the next one is already asked for; large outputs are written
// past the caches, and in huge pages where they are fresh. The pruned columns of a row are summed while it is in the
// first-level cache.
#include "cpu/gather_row.h"
#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/sizes.h"
#include "kddp/gather_slices.h"

namespace kddp {
namespace {

// Below this many bytes a team of threads costs more than it saves.
constexpr int64_t bytes_worth_threads = 1 << 18;
// Above it the caches hold no output until it is read.
constexpr int64_t bytes_worth_passing_caches = 8 << 20;

int64_t elements_of_column(const GatherSlices& job) {
    return job.blocks[0].column_bytes / size_of(job.compensation.type);
}

// What is prepared once for all rows, in the workspace: the choice of columns in each tensor, and of the pruned ones.
class Preparation {
  public:
    explicit Preparation(const GatherSlices& job) : job_(job) {
        means_offset_ = round_up_to_line(job.block_count * int64_t(sizeof(ColumnChoice)));
        const int64_t means =
            job.compensation.pruned_columns ? job.compensation.pruned_count * elements_of_column(job) : 0;
        bits_offset_ = means_offset_ + round_up_to_line(means * int64_t(sizeof(double)));
    }

    int64_t bytes() const {
        int64_t all = bits_offset_;
        for (int64_t i = 0; i < job_.block_count; ++i) all += bits_bytes(job_.columns, job_.blocks[i].column_bytes);
        if (job_.compensation.pruned_columns) all += bits_bytes(job_.columns, job_.blocks[0].column_bytes);
        return all;
    }

    void prepare() {
        int64_t offset = bits_offset_;
        const auto choose = [&](const int64_t* columns, int64_t count, int64_t column_bytes) {
            void* memory = at<char>(offset);
            offset += bits_bytes(job_.columns, column_bytes);
            return choose_columns(columns, count, job_.columns, column_bytes, memory);
        };
        for (int64_t i = 0; i < job_.block_count; ++i) {
            // Tensors of one type share a choice.
            const bool same = i > 0 && job_.blocks[i].column_bytes == job_.blocks[i - 1].column_bytes;
            at<ColumnChoice>(0)[i] =
                same ? kept(i - 1) : choose(job_.keep_columns, job_.kept_columns, job_.blocks[i].column_bytes);
        }
        const Compensation& wanted = job_.compensation;
        if (!wanted.pruned_columns) return;
        pruned_ = choose(wanted.pruned_columns, wanted.pruned_count, job_.blocks[0].column_bytes);
        for (int64_t p = 0, elements = elements_of_column(job_); p < wanted.pruned_count; ++p)
            for (int64_t k = 0; k < elements; ++k) at<double>(means_offset_)[p * elements + k] = wanted.means[p];
    }

    const ColumnChoice& kept(int64_t block) const { return at<ColumnChoice>(0)[block]; }
    const ColumnChoice& pruned() const { return pruned_; }
    const double* means() const { return at<double>(means_offset_); }  // of each element of a pruned column

  private:
    template <class T>
    T* at(int64_t offset) const {
        return reinterpret_cast<T*>(static_cast<char*>(job_.workspace) + offset);
    }

    const GatherSlices& job_;
    int64_t means_offset_, bits_offset_;
    ColumnChoice pruned_{};
};

template <class Element>
double contribution(const char* row, const Preparation& prepared) {
    Contribution<Element> sink(prepared.means());
    gather_row(row, row, prepared.pruned(), sink);
    return sink.sum();
}

double contribution(const char* row, ElementType type, const Preparation& prepared) {
    switch (type) {
        case ElementType::float64:
            return contribution<double>(row, prepared);
        case ElementType::bfloat16:
            return contribution<BFloat16>(row, prepared);
        case ElementType::float16:
            return contribution<Float16>(row, prepared);
        default:
            return contribution<float>(row, prepared);
    }
}

const char* source_row(const GatherSlices& job, const Block& block, int64_t row) {
    const int64_t last = job.kept_rows - 1, kept = row < last ? row : last;
    return static_cast<const char*>(block.source) + (job.keep_rows ? job.keep_rows[kept] : kept) * block.row_stride;
}

void compact_row(const GatherSlices& job, const Preparation& prepared, int64_t number, int64_t row, bool past_caches) {
    const Block& block = job.blocks[number];
    const char* from = source_row(job, block, row);
    if (job.kept_columns > 0) {  // else there is no target
        TargetRow target(static_cast<char*>(block.target) + row * job.kept_columns * block.column_bytes, past_caches);
        gather_row(from, source_row(job, block, row + 1), prepared.kept(number), target);
    }
    if (number == 0 && job.compensation.pruned_columns)
        job.compensation.shift[row] = contribution(from, job.compensation.type, prepared);
}

int64_t workspace(const GatherSlices& job) { return Preparation(job).bytes(); }

void gather(const GatherSlices& job) {
    int64_t read = 0, written = 0;
    for (int64_t i = 0; i < job.block_count; ++i) {
        const Block& block = job.blocks[i];
        const int64_t bytes = job.kept_rows * job.kept_columns * block.column_bytes;
        advise_huge_pages(block.target, bytes);
        written += bytes;
        read += job.kept_rows * job.columns * block.column_bytes;
    }
    const bool past_caches = written >= bytes_worth_passing_caches;
    Preparation prepared(job);
    prepared.prepare();
    [[maybe_unused]] const bool worth_threads = job.threads > 1 && read > bytes_worth_threads;  // unused without OpenMP
#pragma omp parallel num_threads(job.threads) if (worth_threads)
    {
        for (int64_t i = 0; i < job.block_count; ++i) {
            // A thread's rows lie side by side, so that two threads rarely first touch the same huge page.
#pragma omp for schedule(static) nowait
            for (int64_t row = 0; row < job.kept_rows; ++row) compact_row(job, prepared, i, row, past_caches);
        }
        finish_streams();
    }
}

}  // namespace

// The name comes from the build: the instruction set's.
const CompactionKernels KDDP_ISA_COMPACTION = {workspace, gather};

}  // namespace kddp
