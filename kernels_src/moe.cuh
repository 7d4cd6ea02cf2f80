// Mixture of experts: moe_route picks the experts of each token, ExpertLinear multiplies rows by the weights of theirs,
// moe_sum adds up what they made. Between the first and the last, activations have a row for each pair of a token and a
// slot: token * slots + slot. Only the weights of experts that were hit are read.
#pragma once

namespace perk {

// How many experts, slots, and tokens a step at most; where its routing (abi.h) has what.
template <uint32_t kExpertCount, uint32_t kSlotCount, uint32_t kMaxTokens>
struct Routing {
    static constexpr uint32_t kExperts = kExpertCount, kSlots = kSlotCount, kTokens = kMaxTokens;
    static constexpr uint32_t kMaxPairs = kTokens * kSlots, kMaxHits = kExperts < kMaxPairs ? kExperts : kMaxPairs;
    static constexpr uint32_t kHits = PERK_ROUTING_HITS, kExpert = PERK_ROUTING_HEADER, kBegin = kExpert + kMaxHits,
                              kOrder = kBegin + kMaxHits + 1, kShares = kOrder + kMaxPairs,
                              kWords = kShares + kMaxPairs;
    static_assert(kWords == PERK_ROUTING_WORDS(kMaxHits, kMaxPairs), "abi.h says otherwise");
    static constexpr bool kIsOwn = false;
};

// Steps of one token, whose routing every worker follows from the logits by itself.
template <uint32_t kExpertCount, uint32_t kSlotCount, bool kSharesOfPicked>
struct OwnRouting : Routing<kExpertCount, kSlotCount, 1> {
    static constexpr bool kIsOwn = true, kNormalises = kSharesOfPicked;
};

// ---- routing ----

// The share of this lane's slot: of a softmax over all experts, or over those that were picked.
template <bool kNormalises, class Top>
__device__ __forceinline__ float share_of(const Top &top, const typename Top::Pick &mine, uint32_t lane) {
    const float share = lane < Top::kSlotCount ? __expf(mine.logit - mine.largest) : 0.0f;
    float sum = share;
    if constexpr (!kNormalises) {
        sum = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < Top::kEach; i++)
            if (lane * Top::kEach + i < Top::kExpertCount) sum += __expf(top.logits[i] - mine.largest);
    }
    return share / warp_sum(sum);
}

// One task. The experts with the largest logits of each token, the lowest number among equals, in falling order; their
// shares of a softmax over all experts, or over those that were picked; and the step's routing.
// Operands: 0 logits, fp32; 1 experts; 2 shares, fp32; 3 routing.
template <class R, bool kNormalises>
struct MoeRoute {
    using Top = TopExperts<R::kExperts, R::kSlots>;
    static constexpr uint32_t kLaneExperts = Top::kEach;
    static constexpr uint32_t kTokenWords = (R::kTokens + 31) / 32; // of a set of tokens
    static constexpr uint32_t kInStride = PERK_ROW_STRIDE(R::kExperts), kOutStride = PERK_ROW_STRIDE(R::kSlots);

    // Shared memory: who picked each expert, where its pairs begin in the order, whom each pair picked, its share.
    static constexpr uint32_t kPicked = R::kExperts * kTokenWords * 4, kBegins = R::kExperts * 4,
                              kBytes = kPicked + kBegins + R::kMaxPairs * 8;
    static_assert(kBytes <= program::reduction_bytes, "the plan gave this stage too little scratch");
    static __device__ __forceinline__ uint32_t picked(const Worker &w, uint32_t expert, uint32_t word) {
        return w.reduction() + (expert * kTokenWords + word) * 4;
    }
    static __device__ __forceinline__ uint32_t begin(const Worker &w, uint32_t expert) {
        return w.reduction() + kPicked + expert * 4;
    }
    static __device__ __forceinline__ uint32_t choice(const Worker &w, uint32_t pair) {
        return w.reduction() + kPicked + kBegins + pair * 8;
    }

    static __device__ __forceinline__ Top load_token(const Worker &w, uint32_t token, const uint8_t *logits) {
        Top top;
        top.load(w.lane, logits + uint64_t(token) * kInStride * 4);
        return top;
    }

