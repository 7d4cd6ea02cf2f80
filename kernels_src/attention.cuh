// attention, in three stages of tasks:
//   append   norm and rotation of the new queries and keys; keys and values go to their pages
//   partial  query tiles against pieces of the KV range on the tensor cores, one warp a piece (flash attention)
//   merge    the pieces of every (token, head) put together
//
// A KV page of one layer and one KV head holds K as [position][dimension] and V as [dimension][position]: both are then
// read as operands of mma with 16-byte loads straight from memory. A query tile is up to 8 rows (token, query head of
// the group) that share the KV head, so grouped heads share one read of the cache.
#pragma once

namespace perk {

template <uint32_t kHeads, uint32_t kKvHeads, uint32_t kHeadDim, uint32_t kParts>
struct Attention {
    static constexpr uint32_t kGroup = kHeads / kKvHeads;
    static constexpr uint32_t kUnits = kKvHeads * kParts; // unit = head * kParts + part
    static constexpr uint32_t kQkvStride = PERK_ROW_STRIDE((kHeads + 2 * kKvHeads) * kHeadDim);
    static constexpr uint32_t kQStride = PERK_ROW_STRIDE(kHeads * kHeadDim);
    static constexpr uint32_t kPageElements = program::page_size * kHeadDim;
    static constexpr uint32_t kHalf = kHeadDim / 2;
    static constexpr uint32_t kDimBlocks = kHeadDim / 32; // 32 dimensions: what one 16-byte load a lane covers
    static constexpr uint32_t kDimTiles = kHeadDim / 16;  // row tiles of the transposed output
    // A partial result: running maximum [8], running sum [8], unnormalised output [8][kHeadDim], fp32.
    static constexpr uint32_t kPartialFloats = PERK_QUERY_ROWS * (kHeadDim + 2);
    static_assert(kHeadDim % 32 == 0 && kGroup <= PERK_QUERY_ROWS, "the lowering refuses other shapes");

    static __device__ __forceinline__ uint8_t *key_page(const Worker &w, uint32_t layer, uint32_t page, uint32_t head) {
        const uint64_t index = (uint64_t(layer) * program::max_num_pages + page) * kKvHeads + head;
        return w.args.kv + index * 2 * kPageElements * 2;
    }
    static __device__ __forceinline__ uint32_t page_of(const Worker &w, uint32_t request, uint32_t position) {
        const uint32_t entry = request * program::pages_per_request + position / program::page_size;
        return w.batch_word(program::batch_page_table + entry);
    }
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

    // ---- append ----

    static constexpr uint32_t kLanePairs = (kHalf + 31) / 32; // rotated pairs (i, i + half) a lane

    // Norm and rotation of one head's vector; lane l holds the pairs l, l + 32, ...
    struct Turn { // what a pair is multiplied with
        float low_gain, high_gain;
        float2 rotation; // cos, sin
    };
    static __device__ __forceinline__ void norm_and_rotate(float (&low)[kLanePairs], float (&high)[kLanePairs],
                                                           const Turn (&turn)[kLanePairs], bool has_norm, float eps) {
        float square_sum = 0.0f;
#pragma unroll
        for (uint32_t e = 0; e < kLanePairs; e++) square_sum += low[e] * low[e] + high[e] * high[e];
        const float scale = has_norm ? rsqrtf(warp_sum(square_sum) / kHeadDim + eps) : 1.0f;
#pragma unroll
        for (uint32_t e = 0; e < kLanePairs; e++) {
            const float x = low[e] * scale * turn[e].low_gain, y = high[e] * scale * turn[e].high_gain;
            low[e] = x * turn[e].rotation.x - y * turn[e].rotation.y;
            high[e] = y * turn[e].rotation.x + x * turn[e].rotation.y;
        }
    }

    struct AppendOperands {
        const uint8_t *qkv;
        uint8_t *q;
        const uint16_t *q_norm, *k_norm; // null: no norm
        const float2 *rope;              // [positions][kHalf]
        uint32_t layer;
    };

