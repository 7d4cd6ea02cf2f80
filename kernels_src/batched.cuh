// batched linears: out = x W^T for the 9 to 64 tokens of a step, on wgmma, with the weights as the left operand and the
// tokens as the columns, as in wide.cuh. Here the stream of weights is all that takes time, if nothing else gets in its
// way: x is read once for up to eight row tiles of a worker, by the feeder, ahead of the products. The consumers go
// over it in units of two slices. Up to four tiles are those of both warpgroups, which take units in turn, so that one
// waits while the other multiplies; their sums meet in shared memory at the end of the pass, where each finishes half
// of the tokens. Of more tiles a warpgroup has up to four of its own.
#pragma once

namespace perk {

template <Rows kRowsOf, uint32_t kIn, uint32_t kOut, uint32_t kTogether, Epilogue kEpilogue, Activation kActivation,
          bool kHasBias, bool kOutIsInput, bool kIsNormed>
struct BatchedLinear {
    static constexpr uint32_t kBlocks = (kIn + PERK_BLOCK_COLS - 1) / PERK_BLOCK_COLS; // of a tile
    static constexpr uint32_t kSlices = (kBlocks + PERK_SLICE_BLOCKS - 1) / PERK_SLICE_BLOCKS;
    static constexpr uint32_t kUnitSlices = program::slot_slices; // a unit is what a slot of x holds
    static constexpr uint32_t kUnits = (kSlices + kUnitSlices - 1) / kUnitSlices;
    static constexpr uint32_t kGroupWarps = PERK_CONSUMER_WARPS / 2; // of a warpgroup
    using Output = WideOutput<kOut, kEpilogue, kActivation, kHasBias, kOutIsInput>;
    using Finish = typename Output::Finish;
    using Outputs = typename Output::Outputs;

    // Tokens of a product, and of the half that is finished at a time.
    static constexpr uint32_t kColumns = program::wide_tokens, kPart = kColumns / 2;
    using Sums = float[kColumns / 2];
    using PartSums = float[kPart / 2];
    using Residuals = typename Output::template Residuals<kPart / 8>;

    // What a warp does in one pass over the input: a row tile, or none, beside the others of its warpgroup.
    struct Pass {
        uint32_t slot_slices; // of a tile in a ring slot
        uint32_t place;       // of the warp's tile in a ring slot
        bool has_tile;
        uint32_t tile;
        bool is_split; // both warpgroups have the same tiles, and take units in turn
        __device__ __forceinline__ uint32_t step() const { return is_split ? 2 : 1; }
    };

    // ---- the products ----

    // The left operand of a slice: four fragments.
    struct Weights {
        Vec16 of[4];
        __device__ __forceinline__ uint32_t last() const { return of[1].w ^ of[3].w; } // the second block need not be
    };

    static __device__ __forceinline__ void load_weights(const Worker &w, const Pass &pass, uint32_t slot,
                                                        uint32_t slice, Weights &weights) {
        const uint32_t first = pass.place * pass.slot_slices + slice % pass.slot_slices; // in the slot
        const uint32_t address = slot + first * PERK_SLICE_BLOCKS * PERK_WEIGHT_BLOCK_BYTES + w.lane * 16;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const bool is_there = pass.has_tile && slice * PERK_SLICE_BLOCKS + i / 2 < kBlocks;
            weights.of[i] = is_there ? load_shared16(address + i * 512) : Vec16{0, 0, 0, 0};
        }
    }

    static __device__ __forceinline__ bool is_there(uint32_t slice) {
        return kSlices % kUnitSlices == 0 || slice < kSlices;
    }
    static __device__ __forceinline__ bool ends_slot(const Pass &pass, uint32_t slice) {
        return slice % pass.slot_slices == pass.slot_slices - 1 || slice == kSlices - 1;
    }
    // A unit's slot of x.
    static __device__ __forceinline__ void wait_input(const Worker &w, uint32_t unit) {
        const uint32_t number = w.slices + unit;
        wait_slot<false>(w, w.input_full(number), number / program::input_slots & 1, PERK_ROLE_INPUT_FULL, number);
    }
    static __device__ __forceinline__ void release_input(const Worker &w, uint32_t unit) {
        mbarrier_arrive_after(w.input_empty(w.slices + unit), w.lane, 0);
    }
    static __device__ __forceinline__ void leave_input(const Worker &w, uint32_t unit) {
        wait_input(w, unit);
        release_input(w, unit);
    }

