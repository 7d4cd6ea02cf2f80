/* Ops as tests: the grid, the graphs, the limits. */
#include "test_ops.h"

#include "graph.h"

#include <math.h>
#include <stdio.h>

/* ---- limits, in units of bf16 rounding (perk/test.h), and as relative errors ----
 *
 * Executor and reference round at the same places but add in another order. */

/* Copies. */
static const perk_test_difference exact = {0};
/* One rounding of an fp32 result: results that nearly agree round to the same number, or now and then to neighbours.
 * A tensor core's sum over thousands of terms is off by about 1e-5, which moves under 1% of the roundings: 3e-4. A
 * kernel that cut instead of rounding would have 2e-3. */
static const perk_test_difference rounded_once = {.worst = 1, .relative = 1e-3};
/* Unrounded sums: what the order of adding makes, with room. */
static const perk_test_difference unrounded = {.worst = 0.0625, .relative = 3e-5};
/* The GPU also rounds the weights of a softmax, each by at most 2^-9 of itself: 2.5e-3 and 2 units when the plan's
 * tasks run on the CPU (perk test-op without a GPU), which all numbers from simulations here are from. */
static const perk_test_difference softmax = {.worst = 3, .relative = 5e-3};
/* A folded norm rounds x g before the sums, where the reference rounds x g scale: another rounding of every input, so
 * the sums differ by about 3e-3; a product of two of them, one small and one large, by up to 9 units in a simulation.
 */
static const perk_test_difference folded_norm = {.worst = 16, .relative = 1e-2};
/* Products of products: what was rounded to a neighbour before moves them by about 1e-3. */
static const perk_test_difference rounded_twice = {.worst = 4, .relative = 3e-3};
/* Folded norms through two layers, and logits of them: 1.5e-2 and 16 units in a simulation. */
static const perk_test_difference model = {.worst = 40, .relative = 3e-2};

/* ---- graphs ---- */

enum { OUTPUTS_MAX = 3 };

typedef struct op_output {
    perk_tensor *tensor;
    const perk_test_difference *limit; /* worst and relative */
} op_output;

typedef struct op_graph {
    perk_graph *graph;
    op_output outputs[OUTPUTS_MAX];
    int output_count;
    perk_tensor *logits, *argmax; /* NULL, or the index must be that of the row's first largest logit */
} op_graph;

static void add_output(op_graph *g, perk_tensor *tensor, const perk_test_difference *limit) {
    if (!tensor || g->output_count == OUTPUTS_MAX) return;
    perk_keep(g->graph, tensor);
    g->outputs[g->output_count++] = (op_output){tensor, limit};
}

static void build_embed(op_graph *g, const perk_op_case *c) {
    perk_tensor *table = perk_attach_matrix(g->graph, "table", c->out, c->in);
    add_output(g, perk_embed(g->graph, "y", table), &exact);
}

static void build_rmsnorm(op_graph *g, const perk_op_case *c) {
    perk_tensor *x = perk_input(g->graph, "x", c->in), *gain = perk_attach_vector(g->graph, "gain", c->in);
    add_output(g, perk_rmsnorm(g->graph, "y", x, gain, 1e-6f), &rounded_once);
}

static void build_linear(op_graph *g, const perk_op_case *c) {
    perk_tensor *x = perk_input(g->graph, "x", c->in), *w = perk_attach_matrix(g->graph, "w", c->out, c->in);
    perk_tensor *bias = c->bias ? perk_attach_vector(g->graph, "bias", c->out) : NULL;
    perk_tensor *residual = c->residual ? perk_input(g->graph, "residual", c->out) : NULL;
    perk_tensor *y =
        residual ? perk_linear_residual(g->graph, "y", x, w, bias, residual) : perk_linear(g->graph, "y", x, w, bias);
    add_output(g, y, &rounded_once);
}

static void build_silu_mul(op_graph *g, const perk_op_case *c) {
    add_output(g, perk_silu_mul(g->graph, "y", perk_input(g->graph, "x", (int64_t)2 * c->out)), &rounded_once);
}

static void build_gelu_mul(op_graph *g, const perk_op_case *c) {
    add_output(g, perk_gelu_mul(g->graph, "y", perk_input(g->graph, "x", (int64_t)2 * c->out)), &rounded_once);
}

