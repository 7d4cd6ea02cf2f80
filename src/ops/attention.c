/* attention: per-head norm and rotation of queries and keys, append to the paged KV cache, causal attention. */
#include "kernels_src/abi.h"
#include "lower.h"
#include "ops/op.h"
#include "reference_math.h"
#include "reference_state.h"
#include <stdio.h>

#include <math.h>

static bool check_params(perk_graph *graph, const char *name, const perk_tensor *qkv, const perk_attention_params *p) {
    if (p->head_dim <= 0 || p->head_dim % 2 || p->num_kv_heads <= 0 || p->num_heads <= 0 ||
        p->num_heads % p->num_kv_heads || p->window < 0 || !p->inv_freq || !(p->scale > 0)) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT,
                        "attention %s: %d heads over %d KV heads of even dimension %d, window %d: not a valid layer",
                        name, p->num_heads, p->num_kv_heads, p->head_dim, p->window);
        return false;
    }
    int64_t width = (int64_t)(p->num_heads + 2 * p->num_kv_heads) * p->head_dim;
    if (perk_tensor_is_weight(qkv) || qkv->row_kind != PERK_ROWS_TOKENS || qkv->cols != width) {
        perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "attention %s: qkv must be %lld wide, found %lld", name,
                        (long long)width, (long long)qkv->cols);
        return false;
    }
    const perk_tensor *norms[] = {p->q_norm, p->k_norm};
    for (size_t i = 0; i < PERK_COUNT(norms); i++) {
        if (norms[i] && (!norms[i]->is_vector || norms[i]->cols != p->head_dim)) {
            perk_graph_fail(graph, PERK_INVALID_ARGUMENT, "attention %s: the norm weight %s must be a vector of %d",
                            name, norms[i]->name, p->head_dim);
            return false;
        }
    }
    return true;
}

perk_tensor *perk_attention(perk_graph *graph, const char *name, perk_tensor *qkv,
                            const perk_attention_params *params) {
    if (!perk_graph_owns(graph, name, &qkv, 1)) return NULL;
    if (params->q_norm && !perk_graph_owns(graph, name, &params->q_norm, 1)) return NULL;
    if (params->k_norm && !perk_graph_owns(graph, name, &params->k_norm, 1)) return NULL;
    if (!check_params(graph, name, qkv, params)) return NULL;

    size_t half = (size_t)params->head_dim / 2;
    float *inv_freq = perk_calloc(half, sizeof *inv_freq);
    if (!inv_freq) {
        perk_graph_fail(graph, PERK_OUT_OF_MEMORY, "attention %s: out of host memory", name);
        return NULL;
    }
    memcpy(inv_freq, params->inv_freq, half * sizeof *inv_freq);
    perk_tensor *inputs[PERK_OP_INPUTS_MAX] = {
        [PERK_IN_X] = qkv, [PERK_IN_Q_NORM] = params->q_norm, [PERK_IN_K_NORM] = params->k_norm};
    perk_op *op = perk_graph_add_op(graph, &perk_op_attention, inputs, name, PERK_BF16, PERK_ROWS_TOKENS,
                                    (int64_t)params->num_heads * params->head_dim);
    if (!op) {
        free(inv_freq);
        return NULL;
    }
    op->attention = *params;
    op->attention.inv_freq = inv_freq;
    op->kv_layer = graph->kv_layer_count++;
    return op->output;
}

typedef struct attention_job {
    const perk_reference *reference;
    const perk_op *op;
    size_t head_dim;
    size_t heads, kv_heads;
} attention_job;

/* Where the cache keeps `kv_head` of a request's position; what follows in the same page follows in memory. */
static size_t cache_offset(const attention_job *job, int32_t token, size_t kv_head, size_t position) {
    const perk_batch *batch = job->reference->batch;
    size_t page_size = (size_t)job->reference->config.page_size;
    size_t entry = (size_t)batch->token_request[token] * (size_t)batch->pages_per_request + position / page_size;
    size_t page = (size_t)batch->page_table[entry];
    return ((page * job->kv_heads + kv_head) * page_size + position % page_size) * job->head_dim;
}

