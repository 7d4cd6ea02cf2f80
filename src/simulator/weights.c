/* What is written at load only: weights as the stream holds them, and the constants as a plan lays them out. */
#include "checkpoint.h"
#include "reference_math.h"
#include "simulator/machine.h"

#include <math.h>
#include <xxhash.h>

/* ---- weights, once ---- */

/* Stored rows as rounded to bf16, `stride` floats apart. */
static void widen_rows(float *out, size_t stride, const perk_checkpoint_tensor *stored, size_t rows, size_t cols) {
    for (size_t row = 0; row < rows; row++) {
        float *to = out + row * stride;
        if (stored->dtype == PERK_BF16) {
            perk_math_widen_bf16(to, (const uint16_t *)stored->data + row * cols, cols);
            continue;
        }
        for (size_t i = 0; i < cols; i++)
            to[i] = perk_round_bf16(stored->dtype == PERK_F16
                                        ? perk_f16_to_f32(((const uint16_t *)stored->data)[row * cols + i])
                                        : ((const float *)stored->data)[row * cols + i]);
    }
}

static perk_status load_matrix(perk_simulator *sim, const perk_checkpoint *checkpoint, const perk_tensor *tensor,
                               perk_error *err) {
    perk_sim_matrix *matrix = &sim->matrices[tensor->index];
    matrix->cols = perk_round_up((uint64_t)tensor->cols, 64);
    matrix->values = perk_calloc((size_t)tensor->rows * matrix->cols, sizeof *matrix->values);
    if (!matrix->values) return perk_fail_memory(err, tensor->name);
    float *to = matrix->values;
    for (int i = 0; i < PERK_MAX(1, tensor->part_count); i++) {
        const perk_tensor *part = tensor->part_count ? tensor->parts[i] : tensor;
        const perk_checkpoint_tensor *stored;
        int64_t dims[] = {part->rows, part->cols};
        perk_status status = perk_checkpoint_require(checkpoint, part->name, part->is_vector ? 1 : 2,
                                                     part->is_vector ? dims + 1 : dims, &stored, err);
        if (status) return status;
        widen_rows(to, matrix->cols, stored, (size_t)part->rows, (size_t)part->cols);
        to += part->is_vector ? (size_t)part->cols : (size_t)part->rows * matrix->cols;
    }
    return PERK_OK;
}

perk_status perk_sim_load_weights(perk_simulator *sim, const perk_checkpoint *checkpoint, perk_error *err) {
    perk_status status = PERK_OK;
    sim->matrices = perk_calloc((size_t)sim->graph->tensor_count, sizeof *sim->matrices);
    if (!sim->matrices) return perk_fail_memory(err, "the simulator");
    for (int i = 0; i < sim->graph->tensor_count && !status; i++)
        if (perk_tensor_is_weight(sim->graph->tensors[i]))
            status = load_matrix(sim, checkpoint, sim->graph->tensors[i], err);
    return status;
}

/* ---- constants, for a plan ---- */

static bool is_loaded(const perk_plan_tensor *t) {
    return t->space == PERK_SPACE_CONSTANTS || t->space == PERK_SPACE_WEIGHTS;
}

static uint64_t constants_key(const perk_plan *plan) {
    uint64_t key = plan->space_bytes[PERK_SPACE_CONSTANTS];
    for (int i = 0; i < plan->tensor_count; i++) {
        const perk_plan_tensor *t = &plan->tensors[i];
        if (!is_loaded(t)) continue;
        uint64_t fields[] = {(uint64_t)i,       (uint64_t)t->space, (uint64_t)t->layout,     (uint64_t)t->graph_tensor,
                             t->offset,         t->bytes,           (uint64_t)t->row_stride, (uint64_t)t->rows,
                             (uint64_t)t->cols, (uint64_t)t->dtype, (uint64_t)t->rope_op};
        key = XXH3_64bits_withSeed(fields, sizeof fields, key);
    }
    return key | 1; /* 0: nothing is loaded */
}

/* Tensors are loaded one after the other: none may lie where another does. */
static perk_status check_loaded(const perk_plan *plan, perk_error *err) {
    for (int i = 0; i < plan->tensor_count; i++)
        for (int j = 0; j < i; j++) {
            const perk_plan_tensor *a = &plan->tensors[i], *b = &plan->tensors[j];
            if (!is_loaded(a) || a->space != b->space) continue;
            if (a->offset < b->offset + b->bytes && b->offset < a->offset + a->bytes)
                return perk_fail(err, PERK_UNSAFE_PLAN, "%.95s and %.95s are loaded to the same bytes", a->name,
                                 b->name);
        }
    return PERK_OK;
}

static void fill_rope(const perk_simulator *sim, const perk_plan_tensor *tensor) {
    const perk_attention_params *p = &sim->graph->ops[tensor->rope_op]->attention;
    float *out = (float *)(void *)(sim->constants + tensor->offset);
    for (int position = 0; position < tensor->rows; position++)
        for (int i = 0; i < p->head_dim / 2; i++) {
            float angle = (float)position * p->inv_freq[i];
            *out++ = cosf(angle) * p->rope_scale;
            *out++ = sinf(angle) * p->rope_scale;
        }
}

static perk_status fill_constant(const perk_simulator *sim, const perk_plan_tensor *tensor, perk_error *err) {
    bool is_rope = tensor->layout == PERK_LAYOUT_ROPE;
    const perk_graph *graph = sim->graph;
    const perk_op *op =
        is_rope && tensor->rope_op >= 0 && tensor->rope_op < graph->op_count ? graph->ops[tensor->rope_op] : NULL;
    if (op && op->type == &perk_op_attention && op->attention.head_dim == tensor->row_stride &&
        tensor->dtype == PERK_F32) {
        fill_rope(sim, tensor);
        return PERK_OK;
    }
    const perk_tensor *weight = tensor->graph_tensor >= 0 ? graph->tensors[tensor->graph_tensor] : NULL;
    if (!weight || is_rope || !perk_tensor_is_weight(weight) || weight->cols != tensor->cols ||
        weight->rows != tensor->rows || tensor->dtype != PERK_BF16)
        return perk_fail(err, PERK_UNSAFE_PLAN, "%.95s is no weight of the graph and no table of an op", tensor->name);
    const perk_sim_matrix *matrix = &sim->matrices[weight->index];
    for (int64_t row = 0; row < weight->rows; row++) {
        uint16_t *out = (uint16_t *)(void *)(sim->constants + tensor->offset) + row * tensor->row_stride;
        for (int64_t col = 0; col < weight->cols; col++)
            out[col] = perk_f32_to_bf16(matrix->values[(size_t)row * matrix->cols + (size_t)col]);
    }
    return PERK_OK;
}

perk_status perk_sim_load_constants(perk_simulator *sim, perk_error *err) {
    const perk_plan *plan = sim->plan;
    uint64_t key = constants_key(plan);
    if (sim->constants_key == key) return PERK_OK;
    sim->constants_key = 0;
    free(sim->constants);
    sim->constants = perk_calloc(1, plan->space_bytes[PERK_SPACE_CONSTANTS]);
    if (!sim->constants) return perk_fail_memory(err, "tables and norms");
    perk_status status = check_loaded(plan, err);
    for (int i = 0; i < plan->tensor_count && !status; i++)
        if (plan->tensors[i].space == PERK_SPACE_CONSTANTS) status = fill_constant(sim, &plan->tensors[i], err);
    if (!status) sim->constants_key = key;
    return status;
}