static perk_tensor *add_attention(perk_graph *graph, const char *name, perk_tensor *qkv, const perk_op_case *c) {
    float inv_freq[512];
    char q_norm[96], k_norm[96];
    if (c->head_dim < 2 || c->head_dim > 1024) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "head_dim %d: must be from 2 to 1024", c->head_dim);
        return NULL;
    }
    for (int i = 0; i < c->head_dim / 2; i++) inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)c->head_dim);
    snprintf(q_norm, sizeof q_norm, "%s.q_norm", name);
    snprintf(k_norm, sizeof k_norm, "%s.k_norm", name);
    const perk_attention_params params = {
        .num_heads = c->heads,
        .num_kv_heads = c->kv_heads,
        .head_dim = c->head_dim,
        .scale = 1 / sqrtf((float)c->head_dim),
        .window = c->window,
        .inv_freq = inv_freq,
        .rope_scale = 1,
        .q_norm = c->norms ? perk_attach_vector(graph, q_norm, c->head_dim) : NULL,
        .k_norm = c->norms ? perk_attach_vector(graph, k_norm, c->head_dim) : NULL,
        .norm_eps = 1e-6f,
    };
    return perk_attention(graph, name, qkv, &params);
}

static int64_t qkv_width(const perk_op_case *c) { return ((int64_t)c->heads + 2 * (int64_t)c->kv_heads) * c->head_dim; }

static void build_attention(op_graph *g, const perk_op_case *c) {
    perk_tensor *qkv = perk_input(g->graph, "qkv", qkv_width(c));
    add_output(g, add_attention(g->graph, "y", qkv, c), &softmax);
}

static void build_select_rows(op_graph *g, const perk_op_case *c) {
    add_output(g, perk_select_rows(g->graph, "y", perk_input(g->graph, "x", c->in)), &exact);
}

static void add_choice(op_graph *g, perk_tensor *rows, perk_tensor *weight, const perk_test_difference *limit) {
    g->logits = perk_logits(g->graph, "logits", rows, weight);
    add_output(g, g->logits, limit);
    g->argmax = perk_argmax(g->graph, "argmax", g->logits);
}

static void build_argmax(op_graph *g, const perk_op_case *c) {
    perk_tensor *x = perk_input(g->graph, "x", c->in), *w = perk_attach_matrix(g->graph, "w", c->out, c->in);
    add_choice(g, perk_select_rows(g->graph, "rows", x), w, &unrounded);
}

/* A layer's gate and up projections: the norm before them and the gate after them are folded in. */
typedef perk_tensor *layer_call(perk_graph *graph, const char *name, perk_tensor *x);
static perk_tensor *add_mlp(perk_graph *graph, const char *prefix, perk_tensor *x, int64_t in, int64_t out,
                            layer_call *gated) {
    char name[96];
#define MLP_NAME(text) (snprintf(name, sizeof name, "%s" text, prefix), name)
    perk_tensor *gain = perk_attach_vector(graph, MLP_NAME("gain"), in);
    perk_tensor *normed = perk_rmsnorm(graph, MLP_NAME("normed"), x, gain, 1e-6f);
    perk_tensor *gate = perk_attach_matrix(graph, MLP_NAME("gate"), out, in);
    perk_tensor *parts[] = {gate, perk_attach_matrix(graph, MLP_NAME("up"), out, in)};
    perk_tensor *stack = perk_stack(graph, MLP_NAME("gate_up"), parts, 2);
    perk_tensor *both = perk_linear(graph, MLP_NAME("both"), normed, stack, NULL);
    return gated(graph, MLP_NAME("y"), both);
#undef MLP_NAME
}

static void build_mlp(op_graph *g, const perk_op_case *c) {
    add_output(g, add_mlp(g->graph, "", perk_input(g->graph, "x", c->in), c->in, c->out, perk_silu_mul), &folded_norm);
}

static void build_gelu_mlp(op_graph *g, const perk_op_case *c) {
    add_output(g, add_mlp(g->graph, "", perk_input(g->graph, "x", c->in), c->in, c->out, perk_gelu_mul), &folded_norm);
}