    // One vector of one token: vectors 0 ... kGroup-1 are the query heads, then the key, then the value.
    static __device__ __forceinline__ void append_vector(const Worker &w, const AppendOperands &o, uint32_t head,
                                                         uint32_t token, uint32_t vector, float eps) {
        const bool is_query = vector < kGroup, is_value = vector == kGroup + 1;
        const uint32_t source_head = is_query ? head * kGroup + vector : kHeads + (is_value ? kKvHeads : 0) + head;
        const uint8_t *source = o.qkv + (uint64_t(token) * kQkvStride + source_head * kHeadDim) * 2;
        const uint32_t position = w.batch_word(program::batch_positions + token);
        const uint32_t request = w.batch_word(program::batch_token_request + token);
        const uint16_t *gain = is_query ? o.q_norm : o.k_norm;
        const float2 *rope = o.rope + uint64_t(position) * kHalf;
        float low[kLanePairs], high[kLanePairs];
        Turn turn[kLanePairs];
#pragma unroll
        for (uint32_t e = 0; e < kLanePairs; e++) { // all loads of the vector, its gains and its rotation together
            const uint32_t i = w.lane + 32 * e, inside = i < kHalf;
            turn[e].rotation = inside ? __ldg(rope + i) : make_float2(0.0f, 0.0f);
            turn[e].low_gain = inside && gain ? from_bf16(__ldg(gain + i)) : 1.0f;
            turn[e].high_gain = inside && gain ? from_bf16(__ldg(gain + i + kHalf)) : 1.0f;
            low[e] = inside ? from_bf16(load_coherent2(source + i * 2)) : 0.0f;
            high[e] = inside ? from_bf16(load_coherent2(source + (i + kHalf) * 2)) : 0.0f;
        }
        if (!is_value) norm_and_rotate(low, high, turn, gain != nullptr, eps);

        uint16_t *out = reinterpret_cast<uint16_t *>(o.q) + uint64_t(token) * kQStride + source_head * kHeadDim;
        uint32_t step = 1;
        if (!is_query) {
            const uint32_t slot = position % program::page_size;
            uint16_t *keys = reinterpret_cast<uint16_t *>(key_page(w, o.layer, page_of(w, request, position), head));
            out = is_value ? keys + kPageElements + slot : keys + slot * kHeadDim;
            step = is_value ? program::page_size : 1;
        }
#pragma unroll
        for (uint32_t e = 0; e < kLanePairs; e++) {
            const uint32_t i = w.lane + 32 * e;
            if (i >= kHalf) break;
            out[i * step] = to_bf16(low[e]);
            out[(i + kHalf) * step] = to_bf16(high[e]);
        }
    }

