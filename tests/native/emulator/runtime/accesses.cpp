// Counts the accesses of warps: sectors of global memory and bank conflicts of shared memory. Keeps the reports.
#include <algorithm>
#include <deque>

#include "state.h"

namespace emulator {

std::deque<Report> reports;

namespace {

constexpr size_t max_reports = 512;

struct AccessSite {
    Site site;
    unsigned bytes;
    bool is_store, is_shared;
};

bool operator==(const AccessSite& a, const AccessSite& b) {
    return a.site.file == b.site.file && a.site.line == b.site.line && a.bytes == b.bytes && a.is_store == b.is_store &&
           a.is_shared == b.is_shared;
}

struct Hash {
    size_t operator()(const AccessSite& access) const {
        return reinterpret_cast<size_t>(access.site.file) + size_t(access.site.line) * 64 + access.bytes * 4 +
               access.is_store * 2 + access.is_shared;
    }
};

// Sites are numbered in the order in which they are first met.
std::vector<AccessSite> access_sites;
std::unordered_map<AccessSite, int, Hash> numbers;

unsigned count_sectors(const WarpAccess& access) {
    uint64_t sectors[32];
    unsigned count = 0;
    for (unsigned left = access.lanes; left; left &= left - 1) {
        const uint64_t sector = access.addresses[size_t(__builtin_ctz(left))] / 32;
        if (count == 0 || sector != sectors[count - 1]) sectors[count++] = sector;
    }
    std::sort(sectors, sectors + count);
    return unsigned(std::unique(sectors, sectors + count) - sectors);
}

// Cycles beyond the first: per cycle, each of the 32 banks serves one word of 4 bytes, to all lanes that want it. An
// access of 8 bytes takes two phases of half a warp, one of 16 bytes four.
unsigned count_conflicts(const WarpAccess& access, unsigned bytes) {
    const int phases = bytes <= 4 ? 1 : bytes <= 8 ? 2 : 4, lanes = 32 / phases;
    unsigned conflicts = 0;
    for (int phase = 0; phase < phases; ++phase) {
        uint64_t words[32][32];
        unsigned counts[32] = {}, highest = 0;
        for (int lane = phase * lanes; lane < (phase + 1) * lanes; ++lane) {
            if (!(access.lanes & bit(lane))) continue;
            const uint64_t address = access.addresses[size_t(lane)];
            for (uint64_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
                const unsigned bank = unsigned(word % 32);
                uint64_t* const end = words[bank] + counts[bank];
                if (std::find(words[bank], end, word) == end) *end = word, ++counts[bank];
                highest = std::max(highest, counts[bank]);
            }
        }
        conflicts += highest ? highest - 1 : 0;
    }
    return conflicts;
}

void count_access(const WarpAccess& access, size_t number) {
    const AccessSite& site = access_sites[number];
    auto& sites = launching->sites;
    if (sites.size() <= number) sites.resize(number + 1);
    ++sites[number].accesses;
    if (site.is_shared)
        sites[number].bank_conflicts += count_conflicts(access, site.bytes);
    else
        sites[number].sectors += count_sectors(access);
}

}  // namespace

int site_number(Site site, size_t bytes, bool is_store, bool is_shared) {
    const AccessSite access{site, unsigned(bytes), is_store, is_shared};
    const auto [entry, is_new] = numbers.try_emplace(access, int(access_sites.size()));
    if (is_new) access_sites.push_back(access);
    return entry->second;
}

Site site_of(int number) { return access_sites[size_t(number)].site; }

void add_access(Warp& warp, int site, int lane, uint64_t address) {
    const size_t number = size_t(site);
    if (warp.accesses.size() <= number) warp.accesses.resize(number + 1);
    SiteAccesses& accesses = warp.accesses[number];
    if (!accesses.in_use) accesses.in_use = true, warp.used_sites.push_back(site);
    const size_t index = accesses.counts[size_t(lane)]++ - accesses.first;
    if (index >= accesses.open.size()) accesses.open.resize(index + 1);
    WarpAccess& access = accesses.open[index];
    access.lanes |= bit(lane);
    access.addresses[size_t(lane)] = address;
    // The oldest accesses are complete once all lanes have made them. A lane that is far ahead of the others closes
    // all.
    constexpr size_t max_open = 4096;
    const unsigned alive = ~warp.exited;
    if (index == 0 && (access.lanes & alive) == alive) {
        size_t complete = 0;
        for (; complete < accesses.open.size() && (accesses.open[complete].lanes & alive) == alive; ++complete)
            count_access(accesses.open[complete], number);
        accesses.open.erase(accesses.open.begin(), accesses.open.begin() + std::ptrdiff_t(complete));
        accesses.first += uint32_t(complete);
    } else if (index >= max_open) {
        close_accesses(warp);
    }
}

void close_accesses(Warp& warp) {
    for (const int site : warp.used_sites) {
        SiteAccesses& accesses = warp.accesses[size_t(site)];
        for (const WarpAccess& access : accesses.open)
            if (access.lanes) count_access(access, size_t(site));
        accesses.open.clear();
        accesses.counts.fill(0);
        accesses.first = 0;
        accesses.in_use = false;
    }
    warp.used_sites.clear();
}

void keep_report(Launch& launch) {
    Report& report = launch.report;
    for (size_t i = 0; i < launch.sites.size(); ++i) {
        SiteReport& site = launch.sites[i];
        if (!site.accesses) continue;
        site.file = access_sites[i].site.file, site.line = access_sites[i].site.line;
        site.shared = access_sites[i].is_shared, site.is_store = access_sites[i].is_store;
        if (site.shared)
            (site.is_store ? report.shared_writes : report.shared_reads) += site.accesses;
        else
            (site.is_store ? report.sectors_written : report.sectors_read) += site.sectors;
        report.bank_conflicts += site.bank_conflicts;
        report.sites.push_back(site);
    }
    if (reports.size() == max_reports) reports.pop_front();
    reports.push_back(std::move(report));
}

}  // namespace emulator
