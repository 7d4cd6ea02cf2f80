// attention, in three stages of tasks:
//   partial  query tiles against pieces of the KV range on the tensor cores, one warp a piece (flash attention); norm
//            and rotation of the queries, and of the keys that this step adds, happen on the way
//   merge    the pieces of every (token, head) put together
//   append   the step's keys and values go to their pages, for the steps after it: nobody in this step waits for that
//
// Keys and values lie in a KV page (kv_stream.cuh) as operands of mma are read, and the 16 positions that a warp takes
// at a time are 4 KB in one piece of either (of 128 dimensions). They come through the weight ring where the plan
// says so (can_stream_kv in src/lower.c); other programs load them by themselves. A query tile is up to 8 rows (token,
// query head of the group) that share the KV head, so grouped heads share one read of the cache.
#pragma once

namespace perk {

template <uint32_t kHeads, uint32_t kKvHeads, uint32_t kHeadDim, uint32_t kParts>
struct Attention {
    static constexpr uint32_t kGroup = kHeads / kKvHeads;
    static constexpr uint32_t kUnits = kKvHeads * kParts; // unit = head * kParts + part
    static constexpr uint32_t kQkvStride = PERK_ROW_STRIDE((kHeads + 2 * kKvHeads) * kHeadDim);
    static constexpr uint32_t kOutStride = PERK_ROW_STRIDE(kHeads * kHeadDim);
    using Cache = KvCache<kKvHeads, kHeadDim>;
    static constexpr uint32_t kHalf = kHeadDim / 2;
    static constexpr uint32_t kDimBlocks = kHeadDim / 32; // 32 dimensions: what one 16-byte load a lane covers
    static constexpr uint32_t kDimTiles = kHeadDim / 16;  // row tiles of the transposed output
    // A partial result: running maximum [8], running sum [8], unnormalised output [8][kHeadDim], fp32.
    static constexpr uint32_t kPartialFloats = PERK_QUERY_ROWS * (kHeadDim + 2);
    static_assert(kHeadDim % 32 == 0 && kGroup <= PERK_QUERY_ROWS, "the lowering refuses other shapes");

    static __device__ __forceinline__ float *partial_of(const Worker &w, uint64_t base, uint32_t head, uint32_t item) {
        return reinterpret_cast<float *>(w.args.activations + base) +
               (uint64_t(head) * program::max_attention_items + item) * kPartialFloats;
    }

    // The step's tokens in slice `part` of `parts` equal slices of max_tokens.
    struct TokenSlice {
        uint32_t first, count;
    };
    static __device__ __forceinline__ TokenSlice token_slice(const Worker &w, uint32_t part, uint32_t parts) {
        const uint32_t slice = (program::max_tokens + parts - 1) / parts, first = part * slice;
        const uint32_t tokens = w.num_tokens();
        return {first, tokens > first ? min(slice, tokens - first) : 0};
    }

    static __device__ __forceinline__ float quad_max(float value) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
        return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
    }
    static __device__ __forceinline__ float quad_sum(float value) {
        value += __shfl_xor_sync(0xffffffffu, value, 1);
        return value + __shfl_xor_sync(0xffffffffu, value, 2);
    }

    // ---- norm and rotation ----

    // What the step's linear left of every token, and what turns it into queries and keys.
    struct Source {
        const uint8_t *qkv;
        const uint16_t *q_norm, *k_norm; // null: no norm
        const float2 *rope;              // [positions][kHalf], cos and sin
        float eps;
        bool is_eager; // qkv

        __device__ __forceinline__ const float2 *rope_at(uint32_t position) const {
            return rope + uint64_t(position) * kHalf;
        }
        // 16 bytes from dimension `dimension` on of head `head` of qkv: query heads, then key heads, then value heads.
        __device__ __forceinline__ const uint8_t *at(uint32_t token, uint32_t head, uint32_t dimension) const {
            return qkv + (uint64_t(token) * kQkvStride + head * kHeadDim + dimension) * 2;
        }
    };

    // Operands of partial and append, by role.
    enum Operand { kQkv, kPartials, kQNormWeight, kKNormWeight, kRopeTable, kNextPartials };

