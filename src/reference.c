/* The reference executor: weights, buffers and steps. The arithmetic is in src/ops/, one file an op. */
#include "reference.h"

#include "ops/op.h"
#include "reference_math.h"
#include "reference_state.h"
#include "stored_weight.h"

static perk_reference *from_executor(perk_executor *self) { return (perk_reference *)self; }

/* ---- weights ---- */

/* `n` stored elements as floats. */
static void widen(float *out, perk_dtype dtype, const void *data, size_t n) {
    const uint16_t *halves = data;
    switch (dtype) {
    case PERK_BF16: perk_math_widen_bf16(out, halves, n); break;
    case PERK_F16:
        for (size_t i = 0; i < n; i++) out[i] = perk_f16_to_f32(halves[i]);
        break;
    default: memcpy(out, data, n * sizeof *out);
    }
}

static float *vector_to_float(const perk_reference *reference, const perk_checkpoint_tensor *stored, float *out) {
    size_t n = (size_t)stored->dims[0];
    widen(out, stored->dtype, stored->data, n);
    for (size_t i = 0; i < n; i++) out[i] = perk_reference_round(reference, out[i]);
    return out;
}

typedef struct narrowing {
    const perk_checkpoint_tensor *stored;
    uint16_t *out;
} narrowing;

static void narrow_rows(void *context, size_t begin, size_t end, int thread) {
    const narrowing *job = context;
    size_t cols = (size_t)job->stored->dims[1];
    (void)thread;
    for (size_t i = begin * cols; i < end * cols; i++) {
        float value;
        size_t size = perk_dtype_size(job->stored->dtype);
        widen(&value, job->stored->dtype, (const char *)job->stored->data + i * size, 1);
        job->out[i] = perk_f32_to_bf16(value);
    }
}

/* A matrix stays where it is stored unless the precision asks for other numbers. */
static perk_status load_matrix(perk_reference *reference, perk_reference_weight *weight,
                               const perk_checkpoint_tensor *stored, perk_error *err) {
    *weight = (perk_reference_weight){.dtype = stored->dtype, .data = stored->data};
    if (!reference->rounds || stored->dtype == PERK_BF16) return PERK_OK;
    uint16_t *narrow = perk_calloc((size_t)stored->dims[0] * (size_t)stored->dims[1], sizeof *narrow);
    if (!narrow) return perk_fail_memory(err, stored->name);
    narrowing job = {stored, narrow};
    perk_threads_run(reference->threads, (size_t)stored->dims[0], 16, narrow_rows, &job);
    *weight = (perk_reference_weight){.dtype = PERK_BF16, .data = narrow, .owned = narrow};
    return PERK_OK;
}

static perk_status load_weight(perk_reference *reference, const perk_checkpoint *checkpoint, const perk_tensor *tensor,
                               perk_error *err) {
    perk_reference_weight *weight = &reference->weights[tensor->index];
    if (tensor->experts) weight->experts = perk_calloc((size_t)tensor->experts, sizeof *weight->experts);
    if (tensor->experts && !weight->experts) return perk_fail_memory(err, tensor->name);
    for (int64_t i = 0; i < perk_weight_count(tensor); i++) {
        const perk_checkpoint_tensor *stored;
        perk_status status = perk_weight_require(checkpoint, tensor, i, &stored, err);
        if (!status) status = load_matrix(reference, tensor->experts ? &weight->experts[i] : weight, stored, err);
        if (status) return status;
    }
    return PERK_OK;
}

/* Vectors, single or stacked, become floats end to end. */
static perk_status load_vector(perk_reference *reference, const perk_checkpoint *checkpoint, const perk_tensor *tensor,
                               perk_error *err) {
    perk_reference_weight *weight = &reference->weights[tensor->index];
    float *values = perk_calloc((size_t)tensor->cols, sizeof *values);
    *weight = (perk_reference_weight){.dtype = PERK_F32, .data = values, .owned = values};
    if (!values) return perk_fail_memory(err, tensor->name);
    int count = tensor->kind == PERK_TENSOR_STACK ? tensor->part_count : 1;
    for (int i = 0; i < count; i++) {
        const perk_tensor *part = tensor->kind == PERK_TENSOR_STACK ? tensor->parts[i] : tensor;
        const perk_checkpoint_tensor *stored;
        perk_status status = perk_weight_require(checkpoint, part, 0, &stored, err);
        if (status) return status;
        values = vector_to_float(reference, stored, values) + part->cols;
    }
    return PERK_OK;
}

