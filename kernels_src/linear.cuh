// linear: out = x W^T for 1 to 64 rows of x, with the packed weights as the left operand of the tensor cores: a row
// tile is 16 outputs, its columns are the rows of x. The 8 warps share a tile by splitting its depth (column block kb
// belongs to warp kb % 8) and add their partial sums in shared memory; one warp finishes the tile: scale of a folded
// norm, bias, residual, activation of a gate, store.
#pragma once

namespace perk {

enum class Epilogue {
    store,    // bf16
    residual, // + residual, bf16
    gated,    // the tile holds 8 gate rows, then the 8 up rows that belong to them: activation(gate) * up, bf16
    logits,   // fp32, and the tile's largest value of each row as a candidate for argmax
    scores,   // fp32
    sum,      // of experts: their shares of the outputs of a token, + residual, bf16
};

// Operands of a linear stage, by role.
enum LinearOperand { kInput, kOutput, kResidual, kNormWeight, kBias, kCandidates };

template <Rows kRowsOf, uint32_t kMaxRows, uint32_t kIn, uint32_t kOut, bool kFoldedNorm, Epilogue kEpilogue,
          Activation kActivation, bool kHasBias>
struct Linear {
    static constexpr uint32_t kBlocks = (kIn + PERK_BLOCK_COLS - 1) / PERK_BLOCK_COLS; // of a tile
    static constexpr uint32_t kChunks = (kBlocks + PERK_CHUNK_BLOCKS - 1) / PERK_CHUNK_BLOCKS;
    static constexpr uint32_t kWarpBlocks = (kBlocks + PERK_CONSUMER_WARPS - 1) / PERK_CONSUMER_WARPS; // of one warp
    static constexpr uint32_t kColumnTiles = (kMaxRows + 7) / 8;                                       // of 8 rows of x
    static constexpr uint32_t kInStride = PERK_ROW_STRIDE(kIn);
    static constexpr uint32_t kOutWidth = kEpilogue == Epilogue::gated ? kOut / 2 : kOut;
    static constexpr uint32_t kOutStride = PERK_ROW_STRIDE(kOutWidth);
    static constexpr uint32_t kTiles = (kOut + PERK_TILE_ROWS - 1) / PERK_TILE_ROWS;

    // Chunks that are multiplied at a time: with few rows, of short tiles, two, whose barriers, loads and products hide
    // each other's latencies. Where tiles are long the stream decides, and pairs of chunks would only make it uneven
    // (docs/performance.md).
    static constexpr uint32_t kLongTile = 8; // chunks
    static constexpr uint32_t kGroupChunks = kColumnTiles == 1 && kChunks > 1 && kChunks < kLongTile ? 2 : 1;

    // Partial sums: 512 bytes a warp and column tile. Two buffers save one of the two barriers a tile.
    static constexpr uint32_t kBuffers = kColumnTiles <= 2 ? 2 : 1;
    static constexpr uint32_t kPartialBytes = kColumnTiles * PERK_CONSUMER_WARPS * 512;
    static_assert(kBuffers * kPartialBytes + PERK_CONSUMER_WARPS * kMaxRows * 4 <= program::reduction_bytes,
                  "the plan gave this stage too little reduction scratch");

    // Staged input: every warp keeps its own column blocks of x, 64 bytes a block and row.
    static constexpr uint32_t staged_bytes(uint32_t rows) { return PERK_CONSUMER_WARPS * kWarpBlocks * 64 * rows; }
    static constexpr bool kAlwaysStaged = staged_bytes(kMaxRows) <= program::staging_bytes;
    static_assert(kEpilogue == Epilogue::gated || kActivation == Activation::none, "only a gate is activated");
    static_assert(kAlwaysStaged || !kFoldedNorm, "a folded norm needs its input staged");

