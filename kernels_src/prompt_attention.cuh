// attention of prompts: of requests that bring PERK_PROMPT_TOKENS tokens or more in a step, in programs with wide
// linears. The step's tokens are cut into slices of program::prompt_tokens; all of a slice that one request has, times
// the query heads of a KV head, are up to 64 rows, which a worker takes over the request's whole KV range (flash
// attention) and finishes by itself: no partial results, nothing to merge.
//
// Keys and values come in tiles of 64 positions, of the pages or of what this step adds, through three buffers in
// shared memory. Both warpgroups work on all 64 rows, each over its half of every tile's positions, and put their
// results together at the end. The buffers are the slots of the feeder: it lends them to the task.
#pragma once

namespace perk {

template <uint32_t kHeads, uint32_t kKvHeads, uint32_t kHeadDim, uint32_t kParts, bool kOutIsInput>
struct PromptAttention : Attention<kHeads, kKvHeads, kHeadDim, kParts> {
    using Base = Attention<kHeads, kKvHeads, kHeadDim, kParts>;
    using typename Base::Source;
    using typename Base::Tile;
    static constexpr uint32_t kGroup = Base::kGroup, kDimBlocks = Base::kDimBlocks;
    static constexpr uint32_t kRows = 64, kPositions = 64;                     // of a unit, of a tile
    static constexpr uint32_t kHalf = kPositions / 2;                          // of a tile: a warpgroup's
    static constexpr uint32_t kSliceBytes = kPositions * PERK_SLICE_ROW_BYTES; // of a tile's keys: 64 dimensions
    static constexpr uint32_t kKeyBytes = kHeadDim / PERK_SLICE_COLS * kSliceBytes;
    static constexpr uint32_t kTileBytes = 2 * kKeyBytes;
    static constexpr uint32_t kBuffers = 3, kAhead = kBuffers - 1;
    static constexpr uint32_t kOutput = 5; // operand, beside those of Attention's partial
    static_assert(kHeadDim % 64 == 0 && program::prompt_tokens * kGroup <= kRows && program::page_size % 8 == 0 &&
                      kBuffers * kTileBytes <= program::input_slots * SharedMap::slice_bytes,
                  "the lowering refuses other shapes");

    // A request's tokens in a slice, and the tiles that they see.
    struct Run {
        uint32_t request, first_token, rows, layer, head;
        uint32_t fresh_token, fresh_position; // of the request, from where on keys and values are this step's
        uint32_t first_limit, end;            // position of its first token; behind its last one
        uint32_t begin, fresh_begin;          // positions of the first tile, of the first one that is not in the cache
        uint32_t cached_tiles, tiles;

        __device__ __forceinline__ bool is_cached(uint32_t tile) const { return tile < cached_tiles; }
        __device__ __forceinline__ uint32_t tile_begin(uint32_t tile) const {
            return is_cached(tile) ? begin + tile * kPositions : fresh_begin + (tile - cached_tiles) * kPositions;
        }
        __device__ __forceinline__ uint32_t tile_end(uint32_t tile) const {
            return min(tile_begin(tile) + kPositions, is_cached(tile) ? fresh_position : end);
        }
        __device__ __forceinline__ uint32_t token_of_row(uint32_t row) const {
            return first_token + min(row, rows - 1) / kGroup;
        }
    };

    static __device__ __forceinline__ Run make_run(const Worker &w, const TaskView &task, const Tile &tile,
                                                   uint32_t first, uint32_t count, uint32_t head, uint32_t window) {
        Run run;
        run.request = tile.info.request;
        run.first_token = first;
        run.rows = count * kGroup;
        run.layer = task.scalar();
        run.head = head;
        run.fresh_token = tile.info.fresh_token;
        run.fresh_position = tile.info.fresh_position;
        run.first_limit = run.fresh_position + first - run.fresh_token;
        run.end = run.first_limit + count;
        const uint32_t seen = run.first_limit >= window ? run.first_limit + 1 - window : 0; // the first position
        run.begin = seen / kPositions * kPositions;
        run.cached_tiles =
            run.begin < run.fresh_position ? (run.fresh_position - run.begin + kPositions - 1) / kPositions : 0;
        const uint32_t skipped = seen > run.fresh_position ? (seen - run.fresh_position) / kPositions * kPositions : 0;
        run.fresh_begin = run.fresh_position + skipped;
        run.tiles = run.cached_tiles + (run.end - run.fresh_begin + kPositions - 1) / kPositions;
        return run;
    }

