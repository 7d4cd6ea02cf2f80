// batched linears: out = x W^T for the 9 to 64 tokens of a step, with the weights as the left operand of mma, as in
// linear.cuh, and x as wide.cuh has it: in slices that the feeder brings, ahead of the products. The stream of weights
// is all that takes time, if nothing else gets in its way. So the warps share the depth of a tile, whose chunks are
// copied in one piece each: a warp has a slice of every chunk. It takes its slice of x into registers once for all the
// tiles of a pass, whose chunks follow each other in the ring, and the sums of all of them stay in registers until the
// pass is over; then the warps put them together, tile by tile, and each finishes a group of 8 tokens.
#pragma once

namespace perk {

template <Rows kRowsOf, uint32_t kIn, uint32_t kOut, uint32_t kTogether, Epilogue kEpilogue, Activation kActivation,
          bool kHasBias, bool kOutIsInput>
struct BatchedLinear {
    static constexpr uint32_t kBlocks = (kIn + PERK_BLOCK_COLS - 1) / PERK_BLOCK_COLS; // of a tile
    static constexpr uint32_t kChunks = (kBlocks + PERK_CHUNK_BLOCKS - 1) / PERK_CHUNK_BLOCKS;
    static constexpr uint32_t kSlices = (kBlocks + PERK_SLICE_BLOCKS - 1) / PERK_SLICE_BLOCKS;
    static constexpr uint32_t kGroups = program::wide_tokens / 8; // of tokens
    using Output = WideOutput<kOut, kEpilogue, kActivation, kHasBias, kOutIsInput>;
    using Finish = typename Output::Finish;
    using Outputs = typename Output::Outputs;
    static_assert(PERK_CHUNK_BLOCKS == PERK_CONSUMER_WARPS * PERK_SLICE_BLOCKS && PERK_SLICE_BLOCKS == 2,
                  "a warp has a slice of every chunk");

    // ---- the products ----

    // The right operands of a slice.
    struct Operands {
        Vec16 x[PERK_SLICE_BLOCKS][kGroups];
    };
    using Sums = float[kTogether][kGroups][4];

    // Takes a slice of x out of its slot, of which this warp is the only reader.
    static __device__ __forceinline__ void take_operands(const Worker &w, uint32_t slice, Operands &operands) {
        const uint32_t number = w.slices + slice, base = w.input_slot(number), row = w.lane % 8;
        wait_slot<false>(w, w.input_full(number), number / program::input_slots & 1, PERK_ROLE_INPUT_FULL, number);
        const bool is_there = kSlices % PERK_CONSUMER_WARPS == 0 || slice < kSlices;
#pragma unroll
        for (uint32_t s = 0; s < PERK_SLICE_BLOCKS; s++)
#pragma unroll
            for (uint32_t n = 0; n < kGroups; n++)
                operands.x[s][n] =
                    is_there
                        ? load_matrices(base + (n * 8 + row) * PERK_SLICE_ROW_BYTES + ((s * 4 + w.lane / 8) ^ row) * 16)
                        : Vec16{0, 0, 0, 0};
        __syncwarp();
        mbarrier_arrive_after(w.input_empty(number), w.lane, word_of(operands.x[0]) | word_of(operands.x[1]));
    }

    // Adds the products of a tile's slice, which is in the ring at `place`.
    static __device__ __forceinline__ void multiply_slice(const Worker &w, const RingPlace &place, uint32_t chunk,
                                                          uint32_t slice, const Operands &operands,
                                                          float (&sums)[kGroups][4]) {
        const uint32_t address =
            w.slot_address(place.slot) + w.warp * (PERK_SLICE_BLOCKS * PERK_WEIGHT_BLOCK_BYTES) + w.lane * 16;
        Vec16 a[PERK_SLICE_BLOCKS], b[PERK_SLICE_BLOCKS];
        place.await(w, chunk);
#pragma unroll
        for (uint32_t s = 0; s < PERK_SLICE_BLOCKS; s++) {
            a[s] = load_shared16(address + s * PERK_WEIGHT_BLOCK_BYTES);
            b[s] = load_shared16(address + s * PERK_WEIGHT_BLOCK_BYTES + 512);
        }
        place.release(w, word_of(a) | word_of(b));
#pragma unroll
        for (uint32_t s = 0; s < PERK_SLICE_BLOCKS; s++) {
            if (kBlocks % PERK_CHUNK_BLOCKS != 0 && slice * PERK_SLICE_BLOCKS + s >= kBlocks) continue;
#pragma unroll
            for (uint32_t n = 0; n < kGroups; n++)
                mma(sums[n], a[s].x, a[s].y, a[s].z, a[s].w, operands.x[s][n].x, operands.x[s][n].y);
#pragma unroll
            for (uint32_t n = 0; n < kGroups; n++)
                mma(sums[n], b[s].x, b[s].y, b[s].z, b[s].w, operands.x[s][n].z, operands.x[s][n].w);
        }
    }

