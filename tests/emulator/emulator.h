// Runs device code on the CPU: every thread of a launch is a fiber, warps and blocks are scheduled in a random order,
// and what waits for others in hardware (collectives of a warp, barriers, asynchronous copies) waits here. Put before
// the emitted source, which a C++ compiler of the host then takes; ptx.cuh beside this file stands in for the device's.
//
// What it finds: wrong arithmetic and addresses, lanes of a warp that part, accesses outside of shared memory or not
// aligned, races in shared memory (races.h), deadlocks, slots read before their copy has landed or after they were
// given back (copies land late, in any order, on poisoned memory). What it cannot find: reorderings of a weak memory
// model, since all stores are seen at once.
#pragma once

#include <map>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tuple>
#include <type_traits>
#include <unistd.h>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

namespace emulator {

constexpr uint32_t kWarpLanes = 32, kBarriers = 16;
constexpr size_t kStackBytes = 128 << 10;
constexpr uint32_t kSharedBase = 1024;             // shared address 0 belongs to nobody
constexpr uint64_t kTickNs = 100;                  // of the virtual clock; a tick is a turn of one warp
constexpr uint32_t kPause = 16, kLongPause = 4096; // turns that a warp lets pass after a poll that found nothing,
constexpr uint32_t kPatience = 500 * 32;           // and after so many of them
constexpr uint32_t kTurnsPerStall = 50, kLongestStall = 400; // now and then a warp stands still, wherever it is
constexpr uint32_t kTurnsPerStore = 8;                       // stores that may be seen late are looked at that seldom
constexpr uint8_t kPoison = 0xff;                            // NaN in bf16 and fp32

struct Dim {
    uint32_t x, y, z;
};

// What a lane brings to a collective of its warp, and takes from it.
struct Words {
    uint32_t of[12];
};
using Combine = void(const Words *in, Words *out, uint32_t lanes);

struct Copy {
    uint8_t *to;
    const void *from;
    uint32_t bytes;
};

// A product on the tensor cores of a warpgroup that is under way, as one lane sees it. What it reads belongs to it.
struct Product {
    const uint32_t *a; // the lane's left operand, in registers
    float *sums;
    uint32_t columns;
    uint64_t b; // descriptor of the right operand
    bool last;  // of its commit
};
struct Sums {
    float *of;                 // in registers, where they are poisoned meanwhile
    std::vector<float> values; // what they will be
};

#include "races.h"

struct Block;
struct Warp;
static uint32_t draw(uint32_t below);

struct Thread {
    void *stack_pointer = nullptr;
    uint8_t *stack = nullptr;
    uint32_t number = 0, lane = 0;
    Warp *warp = nullptr;
    Block *block = nullptr;
    std::vector<Copy> copies;                   // cp.async that it has not waited for,
    std::vector<std::vector<Copy>> copy_groups; // and those before, by their commits
    std::vector<Product> products;              // those that nobody has waited for, the oldest first
    std::vector<Sums> sums;                     // of these
    uint32_t syncs = 0;                         // of its warp, and barriers, that it has come to
    std::pair<uint32_t, uint32_t> missed;       // mbarrier and parity of the phase that it just looked for in vain
    const void *polled_pointer = nullptr;       // the last one, and what it found
    uint32_t polled_value = 0;
};

struct Warp {
    uint32_t number = 0; // in its block
    Clock clock;
    Thread *lanes = nullptr;
    uint32_t alive = 0, ready = 0;
    uint32_t arrived = 0; // at the collective
    uint32_t vain = 0;    // polls of its lanes, one after the other
    uint64_t awake = 0;   // from this tick on
    Combine *combine = nullptr;
    Words in[kWarpLanes], out[kWarpLanes];
    struct Phase {
        uint32_t parity, lanes; // who has waited for it
    };
    std::map<uint32_t, Phase> phases; // the last that it saw of an mbarrier, as a consumer
};

struct Barrier {
    uint32_t expected = 0;
    std::vector<Thread *> arrived;
};

// A store that others see late, unless a fence comes before: of a value that tells by itself whether it is there.
struct LateStore {
    uint8_t *to;
    uint32_t bytes;
    uint8_t value[4];
};

struct Block {
    uint32_t index = 0;
    std::vector<uint8_t> memory; // shared
    uint8_t *shared = nullptr;
    uint32_t shared_bytes = 0;
    Word *words = nullptr;            // of it; NULL: nobody looks for races
    std::map<uint32_t, Clock> clocks; // of mbarriers, by address: of all who have arrived
    Clock fenced;                     // of all who have passed a fence
    Barrier barriers[kBarriers];
    std::vector<LateStore> late; // in their order
};

// A copy that is under way, and the arrival or the bytes that its barrier gets once it has landed.
struct Flight {
    std::vector<Copy> copies;
    Block *block;
    uint32_t barrier, arrivals, bytes;
    uint64_t due; // tick
    Clock told;   // of the warp that started it: whoever waits for the barrier knows it once the copies have landed
};

struct Launch {
    Dim grid, dim;
    std::vector<Block> blocks;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<Flight> flights;
    bool gave_up = false;          // one of its waits
    std::vector<uint8_t *> stacks; // that are free
    uint8_t *stack_memory = nullptr;
    size_t stack_bytes = 0;
    size_t alive = 0;
    uint64_t tick = 0, random = 1;
    uint32_t copy_turns = 1;     // an asynchronous copy lands within as many
    uint32_t yield_accesses = 1; // others get a turn after about as many accesses to shared memory
    bool eager_products = false; // products of a warpgroup are done when they are committed, not when waited for
    void *scheduler = nullptr;   // its stack pointer
    void (*body)(void *context) = nullptr;
    void *context = nullptr;
};

static Launch *launch;
static Thread *self;

[[noreturn]] static void fail(const char *what) {
    if (self && self->block)
        fprintf(stderr, "emulator: block %u, thread %u: %s\n", self->block->index, self->number, what);
    else
        fprintf(stderr, "emulator: %s\n", what);
    abort();
}

static uint32_t draw(uint32_t below) {
    uint64_t &x = launch->random;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return uint32_t((x >> 32) * below >> 32);
}

// ---- fibers ----

#if defined(__x86_64__)
extern "C" void perk_emulator_switch(void **from, void *to);
asm(".text\n"
    ".type perk_emulator_switch, @function\n"
    "perk_emulator_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
static void switch_fiber(void **from, void *to) { perk_emulator_switch(from, to); }
static void *new_fiber(uint8_t *stack, void (*entry)()) {
    void **top = reinterpret_cast<void **>(stack + kStackBytes);
    top[-2] = reinterpret_cast<void *>(entry); // returned to, with the stack as behind a call
    return top - 8;                            // six registers below
}
#else
static void switch_fiber(void **from, void *to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t *>(to));
}
static void *new_fiber(uint8_t *stack, void (*entry)()) {
    ucontext_t *context = reinterpret_cast<ucontext_t *>(stack);
    getcontext(context);
    context->uc_stack.ss_sp = stack + sizeof *context;
    context->uc_stack.ss_size = kStackBytes - sizeof *context;
    makecontext(context, entry, 0);
    return context;
}
#endif

static void yield() { switch_fiber(&self->stack_pointer, launch->scheduler); }

// To be called by a poll, with what it found. Who waits in vain lets others run, and who does so for long, for long.
static bool polled(bool found) {
    Warp &warp = *self->warp;
    warp.vain = found ? 0 : warp.vain + 1;
    if (!found) warp.awake = launch->tick + 1 + draw(warp.vain < kPatience ? kPause : kLongPause);
    yield();
    return found;
}

// The warp lets as many turns pass.
static void sleep_ticks(uint64_t ticks) {
    self->warp->awake = launch->tick + 1 + ticks;
    yield();
}

// Now and then, so that what one warp does falls between any two accesses of another.
static void yield_sometimes() {
    if (launch && self->block && draw(launch->yield_accesses) == 0) yield();
}

// ---- collectives of a warp ----

static void complete(Warp &warp) {
    warp.combine(warp.in, warp.out, warp.alive);
    warp.arrived = 0;
    warp.ready = warp.alive;
}

static Words collect(Combine *combine, const Words &in) {
    Thread &t = *self;
    if (!t.warp) fail("a collective of a warp in a kernel that was not launched as cooperative");
    Warp &warp = *t.warp;
    if (warp.arrived == 0) warp.combine = combine;
    if (warp.combine != combine) fail("the lanes of a warp are at different collectives");
    warp.in[t.lane] = in;
    warp.arrived |= 1u << t.lane;
    if (warp.arrived == warp.alive) {
        complete(warp);
    } else {
        warp.ready &= ~(1u << t.lane);
        yield();
    }
    return warp.out[t.lane];
}

static void combine_nothing(const Words *, Words *, uint32_t) {}
static void combine_any(const Words *in, Words *out, uint32_t lanes) {
    uint32_t any = 0;
    for (uint32_t i = 0; i < kWarpLanes; i++)
        if (lanes >> i & 1 && in[i].of[0]) any = 1;
    for (uint32_t i = 0; i < kWarpLanes; i++) out[i].of[0] = any;
}
static void combine_ballot(const Words *in, Words *out, uint32_t lanes) {
    uint32_t ballot = 0;
    for (uint32_t i = 0; i < kWarpLanes; i++)
        if (lanes >> i & 1 && in[i].of[0]) ballot |= 1u << i;
    for (uint32_t i = 0; i < kWarpLanes; i++) out[i].of[0] = ballot;
}
// Word 1 says whose value is wanted; that of a lane which is gone is anything.
static void combine_shuffle(const Words *in, Words *out, uint32_t lanes) {
    for (uint32_t i = 0; i < kWarpLanes; i++) {
        const uint32_t source = in[i].of[1] % kWarpLanes;
        out[i].of[0] = lanes >> source & 1 ? in[source].of[0] : 0xffffffffu;
    }
}

static uint32_t shuffle(uint32_t mask, uint32_t value, uint32_t source) {
    if (mask != 0xffffffffu) fail("a shuffle among some lanes only is not emulated");
    return collect(combine_shuffle, Words{{value, source}}).of[0];
}

// Threads that have come together: each knows what all others did before.
static void meet(const std::vector<Thread *> &threads) {
    Clock all;
    for (Thread *t : threads) {
        t->syncs++;
        if (t->lane == 0 && t->warp->number < kMaxWarps) t->warp->clock.of[t->warp->number]++;
        all.join(t->warp->clock);
    }
    for (Thread *t : threads) t->warp->clock.join(all);
}

static void barrier(uint32_t name, uint32_t threads) {
    if (!self->warp || name >= kBarriers) fail("no such barrier");
    Barrier &b = self->block->barriers[name];
    if (b.arrived.empty()) b.expected = threads;
    if (b.expected != threads) fail("threads expect different numbers at a barrier");
    b.arrived.push_back(self);
    if (b.arrived.size() < threads) {
        self->warp->ready &= ~(1u << self->lane);
        yield();
        return;
    }
    meet(b.arrived);
    for (Thread *t : b.arrived) t->warp->ready |= 1u << t->lane;
    b.arrived.clear();
}

// ---- shared memory ----

static uint8_t *shared_at(Block &block, uint32_t address, uint32_t bytes) {
    if (address % bytes != 0) fail("an access to shared memory is not aligned");
    if (address < kSharedBase || address - kSharedBase + bytes > block.shared_bytes)
        fail("an access outside of the block's shared memory");
    return block.shared + (address - kSharedBase);
}

static bool comes_after(const Word::Seen &seen, uint32_t warp) {
    if (seen.lanes == 0) return true;
    if (warp != self->warp->number) return self->warp->clock.of[warp] > seen.clock;
    return self->syncs > seen.syncs || seen.lanes == 1u << self->lane;
}
static void see(Word::Seen &seen, uint32_t clock) {
    if (seen.clock != clock || seen.syncs != self->syncs) seen = {0, clock, self->syncs};
    seen.lanes |= 1u << self->lane;
}
static void look_for_race(Word &word, Access access) {
    if (launch->gave_up) return; // from then on the launch computes nonsense
    const uint32_t warp = self->warp->number, clock = self->warp->clock.of[warp];
    const bool stores = access != Access::load, both_atomic = access == Access::atomic && word.is_atomic;
    if (!both_atomic && !comes_after(word.store, word.store_warp))
        fail(stores ? "a race in shared memory: a store after a store"
                    : "a race in shared memory: a load after a store");
    if (!stores) return see(word.loads[warp], clock);
    for (uint32_t w = 0; w < kMaxWarps; w++)
        if (!comes_after(word.loads[w], w)) fail("a race in shared memory: a store after a load");
    for (Word::Seen &seen : word.loads) seen = {};
    word.store = {1u << self->lane, clock, self->syncs};
    word.store_warp = warp;
    word.is_atomic = access == Access::atomic;
}
// Words that are polled, whose stores and loads order themselves.
static uint32_t flags_begin = 0, flags_end = 0;

static void note(uint32_t address, uint32_t bytes, Access access) {
    const uint32_t begin = address - kSharedBase;
    if (!self->block->words || (begin >= flags_begin && begin < flags_end)) return;
    for (uint32_t at = begin / 4; at * 4 < begin + bytes; at++) look_for_race(self->block->words[at], access);
}

template <class T>
static T load_shared(uint32_t address) {
    yield_sometimes();
    note(address, sizeof(T), Access::load);
    T value;
    memcpy(&value, shared_at(*self->block, address, sizeof(T)), sizeof(T));
    return value;
}
template <class T>
static void store_shared(uint32_t address, const T &value) {
    yield_sometimes();
    note(address, sizeof(T), Access::store);
    memcpy(shared_at(*self->block, address, sizeof(T)), &value, sizeof(T));
}

template <class T>
static T load_global(const void *pointer) {
    if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) fail("a load from global memory is not aligned");
    T value;
    memcpy(&value, pointer, sizeof(T));
    return value;
}