    // ---- a tile in shared memory: keys as [64 dimensions][position], values as [dimension][position], rows of 128
    // bytes in the 128-byte swizzle ----

    static __device__ __forceinline__ uint32_t buffer_of(const Worker &w, uint32_t tile) {
        return w.shared + SharedMap::inputs + tile % kBuffers * kTileBytes;
    }
    static __device__ __forceinline__ uint32_t sixteen(uint32_t row, uint32_t number) {
        return row * PERK_SLICE_ROW_BYTES + (number ^ row % 8) * 16;
    }
    // Dimensions 8 * number ... of a position's key; positions 8 * number ... of a dimension's values.
    static __device__ __forceinline__ uint32_t key_place(uint32_t buffer, uint32_t position, uint32_t number) {
        return buffer + number / 8 * kSliceBytes + sixteen(position, number % 8);
    }
    static __device__ __forceinline__ uint32_t value_place(uint32_t buffer, uint32_t dimension, uint32_t number) {
        return buffer + kKeyBytes + sixteen(dimension, number);
    }

    static __device__ __forceinline__ const uint8_t *page_at(const Worker &w, const Run &run, uint32_t position) {
        return Base::Cache::kv_page(w, run.layer, Base::Cache::page_of(w, run.request, position), run.head);
    }

    // Starts this thread's copies of a tile that is in the cache. What lies beyond its end is some key, and some
    // values, which need not be numbers.
    static __device__ __forceinline__ void copy_cached(const Worker &w, const Run &run, uint32_t tile) {
        constexpr bool kIsInPage = program::page_size >= kPositions; // all of it: tiles of the cache are aligned
        constexpr uint32_t kKeyPieces = kHeadDim / 8, kKeyRows = PERK_CONSUMER_THREADS / kKeyPieces;
        constexpr uint32_t kValuePieces = kPositions / 8, kValueRows = PERK_CONSUMER_THREADS / kValuePieces;
        const uint32_t buffer = buffer_of(w, tile), begin = run.tile_begin(tile), last = run.tile_end(tile) - 1;
        const uint32_t key_piece = w.thread % kKeyPieces, value_piece = w.thread % kValuePieces;
        const uint8_t *page = page_at(w, run, begin);
#pragma unroll
        for (uint32_t i = 0; i < kPositions / kKeyRows; i++) {
            const uint32_t row = i * kKeyRows + w.thread / kKeyPieces;
            const uint32_t position = kIsInPage ? begin + row : min(begin + row, last);
            const uint8_t *keys = kIsInPage ? page : page_at(w, run, position);
            copy_async16(key_place(buffer, row, key_piece),
                         keys + (position % program::page_size * kHeadDim + key_piece * 8) * 2);
        }
        const uint32_t position = begin + value_piece * 8, there = kIsInPage ? position : min(position, last / 8 * 8);
        const uint8_t *values = (kIsInPage ? page : page_at(w, run, there)) + Base::Cache::value_offset(there, 0);
#pragma unroll
        for (uint32_t i = 0; i < kHeadDim / kValueRows; i++) {
            const uint32_t dimension = i * kValueRows + w.thread / kValuePieces;
            copy_async16(value_place(buffer, dimension, value_piece), values + dimension * PERK_KV_UNIT * 2);
        }
    }

    // Zeroes the values beyond the end of a tile: weights 0 times what is no number would be none.
    static __device__ __forceinline__ void clear_values(const Worker &w, const Run &run, uint32_t tile) {
        const uint32_t buffer = buffer_of(w, tile), valid = run.tile_end(tile) - run.tile_begin(tile);
        const uint32_t pieces = kPositions / 8 - valid / 8;
        if (valid == kPositions) return;
#pragma unroll 1
        for (uint32_t i = w.thread; i < pieces * kHeadDim; i += PERK_CONSUMER_THREADS) {
            const uint32_t piece = valid / 8 + i / kHeadDim, address = value_place(buffer, i % kHeadDim, piece);
            const uint32_t keep = piece == valid / 8 ? valid % 8 : 0;
            Vec16 x{0, 0, 0, 0};
            if (keep > 0) x = load_shared16(address);
            const uint2 low = Base::mask_first(min(keep, 4u)), high = Base::mask_first(keep - min(keep, 4u));
            store_shared16(address, {x.x & low.x, x.y & low.y, x.z & high.x, x.w & high.y});
        }
        fence_shared_stores();
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    }