    // Made where it is needed: kept over a loop, its pointers would cost spills.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ Source source_of(const Worker &w, const TaskView &task, float eps) {
        const uint64_t q_norm = task.operand(kQNormWeight), k_norm = task.operand(kKNormWeight);
        return {activation_at(w, task.place(kQkv)),
                kQNorm ? reinterpret_cast<const uint16_t *>(w.args.constants + q_norm) : nullptr,
                kKNorm ? reinterpret_cast<const uint16_t *>(w.args.constants + k_norm) : nullptr,
                reinterpret_cast<const float2 *>(w.args.constants + task.operand(kRopeTable)),
                eps,
                is_eager(task.place(kQkv))};
    }

    // Vectors lie across quads: lane q of a quad has the dimensions 32 d + 8 q ... + 7, d = 0 ... kDimBlocks - 1, as
    // the right operand of mma wants them. Dimension i is rotated with i + kHalf: both in this lane, or one in the lane
    // two on.
    static constexpr uint32_t kHalfGroups = kHalf / 8; // of 8 dimensions
    static constexpr bool kPairsInLane = kHalfGroups % 4 == 0;
    static_assert(kHalfGroups % 2 == 0, "the lowering refuses other shapes");

    static __device__ __forceinline__ float square_sum(uint32_t pair) {
        return low_bf16(pair) * low_bf16(pair) + high_bf16(pair) * high_bf16(pair);
    }
    static __device__ __forceinline__ float square_sum(Vec16 x) {
        return (square_sum(x.x) + square_sum(x.y)) + (square_sum(x.z) + square_sum(x.w));
    }

    // A value times its gain and its row's scale.
    static __device__ __forceinline__ float2 scaled(uint32_t pair, uint32_t gain, float scale) {
        return make_float2(low_bf16(pair) * scale * low_bf16(gain), high_bf16(pair) * scale * high_bf16(gain));
    }

    // Turns dimensions i and i + 1 against i + kHalf and i + 1 + kHalf. `rotation`: cos, sin of i; cos, sin of i + 1.
    static __device__ __forceinline__ void turn(uint32_t &low, uint32_t &high, uint32_t low_gain, uint32_t high_gain,
                                                float scale, float4 rotation) {
        const float2 a = scaled(low, low_gain, scale), b = scaled(high, high_gain, scale);
        low = pack_bf16(a.x * rotation.x - b.x * rotation.y, a.y * rotation.z - b.y * rotation.w);
        high = pack_bf16(b.x * rotation.x + a.x * rotation.y, b.y * rotation.z + a.y * rotation.w);
    }
    struct Angles {
        float4 of[4]; // two dimensions each, of 8
    };
    static __device__ __forceinline__ Angles load_angles(const float2 *rotation) {
        const float4 *angles = reinterpret_cast<const float4 *>(rotation);
        return {{__ldg(angles), __ldg(angles + 1), __ldg(angles + 2), __ldg(angles + 3)}};
    }
    static __device__ __forceinline__ void turn(Vec16 &low, Vec16 &high, Vec16 low_gain, Vec16 high_gain, float scale,
                                                const Angles &angles) {
        turn(low.x, high.x, low_gain.x, high_gain.x, scale, angles.of[0]);
        turn(low.y, high.y, low_gain.y, high_gain.y, scale, angles.of[1]);
        turn(low.z, high.z, low_gain.z, high_gain.z, scale, angles.of[2]);
        turn(low.w, high.w, low_gain.w, high_gain.w, scale, angles.of[3]);
    }

    static __device__ __forceinline__ Vec16 shuffle_two_on(Vec16 x) {
        return {__shfl_xor_sync(0xffffffffu, x.x, 2), __shfl_xor_sync(0xffffffffu, x.y, 2),
                __shfl_xor_sync(0xffffffffu, x.z, 2), __shfl_xor_sync(0xffffffffu, x.w, 2)};
    }
    static __device__ __forceinline__ Vec16 select(bool first, Vec16 a, Vec16 b) {
        return {first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w};
    }

    static __device__ __forceinline__ float norm_scale(const Vec16 (&x)[kDimBlocks], float eps) {
        float sum = 0.0f;
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++) sum += square_sum(x[d]);
        return rsqrtf(quad_sum(sum) / kHeadDim + eps);
    }

    // Norm (where there is a gain) and rotation, in fp32, rounded once. `rotation`: the row of the position.
    static __device__ __forceinline__ void turn_vector(const Worker &w, Vec16 (&x)[kDimBlocks], const uint16_t *gain,
                                                       const float2 *rotation, float eps) {
        constexpr uint32_t kOnes = 0x3f803f80u; // bf16 1, twice
        auto gain_at = [&](uint32_t dimension) {
            return gain ? load_constant16(gain + dimension) : Vec16{kOnes, kOnes, kOnes, kOnes};
        };
        if constexpr (kPairsInLane) {
            constexpr uint32_t kPairs = kDimBlocks / 2;
            Vec16 low_gains[kPairs], high_gains[kPairs];
            Angles angles[kPairs];
#pragma unroll
            for (uint32_t d = 0; d < kPairs; d++) { // before x is looked at, which is on its way as well
                const uint32_t i = d * 32 + w.lane % 4 * 8;
                low_gains[d] = gain_at(i);
                high_gains[d] = gain_at(i + kHalf);
                angles[d] = load_angles(rotation + i);
            }
            const float scale = gain ? norm_scale(x, eps) : 1.0f;
#pragma unroll
            for (uint32_t d = 0; d < kPairs; d++)
                turn(x[d], x[d + kPairs], low_gains[d], high_gains[d], scale, angles[d]);
        } else {
            const float scale = gain ? norm_scale(x, eps) : 1.0f;
            // What block d is turned against lies two lanes on: for lanes 0 and 1 in block (d + kShift) % kDimBlocks,
            // for lanes 2 and 3 one further.
            constexpr uint32_t kShift = kHalfGroups / 4;
            const bool asker_is_high = w.lane % 4 < 2; // the asker of lane q is lane q ^ 2
            Vec16 turned[kDimBlocks];
#pragma unroll
            for (uint32_t d = 0; d < kDimBlocks; d++) {
                const uint32_t i = d * 32 + w.lane % 4 * 8, partner = i < kHalf ? i + kHalf : i - kHalf;
                const bool is_low = i < kHalf;
                const Vec16 near = x[(d + kShift) % kDimBlocks], far = x[(d + kShift + 1) % kDimBlocks];
                const Vec16 other = shuffle_two_on(select(asker_is_high, far, near));
                Vec16 low = select(is_low, x[d], other), high = select(is_low, other, x[d]);
                const Vec16 own_gain = gain_at(i), other_gain = gain_at(partner);
                turn(low, high, select(is_low, own_gain, other_gain), select(is_low, other_gain, own_gain), scale,
                     load_angles(rotation + (is_low ? i : partner)));
                turned[d] = select(is_low, low, high);
            }
#pragma unroll
            for (uint32_t d = 0; d < kDimBlocks; d++) x[d] = turned[d];
        }
    }

    static __device__ __forceinline__ void copy_vector(Vec16 (&to)[kDimBlocks], const Vec16 (&from)[kDimBlocks]) {
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++) to[d] = from[d];
    }

    // The lane's part of a query or key as the linear left it, and turned: ready to be multiplied.
    static __device__ __forceinline__ void load_vector(const Worker &w, const Source &source, uint32_t token,
                                                       uint32_t head, Vec16 (&x)[kDimBlocks]) {
        const uint8_t *from = source.at(token, head, w.lane % 4 * 8);
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++) x[d] = load_coherent16(from + d * 64);
    }
    static __device__ __forceinline__ void see_vector(EagerLook &look, const Vec16 (&x)[kDimBlocks]) {
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++) look.see(x[d]);
    }
    static __device__ __forceinline__ void load_turned(const Worker &w, const Source &source, uint32_t token,
                                                       uint32_t position, uint32_t head, const uint16_t *gain,
                                                       Vec16 (&x)[kDimBlocks]) {
        EagerLook look{source.is_eager};
        do {
            load_vector(w, source, token, head, x);
            see_vector(look, x);
        } while (look.again(w));
        turn_vector(w, x, gain, source.rope_at(position), source.eps);
    }

    // ---- partial ----

    // Row r of a query tile: token r / kGroup, query head r % kGroup of the group.
    struct Tile {
        perk_query_tile info;
        uint32_t rows;
        __device__ __forceinline__ uint32_t token(uint32_t row) const {
            return info.first_token + min(row, rows - 1) / kGroup;
        }
    };
    static __device__ __forceinline__ Tile load_tile(const Worker &w, uint32_t index) {
        const uint32_t words = program::batch_query_tiles + index * (sizeof(perk_query_tile) / 4);
        Tile tile;
        tile.info.request = w.batch_word(words);
        tile.info.first_token = w.batch_word(words + 1);
        tile.info.token_count = w.batch_word(words + 2);
        tile.info.first_item = w.batch_word(words + 3);
        tile.info.item_count = w.batch_word(words + 4);
        tile.info.fresh_token = w.batch_word(words + 5);
        tile.info.fresh_position = w.batch_word(words + 6);
        tile.rows = tile.info.token_count * kGroup;
        return tile;
    }

    static __device__ __forceinline__ uint32_t first_fresh_item(const Worker &w, uint32_t tile) {
        return w.batch_word(program::batch_query_tiles + tile * (sizeof(perk_query_tile) / 4) +
                            PERK_QUERY_TILE_FRESH_ITEM);
    }
    static __device__ __forceinline__ bool is_prompt(const Worker &w, uint32_t tile) {
        return first_fresh_item(w, tile) == 0xffffffffu;
    }

    // Online softmax of a lane: row g of the tile; the output transposed, dimensions by rows 2q and 2q+1.
    struct State {
        float maximum, sum;
        float out[kDimTiles][4];

        __device__ __forceinline__ void clear() {
            maximum = -infinity();
            sum = 0.0f;
#pragma unroll
            for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
                for (uint32_t c = 0; c < 4; c++) out[d][c] = 0.0f;
        }
    };

    // What the lanes of rows 2q and 2q+1 hold.
    static __device__ __forceinline__ float2 of_columns(const Worker &w, float value) {
        const uint32_t source = w.lane % 4 * 8;
        return make_float2(__shfl_sync(0xffffffffu, value, source), __shfl_sync(0xffffffffu, value, source + 4));
    }

    // A warp's piece: one KV head's positions [begin, end) against a query tile, all of them in the cache or all fresh.
    struct Piece {
        Tile tile;
        uint32_t layer, head, begin, end;
        __device__ __forceinline__ bool is_fresh() const { return begin >= tile.info.fresh_position; }
        __device__ __forceinline__ uint32_t fresh_token(uint32_t position) const {
            return tile.info.fresh_token + position - tile.info.fresh_position;
        }
    };

    // 16 positions of the piece, in registers.
    struct Unit {
        Vec16 k[2][kDimBlocks];
        uint2 v[kDimTiles][2];
    };

    // Positions of a unit that starts at `begin`: the score tile j gives lane 4g+q the positions 4q+2j and 4q+2j+1 of
    // row g, because row n of the key operand is position 4(n/2) + 2j + n%2. A lane's scores are then exactly its right
    // operand of the second product, with no exchange between lanes. Rows 8 to 15 of the left operand are zero.
    static __device__ __forceinline__ uint32_t key_position(const Worker &w, const Piece &p, uint32_t begin,
                                                            uint32_t j) {
        const uint32_t n = w.lane / 4;
        return min(begin + n / 2 * 4 + 2 * j + n % 2, p.end - 1);
    }

    static __device__ __forceinline__ void load_keys(const Worker &w, const Piece &p, uint32_t begin, Unit &unit) {
        const uint32_t request = p.tile.info.request, group_start = begin + w.lane / 8 * 4;
        const uint8_t *keys =
            Cache::kv_page(w, p.layer, Cache::page_of(w, request, min(group_start, p.end - 1)), p.head);
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            const uint32_t position = key_position(w, p, begin, j);
            const uint8_t *key = keys + (position % program::page_size * kHeadDim + w.lane % 4 * 8) * 2;
#pragma unroll
            for (uint32_t d = 0; d < kDimBlocks; d++) unit.k[j][d] = load_coherent16(key + d * 64);
        }
    }
    // Values of 4 positions for the dimensions g and g + 8 of every row tile of the output.
    static __device__ __forceinline__ void load_values(const Worker &w, const Piece &p, uint32_t begin, Unit &unit) {
        const uint32_t position = min(begin + w.lane % 4 * 4, p.end - 1) / 4 * 4;
        const uint32_t page = Cache::page_of(w, p.tile.info.request, position);
        const uint8_t *values = Cache::kv_page(w, p.layer, page, p.head) + Cache::value_offset(position, w.lane / 4);
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++)
                unit.v[d][half] = load_coherent8(values + (d * 16 + half * 8) * PERK_KV_UNIT * 2);
    }

    static __device__ __forceinline__ void load_cached(const Worker &w, const Piece &p, uint32_t begin, Unit &unit) {
        load_keys(w, p, begin, unit);
        load_values(w, p, begin, unit);
    }