/* Both ends of a model, with one table for both. */
static void build_vocabulary(op_graph *g, const perk_op_case *c) {
    perk_tensor *table = perk_attach_matrix(g->graph, "table", c->out, c->in);
    perk_tensor *x = perk_embed(g->graph, "x", table), *rows = perk_select_rows(g->graph, "rows", x);
    add_output(g, x, &exact);
    add_output(g, rows, &exact);
    add_choice(g, rows, table, &unrounded);
}

/* Two layers of a decoder: every op, folded as in a model. */
static void build_decoder(op_graph *g, const perk_op_case *c) {
    perk_graph *graph = g->graph;
    perk_tensor *table = perk_attach_matrix(graph, "table", c->out, c->in), *x = perk_embed(graph, "x", table);
    int64_t heads = (int64_t)c->heads * c->head_dim;
    for (int layer = 0; layer < 2; layer++) {
        char prefix[16], name[96];
        snprintf(prefix, sizeof prefix, "%d.", layer);
#define LAYER_NAME(text) (snprintf(name, sizeof name, "%s" text, prefix), name)
        perk_tensor *gain = perk_attach_vector(graph, LAYER_NAME("norm"), c->in);
        perk_tensor *normed = perk_rmsnorm(graph, LAYER_NAME("attention.in"), x, gain, 1e-6f);
        perk_tensor *w = perk_attach_matrix(graph, LAYER_NAME("qkv"), qkv_width(c), c->in);
        perk_tensor *qkv = perk_linear(graph, LAYER_NAME("qkv.out"), normed, w, NULL);
        perk_tensor *mixed = add_attention(graph, LAYER_NAME("attention"), qkv, c);
        w = perk_attach_matrix(graph, LAYER_NAME("o"), c->in, heads);
        x = perk_linear_residual(graph, LAYER_NAME("o.out"), mixed, w, NULL, x);
        perk_tensor *inner = add_mlp(graph, LAYER_NAME("mlp."), x, c->in, 2 * (int64_t)c->in, perk_silu_mul);
        w = perk_attach_matrix(graph, LAYER_NAME("down"), c->in, 2 * (int64_t)c->in);
        x = perk_linear_residual(graph, LAYER_NAME("down.out"), inner, w, NULL, x);
#undef LAYER_NAME
    }
    perk_tensor *rows = perk_select_rows(graph, "rows", x), *gain = perk_attach_vector(graph, "norm", c->in);
    add_choice(g, perk_rmsnorm(graph, "last", rows, gain, 1e-6f), table, &model);
}

static perk_routing add_router(op_graph *g, const perk_op_case *c, perk_tensor *x) {
    perk_tensor *weight = perk_attach_matrix(g->graph, "router.weight", c->experts, c->in);
    return perk_moe_route(g->graph, "route", perk_logits(g->graph, "router", x, weight), c->top_k, 1);
}

static void build_moe_route(op_graph *g, const perk_op_case *c) {
    perk_routing routing = add_router(g, c, perk_input(g->graph, "x", c->in));
    add_output(g, routing.experts, &exact);
    add_output(g, routing.shares, &unrounded);
}

static perk_tensor *add_experts(op_graph *g, const perk_op_case *c, perk_tensor *x, perk_tensor *experts) {
    perk_tensor *gate = perk_attach_experts(g->graph, "experts.*.gate", c->experts, c->out, c->in);
    perk_tensor *parts[] = {gate, perk_attach_experts(g->graph, "experts.*.up", c->experts, c->out, c->in)};
    return perk_moe_linear(g->graph, "both", x, perk_stack(g->graph, "gate_up", parts, 2), experts);
}

static void build_moe_linear(op_graph *g, const perk_op_case *c) {
    perk_tensor *x = perk_input(g->graph, "x", c->in);
    add_output(g, add_experts(g, c, x, add_router(g, c, x).experts), &rounded_once);
}

/* A layer's experts, from the router to the sum. */
static void build_moe_sum(op_graph *g, const perk_op_case *c) {
    perk_tensor *x = perk_input(g->graph, "x", c->in);
    perk_routing routing = add_router(g, c, x);
    perk_tensor *inner = perk_silu_mul(g->graph, "inner", add_experts(g, c, x, routing.experts));
    perk_tensor *weight = perk_attach_experts(g->graph, "experts.*.down", c->experts, c->in, c->out);
    perk_tensor *down = perk_moe_linear(g->graph, "down", inner, weight, routing.experts);
    add_output(g, down, &rounded_twice);
    add_output(g, perk_moe_sum(g->graph, "y", down, routing.shares, x), &rounded_twice);
}

