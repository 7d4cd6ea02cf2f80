#include "random_weights.h"

#include "float.h"
#include "ops/op.h"
#include "stored_weight.h"
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
    drawing described = {.count = (size_t)weight->rows * (size_t)weight->cols};
    if (!weight->is_vector) {
        described.deviation = 1 / sqrtf((float)weight->cols);
    } else {
        described.mean = is_bias(graph, weight) ? 0 : 1;
        described.deviation = 0.1f;
    }
    return described;
}

static perk_checkpoint_tensor tensor_of(const perk_tensor *weight, const drawing *drawn) {
    perk_checkpoint_tensor tensor = {.name = drawn->name,
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

/* The weights of a graph, experts one by one: `count` in each array. */
typedef struct drawing_list {
    drawing *drawings;
    perk_checkpoint_tensor *tensors;
    char (*names)[PERK_STORED_NAME];
    size_t count, bytes;
} drawing_list;

static const float *values_of(const perk_tensor *weight, const perk_given_weight *given, size_t given_count) {
    const float *values = NULL;
    for (size_t i = 0; i < given_count; i++)
        if (given[i].tensor == weight) values = given[i].values;
    return values;
}

static perk_status make_room(drawing_list *list, const perk_graph *graph, perk_error *err) {
    size_t count = 0;
    for (int i = 0; i < graph->tensor_count; i++)
        if (graph->tensors[i]->kind == PERK_TENSOR_WEIGHT) count += (size_t)perk_weight_count(graph->tensors[i]);
    list->drawings = perk_calloc(count, sizeof *list->drawings);
    list->tensors = perk_calloc(count, sizeof *list->tensors);
    list->names = perk_calloc(count, sizeof *list->names);
    return list->drawings && list->tensors && list->names ? PERK_OK : perk_fail_memory(err, "the list of weights");
}

/* More than any machine has: sums of sizes below do not overflow. */
static bool is_too_much(const drawing_list *list) { return list->bytes > (size_t)1 << 62; }

static perk_status list_weights(drawing_list *list, const perk_graph *graph, const perk_given_weight *given,
                                size_t given_count, perk_error *err) {
    uint64_t blocks = 0;
    for (int i = 0; i < graph->tensor_count; i++) {
        const perk_tensor *weight = graph->tensors[i];
        if (weight->kind != PERK_TENSOR_WEIGHT) continue;
        const drawing described = describe(graph, weight);
        const float *values = values_of(weight, given, given_count);
        for (int64_t expert = 0; expert < perk_weight_count(weight); expert++) {
            drawing *next = &list->drawings[list->count];
            char *name = list->names[list->count];
            *next = described;
            next->first_block = blocks;
            next->given = values ? values + (size_t)expert * next->count : NULL;
            next->name = perk_weight_name(weight, expert, name);
            list->tensors[list->count++] = tensor_of(weight, next);
            blocks += perk_ceil_div(next->count, BLOCK);
            list->bytes += perk_round_up(next->count * sizeof *next->out, ALIGNMENT);
            if (is_too_much(list)) return perk_fail_memory(err, "random weights");
        }
    }
    return PERK_OK;
}

/* Draws all of them into `memory`. */
static perk_status draw(const drawing_list *list, unsigned char *memory, uint64_t seed, perk_error *err) {
    perk_threads *threads;
    drawing *drawings = list->drawings;
    perk_status status = perk_threads_create(&threads, 0, err);
    if (status) return status;
    uint64_t blocks = 0;
    for (size_t i = 0; i < list->count; i++) {
        list->tensors[i].data = drawings[i].out = (uint16_t *)(void *)memory;
        memory += perk_round_up(drawings[i].count * sizeof *drawings[i].out, ALIGNMENT);
        blocks = drawings[i].first_block + perk_ceil_div(drawings[i].count, BLOCK);
    }
    drawing_job job = {drawings, list->count, seed};
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
    drawing_list list = {0};
    void *memory = NULL;
    perk_status status = make_room(&list, graph, err);
    if (status) goto out;
    status = list_weights(&list, graph, given, given_count, err);
    if (!status) status = map_memory(list.bytes, &memory, err);
    if (status) goto out;
    status = draw(&list, memory, seed, err);
    if (!status)
        status = perk_checkpoint_open_memory(out, config_path, list.tensors, list.count, memory, list.bytes, err);
    if (status) munmap(memory, PERK_MAX(list.bytes, (size_t)1));
out:
    free(list.names);
    free(list.tensors);
    free(list.drawings);
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
