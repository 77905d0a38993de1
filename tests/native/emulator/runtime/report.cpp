// Reports of launches, and a C interface to all settings, for ctypes.
#include <cstdio>
#include <deque>
#include <mutex>

#include "emulated/host_functions.h"
#include "state.h"

namespace emulator {

namespace {

constexpr size_t most_reports = 512;
std::deque<Report> kept;
std::mutex guard_of_reports;

std::string quoted(const std::string& text) {
    std::string result = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') result += '\\';
        if (static_cast<unsigned char>(c) < 32) {
            char code[8];
            std::snprintf(code, sizeof code, "\\u%04x", c);
            result += code;
        } else {
            result += c;
        }
    }
    return result + '"';
}

// A JSON object, written member by member.
class Object {
  public:
    Object& add(const char* name, const std::string& text) { return raw(name, quoted(text)); }
    Object& add(const char* name, uint64_t value) { return raw(name, std::to_string(value)); }
    Object& add(const char* name, const dim3& v) {
        return raw(name, "[" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + "]");
    }
    Object& raw(const char* name, const std::string& json) {
        text_ += (text_.empty() ? "{" : ", ") + quoted(name) + ": " + json;
        return *this;
    }
    std::string text() const { return text_ + "}"; }

  private:
    std::string text_;
};

template <class List, class Write>
std::string list_of(const List& list, Write write) {
    std::string text = "[";
    for (const auto& item : list) text += (text.size() > 1 ? ", " : "") + write(item);
    return text + "]";
}

std::string json_of(const SiteReport& site) {
    return Object()
        .add("file", site.file)
        .add("line", uint64_t(site.line))
        .raw("shared", site.shared ? "true" : "false")
        .raw("is_store", site.is_store ? "true" : "false")
        .add("bytes_of_thread", site.bytes_of_thread)
        .add("accesses", site.accesses)
        .add("sectors", site.sectors)
        .add("bytes", site.bytes)
        .add("bank_conflicts", site.bank_conflicts)
        .text();
}

std::string json_of(const Report& report) {
    return Object()
        .add("kernel", report.kernel)
        .add("grid", report.grid)
        .add("block", report.block)
        .add("dynamic_shared", report.dynamic_shared)
        .add("static_shared", report.static_shared)
        .add("seed", report.seed)
        .add("device", uint64_t(report.device))
        .add("stream", report.stream)
        .raw("cooperative", report.cooperative ? "true" : "false")
        .add("sectors_read", report.sectors_read)
        .add("sectors_written", report.sectors_written)
        .add("bytes_read", report.bytes_read)
        .add("bytes_written", report.bytes_written)
        .add("needed_read", report.needed_read)
        .add("needed_written", report.needed_written)
        .add("accesses_read", report.accesses_read)
        .add("accesses_written", report.accesses_written)
        .add("shared_reads", report.shared_reads)
        .add("shared_writes", report.shared_writes)
        .add("bank_conflicts", report.bank_conflicts)
        .add("barriers", report.barriers)
        .add("warp_operations", report.warp_operations)
        .add("atomics", report.atomics)
        .add("fences", report.fences)
        .raw("sites", list_of(report.sites, [](const SiteReport& site) { return json_of(site); }))
        .text();
}

std::string json_of(const Call& call) {
    return Object()
        .add("name", call.name)
        .add("kernel", call.kernel)
        .add("device", uint64_t(call.device))
        .add("stream", call.stream)
        .add("grid", call.grid)
        .add("block", call.block)
        .add("shared", call.shared)
        .add("error", uint64_t(call.error))
        .text();
}

}  // namespace

void keep_report(Launch& launch) {
    Report& report = launch.report;
    report.sites = counted_sites(launch);
    for (const SiteReport& site : report.sites) {
        if (site.shared) {
            (site.is_store ? report.shared_writes : report.shared_reads) += site.accesses;
            report.bank_conflicts += site.bank_conflicts;
            continue;
        }
        (site.is_store ? report.sectors_written : report.sectors_read) += site.sectors;
        (site.is_store ? report.bytes_written : report.bytes_read) += site.bytes;
        (site.is_store ? report.accesses_written : report.accesses_read) += site.accesses;
    }
    const std::scoped_lock lock(guard_of_reports);
    if (kept.size() == most_reports) kept.pop_front();
    kept.push_back(std::move(report));
}

std::vector<Report> reports() {
    const std::scoped_lock lock(guard_of_reports);
    return {kept.begin(), kept.end()};
}
void clear_reports() {
    const std::scoped_lock lock(guard_of_reports);
    kept.clear();
}

const char* guarded(const std::function<void()>& run) {
    static thread_local std::string text;
    try {
        run();
        return nullptr;
    } catch (const std::exception& error) {
        text = error.what();
        return text.c_str();
    }
}

}  // namespace emulator

// Texts stay valid until the next call in the same thread.
extern "C" {
void emulator_set_seed(uint64_t seed) { emulator::set_seed(seed); }
uint64_t emulator_seed() { return emulator::seed(); }
void emulator_set_shuffles_order(int order) { emulator::set_shuffles_order(order != 0); }
void emulator_set_devices(int count, int multiprocessors) { emulator::set_devices(count, multiprocessors); }
int emulator_set_device(int device) { return cudaSetDevice(device); }
int emulator_device() {
    int device = -1;
    cudaGetDevice(&device);
    return device;
}
int emulator_last_error() { return cudaGetLastError(); }
void emulator_allow(const void* address, size_t bytes, int writable, const char* name) {
    emulator::allow(address, bytes, writable != 0, name);
}
void emulator_allow_everything() { emulator::allow_everything(); }
void emulator_needs(const void* address, size_t bytes, int is_store, int checked) {
    emulator::needs(address, bytes, is_store != 0, checked != 0);
}
void emulator_clear() {
    emulator::clear_reports();
    emulator::clear_calls();
}
const char* emulator_reports() {
    static thread_local std::string text;
    text = emulator::list_of(emulator::reports(),
                             [](const emulator::Report& report) { return emulator::json_of(report); });
    return text.c_str();
}
const char* emulator_calls() {
    static thread_local std::string text;
    text = emulator::list_of(emulator::calls(), [](const emulator::Call& call) { return emulator::json_of(call); });
    return text.c_str();
}
}