/* Norm (where there is a weight) and rotation of one head, in fp32, rounded at the end. */
static void prepare_head(const attention_job *job, float *out, const float *in, const float *weight, int32_t position) {
    const perk_attention_params *params = &job->op->attention;
    size_t n = job->head_dim, half = n / 2;
    float scale = weight ? 1 / sqrtf(perk_math_dot(in, in, n) / (float)n + params->norm_eps) : 1;
    for (size_t i = 0; i < half; i++) {
        float angle = (float)position * params->inv_freq[i];
        float c = cosf(angle) * params->rope_scale, s = sinf(angle) * params->rope_scale;
        float a = in[i], b = in[i + half];
        if (weight) {
            a = a * scale * weight[i];
            b = b * scale * weight[i + half];
        }
        out[i] = perk_reference_round(job->reference, a * c - b * s);
        out[i + half] = perk_reference_round(job->reference, b * c + a * s);
    }
}

/* Queries go to the output, where attend_heads finds them; keys and values go to the cache. */
static void prepare_tokens(void *context, size_t begin, size_t end, int thread) {
    const attention_job *job = context;
    const perk_reference *reference = job->reference;
    const perk_op *op = job->op;
    const perk_reference_kv *kv = &reference->kv[op->kv_layer];
    const float *q_norm = perk_reference_vector(reference, op->inputs[PERK_IN_Q_NORM]);
    const float *k_norm = perk_reference_vector(reference, op->inputs[PERK_IN_K_NORM]);
    size_t n = job->head_dim;
    (void)thread;
    for (size_t t = begin; t < end; t++) {
        int32_t position = reference->batch->positions[t];
        const float *q = perk_reference_values(reference, op->inputs[PERK_IN_X]);
        q += t * (job->heads + 2 * job->kv_heads) * n;
        const float *k = q + job->heads * n, *v = k + job->kv_heads * n;
        float *out = perk_reference_values(reference, op->output) + t * job->heads * n;
        for (size_t h = 0; h < job->heads; h++) prepare_head(job, out + h * n, q + h * n, q_norm, position);
        for (size_t h = 0; h < job->kv_heads; h++) {
            size_t at = cache_offset(job, (int32_t)t, h, (size_t)position);
            prepare_head(job, kv->keys + at, k + h * n, k_norm, position);
            memcpy(kv->values + at, v + h * n, n * sizeof *v);
        }
    }
}

/* Turns scores into weights that sum to 1 / what is returned. */
static float exponentiate(float *scores, size_t count) {
    float most = scores[0], sum = 0;
    for (size_t i = 1; i < count; i++) most = PERK_MAX(most, scores[i]);
    for (size_t i = 0; i < count; i++) {
        scores[i] = expf(scores[i] - most);
        sum += scores[i];
    }
    return 1 / sum;
}

/* One query head of one token over the positions [first, last] of its request; `scores` is scratch. */
static void attend(const attention_job *job, int32_t token, size_t head, float *scores) {
    const perk_reference *reference = job->reference;
    const perk_attention_params *params = &job->op->attention;
    const perk_reference_kv *kv = &reference->kv[job->op->kv_layer];
    size_t n = job->head_dim, page_size = (size_t)reference->config.page_size;
    size_t kv_head = head / (job->heads / job->kv_heads), last = (size_t)reference->batch->positions[token];
    size_t first = params->window && last >= (size_t)params->window ? last + 1 - (size_t)params->window : 0;
    size_t count = last + 1 - first;
    float *query = perk_reference_values(reference, job->op->output) + ((size_t)token * job->heads + head) * n;
    for (size_t at = first, run; at <= last; at += run) {
        run = PERK_MIN(page_size - at % page_size, last + 1 - at);
        perk_math_dots(scores + (at - first), 0, kv->keys + cache_offset(job, token, kv_head, at), run, query, 1, n);
    }
    for (size_t i = 0; i < count; i++) scores[i] *= params->scale;
    float scale = exponentiate(scores, count);
    float *out = query; /* nobody needs the query any more */
    memset(out, 0, n * sizeof *out);
    for (size_t at = first, run; at <= last; at += run) {
        run = PERK_MIN(page_size - at % page_size, last + 1 - at);
        perk_math_add_rows(out, scores + (at - first), kv->values + cache_offset(job, token, kv_head, at), run, n);
    }
    for (size_t i = 0; i < n; i++) out[i] = perk_reference_round(reference, out[i] * scale);
}