    // By a warp.
    static __device__ __forceinline__ void route_token(const Worker &w, uint32_t token, const Top &top,
                                                       uint32_t *experts, float *shares) {
        const typename Top::Pick mine = top.pick(w.lane);
        const float share = share_of<kNormalises>(top, mine, w.lane);
        if (w.lane >= R::kSlots) return;
        experts[uint64_t(token) * kOutStride + w.lane] = mine.expert;
        shares[uint64_t(token) * kOutStride + w.lane] = share;
        store_shared4(choice(w, token * R::kSlots + w.lane), mine.expert);
        store_shared4(choice(w, token * R::kSlots + w.lane) + 4, __float_as_uint(share));
        or_shared4(picked(w, mine.expert, token / 32), 1u << token % 32);
    }

    static __device__ __forceinline__ uint32_t pairs_of(const Worker &w, uint32_t expert) {
        uint32_t count = 0;
#pragma unroll
        for (uint32_t word = 0; word < kTokenWords; word++) count += __popc(load_shared4(picked(w, expert, word)));
        return count;
    }

    // Sum over the lanes before this one.
    static __device__ __forceinline__ uint32_t sum_before(const Worker &w, uint32_t value) {
        uint32_t sum = value;
        for (uint32_t offset = 1; offset < 32; offset *= 2) {
            const uint32_t other = __shfl_sync(0xffffffffu, sum, (w.lane - offset) % 32);
            if (w.lane >= offset) sum += other;
        }
        return sum - value;
    }

    // By one warp: a lane has neighbouring experts, so that hits come out in rising order.
    static __device__ __forceinline__ void list_hits(const Worker &w, uint32_t *routing) {
        const uint32_t first = w.lane * kLaneExperts;
        uint32_t counts[kLaneExperts], pairs = 0, hits = 0;
#pragma unroll
        for (uint32_t i = 0; i < kLaneExperts; i++) {
            counts[i] = first + i < R::kExperts ? pairs_of(w, first + i) : 0;
            pairs += counts[i];
            hits += counts[i] != 0;
        }
        uint32_t place = sum_before(w, pairs), hit = sum_before(w, hits);
#pragma unroll
        for (uint32_t i = 0; i < kLaneExperts; i++) {
            if (counts[i] == 0) continue;
            store_shared4(begin(w, first + i), place);
            routing[R::kExpert + hit] = first + i;
            routing[R::kBegin + hit] = place;
            place += counts[i];
            hit++;
        }
        if (w.lane == 31) {
            routing[R::kHits] = hit;
            routing[R::kBegin + hit] = place;
        }
    }

    // A pair's place among those of its expert: the tokens before its own that picked it, too.
    static __device__ __forceinline__ uint32_t place_of(const Worker &w, uint32_t pair) {
        const uint32_t expert = load_shared4(choice(w, pair)), token = pair / R::kSlots;
        uint32_t place = load_shared4(begin(w, expert));
#pragma unroll
        for (uint32_t word = 0; word < kTokenWords; word++) {
            const uint32_t before = token >= (word + 1) * 32 ? 0xffffffffu
                                    : token > word * 32      ? (1u << (token - word * 32)) - 1
                                                             : 0;
            place += __popc(load_shared4(picked(w, expert, word)) & before);
        }
        return place;
    }

    static __device__ __forceinline__ void place_pair(const Worker &w, uint32_t pair, uint32_t *routing) {
        const uint32_t place = place_of(w, pair);
        routing[R::kOrder + place] = pair;
        routing[R::kShares + place] = load_shared4(choice(w, pair) + 4);
    }

    static __device__ __forceinline__ void run(Worker &w, const TaskView &task) {
        const uint32_t tokens = w.num_tokens();
        const uint8_t *logits = w.args.activations + task.operand(0);
        uint32_t *experts = reinterpret_cast<uint32_t *>(w.args.activations + task.operand(1));
        float *shares = reinterpret_cast<float *>(w.args.activations + task.operand(2));
        uint32_t *routing = reinterpret_cast<uint32_t *>(w.args.activations + task.operand(3));
        for (uint32_t i = w.thread; i < R::kExperts * kTokenWords; i += PERK_CONSUMER_THREADS)
            store_shared4(w.reduction() + i * 4, 0);
        await_inputs(w, task); // with a barrier
        Top next = load_token(w, min(w.warp, R::kTokens - 1), logits);
#pragma unroll 1
        for (uint32_t token = w.warp; token < tokens; token += PERK_CONSUMER_WARPS) {
            const Top current = next;
            next = load_token(w, min(token + PERK_CONSUMER_WARPS, R::kTokens - 1), logits); // under way meanwhile
            route_token(w, token, current, experts, shares);
        }
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        if (w.warp == 0) list_hits(w, routing);
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        for (uint32_t pair = w.thread; pair < tokens * R::kSlots; pair += PERK_CONSUMER_THREADS)
            place_pair(w, pair, routing);
    }
};