    // What a round of attend_tiles turns: 64 queries or keys, a quad each.
    struct Vectors {
        uint32_t buffer;
        uint32_t token, position, head; // the quad's
        const uint16_t *gain;
    };
    static __device__ __forceinline__ Vectors queries_of(const Worker &w, const Run &run, const Source &source) {
        const uint32_t row = min(w.thread / 4, run.rows - 1), token = run.token_of_row(row);
        return {buffer_of(w, kAhead), token, run.first_limit + token - run.first_token,
                run.head * kGroup + row % kGroup, source.q_norm};
    }
    static __device__ __forceinline__ Vectors keys_of(const Worker &w, const Run &run, const Source &source,
                                                      uint32_t tile) {
        const uint32_t position = min(run.tile_begin(tile) + w.thread / 4, run.tile_end(tile) - 1);
        return {buffer_of(w, tile), run.fresh_token + position - run.fresh_position, position, kHeads + run.head,
                source.k_norm};
    }
    static __device__ __forceinline__ void make_vectors(const Worker &w, const Source &source, const Vectors &v) {
        Vec16 x[kDimBlocks];
        Base::load_turned(w, source, v.token, v.position, v.head, v.gain, x);
#pragma unroll
        for (uint32_t d = 0; d < kDimBlocks; d++)
            store_shared16(key_place(v.buffer, w.thread / 4, d * 4 + w.lane % 4), x[d]);
    }

    // The values of a tile that this step adds: a lane brings those of two positions side by side.
    static __device__ __forceinline__ void make_values(const Worker &w, const Source &source, const Run &run,
                                                       uint32_t tile) {
        const uint32_t buffer = buffer_of(w, tile), even = run.tile_begin(tile) + w.lane * 2, odd = even + 1;
        const uint32_t last = run.tile_end(tile) - 1, head = kHeads + kKvHeads + run.head;
        const uint32_t first_token = run.fresh_token - run.fresh_position; // of position 0, if it were the step's
        for (uint32_t piece = w.warp; piece < kHeadDim / 8; piece += PERK_CONSUMER_WARPS) {
            Vec16 a = load_coherent16(source.at(first_token + min(even, last), head, piece * 8));
            Vec16 b = load_coherent16(source.at(first_token + min(odd, last), head, piece * 8));
            if (even > last) a = Vec16{0, 0, 0, 0};
            if (odd > last) b = Vec16{0, 0, 0, 0};
            const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t number = w.lane / 4, word = w.lane % 4 * 4, dimension = piece * 8 + i * 2;
                store_shared4(value_place(buffer, dimension, number) + word, (as[i] & 0xffffu) | bs[i] << 16);
                store_shared4(value_place(buffer, dimension + 1, number) + word, as[i] >> 16 | (bs[i] & 0xffff0000u));
            }
        }
    }

    // A warp's 16 queries as the left operand.
    static __device__ __forceinline__ void load_queries(const Worker &w, Vec16 (&q)[kHeadDim / 16]) {
        const uint32_t buffer = buffer_of(w, kAhead), low = row_of(w), high = low + 8, word = w.lane % 4 * 4;
#pragma unroll
        for (uint32_t i = 0; i < kHeadDim / 16; i++)
            q[i] = {load_shared4(key_place(buffer, low, 2 * i) + word),
                    load_shared4(key_place(buffer, high, 2 * i) + word),
                    load_shared4(key_place(buffer, low, 2 * i + 1) + word),
                    load_shared4(key_place(buffer, high, 2 * i + 1) + word)};
    }

    // The lane's first row; the other is 8 on.
    static __device__ __forceinline__ uint32_t row_of(const Worker &w) { return w.warp % 4 * 16 + w.lane / 4; }

    // ---- a tile's products ----