/* The same as in a model, where the norm before it is folded in, and the sum; but routed by what is before the norm:
 * how that rounds must not decide who is picked. */
static void build_experts(op_graph *g, const perk_op_case *c) {
    perk_tensor *x = perk_input(g->graph, "x", c->in), *gain = perk_attach_vector(g->graph, "gain", c->in);
    perk_tensor *normed = perk_rmsnorm(g->graph, "normed", x, gain, 1e-6f);
    perk_routing routing = add_router(g, c, x);
    perk_tensor *inner = perk_silu_mul(g->graph, "inner", add_experts(g, c, normed, routing.experts));
    perk_tensor *weight = perk_attach_experts(g->graph, "experts.*.down", c->experts, c->in, c->out);
    perk_tensor *down = perk_moe_linear(g->graph, "down", inner, weight, routing.experts);
    add_output(g, perk_moe_sum(g->graph, "y", down, routing.shares, x), &folded_norm);
}

/* ---- the grid ---- */

/* clang-format off */
#define OPS(X) \
    X(embed) X(rmsnorm) X(linear) X(silu_mul) X(gelu_mul) X(attention) X(select_rows) X(argmax) \
    X(mlp) X(gelu_mlp) X(vocabulary) X(decoder) X(moe_route) X(moe_linear) X(moe_sum) X(experts)
/* clang-format on */

#define OP_NAME(name) #name,
const char *const perk_op_case_names[] = {OPS(OP_NAME) NULL};
#undef OP_NAME
#define OP_BUILD(name) {#name, build_##name},
static const struct {
    const char *op;
    void (*build)(op_graph *g, const perk_op_case *c);
} builders[] = {OPS(OP_BUILD)};
#undef OP_BUILD

