/* As kernels_src/attention.cuh: partial, merge, append. */
#include "simulator/machine.h"

#include <math.h>

static int group_of(const perk_attention_params *p) { return p->num_heads / p->num_kv_heads; }
static int partial_floats(const perk_attention_params *p) { return PERK_QUERY_ROWS * (p->head_dim + 2); }

/* The step's tokens in slice `part` of `parts` equal slices of max_tokens. */
static void token_slice(const perk_sim_task *t, int part, int parts, int *first, int *end) {
    int slice = (t->sim->config.max_num_batched_tokens + parts - 1) / parts;
    int tokens = perk_sim_rows(t, PERK_ROWS_TOKENS);
    *first = part * slice;
    *end = PERK_MIN(*first + slice, tokens);
}

/* ---- norm and rotation ---- */

/* Of one head's vector; `gain_role`: the operand with the norm's weight. */
static bool turn(perk_sim_task *t, float *x, int gain_role, int position) {
    int dim = t->op->attention.head_dim, half = dim / 2;
    bool has_norm = t->stage->operands[gain_role] >= 0;
    float scale = 1;
    const uint16_t *gain = has_norm ? perk_sim_read(t, gain_role, PERK_BF16, 0, 0, dim) : NULL;
    const float *rope = perk_sim_read(t, 4, PERK_F32, position, 0, dim);
    if ((has_norm && !gain) || !rope) return false;
    if (has_norm) {
        float squares = 0;
        for (int i = 0; i < dim; i++) squares += x[i] * x[i];
        scale = 1 / sqrtf(squares / (float)dim + t->op->attention.norm_eps);
    }
    for (int i = 0; i < half; i++) {
        float a = x[i] * scale * (gain ? perk_bf16_to_f32(gain[i]) : 1);
        float b = x[i + half] * scale * (gain ? perk_bf16_to_f32(gain[i + half]) : 1);
        x[i] = perk_round_bf16(a * rope[2 * i] - b * rope[2 * i + 1]);
        x[i + half] = perk_round_bf16(b * rope[2 * i] + a * rope[2 * i + 1]);
    }
    return true;
}

enum { Q_NORM = 2, K_NORM = 3 }; /* operands */

/* Head `head` of qkv (query heads, key heads, value heads) of a token, as the step's linear left it. */
static const uint16_t *read_vector(perk_sim_task *t, int token, int head) {
    int dim = t->op->attention.head_dim;
    return perk_sim_read(t, 0, PERK_BF16, token, (int64_t)head * dim, dim);
}

/* The same, turned. */
static bool load_turned(perk_sim_task *t, int token, int head, int gain_role, float *x) {
    const uint16_t *in = read_vector(t, token, head);
    for (int i = 0; in && i < t->op->attention.head_dim; i++) x[i] = perk_bf16_to_f32(in[i]);
    return in && turn(t, x, gain_role, t->words[t->sim->layout.positions + token]);
}

/* `x` is scratch for a vector. */
static bool load_key(perk_sim_task *t, int token, int head, float *x, uint16_t *key) {
    int dim = t->op->attention.head_dim;
    if (!load_turned(t, token, t->op->attention.num_heads + head, K_NORM, x)) return false;
    for (int i = 0; i < dim; i++) key[i] = perk_f32_to_bf16(x[i]);
    return true;
}

static const uint16_t *read_value(perk_sim_task *t, int token, int head) {
    return read_vector(t, token, t->op->attention.num_heads + t->op->attention.num_kv_heads + head);
}

/* ---- partial ---- */

static perk_query_tile load_tile(const perk_sim_task *t, int index) {
    perk_query_tile tile;
    memcpy(&tile, t->words + t->sim->layout.query_tiles + (size_t)index * (sizeof tile / 4), sizeof tile);
    return tile;
}

/* Online softmax of the rows of a query tile over one piece of the KV range. */
typedef struct piece {
    perk_sim_task *t;
    perk_query_tile tile;
    int head, rows;                      /* rows: tokens times query heads of the group; the others repeat the last */
    float *q;                            /* [rows][dim] */
    float *maximum;                      /* [PERK_QUERY_ROWS], as a partial lies in memory */
    float *sum, *out;                    /* [PERK_QUERY_ROWS], [PERK_QUERY_ROWS][dim] */
    float scale;                         /* for base 2 */
    float *vector;                       /* [dim], scratch */
    uint16_t *fresh_keys, *fresh_values; /* [PERK_KV_UNIT][dim] */
} piece;