#if PERK_STREAMS_KV
    // The same of a unit that lies in shared memory. Returns a word of all of it. What lies there beyond the piece
    // counts for nothing, whatever it is: scores are masked, and values, too.
    static __device__ __forceinline__ uint32_t load_unit(const Worker &w, uint32_t from, Unit &unit) {
        const uint32_t row = w.lane / 8 * 4 + w.lane / 4 % 2; // as key_position
        uint32_t loaded = 0;
#pragma unroll
        for (uint32_t j = 0; j < 2; j++)
#pragma unroll
            for (uint32_t d = 0; d < kDimBlocks; d++) {
                unit.k[j][d] = load_shared16(from + (row + 2 * j) * kHeadDim * 2 + w.lane % 4 * 16 + d * 64);
                loaded |= unit.k[j][d].w;
            }
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) {
                const uint32_t dimension = d * 16 + half * 8 + w.lane / 4;
                unit.v[d][half] =
                    load_shared8(from + Cache::kUnitBytes + (dimension * PERK_KV_UNIT + w.lane % 4 * 4) * 2);
                loaded |= unit.v[d][half].y;
            }
        return loaded;
    }
#endif

    // The same of positions that this step adds, from the linear's output; the keys are not turned yet.
    static __device__ __forceinline__ void load_fresh_key(const Worker &w, const Piece &p, const Source &source,
                                                          uint32_t j, Vec16 (&k)[kDimBlocks]) {
        load_vector(w, source, p.fresh_token(key_position(w, p, p.begin, j)), kHeads + p.head, k);
    }
    static __device__ __forceinline__ void turn_key(const Worker &w, const Piece &p, const Source &source, uint32_t j,
                                                    Vec16 (&k)[kDimBlocks]) {
        turn_vector(w, k, source.k_norm, source.rope_at(key_position(w, p, p.begin, j)), source.eps);
    }
    static __device__ __forceinline__ void load_fresh_values(const Worker &w, const Piece &p, const Source &source,
                                                             uint2 (&v)[kDimTiles][2]) {
        const uint8_t *rows[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t position = min(p.begin + w.lane % 4 * 4 + i, p.end - 1);
            rows[i] = source.at(p.fresh_token(position), kHeads + kKvHeads + p.head, w.lane / 4);
        }
        auto pair = [&](uint32_t i, uint32_t dimension) {
            return load_coherent2(rows[i] + dimension * 2) | uint32_t(load_coherent2(rows[i + 1] + dimension * 2))
                                                                 << 16;
        };
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++)
                v[d][half] = make_uint2(pair(0, d * 16 + half * 8), pair(2, d * 16 + half * 8));
    }

    static __device__ __forceinline__ void see_values(EagerLook &look, const uint2 (&v)[kDimTiles][2]) {
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++) look.see(v[d][half]);
    }

    // Scores of the query rows against one tile of keys.
    static __device__ __forceinline__ void score_tile(const Vec16 (&q)[kDimBlocks], const Vec16 (&k)[kDimBlocks],
                                                      float (&scores)[4]) {
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++) {
            mma(scores, q[d].x, 0, q[d].y, 0, k[d].x, k[d].y);
            mma(scores, q[d].z, 0, q[d].w, 0, k[d].z, k[d].w);
        }
    }

    // What scores are held against: all masked gives weights 0, not NaN.
    static __device__ __forceinline__ float reference_of(float maximum) {
        return maximum == -infinity() ? 0.0f : maximum;
    }
    // Turns scores into weights, base 2, and rescales what was there before.
    static __device__ __forceinline__ void softmax_unit(const Worker &w, State &state, float (&scores)[2][4],
                                                        uint32_t limit, uint32_t window, uint32_t lane_start,
                                                        uint32_t end, float scale) {
        float maximum = state.maximum;
#pragma unroll
        for (uint32_t j = 0; j < 2; j++)
#pragma unroll
            for (uint32_t c = 0; c < 2; c++) {
                const uint32_t position = lane_start + 2 * j + c;
                const bool seen = position < end && position <= limit && limit - position < window;
                scores[j][c] = seen ? scores[j][c] * scale : -infinity();
                maximum = fmaxf(maximum, scores[j][c]);
            }
        maximum = quad_max(maximum);
        const float reference = reference_of(maximum);
        // Most units do not raise the maximum. (The branch also keeps the loads of values from being moved up among
        // those of keys, where they would cost spills.)
        if (__any_sync(0xffffffffu, maximum > state.maximum)) {
            const float shrink = exp2_approx(state.maximum - reference);
            const float2 column_shrink = of_columns(w, shrink);
            state.maximum = maximum;
            state.sum *= shrink;
#pragma unroll
            for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
                for (uint32_t c = 0; c < 4; c++) state.out[d][c] *= c % 2 ? column_shrink.y : column_shrink.x;
        }
#pragma unroll
        for (uint32_t j = 0; j < 2; j++)
#pragma unroll
            for (uint32_t c = 0; c < 2; c++) {
                scores[j][c] = exp2_approx(scores[j][c] - reference);
                state.sum += scores[j][c];
            }
    }

    // A mask for 4 values that keeps the first `valid`: memory beyond may hold anything, and 0 * NaN is NaN.
    static __device__ __forceinline__ uint2 mask_first(uint32_t valid) {
        auto pair = [&](uint32_t index) { return valid >= index + 2 ? 0xffffffffu : valid > index ? 0xffffu : 0u; };
        return make_uint2(pair(0), pair(2));
    }

    // Scores to weights, and the values they weigh added to the output.
    static __device__ __forceinline__ void weigh_unit(const Worker &w, State &state, float (&scores)[2][4],
                                                      const uint2 (&v)[kDimTiles][2], uint32_t begin, uint32_t end,
                                                      uint32_t limit, uint32_t window, float scale) {
        const uint32_t lane_start = begin + w.lane % 4 * 4;
        const uint2 mask = mask_first(lane_start >= end ? 0 : min(4u, end - lane_start));
        softmax_unit(w, state, scores, limit, window, lane_start, end, scale);
        const uint32_t p0 = pack_bf16(scores[0][0], scores[0][1]), p1 = pack_bf16(scores[1][0], scores[1][1]);
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
            mma(state.out[d], v[d][0].x & mask.x, v[d][1].x & mask.x, v[d][0].y & mask.y, v[d][1].y & mask.y, p0, p1);
    }

    // Stores a partial result, of which `out` gives what the lane has. Rows that the tile does not have are left alone:
    // they would only be in the way.
    template <class OutWord>
    static __device__ __forceinline__ void store_words(const Worker &w, float *partial, uint32_t rows, uint32_t maximum,
                                                       uint32_t sum, OutWord out_word) {
        const uint32_t g = w.lane / 4, q = w.lane % 4;
        if (q == 0) {
            store_eager4(partial + g, maximum);
            store_eager4(partial + PERK_QUERY_ROWS + g, sum);
        }
        if (2 * q >= rows) return;
        float *out = partial + 2 * PERK_QUERY_ROWS + 2 * q * kHeadDim + g; // of the lane: the rest is constant
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) store_eager4(out + c % 2 * kHeadDim + d * 16 + c / 2 * 8, out_word(d, c));
    }
    static __device__ __forceinline__ void store_partial(const Worker &w, const TaskView &task, const Piece &p,
                                                         uint32_t item, const State &state) {
        store_words(w, partial_of(w, task.operand(kPartials), p.head, item), p.tile.rows,
                    __float_as_uint(state.maximum), __float_as_uint(quad_sum(state.sum)),
                    [&](uint32_t d, uint32_t c) { return __float_as_uint(state.out[d][c]); });
        if constexpr (program::eager_pieces)
            store_words(w, partial_of(w, task.operand(kNextPartials), p.head, item), p.tile.rows, PERK_VACANT_WORD,
                        PERK_VACANT_WORD, [](uint32_t, uint32_t) { return PERK_VACANT_WORD; });
    }

    static __device__ __forceinline__ Piece load_piece(const Worker &w, const TaskView &task, uint32_t head,
                                                       uint32_t item) {
        const uint32_t words = program::batch_attention_items + item * (sizeof(perk_attention_item) / 4);
        return {load_tile(w, w.batch_word(words)), task.scalar(), head, w.batch_word(words + 1),
                w.batch_word(words + 2)};
    }

    // A query row: its last position, its own, and how its scores are scaled.
    struct Mask {
        uint32_t limit, window;
        float scale;
    };

    static __device__ __forceinline__ void attend_unit(const Worker &w, State &state, const Vec16 (&q)[kDimBlocks],
                                                       const Piece &p, const Unit &unit, uint32_t begin, Mask mask) {
        float scores[2][4] = {};
        score_tile(q, unit.k[0], scores[0]);
        score_tile(q, unit.k[1], scores[1]);
        weigh_unit(w, state, scores, unit.v, begin, p.end, mask.limit, mask.window, mask.scale);
    }