    // The products of a pass over `tiles` tiles. Returns the next chunk.
    static __device__ __forceinline__ uint32_t multiply(Worker &w, uint32_t tiles, uint32_t chunk, Sums &sums) {
        RingPlace place = RingPlace::of(chunk);
#pragma unroll 1
        for (uint32_t slice = w.warp; slice < kChunks * PERK_CONSUMER_WARPS; slice += PERK_CONSUMER_WARPS) {
            Operands operands;
            take_operands(w, slice, operands);
#pragma unroll
            for (uint32_t t = 0; t < kTogether; t++) {
                if (t >= tiles) break;
                multiply_slice(w, place, chunk, slice, operands, sums[t]);
                place = place.next();
                chunk++;
            }
        }
        w.slices += kChunks * PERK_CONSUMER_WARPS;
        return chunk;
    }

    // ---- sums of the warps: a cell, a group of 8 tokens of a tile, is put together and finished by one warp ----

    static constexpr uint32_t kRoundGroups = kGroups % 4 == 0 ? 4 : 2; // cells that are put together at once
    static constexpr uint32_t kTileRounds = kGroups / kRoundGroups;
    static constexpr uint32_t kRoundSets = PERK_CONSUMER_WARPS / kRoundGroups; // of warps, which take rounds in turn
    static constexpr uint32_t kWarpCells = (kTogether * kTileRounds + kRoundSets - 1) / kRoundSets;
    static constexpr uint32_t kCellBytes = PERK_CONSUMER_WARPS * 512, kScratch = kRoundGroups * kCellBytes;
    static_assert(kGroups % 2 == 0 && kScratch <= program::reduction_bytes,
                  "the plan gave this stage too little reduction scratch");

    struct Cell {
        uint32_t tile; // its number in the pass
        uint32_t group;
    };
    // The warp's cell of a round.
    static __device__ __forceinline__ Cell cell_of(const Worker &w, uint32_t round) {
        return {round / kTileRounds, round % kTileRounds * kRoundGroups + w.warp % kRoundGroups};
    }
    static __device__ __forceinline__ uint32_t scratch(const Worker &w, uint32_t cell, uint32_t warp) {
        return w.reduction() + cell * kCellBytes + warp * 512 + w.lane * 16;
    }
    // The sums of the first round; the others' move up.
    static __device__ __forceinline__ void share_sums(const Worker &w, const Sums &sums) {
#pragma unroll
        for (uint32_t i = 0; i < kRoundGroups; i++) {
            const float(&sum)[4] = sums[i / kGroups][i % kGroups];
            store_shared16(scratch(w, i, w.warp), {__float_as_uint(sum[0]), __float_as_uint(sum[1]),
                                                   __float_as_uint(sum[2]), __float_as_uint(sum[3])});
        }
    }
    static __device__ __forceinline__ void next_round(Sums &sums) {
#pragma unroll
        for (uint32_t i = kRoundGroups; i < kTogether * kGroups; i++)
#pragma unroll
            for (uint32_t c = 0; c < 4; c++)
                sums[(i - kRoundGroups) / kGroups][(i - kRoundGroups) % kGroups][c] = sums[i / kGroups][i % kGroups][c];
    }
    static __device__ __forceinline__ void add_shared(const Worker &w, float (&sum)[4]) {
#pragma unroll
        for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++) {
            const Vec16 part = load_shared16(scratch(w, w.warp % kRoundGroups, warp));
            sum[0] += __uint_as_float(part.x);
            sum[1] += __uint_as_float(part.y);
            sum[2] += __uint_as_float(part.z);
            sum[3] += __uint_as_float(part.w);
        }
    }

    // ---- fp32; of logits the best of the tile as well, as a candidate for argmax ----

    static constexpr bool kIsFloat = kEpilogue == Epilogue::logits || kEpilogue == Epilogue::scores;

    // Lane 4g+q: outputs g and g+8 of a token. All lanes take part.
    static __device__ __forceinline__ void store_floats(const Worker &w, const Finish &f, uint32_t tile, uint32_t token,
                                                        float low, float high) {
        const bool is_live = token < f.rows;
        const uint32_t output = tile * PERK_TILE_ROWS + w.lane / 4;
        float *out = reinterpret_cast<float *>(f.out) + uint64_t(token) * Output::kOutStride + output;
        if (is_live && output < kOut) out[0] = low;
        if (is_live && output + 8 < kOut) out[8] = high;
        if constexpr (kEpilogue == Epilogue::logits) store_candidate(w, f, tile, token, output, low, high);
    }