    // Online softmax of the lane's two rows, over its warpgroup's positions.
    struct State {
        uint32_t limit[2]; // the rows' positions
        float maximum[2], sum[2];
        float out[kHeadDim / 2]; // as wgmma's sums: rows by dimensions
    };

    // What of a tile the warpgroup's rows see, and how scores are scaled.
    struct Mask {
        uint32_t first, end, window; // position of the lane's first score
        float scale;
        bool is_needed;
    };

    static __device__ __forceinline__ void mask_scores(const State &state, const Mask &mask,
                                                       float (&scores)[kHalf / 2]) {
#pragma unroll
        for (uint32_t i = 0; i < kHalf / 2; i++) {
            const uint32_t position = mask.first + i / 4 * 8 + i % 2, limit = state.limit[i / 2 % 2];
            const bool is_seen = position < mask.end && position <= limit && limit - position < mask.window;
            scores[i] = is_seen ? scores[i] : -infinity();
        }
    }

    // Scores become weights, and what was there before is rescaled.
    static __device__ __forceinline__ void weigh(State &state, const Mask &mask, float (&scores)[kHalf / 2]) {
        if (mask.is_needed) mask_scores(state, mask, scores);
        float maximum[2] = {state.maximum[0], state.maximum[1]}, shift[2];
#pragma unroll
        for (uint32_t i = 0; i < kHalf / 2; i++) maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], scores[i]);
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            maximum[r] = Base::quad_max(maximum[r]);
            shift[r] = Base::reference_of(maximum[r]) * mask.scale;
        }
        if (__any_sync(0xffffffffu, maximum[0] > state.maximum[0] || maximum[1] > state.maximum[1])) {
            float shrink[2];
#pragma unroll
            for (uint32_t r = 0; r < 2; r++) {
                shrink[r] = exp2_approx(state.maximum[r] * mask.scale - shift[r]);
                state.maximum[r] = maximum[r];
                state.sum[r] *= shrink[r];
            }
#pragma unroll
            for (uint32_t i = 0; i < kHeadDim / 2; i++) state.out[i] *= shrink[i / 2 % 2];
        }
#pragma unroll
        for (uint32_t i = 0; i < kHalf / 2; i++) {
            scores[i] = exp2_approx(scores[i] * mask.scale - shift[i / 2 % 2]);
            state.sum[i / 2 % 2] += scores[i];
        }
    }

    static __device__ __forceinline__ void multiply_tile(const Worker &w, State &state, const Vec16 (&q)[kHeadDim / 16],
                                                         uint32_t buffer, const Mask &mask) {
        const uint32_t group = w.warp / 4;
        const uint64_t keys = wgmma_operand(buffer + group * kHalf * PERK_SLICE_ROW_BYTES);
        const uint64_t values = wgmma_operand(buffer + kKeyBytes) + group * (kHalf / 8);
        float scores[kHalf / 2] = {};
        wgmma_keep(scores);
        wgmma_keep(state.out); // in registers of its own, else it would be moved for every tile
        wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < kHeadDim / 16; i++)
            wgmma<kHalf>(scores, q[i], keys + i / 4 * (kSliceBytes / 16) + i % 4 * 2);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(scores);
        wgmma_keep(state.out);
        weigh(state, mask, scores);
        Vec16 weights[kHalf / 16];
#pragma unroll
        for (uint32_t i = 0; i < kHalf / 16; i++) {
            const float *s = scores + i * 8;
            weights[i] = {pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7])};
        }
        wgmma_keep(state.out);
        wgmma_fence();
