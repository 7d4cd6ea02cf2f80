/* What an op's reference function sees: the step's batch, the values of tensors, the KV cache, threads.
 *
 * Values are floats, in rows of the tensor's width. In bf16 precision whatever an op outputs has been rounded to bf16
 * once, at its end, as on the GPU; fp32 outputs (logits) never are. */
#ifndef PERK_SRC_REFERENCE_STATE_H
#define PERK_SRC_REFERENCE_STATE_H

#include "float.h"
#include "reference.h"
#include "threads.h"

/* Multiplications below which another thread costs more than it brings. */
#define PERK_REFERENCE_MIN_WORK ((size_t)32768)

/* One layer's cache: [page][KV head][position in page][head_dim]. */
typedef struct perk_reference_kv {
    float *keys, *values;
} perk_reference_kv;

/* A weight as it is multiplied with. Stacks have none of their own: their parts do. */
typedef struct perk_reference_weight {
    perk_dtype dtype;
    const void *data;                      /* row-major; the checkpoint's, or `owned` */
    void *owned;                           /* converted to the executor's precision; vectors always are, to float */
    struct perk_reference_weight *experts; /* of a weight of experts: one each; else NULL */
} perk_reference_weight;

typedef struct perk_reference {
    perk_executor base;
    const perk_graph *graph;
    perk_config config;
    bool rounds; /* bf16 precision */
    perk_threads *threads;
    perk_reference_weight *weights; /* [tensors] */
    float **values;                 /* [tensors] activations; int32_t for those of PERK_I32 */
    perk_reference_kv *kv;          /* [KV layers] */
    float **scratch;                /* [threads], each of scratch_floats */
    size_t scratch_floats;          /* at least PERK_MATH_ROWS rows of any matrix, and max_seq_length */
    const perk_batch *batch;        /* of the step that runs; else NULL */
    int32_t token_rows, logit_rows; /* of the last step, or write */
} perk_reference;

static inline float perk_reference_round(const perk_reference *reference, float value) {
    return reference->rounds ? perk_round_bf16(value) : value;
}

/* Rows of an activation in this step. */
static inline size_t perk_reference_rows(const perk_reference *reference, const perk_tensor *tensor) {
    return (size_t)perk_tensor_rows(tensor, reference->token_rows, reference->logit_rows);
}

static inline float *perk_reference_values(const perk_reference *reference, const perk_tensor *tensor) {
    return reference->values[tensor->index];
}

/* A vector of weights (or a stack of vectors) as floats; NULL for NULL. */
const float *perk_reference_vector(const perk_reference *reference, const perk_tensor *vector);

/* Row `row` of a matrix of weights (or of a stack) into out[cols]; of one expert's, where the weight is of experts. */
void perk_reference_load_row(const perk_reference *reference, const perk_tensor *matrix, int64_t expert, int64_t row,
                             float *out);

#endif
