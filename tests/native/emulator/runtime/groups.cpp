// Accesses of a warp that happen together, and what they cost: sectors of global memory, bank conflicts of shared
// memory.
#include <algorithm>
#include <functional>

#include "state.h"

namespace emulator {

namespace {

struct Access {
    Site site;
    unsigned bytes;
    bool is_store, is_shared;
};

// Places of accesses are numbered as they are first met.
std::vector<Access> accesses;
std::vector<int> table(1024, -1);

size_t slot_of(const Access& access) {
    const size_t key = reinterpret_cast<size_t>(access.site.file) / 8 + size_t(access.site.line) * 0x9e3779b1u +
                       access.bytes * 0x85ebca6bu + access.is_store * 0xc2b2ae35u + access.is_shared * 0x27d4eb2fu;
    size_t slot = (key ^ key >> 15) & (table.size() - 1);
    while (table[slot] >= 0) {
        const Access& other = accesses[size_t(table[slot])];
        if (other.site.file == access.site.file && other.site.line == access.site.line && other.bytes == access.bytes &&
            other.is_store == access.is_store && other.is_shared == access.is_shared)
            break;
        slot = (slot + 1) & (table.size() - 1);
    }
    return slot;
}

unsigned count_sectors(const Group& group) {
    uint64_t sectors[32];
    unsigned count = 0;
    for (unsigned left = group.lanes; left; left &= left - 1) {
        const uint64_t sector = group.addresses[size_t(__builtin_ctz(left))] / 32;
        if (count == 0 || sector != sectors[count - 1]) sectors[count++] = sector;
    }
    std::sort(sectors, sectors + count);
    return unsigned(std::unique(sectors, sectors + count) - sectors);
}

// Cycles beyond the first: in a cycle each of the 32 banks gives one word of 4 bytes, to all who want it. An access of
// 8 bytes takes two phases of half a warp, one of 16 bytes four.
unsigned count_conflicts(const Group& group, unsigned bytes) {
    const int phases = bytes <= 4 ? 1 : bytes <= 8 ? 2 : 4, lanes = 32 / phases;
    unsigned conflicts = 0;
    for (int phase = 0; phase < phases; ++phase) {
        uint64_t words[32][32];
        unsigned of_bank[32] = {}, most = 0;
        for (int lane = phase * lanes; lane < (phase + 1) * lanes; ++lane) {
            if (!(group.lanes & bit(lane))) continue;
            const uint64_t first = group.addresses[size_t(lane)] / 4,
                           last = (group.addresses[size_t(lane)] + bytes - 1) / 4;
            for (uint64_t word = first; word <= last; ++word) {
                const unsigned bank = unsigned(word % 32);
                uint64_t* const end = words[bank] + of_bank[bank];
                if (std::find(words[bank], end, word) == end) *end = word, ++of_bank[bank];
                most = std::max(most, of_bank[bank]);
            }
        }
        conflicts += most ? most - 1 : 0;
    }
    return conflicts;
}

void count_group(const Group& group, size_t number) {
    const Access& access = accesses[number];
    auto& sites = launching->sites;
    if (sites.size() <= number) sites.resize(number + 1);
    SiteReport& counted = sites[number];
    ++counted.accesses;
    counted.bytes += access.bytes * unsigned(__builtin_popcount(group.lanes));
    if (access.is_shared)
        counted.bank_conflicts += count_conflicts(group, access.bytes);
    else
        counted.sectors += count_sectors(group);
}

}  // namespace

int site_number(Site site, size_t bytes, bool is_store, bool is_shared) {
    const Access access{site, unsigned(bytes), is_store, is_shared};
    size_t slot = slot_of(access);
    if (table[slot] >= 0) return table[slot];
    if (accesses.size() * 2 > table.size()) {
        table.assign(table.size() * 4, -1);
        for (size_t i = 0; i < accesses.size(); ++i) table[slot_of(accesses[i])] = int(i);
        slot = slot_of(access);
    }
    accesses.push_back(access);
    return table[slot] = int(accesses.size()) - 1;
}

Site site_of(int number) { return accesses[size_t(number)].site; }

void add_to_group(Warp& warp, int site, int lane, uint64_t address) {
    const size_t number = size_t(site), which = size_t(lane);
    if (warp.groups.size() <= number) warp.groups.resize(number + 1);
    Groups& groups = warp.groups[number];
    if (!groups.in_use) groups.in_use = true, warp.used_groups.push_back(site);
    const size_t index = groups.counts[which]++ - groups.first;
    if (index >= groups.open.size()) groups.open.resize(index + 1);
    Group& group = groups.open[index];
    group.lanes |= bit(lane);
    group.addresses[which] = address;
    // Where all lanes have come, or one is far ahead of the others, the oldest are done with.
    constexpr size_t most_open = 4096;
    const unsigned alive = ~warp.exited;
    if (index == 0 && (group.lanes & alive) == alive) {
        size_t done = 0;
        for (; done < groups.open.size() && (groups.open[done].lanes & alive) == alive; ++done)
            count_group(groups.open[done], number);
        groups.open.erase(groups.open.begin(), groups.open.begin() + std::ptrdiff_t(done));
        groups.first += uint32_t(done);
    } else if (index >= most_open) {
        close_groups(warp);
    }
}

void close_groups(Warp& warp) {
    for (const int site : warp.used_groups) {
        Groups& groups = warp.groups[size_t(site)];
        for (const Group& group : groups.open)
            if (group.lanes) count_group(group, size_t(site));
        groups.open.clear();
        groups.counts.fill(0);
        groups.first = 0;
        groups.in_use = false;
    }
    warp.used_groups.clear();
}

std::vector<SiteReport> counted_sites(const Launch& launch) {
    std::vector<SiteReport> counted;
    for (size_t i = 0; i < launch.sites.size(); ++i) {
        if (!launch.sites[i].accesses) continue;
        SiteReport site = launch.sites[i];
        site.file = accesses[i].site.file, site.line = accesses[i].site.line;
        site.shared = accesses[i].is_shared, site.is_store = accesses[i].is_store;
        site.bytes_of_thread = accesses[i].bytes;
        counted.push_back(site);
    }
    return counted;
}

}  // namespace emulator