static void attend_heads(void *context, size_t begin, size_t end, int thread) {
    const attention_job *job = context;
    for (size_t i = begin; i < end; i++)
        attend(job, (int32_t)(i / job->heads), i % job->heads, job->reference->scratch[thread]);
}

static perk_status attention_reference(perk_reference *reference, const perk_op *op, perk_error *err) {
    const perk_attention_params *params = &op->attention;
    attention_job job = {reference, op, (size_t)params->head_dim, (size_t)params->num_heads,
                         (size_t)params->num_kv_heads};
    const perk_batch *batch = reference->batch;
    size_t tokens = (size_t)batch->num_tokens, work = 0;
    (void)err;
    perk_threads_run(reference->threads, tokens, 4, prepare_tokens, &job);
    for (size_t t = 0; t < tokens; t++) work += (size_t)batch->positions[t] + 1;
    work = work / tokens * job.head_dim * 2; /* of one head of one token, more or less */
    perk_threads_run(reference->threads, tokens * job.heads, perk_ceil_div(PERK_REFERENCE_MIN_WORK, work), attend_heads,
                     &job);
    return PERK_OK;
}

/* ---- lowering: partial, merge, append; device code in kernels_src/attention.cuh ---- */

/* Shape and plan tensors of one attention op, for its three stages. */
typedef struct attention_lowering {
    const perk_attention_params *p;
    int parts;  /* workers that share a KV head */
    int slices; /* of the step's tokens, in merge */
    int qkv, partials, kv, out, rope;
    int next_partials; /* those of the layer after it, which it makes vacant; -1: nobody looks */
    perk_stage *stage;
} attention_lowering;

static int partial_floats(const perk_attention_params *p) { return PERK_QUERY_ROWS * (p->head_dim + 2); }

/* The step's tokens in slice `part` of `parts`, as the device code cuts them. */
static void set_token_slice(const perk_lowering *l, perk_region *region, int part, int parts) {
    int tokens = l->plan->config.max_num_batched_tokens, slice = (tokens + parts - 1) / parts;
    region->row_begin = PERK_MIN(part * slice, tokens);
    region->row_end = PERK_MIN(region->row_begin + slice, tokens);
}

static bool is_empty(const perk_region *region) { return region->row_begin >= region->row_end; }