    static __device__ __forceinline__ uint32_t partials(const Worker &w, uint32_t buffer, uint32_t column_tile,
                                                        uint32_t warp) {
        return w.reduction() + buffer * kPartialBytes + (column_tile * PERK_CONSUMER_WARPS + warp) * 512 + w.lane * 16;
    }
    static __device__ __forceinline__ float *square_sums(const Worker &w) { // [warps][kMaxRows]
        return reinterpret_cast<float *>(shared_pointer(w.reduction() + kBuffers * kPartialBytes));
    }

    // ---- the right operand: lane 4g+q reads columns 8q ... 8q+7 of block kb of row 8 column_tile + g ----

    struct StagedInput {
        static constexpr uint32_t kGroupsAhead = 0;
        uint32_t base, rows;
        __device__ __forceinline__ StagedInput(const Worker &w, uint32_t row_total)
            : base(w.staging() + w.warp * kWarpBlocks * row_total * 64 + w.lane % 4 * 16), rows(row_total) {}
        __device__ __forceinline__ Vec16 load(const Worker &w, uint32_t kb, uint32_t column_tile) const {
            const uint32_t row = min(column_tile * 8 + w.lane / 4, rows - 1); // what lies beyond is never read back
            return load_shared16(base + (kb / PERK_CONSUMER_WARPS * rows + row) * 64);
        }
    };
    struct DirectInput {
        // From L2, which takes longer than a chunk takes to arrive.
        static constexpr uint32_t kGroupsAhead = PERK_ARCH != 900 || kColumnTiles > 1 ? 0 : kGroupChunks == 2 ? 1 : 2;
        const uint8_t *base;
        uint32_t rows;
        __device__ __forceinline__ DirectInput(const Worker &w, const uint8_t *x, uint32_t row_total)
            : base(x + w.lane % 4 * 16), rows(row_total) {}
        __device__ __forceinline__ Vec16 load(const Worker &w, uint32_t kb, uint32_t column_tile) const {
            const uint32_t row = min(column_tile * 8 + w.lane / 4, rows - 1);
            return load_cached16(base + (uint64_t(row) * kInStride + kb * PERK_BLOCK_COLS) * 2);
        }
    };

    // ---- staging ----

    // Multiplies 8 values by the norm weight and adds their squares to `square_sum`.
    static __device__ __forceinline__ Vec16 apply_gain(Vec16 x, Vec16 gain, float &square_sum) {
        auto pair = [&](uint32_t value, uint32_t weight) {
            const float low = low_bf16(value), high = high_bf16(value);
            square_sum += low * low + high * high;
            return pack_bf16(low * low_bf16(weight), high * high_bf16(weight));
        };
        return {pair(x.x, gain.x), pair(x.y, gain.y), pair(x.z, gain.z), pair(x.w, gain.w)};
    }

    static constexpr uint32_t kLanePieces = (kWarpBlocks * 4 + 31) / 32; // of 16 bytes, of one row

    // The gains of the columns that this lane stages, the same for all rows.
    struct Gains {
        Vec16 of[kFoldedNorm ? kLanePieces : 1];
    };
    static __device__ __forceinline__ Gains load_gains(const Worker &w, const uint8_t *gain) {
        Gains gains{};
        if constexpr (kFoldedNorm) {
#pragma unroll
            for (uint32_t p = 0; p < kLanePieces; p++) {
                const uint32_t piece = w.lane + 32 * p, kb = piece / 4 * PERK_CONSUMER_WARPS + w.warp;
                gains.of[p] =
                    kb < kBlocks ? load_constant16(gain + (kb * PERK_BLOCK_COLS + piece % 4 * 8) * 2) : Vec16{};
            }
        }
        return gains;
    }

