#include "random_weights.h"

#include "float.h"
#include "ops/op.h"
#include "threads.h"

#include <math.h>
#include <sys/mman.h>
#include <xxhash.h>

#define BLOCK 65536 /* values that share a key: what a thread draws at a time */
#define ALIGNMENT 256

/* Four bytes of a hash, summed, are nearly normal: mean 510, variance 4 (256^2 - 1) / 12. */
#define BYTES_MEAN 510
#define BYTES_DEVIATION 147.8005413f

typedef struct drawing {
    const char *name;
    uint16_t *out;
    size_t count;
    float mean, deviation;
    const float *given;   /* NULL: drawn */
    uint64_t first_block; /* of all tensors' blocks */
} drawing;

typedef struct drawing_job {
    const drawing *drawings; /* by first_block */
    size_t count;
    uint64_t seed;
} drawing_job;

/* A bijection in which every input bit moves every output bit. */
static inline uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 15)) * 0x9e3779b1u;
    x = (x ^ (x >> 13)) * 0x85ebca77u;
    return x ^ (x >> 16);
}

static void draw_block(const drawing *drawn, uint64_t seed, uint64_t block) {
    uint64_t name = XXH3_64bits_withSeed(drawn->name, strlen(drawn->name), seed);
    uint64_t key = XXH3_64bits_withSeed(&block, sizeof block, name);
    uint32_t add = (uint32_t)key, xor = (uint32_t)(key >> 32);
    uint16_t *out = drawn->out + block * BLOCK;
    uint32_t count = (uint32_t)PERK_MIN(drawn->count - block * BLOCK, (size_t)BLOCK);
    float mean = drawn->mean, scale = drawn->deviation / BYTES_DEVIATION;
    if (drawn->given) {
        for (uint32_t i = 0; i < count; i++) out[i] = perk_f32_to_bf16(drawn->given[block * BLOCK + i]);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t bits = mix(mix(i + add) ^ xor);
        int32_t sum = (int32_t)((bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24)) - BYTES_MEAN;
        out[i] = perk_f32_to_bf16(mean + scale * (float)sum);
    }
}

void perk_random_values(const char *name, uint64_t seed, float mean, float deviation, uint16_t *out, size_t count) {
    const drawing drawn = {.name = name, .out = out, .count = count, .mean = mean, .deviation = deviation};
    for (uint64_t block = 0; block * BLOCK < count; block++) draw_block(&drawn, seed, block);
}

static void draw_blocks(void *context, size_t begin, size_t end, int thread) {
    const drawing_job *job = context;
    size_t at = 0;
    (void)thread;
    for (size_t block = begin; block < end; block++) {
        while (at + 1 < job->count && job->drawings[at + 1].first_block <= block) at++;
        draw_block(&job->drawings[at], job->seed, block - job->drawings[at].first_block);
    }
}

static bool holds(const perk_tensor *tensor, const perk_tensor *weight) {
    if (!tensor) return false;
    for (int i = 0; i < tensor->part_count; i++)
        if (tensor->parts[i] == weight) return true;
    return tensor == weight;
}

static bool is_bias(const perk_graph *graph, const perk_tensor *vector) {
    for (int i = 0; i < graph->op_count; i++)
        if (graph->ops[i]->type == &perk_op_linear && holds(graph->ops[i]->inputs[PERK_IN_BIAS], vector)) return true;
    return false;
}

static drawing describe(const perk_graph *graph, const perk_tensor *weight) {
    drawing described = {.name = weight->name, .count = (size_t)weight->rows * (size_t)weight->cols};
    if (!weight->is_vector) {
        described.deviation = 1 / sqrtf((float)weight->cols);
    } else {
        described.mean = is_bias(graph, weight) ? 0 : 1;
        described.deviation = 0.1f;
    }
    return described;
}

static perk_checkpoint_tensor tensor_of(const perk_tensor *weight, const drawing *drawn) {
    perk_checkpoint_tensor tensor = {.name = weight->name,
                                     .stored = "BF16",
                                     .usable = true,
                                     .dtype = PERK_BF16,
                                     .ndim = weight->is_vector ? 1 : 2,
                                     .data = drawn->out,
                                     .bytes = drawn->count * sizeof *drawn->out};
    tensor.dims[0] = weight->is_vector ? weight->cols : weight->rows;
    tensor.dims[1] = weight->is_vector ? 0 : weight->cols;
    return tensor;
}