#if PERK_STREAMS_KV
    static __device__ __forceinline__ void attend_streamed(const Worker &w, State &state, const Vec16 (&q)[kDimBlocks],
                                                           const Piece &p, KvRounds &rounds, Mask mask) {
#pragma unroll 1
        for (uint32_t begin = p.begin; begin < p.end; begin += PERK_KV_UNIT) {
            const uint32_t live = rounds.live();
            Unit unit;
            const uint32_t loaded = load_unit(w, rounds.await(w, live), unit);
            rounds.release(w, live, loaded); // the products need the ring no more
            attend_unit(w, state, q, p, unit, begin, mask);
        }
    }
#endif

    // What no stream brings: the registers of keys, and then those of values, are filled anew as soon as they have been
    // multiplied, so that memory always has something to bring.
    static __device__ __forceinline__ void attend_cached(const Worker &w, State &state, const Vec16 (&q)[kDimBlocks],
                                                         const Piece &p, Mask mask) {
        Unit unit;
        load_cached(w, p, p.begin, unit);
#pragma unroll 1
        for (uint32_t begin = p.begin;;) {
            const uint32_t next = begin + PERK_KV_UNIT;
            float scores[2][4] = {};
            score_tile(q, unit.k[0], scores[0]);
            score_tile(q, unit.k[1], scores[1]);
            if (next < p.end) load_keys(w, p, next, unit);
            weigh_unit(w, state, scores, unit.v, begin, p.end, mask.limit, mask.window, mask.scale);
            if (next >= p.end) break;
            load_values(w, p, next, unit);
            begin = next;
        }
    }
    // A fresh piece is one unit. With few registers: the keys of one tile after those of the other.
    static __device__ __forceinline__ void attend_fresh(const Worker &w, State &state, const Vec16 (&q)[kDimBlocks],
                                                        const Piece &p, const Source &source, Mask mask) {
        uint2 v[kDimTiles][2];
        float scores[2][4] = {};
#pragma unroll 1 // the keys of both tiles at once would not fit
        for (uint32_t j = 0; j < 2 && p.begin + 2 * j < p.end; j++) {
            Vec16 k[kDimBlocks];
            float tile[4] = {};
            load_fresh_key(w, p, source, j, k);
            turn_key(w, p, source, j, k);
            score_tile(q, k, tile);
#pragma unroll
            for (uint32_t c = 0; c < 2; c++) {
                scores[0][c] = j == 0 ? tile[c] : scores[0][c];
                scores[1][c] = tile[c];
            }
        }
        load_fresh_values(w, p, source, v);
        weigh_unit(w, state, scores, v, p.begin, p.end, mask.limit, mask.window, mask.scale);
    }

    // The query row that the lane works on, its mask, and where the result goes.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ Mask load_query(const Worker &w, const TaskView &task, const Piece &p,
                                                      uint32_t window, float scale, Vec16 (&q)[kDimBlocks]) {
        const uint32_t row = min(w.lane / 4, p.tile.rows - 1), token = p.tile.token(row);
        const Mask mask{w.batch_word(program::batch_positions + token), window, scale};
        load_vector(w, source_of<kQNorm, kKNorm>(w, task, 0.0f), token, p.head * kGroup + row % kGroup, q);
        return mask;
    }
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void turn_query(const Worker &w, const TaskView &task, Mask mask, float eps,
                                                      Vec16 (&q)[kDimBlocks]) {
        const Source source = source_of<kQNorm, kKNorm>(w, task, eps);
        turn_vector(w, q, source.q_norm, source.rope_at(mask.limit), source.eps);
    }