#pragma unroll
        for (uint32_t i = 0; i < kHalf / 16; i++) wgmma<kHeadDim>(state.out, weights[i], values + i * 2);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(state.out);
    }

    // ---- finishing: the second warpgroup's results join the first one's ----

    static __device__ __forceinline__ void leave_state(const Worker &w, const State &state) {
        const uint32_t place = w.shared + SharedMap::inputs + w.thread % 128 * 4;
#pragma unroll
        for (uint32_t i = 0; i < kHeadDim / 2; i++) store_shared4(place + i * 512, __float_as_uint(state.out[i]));
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            store_shared4(place + (kHeadDim / 2 + r) * 512, __float_as_uint(state.maximum[r]));
            store_shared4(place + (kHeadDim / 2 + 2 + r) * 512, __float_as_uint(state.sum[r]));
        }
    }

    static __device__ __forceinline__ void join_state(const Worker &w, State &state, float scale) {
        const uint32_t place = w.shared + SharedMap::inputs + w.thread % 128 * 4;
        auto other = [&](uint32_t i) { return __uint_as_float(load_shared4(place + i * 512)); };
        float own_weight[2], other_weight[2];
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            const float other_maximum = other(kHeadDim / 2 + r);
            const float shift = Base::reference_of(fmaxf(state.maximum[r], other_maximum)) * scale;
            own_weight[r] = exp2_approx(state.maximum[r] * scale - shift);
            other_weight[r] = exp2_approx(other_maximum * scale - shift);
            const float sum = own_weight[r] * state.sum[r] + other_weight[r] * other(kHeadDim / 2 + 2 + r);
            const float inverse = __fdividef(1.0f, Base::quad_sum(sum));
            own_weight[r] *= inverse;
            other_weight[r] *= inverse;
        }
