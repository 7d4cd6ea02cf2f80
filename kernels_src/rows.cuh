// Tasks over rows of activations that stream no weights: gather_rows (embed, select_rows), arrange_input, rmsnorm,
// gate_mul, argmax.
#pragma once

namespace perk {

// Which rows a stage works on: those of the step's tokens, or of its logits.
enum class Rows { tokens, logits };
template <Rows kRows>
__device__ __forceinline__ uint32_t row_count(const Worker &w) {
    return kRows == Rows::tokens ? w.num_tokens() : w.num_logit_rows();
}

// Whether the stage has nothing to do, nor has the producer: most steps of a prompt want no logits.
template <Rows kRows>
__device__ __forceinline__ bool has_no_rows(const Worker &w) {
    if constexpr (PERK_WIDE && kRows == Rows::logits) return row_count<kRows>(w) == 0;
    return false;
}

// ---- inputs of wide linears (abi.h) ----

// Byte offset of columns `column` and `column` + 1 (an even one first) of a row.
__device__ __forceinline__ uint64_t wide_pair(uint32_t row, uint32_t column) {
    const uint32_t block = column / PERK_BLOCK_COLS % PERK_SLICE_BLOCKS, lane = column % PERK_BLOCK_COLS / 8;
    const uint32_t sixteen = block * 4 + column % 8 / 2;
    return (uint64_t(column / PERK_SLICE_COLS) * program::max_tokens + row) * PERK_SLICE_ROW_BYTES +
           (sixteen ^ row % 8) * 16 + lane * 4;
}

// Stores 8 neighbouring columns of a row, from a multiple of 8 on.
__device__ __forceinline__ void store_wide8(uint8_t *out, uint32_t row, uint32_t column, Vec16 values) {
    *reinterpret_cast<uint32_t *>(out + wide_pair(row, column)) = values.x;
    *reinterpret_cast<uint32_t *>(out + wide_pair(row, column + 2)) = values.y;
    *reinterpret_cast<uint32_t *>(out + wide_pair(row, column + 4)) = values.z;
    *reinterpret_cast<uint32_t *>(out + wide_pair(row, column + 6)) = values.w;
}

// Rows to an input, where whoever writes them cannot do so itself. A task copies the column groups of 8 first, first +
// stride, ... of every row. Operands: 0 rows, 1 the input.
template <Rows kRows, uint32_t kStride>
__device__ void arrange_input(Worker &w, const TaskView &task) {
    const uint32_t rows = row_count<kRows>(w), first = task.first(), stride = task.stride(), count = task.count();
    const uint8_t *x = w.args.activations + task.operand(0);
    uint8_t *out = w.args.activations + task.operand(1);
    await_inputs(w, task);
    for (uint32_t i = w.thread; i < rows * count; i += PERK_CONSUMER_THREADS) {
        const uint32_t row = i / count, column = (first + i % count * stride) * 8;
        store_wide8(out, row, column, load_coherent16(x + (uint64_t(row) * kStride + column) * 2));
    }
}

// out[r] = table[index[r]]. A task copies the 16-byte column groups first, first + stride, ... of every row.
// Operands: 0 source rows, 1 output rows.
template <Rows kRows, uint32_t kIndexWords, uint32_t kSourceStride, uint32_t kOutStride, bool kSourceIsConstant>
__device__ void gather_rows(Worker &w, const TaskView &task) {
    const uint32_t rows = row_count<kRows>(w), first = task.first(), stride = task.stride(), count = task.count();
    const uint8_t *source = (kSourceIsConstant ? w.args.constants : w.args.activations) + task.operand(0);
    uint8_t *out = w.args.activations + task.operand(1);
    await_inputs(w, task);
#pragma unroll 1 // of few rows and columns once, or so
    for (uint32_t i = w.thread; i < rows * count; i += PERK_CONSUMER_THREADS) {
        const uint32_t row = i / count, group = first + i % count * stride;
        const uint32_t from = w.batch_word(kIndexWords + row);
        const uint8_t *address = source + (uint64_t(from) * kSourceStride + group * 8) * 2;
        const Vec16 value = kSourceIsConstant ? load_constant16(address) : load_coherent16(address);
        *reinterpret_cast<Vec16 *>(out + (uint64_t(row) * kOutStride + group * 8) * 2) = value;
    }
}

// Sum over the 32 lanes, in every lane; the order of additions is fixed.
__device__ __forceinline__ float warp_sum(float value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// The same of kCount values at once, a power of two: lane l has the sum of value l / (32 / kCount). In every step but
// the last ones a lane hands over half of the sums that it has, and keeps the others, so that few are left to be
// exchanged.
template <uint32_t kCount>
__device__ __forceinline__ float warp_sums(uint32_t lane, float (&values)[kCount]) {
    uint32_t offset = 16;
#pragma unroll
    for (uint32_t kept = kCount / 2; kept > 0; kept /= 2, offset /= 2)
#pragma unroll
        for (uint32_t i = 0; i < kept; i++) {
            const bool keeps_upper = (lane & offset) != 0;
            const float own = keeps_upper ? values[kept + i] : values[i],
                        other = keeps_upper ? values[i] : values[kept + i];
            values[i] = own + __shfl_xor_sync(0xffffffffu, other, offset);
        }
#pragma unroll
    for (; offset > 0; offset /= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
    return values[0];
}

// Sum over the block's consumers, in every thread; the order of additions is fixed. Uses the reduction scratch: a
// barrier must lie between two calls.
__device__ __forceinline__ float block_sum(const Worker &w, float value) {
    float *shared = reinterpret_cast<float *>(shared_pointer(w.reduction()));
    value = warp_sum(value);
    if (w.lane == 0) shared[w.warp] = value;
    named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    float total = 0.0f;
    for (uint32_t warp = 0; warp < PERK_CONSUMER_WARPS; warp++) total += shared[warp];
    return total;
}

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight. A task owns the rows first, first + stride, ...; the block works
// on one row at a time, 8 columns a thread and piece. Columns beyond the width are zero and stay so. Operands: 0 x, 1
// weight (constants), 2 out, which may be an input of wide linears.
template <Rows kRows, uint32_t kWidth, uint32_t kStride, bool kOutIsInput>
__device__ __forceinline__ void rmsnorm(Worker &w, const TaskView &task, float eps) {
    constexpr uint32_t kPieces = (kWidth + 7) / 8;
    constexpr uint32_t kThreadPieces = (kPieces + PERK_CONSUMER_THREADS - 1) / PERK_CONSUMER_THREADS;
    const uint32_t rows = row_count<kRows>(w), first = task.first(), stride = task.stride(), count = task.count();
    const uint8_t *x = w.args.activations + task.operand(0), *weight = w.args.constants + task.operand(1);
    uint8_t *out = w.args.activations + task.operand(2);
    await_inputs(w, task);
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t row = first + i * stride;
        if (row >= rows) break;
        const uint64_t row_start = uint64_t(row) * kStride * 2;
        Vec16 values[kThreadPieces];
        float square_sum = 0.0f;
#pragma unroll
        for (uint32_t p = 0; p < kThreadPieces; p++) {
            const uint32_t piece = w.thread + p * PERK_CONSUMER_THREADS;
            values[p] = piece < kPieces ? load_coherent16(x + row_start + piece * 16) : Vec16{0, 0, 0, 0};
        }
#pragma unroll
        for (uint32_t p = 0; p < kThreadPieces; p++) {
            const uint32_t pairs[4] = {values[p].x, values[p].y, values[p].z, values[p].w};
#pragma unroll
            for (uint32_t j = 0; j < 4; j++)
                square_sum += low_bf16(pairs[j]) * low_bf16(pairs[j]) + high_bf16(pairs[j]) * high_bf16(pairs[j]);
        }
        const float scale = rsqrtf(block_sum(w, square_sum) / kWidth + eps);
#pragma unroll
        for (uint32_t p = 0; p < kThreadPieces; p++) {
            const uint32_t piece = w.thread + p * PERK_CONSUMER_THREADS;
            if (piece >= kPieces) continue;
            const Vec16 gain = load_constant16(weight + piece * 16);
            auto pair = [&](uint32_t value, uint32_t g) {
                return pack_bf16(low_bf16(value) * scale * low_bf16(g), high_bf16(value) * scale * high_bf16(g));
            };
            const Vec16 normed{pair(values[p].x, gain.x), pair(values[p].y, gain.y), pair(values[p].z, gain.z),
                               pair(values[p].w, gain.w)};
            if constexpr (kOutIsInput)
                store_wide8(out, row, piece * 8, normed);
            else
                *reinterpret_cast<Vec16 *>(out + row_start + piece * 16) = normed;
        }
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    }
}

// As src/activation.c. Two instructions of the special function unit: ex2 and rcp.
enum class Activation { none, silu, gelu_tanh };
template <Activation kActivation>
__device__ __forceinline__ float activate(float value) {
    if constexpr (kActivation == Activation::none) return value;
    float exponent = value;
    if constexpr (kActivation == Activation::gelu_tanh) exponent *= 1.5957691f + 0.07135481f * value * value;
    return __fdividef(value, 1.0f + __expf(-exponent));
}

// out[r][c] = activation(x[r][c]) * x[r][width + c]. A task owns the columns [8 first, 8 (first + count)).
// Operands: 0 x, 1 out.
template <Rows kRows, uint32_t kWidth, uint32_t kInStride, uint32_t kOutStride, Activation kActivation,
          uint32_t kSlots = 1>
__device__ void gate_mul(Worker &w, const TaskView &task) {
    const uint32_t rows = row_count<kRows>(w) * kSlots, first = task.first(), columns = task.count() * 8;
    const uint8_t *x = w.args.activations + task.operand(0);
    uint8_t *out = w.args.activations + task.operand(1);
    await_inputs(w, task);
    for (uint32_t i = w.thread; i < rows * columns; i += PERK_CONSUMER_THREADS) {
        const uint32_t row = i / columns, column = first * 8 + i % columns;
        if (column >= kWidth) continue;
        const uint8_t *source = x + (uint64_t(row) * kInStride + column) * 2;
        const float gate = from_bf16(load_coherent2(source)), up = from_bf16(load_coherent2(source + kWidth * 2));
        reinterpret_cast<uint16_t *>(out)[uint64_t(row) * kOutStride + column] =
            to_bf16(activate<kActivation>(gate) * up);
    }
}

// A candidate for the largest logit; among equals the lowest index wins, so that the result does not depend on order.
struct Best {
    float value;
    uint32_t index;

    __device__ __forceinline__ void take(float other_value, uint32_t other_index) {
        if (other_value > value || (other_value == value && other_index < index)) {
            value = other_value;
            index = other_index;
        }
    }
    __device__ __forceinline__ void take_from_lane(int offset) {
        const float other_value = __shfl_xor_sync(0xffffffffu, value, offset);
        const uint32_t other_index = __shfl_xor_sync(0xffffffffu, index, offset);
        take(other_value, other_index);
    }
};
constexpr float kLowest = -3.402823466e38f;

// out[r] = index of the largest logit, from the candidates that each row tile of the vocabulary projection left.
// In a program of many steps with a bit beside it, where the request wants a token that is drawn (many_steps.cuh).
// A task owns the rows first, first + stride, ... Operands: 0 candidates [rows][tiles], 1 out.
constexpr uint32_t kToDraw = 1u << 31;
template <uint32_t kVocabulary>
__device__ __forceinline__ bool is_to_draw(const Worker &w, uint32_t row);

template <uint32_t kVocabulary, uint32_t kOutStride>
__device__ void argmax(Worker &w, const TaskView &task) {
    constexpr uint32_t kTiles = (kVocabulary + PERK_TILE_ROWS - 1) / PERK_TILE_ROWS;
    // Loads in flight: a vocabulary of 152k has 37 candidates for each thread, and every turn is a trip to L2.
    constexpr uint32_t kTogether = 20;
    const uint32_t rows = row_count<Rows::logits>(w), first = task.first(), stride = task.stride(),
                   count = task.count();
    const uint8_t *candidates = w.args.activations + task.operand(0);
    int32_t *out = reinterpret_cast<int32_t *>(w.args.activations + task.operand(1));
    bool draws = false;
    if constexpr (program::many_steps) draws = is_to_draw<kVocabulary>(w, first);
    await_inputs(w, task);
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t row = first + i * stride;
        if (row >= rows) break;
        Best best{kLowest, 0xffffffffu};
        for (uint32_t tile = w.thread; tile < kTiles; tile += kTogether * PERK_CONSUMER_THREADS) {
            uint2 few[kTogether];
#pragma unroll
            for (uint32_t i = 0; i < kTogether; i++) { // beyond the last, that one again
                const uint32_t one = min(tile + i * PERK_CONSUMER_THREADS, kTiles - 1);
                few[i] = load_coherent8(candidates + (uint64_t(row) * kTiles + one) * 8);
            }
#pragma unroll
            for (uint32_t i = 0; i < kTogether; i++) best.take(__uint_as_float(few[i].x), few[i].y);
        }
        for (int offset = 16; offset > 0; offset /= 2) best.take_from_lane(offset);
        // One candidate a warp meets in shared memory.
        Best *shared = reinterpret_cast<Best *>(shared_pointer(w.reduction()));
        if (w.lane == 0) shared[w.warp] = best;
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
        if (w.thread == 0) {
            for (uint32_t warp = 1; warp < PERK_CONSUMER_WARPS; warp++)
                best.take(shared[warp].value, shared[warp].index);
            if (draws && best.index < kVocabulary) best.index |= kToDraw;
            out[uint64_t(row) * kOutStride] = static_cast<int32_t>(best.index);
        }
        if constexpr (program::many_steps)
            if (i + 1 < count) draws = is_to_draw<kVocabulary>(w, row + stride);
        named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);
    }
}

} // namespace perk