// ---- what linears of experts know of a step's routing ----

// begin_fetch, finish_fetch, a barrier of the consumers, and then the rows of each hit. What a wait that was given up
// leaves there stays within bounds.
template <class R, bool kIsOwn = R::kIsOwn>
struct Hits;

// The list, in shared memory.
template <class R>
struct Hits<R, false> {
    static constexpr uint32_t kBytes = R::kWords * 4;
    uint32_t address;

    __device__ __forceinline__ void begin_fetch(const Worker &w, const uint8_t *list, bool) {
        for (uint32_t i = w.thread; i < R::kWords; i += PERK_CONSUMER_THREADS)
            copy_async4(address + i * 4, list + i * 4);
    }
    __device__ __forceinline__ void finish_fetch(const Worker &) { copy_async_wait(); }
    __device__ __forceinline__ uint32_t count() const { return min(get(R::kHits), R::kMaxHits); }

    // Rows of one hit. No two are of one token.
    struct Rows {
        const Hits &hits;
        uint32_t first, count;
        __device__ __forceinline__ uint32_t pair(uint32_t row) const {
            return min(hits.get(R::kOrder + first + row), R::kMaxPairs - 1);
        }
        __device__ __forceinline__ float share(uint32_t row) const {
            return __uint_as_float(hits.get(R::kShares + min(first + row, R::kMaxPairs - 1)));
        }
    };
    __device__ __forceinline__ Rows of(uint32_t hit) const {
        const uint32_t first = begin(hit);
        return {*this, first, min(get(R::kBegin + hit + 1) - first, min(R::kTokens, R::kMaxPairs - first))};
    }

    __device__ __forceinline__ uint32_t begin(uint32_t hit) const {
        return min(get(R::kBegin + hit), R::kMaxPairs - 1);
    }
    __device__ __forceinline__ uint32_t get(uint32_t word) const { return load_shared4(address + word * 4); }
};

// Every warp picks the experts of the only token: lane h knows hit h.
template <class R>
struct Hits<R, true> {
    static constexpr uint32_t kBytes = 0;
    using Top = TopExperts<R::kExperts, R::kSlots>;
    uint32_t address;
    Top top;
    const uint8_t *logits;
    bool logits_are_eager;
    uint32_t my_slot;
    float my_share;

    __device__ __forceinline__ void begin_fetch(const Worker &w, const uint8_t *from, bool from_is_eager) {
        logits = from;
        logits_are_eager = from_is_eager;
        top.load(w.lane, logits);
    }
    __device__ __forceinline__ void finish_fetch(const Worker &w) {
        EagerLook look{logits_are_eager};
        for (;;) {
            top.see(look);
            if (!look.again_words(w)) break;
            top.load(w.lane, logits);
        }
        const typename Top::Pick mine = top.pick(w.lane);
        my_slot = Top::slot_of_hit(w.lane, mine.expert);
        my_share = __shfl_sync(0xffffffffu, share_of<R::kNormalises>(top, mine, w.lane), my_slot);
    }
    __device__ __forceinline__ uint32_t count() const { return R::kSlots; }

    struct Rows {
        static constexpr uint32_t count = 1;
        uint32_t the_pair;
        float the_share;
        __device__ __forceinline__ uint32_t pair(uint32_t) const { return the_pair; }
        __device__ __forceinline__ float share(uint32_t) const { return the_share; }
    };
    __device__ __forceinline__ Rows of(uint32_t hit) const { // by all lanes
        return {__shfl_sync(0xffffffffu, my_slot, hit), __shfl_sync(0xffffffffu, my_share, hit)};
    }
};

// ---- linears of experts ----

// out[pair] = x[pair, or its token] W[expert of the pair]^T. A unit is a tile of one hit expert, for all of its pairs;
// units first, first + stride, ... of the step's are the task's. Linear makes the products.
// With Epilogue::sum, out[token] = residual[token] + the sum over its pairs of share * that, rounded first: a task has
// whole tiles of all hit experts then, and adds up in their order.
// Operands: kInput, kOutput, kNormWeight as of a linear, kRouting, kSumResidual.
enum ExpertOperand { kRouting = 2, kSumResidual = 4 };

template <class R, bool kFromPairs, uint32_t kIn, uint32_t kOut, bool kFoldedNorm, Epilogue kEpilogue,
          Activation kActivation>
