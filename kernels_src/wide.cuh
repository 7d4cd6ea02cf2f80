// wide linears: out = x W^T for the more than 64 tokens of a step, on wgmma. The packed weights are the left operand,
// as they are for mma: a warp's registers take a fragment as it lies in the ring, and the four warps of a warpgroup
// make 64 rows of it. The tokens are the columns: x lies in memory as shared memory wants it (abi.h, "inputs of wide
// linears"), and the feeder brings it slice by slice. Of a worker's row tiles up to eight are worked on together: by
// both warpgroups over all tokens where there are more than four, by each over half of the tokens otherwise. Sums stay
// in registers until a tile is finished; nobody shares a tile, so no scratch and no barrier is needed.
#pragma once

namespace perk {

// What becomes of finished sums: lane 4g+q has outputs g and g+8 of the tokens 2q and 2q+1 of every 8.
template <uint32_t kOut, Epilogue kEpilogue, Activation kActivation, bool kHasBias, bool kOutIsInput>
struct WideOutput {
    static constexpr bool kIsGated = kEpilogue == Epilogue::gated;
    static constexpr uint32_t kOutWidth = kIsGated ? kOut / 2 : kOut;
    static constexpr uint32_t kOutStride = PERK_ROW_STRIDE(kOutWidth);
    static constexpr uint32_t kTileWidth = kIsGated ? 8 : PERK_TILE_ROWS; // outputs
    static constexpr uint32_t kTiles = (kOutWidth + kTileWidth - 1) / kTileWidth;

    struct Finish {
        const uint8_t *residual, *bias;
        uint8_t *out;
        uint32_t rows;
        uint8_t *candidates; // of logits
    };

    // Lane 4g+q gives the value that is its neighbour's (4(g^1)+q) for the neighbour's: the lane of even g then has the
    // outputs g and g + 1 of token 2q, the other one g - 1 and g of token 2q + 1.
    static __device__ __forceinline__ float2 pair_outputs(const Worker &w, float first, float second) {
        const bool is_even = w.lane / 4 % 2 == 0;
        const float other = __shfl_xor_sync(0xffffffffu, is_even ? second : first, 4);
        return make_float2(is_even ? first : other, is_even ? other : second);
    }

    // Two neighbouring outputs, from an even one on, of a token and of those 8, 16, ... after it.
    struct Column {
        uint8_t *out;
        const uint8_t *residual;
        uint32_t tokens; // from the first on, that there are; 0: nor is there such an output
        bool is_cut;     // there is no second output: zero, as all beyond the width

        static constexpr uint32_t kOutStep = 8 * (kOutIsInput ? PERK_SLICE_ROW_BYTES : kOutStride * 2);

        __device__ __forceinline__ Column(const Finish &f, uint32_t token, uint32_t column, bool has_tile) {
            const uint64_t place = (uint64_t(token) * kOutStride + column) * 2;
            out = f.out + (kOutIsInput ? wide_pair(token, column) : place);
            residual = f.residual + place;
            tokens = has_tile && column < kOutWidth && token < f.rows ? f.rows - token : 0;
            is_cut = column + 1 >= kOutWidth;
        }
        __device__ __forceinline__ uint32_t load_residual(uint32_t group) const {
            if (kEpilogue != Epilogue::residual || group * 8 >= tokens) return 0;
            return load_coherent4(residual + group * (8 * kOutStride * 2));
        }
        // What is stored of `values` in the residual stream; 0 where nothing is.
        __device__ __forceinline__ uint32_t stored(uint32_t group, float2 values, uint32_t added) const {
            if (group * 8 >= tokens) return 0;
            return pack_bf16(values.x + low_bf16(added), is_cut ? 0.0f : values.y + high_bf16(added));
        }
        __device__ __forceinline__ void store(uint32_t group, float2 values, uint32_t added) const {
            if constexpr (kEpilogue == Epilogue::residual) {
                values.x += low_bf16(added);
                values.y += high_bf16(added);
            }
            if (group * 8 < tokens)
                *reinterpret_cast<uint32_t *>(out + group * kOutStep) = pack_bf16(values.x, is_cut ? 0.0f : values.y);
        }
    };

    static __device__ __forceinline__ float bias_at(const Finish &f, uint32_t output) {
        if (!kHasBias || output >= kOut) return 0.0f;
        return from_bf16(__ldg(reinterpret_cast<const uint16_t *>(f.bias) + output));
    }

    // A lane's outputs of a tile, for the tokens from `first_token` on.
    struct Outputs {
        float low_bias, high_bias;
        Column low, high;

