/* The graph: a model as operations over named tensors. It knows no GPU. A model builder attaches the weights by their
 * names in the checkpoint and makes layer calls; the reference executor, the plan and the printers all read the result.
 *
 * A graph belongs to one thread while it is built and is immutable afterwards. Tensors belong to their graph. The first
 * failure is kept in the graph: later calls do nothing and return NULL, so a builder need not check every call;
 * perk_graph_check tells at the end. Names are copied.
 *
 * Activations have one row per token of the step (or per row of logits, see perk_select_rows) and a fixed width.
 * They are bf16 for bf16 and fp16 checkpoints and fp32 for fp32 checkpoints in the reference executor; arithmetic
 * accumulates in fp32 everywhere.
 */
#ifndef PERK_GRAPH_H
#define PERK_GRAPH_H
#include "perk/base.h"
#ifdef __cplusplus
extern "C" {
#endif

typedef struct perk_graph perk_graph;
typedef struct perk_tensor perk_tensor;

PERK_API perk_status perk_graph_create(perk_graph **out, const char *name, perk_error *err);
PERK_API void perk_graph_free(perk_graph *graph);
/* PERK_OK, or the first failure of any call on this graph. */
PERK_API perk_status perk_graph_check(const perk_graph *graph, perk_error *err);
/* For builders: records a failure of their own ("hidden_act \"gelu\" is not supported"). */
PERK_API void perk_graph_fail(perk_graph *graph, perk_status status, const char *format, ...) PERK_PRINTF(3, 4);

/* ---- tensors ---- */

/* A weight, by its name in the checkpoint: a matrix [rows, cols] (row-major, out x in), or a vector [length]. */
PERK_API perk_tensor *perk_attach_matrix(perk_graph *graph, const char *name, int64_t rows, int64_t cols);
PERK_API perk_tensor *perk_attach_vector(perk_graph *graph, const char *name, int64_t length);
/* The matrices [rows, cols] of `count` experts as one weight. In `name`, which is a pattern, one * stands for the
 * expert's number, from 0: "model.layers.3.mlp.experts.*.up_proj.weight". */
PERK_API perk_tensor *perk_attach_experts(perk_graph *graph, const char *name, int64_t count, int64_t rows,
                                          int64_t cols);
/* Weights stacked by rows under a new name ([sum of rows, cols]; vectors are stacked end to end); 1 to 4 parts.
 * Those of experts, equally many in each part, are stacked expert by expert: [count, sum of rows, cols].
 * NULL parts are an error unless all are NULL, which gives NULL (an absent bias). */
PERK_API perk_tensor *perk_stack(perk_graph *graph, const char *name, perk_tensor *const *parts, int count);
/* An activation whose values the caller provides, for testing layers alone: [tokens, width]. */
PERK_API perk_tensor *perk_input(perk_graph *graph, const char *name, int64_t width);
/* Marks an activation to be readable after the step: it gets a buffer of its own and is not fused away. */
PERK_API void perk_keep(perk_graph *graph, perk_tensor *tensor);
/* Finds any tensor of the graph by name; NULL when there is none. */
PERK_API perk_tensor *perk_graph_find(const perk_graph *graph, const char *name);

/* ---- layer calls: each adds one op and returns its output, a new activation called `name` ---- */

/* out[t] = table[token_id[t]]; table [vocab, width]. */
PERK_API perk_tensor *perk_embed(perk_graph *graph, const char *name, perk_tensor *table);

/* out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight;  weight [width]. Zhang and Sennrich 2019, eq. 4. */
PERK_API perk_tensor *perk_rmsnorm(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight, float eps);

/* out = x W^T + bias;  W [out width, in width]; bias [out width] or NULL. */
PERK_API perk_tensor *perk_linear(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight,
                                  perk_tensor *bias);

/* out = x W^T + bias + residual;  residual [tokens, out width]. */
PERK_API perk_tensor *perk_linear_residual(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight,
                                           perk_tensor *bias, perk_tensor *residual);

/* out[i] = silu(x[i]) * x[width/2 + i], silu(v) = v / (1 + exp(-v));  x [tokens, 2 n] -> [tokens, n].
 * Shazeer 2020, SwiGLU. */
PERK_API perk_tensor *perk_silu_mul(perk_graph *graph, const char *name, perk_tensor *x);
/* The same with gelu(v) = v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 v^3))) in place of silu: GEGLU there, with
 * the approximation of gelu by tanh (Hendrycks and Gimpel 2016). */
PERK_API perk_tensor *perk_gelu_mul(perk_graph *graph, const char *name, perk_tensor *x);

typedef struct perk_attention_params {
    int32_t num_heads, num_kv_heads; /* num_heads is a multiple of num_kv_heads */
    int32_t head_dim;
    float scale;           /* of the scores, usually 1 / sqrt(head_dim) */
    int32_t window;        /* a token sees itself and the window - 1 positions before it; 0: all positions */
    const float *inv_freq; /* [head_dim / 2] rotary frequencies (Su et al. 2021), radians a position; copied */
    float rope_scale;      /* multiplies cos and sin (yarn's attention factor); usually 1 */
    perk_tensor *q_norm;   /* [head_dim] RMS norm of each query head before rotation; NULL: none */
    perk_tensor *k_norm;   /* the same for keys */
    float norm_eps;
} perk_attention_params;

/* Norm and rotation of queries and keys, append of keys and values to this layer's paged KV cache, causal attention.
 * qkv [tokens, (num_heads + 2 num_kv_heads) head_dim] holds the query heads, the key heads, the value heads, in that
 * order; -> [tokens, num_heads head_dim]. Rotation pairs dimension i with i + head_dim / 2. Every call owns one layer
 * of the KV cache. */
PERK_API perk_tensor *perk_attention(perk_graph *graph, const char *name, perk_tensor *qkv,
                                     const perk_attention_params *params);

/* ---- mixture of experts (Shazeer et al. 2017): each token goes through the few experts that its router picks. Between
 * perk_moe_linear and perk_moe_sum an activation has a row for each pair of token t and slot s, which is row
 * t * top_k + s; perk_silu_mul takes such activations, too. No device code yet: plans are refused. ---- */

typedef struct perk_routing {
    perk_tensor *experts; /* int32 [tokens, top_k]: the likeliest first, the lower number among equals */
    perk_tensor *shares;  /* fp32 [tokens, top_k] */
} perk_routing;

/* shares = the top_k largest of softmax(logits[t]), divided by their sum if `normalises`; logits [tokens, experts], of
 * perk_logits or bf16. The outputs are called "name.experts" and "name.shares"; both are NULL on failure. */
PERK_API perk_routing perk_moe_route(perk_graph *graph, const char *name, perk_tensor *logits, int32_t top_k,
                                     int32_t normalises);

/* out[t, s] = x[t] W^T with the weight W of experts[t, s], or x[t, s] W^T where x has rows of pairs;
 * weight [count, out width, in width] of perk_attach_experts; -> pairs [tokens x top_k, out width]. */
PERK_API perk_tensor *perk_moe_linear(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight,
                                      perk_tensor *experts);

/* out[t] = residual[t] + sum over s of shares[t, s] x[t, s];  x pairs [tokens x top_k, width]. */
PERK_API perk_tensor *perk_moe_sum(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *shares,
                                   perk_tensor *residual);

/* The rows of x whose logits the step asks for: [tokens, width] -> [logit rows, width]. */
PERK_API perk_tensor *perk_select_rows(perk_graph *graph, const char *name, perk_tensor *x);

/* out = x W^T in fp32, unrounded;  W [vocab, width]. */
PERK_API perk_tensor *perk_logits(perk_graph *graph, const char *name, perk_tensor *x, perk_tensor *weight);

/* The index of the largest logit of each row (the lowest index among equals): int32 [rows, 1]. */
PERK_API perk_tensor *perk_argmax(perk_graph *graph, const char *name, perk_tensor *logits);

#ifdef __cplusplus
}
#endif
#endif