// ---- stores that are seen late ----

// So many of the block's, the oldest first.
static void see_stores(Block &block, size_t count) {
    std::vector<LateStore> &late = block.late;
    for (size_t i = 0; i < count; i++) memcpy(late[i].to, late[i].value, late[i].bytes);
    late.erase(late.begin(), late.begin() + ptrdiff_t(count));
}
template <class T>
static void store_late(void *pointer, T v) {
    yield_sometimes();
    if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) fail("a store to global memory is not aligned");
    LateStore store{static_cast<uint8_t *>(pointer), sizeof(T), {}};
    memcpy(store.value, &v, sizeof(T));
    self->block->late.push_back(store);
}
static void pass_store_fence() { see_stores(*self->block, self->block->late.size()); }

// ---- mbarriers: in their 8 bytes of shared memory ----

struct Mbarrier {
    uint32_t total : 12, pending : 12, phase : 1;
    int32_t bytes; // expected and not there yet
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier has 8 bytes");

static Mbarrier *mbarrier_at(Block &block, uint32_t address) {
    return reinterpret_cast<Mbarrier *>(shared_at(block, address, 8));
}
static void mbarrier_change(Block &block, uint32_t address, uint32_t arrivals, int32_t expected, int32_t landed) {
    Mbarrier &b = *mbarrier_at(block, address);
    if (arrivals > b.pending) fail("more arrivals at an mbarrier than it was made for");
    b.bytes += expected - landed;
    b.pending -= arrivals;
    if (b.pending != 0 || b.bytes != 0) return;
    b.pending = b.total;
    b.phase ^= 1;
}
static bool mbarrier_has_completed(uint32_t address, uint32_t parity) {
    const bool found = mbarrier_at(*self->block, address)->phase != parity;
    if (found && self->warp) self->warp->clock.join(self->block->clocks[address]);
    return polled(found);
}
constexpr uint32_t kConsumerWarps = 8; // of a worker; others know of phases by other ways

// Parity tells a phase from its neighbours alone. So a consumer warp must see all phases of a barrier that it waits
// for, by one lane at least, or it takes one that is two behind for its own. (Who gives up looks for the phase before
// that which it waited for.)
static void look_for_phase(uint32_t address, uint32_t parity, bool found) {
    if (!self->warp || self->warp->number >= kConsumerWarps) return;
    if (self->missed == std::make_pair(address, parity ^ 1)) launch->gave_up = true;
    self->missed = {found ? 0 : address, parity};
    if (!found || launch->gave_up) return;
    Warp::Phase &seen = self->warp->phases.emplace(address, Warp::Phase{parity, 0}).first->second;
    if (seen.parity != parity) seen = {parity, 0};
    if (seen.lanes >> self->lane & 1) fail("a wait for a phase of an mbarrier that need not be the next one");
    seen.lanes |= 1u << self->lane;
}
// Before an arrival: whoever waits for it knows what the warp did so far.
static void tell_clock(uint32_t address) {
    if (!self->warp || self->warp->number >= kMaxWarps) return;
    self->warp->clock.of[self->warp->number]++;
    self->block->clocks[address].join(self->warp->clock);
}

// A fence on either side of a word that one polls and the other stores: who comes later knows what came before.
static void pass_fence() {
    if (!self->warp || self->warp->number >= kMaxWarps) return;
    self->warp->clock.of[self->warp->number]++;
    self->block->fenced.join(self->warp->clock);
    self->warp->clock.join(self->block->fenced);
}

// ---- asynchronous copies ----

static void land(const std::vector<Copy> &copies) {
    for (const Copy &c : copies) memcpy(c.to, c.from, c.bytes);
}

// From now on the target holds nothing that anybody may count on.
static Copy begin_copy(uint32_t shared, const void *global, uint32_t bytes, Access access) {
    yield_sometimes();
    if (reinterpret_cast<uintptr_t>(global) % (bytes < 16 ? bytes : 16) != 0)
        fail("the source of a copy is not aligned");
    shared_at(*self->block, shared, bytes < 16 ? bytes : 16);
    if (shared - kSharedBase + bytes > self->block->shared_bytes) fail("a copy runs out of shared memory");
    note(shared, bytes, access);
    uint8_t *to = self->block->shared + (shared - kSharedBase);
    memset(to, kPoison, bytes);
    return {to, global, bytes};
}
static void fly(std::vector<Copy> copies, uint32_t barrier, uint32_t arrivals, uint32_t bytes) {
    Flight flight{
        std::move(copies), self->block, barrier, arrivals, bytes, launch->tick + 1 + draw(launch->copy_turns), {}};
    if (self->warp && self->warp->number < kMaxWarps) {
        self->warp->clock.of[self->warp->number]++;
        flight.told = self->warp->clock;
    }
    launch->flights.push_back(std::move(flight));
}

// Lands what is due; `at_least_one`: the clock goes on to the next that is under way.
static bool land_flights(bool at_least_one) {
    std::vector<Flight> &flights = launch->flights;
    if (flights.empty()) return false;
    if (at_least_one) {
        uint64_t first = UINT64_MAX;
        for (const Flight &f : flights) first = f.due < first ? f.due : first;
        if (first > launch->tick) launch->tick = first;
    }
    for (size_t i = 0; i < flights.size();) {
        if (flights[i].due > launch->tick) {
            i++;
            continue;
        }
        Flight f = std::move(flights[i]);
        flights[i] = std::move(flights.back());
        flights.pop_back();
        land(f.copies);
        f.block->clocks[f.barrier].join(f.told);
        mbarrier_change(*f.block, f.barrier, f.arrivals, 0, int32_t(f.bytes));
    }
    return true;
}

// ---- the launch ----

[[noreturn]] static void end_thread() {
    Thread &t = *self;
    t.warp->alive &= ~(1u << t.lane);
    t.warp->ready &= ~(1u << t.lane);
    if (t.warp->alive && t.warp->arrived == t.warp->alive) complete(*t.warp);
    launch->alive--;
    launch->stacks.push_back(t.stack);
    yield();
    abort(); // nobody comes back
}
static void run_fiber() {
    launch->body(launch->context);
    end_thread();
}

static void run_lane(Warp &warp, uint32_t lane) {
    Thread &t = warp.lanes[lane];
    self = &t;
    if (!t.stack_pointer) {
        t.stack = launch->stacks.back();
        launch->stacks.pop_back();
        t.stack_pointer = new_fiber(t.stack, run_fiber);
    }
    switch_fiber(&launch->scheduler, t.stack_pointer);
    self = nullptr;
}

// A turn of one warp: every lane that was ready at its begin, from a random one on.
static void run_warp(Warp &warp) {
    const uint32_t ready = warp.ready, first = draw(kWarpLanes);
    for (uint32_t i = 0; i < kWarpLanes; i++) {
        const uint32_t lane = (first + i) % kWarpLanes;
        if (ready >> lane & 1 && warp.ready >> lane & 1) run_lane(warp, lane);
    }
}

// The next warp that may run, from a random one on; NULL: none. *next: when the first of the others wakes up.
static Warp *find_warp(uint64_t *next) {
    std::vector<Warp> &warps = launch->warps;
    size_t at = draw(uint32_t(warps.size()));
    *next = UINT64_MAX;
    for (size_t i = 0; i < warps.size(); i++, at++) {
        if (at == warps.size()) at = 0;
        Warp &warp = warps[at];
        if (warp.ready == 0) continue;
        if (warp.awake <= launch->tick) return &warp;
        if (warp.awake < *next) *next = warp.awake;
    }
    return nullptr;
}

// Of a block: all that it has stored so far, or a few.
static void see_some_stores() {
    Block &block = launch->blocks[draw(uint32_t(launch->blocks.size()))];
    const size_t count = block.late.size();
    if (count > 0) see_stores(block, draw(2) == 0 ? count : draw(uint32_t(count)) + 1);
}

static void schedule() {
    while (launch->alive > 0) {
        uint64_t next;
        launch->tick++;
        land_flights(false);
        if (draw(kTurnsPerStore) == 0) see_some_stores();
        Warp *warp = find_warp(&next);
        if (warp && draw(kTurnsPerStall) == 0)
            warp->awake = launch->tick + draw(kLongestStall);
        else if (warp)
            run_warp(*warp);
        else if (next != UINT64_MAX)
            launch->tick = next - 1;
        else if (!land_flights(true))
            fail("all threads wait at barriers and collectives that nobody completes");
    }
    while (land_flights(true)) {
    }
    for (Block &block : launch->blocks) see_stores(block, block.late.size());
}

static void make_threads(uint32_t shared_bytes) {
    const uint32_t count = launch->dim.x, blocks = launch->grid.x, warps = (count + kWarpLanes - 1) / kWarpLanes;
    launch->blocks.resize(blocks);
    launch->threads.resize(size_t(blocks) * warps * kWarpLanes);
    launch->warps.resize(size_t(blocks) * warps);
    launch->alive = size_t(blocks) * count;
    launch->stack_bytes = launch->alive * kStackBytes;
    void *memory =
        mmap(nullptr, launch->stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    launch->stack_memory = static_cast<uint8_t *>(memory);
    for (size_t i = launch->alive; i-- > 0;) launch->stacks.push_back(launch->stack_memory + i * kStackBytes);
    for (uint32_t b = 0; b < blocks; b++) {
        Block &block = launch->blocks[b];
        block.index = b;
        block.shared_bytes = shared_bytes;
        if (warps <= kMaxWarps) block.words = static_cast<Word *>(calloc((shared_bytes + 3) / 4, sizeof(Word)));
        block.memory.assign(shared_bytes + 1024, kPoison);
        block.shared =
            reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(block.memory.data()) + 1023) / 1024 * 1024);
        for (uint32_t i = 0; i < count; i++) {
            Warp &warp = launch->warps[b * warps + i / kWarpLanes];
            Thread &t = launch->threads[(size_t(b) * warps) * kWarpLanes + i];
            t.number = i;
            t.lane = i % kWarpLanes;
            warp.number = i / kWarpLanes;
            t.warp = &warp;
            t.block = &block;
            if (t.lane == 0) warp.lanes = &t;
            warp.alive = warp.ready |= 1u << t.lane;
        }
    }
}