    // Copies this warp's blocks of all rows to shared memory; nobody else reads them, so no barrier is needed. Loads of
    // several rows are issued together: one trip to L2, not one a row. There are at most kMost.
    template <uint32_t kMost = kMaxRows>
    static __device__ __forceinline__ void stage_input(const Worker &w, const uint8_t *x, bool x_is_eager,
                                                       const Gains &gains, uint32_t rows) {
        constexpr uint32_t kGroup = kLanePieces >= 8 ? 1 : (8 / kLanePieces < kMost ? 8 / kLanePieces : kMost);
        constexpr uint32_t kSums = kGroup > 4 ? 8 : kGroup > 2 ? 4 : kGroup; // of squares, a power of two
        const uint32_t base = w.staging() + w.warp * kWarpBlocks * rows * 64;
#pragma unroll 1
        for (uint32_t first = 0; first < rows; first += kGroup) {
            Vec16 values[kGroup][kLanePieces];
            EagerLook look{x_is_eager};
#pragma unroll 1
            do {
#pragma unroll
                for (uint32_t r = 0; r < kGroup; r++)
#pragma unroll
                    for (uint32_t p = 0; p < kLanePieces; p++) {
                        const uint32_t piece = w.lane + 32 * p, kb = piece / 4 * PERK_CONSUMER_WARPS + w.warp;
                        const uint32_t column = kb * PERK_BLOCK_COLS + piece % 4 * 8;
                        const bool inside = kb < kBlocks && first + r < rows;
                        values[r][p] = inside ? load_coherent16(x + (uint64_t(first + r) * kInStride + column) * 2)
                                              : Vec16{0, 0, 0, 0};
                    }
#pragma unroll
                for (uint32_t r = 0; r < kGroup; r++)
#pragma unroll
                    for (uint32_t p = 0; p < kLanePieces; p++) look.see(values[r][p]);
            } while (look.again(w));
            float square_sum[kSums] = {};
#pragma unroll
            for (uint32_t r = 0; r < kGroup; r++) {
                if (first + r >= rows) break;
#pragma unroll
                for (uint32_t p = 0; p < kLanePieces; p++) {
                    const uint32_t piece = w.lane + 32 * p, kb = piece / 4 * PERK_CONSUMER_WARPS + w.warp;
                    if (kb >= kBlocks) continue;
                    Vec16 value = values[r][p];
                    if constexpr (kFoldedNorm) value = apply_gain(value, gains.of[p], square_sum[r]);
                    store_shared16(base + (piece / 4 * rows + first + r) * 64 + piece % 4 * 16, value);
                }
            }
            if constexpr (kFoldedNorm) {
                constexpr uint32_t kLanes = 32 / kSums; // have the sum of the same row
                const uint32_t r = w.lane / kLanes;
                const float sum = warp_sums(w.lane, square_sum);
                if (w.lane % kLanes == 0 && r < kGroup && first + r < rows)
                    square_sums(w)[w.warp * kMaxRows + first + r] = sum;
            }
        }
        __syncwarp();
    }

    // ---- the products ----

    // A warp's blocks of a tile are worked on in groups, as many blocks at a time as registers allow.
    static constexpr uint32_t kShare = PERK_CHUNK_BLOCKS / PERK_CONSUMER_WARPS; // blocks of a chunk that are a warp's
    static constexpr uint32_t kGroupBlocks = kColumnTiles <= 2 ? kShare * kGroupChunks : 1;
    static constexpr uint32_t kChunkGroups = kColumnTiles <= 2 ? 1 : kShare; // groups of one chunk
    static constexpr uint32_t kGroups = (kChunks + kGroupChunks - 1) / kGroupChunks * kChunkGroups;
    static constexpr bool kHasWholeChunks = kBlocks % PERK_CHUNK_BLOCKS == 0;
    static constexpr bool kHasWholeGroups = kHasWholeChunks && kChunks % kGroupChunks == 0;
    using Sums = float[kColumnTiles][4];