        __device__ __forceinline__ Outputs(const Worker &w, const Finish &f, uint32_t tile, bool has_tile,
                                           uint32_t first_token)
            : low_bias(bias_at(f, tile * kTileWidth + w.lane / 4)),
              high_bias(bias_at(f, kIsGated ? kOutWidth + tile * kTileWidth + w.lane / 4
                                            : tile * kTileWidth + w.lane / 4 + 8)),
              low(f, token(w, first_token), pair(w, tile), has_tile),
              high(f, token(w, first_token), pair(w, tile) + (kIsGated ? 0 : 8), has_tile) {}
        static __device__ __forceinline__ uint32_t token(const Worker &w, uint32_t first_token) {
            return first_token + w.lane % 4 * 2 + w.lane / 4 % 2;
        }
        static __device__ __forceinline__ uint32_t pair(const Worker &w, uint32_t tile) {
            return tile * kTileWidth + w.lane / 4 / 2 * 2;
        }
    };

    // Of some groups of 8 tokens, loaded together.
    template <uint32_t kGroups>
    struct Residuals {
        uint32_t low[kGroups], high[kGroups];

        __device__ __forceinline__ Residuals(const Outputs &outputs, uint32_t first_group) {
#pragma unroll
            for (uint32_t i = 0; i < kGroups; i++) {
                low[i] = outputs.low.load_residual(first_group + i);
                high[i] = outputs.high.load_residual(first_group + i);
            }
        }
    };

    // A group of 8 tokens: four sums.
    static __device__ __forceinline__ void finish_group(const Worker &w, const Outputs &outputs, uint32_t group,
                                                        const float *sum, uint32_t low_residual,
                                                        uint32_t high_residual) {
        const float low0 = sum[0] + outputs.low_bias, low1 = sum[1] + outputs.low_bias;
        const float high0 = sum[2] + outputs.high_bias, high1 = sum[3] + outputs.high_bias;
        if constexpr (kIsGated) {
            const float first = activate<kActivation>(round_bf16(low0)) * round_bf16(high0);
            const float second = activate<kActivation>(round_bf16(low1)) * round_bf16(high1);
            outputs.low.store(group, pair_outputs(w, first, second), 0);
        } else {
            outputs.low.store(group, pair_outputs(w, low0, low1), low_residual);
            outputs.high.store(group, pair_outputs(w, high0, high1), high_residual);
        }
    }

    // kTokens tokens from `first_token` on.
    template <uint32_t kTokens>
    static __device__ __forceinline__ void finish(const Worker &w, const Finish &f, uint32_t tile, bool has_tile,
                                                  uint32_t first_token, const float (&sums)[kTokens / 2]) {
        const Outputs outputs(w, f, tile, has_tile, first_token);
        constexpr uint32_t kBatch = 8; // groups of 8 tokens whose residuals are in flight together
#pragma unroll
        for (uint32_t begin = 0; begin < kTokens / 8; begin += kBatch) {
            const Residuals<kBatch> residuals(outputs, begin);
#pragma unroll
            for (uint32_t i = 0; i < kBatch; i++)
                finish_group(w, outputs, begin + i, sums + (begin + i) * 4, residuals.low[i], residuals.high[i]);
        }
    }
};

template <uint32_t kIn, uint32_t kOut, uint32_t kTogether, uint32_t kShareTokens, Epilogue kEpilogue,
          Activation kActivation, bool kHasBias, bool kOutIsInput>
struct WideLinear {
    static constexpr uint32_t kBlocks = (kIn + PERK_BLOCK_COLS - 1) / PERK_BLOCK_COLS; // of a tile
    static constexpr uint32_t kSlices = (kBlocks + PERK_SLICE_BLOCKS - 1) / PERK_SLICE_BLOCKS;
    using Output = WideOutput<kOut, kEpilogue, kActivation, kHasBias, kOutIsInput>;
    using Finish = typename Output::Finish;

    // ---- the products ----

    // A product takes half of the tokens. Both halves in one would do, too, but the compiler keeps sums of different
    // sizes in registers of their own, and there are not enough for that.
    static constexpr uint32_t kPartColumns = program::wide_tokens / 2;
    static constexpr uint32_t kPartBytes = kPartColumns * PERK_SLICE_ROW_BYTES;

    // What a warp does in one pass over the input: a row tile (or none, beside others of its warpgroup) and the tokens
    // from `first_token` on.
    struct Pass {
        uint32_t slot_blocks; // of a tile in a ring slot
        uint32_t place;       // of the warp's tile in a ring slot
        bool has_tile;
        uint32_t tile;
        uint32_t first_token, first_row; // in the step, and in a slice's slot
        uint32_t parts;                  // of kPartColumns tokens that are the warp's
    };

    // The left operand of a slice: four fragments.
    struct Weights {
        Vec16 of[4];
    };