// Every thread after the other: what kernels need in which threads share nothing.
static void run_plain(void (*body)(void *), void *context) {
    Block block;
    Thread t;
    t.block = &block;
    self = &t;
    for (block.index = 0; block.index < launch->grid.x; block.index++)
        for (t.number = 0; t.number < launch->dim.x; t.number++) body(context);
    self = nullptr;
}

static void run(Dim grid, Dim dim, uint32_t shared_bytes, bool cooperative, uint32_t number, void (*body)(void *),
                void *context) {
    Launch l;
    l.grid = grid;
    l.dim = dim;
    l.random = (number + 1) * 0x9e3779b97f4a7c15u;
    l.tick = uint64_t(number) << 32;
    l.body = body;
    l.context = context;
    launch = &l;
    for (int i = 0; i < 8; i++) draw(2); // near seeds part
    l.copy_turns = 4u << 3 * draw(4);    // with fast copies the ring is full, with slow ones it is empty
    l.yield_accesses = 3u << draw(5);
    l.eager_products = draw(2) == 0;
    if (cooperative) {
        make_threads(shared_bytes);
        schedule();
        munmap(l.stack_memory, l.stack_bytes);
        for (Block &block : l.blocks) free(block.words);
    } else {
        run_plain(body, context);
    }
    launch = nullptr;
}