/* clang-format off */
static const perk_op_case grid[] = {
    {.op = "embed", .rows = 3, .in = 72, .out = 1031, .quick = true},
    {.op = "embed", .rows = 64, .live = 61, .in = 1024, .out = 5000},

    {.op = "rmsnorm", .rows = 8, .live = 7, .in = 1024, .quick = true},
    {.op = "rmsnorm", .rows = 1, .in = 4096},
    {.op = "rmsnorm", .rows = 3, .in = 129},
    {.op = "rmsnorm", .rows = 64, .in = 4096},

    {.op = "linear", .rows = 8, .in = 1024, .out = 1000, .bias = true, .residual = true, .quick = true},
    {.op = "linear", .rows = 1, .in = 512, .out = 2112},
    {.op = "linear", .rows = 3, .in = 72, .out = 100, .bias = true},
    {.op = "linear", .rows = 3, .in = 1001, .out = 999, .residual = true},
    {.op = "linear", .rows = 5, .in = 2600, .out = 520, .residual = true}, /* an odd number of chunks */
    {.op = "linear", .rows = 16, .live = 13, .in = 1000, .out = 520, .bias = true},
    {.op = "linear", .rows = 64, .live = 50, .in = 1024, .out = 2048, .bias = true, .residual = true},
    {.op = "linear", .rows = 1, .in = 1024, .out = 4096},                     /* 0.6B: qkv, o, down */
    {.op = "linear", .rows = 8, .in = 2048, .out = 1024, .residual = true},
    {.op = "linear", .rows = 16, .in = 3072, .out = 1024, .residual = true},
    {.op = "linear", .rows = 16, .in = 4096, .out = 6144},                    /* 8B: qkv, o, down */
    {.op = "linear", .rows = 8, .in = 4096, .out = 4096, .residual = true},
    {.op = "linear", .rows = 1, .in = 12288, .out = 4096, .residual = true},
    {.op = "linear", .rows = 64, .in = 12288, .out = 512, .residual = true},  /* staged in parts */

    {.op = "silu_mul", .rows = 8, .live = 7, .out = 3072, .quick = true},
    {.op = "silu_mul", .rows = 1, .out = 12288},
    {.op = "silu_mul", .rows = 3, .out = 101},
    {.op = "silu_mul", .rows = 64, .out = 1000},

    {.op = "gelu_mul", .rows = 8, .live = 7, .out = 1001, .quick = true},

    {.op = "attention", .rows = 8, .heads = 4, .kv_heads = 2, .head_dim = 64, .context = 100, .requests = 3,
     .norms = true, .quick = true},
    {.op = "attention", .rows = 1, .heads = 16, .kv_heads = 8, .head_dim = 128, .context = 999, .norms = true},
    {.op = "attention", .rows = 3, .heads = 5, .kv_heads = 1, .head_dim = 64, .context = 15, .requests = 3},
    {.op = "attention", .rows = 16, .live = 15, .heads = 32, .kv_heads = 8, .head_dim = 128, .context = 200,
     .requests = 4, .norms = true},
    {.op = "attention", .rows = 64, .heads = 10, .kv_heads = 2, .head_dim = 96},
    {.op = "attention", .rows = 64, .live = 60, .heads = 64, .kv_heads = 8, .head_dim = 128, .context = 64,
     .requests = 8, .norms = true},
    {.op = "attention", .rows = 16, .heads = 8, .kv_heads = 8, .head_dim = 32, .context = 150, .window = 40,
     .requests = 2},

    {.op = "select_rows", .rows = 8, .in = 1024, .requests = 3, .quick = true},
    {.op = "select_rows", .rows = 16, .live = 13, .in = 72, .requests = 5},

    {.op = "argmax", .rows = 3, .in = 72, .out = 1031, .quick = true},
    {.op = "argmax", .rows = 16, .live = 13, .in = 1024, .out = 5000, .requests = 4},

    {.op = "mlp", .rows = 8, .live = 5, .in = 256, .out = 1000, .quick = true},
    {.op = "mlp", .rows = 1, .in = 1024, .out = 3072},
    {.op = "mlp", .rows = 3, .in = 72, .out = 100},
    {.op = "mlp", .rows = 16, .in = 4096, .out = 12288},
    {.op = "mlp", .rows = 64, .in = 512, .out = 520},

    {.op = "gelu_mlp", .rows = 8, .live = 5, .in = 256, .out = 1000, .quick = true},

    {.op = "vocabulary", .rows = 8, .live = 7, .in = 1024, .out = 5000, .requests = 2, .quick = true},
    {.op = "vocabulary", .rows = 1, .in = 1024, .out = 151936},

    {.op = "decoder", .rows = 16, .live = 14, .in = 256, .out = 1031, .heads = 8, .kv_heads = 2, .head_dim = 64,
     .context = 70, .requests = 4, .norms = true, .quick = true},
    {.op = "decoder", .rows = 3, .in = 72, .out = 500, .heads = 3, .kv_heads = 1, .head_dim = 32, .context = 20,
     .requests = 2},

    {.op = "moe_route", .rows = 8, .live = 7, .in = 256, .experts = 128, .top_k = 8, .quick = true},
    {.op = "moe_route", .rows = 64, .live = 61, .in = 128, .experts = 128, .top_k = 8},
    {.op = "moe_route", .rows = 3, .in = 72, .experts = 5, .top_k = 5},
    {.op = "moe_route", .rows = 33, .in = 64, .experts = 513, .top_k = 32},

    {.op = "moe_linear", .rows = 8, .live = 7, .in = 256, .out = 96, .experts = 16, .top_k = 4, .quick = true},
    {.op = "moe_linear", .rows = 1, .in = 1001, .out = 35, .experts = 40, .top_k = 6},
    {.op = "moe_linear", .rows = 16, .live = 14, .in = 520, .out = 100, .experts = 3, .top_k = 2},
    {.op = "moe_linear", .rows = 64, .live = 60, .in = 768, .out = 40, .experts = 2, .top_k = 1},

    {.op = "moe_sum", .rows = 8, .live = 7, .in = 256, .out = 96, .experts = 16, .top_k = 4, .quick = true},
    {.op = "moe_sum", .rows = 3, .in = 72, .out = 101, .experts = 5, .top_k = 5},
    {.op = "moe_sum", .rows = 64, .live = 50, .in = 256, .out = 328, .experts = 9, .top_k = 3},

    {.op = "experts", .rows = 8, .live = 7, .in = 256, .out = 96, .experts = 16, .top_k = 4, .quick = true},
    {.op = "experts", .rows = 1, .in = 72, .out = 101, .experts = 40, .top_k = 6},
    {.op = "experts", .rows = 64, .live = 50, .in = 200, .out = 40, .experts = 5, .top_k = 3},
    {.op = "experts", .rows = 1, .in = 2048, .out = 768, .experts = 128, .top_k = 8},      /* 30B-A3B */
    {.op = "experts", .rows = 16, .in = 2048, .out = 768, .experts = 128, .top_k = 8},
    {.op = "experts", .rows = 64, .in = 2048, .out = 768, .experts = 128, .top_k = 8},
};
/* clang-format on */