    // Loads a unit's weights, zeros where there are none: what is not defined on all ways keeps its registers through
    // all tasks. Returns the chunk of the next.
    static __device__ __forceinline__ uint32_t load_unit(const Worker &w, const Pass &pass, uint32_t unit,
                                                         uint32_t chunk, Weights (&weights)[kUnitSlices]) {
#pragma unroll
        for (uint32_t i = 0; i < kUnitSlices; i++) {
            const uint32_t slice = unit * kUnitSlices + i;
            if (slice < kSlices && (i == 0 || !pass.is_split)) wait_full(w, chunk);
            load_weights(w, pass, w.ring_slot(chunk), slice, weights[i]);
            if (slice < kSlices && ends_slot(pass, slice)) release_chunk(w, chunk++, weights[i].last());
        }
        return chunk;
    }

    // A unit whose weights are the other warpgroup's. Slots are given back by all warps, and none may do so before they
    // are full: it could do it twice before others have done it once. What the warp has loaded before is in its
    // products.
    static __device__ __forceinline__ uint32_t leave_unit(const Worker &w, const Pass &pass, uint32_t unit,
                                                          uint32_t chunk) {
        const uint32_t slice = min(unit * kUnitSlices + kUnitSlices - 1, kSlices - 1); // a unit lies in one slot
        if (!ends_slot(pass, slice)) return chunk;
        wait_full(w, chunk);
        release_chunk(w, chunk, 0);
        return chunk + 1;
    }

