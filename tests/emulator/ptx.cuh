// Stands in for kernels_src/ptx.cuh when device code runs on the CPU: the same names, by what they mean. The device's
// file says what each is for.
#pragma once

#define PERK_ARCH __CUDA_ARCH__

namespace ptx {

using namespace emulator;

// ---- addresses and coordinates ----

static inline void *shared_pointer(uint32_t address) { return shared_at(*self->block, address, 1); }
static inline uint32_t dynamic_shared() { return kSharedBase; }
static inline uint32_t thread_number() { return self->number; }
static inline void forget(uint32_t &) {}

// ---- memory ----

struct alignas(16) Vec16 {
    uint32_t x, y, z, w;
};
template <uint32_t kCount>
static inline uint32_t word_of(const Vec16 (&values)[kCount]) {
    return values[kCount - 1].w;
}

static inline uint2 load_shared8(uint32_t address) { return load_shared<uint2>(address); }
static inline Vec16 load_shared16(uint32_t address) { return load_shared<Vec16>(address); }
static inline uint32_t load_shared4(uint32_t address) { return load_shared<uint32_t>(address); }
static inline Vec16 load_matrices(uint32_t address) {
    uint32_t words[4];
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t row = __shfl_sync(0xffffffffu, address, i * 8 + self->lane / 4);
        words[i] = load_shared<uint32_t>(row + self->lane % 4 * 4);
    }
    return {words[0], words[1], words[2], words[3]};
}
static inline void store_shared4(uint32_t address, uint32_t v) { store_shared(address, v); }
static inline void store_shared8(uint32_t address, uint2 v) { store_shared(address, v); }
static inline void store_shared16(uint32_t address, Vec16 v) { store_shared(address, v); }
static inline void or_shared4(uint32_t address, uint32_t bits) {
    yield_sometimes();
    note(address, 4, Access::atomic);
    *reinterpret_cast<uint32_t *>(shared_at(*self->block, address, 4)) |= bits;
}
static inline uint32_t add_shared4(uint32_t address, uint32_t amount) {
    yield_sometimes();
    note(address, 4, Access::atomic);
    uint32_t *word = reinterpret_cast<uint32_t *>(shared_at(*self->block, address, 4));
    const uint32_t before = *word;
    *word += amount;
    return before;
}

static inline Vec16 load_coherent16(const void *pointer) { return load_global<Vec16>(pointer); }
static inline uint2 load_coherent8(const void *pointer) {
    const uint64_t v = load_global<uint64_t>(pointer);
    return {uint32_t(v), uint32_t(v >> 32)};
}
static inline uint32_t load_coherent4(const void *pointer) { return load_global<uint32_t>(pointer); }
static inline uint16_t load_coherent2(const void *pointer) { return load_global<uint16_t>(pointer); }
static inline Vec16 load_cached16(const void *pointer) { return load_global<Vec16>(pointer); }
static inline Vec16 load_constant16(const void *pointer) { return load_global<Vec16>(pointer); }

static inline void store_eager2(void *pointer, uint16_t v) { store_late(pointer, v); }
static inline void store_eager4(void *pointer, uint32_t v) { store_late(pointer, v); }
static inline uint32_t max_halves(uint32_t a, uint32_t b) {
    const uint32_t low = (a & 0xffffu) > (b & 0xffffu) ? a : b, high = a >> 16 > b >> 16 ? a : b;
    return (low & 0xffffu) | (high & 0xffff0000u);
}

// ---- counters in global memory ----

// Only polls load so. A counter that has not changed since the thread's last look is one that was polled in vain.
static inline uint32_t load_acquire_gpu(const uint32_t *pointer) {
    const uint32_t seen = *pointer;
    polled(self->polled_pointer != pointer || self->polled_value != seen);
    self->polled_pointer = pointer;
    self->polled_value = seen;
    return seen;
}
static inline void add_gpu4(uint32_t *pointer, uint32_t amount) {
    yield_sometimes();
    *pointer += amount;
}
static inline void add_release_gpu(uint32_t *pointer, uint32_t amount) {
    pass_store_fence();
    add_gpu4(pointer, amount);
}
static inline void add_gpu8(uint64_t *pointer, uint64_t amount) {
    yield_sometimes();
    *pointer += amount;
}

