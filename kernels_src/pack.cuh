// Loading: what a checkpoint holds, row-major in bf16, fp16 or fp32, to what programs read (abi.h has the packed
// layout). A small program of its own; it runs once, at load.
#pragma once

namespace perk {

using namespace ptx;

enum class Stored : uint32_t { bf16 = 0, f16 = 1, f32 = 2 };

// Element `index` as bf16 bits.
__device__ __forceinline__ uint32_t load_as_bf16(const uint8_t *source, Stored stored, uint64_t index) {
    if (stored == Stored::bf16) return __ldg(reinterpret_cast<const uint16_t *>(source) + index);
    if (stored == Stored::f32) return to_bf16(__ldg(reinterpret_cast<const float *>(source) + index));
    return to_bf16(from_f16(__ldg(reinterpret_cast<const uint16_t *>(source) + index)));
}

// Eight neighbouring elements of a row as bf16 pairs; zeros beyond the row's end.
__device__ __forceinline__ Vec16 load_piece(const uint8_t *source, Stored stored, uint64_t row_start, uint32_t column,
                                            uint32_t cols) {
    if (stored == Stored::bf16 && cols % 8 == 0 && column + 8 <= cols)
        return load_constant16(source + (row_start + column) * 2);
    uint32_t pair[4];
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t c = column + 2 * i;
        const uint32_t low = c < cols ? load_as_bf16(source, stored, row_start + c) : 0;
        const uint32_t high = c + 1 < cols ? load_as_bf16(source, stored, row_start + c + 1) : 0;
        pair[i] = low | high << 16;
    }
    return {pair[0], pair[1], pair[2], pair[3]};
}

} // namespace perk

struct perk_pack_args {
    const uint8_t *source; // `rows` rows of `cols` elements
    uint8_t *target;       // the whole packed matrix, or the whole table
    uint32_t stored;       // Stored
    uint32_t rows, cols;
    uint32_t first_row;   // place of source row 0 in the matrix
    uint32_t paired_half; // rows of gate (and of up) when tiles are paired; 0: plain tiles
    uint32_t tiles, blocks, workers;
    uint32_t target_stride; // elements; for tables
};

// Row-major to tiles in stream order: a thread moves 8 neighbouring columns of one row.
extern "C" __global__ void perk_pack_tiles(const __grid_constant__ perk_pack_args a) {
    const uint32_t pieces = a.blocks * (PERK_BLOCK_COLS / 8);
    const uint64_t index = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= uint64_t(a.rows) * pieces) return;
    const uint32_t row = index / pieces, piece = index % pieces, matrix_row = a.first_row + row;
    const perk::Vec16 values =
        perk::load_piece(a.source, perk::Stored(a.stored), uint64_t(row) * a.cols, piece * 8, a.cols);

    uint32_t tile = matrix_row / PERK_TILE_ROWS, in_tile = matrix_row % PERK_TILE_ROWS;
    if (a.paired_half != 0) {
        const uint32_t pair = matrix_row % a.paired_half, is_up = matrix_row / a.paired_half;
        tile = pair / 8;
        in_tile = pair % 8 + 8 * is_up;
    }
    const uint32_t round = tile / a.workers, lane_in_round = tile % a.workers;
    const uint32_t width = min(a.workers, a.tiles - round * a.workers);
    const uint32_t block = piece / 4, chunk = block / PERK_CHUNK_BLOCKS, in_chunk = block % PERK_CHUNK_BLOCKS;
    const uint32_t chunk_blocks = min(uint32_t(PERK_CHUNK_BLOCKS), a.blocks - chunk * PERK_CHUNK_BLOCKS);
    const uint64_t block_index = uint64_t(round) * a.workers * a.blocks + uint64_t(width) * chunk * PERK_CHUNK_BLOCKS +
                                 uint64_t(lane_in_round) * chunk_blocks + in_chunk;
    // Lane and register of the piece's four pairs: see "packed weights" in abi.h.
    const uint32_t lane = in_tile % 8 * 4 + piece % 4, is_high = in_tile / 8;
    uint32_t *target =
        reinterpret_cast<uint32_t *>(a.target + block_index * PERK_WEIGHT_BLOCK_BYTES) + lane * 4 + is_high;
    target[0] = values.x;
    target[2] = values.y;
    target[128] = values.z; // the second fragment: 512 bytes on
    target[130] = values.w;
}

// Row-major to row-major bf16 with a stride.
extern "C" __global__ void perk_pack_rows(const __grid_constant__ perk_pack_args a) {
    const uint32_t pieces = (a.cols + 7) / 8;
    const uint64_t index = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= uint64_t(a.rows) * pieces) return;
    const uint32_t row = index / pieces, piece = index % pieces;
    const perk::Vec16 values =
        perk::load_piece(a.source, perk::Stored(a.stored), uint64_t(row) * a.cols, piece * 8, a.cols);
    const uint64_t place = uint64_t(a.first_row + row) * a.target_stride + piece * 8;
    *reinterpret_cast<perk::Vec16 *>(a.target + place * 2) = values;
}

struct perk_rope_args {
    const float *inv_freq; // [half], radians a position
    float2 *table;         // [positions][half] cos, sin
    uint32_t positions, half;
    float scale;
};

extern "C" __global__ void perk_fill_rope(const __grid_constant__ perk_rope_args a) {
    const uint64_t index = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= uint64_t(a.positions) * a.half) return;
    const float angle = static_cast<float>(index / a.half) * a.inv_freq[index % a.half];
    float sine, cosine;
    sincosf(angle, &sine, &cosine);
    a.table[index] = make_float2(cosine * a.scale, sine * a.scale);
}