static perk_status load_weights(perk_reference *reference, const perk_checkpoint *checkpoint, perk_error *err) {
    const perk_graph *graph = reference->graph;
    for (int i = 0; i < graph->tensor_count; i++) {
        const perk_tensor *tensor = graph->tensors[i];
        perk_status status = PERK_OK;
        if (!perk_tensor_is_weight(tensor)) continue;
        if (tensor->is_vector)
            status = load_vector(reference, checkpoint, tensor, err);
        else if (tensor->kind == PERK_TENSOR_WEIGHT)
            status = load_weight(reference, checkpoint, tensor, err);
        if (status) return status;
    }
    return PERK_OK;
}

/* fp32 activations are for checkpoints that are fp32 throughout. */
static bool rounds_by_default(const perk_graph *graph, const perk_checkpoint *checkpoint) {
    bool all_f32 = false;
    for (int i = 0; i < graph->tensor_count; i++) {
        const perk_tensor *tensor = graph->tensors[i];
        if (tensor->kind != PERK_TENSOR_WEIGHT) continue;
        for (int64_t expert = 0; expert < perk_weight_count(tensor); expert++) {
            char name[PERK_STORED_NAME];
            const perk_checkpoint_tensor *stored =
                perk_checkpoint_find(checkpoint, perk_weight_name(tensor, expert, name));
            if (!stored || !stored->usable || stored->dtype != PERK_F32) return true;
        }
        all_f32 = true;
    }
    return !all_f32;
}

const float *perk_reference_vector(const perk_reference *reference, const perk_tensor *vector) {
    return vector ? reference->weights[vector->index].data : NULL;
}

void perk_reference_load_row(const perk_reference *reference, const perk_tensor *matrix, int64_t expert, int64_t row,
                             float *out) {
    for (int i = 0; matrix->kind == PERK_TENSOR_STACK; i++) {
        if (row < matrix->parts[i]->rows)
            matrix = matrix->parts[i];
        else
            row -= matrix->parts[i]->rows;
    }
    const perk_reference_weight *weight = &reference->weights[matrix->index];
    if (weight->experts) weight = &weight->experts[expert];
    size_t cols = (size_t)matrix->cols, offset = (size_t)row * cols * perk_dtype_size(weight->dtype);
    widen(out, weight->dtype, (const char *)weight->data + offset, cols);
}

/* ---- buffers ---- */

static perk_status allocate_values(perk_reference *reference, perk_error *err) {
    const perk_graph *graph = reference->graph;
    for (int i = 0; i < graph->tensor_count; i++) {
        const perk_tensor *tensor = graph->tensors[i];
        if (perk_tensor_is_weight(tensor)) {
            if (tensor->is_vector) continue;
            reference->scratch_floats = PERK_MAX(reference->scratch_floats, PERK_MATH_ROWS * (size_t)tensor->cols);
            continue;
        }
        size_t rows = (size_t)perk_tensor_rows(tensor, reference->config.max_num_batched_tokens,
                                               reference->config.max_num_logit_rows);
        reference->values[i] = perk_calloc(rows * (size_t)tensor->cols, sizeof(float));
        if (!reference->values[i]) return perk_fail_memory(err, tensor->name);
    }
    return PERK_OK;
}