#if PERK_STREAMS_KV
    // The query that the lane works on is turned, and, of a fresh piece, its keys, which were loaded together with it:
    // their scores are left. One loop over all, since the code of a layer is to stay in the SM's instruction cache.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void turn_item(const Worker &w, const TaskView &task, const Piece &p, Mask mask,
                                                     float eps, Vec16 (&q)[kDimBlocks], Vec16 (&key)[kDimBlocks],
                                                     float (&scores)[2][4]) {
        const Source source = source_of<kQNorm, kKNorm>(w, task, eps);
        const uint32_t key_tiles = !p.is_fresh() ? 0 : p.end - p.begin > 2 ? 2 : 1;
        Vec16 x[kDimBlocks];
        copy_vector(x, q);
#pragma unroll 1
        for (uint32_t i = 0; i <= key_tiles; i++) {
            if (i == 1) copy_vector(x, key);
            if (i == 2) {
                EagerLook look{source.is_eager};
                do {
                    load_fresh_key(w, p, source, 1, x);
                    see_vector(look, x);
                } while (look.again(w));
            }
            const uint32_t position = i == 0 ? mask.limit : key_position(w, p, p.begin, i - 1);
            const uint16_t *gain = i == 0 ? source.q_norm : source.k_norm;
            if constexpr (kQNorm && kKNorm) assume(gain != nullptr);
            turn_vector(w, x, gain, source.rope_at(position), source.eps);
            if (i == 0) {
                copy_vector(q, x);
                continue;
            }
            float tile[4] = {};
            score_tile(q, x, tile);
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) {
                scores[0][c] = i == 1 ? tile[c] : scores[0][c];
                scores[1][c] = tile[c];
            }
        }
    }

    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void attend_item(Worker w, const TaskView &task, uint32_t head, uint32_t item,
                                                       KvRounds &rounds, float scale, uint32_t window, float eps) {
        w.forget_coordinates(); // addresses are made anew: kept over the wait or the loop, they would cost spills
        const Piece p = load_piece(w, task, head, item);
        Vec16 q[kDimBlocks], key[kDimBlocks] = {};
        uint2 v[kDimTiles][2];
        float scores[2][4] = {};
        Mask mask;
        EagerLook look{is_eager(task.place(kQkv))};
#pragma unroll 1
        do {
            mask = load_query<kQNorm, kKNorm>(w, task, p, window, scale, q);
            if (p.is_fresh()) {
                const Source source = source_of<kQNorm, kKNorm>(w, task, eps);
                load_fresh_key(w, p, source, 0, key);
                load_fresh_values(w, p, source, v);
                see_vector(look, key);
                see_values(look, v);
            }
            see_vector(look, q);
        } while (look.again(w));
        turn_item<kQNorm, kKNorm>(w, task, p, mask, eps, q, key, scores);
        State state;
        state.clear(); // not before: it takes registers
        if (p.is_fresh())
            weigh_unit(w, state, scores, v, p.begin, p.end, mask.limit, mask.window, mask.scale);
        else
            attend_streamed(w, state, q, p, rounds, mask);
        store_partial(w, task, p, item, state);
    }