#pragma unroll
        for (uint32_t i = 0; i < kHeadDim / 2; i++) {
            const uint32_t r = i / 2 % 2;
            state.out[i] = state.out[i] * own_weight[r] + other(i) * other_weight[r];
        }
    }

    static __device__ __forceinline__ void store_rows(const Worker &w, const State &state, const Run &run,
                                                      uint8_t *out) {
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            const uint32_t row = row_of(w) + r * 8, token = run.token_of_row(row);
            const uint32_t column = (run.head * kGroup + row % kGroup) * kHeadDim + w.lane % 4 * 2;
            if (row >= run.rows) continue;
#pragma unroll
            for (uint32_t i = 0; i < kHeadDim / 8; i++) {
                const uint64_t place = kOutIsInput ? wide_pair(token, column + i * 8)
                                                   : (uint64_t(token) * Base::kOutStride + column + i * 8) * 2;
                *reinterpret_cast<uint32_t *>(out + place) =
                    pack_bf16(state.out[i * 4 + r * 2], state.out[i * 4 + r * 2 + 1]);
            }
        }
    }

    // ---- the task ----

    // What the stage's tasks have in common.
    struct Form {
        float scale; // for base 2: scale * log2(e)
        uint32_t window;
        float eps;
    };

    static __device__ __forceinline__ void fill_cached(const Worker &w, const Run &run, uint32_t tile) {
        if (tile < run.tiles && run.is_cached(tile)) copy_cached(w, run, tile);
        copy_async_commit(); // one group a tile, of none or all of this thread's copies
    }

    static __device__ __forceinline__ Mask mask_of(const Worker &w, const Run &run, uint32_t tile, const Form &form) {
        const uint32_t begin = run.tile_begin(tile), end = run.tile_end(tile);
        const bool is_cut = end<begin + kPositions, is_late = end - 1> run.first_limit;
        return {begin + w.warp / 4 * kHalf + w.lane % 4 * 2, end, form.window, form.scale,
                is_cut || is_late || run.end - 1 - begin >= form.window};
    }

    static __device__ __forceinline__ bool is_fresh(const Run &run, uint32_t tile) {
        return tile < run.tiles && !run.is_cached(tile);
    }

    // The first tiles that this step adds, and the queries, which pass through the buffer that no tile needs yet.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void begin_tiles(Worker w, const TaskView &task, const Run &run, float eps,
                                                       Vec16 (&q)[kHeadDim / 16]) {
#pragma unroll 1
        for (uint32_t round = 0; round <= kAhead; round++) { // the last one is the queries'
            const bool is_last = round == kAhead;
            if (!is_last && !is_fresh(run, round)) continue;
            const Source source = Base::template source_of<kQNorm, kKNorm>(w, task, eps);
            make_vectors(w, source, is_last ? queries_of(w, run, source) : keys_of(w, run, source, round));
            if (!is_last) make_values(w, source, run, round);
        }
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        load_queries(w, q);
    }

    // Tile i is in its buffer behind the barrier, and nobody reads tile i - 1 any more: its buffer gets tile i + 2.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void attend_tiles(Worker w, const TaskView &task, const Run &run, State &state,
                                                        const Form &form) {
        Vec16 q[kHeadDim / 16];
        begin_tiles<kQNorm, kKNorm>(w, task, run, form.eps, q);
#pragma unroll 1
        for (uint32_t tile = 0; tile < run.tiles; tile++) {
            w.forget_coordinates(); // addresses are made anew: kept over the loop, they would cost spills
            copy_async_wait_but<kAhead - 1>();
            fence_shared_stores();
            named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
            if (run.is_cached(tile)) clear_values(w, run, tile);
            fill_cached(w, run, tile + kAhead);
            if (is_fresh(run, tile + kAhead)) {
                const Source source = Base::template source_of<kQNorm, kKNorm>(w, task, form.eps);
                make_vectors(w, source, keys_of(w, run, source, tile + kAhead));
                make_values(w, source, run, tile + kAhead);
            }
            multiply_tile(w, state, q, buffer_of(w, tile), mask_of(w, run, tile, form));
        }
    }

    // The first tiles of the cache are on their way.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ void attend_run(Worker w, const TaskView &task, const Run &run,
                                                      const Form &form) {
        w.forget_coordinates();
        State state = {};
#pragma unroll
        for (uint32_t r = 0; r < 2; r++) {
            state.limit[r] = run.first_limit + min(row_of(w) + r * 8, run.rows - 1) / kGroup;
            state.maximum[r] = -infinity();
        }
        attend_tiles<kQNorm, kKNorm>(w, task, run, state, form);
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // the last tile has been read
        if (w.warp >= PERK_CONSUMER_WARPS / 2) leave_state(w, state);
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        if (w.warp < PERK_CONSUMER_WARPS / 2) {
            join_state(w, state, form.scale);
            store_rows(w, state, run, w.args.activations + task.operand(kOutput));
        }
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // and so has what was left
    }

    // Where a task is in its units: turn by turn of slices, token by token in a slice.
    struct Place {
        uint32_t unit, turn, offset; // offset: of a token in its slice
    };

    // A part's slices: back and forth, since later tokens see more.
    static __device__ __forceinline__ uint32_t slice_of(uint32_t part, uint32_t turn) {
        return turn * kParts + (turn % 2 ? kParts - 1 - part : part);
    }

    // The next run of a prompt's tokens; false: there is none.
    static __device__ __forceinline__ bool find_run(const Worker &w, const TaskView &task, uint32_t window,
                                                    Place &place, Run &run) {
        const uint32_t tokens = w.num_tokens(), end_unit = task.first() + task.count();
#pragma unroll 1
        while (place.unit < end_unit) {
            const uint32_t begin = slice_of(place.unit % kParts, place.turn) * program::prompt_tokens;
            const uint32_t end = min(begin + program::prompt_tokens, tokens), token = begin + place.offset;
            if (token >= end) {
                place.offset = 0;
                const bool was_last = ++place.turn * kParts * program::prompt_tokens >= tokens;
                if (was_last) place = {place.unit + 1, 0, 0};
                continue;
            }
            const uint32_t index = w.batch_word(program::batch_token_query_tile + token);
            const Tile tile = Base::load_tile(w, index);
            const uint32_t next = tile.info.first_token + tile.info.token_count;
            place.offset = next - begin;
            if (!Base::is_prompt(w, index)) continue;
            run = make_run(w, task, tile, token, next - token, place.unit / kParts, window);
            return true;
        }
        return false;
    }

    // As Attention's, and the prompts of the same units.
    template <bool kQNorm, bool kKNorm>
    static __device__ __forceinline__ uint32_t partial(Worker &w, const TaskView &task, uint32_t chunk, float scale,
                                                       uint32_t window, float eps) {
        const Form form{scale, window, eps};
        Place place{task.first(), 0, 0};
        take_inputs(w);
#pragma unroll 1
        for (bool is_first = true;; is_first = false) {
            Run run = {};
            const bool has_run = find_run(w, task, window, place, run);
#pragma unroll 1
            for (uint32_t tile = 0; tile < kAhead; tile++) fill_cached(w, run, tile);
            if (is_first) await_inputs(w, task); // what is in the cache does not wait
            if (!has_run) break;
            attend_run<kQNorm, kKNorm>(w, task, run, form);
        }
        w.forget_coordinates();
        give_inputs(w);
        Base::template attend_items<kQNorm, kKNorm>(w, task, scale, window, eps);
        return chunk;
    }
};

} // namespace perk