static inline void store_release_gpu(uint32_t *pointer, uint32_t v) {
    yield_sometimes();
    __atomic_store_n(pointer, v, __ATOMIC_RELEASE);
}

// ---- host memory, while the host works on it, too ----

// Takes long now and then, by the host's clock and by the kernel's: the host may write between the loads of two lanes,
// and other warps go on meanwhile.
static inline void look_at_host() {
    if (draw(300) == 0) usleep(draw(4000));
    if (draw(30) == 0) sleep_ticks(draw(30000));
}
static inline uint32_t load_host4(const void *pointer) {
    yield_sometimes();
    return __atomic_load_n(static_cast<const uint32_t *>(pointer), __ATOMIC_RELAXED);
}
static inline Vec16 load_host16(const void *pointer) {
    look_at_host();
    const uint32_t *words = static_cast<const uint32_t *>(pointer);
    return {load_host4(words), load_host4(words + 1), load_host4(words + 2), load_host4(words + 3)};
}
static inline void store_release_system(uint32_t *pointer, uint32_t v) {
    __atomic_store_n(pointer, v, __ATOMIC_RELEASE);
    yield_sometimes();
}
static inline void fence_block() { emulator::pass_fence(); }
static inline void fence_system() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
static inline void pause(uint32_t nanoseconds) { sleep_ticks(nanoseconds / kTickNs); }

// ---- barriers ----

static inline void named_barrier(uint32_t name, uint32_t threads) { barrier(name, threads); }
template <uint32_t>
static void take_registers() {}
template <uint32_t>
static void give_registers() {}
static inline void exit_thread() { end_thread(); }

static inline void mbarrier_init(uint32_t address, uint32_t arrivals) {
    *mbarrier_at(*self->block, address) = {arrivals, arrivals, 0, 0};
}
constexpr bool kForRacecheck = false;
constexpr uint32_t kWarpArrivals = 1;
static inline void mbarrier_arrive_after(uint32_t address, uint32_t lane, uint32_t) {
    if (lane != 0) return;
    tell_clock(address);
    mbarrier_change(*self->block, address, 1, 0, 0);
    yield_sometimes();
}
static inline void mbarrier_arrive_lanes_after(uint32_t address, uint32_t lane, uint32_t count, uint32_t loaded) {
    if (count > 8) fail("at most 8 lanes arrive");
    mbarrier_arrive_after(address, lane < count ? 0 : 1, loaded);
}
static inline bool mbarrier_peek(uint32_t address, uint32_t parity) { return mbarrier_has_completed(address, parity); }
static inline bool mbarrier_test(uint32_t address, uint32_t parity) {
    const bool found = mbarrier_has_completed(address, parity);
    look_for_phase(address, parity, found);
    return found;
}

// ---- a warp ----

static inline uint32_t warp_max(uint32_t value) {
    for (uint32_t with = 1; with < kWarpLanes; with *= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, value, with);
        value = other > value ? other : value;
    }
    return value;
}
static inline uint32_t warp_min(uint32_t value) { return ~warp_max(~value); }
static inline uint32_t first_lane(bool holds) { return warp_min(holds ? emulator::self->lane : 32); }

// ---- copies into shared memory ----

static inline void copy_async4(uint32_t shared, const void *global) {
    self->copies.push_back(begin_copy(shared, global, 4, Access::store));
}
static inline void copy_async16(uint32_t shared, const void *global) {
    self->copies.push_back(begin_copy(shared, global, 16, Access::store));
}
static inline void copy_async_commit() {
    self->copy_groups.push_back(std::move(self->copies));
    self->copies.clear();
}
// Copies land as late as they may.
template <uint32_t kPending>
static void copy_async_wait_but() {
    std::vector<std::vector<Copy>> &groups = self->copy_groups;
    while (groups.size() > kPending) {
        land(groups.front());
        groups.erase(groups.begin());
    }
    yield_sometimes();
}
static inline void copy_async_wait() {
    copy_async_wait_but<0>();
    land(self->copies);
    self->copies.clear();
}
#if PERK_PORTABLE
static inline void copy_async_arrive(uint32_t address) {
    fly(std::move(self->copies), address, 1, 0);
    self->copies.clear();
}
#else
static inline void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) {
    tell_clock(address);
    mbarrier_change(*self->block, address, 1, int32_t(bytes), 0);
}
static inline void copy_bulk(uint32_t shared, const void *global, uint32_t bytes, uint32_t address) {
    if (bytes % 16 != 0) fail("a bulk copy moves multiples of 16 bytes");
    fly({begin_copy(shared, global, bytes, Access::store)}, address, 0, bytes);
}
static inline void copy_bulk_once(uint32_t shared, const void *global, uint32_t bytes, uint32_t address) {
    copy_bulk(shared, global, bytes, address);
}
static inline void assume(bool is_so) {
    if (!is_so) fail("what the compiler was told is not so");
}
static inline void bring_to_l2(const void *global, uint32_t bytes) { // nothing but that it is there
    if (bytes == 0 || bytes % 16 != 0) fail("L2 is brought multiples of 16 bytes");
    const volatile uint8_t *memory = static_cast<const uint8_t *>(global);
    (void)memory[0], (void)memory[bytes - 1];
}
#endif
static inline void fence_mbarrier_init() {}
static inline void fence_copies() {}
static inline void fence_shared_stores() {}