struct ExpertLinear {
    static constexpr bool kSums = kEpilogue == Epilogue::sum;
    using Product = Linear<Rows::tokens, R::kTokens, kIn, kOut, kFoldedNorm, kSums ? Epilogue::store : kEpilogue,
                           kActivation, false>;
    using Finish = typename Product::Finish;
    static constexpr uint32_t kUnitTiles = kEpilogue == Epilogue::gated ? (kOut / 2 + 7) / 8 : Product::kTiles;
    static constexpr uint32_t kShared =
        Product::kBuffers * Product::kPartialBytes + PERK_CONSUMER_WARPS * R::kTokens * 4;
    using StepHits = Hits<R>;
    static constexpr uint32_t kTotals = kShared + StepHits::kBytes, kBytes = kTotals + R::kTokens * PERK_TILE_ROWS * 4;
    static_assert(kBytes <= program::reduction_bytes, "the plan gave this stage too little scratch");
    static_assert(!kFromPairs || !kFoldedNorm, "a norm is of tokens");
    static constexpr uint32_t kMaxInputRows = kFromPairs ? R::kMaxPairs : R::kTokens;
    static constexpr bool kAlwaysStaged = Product::staged_bytes(kMaxInputRows) <= program::staging_bytes;

    // Of the tile that is being summed up: outputs of each token, fp32.
    static __device__ __forceinline__ uint32_t total(const Worker &w, uint32_t token, uint32_t output) {
        return w.reduction() + kTotals + (token * PERK_TILE_ROWS + output) * 4;
    }
    static __device__ __forceinline__ void add_to(uint32_t address, float value) {
        store_shared4(address, __float_as_uint(__uint_as_float(load_shared4(address)) + value));
    }

    // Rows of a hit expert, as Linear asks for them.
    struct ExpertRows {
        typename StepHits::Rows rows;
        __device__ __forceinline__ uint32_t input(uint32_t row) const {
            return kFromPairs ? rows.pair(row) : rows.pair(row) / R::kSlots;
        }
        __device__ __forceinline__ void store(const Worker &w, const Finish &f, uint32_t tile, uint32_t row, float low,
                                              float high) const {
            if constexpr (kSums) {
                const float share = rows.share(row);
                const uint32_t address = total(w, rows.pair(row) / R::kSlots, w.lane / 4);
                add_to(address, share * round_bf16(low));
                add_to(address + 32, share * round_bf16(high));
            } else {
                Product::store_row(w, f, tile, rows.pair(row), low, high);
            }
        }
    };

    // The right operand, as in Linear, of which each lane knows its rows.
    struct LaneRows {
        uint32_t of[Product::kColumnTiles];
        __device__ __forceinline__ LaneRows(const Worker &w, const ExpertRows &rows_of, uint32_t rows) {
#pragma unroll
            for (uint32_t n = 0; n < Product::kColumnTiles; n++)
                of[n] = n * 8 < rows ? rows_of.input(min(n * 8 + w.lane / 4, rows - 1)) : 0;
        }
    };
    struct StagedRows {
        static constexpr uint32_t kGroupsAhead = 0;
        uint32_t base, staged;
        LaneRows rows;
        __device__ __forceinline__ StagedRows(const Worker &w, const uint8_t *, uint32_t staged_rows,
                                              LaneRows lane_rows)
            : base(w.staging() + w.warp * Product::kWarpBlocks * staged_rows * 64 + w.lane % 4 * 16),
              staged(staged_rows), rows(lane_rows) {}
        __device__ __forceinline__ Vec16 load(const Worker &, uint32_t kb, uint32_t column_tile) const {
            return load_shared16(base + (kb / PERK_CONSUMER_WARPS * staged + rows.of[column_tile]) * 64);
        }
    };
    struct DirectRows {
        static constexpr uint32_t kGroupsAhead = Product::DirectInput::kGroupsAhead;
        const uint8_t *base;
        LaneRows rows;
        __device__ __forceinline__ DirectRows(const Worker &w, const uint8_t *x, uint32_t, LaneRows lane_rows)
            : base(x + w.lane % 4 * 16), rows(lane_rows) {}
        __device__ __forceinline__ Vec16 load(const Worker &, uint32_t kb, uint32_t column_tile) const {
            return load_cached16(base +
                                 (uint64_t(rows.of[column_tile]) * Product::kInStride + kb * PERK_BLOCK_COLS) * 2);
        }
    };