#else
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void attend_item(Worker w, const TaskView &task, uint32_t head, uint32_t item,
                                                       float scale, uint32_t window, float eps) {
        w.forget_coordinates();
        const Piece p = load_piece(w, task, head, item);
        const uint32_t tile_row = min(w.lane / 4, p.tile.rows - 1), token = p.tile.token(tile_row);
        const Mask mask{w.batch_word(program::batch_positions + token), window, scale};
        Vec16 q[kDimBlocks];
        {
            const Source source = source_of<kQNorm, kKNorm>(w, task, eps);
            load_vector(w, source, token, head * kGroup + tile_row % kGroup, q);
            turn_vector(w, q, source.q_norm, source.rope_at(mask.limit), source.eps);
        }
        State state;
        state.clear(); // not before: it takes registers
        if (p.is_fresh())
            attend_fresh(w, state, q, p, source_of<kQNorm, kKNorm>(w, task, eps), mask);
        else
            attend_cached(w, state, q, p, mask);
        store_partial(w, task, p, item, state);
    }
#endif

#if PERK_STREAMS_KV
    // Unit (head, part) = head * kParts + part: of the items [begin, end), part, part + kParts, ..., dealt to the
    // warps. `attend` is given each of them.
    template <class Attend>
    static __device__ __forceinline__ void for_items(const TaskView &task, uint32_t begin, uint32_t end, uint32_t warp,
                                                     Attend attend) {
#pragma unroll 1
        for (uint32_t i = 0; i < task.count(); i++) {
            const uint32_t unit = task.first() + i;
            const uint32_t first = begin + (unit % kParts + kParts - begin % kParts) % kParts;
#pragma unroll 1
            for (uint32_t item = first + kParts * warp; item < end; item += kParts * PERK_CONSUMER_WARPS)
                attend(unit / kParts, item);
        }
    }

    // Scalar: the layer in the KV cache. `scale` is for base 2: scale * log2(e). Returns the next chunk.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ uint32_t partial(Worker &w, const TaskView &task, uint32_t chunk, float scale,
                                                       uint32_t window, float eps) {
        const uint32_t cached = first_fresh_item(w, 0), items = w.num_attention_items();
        KvRounds rounds(w, task, chunk);
        await_inputs(w, task);
        auto attend = [&](uint32_t head, uint32_t item) {
            attend_item<kQNorm, kKNorm>(w, task, head, item, rounds, scale, window, eps);
        };
        // What is fresh comes first, while the cache may still be on its way, and to those warps that have less of it.
#pragma unroll 1
        for (bool is_fresh = true;; is_fresh = false) {
            for_items(task, is_fresh ? cached : 0, is_fresh ? items : cached,
                      is_fresh ? PERK_CONSUMER_WARPS - 1 - w.warp : w.warp, attend);
            if (!is_fresh) return rounds.finish(w);
        }
    }
#else
    // Unit (head, part) = head * kParts + part: the items part, part + kParts, ..., dealt to the warps. Scalar: the
    // layer in the KV cache. `scale` is for base 2: scale * log2(e). One loop over both: two take more registers.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ uint32_t partial(Worker &w, const TaskView &task, uint32_t chunk, float scale,
                                                       uint32_t window, float eps) {
        uint32_t i = 0, item = task.first() % kParts + kParts * w.warp;
        await_inputs(w, task);
#pragma unroll 1
        while (i < task.count()) {
            if (item < w.num_attention_items()) {
                attend_item<kQNorm, kKNorm>(w, task, (task.first() + i) / kParts, item, scale, window, eps);
                item += kParts * PERK_CONSUMER_WARPS;
            }
            if (item >= w.num_attention_items()) {
                i++;
                item = (task.first() + i) % kParts + kParts * w.warp;
            }
        }
        return chunk;
    }

    // The same without the wait: of programs that have more to do in the stage (prompt_attention.cuh).
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void attend_items(Worker &w, const TaskView &task, float scale, uint32_t window,
                                                        float eps) {
        const uint32_t items = w.num_attention_items();
#pragma unroll 1
        for (uint32_t i = 0; i < task.count(); i++) {
            const uint32_t number = task.first() + i;
#pragma unroll 1
            for (uint32_t item = number % kParts + kParts * w.warp; item < items; item += kParts * PERK_CONSUMER_WARPS)
                attend_item<kQNorm, kKNorm>(w, task, number / kParts, item, scale, window, eps);
        }
    }
