/* As kernels_src/attention.cuh: append, partial, merge. */
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

/* ---- append ---- */

/* Norm and rotation of one head's vector. */
static bool turn(perk_sim_task *t, float *x, int gain_role, bool has_norm, int position) {
    int dim = t->op->attention.head_dim, half = dim / 2;
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
        x[i] = a * rope[2 * i] - b * rope[2 * i + 1];
        x[i + half] = b * rope[2 * i] + a * rope[2 * i + 1];
    }
    return true;
}

/* One vector of one token: vectors 0 ... group-1 are the query heads, then the key, then the value. */
static void append_vector(perk_sim_task *t, int head, int token, int vector) {
    const perk_attention_params *p = &t->op->attention;
    int group = group_of(p), dim = p->head_dim;
    bool is_query = vector<group, is_value = vector> group;
    int source = is_query ? head * group + vector : p->num_heads + (is_value ? p->num_kv_heads : 0) + head;
    int position = t->words[t->sim->layout.positions + token], request = t->words[t->sim->layout.token_request + token];
    float *x = perk_sim_scratch(t, (size_t)dim);
    const uint16_t *in = x ? perk_sim_read(t, 0, PERK_BF16, token, (int64_t)source * dim, dim) : NULL;
    if (!in) return;
    for (int i = 0; i < dim; i++) x[i] = perk_bf16_to_f32(in[i]);
    int gain_role = is_query ? 2 : 3;
    if (!is_value && !turn(t, x, gain_role, t->stage->operands[gain_role] >= 0, position)) return;
    uint16_t *out =
        is_query ? perk_sim_write(t, 1, PERK_BF16, token, (int64_t)source * dim, dim)
                 : perk_sim_write_kv(t, is_value ? PERK_SIM_VALUES : PERK_SIM_KEYS, head, request, position, token);
    for (int i = 0; out && i < dim; i++) out[i] = perk_f32_to_bf16(x[i]);
}

void perk_sim_append(perk_sim_task *t) {
    int parts = t->sim->plan->attention_parts, vectors = group_of(&t->op->attention) + 2;
    for (int i = 0; i < t->task->count; i++) {
        int unit = perk_sim_unit(t, i), first, end;
        token_slice(t, unit % parts, parts, &first, &end);
        for (int token = first; token < end; token++)
            for (int vector = 0; vector < vectors && !t->status; vector++)
                append_vector(t, unit / parts, token, vector);
    }
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
    int head, rows;   /* rows: tokens times query heads of the group; the others repeat the last */
    float *q;         /* [rows][dim] */
    float *maximum;   /* [PERK_QUERY_ROWS], as a partial lies in memory */
    float *sum, *out; /* [PERK_QUERY_ROWS], [PERK_QUERY_ROWS][dim] */
    float scale;      /* for base 2 */
} piece;

static bool load_queries(const piece *p) {
    const perk_attention_params *params = &p->t->op->attention;
    int group = group_of(params), dim = params->head_dim, width = group * dim;
    for (int i = 0; i < p->tile.token_count; i++) {
        const uint16_t *q = perk_sim_read(p->t, 0, PERK_BF16, p->tile.first_token + i, (int64_t)p->head * width, width);
        if (!q) return false;
        for (int c = 0; c < width; c++) p->q[i * width + c] = perk_bf16_to_f32(q[c]);
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

static void attend_item(perk_sim_task *t, int head, int item) {
    const perk_attention_params *params = &t->op->attention;
    perk_attention_item info;
    memcpy(&info, t->words + t->sim->layout.attention_items + (size_t)item * (sizeof info / 4), sizeof info);
    piece p = {.t = t, .tile = load_tile(t, info.query_tile), .head = head};
    size_t floats = (size_t)partial_floats(params), queries = (size_t)PERK_QUERY_ROWS * (size_t)params->head_dim;
    p.maximum = perk_sim_scratch(t, floats + queries);
    p.rows = p.tile.token_count * group_of(params);
    if (!p.maximum) return;
    memset(p.maximum, 0, floats * sizeof *p.maximum);
    for (int row = 0; row < PERK_QUERY_ROWS; row++) p.maximum[row] = -INFINITY;
    p.sum = p.maximum + PERK_QUERY_ROWS;
    p.out = p.sum + PERK_QUERY_ROWS;
    p.q = p.maximum + floats;
    p.scale = (float)((double)params->scale * 1.4426950408889634);
    if (!load_queries(&p)) return;
    for (int begin = info.kv_begin; begin < info.kv_end; begin += PERK_KV_UNIT) {
        int count = PERK_MIN((int)PERK_KV_UNIT, info.kv_end - begin);
        const uint16_t *keys = perk_sim_read_kv(t, PERK_SIM_KEYS, head, p.tile.request, begin, count);
        const uint16_t *values = keys ? perk_sim_read_kv(t, PERK_SIM_VALUES, head, p.tile.request, begin, count) : NULL;
        if (!values) return;
        for (int row = 0; row < p.rows; row++) attend_unit(&p, row, keys, values, begin, count);
    }
    store_piece(&p, item);
}

void perk_sim_partial(perk_sim_task *t) {
    int parts = t->sim->plan->attention_parts, items = t->words[PERK_BATCH_NUM_ATTENTION_ITEMS];
    for (int i = 0; i < t->task->count; i++) {
        int unit = perk_sim_unit(t, i);
        for (int item = unit % parts; item < items && !t->status; item += parts) attend_item(t, unit / parts, item);
    }
}

/* ---- merge ---- */

typedef struct merging {
    perk_sim_task *t;
    int head, row, first_item, items; /* head: of the KV heads */
} merging;

static const float *partial_at(const merging *m, int item, int64_t at, int64_t count) {
    int floats = partial_floats(&m->t->op->attention);
    return perk_sim_read(m->t, 0, PERK_F32, m->head, (int64_t)(m->first_item + item) * floats + at, count);
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
    merging m = {t, query_head / group, (token - tile.first_token) * group + query_head % group, tile.first_item,
                 tile.item_count};
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