static perk_status allocate_kv(perk_reference *reference, perk_error *err) {
    const perk_graph *graph = reference->graph;
    const perk_config *config = &reference->config;
    for (int i = 0; i < graph->op_count; i++) {
        const perk_op *op = graph->ops[i];
        if (op->type != &perk_op_attention) continue;
        perk_reference_kv *kv = &reference->kv[op->kv_layer];
        size_t position = (size_t)op->attention.num_kv_heads * (size_t)op->attention.head_dim * sizeof(float);
        size_t positions = (size_t)config->max_num_pages * (size_t)config->page_size;
        kv->keys = perk_calloc(positions, position);
        kv->values = perk_calloc(positions, position);
        if (!kv->keys || !kv->values)
            return perk_fail(err, PERK_OUT_OF_MEMORY,
                             "out of host memory for layer %d of the KV cache: %zu positions of %zu bytes; lower "
                             "max_num_pages, max_seq_length or max_num_batched_requests",
                             op->kv_layer, positions, 2 * position);
    }
    return PERK_OK;
}

static perk_status allocate_scratch(perk_reference *reference, perk_error *err) {
    int count = perk_threads_count(reference->threads);
    reference->scratch_floats = PERK_MAX(reference->scratch_floats, (size_t)reference->config.max_seq_length);
    reference->scratch = perk_calloc((size_t)count, sizeof *reference->scratch);
    for (int i = 0; reference->scratch && i < count; i++) {
        reference->scratch[i] = perk_calloc(reference->scratch_floats, sizeof(float));
        if (!reference->scratch[i]) return perk_fail_memory(err, "scratch of the reference executor");
    }
    return reference->scratch ? PERK_OK : perk_fail_memory(err, "scratch of the reference executor");
}

static void free_weight(perk_reference_weight *weight, const perk_tensor *tensor) {
    for (int64_t i = 0; weight->experts && i < tensor->experts; i++) free(weight->experts[i].owned);
    free(weight->experts);
    free(weight->owned);
}

static void reference_free(perk_executor *self) {
    if (!self) return;
    perk_reference *reference = from_executor(self);
    for (int i = 0; i < reference->graph->tensor_count; i++) {
        if (reference->weights) free_weight(&reference->weights[i], reference->graph->tensors[i]);
        if (reference->values) free(reference->values[i]);
    }
    for (int i = 0; reference->kv && i < reference->graph->kv_layer_count; i++) {
        free(reference->kv[i].keys);
        free(reference->kv[i].values);
    }
    for (int i = 0; reference->scratch && i < perk_threads_count(reference->threads); i++) free(reference->scratch[i]);
    free(reference->scratch);
    free(reference->kv);
    free(reference->values);
    free(reference->weights);
    perk_threads_free(reference->threads);
    free(reference);
}

/* ---- steps ---- */

static perk_status check_batch(const perk_reference *reference, const perk_batch *batch, perk_error *err) {
    const perk_config *config = &reference->config;
    if (batch->num_tokens < 1 || batch->num_tokens > config->max_num_batched_tokens ||
        batch->num_requests > config->max_num_batched_requests || batch->num_logit_rows > config->max_num_logit_rows)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "a batch of %d tokens, %d requests and %d rows of logits: must be 1 to %d, up to %d and up to "
                         "%d",
                         batch->num_tokens, batch->num_requests, batch->num_logit_rows, config->max_num_batched_tokens,
                         config->max_num_batched_requests, config->max_num_logit_rows);
    return PERK_OK;
}

static void collect_result(const perk_reference *reference, bool want_logits, perk_step_result *result) {
    const perk_graph *graph = reference->graph;
    *result = (perk_step_result){0};
    for (int i = 0; i < graph->op_count; i++) {
        const perk_tensor *output = graph->ops[i]->output;
        if (graph->ops[i]->type == &perk_op_argmax)
            result->argmax = (const int32_t *)reference->values[output->index];
        else if (want_logits && output->dtype == PERK_F32)
            result->logits = reference->values[output->index];
    }
}

static perk_status reference_step(perk_executor *self, const perk_batch *batch, bool want_logits,
                                  perk_step_result *result, perk_error *err) {
    perk_reference *reference = from_executor(self);
    *result = (perk_step_result){0};
    perk_status status = check_batch(reference, batch, err);
    if (status) return status;
    reference->batch = batch;
    reference->token_rows = batch->num_tokens;
    reference->logit_rows = batch->num_logit_rows;
    for (int i = 0; !status && i < reference->graph->op_count; i++) {
        const perk_op *op = reference->graph->ops[i];
        status = op->type->reference(reference, op, err);
        if (status) perk_fail_prefix(err, status, "%s", op->output->name);
    }
    reference->batch = NULL;
    if (!status) collect_result(reference, want_logits, result);
    return status;
}