#endif

    // ---- merge ----

    static constexpr uint32_t kLaneDims = kHeadDim / 32;
    static constexpr uint32_t kMergeBatch = 8; // pieces whose loads are in flight together

    // Pieces weighted and summed so far, of one row: dimensions lane, lane + 32, ... of the output.
    struct Merged {
        float maximum, sum, total[kLaneDims];

        __device__ __forceinline__ void rescale(float new_maximum) {
            const float shrink = exp2_approx(maximum - reference_of(new_maximum));
            maximum = new_maximum;
            sum *= shrink;
#pragma unroll
            for (uint32_t e = 0; e < kLaneDims; e++) total[e] *= shrink;
        }
    };
    static __device__ __forceinline__ float warp_max(float value) {
        for (int offset = 16; offset > 0; offset /= 2)
            value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
        return value;
    }

    // A tile's pieces: items of the cache, then those of what the step adds.
    struct Pieces {
        const float *partials; // of the KV head
        uint32_t first, cached, first_fresh, count;
        __device__ __forceinline__ const float *at(uint32_t piece) const {
            const uint32_t item = piece < cached ? first + piece : first_fresh + piece - cached;
            return partials + uint64_t(item) * kPartialFloats;
        }
    };

    // Adds the pieces begin, begin + step, ... (kMergeBatch of them at most) of the tile's row `row`.
    static __device__ __forceinline__ void merge_batch(const Worker &w, Merged &merged, const Pieces &pieces,
                                                       uint32_t row, uint32_t begin, uint32_t step) {
        const uint32_t last = pieces.count - 1;
        const uint32_t mine = begin + w.lane * step; // lane i knows piece i's maximum and sum
        const bool inside = w.lane < kMergeBatch && mine <= last;
        const float *piece = pieces.at(inside ? mine : last) + row;
        float maximum, sum, values[kMergeBatch][kLaneDims];
        EagerLook look{program::eager_pieces};
#pragma unroll 1
        do {
            maximum = inside ? __uint_as_float(load_coherent4(piece)) : -infinity();
            sum = inside ? __uint_as_float(load_coherent4(piece + PERK_QUERY_ROWS)) : 0.0f;
#pragma unroll
            for (uint32_t i = 0; i < kMergeBatch; i++) { // beyond the last, that one again: its weight is 0
                const float *out =
                    pieces.at(min(begin + i * step, last)) + 2 * PERK_QUERY_ROWS + row * kHeadDim + w.lane;
#pragma unroll
                for (uint32_t e = 0; e < kLaneDims; e++) values[i][e] = __uint_as_float(load_coherent4(out + 32 * e));
            }
#pragma unroll
            for (uint32_t i = 0; i < kMergeBatch; i++)
#pragma unroll
                for (uint32_t e = 0; e < kLaneDims; e++) look.see_word(values[i][e]);
            look.see_word(maximum);
            look.see_word(sum);
        } while (look.again_words(w));
        merged.rescale(fmaxf(merged.maximum, warp_max(maximum)));
        const float weight = exp2_approx(maximum - reference_of(merged.maximum));
        merged.sum += warp_sum(weight * sum);
#pragma unroll
        for (uint32_t i = 0; i < kMergeBatch; i++) {
            const float item_weight = __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
            for (uint32_t e = 0; e < kLaneDims; e++) merged.total[e] += item_weight * values[i][e];
        }
    }

    // Puts together what kRowWarps warps have of one row, in the reduction scratch; the first of them has the result.
    // All consumer warps take part, in groups.
    template <uint32_t kRowWarps>
    static __device__ __forceinline__ void merge_warps(const Worker &w, Merged &merged) {
        constexpr uint32_t kFloats = kHeadDim + 2; // of a warp
        static_assert(PERK_CONSUMER_WARPS * kFloats * 4 <= program::reduction_bytes,
                      "the plan gave too little scratch");
        float *scratch = reinterpret_cast<float *>(shared_pointer(w.reduction()));
        float *own = scratch + w.warp * kFloats;
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // the last row's have been read
        own[0] = merged.maximum;
        own[1] = merged.sum;
#pragma unroll
        for (uint32_t e = 0; e < kLaneDims; e++) own[2 + w.lane + 32 * e] = merged.total[e];
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        if (w.warp % kRowWarps != 0) return;
        const float *piece = own + w.lane % kRowWarps * kFloats; // lane i knows the maximum and sum of warp i
        const float maximum = piece[0];
        merged.maximum = warp_max(maximum);
        const float weight = exp2_approx(maximum - reference_of(merged.maximum));
        merged.sum = warp_sum(w.lane < kRowWarps ? weight * piece[1] : 0.0f);
#pragma unroll
        for (uint32_t e = 0; e < kLaneDims; e++) merged.total[e] = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < kRowWarps; i++) {
            const float warp_weight = __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
            for (uint32_t e = 0; e < kLaneDims; e++)
                merged.total[e] += warp_weight * own[i * kFloats + 2 + w.lane + 32 * e];
        }
    }

    // One row by kRowWarps warps, of which this one is number `sub`. `live`: there is such a token.
    template <uint32_t kRowWarps, bool kOutIsInput>
    static __device__ __forceinline__ void merge_row(const Worker &w, uint64_t partials, uint8_t *out, uint32_t token,
                                                     uint32_t query_head, bool live) {
        Merged merged{-infinity(), 0.0f, {}};
        if (live) {
            const uint32_t index = w.batch_word(program::batch_token_query_tile + token);
            const Tile tile = load_tile(w, index);
            const uint32_t row = (token - tile.info.first_token) * kGroup + query_head % kGroup;
            const uint32_t added =
                tile.info.first_token + tile.info.token_count - tile.info.fresh_token; // that it sees
            const uint32_t cached = tile.info.item_count;
            const Pieces pieces{partial_of(w, partials, query_head / kGroup, 0), uint32_t(tile.info.first_item), cached,
                                first_fresh_item(w, index), cached + (added + PERK_KV_UNIT - 1) / PERK_KV_UNIT};
#pragma unroll 1
            for (uint32_t begin = w.warp % kRowWarps; begin < pieces.count; begin += kMergeBatch * kRowWarps)
                merge_batch(w, merged, pieces, row, begin, kRowWarps);
        }
        if constexpr (kRowWarps > 1) merge_warps<kRowWarps>(w, merged);
        if (!live || w.warp % kRowWarps != 0) return;
        if constexpr (kOutIsInput) {
#pragma unroll
            for (uint32_t e = 0; e < kLaneDims; e++) {
                const uint32_t column = query_head * kHeadDim + w.lane + 32 * e;
                *reinterpret_cast<uint16_t *>(out + wide_pair(token, column) + column % 2 * 2) =
                    to_bf16(__fdividef(merged.total[e], merged.sum));
            }
            return;
        }
        uint16_t *target = reinterpret_cast<uint16_t *>(out) + uint64_t(token) * kOutStride + query_head * kHeadDim;
#pragma unroll
        for (uint32_t e = 0; e < kLaneDims; e++)
            store_eager2(target + w.lane + 32 * e, to_bf16(__fdividef(merged.total[e], merged.sum)));
    }

    // Whether there is something to merge: prompts have been finished before.
    static __device__ __forceinline__ bool has_pieces(const Worker &w, uint32_t token) {
#if PERK_WIDE
        return !is_prompt(w, w.batch_word(program::batch_token_query_tile + token));
#else
        return true;
#endif
    }

    // Unit (part, head) = part * kHeads + head merges the tokens of slice `part` of kSlices, kRowWarps warps a row.
    // Operands: 0 partials, 1 out, which may be an input of wide linears.
    template <uint32_t kSlices, uint32_t kRowWarps, bool kOutIsInput>
    static __device__ __forceinline__ void merge(Worker &w, const TaskView &task) {
        constexpr uint32_t kGroups = PERK_CONSUMER_WARPS / kRowWarps;
        const uint32_t first = task.first(), stride = task.stride(), count = task.count();
        const uint64_t partials = task.operand(0);
        uint8_t *out = activation_at(w, task.place(1));
        await_inputs(w, task);
#if PERK_WIDE
        if (w.num_attention_items() == 0) return;
#endif
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t unit = first + i * stride;
            const TokenSlice slice = token_slice(w, unit / kHeads, kSlices);
            for (uint32_t j = 0; j < slice.count; j += kGroups) {
                const uint32_t mine = j + w.warp / kRowWarps;
                merge_row<kRowWarps, kOutIsInput>(w, partials, out, slice.first + mine, unit % kHeads,
                                                  mine < slice.count && has_pieces(w, slice.first + mine));
            }
        }
    }

    // ---- append ----

    // 8 keys at a time, one a quad: tokens first + quad, as far as there are `count`.
    static __device__ __forceinline__ void append_keys(const Worker &w, const Source &source, uint32_t layer,
                                                       uint32_t head, uint32_t first, uint32_t count) {
        const uint32_t token = first + min(w.lane / 4, count - 1);
        const uint32_t position = w.batch_word(program::batch_positions + token);
        const uint32_t request = w.batch_word(program::batch_token_request + token);
        Vec16 key[kDimBlocks];
        load_turned(w, source, token, position, kHeads + head, source.k_norm, key);
        if (w.lane / 4 >= count) return;
        uint8_t *target = Cache::kv_page(w, layer, Cache::page_of(w, request, position), head) +
                          (position % program::page_size * kHeadDim + w.lane % 4 * 8) * 2;
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++) *reinterpret_cast<Vec16 *>(target + d * 64) = key[d];
    }

    // Values of neighbouring tokens, as far as there are `count`, loaded together.
    static constexpr uint32_t kValueTokens = 4, kLaneValues = kHeadDim / 32;
    static __device__ __forceinline__ void append_values(const Worker &w, const Source &source, uint32_t layer,
                                                         uint32_t head, uint32_t first, uint32_t count) {
        uint16_t values[kValueTokens][kLaneValues];
        uint8_t *targets[kValueTokens];
        EagerLook look{source.is_eager};
#pragma unroll 1
        do {
#pragma unroll
            for (uint32_t t = 0; t < kValueTokens; t++) {
                const uint32_t token = first + min(t, count - 1);
                const uint32_t position = w.batch_word(program::batch_positions + token);
                const uint32_t request = w.batch_word(program::batch_token_request + token);
                targets[t] = Cache::kv_page(w, layer, Cache::page_of(w, request, position), head) +
                             Cache::value_offset(position, w.lane);
                const uint8_t *from = source.at(token, kHeads + kKvHeads + head, w.lane);
#pragma unroll
                for (uint32_t i = 0; i < kLaneValues; i++) {
                    values[t][i] = load_coherent2(from + i * 64);
                    look.see(values[t][i]);
                }
            }
        } while (look.again(w));
#pragma unroll
        for (uint32_t t = 0; t < kValueTokens; t++) {
            if (t >= count) break;
#pragma unroll
            for (uint32_t i = 0; i < kLaneValues; i++)
                *reinterpret_cast<uint16_t *>(targets[t] + i * (32 * PERK_KV_UNIT * 2)) = values[t][i];
        }
    }

    // Unit (head, slice) = head * kSlices + slice: the tokens of that slice. Scalar: the layer in the KV cache.
    template <uint32_t kSlices, bool kKNorm>
    static __device__ __forceinline__ void append(Worker &w, const TaskView &task, float eps) {
        constexpr uint32_t kKeyTokens = 8; // of one call of append_keys
        const uint32_t first = task.first(), stride = task.stride(), count = task.count(), layer = task.scalar();
        const Source source = source_of<false, kKNorm>(w, task, eps);
        const uint32_t value_warp = PERK_CONSUMER_WARPS - 1 - w.warp; // the few keys and values meet different warps
        await_inputs(w, task);
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t unit = first + i * stride, head = unit / kSlices;
            const TokenSlice slice = token_slice(w, unit % kSlices, kSlices);
            for (uint32_t j = w.warp * kKeyTokens; j < slice.count; j += PERK_CONSUMER_WARPS * kKeyTokens)
                append_keys(w, source, layer, head, slice.first + j, min(kKeyTokens, slice.count - j));
            for (uint32_t j = value_warp * kValueTokens; j < slice.count; j += PERK_CONSUMER_WARPS * kValueTokens)
                append_values(w, source, layer, head, slice.first + j, min(kValueTokens, slice.count - j));
        }
    }
};

} // namespace perk
