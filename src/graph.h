/* The graph's representation, for the reference executor, the plan and the printers. */
#ifndef PERK_SRC_GRAPH_H
#define PERK_SRC_GRAPH_H

#include "activation.h"
#include "base.h"
#include "perk/dtype.h"
#include "perk/graph.h"

typedef enum perk_tensor_kind {
    PERK_TENSOR_WEIGHT,     /* comes from the checkpoint under its name */
    PERK_TENSOR_STACK,      /* weights stacked by rows */
    PERK_TENSOR_INPUT,      /* an activation that the caller fills */
    PERK_TENSOR_ACTIVATION, /* an op's output */
} perk_tensor_kind;

/* How many rows an activation has in a step. */
typedef enum perk_rows {
    PERK_ROWS_TOKENS,
    PERK_ROWS_LOGITS,
    PERK_ROWS_PAIRS, /* of a token and a slot: `slots` for each token */
} perk_rows;

typedef struct perk_op perk_op;
typedef struct perk_op_type perk_op_type;

enum { PERK_STACK_MAX = 4, PERK_OP_INPUTS_MAX = 5 };

struct perk_tensor {
    perk_graph *graph;
    char *name;
    int index; /* in graph->tensors */
    perk_tensor_kind kind;
    perk_dtype dtype;   /* activations: PERK_BF16 (fp32 in the reference executor's fp32 mode), PERK_F32, PERK_I32 */
    perk_rows row_kind; /* activations */
    int32_t slots;      /* PERK_ROWS_PAIRS: pairs of one token */
    int64_t experts;    /* weights of experts: how many matrices of [rows, cols]; else 0 */
    int64_t rows;       /* weights; 1 for vectors */
    int64_t cols;       /* width */
    bool is_vector;
    bool kept;
    perk_op *producer; /* activations; NULL for inputs */
    perk_tensor *parts[PERK_STACK_MAX];
    int part_count;
};

/* Inputs by role; ops leave what they do not have NULL. */
enum {
    PERK_IN_X = 0,        /* the activation; the table of embed */
    PERK_IN_WEIGHT = 1,   /* matrix or norm weight */
    PERK_IN_BIAS = 2,     /* linear */
    PERK_IN_RESIDUAL = 3, /* linear */
    PERK_IN_Q_NORM = 1,   /* attention */
    PERK_IN_K_NORM = 2,   /* attention */
    PERK_IN_EXPERTS = 2,  /* moe_linear: their numbers */
    PERK_IN_SHARES = 2,   /* moe_sum */
};

struct perk_op {
    const perk_op_type *type;
    int index; /* in graph->ops; ops are in topological order by construction */
    perk_tensor *inputs[PERK_OP_INPUTS_MAX];
    perk_tensor *output;
    perk_tensor *second;             /* moe_route: the shares beside the experts; else NULL */
    float eps;                       /* rmsnorm */
    bool normalises;                 /* moe_route */
    perk_activation activation;      /* gate_mul */
    perk_attention_params attention; /* attention; inv_freq is owned by the op */
    int kv_layer;                    /* attention: its layer in the KV cache */
};

struct perk_graph {
    char *name;
    perk_tensor **tensors;
    int tensor_count, tensor_capacity;
    perk_op **ops;
    int op_count, op_capacity;
    int kv_layer_count;
    bool frozen;      /* executors use it: nothing may be added any more */
    perk_error error; /* the first failure */
};

/* Adds an op whose output is a new activation; `inputs` has PERK_OP_INPUTS_MAX entries. With PERK_ROWS_PAIRS it has the
 * slots of the first input. Returns NULL on failure. */
perk_op *perk_graph_add_op(perk_graph *graph, const perk_op_type *type, perk_tensor *const *inputs, const char *name,
                           perk_dtype dtype, perk_rows rows, int64_t cols);
/* A second output, with a row for each of the first's. False on failure. */
bool perk_graph_add_second(perk_graph *graph, perk_op *op, const char *name, perk_dtype dtype, int64_t cols);
/* True when every tensor exists and belongs to `graph`; records a failure otherwise. */
bool perk_graph_owns(perk_graph *graph, const char *op_name, perk_tensor *const *tensors, int count);

/* Rows of an activation in a step of so many tokens and rows of logits. */
static inline int64_t perk_tensor_rows(const perk_tensor *tensor, int64_t tokens, int64_t logit_rows) {
    if (tensor->row_kind == PERK_ROWS_LOGITS) return logit_rows;
    return tensor->row_kind == PERK_ROWS_PAIRS ? tokens * tensor->slots : tokens;
}

static inline bool perk_tensor_is_weight(const perk_tensor *tensor) {
    return tensor->kind == PERK_TENSOR_WEIGHT || tensor->kind == PERK_TENSOR_STACK;
}

#endif