    // The right operands of one group.
    struct Operands {
        Vec16 x[kGroupBlocks][kColumnTiles];
    };
    // Which block of the tile is block `s` of a group.
    static __device__ __forceinline__ uint32_t block_of(const Worker &w, uint32_t group, uint32_t s) {
        return (group * kGroupBlocks + s) * PERK_CONSUMER_WARPS + w.warp;
    }
    template <class Input>
    static __device__ __forceinline__ void load_operands(const Worker &w, const Input &input, uint32_t rows,
                                                         uint32_t group, Operands &operands) {
#pragma unroll
        for (uint32_t s = 0; s < kGroupBlocks; s++) {
            const uint32_t block = block_of(w, group, s), kb = kHasWholeGroups ? block : min(block, kBlocks - 1);
#pragma unroll
            for (uint32_t n = 0; n < kColumnTiles; n++)
                operands.x[s][n] = n == 0 || n * 8 < rows ? input.load(w, kb, n) : Vec16{};
        }
    }

    // Where a group's chunks are in the ring. Lane i looks after the i-th one's barriers.
    struct GroupPlace {
        RingPlace of[kGroupChunks], mine;
        uint32_t chunk, count; // the first one's number; how many there are

        __device__ __forceinline__ GroupPlace(const Worker &w, const RingPlace &first, uint32_t first_chunk,
                                              uint32_t group)
            : chunk(first_chunk), count(kGroupChunks) {
            of[0] = mine = first;
            if constexpr (kGroupChunks == 2) {
                of[1] = first.next();
                if (w.lane % 2 == 1) mine = of[1];
                if (kChunks % 2 == 1 && group == kGroups - 1) count = 1;
            }
        }
        __device__ __forceinline__ void await(const Worker &w) const {
            wait_slot<false>(w, w.slot_full_barrier(mine.slot), mine.parity, PERK_ROLE_RING_FULL, chunk + w.lane,
                             w.lane >= count);
        }
        __device__ __forceinline__ void release(const Worker &w, uint32_t loaded) const {
            __syncwarp();
            mbarrier_arrive_lanes_after(w.slot_empty_barrier(mine.slot), w.lane, count, loaded);
        }
    };

    // Adds the products of one group to `sums`, of which each chunk of the group has its own.
    static __device__ __forceinline__ void multiply_group(const Worker &w, const Operands &operands, uint32_t rows,
                                                          uint32_t group, const GroupPlace &place,
                                                          Sums (&sums)[kGroupChunks]) {
        const uint32_t in_chunk = group % kChunkGroups * kGroupBlocks;
        if (in_chunk == 0) place.await(w);
        Vec16 a[kGroupBlocks] = {}, b[kGroupBlocks] = {};
#pragma unroll
        for (uint32_t s = 0; s < kGroupBlocks; s++) {
            if (s >= kShare && s / kShare >= place.count) continue;
            const uint32_t block = (in_chunk + s % kShare) * PERK_CONSUMER_WARPS + w.warp;
            const uint32_t address =
                w.slot_address(place.of[s / kShare].slot) + block * PERK_WEIGHT_BLOCK_BYTES + w.lane * 16;
            a[s] = load_shared16(address);
            b[s] = load_shared16(address + 512);
        }
        if (in_chunk + kGroupBlocks >= kShare) // the products need the slots no more
            place.release(w, word_of(a) | word_of(b));
#pragma unroll
        for (uint32_t s = 0; s < kGroupBlocks; s++) {
            if (!kHasWholeGroups && block_of(w, group, s) >= kBlocks) continue;
#pragma unroll
            for (uint32_t n = 0; n < kColumnTiles; n++)
                if (n == 0 || n * 8 < rows) {
                    const Vec16 x = operands.x[s][n];
                    float(&sum)[4] = sums[s / kShare][n];
                    mma(sum, a[s].x, a[s].y, a[s].z, a[s].w, x.x, x.y);
                    mma(sum, b[s].x, b[s].y, b[s].z, b[s].w, x.z, x.w);
                }
        }
    }