    static __device__ __forceinline__ void load_weights(const Worker &w, const Pass &pass, uint32_t slot,
                                                        uint32_t slice, Weights &weights) {
        const uint32_t block = slice * PERK_SLICE_BLOCKS % pass.slot_blocks;
        const uint32_t address = slot + (pass.place * pass.slot_blocks + block) * PERK_WEIGHT_BLOCK_BYTES + w.lane * 16;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const bool is_there = pass.has_tile && slice * PERK_SLICE_BLOCKS + i / 2 < kBlocks;
            weights.of[i] = is_there ? load_shared16(address + i * 512) : Vec16{0, 0, 0, 0};
        }
    }

    // Adds the products of one slice.
    static __device__ __forceinline__ uint32_t multiply_slice(Worker &w, const Pass &pass, uint32_t slice,
                                                              uint32_t chunk, float (&sums)[2][kPartColumns / 2]) {
        Weights weights;
        const uint32_t slot_slices = pass.slot_blocks / PERK_SLICE_BLOCKS, number = w.slices + slice;
        if (slice % slot_slices == 0) wait_full(w, chunk);
        load_weights(w, pass, w.ring_slot(chunk), slice, weights);
        if (slice % slot_slices == slot_slices - 1 || slice == kSlices - 1)
            release_chunk(w, chunk++, word_of(weights.of));
        wait_slot<false>(w, w.input_full(number), number / program::input_slots & 1, PERK_ROLE_INPUT_FULL, number);
        const uint64_t x = wgmma_operand(w.input_slot(number) + pass.first_row * PERK_SLICE_ROW_BYTES);
        wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) wgmma<kPartColumns>(sums[0], weights.of[i], x + i * 2);
        if (pass.parts == 2) {
            wgmma_fence();
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) wgmma<kPartColumns>(sums[1], weights.of[i], x + kPartBytes / 16 + i * 2);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(sums[0]);
        wgmma_keep(sums[1]);
        mbarrier_arrive_after(w.input_empty(number), w.lane, 0);
        return chunk;
    }

    // One slice after the other: while a warpgroup waits for its products and loads weights, the tensor cores have
    // those of the other one.
    static __device__ __forceinline__ uint32_t multiply(Worker &w, const Pass &pass, uint32_t chunk,
                                                        float (&sums)[2][kPartColumns / 2]) {
#pragma unroll 1
        for (uint32_t slice = 0; slice < kSlices; slice++) chunk = multiply_slice(w, pass, slice, chunk, sums);
        w.slices += kSlices;
        return chunk;
    }

    // ---- the task ----

    // `tiles` of them from the worker's `first` on.
    static __device__ __forceinline__ uint32_t run_pass(Worker &w, const TaskView &task, uint32_t first, uint32_t tiles,
                                                        const Finish &f, uint32_t chunk) {
        constexpr bool kIsHalf = kShareTokens == kPartColumns; // one part for both warpgroups
        const uint32_t places = kIsHalf || tiles > PERK_WIDE_TILES / 2 ? PERK_WIDE_TILES : PERK_WIDE_TILES / 2;
        const uint32_t unit = task.first(), share = unit / Output::kTiles, share_token = share * kShareTokens;
        Pass pass;
        pass.slot_blocks = PERK_WIDE_SLOT_BLOCKS(tiles);
        pass.has_tile = w.warp % places < tiles;
        pass.place = min(w.warp % places, tiles - 1);
        pass.tile = unit - share * Output::kTiles + (first + pass.place) * task.stride();
        pass.parts = !kIsHalf && places == PERK_WIDE_TILES && f.rows > share_token + kPartColumns ? 2 : 1;
        pass.first_row = w.warp / places * kPartColumns;
        pass.first_token = pass.first_row + share_token;
        float sums[2][kPartColumns / 2] = {};
        chunk = multiply(w, pass, chunk, sums);
#pragma unroll
        for (uint32_t part = 0; part < 2; part++)
            if (part < pass.parts)
                Output::template finish<kPartColumns>(w, f, pass.tile, pass.has_tile,
                                                      pass.first_token + part * kPartColumns, sums[part]);
        return chunk;
    }

    static __device__ __forceinline__ uint32_t run(Worker &w, const TaskView &task, uint32_t chunk) {
        const Finish f{w.args.activations + task.operand(kResidual), w.args.constants + task.operand(kBias),
                       w.args.activations + task.operand(kOutput), w.num_tokens(), nullptr};
        const uint32_t count = task.count();
        await_inputs(w, task);
        if (!has_share(task.first() / Output::kTiles * kShareTokens, f.rows)) return chunk;
#pragma unroll 1
        for (uint32_t first = 0; first < count; first += kTogether) {
            const uint32_t tiles = min(kTogether, count - first);
            chunk = run_pass(w, task, first, tiles, f, chunk);
        }
        return chunk;
    }
};

} // namespace perk