// ---- numbers ----

static inline float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
static inline float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
static inline float from_bf16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
static inline uint16_t to_bf16(float value) { // round to nearest even
    const uint32_t bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
static inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | uint32_t(to_bf16(high)) << 16; }
static inline float round_bf16(float value) { return from_bf16(to_bf16(value)); }
static inline float from_f16(uint16_t bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 0    ? ldexpf(float(fraction), -24)
                       : exponent == 31 ? (fraction ? NAN : INFINITY)
                                        : ldexpf(float(fraction + 1024), int(exponent) - 25);
    return bits >> 15 ? -size : size;
}
static inline float infinity() { return INFINITY; }
static inline float exp2_approx(float value) { return exp2f(value); }
static inline uint64_t global_timer() { return launch->tick * kTickNs; }
static inline uint32_t clock_cycles() { return uint32_t(launch->tick * kTickNs); } // of one a nanosecond

// ---- tensor cores ----

// Lane 4g+q holds: of a the pairs (g, 2q), (g+8, 2q), (g, 2q+8), (g+8, 2q+8), of b those of column g, of c the values
// (g, 2q), (g, 2q+1), (g+8, 2q), (g+8, 2q+1).
static inline void combine_mma(const Words *in, Words *out, uint32_t lanes) {
    if (lanes != 0xffffffffu) fail("a product on the tensor cores needs all lanes");
    float a[16][16], b[16][8];
    for (uint32_t lane = 0; lane < kWarpLanes; lane++) {
        const uint32_t g = lane / 4, k = lane % 4 * 2, *words = in[lane].of;
        for (uint32_t i = 0; i < 4; i++) {
            a[g + i % 2 * 8][k + i / 2 * 8] = low_bf16(words[i]);
            a[g + i % 2 * 8][k + i / 2 * 8 + 1] = high_bf16(words[i]);
        }
        for (uint32_t i = 0; i < 2; i++) {
            b[k + i * 8][g] = low_bf16(words[4 + i]);
            b[k + i * 8 + 1][g] = high_bf16(words[4 + i]);
        }
    }
    for (uint32_t lane = 0; lane < kWarpLanes; lane++)
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = __uint_as_float(in[lane].of[6 + i]);
            for (uint32_t k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            out[lane].of[i] = __float_as_uint(sum);
        }
}
static inline void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    const Words sums = collect(combine_mma, {{a0, a1, a2, a3, b0, b1, __float_as_uint(c[0]), __float_as_uint(c[1]),
                                              __float_as_uint(c[2]), __float_as_uint(c[3])}});
    for (uint32_t i = 0; i < 4; i++) c[i] = __uint_as_float(sums.of[i]);
}

// ---- tensor cores, a warpgroup at a time ----
// Products read their operands at the commit or as late as the wait, whichever falls worse: who changes them before has
// wrong sums, and so has who reads sums that are not there yet. A warp's 16 rows depend on nobody else's, so that warps
// are computed one by one.

static inline uint64_t wgmma_operand(uint32_t address) {
    if (address % 1024 != 0) fail("a right operand is not aligned to its swizzle");
    return uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | 1 << 16 | address >> 4;
}
static inline void wgmma_fence() {}