    // Adds this warp's share of the tile to `sums`. Returns the next chunk.
    template <class Input>
    static __device__ __forceinline__ uint32_t multiply_tile(const Worker &w, const Input &input, uint32_t rows,
                                                             uint32_t chunk, Sums &sums) {
        constexpr uint32_t kAhead = Input::kGroupsAhead; // operands of as many groups are in flight
        Operands operands[kAhead + 1];
        Sums parts[kGroupChunks] = {};
        RingPlace first = RingPlace::of(chunk); // of the group's chunks
        if constexpr (kAhead > 0) {
#pragma unroll
            for (uint32_t i = 0; i < kAhead; i++)
                if (i < kGroups) load_operands(w, input, rows, i, operands[i]);
        }
#pragma unroll 1
        for (uint32_t begin = 0; begin < kGroups; begin += kAhead + 1)
#pragma unroll
            for (uint32_t i = 0; i <= kAhead; i++) {
                const uint32_t group = begin + i;
                if (group >= kGroups) break;
                if (group + kAhead < kGroups)
                    load_operands(w, input, rows, group + kAhead, operands[(i + kAhead) % (kAhead + 1)]);
                const GroupPlace place(w, first, chunk + group * kGroupChunks / kChunkGroups, group);
                multiply_group(w, operands[i], rows, group, place, parts);
                if ((group + 1) % kChunkGroups == 0) first = place.of[kGroupChunks - 1].next();
            }
#pragma unroll
        for (uint32_t c = 0; c < kGroupChunks; c++)
#pragma unroll
            for (uint32_t n = 0; n < kColumnTiles; n++)
#pragma unroll
                for (uint32_t i = 0; i < 4; i++) sums[n][i] += parts[c][n][i];
        stamp(w, PERK_STAMP_MULTIPLIED);
        return chunk + kChunks;
    }

    // ---- finishing a tile: lane 4g+q has outputs g and g+8 of rows 2q and 2q+1 of the column tile ----

    struct Finish {
        const uint8_t *residual, *bias;
        uint8_t *out, *candidates;
        bool residual_is_eager;
    };

    // Which matrix row the lane's low (g) or high (g+8) output is.
    static __device__ __forceinline__ uint32_t output_row(const Worker &w, uint32_t tile, bool high) {
        if constexpr (kEpilogue == Epilogue::gated)
            return (high ? kOutWidth : 0) + tile * 8 + w.lane / 4;
        else
            return tile * PERK_TILE_ROWS + w.lane / 4 + (high ? 8 : 0);
    }