const perk_op_case *perk_op_grid(size_t *count) {
    *count = PERK_COUNT(grid);
    return grid;
}

const perk_op_case *perk_op_case_of(const char *op) {
    for (size_t i = 0; i < PERK_COUNT(grid); i++)
        if (!strcmp(grid[i].op, op)) return &grid[i];
    return NULL;
}

const char *perk_op_case_shape(const perk_op_case *c, char *text, size_t size) {
    perk_buffer b = {0};
    int32_t live = c->live ? c->live : c->rows;
    perk_buffer_printf(&b, "%d", c->rows);
    if (live != c->rows) perk_buffer_printf(&b, " (%d)", live);
    if (c->in && c->out)
        perk_buffer_printf(&b, " x %d -> %d", c->in, c->out);
    else if (c->in || c->out)
        perk_buffer_printf(&b, " x %d", c->in ? c->in : c->out);
    if (c->heads) perk_buffer_printf(&b, ", %d/%d heads of %d", c->heads, c->kv_heads, c->head_dim);
    if (c->experts) perk_buffer_printf(&b, ", %d of %d experts", c->top_k, c->experts);
    if (c->requests > 1) perk_buffer_printf(&b, ", %d requests", c->requests);
    if (c->context) perk_buffer_printf(&b, ", context %d", c->context);
    if (c->window) perk_buffer_printf(&b, ", window %d", c->window);
    perk_buffer_printf(&b, "%s%s%s", c->bias ? ", bias" : "", c->residual ? ", residual" : "",
                       c->norms ? ", norms" : "");
    snprintf(text, size, "%s", b.data ? b.data : "");
    perk_buffer_free(&b);
    return text;
}

/* ---- running a case ---- */

static perk_status split_rows(const perk_op_case *c, perk_test_request *requests, perk_error *err) {
    int32_t live = c->live ? c->live : c->rows, count = c->requests ? c->requests : 1;
    if (live < 1 || live > c->rows || count < 1 || count > live || count > PERK_OP_CASE_REQUESTS_MAX || c->context < 0)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "%s: %d of %d rows, %d requests, context %d: needs 1 to all rows, and a row for each of 1 to "
                         "%d requests",
                         c->op, live, c->rows, count, c->context, (int)PERK_OP_CASE_REQUESTS_MAX);
    for (int32_t i = 0; i < count; i++) {
        requests[i].tokens = live / count + (i < live % count);
        requests[i].history = (int32_t)((int64_t)c->context * (i + 1) / count);
        requests[i].logits = i % 2 || live > 64 ? 1 : 2; /* a step on a GPU has at most 64 rows of logits */
    }
    return PERK_OK;
}

static perk_status open_case(perk_test **out, const perk_op_case *c, const perk_test_options *options, op_graph *g,
                             perk_error *err) {
    perk_test_request requests[PERK_OP_CASE_REQUESTS_MAX];
    size_t op = 0;
    *out = NULL;
    while (op < PERK_COUNT(builders) && strcmp(builders[op].op, c->op) != 0) op++;
    if (op == PERK_COUNT(builders)) return perk_fail(err, PERK_NOT_FOUND, "there is no op \"%s\"", c->op);
    perk_status status = split_rows(c, requests, err);
    if (status) return status;
    perk_test_options o = *options;
    o.rows = c->rows;
    o.requests = requests;
    o.request_count = c->requests ? c->requests : 1;
    o.max_positions = 0;
    status = perk_test_create(out, &o, err);
    if (status) return status;
    *g = (op_graph){.graph = perk_test_graph(*out)};
    builders[op].build(g, c);
    status = perk_graph_check(g->graph, err);
    if (!status) return PERK_OK;
    perk_test_free(*out);
    *out = NULL;
    return status;
}