static bool load_queries(const piece *p) {
    const perk_attention_params *params = &p->t->op->attention;
    int group = group_of(params);
    for (int row = 0; row < p->rows; row++)
        if (!load_turned(p->t, p->tile.first_token + row / group, p->head * group + row % group, Q_NORM,
                         p->q + row * params->head_dim))
            return false;
    return true;
}

/* The keys and values of this step's tokens that lie at positions [begin, begin + count). */
static bool load_fresh(const piece *p, int begin, int count) {
    int dim = p->t->op->attention.head_dim;
    for (int i = 0; i < count; i++) {
        int token = p->tile.fresh_token + begin + i - p->tile.fresh_position;
        const uint16_t *value = read_value(p->t, token, p->head);
        if (!value || !load_key(p->t, token, p->head, p->vector, p->fresh_keys + i * dim)) return false;
        memcpy(p->fresh_values + i * dim, value, (size_t)dim * sizeof *value);
    }
    return true;
}

/* Scores of the positions [begin, begin + count) for one row; -infinity where it does not see them. */
static float score(const piece *p, int row, const uint16_t *keys, int begin, int count, float *scores) {
    const perk_attention_params *params = &p->t->op->attention;
    int dim = params->head_dim, token = p->tile.first_token + row / group_of(params);
    int limit = p->t->words[p->t->sim->layout.positions + token];
    float maximum = p->maximum[row];
    for (int i = 0; i < count; i++) {
        int position = begin + i;
        bool seen = position <= limit && (params->window == 0 || limit - position < params->window);
        float sum = 0;
        for (int d = 0; d < dim; d++) sum += p->q[row * dim + d] * perk_bf16_to_f32(keys[i * dim + d]);
        scores[i] = seen ? sum * p->scale : -INFINITY;
        maximum = fmaxf(maximum, scores[i]);
    }
    return maximum;
}

static void attend_unit(const piece *p, int row, const uint16_t *keys, const uint16_t *values, int begin, int count) {
    int dim = p->t->op->attention.head_dim;
    float scores[PERK_KV_UNIT], *out = p->out + row * dim;
    float maximum = score(p, row, keys, begin, count, scores);
    float reference = maximum == -INFINITY ? 0 : maximum;
    if (maximum > p->maximum[row]) {
        float shrink = exp2f(p->maximum[row] - reference);
        p->maximum[row] = maximum;
        p->sum[row] *= shrink;
        for (int d = 0; d < dim; d++) out[d] *= shrink;
    }
    for (int i = 0; i < count; i++) {
        float weight = exp2f(scores[i] - reference), rounded = perk_round_bf16(weight);
        p->sum[row] += weight;
        if (scores[i] == -INFINITY) continue;
        for (int d = 0; d < dim; d++) out[d] += rounded * perk_bf16_to_f32(values[i * dim + d]);
    }
}

static void store_piece(const piece *p, int item) {
    const perk_attention_params *params = &p->t->op->attention;
    int floats = partial_floats(params), dim = params->head_dim;
    for (int row = p->rows; row < PERK_QUERY_ROWS; row++) {
        p->maximum[row] = p->maximum[p->rows - 1];
        p->sum[row] = p->sum[p->rows - 1];
        memcpy(p->out + row * dim, p->out + (p->rows - 1) * dim, (size_t)dim * sizeof(float));
    }
    float *out = perk_sim_write(p->t, 1, PERK_F32, p->head, (int64_t)item * floats, floats);
    if (out) memcpy(out, p->maximum, (size_t)floats * sizeof *out);
}

/* All rows against positions that are all in the cache, or all fresh. */
static bool attend_positions(const piece *p, int begin, int count) {
    perk_sim_task *t = p->t;
    const uint16_t *keys = p->fresh_keys, *values = p->fresh_values;
    if (begin < p->tile.fresh_position) {
        keys = perk_sim_read_kv(t, PERK_SIM_KEYS, p->head, p->tile.request, begin, count);
        values = keys ? perk_sim_read_kv(t, PERK_SIM_VALUES, p->head, p->tile.request, begin, count) : NULL;
        if (!values) return false;
    } else if (!load_fresh(p, begin, count)) {
        return false;
    }
    for (int row = 0; row < p->rows; row++) attend_unit(p, row, keys, values, begin, count);
    return true;
}