    static __device__ __forceinline__ uint16_t residual_at(const Finish &f, uint32_t row, uint32_t output,
                                                           uint32_t rows) {
        if (output >= kOut || row >= rows) return 0;
        return load_coherent2(f.residual + (uint64_t(row) * kOutStride + output) * 2);
    }
    // What is added to the lane's outputs.
    struct Residual {
        uint16_t of[4]; // low row 2q, low row 2q+1, high row 2q, high row 2q+1
    };
    static __device__ __forceinline__ void load_residual(const Worker &w, const Finish &f, uint32_t tile,
                                                         uint32_t column_tile, uint32_t rows, Residual &residual) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++)
            residual.of[j] =
                residual_at(f, column_tile * 8 + w.lane % 4 * 2 + j % 2, output_row(w, tile, j >= 2), rows);
    }
    // The same again, until all of it is there.
    static __device__ __forceinline__ void see_residual(const Worker &w, const Finish &f, uint32_t tile,
                                                        uint32_t column_tile, uint32_t rows, Residual &residual) {
        EagerLook look{f.residual_is_eager};
        for (;;) {
#pragma unroll
            for (uint32_t j = 0; j < 4; j++) look.see(residual.of[j]);
            if (!look.again(w)) break;
            load_residual(w, f, tile, column_tile, rows, residual);
        }
    }

    static __device__ __forceinline__ float norm_scale(const Worker &w, uint32_t row, float eps) {
        const float *sums = square_sums(w);
        float total = 0.0f;
#pragma unroll
        for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++) total += sums[warp * kMaxRows + row];
        return rsqrtf(total / kIn + eps);
    }

    // Stores the outputs of one row of x: `low` and `high` are outputs g and g+8 of the tile.
    static __device__ __forceinline__ void store_row(const Worker &w, const Finish &f, uint32_t tile, uint32_t row,
                                                     float low, float high) {
        if constexpr (kEpilogue == Epilogue::gated) {
            const uint32_t column = tile * 8 + w.lane / 4;
            if (column >= kOutWidth) return;
            store_eager2(f.out + (uint64_t(row) * kOutStride + column) * 2,
                         to_bf16(activate<kActivation>(round_bf16(low)) * round_bf16(high)));
        } else {
            const uint32_t output = output_row(w, tile, false);
            auto store = [&](uint32_t column, float value) {
                if (column >= kOut) return;
                const uint64_t index = uint64_t(row) * kOutStride + column;
                if constexpr (kEpilogue == Epilogue::logits || kEpilogue == Epilogue::scores)
                    store_eager4(f.out + index * 4, __float_as_uint(value));
                else
                    store_eager2(f.out + index * 2, to_bf16(value));
            };
            store(output, low);
            store(output + 8, high);
        }
    }

    // The best of the tile's 16 logits of one row, left for argmax. All lanes take part.
    static __device__ __forceinline__ void store_candidate(const Worker &w, const Finish &f, uint32_t tile,
                                                           uint32_t row, uint32_t rows, float low, float high) {
        const uint32_t output = output_row(w, tile, false);
        Best best{kLowest, 0xffffffffu};
        if (output < kOut) best.take(low, output);
        if (output + 8 < kOut) best.take(high, output + 8);
        for (int offset = 4; offset <= 16; offset *= 2) best.take_from_lane(offset); // over g
        if (w.lane < 4 && row < rows) {
            uint32_t *candidate = reinterpret_cast<uint32_t *>(f.candidates) + (uint64_t(row) * kTiles + tile) * 2;
            candidate[0] = __float_as_uint(best.value);
            candidate[1] = best.index;
        }
    }

    template <class RowsOf>
    static __device__ __forceinline__ void finish_tile(const Worker &w, const Finish &f, uint32_t tile,
                                                       uint32_t column_tile, uint32_t buffer, uint32_t rows, float eps,
                                                       const Residual &residual, const RowsOf &rows_of) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}; // low row 2q, low row 2q+1, high row 2q, high row 2q+1