    // A step's work for this task, and where it is. Units and products are numbered by `i`.
    struct Work {
        const StepHits &hits;
        const uint8_t *x, *residual;
        Finish finish;
        uint32_t first, stride, count, x_rows, hit_count;
        float eps;
        bool residual_is_eager;
    };

    // One tile of one hit expert.
    template <class Input>
    static __device__ __forceinline__ uint32_t run_unit(const Worker &w, const Work &work, uint32_t hit, uint32_t tile,
                                                        uint32_t i, uint32_t chunk) {
        const ExpertRows rows_of{work.hits.of(hit)};
        const uint32_t rows = rows_of.rows.count;
        const uint32_t buffer = i % Product::kBuffers, my_column_tile = (w.warp - i) % PERK_CONSUMER_WARPS;
        typename Product::Sums sums = {};
        const Input input(w, work.x, work.x_rows, LaneRows(w, rows_of, rows));
        chunk = Product::multiply_tile(w, input, rows, chunk, sums);
        Product::share_sums(w, buffer, rows, sums);
        if (my_column_tile < Product::kColumnTiles && my_column_tile * 8 < rows)
            Product::finish_tile(w, work.finish, tile, my_column_tile, buffer, rows, work.eps, {}, rows_of);
        return chunk;
    }

    template <class Input>
    static __device__ __forceinline__ uint32_t run_units(const Worker &w, const Work &work, uint32_t chunk) {
        const uint32_t end = work.hit_count * kUnitTiles;
#pragma unroll 1
        for (uint32_t unit = work.first, i = 0; unit < end; unit += work.stride, i++)
            chunk = run_unit<Input>(w, work, unit / kUnitTiles, unit % kUnitTiles, i, chunk);
        return chunk;
    }

    // A thread has neighbouring outputs of one token, or of a few.
    static constexpr uint32_t kThreadPairs =
        (R::kTokens * (PERK_TILE_ROWS / 2) + PERK_CONSUMER_THREADS - 1) / PERK_CONSUMER_THREADS;
    struct Place {
        uint32_t token, output, column;
        bool is_inside;
        __device__ __forceinline__ Place(const Worker &w, uint32_t p, uint32_t tile) {
            const uint32_t index = w.thread + p * PERK_CONSUMER_THREADS;
            token = index / (PERK_TILE_ROWS / 2);
            output = index % (PERK_TILE_ROWS / 2) * 2;
            column = tile * PERK_TILE_ROWS + output;
            is_inside = token < w.num_tokens() && column < kOut;
        }
        __device__ __forceinline__ uint64_t offset() const {
            return (uint64_t(token) * Product::kOutStride + column) * 2;
        }
    };

    template <class Input>
    static __device__ __forceinline__ uint32_t run_sums(const Worker &w, const Work &work, uint32_t chunk) {
#pragma unroll 1
        for (uint32_t t = 0; t < work.count; t++) {
            const uint32_t tile = work.first + t * work.stride;
            uint32_t residual[kThreadPairs];
            auto load_residual = [&] {
#pragma unroll
                for (uint32_t p = 0; p < kThreadPairs; p++) {
                    const Place place(w, p, tile);
                    residual[p] = place.is_inside ? load_coherent4(work.residual + place.offset()) : 0;
                }
            };
            load_residual(); // early: in flight while the products are made
#pragma unroll 1
            for (uint32_t hit = 0; hit < work.hit_count; hit++)
                chunk = run_unit<Input>(w, work, hit, tile, t * work.hit_count + hit, chunk);
            named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // all are added
            EagerLook look{work.residual_is_eager};
            for (;;) {
#pragma unroll
                for (uint32_t p = 0; p < kThreadPairs; p++) look.see(residual[p]);
                if (!look.again(w)) break;
                load_residual();
            }
#pragma unroll
            for (uint32_t p = 0; p < kThreadPairs; p++) {
                const Place place(w, p, tile);
                if (!place.is_inside) continue;
                const uint32_t address = total(w, place.token, place.output);
                const float low = __uint_as_float(load_shared4(address)),
                            high = __uint_as_float(load_shared4(address + 4));
                uint32_t sum = pack_bf16(low + low_bf16(residual[p]), high + high_bf16(residual[p]));
                if (place.column + 1 >= kOut) sum &= 0xffffu; // what lies beyond the width stays zero
                store_eager4(work.finish.out + place.offset(), sum);
                store_shared4(address, 0); // for the next tile
                store_shared4(address + 4, 0);
            }
        }
        return chunk;
    }