/* Scratch of a piece, and its queries. */
static bool begin_piece(piece *p) {
    const perk_attention_params *params = &p->t->op->attention;
    size_t floats = (size_t)partial_floats(params), queries = (size_t)PERK_QUERY_ROWS * (size_t)params->head_dim;
    size_t dim = (size_t)params->head_dim;
    p->maximum = perk_sim_scratch(p->t, floats + queries + dim + PERK_KV_UNIT * dim);
    p->rows = p->tile.token_count * group_of(params);
    if (!p->maximum) return false;
    memset(p->maximum, 0, floats * sizeof *p->maximum);
    for (int row = 0; row < PERK_QUERY_ROWS; row++) p->maximum[row] = -INFINITY;
    p->sum = p->maximum + PERK_QUERY_ROWS;
    p->out = p->sum + PERK_QUERY_ROWS;
    p->q = p->maximum + floats;
    p->vector = p->q + queries;
    p->fresh_keys = (uint16_t *)(void *)(p->vector + dim);
    p->fresh_values = p->fresh_keys + PERK_KV_UNIT * dim;
    p->scale = (float)((double)params->scale * 1.4426950408889634);
    return load_queries(p);
}

static bool attend_range(const piece *p, int begin, int end) {
    for (; begin < end; begin += PERK_KV_UNIT)
        if (!attend_positions(p, begin, PERK_MIN((int)PERK_KV_UNIT, end - begin))) return false;
    return true;
}

static void attend_item(perk_sim_task *t, int head, int item) {
    perk_attention_item info;
    memcpy(&info, t->words + t->sim->layout.attention_items + (size_t)item * (sizeof info / 4), sizeof info);
    piece p = {.t = t, .tile = load_tile(t, info.query_tile), .head = head};
    if (begin_piece(&p) && attend_range(&p, info.kv_begin, info.kv_end)) store_piece(&p, item);
}

/* ---- prompts: a query tile as a whole, as kernels_src/prompt_attention.cuh ---- */

static void store_rows(const piece *p) {
    const perk_attention_params *params = &p->t->op->attention;
    int dim = params->head_dim, group = group_of(params);
    for (int row = 0; row < p->rows; row++) {
        int64_t column = (int64_t)(p->head * group + row % group) * dim;
        uint16_t *out = perk_sim_write(p->t, 5, PERK_BF16, p->tile.first_token + row / group, column, dim);
        for (int d = 0; out && d < dim; d++) out[d] = perk_f32_to_bf16(p->out[row * dim + d] / p->sum[row]);
    }
}

/* Up to PERK_QUERY_ROWS rows at a time: a row's result does not depend on its neighbours. */
static void attend_prompt(perk_sim_task *t, int head, const perk_query_tile *tile) {
    enum { POSITIONS = 64 }; /* where the device begins to read is a multiple of it */
    int window = t->op->attention.window, tokens = PERK_QUERY_ROWS / group_of(&t->op->attention);
    for (int first = 0; first < tile->token_count && !t->status; first += tokens) {
        piece p = {.t = t, .tile = *tile, .head = head};
        p.tile.first_token += first;
        p.tile.token_count = PERK_MIN(tokens, tile->token_count - first);
        int limit = tile->fresh_position + p.tile.first_token - tile->fresh_token, fresh = tile->fresh_position;
        int seen = window > 0 && limit >= window ? limit + 1 - window : 0;
        if (begin_piece(&p) && attend_range(&p, seen / POSITIONS * POSITIONS, fresh) &&
            attend_range(&p, fresh + PERK_MAX(0, seen - fresh) / PERK_KV_UNIT * PERK_KV_UNIT,
                         limit + p.tile.token_count))
            store_rows(&p);
    }
}

static void attend_prompts(perk_sim_task *t, int unit) {
    const perk_plan *plan = t->sim->plan;
    int parts = plan->attention_parts, part = unit % parts, slice = plan->prompt_slice;
    int tokens = perk_sim_rows(t, PERK_ROWS_TOKENS);
    for (int turn = 0; slice > 0 && turn * parts * slice < tokens; turn++) {
        int token = (turn * parts + (turn % 2 ? parts - 1 - part : part)) * slice;
        int end = PERK_MIN(token + slice, tokens);
        while (token < end && !t->status) {
            perk_query_tile tile = load_tile(t, t->words[t->sim->layout.token_query_tile + token]);
            if (tile.first_fresh_item < 0) attend_prompt(t, unit / parts, &tile);
            token = tile.first_token + tile.token_count;
        }
    }
}