// Element [k][n] of a right operand: rows of 128 bytes, 16 bytes of them exchanged by the address's bits 7 to 9.
static inline float wgmma_element(uint64_t b, uint32_t k, uint32_t n) {
    if (b >> 62 != 1 || (b >> 49 & 7) != 0) fail("a right operand that is not emulated");
    const uint32_t group = uint32_t(b >> 32 & 0x3fff) << 4;
    const uint32_t linear = (uint32_t(b & 0x3fff) << 4) + n / 8 * group + n % 8 * 128 + k * 2;
    uint16_t bits;
    memcpy(&bits, shared_at(*self->block, linear ^ (linear >> 7 & 7) << 4, 2), 2);
    return from_bf16(bits);
}

static inline float *wgmma_values(Thread &t, float *sums) {
    for (Sums &s : t.sums)
        if (s.of == sums) return s.values.data();
    fail("sums that belong to no product");
}

// The oldest product of a warp.
static inline void wgmma_compute(Thread *const (&lanes)[kWarpLanes]) {
    const Product &first = lanes[0]->products.front();
    float a[16][16];
    for (uint32_t lane = 0; lane < kWarpLanes; lane++) {
        const Product &p = lanes[lane]->products.front();
        if (p.b != first.b || p.columns != first.columns) fail("the lanes of a warp have different right operands");
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t row = lane / 4 + i % 2 * 8, k = lane % 4 * 2 + i / 2 * 8;
            a[row][k] = low_bf16(p.a[i]);
            a[row][k + 1] = high_bf16(p.a[i]);
        }
    }
    for (uint32_t n = 0; n < first.columns; n++) {
        float b[16];
        for (uint32_t k = 0; k < 16; k++) b[k] = wgmma_element(first.b, k, n);
        for (uint32_t row = 0; row < 16; row++) {
            Thread &t = *lanes[row % 8 * 4 + n % 8 / 2];
            float &sum = wgmma_values(t, t.products.front().sums)[n / 8 * 4 + row / 8 * 2 + n % 2];
            for (uint32_t k = 0; k < 16; k++) sum += a[row][k] * b[k];
        }
    }
}

// Word 0 and 1: the lane's thread; 2: commits that may stay under way.
static inline void combine_wgmma(const Words *in, Words *, uint32_t alive) {
    if (alive != 0xffffffffu) fail("a product on the tensor cores needs all lanes");
    Thread *lanes[kWarpLanes];
    for (uint32_t i = 0; i < kWarpLanes; i++)
        lanes[i] = reinterpret_cast<Thread *>(uint64_t(in[i].of[1]) << 32 | in[i].of[0]);
    uint32_t commits = 0;
    for (const Product &p : lanes[0]->products) commits += p.last;
    for (; commits > in[0].of[2]; commits--)
        for (bool last = false; !last;) {
            last = lanes[0]->products.front().last;
            wgmma_compute(lanes);
            for (Thread *t : lanes) t->products.erase(t->products.begin());
        }
    for (Thread *t : lanes) {
        if (!t->products.empty()) continue;
        for (const Sums &s : t->sums) memcpy(s.of, s.values.data(), s.values.size() * sizeof(float));
        t->sums.clear();
    }
}
static inline void wgmma_finish(uint32_t pending) {
    const uint64_t thread = reinterpret_cast<uint64_t>(self);
    collect(combine_wgmma, {{uint32_t(thread), uint32_t(thread >> 32), pending}});
}

template <uint32_t kColumns>
static void wgmma(float (&sums)[kColumns / 2], const Vec16 &a, uint64_t b) {
    bool known = false;
    for (const Sums &s : self->sums) known = known || s.of == sums;
    if (!known) {
        self->sums.push_back({sums, std::vector<float>(sums, sums + kColumns / 2)});
        for (float &sum : sums) sum = NAN;
    }
    self->products.push_back({&a.x, sums, kColumns, b, false});
}
static inline void wgmma_commit() {
    if (!self->products.empty()) self->products.back().last = true;
    if (launch->eager_products) wgmma_finish(0);
}
template <uint32_t kPending>
static void wgmma_wait() {
    wgmma_finish(kPending);
    yield_sometimes();
}
template <uint32_t kSums>
static void wgmma_keep(float (&)[kSums]) {}

} // namespace ptx