    // Unit (head, part) appends the tokens of slice `part`.
    // Operands: 0 qkv, 1 q, 2 q norm, 3 k norm, 4 rope table. Scalar: the layer in the KV cache.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void append(const Worker &w, const TaskView &task, float eps) {
        const uint32_t first = task.first(), stride = task.stride(), count = task.count();
        const uint64_t q_norm = task.operand(2), k_norm = task.operand(3);
        const AppendOperands o{w.args.activations + task.operand(0),
                               w.args.activations + task.operand(1),
                               kQNorm ? reinterpret_cast<const uint16_t *>(w.args.constants + q_norm) : nullptr,
                               kKNorm ? reinterpret_cast<const uint16_t *>(w.args.constants + k_norm) : nullptr,
                               reinterpret_cast<const float2 *>(w.args.constants + task.operand(4)),
                               task.scalar()};
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t unit = first + i * stride, head = unit / kParts;
            const TokenSlice slice = token_slice(w, unit % kParts, kParts);
            for (uint32_t j = w.warp; j < slice.count * (kGroup + 2); j += PERK_CONSUMER_WARPS)
                append_vector(w, o, head, slice.first + j / (kGroup + 2), j % (kGroup + 2), eps);
        }
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
        tile.rows = tile.info.token_count * kGroup;
        return tile;
    }

    // Online softmax of a lane: row g of the tile; the output transposed, dimensions by rows 2q and 2q+1.
    struct State {
        float maximum, sum;
        float out[kDimTiles][4];
    };

    static __device__ __forceinline__ float quad_max(float value) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
        return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
    }
    static __device__ __forceinline__ float quad_sum(float value) {
        value += __shfl_xor_sync(0xffffffffu, value, 1);
        return value + __shfl_xor_sync(0xffffffffu, value, 2);
    }
    // What the lanes of rows 2q and 2q+1 hold.
    static __device__ __forceinline__ float2 of_columns(const Worker &w, float value) {
        const uint32_t source = w.lane % 4 * 8;
        return make_float2(__shfl_sync(0xffffffffu, value, source), __shfl_sync(0xffffffffu, value, source + 4));
    }

    // Positions of a KV unit that starts at `begin`: the score tile j gives lane 4g+q the positions 4q+2j and 4q+2j+1
    // of row g, because row n of the key operand is position 4(n/2) + 2j + n%2. A lane's scores are then exactly its
    // right operand of the second product, with no exchange between lanes. Rows 8 to 15 of the left operand are zero.
    static __device__ __forceinline__ void load_keys(const Worker &w, uint32_t layer, uint32_t head, uint32_t request,
                                                     uint32_t begin, uint32_t end, Vec16 (&k)[2][kDimBlocks]) {
        const uint32_t n = w.lane / 4, group_start = begin + n / 2 * 4;
        const uint8_t *keys = key_page(w, layer, page_of(w, request, min(group_start, end - 1)), head);
#pragma unroll
        for (uint32_t j = 0; j < 2; j++) {
            const uint32_t position = min(group_start + 2 * j + n % 2, end - 1);
            const uint8_t *key = keys + (position % program::page_size * kHeadDim + w.lane % 4 * 8) * 2;
#pragma unroll
            for (uint32_t d = 0; d < kDimBlocks; d++) k[j][d] = load_coherent16(key + d * 64);
        }
    }

    // Values of 4 positions, for the dimensions g and g + 8 of every row tile of the output.
    static __device__ __forceinline__ void load_values(const Worker &w, uint32_t layer, uint32_t head, uint32_t request,
                                                       uint32_t begin, uint32_t end, uint2 (&v)[kDimTiles][2]) {
        const uint32_t position = min(begin + w.lane % 4 * 4, end - 1) / 4 * 4;
        const uint8_t *values = key_page(w, layer, page_of(w, request, position), head) +
                                (kPageElements + w.lane / 4 * program::page_size + position % program::page_size) * 2;
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t half = 0; half < 2; half++)
                v[d][half] = load_coherent8(values + (d * 16 + half * 8) * program::page_size * 2);
    }

    static __device__ __forceinline__ void score_unit(const Vec16 (&q)[kDimBlocks], const Vec16 (&k)[2][kDimBlocks],
                                                      float (&scores)[2][4]) {
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++)
#pragma unroll
            for (uint32_t j = 0; j < 2; j++) {
                mma(scores[j], q[d].x, 0, q[d].y, 0, k[j][d].x, k[j][d].y);
                mma(scores[j], q[d].z, 0, q[d].w, 0, k[j][d].z, k[j][d].w);
            }
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
        const float reference = maximum == -infinity() ? 0.0f : maximum; // all masked: weights 0, not NaN
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

    static __device__ __forceinline__ void attend_unit(const Worker &w, State &state, const Vec16 (&q)[kDimBlocks],
                                                       uint32_t layer, uint32_t head, uint32_t request, uint32_t begin,
                                                       uint32_t end, uint32_t limit, uint32_t window, float scale) {
        Vec16 k[2][kDimBlocks];
        uint2 v[kDimTiles][2];
        load_keys(w, layer, head, request, begin, end, k);
        load_values(w, layer, head, request, begin, end, v); // in flight beside the keys
        const uint32_t lane_start = begin + w.lane % 4 * 4;
        const uint2 mask = mask_first(lane_start >= end ? 0 : min(4u, end - lane_start));
        float scores[2][4] = {};
        score_unit(q, k, scores);
        softmax_unit(w, state, scores, limit, window, lane_start, end, scale);
        const uint32_t p0 = pack_bf16(scores[0][0], scores[0][1]), p1 = pack_bf16(scores[1][0], scores[1][1]);
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
            mma(state.out[d], v[d][0].x & mask.x, v[d][1].x & mask.x, v[d][0].y & mask.y, v[d][1].y & mask.y, p0, p1);
    }

    static __device__ __forceinline__ void store_partial(const Worker &w, const State &state, float *partial) {
        const uint32_t g = w.lane / 4, q = w.lane % 4;
        const float sum = quad_sum(state.sum);
        if (q == 0) {
            partial[g] = state.maximum;
            partial[PERK_QUERY_ROWS + g] = sum;
        }
        float *out = partial + 2 * PERK_QUERY_ROWS;
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) out[(2 * q + c % 2) * kHeadDim + d * 16 + c / 2 * 8 + g] = state.out[d][c];
    }

    static __device__ __forceinline__ void attend_item(const Worker &w, const uint8_t *q_base, uint64_t partials,
                                                       uint32_t layer, uint32_t head, uint32_t item, uint32_t window,
                                                       float scale) {
        const uint32_t words = program::batch_attention_items + item * (sizeof(perk_attention_item) / 4);
        const uint32_t kv_begin = w.batch_word(words + 1), kv_end = w.batch_word(words + 2);
        const Tile tile = load_tile(w, w.batch_word(words));
        const uint32_t row = min(w.lane / 4, tile.rows - 1), token = tile.token(row);
        const uint32_t limit = w.batch_word(program::batch_positions + token); // the last position it sees
        const uint32_t column = (head * kGroup + row % kGroup) * kHeadDim + w.lane % 4 * 8;
        Vec16 q[kDimBlocks];
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++)
            q[d] = load_coherent16(q_base + (uint64_t(token) * kQStride + column + d * 32) * 2);
        State state;
        state.maximum = -infinity();
        state.sum = 0.0f;