/* Lists the graph's weights; `drawings` and `tensors` have room for all tensors of the graph. Gives the total bytes. */
static size_t list_weights(const perk_graph *graph, const perk_given_weight *given, size_t given_count,
                           drawing *drawings, perk_checkpoint_tensor *tensors, size_t *count) {
    uint64_t blocks = 0;
    size_t bytes = 0;
    for (int i = 0; i < graph->tensor_count; i++) {
        if (graph->tensors[i]->kind != PERK_TENSOR_WEIGHT) continue;
        drawing *next = &drawings[*count];
        *next = describe(graph, graph->tensors[i]);
        next->first_block = blocks;
        for (size_t k = 0; k < given_count; k++)
            if (given[k].tensor == graph->tensors[i]) next->given = given[k].values;
        tensors[(*count)++] = tensor_of(graph->tensors[i], next);
        blocks += perk_ceil_div(next->count, BLOCK);
        bytes += perk_round_up(next->count * sizeof *next->out, ALIGNMENT);
    }
    return bytes;
}

/* Draws all of them into `memory`. */
static perk_status draw(drawing *drawings, perk_checkpoint_tensor *tensors, size_t count, unsigned char *memory,
                        uint64_t seed, perk_error *err) {
    perk_threads *threads;
    perk_status status = perk_threads_create(&threads, 0, err);
    if (status) return status;
    uint64_t blocks = 0;
    for (size_t i = 0; i < count; i++) {
        tensors[i].data = drawings[i].out = (uint16_t *)(void *)memory;
        memory += perk_round_up(drawings[i].count * sizeof *drawings[i].out, ALIGNMENT);
        blocks = drawings[i].first_block + perk_ceil_div(drawings[i].count, BLOCK);
    }
    drawing_job job = {drawings, count, seed};
    perk_threads_run(threads, (size_t)blocks, 1, draw_blocks, &job);
    perk_threads_free(threads);
    return PERK_OK;
}

static perk_status map_memory(size_t bytes, void **out, perk_error *err) {
    *out = mmap(NULL, PERK_MAX(bytes, (size_t)1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*out == MAP_FAILED)
        return perk_fail(err, PERK_OUT_OF_MEMORY, "out of host memory for %.1f GB of random weights",
                         (double)bytes * 1e-9);
    madvise(*out, bytes, MADV_HUGEPAGE); /* page faults would take longer than the drawing */
    return PERK_OK;
}

static perk_status open_drawn(perk_checkpoint **out, const char *config_path, const perk_graph *graph, uint64_t seed,
                              const perk_given_weight *given, size_t given_count, perk_error *err) {
    *out = NULL;
    size_t count = 0, bytes = 0;
    void *memory = NULL;
    drawing *drawings = perk_calloc((size_t)graph->tensor_count, sizeof *drawings);
    perk_checkpoint_tensor *tensors = perk_calloc((size_t)graph->tensor_count, sizeof *tensors);
    perk_status status = drawings && tensors ? PERK_OK : perk_fail_memory(err, "the list of weights");
    if (status) goto out;
    bytes = list_weights(graph, given, given_count, drawings, tensors, &count);
    status = map_memory(bytes, &memory, err);
    if (status) goto out;
    status = draw(drawings, tensors, count, memory, seed, err);
    if (!status) status = perk_checkpoint_open_memory(out, config_path, tensors, count, memory, bytes, err);
    if (status) munmap(memory, PERK_MAX(bytes, (size_t)1));
out:
    free(tensors);
    free(drawings);
    return status;
}

perk_status perk_checkpoint_open_random(perk_checkpoint **out, const char *config_path, const perk_graph *graph,
                                        uint64_t seed, perk_error *err) {
    return open_drawn(out, config_path, graph, seed, NULL, 0, err);
}

perk_status perk_checkpoint_open_given(perk_checkpoint **out, const perk_graph *graph, uint64_t seed,
                                       const perk_given_weight *given, size_t given_count, perk_error *err) {
    return open_drawn(out, NULL, graph, seed, given, given_count, err);
}