    static __device__ __forceinline__ void begin_products(const Worker &w, uint32_t unit,
                                                          const Weights (&weights)[kUnitSlices], Sums &sums) {
        wait_input(w, unit);
        const uint64_t x = wgmma_operand(w.input_slot(w.slices + unit));
        wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < kUnitSlices; i++) {
            // A slice that is not there has weights of zero, and x of the first: a branch would end the overlap.
            const uint64_t slice = is_there(unit * kUnitSlices + i) ? x + i * (SharedMap::slice_bytes / 16) : x;
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) wgmma<kColumns>(sums, weights[i].of[j], slice + j * 2);
        }
        wgmma_commit();
    }
    static __device__ __forceinline__ void end_products(const Worker &w, uint32_t unit, Sums &sums) {
        wgmma_wait<0>();
        wgmma_keep(sums);
        release_input(w, unit);
    }

    // Adds the products of a unit. While they are made, the weights of the warpgroup's next one are loaded.
    static __device__ __forceinline__ uint32_t multiply_unit(const Worker &w, const Pass &pass, uint32_t unit,
                                                             uint32_t chunk, const Weights (&weights)[kUnitSlices],
                                                             Weights (&next)[kUnitSlices], Sums &sums) {
        const bool has_other = pass.is_split && unit + 1 < kUnits;
        begin_products(w, unit, weights, sums);
        if (has_other) chunk = leave_unit(w, pass, unit + 1, chunk);
        chunk = load_unit(w, pass, unit + pass.step(), chunk, next);
        if (has_other) leave_input(w, unit + 1);
        end_products(w, unit, sums);
        return chunk;
    }

    // The products of a pass.
    static __device__ __forceinline__ uint32_t multiply(Worker &w, const Pass &pass, uint32_t chunk, Sums &sums) {
        uint32_t unit = pass.is_split ? w.warp / kGroupWarps : 0; // the warpgroup's first
        Weights weights[kUnitSlices], next[kUnitSlices];
        if (unit > 0) {
            chunk = leave_unit(w, pass, 0, chunk);
            leave_input(w, 0);
        }
        chunk = load_unit(w, pass, unit, chunk, weights);
#pragma unroll 1
        while (unit < kUnits) {
            chunk = multiply_unit(w, pass, unit, chunk, weights, next, sums);
            unit += pass.step();
            if (unit >= kUnits) break;
            chunk = multiply_unit(w, pass, unit, chunk, next, weights, sums);
            unit += pass.step();
        }
        w.slices += kUnits;
        return chunk;
    }

    // ---- sums of the two warpgroups: each gives the other those of the tokens that it does not finish ----

    static_assert(PERK_CONSUMER_WARPS * 32 * sizeof(PartSums) <= program::reduction_bytes,
                  "the plan gave this stage too little reduction scratch");
    static __device__ __forceinline__ uint32_t scratch(const Worker &w, uint32_t warp) {
        return w.reduction() + warp * (32 * sizeof(PartSums)) + w.lane * 16;
    }
    static __device__ __forceinline__ void take_part(const Sums &sums, uint32_t part, PartSums &taken) {
#pragma unroll
        for (uint32_t i = 0; i < kPart / 2; i++) taken[i] = part == 0 ? sums[i] : sums[kPart / 2 + i];
    }
    static __device__ __forceinline__ void give_part(const Worker &w, const PartSums &part) {
#pragma unroll
        for (uint32_t i = 0; i < kPart / 8; i++)
            store_shared16(scratch(w, w.warp) + i * 512,
                           {__float_as_uint(part[i * 4]), __float_as_uint(part[i * 4 + 1]),
                            __float_as_uint(part[i * 4 + 2]), __float_as_uint(part[i * 4 + 3])});
    }
    static __device__ __forceinline__ void add_given(const Worker &w, PartSums &part) {
#pragma unroll
        for (uint32_t i = 0; i < kPart / 8; i++) {
            const Vec16 given = load_shared16(scratch(w, w.warp ^ kGroupWarps) + i * 512);
            part[i * 4] += __uint_as_float(given.x);
            part[i * 4 + 1] += __uint_as_float(given.y);
            part[i * 4 + 2] += __uint_as_float(given.z);
            part[i * 4 + 3] += __uint_as_float(given.w);
        }
    }

    // ---- fp32; of logits the best of the tile as well, as a candidate for argmax ----

    static constexpr bool kIsFloat = kEpilogue == Epilogue::logits || kEpilogue == Epilogue::scores;

    // Lane 4g+q: outputs g and g+8 of a token. All lanes take part.
    static __device__ __forceinline__ void store_floats(const Worker &w, const Finish &f, const Pass &pass,
                                                        uint32_t token, float low, float high) {
        const bool is_live = pass.has_tile && token < f.rows;
        const uint32_t output = pass.tile * PERK_TILE_ROWS + w.lane / 4;
        float *out = reinterpret_cast<float *>(f.out) + uint64_t(token) * Output::kOutStride + output;
        if (is_live && output < kOut) out[0] = low;
        if (is_live && output + 8 < kOut) out[8] = high;
        if constexpr (kEpilogue == Epilogue::logits) store_candidate(w, f, pass, token, output, low, high);
    }

    static __device__ __forceinline__ void store_candidate(const Worker &w, const Finish &f, const Pass &pass,
                                                           uint32_t token, uint32_t output, float low, float high) {
        Best best{kLowest, 0xffffffffu};
        if (output < kOut) best.take(low, output);
        if (output + 8 < kOut) best.take(high, output + 8);
        for (int offset = 4; offset <= 16; offset *= 2) best.take_from_lane(offset); // over g
        if (w.lane >= 4 || !pass.has_tile || token >= f.rows) return;
        *reinterpret_cast<uint2 *>(f.candidates + (uint64_t(token) * Output::kTiles + pass.tile) * 8) =
            make_uint2(__float_as_uint(best.value), best.index);
    }

    // ---- norms ----
    // The linear that writes the residual stream writes its norm, too, but for the scale, and leaves a sum of squares
    // of each token and tile. The linears behind make the scales, and their outputs get them.

    struct NextNorm {
        const uint8_t *gain;
        uint8_t *out;   // an input of batched linears
        float *squares; // [tokens][tiles]
        bool is_made;
    };
    static constexpr bool kMayMakeNorm = kEpilogue == Epilogue::residual && !kIsNormed;
    static constexpr bool kMayBeScaled = kIsNormed && !kIsFloat;

    // `low` and `high` are pairs of neighbouring outputs of a token: lane 4g+q has those of token 2q + g % 2.
    static __device__ __forceinline__ void store_norm(const Worker &w, const Finish &f, const NextNorm &next,
                                                      const Pass &pass, uint32_t first_token, uint32_t low,
                                                      uint32_t high) {
        const uint32_t token = Outputs::token(w, first_token), column = Outputs::pair(w, pass.tile);
        const bool is_live = pass.has_tile && token < f.rows;
        const uint32_t pairs[2] = {low, high};
        float square = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < 2; i++) {
            const float first = low_bf16(pairs[i]), second = high_bf16(pairs[i]);
            const uint32_t at = column + i * 8;
            square += first * first + second * second;
            if (!is_live || at >= kOut) continue;
            const uint32_t gain = __ldg(reinterpret_cast<const uint32_t *>(next.gain) + at / 2);
            *reinterpret_cast<uint32_t *>(next.out + wide_pair(token, at)) =
                pack_bf16(first * low_bf16(gain), second * high_bf16(gain));
        }
        square += __shfl_xor_sync(0xffffffffu, square, 8); // over the pairs
        square += __shfl_xor_sync(0xffffffffu, square, 16);
        if (w.lane < 8 && is_live) next.squares[uint64_t(token) * Output::kTiles + pass.tile] = square;
    }

    static __device__ __forceinline__ uint32_t scale_of(const Worker &w, uint32_t token) {
        return w.reduction() + PERK_CONSUMER_WARPS * 32 * sizeof(PartSums) + token * 4;
    }
    // A warp makes those of every eighth of `rows` tokens, loaded four at a time; all others are 1.
    static __device__ __forceinline__ void make_scales(const Worker &w, const uint8_t *squares, uint32_t rows,
                                                       float eps) {
        constexpr uint32_t kSums = (kIn + PERK_TILE_ROWS - 1) / PERK_TILE_ROWS, kTogetherRows = 4;
#pragma unroll 1
        for (uint32_t first = w.warp; first < rows; first += kTogetherRows * PERK_CONSUMER_WARPS) {
            float totals[kTogetherRows] = {};
#pragma unroll
            for (uint32_t begin = 0; begin < kSums; begin += 32)
#pragma unroll
                for (uint32_t r = 0; r < kTogetherRows; r++) {
                    const uint32_t row = min(first + r * PERK_CONSUMER_WARPS, rows - 1), sum = begin + w.lane;
                    if (sum < kSums)
                        totals[r] += __uint_as_float(load_coherent4(squares + (uint64_t(row) * kSums + sum) * 4));
                }
#pragma unroll
            for (uint32_t r = 0; r < kTogetherRows; r++) {
                const uint32_t row = first + r * PERK_CONSUMER_WARPS;
                const float total = warp_sum(totals[r]);
                if (w.lane == 0 && row < rows)
                    store_shared4(scale_of(w, row), __float_as_uint(rsqrtf(total / kIn + eps)));
            }
        }
        if (w.thread >= rows && w.thread < kColumns) store_shared4(scale_of(w, w.thread), __float_as_uint(1.0f));
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    }

    // ---- the task ----

    static __device__ __forceinline__ Pass make_pass(const Worker &w, const TaskView &task, uint32_t first,
                                                     uint32_t tiles) {
        Pass pass;
        pass.is_split = kTogether <= kGroupWarps || tiles <= kGroupWarps;
        pass.slot_slices = PERK_WIDE_SLOT_BLOCKS(tiles) / PERK_SLICE_BLOCKS;
        const uint32_t place = pass.is_split ? w.warp % kGroupWarps : w.warp;
        pass.has_tile = place < tiles;
        pass.place = min(place, tiles - 1);
        pass.tile = task.first() + (first + pass.place) * task.stride();
        return pass;
    }

    static __device__ __forceinline__ Residuals load_residuals(const Worker &w, const Finish &f, const Pass &pass,
                                                               uint32_t part) {
        return Residuals(Outputs(w, f, pass.tile, pass.has_tile, part * kPart), 0);
    }

    // One part of the tokens.
    static __device__ __forceinline__ void finish(const Worker &w, const Finish &f, const NextNorm &next,
                                                  const Pass &pass, uint32_t part, const PartSums &sums,
                                                  const Residuals &residuals) {
        const Outputs outputs(w, f, pass.tile, pass.has_tile, part * kPart);
#pragma unroll
        for (uint32_t i = 0; i < kPart / 8; i++) {
            const uint32_t token = part * kPart + i * 8 + w.lane % 4 * 2; // the lane's first
            float sum[4] = {sums[i * 4], sums[i * 4 + 1], sums[i * 4 + 2], sums[i * 4 + 3]};
            if constexpr (kMayBeScaled) {
#pragma unroll
                for (uint32_t j = 0; j < 4; j++) sum[j] *= __uint_as_float(load_shared4(scale_of(w, token + j % 2)));
            }
            if constexpr (kIsFloat) {
                store_floats(w, f, pass, token, sum[0] + outputs.low_bias, sum[2] + outputs.high_bias);
                store_floats(w, f, pass, token + 1, sum[1] + outputs.low_bias, sum[3] + outputs.high_bias);
            } else if constexpr (kMayMakeNorm) {
                const float2 low = Output::pair_outputs(w, sum[0] + outputs.low_bias, sum[1] + outputs.low_bias);
                const float2 high = Output::pair_outputs(w, sum[2] + outputs.high_bias, sum[3] + outputs.high_bias);
                outputs.low.store(i, low, residuals.low[i]);
                outputs.high.store(i, high, residuals.high[i]);
                if (!next.is_made) continue;
                store_norm(w, f, next, pass, part * kPart + i * 8, outputs.low.stored(i, low, residuals.low[i]),
                           outputs.high.stored(i, high, residuals.high[i]));
            } else {
                Output::finish_group(w, outputs, i, sum, residuals.low[i], residuals.high[i]);
            }
        }
    }

    // `tiles` of them from the worker's `first` on.
    static __device__ __forceinline__ uint32_t run_pass(Worker &w, const TaskView &task, uint32_t first, uint32_t tiles,
                                                        const Finish &f, const NextNorm &next, uint32_t chunk) {
        const Pass pass = make_pass(w, task, first, tiles);
        uint32_t part = pass.is_split ? w.warp / kGroupWarps : 0;
        const uint32_t end = pass.is_split ? part + 1 : 2;
        Residuals residuals = load_residuals(w, f, pass, part); // early: in flight while the products are made
        Sums sums = {};
        PartSums mine;
        chunk = multiply(w, pass, chunk, sums);
        if (pass.is_split) {
            if (first > 0) named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // what was given before is taken
            take_part(sums, 1 - part, mine);
            give_part(w, mine);
            named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        }
#pragma unroll 1
        for (; part < end; part++) {
            take_part(sums, part, mine);
            if (pass.is_split) add_given(w, mine);
            finish(w, f, next, pass, part, mine, residuals);
            if (part + 1 < end) residuals = load_residuals(w, f, pass, part + 1);
        }
        return chunk;
    }

    static __device__ __forceinline__ uint32_t run(Worker &w, const TaskView &task, uint32_t chunk, float eps) {
        const Finish f{w.args.activations + task.operand(kResidual), w.args.constants + task.operand(kBias),
                       w.args.activations + task.operand(kOutput), row_count<kRowsOf>(w),
                       w.args.activations + task.operand(kCandidates)};
        const NextNorm next{w.args.constants + task.operand(kNormWeight), w.args.activations + task.next_input(),
                            reinterpret_cast<float *>(f.candidates), (task.scalar() & PERK_BATCHED_MAKES_NORM) != 0};
        const uint32_t count = task.count();
        await_inputs(w, task);
        if (has_no_rows<kRowsOf>(w)) return chunk;
        if constexpr (kMayBeScaled)
            make_scales(w, f.candidates, task.scalar() & PERK_BATCHED_IS_SCALED ? f.rows : 0, eps);
#pragma unroll 1
        for (uint32_t first = 0; first < count; first += kTogether)
            chunk = run_pass(w, task, first, min(kTogether, count - first), f, next, chunk);
        return chunk;
    }
};

} // namespace perk