perk_status perk_attention_plan_shape(perk_lowering *l, const perk_op *op, perk_error *err) {
    const perk_attention_params *p = &op->attention;
    perk_plan *plan = l->plan;
    int group = p->num_heads / p->num_kv_heads;
    if (p->head_dim % 32 != 0 || group > PERK_QUERY_ROWS)
        return perk_fail(
            err, PERK_UNSUPPORTED,
            "attention %s: on the GPU, head_dim must be a multiple of 32 (found %d) and a KV head may serve at "
            "most %d query heads (found %d)",
            op->output->name, p->head_dim, (int)PERK_QUERY_ROWS, group);
    const perk_op *first = op;
    for (int i = op->index; i >= 0; i--)
        if (l->graph->ops[i]->type == &perk_op_attention) first = l->graph->ops[i];
    if (first->attention.num_heads != p->num_heads || first->attention.num_kv_heads != p->num_kv_heads ||
        first->attention.head_dim != p->head_dim)
        return perk_fail(err, PERK_UNSUPPORTED, "attention %s: all layers must have the same heads", op->output->name);
    int tokens = plan->config.max_num_batched_tokens, per_tile = PERK_QUERY_ROWS / group;
    plan->attention_parts = PERK_MAX(1, plan->device.worker_count / p->num_kv_heads);
    plan->kv_heads = p->num_kv_heads;
    plan->kv_head_dim = p->head_dim;
    /* Beside batched linears there are norms for a few workers, which are to have nothing else then. */
    int appending = perk_plan_is_batched(plan) ? PERK_MAX(1, plan->attention_parts * 3 / 4) : plan->attention_parts;
    plan->append_slices = PERK_MIN(tokens, appending);
    plan->tokens_per_query_tile = per_tile;
    plan->max_query_tiles = PERK_MIN(tokens, tokens / per_tile + plan->config.max_num_batched_requests);
    if (plan->wide_tokens > 0 && !perk_plan_is_batched(plan) && (p->head_dim == 64 || p->head_dim == 128))
        plan->prompt_slice = PERK_PROMPT_ROWS / group;
    plan->max_attention_items = perk_plan_attention_items(plan);
    plan->kv_layer_bytes = (uint64_t)plan->config.max_num_pages * (uint64_t)p->num_kv_heads *
                           (uint64_t)plan->config.page_size * (uint64_t)p->head_dim * 2 * 2;
    return PERK_OK;
}

/* The rope table of these frequencies: one for all layers that share them. */
static int lower_rope(perk_lowering *l, const perk_op *op) {
    const perk_attention_params *p = &op->attention;
    for (int i = 0; i < l->plan->tensor_count; i++) {
        const perk_plan_tensor *t = &l->plan->tensors[i];
        if (t->layout != PERK_LAYOUT_ROPE) continue;
        const perk_attention_params *other = &l->graph->ops[t->rope_op]->attention;
        if (other->head_dim == p->head_dim && other->rope_scale == p->rope_scale &&
            !memcmp(other->inv_freq, p->inv_freq, (size_t)p->head_dim / 2 * sizeof(float)))
            return i;
    }
    int index =
        perk_lower_scratch(l, "rope", PERK_SPACE_CONSTANTS, l->plan->config.max_seq_length, p->head_dim, PERK_F32);
    if (index >= 0) {
        l->plan->tensors[index].layout = PERK_LAYOUT_ROPE;
        l->plan->tensors[index].rope_op = op->index;
    }
    return index;
}

/* The layer's cache; made on first use. */
static int lower_kv(perk_lowering *l, const perk_op *op) {
    char name[128];
    snprintf(name, sizeof name, "%.80s.kv", op->output->name);
    for (int i = 0; i < l->plan->tensor_count; i++)
        if (!strcmp(l->plan->tensors[i].name, name)) return i;
    return perk_lower_scratch(l, name, PERK_SPACE_KV, l->plan->config.max_num_batched_tokens,
                              op->attention.num_kv_heads, PERK_BF16);
}

static attention_lowering begin_attention(perk_lowering *l, const perk_op *op) {
    const perk_plan *plan = l->plan;
    int tokens = plan->config.max_num_batched_tokens;
    attention_lowering a = {.p = &op->attention, .parts = plan->attention_parts};
    a.slices = PERK_MIN(tokens, PERK_MAX(1, plan->device.worker_count / a.p->num_heads));
    a.qkv = perk_lower_tensor(l, op->inputs[PERK_IN_X], PERK_LAYOUT_ROWS);
    a.kv = lower_kv(l, op);
    a.rope = lower_rope(l, op);
    return a;
}