    static __device__ __forceinline__ void store_candidate(const Worker &w, const Finish &f, uint32_t tile,
                                                           uint32_t token, uint32_t output, float low, float high) {
        Best best{kLowest, 0xffffffffu};
        if (output < kOut) best.take(low, output);
        if (output + 8 < kOut) best.take(high, output + 8);
        for (int offset = 4; offset <= 16; offset *= 2) best.take_from_lane(offset); // over g
        if (w.lane >= 4 || token >= f.rows) return;
        *reinterpret_cast<uint2 *>(f.candidates + (uint64_t(token) * Output::kTiles + tile) * 8) =
            make_uint2(__float_as_uint(best.value), best.index);
    }

    // ---- the task ----

    // What is added to the lane's outputs of a cell: two pairs. It is in flight while the products are made, but for 64
    // tokens, of which sums and operands take all registers.
    static constexpr bool kResidualsEarly = kGroups < 8;
    struct Residual {
        uint32_t low, high;
    };
    // `first` is the pass's first tile in the task.
    static __device__ __forceinline__ uint32_t tile_of(const TaskView &task, uint32_t first, Cell cell) {
        return task.first() + (first + cell.tile) * task.stride();
    }

    static __device__ __forceinline__ void finish_cell(const Worker &w, const Finish &f, uint32_t tile, uint32_t group,
                                                       const float (&sum)[4], const Residual &residual) {
        const Outputs outputs(w, f, tile, true, group * 8);
        const uint32_t token = group * 8 + w.lane % 4 * 2; // the lane's first
        if constexpr (kIsFloat) {
            store_floats(w, f, tile, token, sum[0] + outputs.low_bias, sum[2] + outputs.high_bias);
            store_floats(w, f, tile, token + 1, sum[1] + outputs.low_bias, sum[3] + outputs.high_bias);
        } else {
            Output::finish_group(w, outputs, 0, sum, residual.low, residual.high);
        }
    }

    // Made where it is needed: kept while the products are made, it would cost spills.
    static __device__ __forceinline__ Finish finish_of(const Worker &w, const TaskView &task) {
        return {w.args.activations + task.operand(kResidual), w.args.constants + task.operand(kBias),
                w.args.activations + task.operand(kOutput), row_count<kRowsOf>(w),
                w.args.activations + task.operand(kCandidates)};
    }

    static __device__ __forceinline__ void load_residuals(const Worker &w, const TaskView &task, uint32_t first,
                                                          uint32_t tiles, Residual (&residuals)[kWarpCells]) {
        const Finish f = finish_of(w, task);
#pragma unroll
        for (uint32_t i = 0; i < kWarpCells; i++) {
            const Cell cell = cell_of(w, i * kRoundSets + w.warp / kRoundGroups);
            const Outputs outputs(w, f, tile_of(task, first, cell), cell.tile < tiles, cell.group * 8);
            residuals[i] = {outputs.low.load_residual(0), outputs.high.load_residual(0)};
        }
    }

    // `tiles` of them from the worker's `first` on.
    static __device__ __forceinline__ uint32_t run_pass(Worker &w, const TaskView &task, uint32_t first, uint32_t tiles,
                                                        uint32_t chunk) {
        Residual residuals[kWarpCells];
        if constexpr (kResidualsEarly) load_residuals(w, task, first, tiles, residuals);
        Sums sums = {};
        chunk = multiply(w, tiles, chunk, sums);
        stamp(w, PERK_STAMP_MULTIPLIED);
        if constexpr (!kResidualsEarly) load_residuals(w, task, first, tiles, residuals);
        const Finish f = finish_of(w, task);
// Not unrolled: a step comes by this code with every pass, and it would come from L2 each time.
#pragma unroll 1
        for (uint32_t round = 0; round < tiles * kTileRounds; round++) {
            named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // what was shared before is read
            share_sums(w, sums);
            named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
            stamp(w, PERK_STAMP_SHARED);
            next_round(sums);
            if (w.warp / kRoundGroups != round % kRoundSets) continue;
            const Cell cell = cell_of(w, round);
            float sum[4] = {};
            add_shared(w, sum);
            finish_cell(w, f, tile_of(task, first, cell), cell.group, sum, residuals[0]);
#pragma unroll
            for (uint32_t i = 1; i < kWarpCells; i++) residuals[i - 1] = residuals[i];
        }
        return chunk;
    }

    static __device__ __forceinline__ uint32_t run(Worker &w, const TaskView &task, uint32_t chunk) {
        await_inputs(w, task);
        if (has_no_rows<kRowsOf>(w)) return chunk;
        stamp(w, PERK_STAMP_READ); // slices of x come while products are made
#pragma unroll 1
        for (uint32_t first = 0; first < task.count(); first += kTogether)
            chunk = run_pass(w, task, first, min(kTogether, task.count() - first), chunk);
        return chunk;
    }
};

} // namespace perk