// A kernel and its arguments, as the driver gets them.
template <class... A>
struct Call {
    void (*kernel)(A...);
    void **params;
    template <size_t... I>
    void make(std::index_sequence<I...>) const {
        kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<A>> *>(params[I])...);
    }
};
template <class... A>
static void call(void (*kernel)(A...), unsigned grid, unsigned block, unsigned shared, void **params, int cooperative,
                 unsigned number) {
    Call<A...> c{kernel, params};
    run(
        {grid, 1, 1}, {block, 1, 1}, shared, cooperative != 0, number,
        [](void *context) { static_cast<Call<A...> *>(context)->make(std::index_sequence_for<A...>{}); }, &c);
}

} // namespace emulator

// The entry that the driver looks for. `number`: of the launch; every one runs in an order of its own.
#define EMULATE(kernel)                                                                                                \
    extern "C" __attribute__((visibility("default"))) void emulate_##kernel(                                           \
        unsigned grid, unsigned block, unsigned shared, void **params, int cooperative, unsigned number) {             \
        emulator::call(kernel, grid, block, shared, params, cooperative, number);                                      \
    }

// A worker's flags: where its map of shared memory has them.
#define EMULATE_FLAGS(begin, end)                                                                                      \
    static const bool flags_are_known = (emulator::flags_begin = (begin), emulator::flags_end = (end), true)