/* The partial results of a layer: a scratch that others use before and after it. */
static int lower_scratch(perk_lowering *l, const attention_lowering *a, const char *name) {
    for (int i = 0; i < l->plan->tensor_count; i++)
        if (!strcmp(l->plan->tensors[i].name, name)) return i;
    int index = perk_lower_scratch(l, name, PERK_SPACE_ACTIVATIONS, a->p->num_kv_heads,
                                   l->plan->max_attention_items * partial_floats(a->p), PERK_F32);
    if (index >= 0) l->plan->tensors[index].of_pieces = l->plan->eager_pieces;
    return index;
}

/* Where nobody looks, there is one for all layers: a layer's are merged before the next layer's are made. Else the
 * layers take turns, so that a layer can make the next one's vacant; there are three where an odd number of layers
 * would have the first follow the last in the same one. */
static int scratch_of_layer(perk_lowering *l, const attention_lowering *a, int layer) {
    static const char *const names[] = {"attention.partials", "attention.partials.1", "attention.partials.2"};
    int layers = l->graph->kv_layer_count;
    bool is_odd_last = layers % 2 == 1 && layer == layers - 1;
    return lower_scratch(l, a, names[!l->plan->eager_pieces ? 0 : is_odd_last ? 2 : layer % 2]);
}

static void lower_partials(perk_lowering *l, attention_lowering *a, int layer) {
    int layers = l->graph->kv_layer_count;
    l->plan->eager_pieces = l->plan->streams_kv && layers > 1;
    a->partials = scratch_of_layer(l, a, layer);
    a->next_partials = l->plan->eager_pieces ? scratch_of_layer(l, a, (layer + 1) % layers) : -1;
}

/* The columns of qkv that hold a KV head's key and value. */
static perk_region key_and_value(const perk_lowering *l, const attention_lowering *a, int head) {
    const perk_attention_params *p = a->p;
    return perk_lower_columns(l, a->qkv, (p->num_heads + head) * p->head_dim, p->head_dim,
                              p->num_kv_heads * p->head_dim, 2);
}

/* Norms and the rope table, of the task that was added last. */
static void read_turn_operands(perk_lowering *l, const attention_lowering *a) {
    for (int role = 2; role <= 4; role++)
        if (a->stage->operands[role] >= 0) perk_lower_read(l, perk_lower_whole(l, a->stage->operands[role]));
}

/* Slice number `turn` of a part, as the device code deals them. */
static int prompt_slice_of(const attention_lowering *a, int part, int turn) {
    return turn * a->parts + (turn % 2 ? a->parts - 1 - part : part);
}

/* What a unit writes of prompts: all of the tokens in its slices, for the head's queries. */
static void write_prompts(perk_lowering *l, const attention_lowering *a, int unit) {
    int dim = a->p->head_dim, group = a->p->num_heads / a->p->num_kv_heads, slice = l->plan->prompt_slice;
    int tokens = l->plan->config.max_num_batched_tokens;
    for (int turn = 0; slice > 0 && turn * a->parts * slice < tokens; turn++) {
        perk_region out = perk_lower_columns(l, a->out, unit / a->parts * group * dim, group * dim, group * dim, 1);
        out.row_begin = prompt_slice_of(a, unit % a->parts, turn) * slice;
        out.row_end = PERK_MIN(out.row_begin + slice, tokens);
        if (!is_empty(&out)) perk_lower_write(l, out);
    }
}

static void add_partial(perk_lowering *l, void *user, int worker, int first, int count) {
    const attention_lowering *a = user;
    int dim = a->p->head_dim, group = a->p->num_heads / a->p->num_kv_heads, floats = partial_floats(a->p);
    perk_lower_task(l, worker, first, 1, count);
    read_turn_operands(l, a);
    for (int unit = first; unit < first + count; unit++) {
        int head = unit / a->parts;
        perk_lower_read(l, perk_lower_columns(l, a->qkv, head * group * dim, group * dim, dim, 1));
        perk_lower_read(l, key_and_value(l, a, head));
        perk_lower_read(l, perk_lower_columns(l, a->kv, head, 1, 1, 1));
    }
    for (int unit = first; unit < first + count; unit++) { /* items part, part + parts, ... of the head */
        int head = unit / a->parts, part = unit % a->parts;
        int items = (l->plan->max_attention_items - part + a->parts - 1) / a->parts;
        const int scratches[] = {a->partials, a->next_partials};
        for (int i = 0; i < 2 && scratches[i] >= 0 && items > 0; i++) {
            perk_region region = perk_lower_columns(l, scratches[i], part * floats, floats, a->parts * floats, items);
            region.row_begin = head;
            region.row_end = head + 1;
            perk_lower_write(l, region);
        }
        write_prompts(l, a, unit);
    }
}