#pragma unroll
        for (uint32_t d = 0; d < kDimTiles; d++)
#pragma unroll
            for (uint32_t c = 0; c < 4; c++) state.out[d][c] = 0.0f;
#pragma unroll 1
        for (uint32_t begin = kv_begin; begin < kv_end; begin += PERK_KV_UNIT)
            attend_unit(w, state, q, layer, head, tile.info.request, begin, kv_end, limit, window, scale);
        store_partial(w, state, partial_of(w, partials, head, item));
    }

    // Unit (head, part): the items part, part + kParts, ..., dealt to the warps.
    // Operands: 0 q, 1 partials. Scalar: the layer in the KV cache. `scale` is for base 2: scale * log2(e).
    static __device__ __forceinline__ void partial(const Worker &w, const TaskView &task, float scale,
                                                   uint32_t window) {
        const uint32_t first = task.first(), stride = task.stride(), count = task.count(), layer = task.scalar();
        const uint64_t q = task.operand(0), partials = task.operand(1);
        const uint32_t items = w.num_attention_items();
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t unit = first + i * stride, head = unit / kParts, part = unit % kParts;
            for (uint32_t item = part + kParts * w.warp; item < items; item += kParts * PERK_CONSUMER_WARPS)
                attend_item(w, w.args.activations + q, partials, layer, head, item, window, scale);
        }
    }

    // ---- merge ----

    static constexpr uint32_t kLaneDims = kHeadDim / 32;

    static __device__ __forceinline__ void merge_row(const Worker &w, uint64_t partials, uint8_t *out, uint32_t token,
                                                     uint32_t query_head) {
        const Tile tile = load_tile(w, w.batch_word(program::batch_token_query_tile + token));
        const uint32_t row = (token - tile.info.first_token) * kGroup + query_head % kGroup;
        const float *first = partial_of(w, partials, query_head / kGroup, tile.info.first_item);
        const uint32_t items = tile.info.item_count;
        float maximum = -infinity();
        for (uint32_t i = w.lane; i < items; i += 32)
            maximum = fmaxf(maximum, __ldcg(first + uint64_t(i) * kPartialFloats + row));
        for (int offset = 16; offset > 0; offset /= 2)
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
        float sum = 0.0f, total[kLaneDims] = {};
#pragma unroll 8 // loads of as many pieces are in flight
        for (uint32_t i = 0; i < items; i++) {
            const float *partial = first + uint64_t(i) * kPartialFloats;
            const float weight = exp2_approx(__ldcg(partial + row) - maximum);
            sum += weight * __ldcg(partial + PERK_QUERY_ROWS + row);
#pragma unroll
            for (uint32_t e = 0; e < kLaneDims; e++)
                total[e] += weight * __ldcg(partial + 2 * PERK_QUERY_ROWS + row * kHeadDim + w.lane + 32 * e);
        }
        uint16_t *target = reinterpret_cast<uint16_t *>(out) + uint64_t(token) * kQStride + query_head * kHeadDim;
#pragma unroll
        for (uint32_t e = 0; e < kLaneDims; e++) target[w.lane + 32 * e] = to_bf16(total[e] / sum);
    }

    // Unit (part, head) = part * kHeads + head merges the tokens of slice `part` of kSlices.
    // Operands: 0 partials, 1 out.
    template <uint32_t kSlices>
    static __device__ __forceinline__ void merge(const Worker &w, const TaskView &task) {
        const uint32_t first = task.first(), stride = task.stride(), count = task.count();
        const uint64_t partials = task.operand(0);
        uint8_t *out = w.args.activations + task.operand(1);
        for (uint32_t i = 0; i < count; i++) {
            const uint32_t unit = first + i * stride;
            const TokenSlice slice = token_slice(w, unit / kHeads, kSlices);
            for (uint32_t j = w.warp; j < slice.count; j += PERK_CONSUMER_WARPS)
                merge_row(w, partials, out, slice.first + j, unit % kHeads);
        }
    }
};

} // namespace perk