// ---- CUDA C++ that the device code uses ----

#define threadIdx (emulator::Dim{emulator::self->number, 0, 0})
#define blockIdx (emulator::Dim{emulator::self->block->index, 0, 0})
#define blockDim (emulator::launch->dim)
#define gridDim (emulator::launch->grid)

struct uint2 {
    uint32_t x, y;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
static inline int32_t min(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t max(int32_t a, int32_t b) { return a > b ? a : b; }
static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
#define __expf(value) expf(value) // the name is glibc's
static inline float __fdividef(float a, float b) { return a / b; }
template <class T>
static T __ldg(const T *pointer) {
    return emulator::load_global<T>(pointer);
}
template <class T>
static T __ldcg(const T *pointer) {
    return emulator::load_global<T>(pointer);
}
static inline uint32_t atomicCAS(uint32_t *pointer, uint32_t expected, uint32_t value) {
    const uint32_t old = *pointer;
    if (old == expected) *pointer = value;
    return old;
}
static inline uint32_t atomicAdd(uint32_t *pointer, uint32_t value) {
    emulator::yield_sometimes();
    const uint32_t old = *pointer;
    *pointer = old + value;
    return old;
}
static inline uint32_t atomicOr(uint32_t *pointer, uint32_t value) {
    emulator::yield_sometimes();
    const uint32_t old = *pointer;
    *pointer = old | value;
    return old;
}
static inline uint32_t atomicExch(uint32_t *pointer, uint32_t value) {
    emulator::yield_sometimes();
    const uint32_t old = *pointer;
    *pointer = value;
    return old;
}
static inline uint32_t __clz(uint32_t value) { return value ? uint32_t(__builtin_clz(value)) : 32; }
static inline void __threadfence_system() {}
static inline void __threadfence_block() {}
static inline void __syncwarp() {
    emulator::collect(emulator::combine_nothing, {});
    emulator::self->syncs++;
}
static inline void __syncthreads() { emulator::barrier(0, emulator::launch->dim.x); }
static inline uint32_t __popc(uint32_t value) { return uint32_t(__builtin_popcount(value)); }
static inline bool __any_sync(uint32_t, bool value) {
    return emulator::collect(emulator::combine_any, {{value}}).of[0] != 0;
}
static inline bool __all_sync(uint32_t mask, bool value) { return !__any_sync(mask, !value); }
static inline uint32_t __ballot_sync(uint32_t, bool value) {
    return emulator::collect(emulator::combine_ballot, {{value}}).of[0];
}
static inline uint32_t __shfl_sync(uint32_t mask, uint32_t value, uint32_t source) {
    return emulator::shuffle(mask, value, source);
}
static inline float __shfl_sync(uint32_t mask, float value, uint32_t source) {
    return __uint_as_float(emulator::shuffle(mask, __float_as_uint(value), source));
}
static inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t value, uint32_t with) {
    return emulator::shuffle(mask, value, emulator::self->lane ^ with);
}
static inline float __shfl_xor_sync(uint32_t mask, float value, uint32_t with) {
    return __uint_as_float(emulator::shuffle(mask, __float_as_uint(value), emulator::self->lane ^ with));
}