static void add_merge(perk_lowering *l, void *user, int worker, int first, int count) {
    const attention_lowering *a = user;
    int dim = a->p->head_dim, heads = a->p->num_heads, group = heads / a->p->num_kv_heads;
    perk_lower_task(l, worker, first, 1, count);
    for (int unit = first; unit < first + count; unit++) {
        perk_region partials = perk_lower_whole(l, a->partials);
        partials.row_begin = unit % heads / group;
        partials.row_end = partials.row_begin + 1;
        perk_lower_read(l, partials);
    }
    for (int unit = first; unit < first + count; unit++) {
        perk_region out = perk_lower_columns(l, a->out, unit % heads * dim, dim, dim, 1);
        set_token_slice(l, &out, unit / heads, a->slices);
        if (!is_empty(&out)) perk_lower_write(l, out);
    }
}

static void add_append(perk_lowering *l, void *user, int worker, int first, int count) {
    const attention_lowering *a = user;
    perk_lower_task(l, worker, first, 1, count);
    read_turn_operands(l, a);
    for (int writes = 0; writes < 2; writes++)
        for (int unit = first; unit < first + count; unit++) {
            int head = unit / l->plan->append_slices;
            perk_region region = writes ? perk_lower_columns(l, a->kv, head, 1, 1, 1) : key_and_value(l, a, head);
            set_token_slice(l, &region, unit % l->plan->append_slices, l->plan->append_slices);
            if (!is_empty(&region)) (writes ? perk_lower_write : perk_lower_read)(l, region);
        }
}

/* Opens one of the three stages; `call` is the device function with its template arguments and extra arguments. */
static bool begin_stage(perk_lowering *l, const perk_op *op, attention_lowering *a, const char *suffix,
                        const char *call) {
    const perk_attention_params *p = a->p;
    const char *out_is_input = perk_lower_writes_input(l, op->output) ? ", true" : ", false";
    bool is_partial = !strcmp(suffix, ".partial"), has_prompts = l->plan->prompt_slice > 0 && is_partial;
    a->stage = perk_lower_begin(l, op, suffix, "%s%sAttention<%d, %d, %d, %d%s>::%s;", is_partial ? "chunk = " : "",
                                has_prompts ? "Prompt" : "", p->num_heads, p->num_kv_heads, p->head_dim, a->parts,
                                has_prompts ? out_is_input : "", call);
    if (a->stage) a->stage->scalar = op->kv_layer;
    return a->stage != NULL;
}

/* What turns keys, and queries (`q_norm` NULL: none), for the stages that do so; roles as in kernels_src/attention.cuh.
 */
static void set_turn_operands(perk_lowering *l, const attention_lowering *a, const perk_tensor *q_norm) {
    a->stage->operands[2] = perk_lower_tensor(l, q_norm, PERK_LAYOUT_ROWS);
    a->stage->operands[3] = perk_lower_tensor(l, a->p->k_norm, PERK_LAYOUT_ROWS);
    a->stage->operands[4] = a->rope;
}