    template <class Input>
    static __device__ __forceinline__ uint32_t run_work(const Worker &w, const Work &work, uint32_t chunk) {
        if constexpr (kSums)
            return run_sums<Input>(w, work, chunk);
        else
            return run_units<Input>(w, work, chunk);
    }

    // What the producer leaves where the task has no units.
    static __device__ __forceinline__ uint32_t take_empty(const Worker &w, uint32_t chunk) {
        wait_full(w, chunk);
        release_chunk(w, chunk, load_shared4(w.ring_slot(chunk)));
        return chunk + 1;
    }

    static __device__ __forceinline__ uint32_t run(Worker &w, const TaskView &task, uint32_t chunk, float eps) {
        StepHits hits{w.reduction() + kShared};
        const uint32_t input = task.place(kInput), residual = task.place(kSumResidual);
        Work work{hits,
                  activation_at(w, input),
                  activation_at(w, residual),
                  {nullptr, nullptr, activation_at(w, task.place(kOutput)), nullptr, false},
                  task.first(),
                  task.stride(),
                  task.count(),
                  w.num_tokens() * (kFromPairs ? R::kSlots : 1),
                  0,
                  eps,
                  is_eager(residual)};
        const uint32_t routing = task.place(kRouting);
        const typename Product::Gains gains = Product::load_gains(w, w.args.constants + task.operand(kNormWeight));
        if constexpr (kSums)
            for (uint32_t i = w.thread; i < R::kTokens * PERK_TILE_ROWS; i += PERK_CONSUMER_THREADS)
                store_shared4(total(w, 0, i), 0);
        await_inputs(w, task);
        hits.begin_fetch(w, activation_at(w, routing), is_eager(routing)); // under way while rows are staged
        const bool is_staged = kAlwaysStaged || Product::staged_bytes(work.x_rows) <= program::staging_bytes;
        if (is_staged) Product::template stage_input<kMaxInputRows>(w, work.x, is_eager(input), gains, work.x_rows);
        hits.finish_fetch(w);
        if constexpr (!R::kIsOwn) named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        stamp(w, PERK_STAMP_READ);
        work.hit_count = hits.count();
        if (work.hit_count == 0 || (!kSums && work.first >= work.hit_count * kUnitTiles)) return take_empty(w, chunk);
        if (is_staged) return run_work<StagedRows>(w, work, chunk);
        if constexpr (!kAlwaysStaged && !kFoldedNorm) return run_work<DirectRows>(w, work, chunk);
        return chunk;
    }
};

// ---- the sum ----

// out[t] = residual[t] + the sum over slots of share * x[pair]. A task owns the columns [8 first, 8 (first + count)).
// Operands: 0 x, of pairs; 1 shares; 2 residual; 3 out.
template <uint32_t kSlots, uint32_t kWidth>
__device__ __forceinline__ void moe_sum(Worker &w, const TaskView &task) {
    constexpr uint32_t kStride = PERK_ROW_STRIDE(kWidth), kShareStride = PERK_ROW_STRIDE(kSlots);
    const uint32_t rows = w.num_tokens(), first = task.first(), count = task.count();
    const uint8_t *x = w.args.activations + task.operand(0), *shares = w.args.activations + task.operand(1),
                  *residual = w.args.activations + task.operand(2);
    uint8_t *out = w.args.activations + task.operand(3);
    await_inputs(w, task);
    for (uint32_t i = w.thread; i < rows * count * 4; i += PERK_CONSUMER_THREADS) { // a pair of columns a thread
        const uint32_t row = i / (count * 4), column = first * 8 + i % (count * 4) * 2;
        if (column >= kWidth) continue;
        const uint64_t place = (uint64_t(row) * kStride + column) * 2;
        const uint32_t add = load_coherent4(residual + place);
        float low = 0.0f, high = 0.0f;
#pragma unroll 8 // loads in flight
        for (uint32_t slot = 0; slot < kSlots; slot++) {
            const uint64_t pair = uint64_t(row) * kSlots + slot;
            const uint32_t value = load_coherent4(x + (pair * kStride + column) * 2);
            const float share = __uint_as_float(load_coherent4(shares + (uint64_t(row) * kShareStride + slot) * 4));
            low += share * low_bf16(value);
            high += share * high_bf16(value);
        }
        uint32_t sum = pack_bf16(low + low_bf16(add), high + high_bf16(add));
        if (column + 1 >= kWidth) sum &= 0xffffu; // what lies beyond the width stays zero
        *reinterpret_cast<uint32_t *>(out + place) = sum;
    }
}

} // namespace perk