#pragma unroll
        for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++) {
            const Vec16 part = load_shared16(partials(w, buffer, column_tile, warp));
            sum[0] += __uint_as_float(part.x);
            sum[1] += __uint_as_float(part.y);
            sum[2] += __uint_as_float(part.z);
            sum[3] += __uint_as_float(part.w);
        }
        float bias[2] = {0.0f, 0.0f};
        if constexpr (kHasBias) {
#pragma unroll
            for (int high = 0; high < 2; high++) {
                const uint32_t output = output_row(w, tile, high);
                if (output < kOut) bias[high] = from_bf16(__ldg(reinterpret_cast<const uint16_t *>(f.bias) + output));
            }
        }
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            const uint32_t row = column_tile * 8 + w.lane % 4 * 2 + r;
            const float scale = kFoldedNorm && row < rows ? norm_scale(w, rows_of.input(row), eps) : 1.0f;
            const float low = sum[r] * scale + bias[0] + from_bf16(residual.of[r]),
                        high = sum[2 + r] * scale + bias[1] + from_bf16(residual.of[2 + r]);
            if (row < rows) rows_of.store(w, f, tile, row, low, high);
            if constexpr (kEpilogue == Epilogue::logits) store_candidate(w, f, tile, row, rows, low, high);
        }
    }

    // Which row of the input, and where outputs belong, for a row of the product.
    struct SameRows {
        __device__ __forceinline__ uint32_t input(uint32_t row) const { return row; }
        __device__ __forceinline__ void store(const Worker &w, const Finish &f, uint32_t tile, uint32_t row, float low,
                                              float high) const {
            store_row(w, f, tile, row, low, high);
        }
    };

    // All warps leave their sums of a tile where finish_tile finds them.
    static __device__ __forceinline__ void share_sums(const Worker &w, uint32_t buffer, uint32_t rows,
                                                      const Sums &sums) {
        if (kBuffers == 1) named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // the last tile is read
#pragma unroll
        for (uint32_t n = 0; n < kColumnTiles; n++)
            if (n * 8 < rows)
                store_shared16(partials(w, buffer, n, w.warp),
                               {__float_as_uint(sums[n][0]), __float_as_uint(sums[n][1]), __float_as_uint(sums[n][2]),
                                __float_as_uint(sums[n][3])});
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        stamp(w, PERK_STAMP_SHARED);
    }

    // ---- the task ----

    struct Tiles {
        uint32_t first, stride, count;
    };

    template <class Input>
    static __device__ __forceinline__ uint32_t run_tiles(const Worker &w, const Tiles &tiles, const Input &input,
                                                         const Finish &f, uint32_t rows, uint32_t chunk, float eps) {
        stamp(w, PERK_STAMP_READ);
#pragma unroll 1
        for (uint32_t i = 0; i < tiles.count; i++) {
            const uint32_t tile = tiles.first + i * tiles.stride, buffer = i % kBuffers;
            const uint32_t my_column_tile = (w.warp - i) % PERK_CONSUMER_WARPS; // rotates, so that finishing is shared
            const bool finishes = my_column_tile < kColumnTiles && my_column_tile * 8 < rows;
            Residual residual{};
            if constexpr (kEpilogue == Epilogue::residual) // early: in flight while the products are made
                if (finishes) load_residual(w, f, tile, my_column_tile, rows, residual);
            Sums sums = {};
            chunk = multiply_tile(w, input, rows, chunk, sums);
            share_sums(w, buffer, rows, sums);
            if (!finishes) continue;
            if constexpr (kEpilogue == Epilogue::residual) see_residual(w, f, tile, my_column_tile, rows, residual);
            finish_tile(w, f, tile, my_column_tile, buffer, rows, eps, residual, SameRows{});
        }
        return chunk;
    }

    static __device__ __forceinline__ uint32_t run(Worker &w, const TaskView &task, uint32_t chunk, float eps) {
        const uint32_t rows = kMaxRows == 1 ? 1 : row_count<kRowsOf>(w); // one that nobody asked for does no harm
        const Tiles tiles{task.first(), task.stride(), task.count()};
        const uint32_t input = task.place(kInput), residual = task.place(kResidual);
        const uint8_t *x = activation_at(w, input);
        const Finish finish{activation_at(w, residual), w.args.constants + task.operand(kBias),
                            activation_at(w, task.place(kOutput)), w.args.activations + task.operand(kCandidates),
                            is_eager(residual)};
        const Gains gains = load_gains(w, w.args.constants + task.operand(kNormWeight));
        await_inputs(w, task);
        if constexpr (kEpilogue == Epilogue::logits) clear_eager(w, tiles.first, tiles.stride);
        if (has_no_rows<kRowsOf>(w)) return chunk;
        if (kAlwaysStaged || staged_bytes(rows) <= program::staging_bytes) {
            stage_input(w, x, is_eager(input), gains, rows);
            return run_tiles(w, tiles, StagedInput(w, rows), finish, rows, chunk, eps);
        }
        if constexpr (!kAlwaysStaged) return run_tiles(w, tiles, DirectInput(w, x, rows), finish, rows, chunk, eps);
        return chunk;
    }
};

} // namespace perk