static void lower_partial(perk_lowering *l, const perk_op *op, attention_lowering *a) {
    const double log2e = 1.4426950408889634; /* the device code works in base 2 */
    const perk_attention_params *p = a->p;
    char call[192];
    snprintf(call, sizeof call, "template partial<%s, %s>(worker, task, chunk, %.9ef, %uu, %.9ef)",
             p->q_norm ? "true" : "false", p->k_norm ? "true" : "false", (double)p->scale * log2e,
             p->window ? (unsigned)p->window : UINT32_MAX, (double)p->norm_eps);
    if (!begin_stage(l, op, a, ".partial", call)) return;
    a->stage->work = PERK_WORK_PARTIAL;
    a->stage->operands[0] = a->qkv;
    a->stage->operands[1] = a->partials;
    if (l->plan->prompt_slice > 0) a->stage->operands[5] = a->out;
    a->stage->takes_inputs = l->plan->prompt_slice > 0;
    set_turn_operands(l, a, p->q_norm);
    if (a->next_partials >= 0) { /* a worker makes vacant what it writes in the layer after */
        a->stage->operands[5] = a->next_partials;
        a->stage->eager = true;
        perk_lower_fixed_runs(l, p->num_kv_heads * a->parts, add_partial, a);
    } else {
        perk_lower_runs(l, p->num_kv_heads * a->parts, add_partial, a);
    }
    perk_lower_end(l);
}

/* Warps that share a row in merge: all of a worker where it has one row, one where it has as many rows as warps. */
static int merge_row_warps(const perk_lowering *l, const attention_lowering *a) {
    int rows = (int)perk_ceil_div((uint64_t)l->plan->config.max_num_batched_tokens, (uint64_t)a->slices);
    int warps = PERK_CONSUMER_WARPS;
    while (warps > 1 && rows > PERK_CONSUMER_WARPS / warps) warps /= 2;
    return warps;
}

static void lower_merge(perk_lowering *l, const perk_op *op, attention_lowering *a) {
    char call[160];
    snprintf(call, sizeof call, "template merge<%d, %d, %s>(worker, task)", a->slices, merge_row_warps(l, a),
             perk_lower_writes_input(l, op->output) ? "true" : "false");
    if (!begin_stage(l, op, a, "", call)) return;
    a->stage->work = PERK_WORK_MERGE;
    a->stage->operands[0] = a->partials;
    a->stage->operands[1] = a->out;
    perk_lower_runs(l, a->p->num_heads * a->slices, add_merge, a);
    perk_lower_end(l);
}

static void lower_append(perk_lowering *l, const perk_op *op, attention_lowering *a) {
    char call[160];
    snprintf(call, sizeof call, "template append<%d, %s>(worker, task, %.9ef)", l->plan->append_slices,
             a->p->k_norm ? "true" : "false", (double)a->p->norm_eps);
    if (!begin_stage(l, op, a, ".append", call)) return;
    a->stage->work = PERK_WORK_APPEND;
    a->stage->operands[0] = a->qkv;
    set_turn_operands(l, a, NULL);
    perk_lower_late_runs(l, a->p->num_kv_heads * l->plan->append_slices, add_append, a);
    perk_lower_end(l);
}

int perk_attention_reduction_bytes(const perk_op *op) {
    return PERK_CONSUMER_WARPS * (op->attention.head_dim + 2) * (int)sizeof(float);
}

static perk_status attention_lower(perk_lowering *l, const perk_op *op, perk_error *err) {
    attention_lowering a = begin_attention(l, op);
    (void)err;
    lower_partials(l, &a, op->kv_layer);
    a.out = perk_lower_output(l, op->output);
    if (l->error.status == PERK_OK) lower_partial(l, op, &a);
    if (l->error.status == PERK_OK) lower_merge(l, op, &a);
    return l->error.status;
}

static perk_status attention_lower_later(perk_lowering *l, const perk_op *op, perk_error *err) {
    attention_lowering a = begin_attention(l, op);
    (void)err;
    if (l->error.status == PERK_OK) lower_append(l, op, &a);
    return l->error.status;
}

const perk_op_type perk_op_attention = {"attention", attention_reference, attention_lower, attention_lower_later};