void perk_sim_partial(perk_sim_task *t) {
    int parts = t->sim->plan->attention_parts, items = t->words[PERK_BATCH_NUM_ATTENTION_ITEMS];
    for (int i = 0; i < t->task->count; i++) {
        int unit = perk_sim_unit(t, i);
        attend_prompts(t, unit);
        for (int item = unit % parts; item < items && !t->status; item += parts) attend_item(t, unit / parts, item);
    }
}

/* ---- merge ---- */

typedef struct merging {
    perk_sim_task *t;
    int head, row; /* head: of the KV heads */
    const perk_query_tile *tile;
    int items;
} merging;

static const float *partial_at(const merging *m, int item, int64_t at, int64_t count) {
    int floats = partial_floats(&m->t->op->attention), cached = m->tile->item_count;
    int64_t index = item < cached ? m->tile->first_item + item : m->tile->first_fresh_item + item - cached;
    return perk_sim_read(m->t, 0, PERK_F32, m->head, index * floats + at, count);
}

static bool merge_pieces(const merging *m, float *total, float *sum) {
    int dim = m->t->op->attention.head_dim;
    float maximum = -INFINITY;
    for (int i = 0; i < m->items; i++) {
        const float *one = partial_at(m, i, m->row, 1);
        if (!one) return false;
        maximum = fmaxf(maximum, *one);
    }
    *sum = 0;
    memset(total, 0, (size_t)dim * sizeof *total);
    for (int i = 0; i < m->items; i++) {
        const float *one = partial_at(m, i, m->row, 1), *part = partial_at(m, i, PERK_QUERY_ROWS + m->row, 1);
        const float *out = partial_at(m, i, 2 * PERK_QUERY_ROWS + (int64_t)m->row * dim, dim);
        if (!one || !part || !out) return false;
        float weight = exp2f(*one - maximum);
        *sum += weight * *part;
        for (int d = 0; d < dim; d++) total[d] += weight * out[d];
    }
    return true;
}

static void merge_row(perk_sim_task *t, int token, int query_head) {
    int group = group_of(&t->op->attention), dim = t->op->attention.head_dim;
    perk_query_tile tile = load_tile(t, t->words[t->sim->layout.token_query_tile + token]);
    merging m = {t, query_head / group, (token - tile.first_token) * group + query_head % group, &tile,
                 tile.item_count + perk_query_tile_fresh_items(&tile)};
    if (tile.first_fresh_item < 0) return; /* a prompt's, which is finished */
    float sum, *total = perk_sim_scratch(t, (size_t)dim);
    if (!total || !merge_pieces(&m, total, &sum)) return;
    uint16_t *out = perk_sim_write(t, 1, PERK_BF16, token, (int64_t)query_head * dim, dim);
    for (int d = 0; out && d < dim; d++) out[d] = perk_f32_to_bf16(total[d] / sum);
}

void perk_sim_merge(perk_sim_task *t) {
    int heads = t->op->attention.num_heads, slices = PERK_MAX(1, t->stage->unit_count / heads);
    for (int i = 0; i < t->task->count; i++) {
        int unit = perk_sim_unit(t, i), first, end;
        token_slice(t, unit / heads, slices, &first, &end);
        for (int token = first; token < end && !t->status; token++) merge_row(t, token, unit % heads);
    }
}

/* ---- append ---- */

static void append_token(perk_sim_task *t, int head, int token) {
    int position = t->words[t->sim->layout.positions + token], request = t->words[t->sim->layout.token_request + token];
    size_t dim = (size_t)t->op->attention.head_dim;
    float *vector = perk_sim_scratch(t, dim);
    uint16_t *key = vector ? perk_sim_write_kv(t, PERK_SIM_KEYS, head, request, position, token) : NULL;
    if (!key || !load_key(t, token, head, vector, key)) return;
    const uint16_t *value = read_value(t, token, head);
    uint16_t *out = value ? perk_sim_write_kv(t, PERK_SIM_VALUES, head, request, position, token) : NULL;
    if (out) memcpy(out, value, dim * sizeof *out);
}

void perk_sim_append(perk_sim_task *t) {
    int slices = t->sim->plan->append_slices;
    for (int i = 0; i < t->task->count; i++) {
        int unit = perk_sim_unit(t, i), first, end;
        token_slice(t, unit % slices, slices, &first, &end);
        for (int token = first; token < end && !t->status; token++) append_token(t, unit / slices, token);
    }
}