static perk_status reference_write(perk_executor *self, const perk_tensor *input, const float *values, int64_t rows,
                                   perk_error *err) {
    perk_reference *reference = from_executor(self);
    if (input->graph != reference->graph || input->kind != PERK_TENSOR_INPUT || rows < 0 ||
        rows > reference->config.max_num_batched_tokens)
        return perk_fail(err, PERK_INVALID_ARGUMENT, "%s: cannot write %lld rows: must be an input of up to %d rows",
                         input->name, (long long)rows, reference->config.max_num_batched_tokens);
    float *out = perk_reference_values(reference, input);
    for (size_t i = 0; i < (size_t)rows * (size_t)input->cols; i++) out[i] = perk_reference_round(reference, values[i]);
    return PERK_OK;
}

static perk_status reference_read(perk_executor *self, const perk_tensor *tensor, float *values, int64_t rows,
                                  perk_error *err) {
    perk_reference *reference = from_executor(self);
    if (tensor->graph != reference->graph || perk_tensor_is_weight(tensor) || rows < 0 ||
        (size_t)rows > perk_reference_rows(reference, tensor))
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "%s: cannot read %lld rows: must be an activation, of which the last step made %zu rows",
                         tensor->name, (long long)rows, perk_reference_rows(reference, tensor));
    size_t n = (size_t)rows * (size_t)tensor->cols;
    const float *floats = perk_reference_values(reference, tensor);
    const int32_t *integers = (const int32_t *)floats;
    for (size_t i = 0; i < n; i++) values[i] = tensor->dtype == PERK_I32 ? (float)integers[i] : floats[i];
    return PERK_OK;
}

static const perk_executor_type reference_type = {"reference",    reference_step, reference_write,
                                                  reference_read, reference_free, NULL};

static perk_status set_up(perk_reference *reference, const perk_checkpoint *checkpoint,
                          const perk_reference_options *options, perk_error *err) {
    const perk_graph *graph = reference->graph;
    perk_status status = perk_graph_check(graph, err);
    if (!status) status = perk_config_resolve(&reference->config, 0, err);
    if (!status) status = perk_threads_create(&reference->threads, options->threads, err);
    if (status) return status;
    reference->rounds = options->precision == PERK_PRECISION_AUTO ? rounds_by_default(graph, checkpoint)
                                                                  : options->precision == PERK_PRECISION_BF16;
    reference->weights = perk_calloc((size_t)graph->tensor_count, sizeof *reference->weights);
    reference->values = perk_calloc((size_t)graph->tensor_count, sizeof *reference->values);
    reference->kv = perk_calloc((size_t)graph->kv_layer_count, sizeof *reference->kv);
    if (!reference->weights || !reference->values || !reference->kv)
        return perk_fail_memory(err, "the reference executor");
    status = load_weights(reference, checkpoint, err);
    if (!status) status = allocate_values(reference, err);
    if (!status) status = allocate_kv(reference, err);
    if (!status) status = allocate_scratch(reference, err);
    return status;
}

perk_status perk_reference_create(perk_executor **out, const perk_graph *graph, const perk_checkpoint *checkpoint,
                                  const perk_config *config, const perk_reference_options *options, perk_error *err) {
    static const perk_reference_options defaults = {0};
    *out = NULL;
    perk_reference *reference = perk_calloc(1, sizeof *reference);
    if (!reference) return perk_fail_memory(err, "the reference executor");
    reference->base.type = &reference_type;
    reference->graph = graph;
    reference->config = *config;
    perk_status status = set_up(reference, checkpoint, options ? options : &defaults, err);
    if (status) {
        reference_free(&reference->base);
        return status;
    }
    *out = &reference->base;
    return PERK_OK;
}