perk_status perk_op_case_open(perk_test **out, const perk_op_case *c, const perk_test_options *options,
                              perk_tensor **outputs, size_t *count, perk_error *err) {
    op_graph g;
    perk_status status = open_case(out, c, options, &g, err);
    if (status) return status;
    *count = PERK_MIN(*count, (size_t)g.output_count);
    for (size_t i = 0; i < *count; i++) outputs[i] = g.outputs[i].tensor;
    return PERK_OK;
}

/* How much of its limits a difference takes; above 1 it is too far. */
static double share(const perk_test_difference *by, const perk_test_difference *limit) {
    double units = limit->worst > 0 ? by->worst / limit->worst : by->worst > 0 ? INFINITY : 0;
    double relative = limit->relative > 0 ? by->relative / limit->relative : by->relative > 0 ? INFINITY : 0;
    return fmax(units, relative);
}

static perk_status judge_outputs(perk_test *test, const op_graph *g, perk_op_verdict *out, perk_error *err) {
    double furthest = -1;
    for (int i = 0; i < g->output_count; i++) {
        const op_output *o = &g->outputs[i];
        perk_test_difference by;
        perk_status status = perk_test_compare(test, o->tensor, NULL, 0, &by, err);
        if (status) return status;
        double taken = share(&by, o->limit);
        if (!(taken <= 1)) out->passed = false;
        if (!(taken > furthest)) continue;
        furthest = taken;
        snprintf(out->tensor, sizeof out->tensor, "%s", o->tensor->name);
        out->by = by;
        out->limit = o->limit->worst;
        out->relative_limit = o->limit->relative;
    }
    return PERK_OK;
}

/* By the executor's own logits: near ties may fall otherwise than in the reference. */
static void judge_choices(const float *logits, const float *choices, size_t rows, size_t vocabulary,
                          perk_op_verdict *out) {
    for (size_t row = 0; row < rows; row++) {
        const float *values = logits + row * vocabulary;
        size_t best = 0;
        for (size_t i = 1; i < vocabulary; i++)
            if (values[i] > values[best]) best = i;
        if (choices[row] == (float)best) continue;
        out->passed = false;
        snprintf(out->problem, sizeof out->problem, "argmax of row %zu is %.0f, but the largest logit is at %zu", row,
                 (double)choices[row], best);
        return;
    }
}

static perk_status judge_argmax(perk_test *test, const op_graph *g, perk_op_verdict *out, perk_error *err) {
    if (!g->argmax) return PERK_OK;
    size_t rows = perk_test_rows(test, g->logits), vocabulary = (size_t)g->logits->cols;
    float *logits = perk_calloc(rows * vocabulary, sizeof *logits), *choices = perk_calloc(rows, sizeof *choices);
    perk_status status = logits && choices ? PERK_OK : perk_fail_memory(err, "logits");
    if (!status) status = perk_test_read(test, g->logits, logits, rows * vocabulary, err);
    if (!status) status = perk_test_read(test, g->argmax, choices, rows, err);
    if (!status) judge_choices(logits, choices, rows, vocabulary, out);
    free(logits);
    free(choices);
    return status;
}

perk_status perk_op_case_run(const perk_op_case *c, const perk_test_options *options, perk_op_verdict *out,
                             perk_error *err) {
    op_graph g;
    perk_test *test;
    *out = (perk_op_verdict){.passed = true};
    perk_status status = open_case(&test, c, options, &g, err);
    if (!status) status = perk_test_run(test, err);
    if (!status) status = judge_outputs(test, &g, out, err);
    if (!status) status = judge_argmax(test, &g, out, err);
    if (!status) {
        out->report = *perk_test_report(test);
        out->compared = strcmp(out->report.executor, "reference") != 0;
    } else {
        out->passed = false;
    }
    perk_test_free(test);
    return status;
}
