/* What a task does to memory: every access is located, held against the task's regions, and recorded. */
#include "check.h"
#include "simulator/machine.h"

#include <stdarg.h>
#include <stdio.h>

void perk_sim_fail(perk_sim_task *t, const char *format, ...) {
    char text[512];
    va_list args;
    if (t->status) return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    t->status = perk_fail(t->err, PERK_UNSAFE_PLAN, "%s %s", perk_check_task_text(t->sim->plan, t->index).text, text);
}

static void fail_memory(perk_sim_task *t) {
    if (!t->status) t->status = perk_fail_memory(t->err, "the simulator");
}

static bool grow(perk_sim_task *t, void *list, size_t *capacity, size_t needed, size_t size) {
    if (needed <= *capacity) return true;
    size_t wanted = PERK_MAX(needed, PERK_MAX(*capacity * 2, (size_t)64));
    void *bigger = perk_realloc_array(*(void **)list, wanted, size);
    if (!bigger) {
        fail_memory(t);
        return false;
    }
    *(void **)list = bigger;
    *capacity = wanted;
    return true;
}

float *perk_sim_scratch(perk_sim_task *t, size_t count) {
    return grow(t, &t->sim->scratch, &t->sim->scratch_capacity, count, sizeof(float)) ? t->sim->scratch : NULL;
}

/* ---- where ---- */

/* Elements of one tensor, in memory or among the constants. */
typedef struct access {
    int tensor;
    int64_t row, col, end; /* for the regions: columns [col, end), within the tensor's width */
    uint64_t place, bytes; /* in its space; KV pages lie behind the activations */
    uint64_t live_bytes;   /* of them, up to the tensor's width */
    bool is_write, in_place;
} access;

perk_sim_text perk_sim_place_text(const perk_simulator *sim, int tensor, uint64_t place) {
    const perk_plan_tensor *t = &sim->plan->tensors[tensor];
    perk_sim_text out;
    if (t->space == PERK_SPACE_KV) {
        snprintf(out.text, sizeof out.text, "%.95s, byte %llu of the KV pages", t->name,
                 (unsigned long long)(place - sim->activation_bytes));
        return out;
    }
    uint64_t element = (place > t->offset ? place - t->offset : 0) / perk_dtype_size(t->dtype);
    snprintf(out.text, sizeof out.text, "%.95s[%llu, %llu]", t->name,
             (unsigned long long)(element / (uint64_t)t->row_stride),
             (unsigned long long)(element % (uint64_t)t->row_stride));
    return out;
}

/* Rows may be accessed up to the stride: blocks of columns are read whole. */
static bool locate(perk_sim_task *t, int role, perk_dtype dtype, int64_t row, int64_t col, int64_t count, access *out) {
    int tensor = t->stage->operands[role];
    if (t->status) return false;
    if (tensor < 0) {
        perk_sim_fail(t, "has no operand %d", role);
        return false;
    }
    const perk_plan_tensor *p = &t->sim->plan->tensors[tensor];
    if (p->dtype != dtype || row < 0 || row >= p->rows || col < 0 || count < 1 || count > p->row_stride - col ||
        (p->space != PERK_SPACE_ACTIVATIONS && p->space != PERK_SPACE_CONSTANTS)) {
        perk_sim_fail(t, "uses %lld of %s from %.95s[%lld, %lld] on, which lie outside it: it has [%d, %d] of %s",
                      (long long)count, perk_dtype_name(dtype), p->name, (long long)row, (long long)col, p->rows,
                      p->cols, perk_dtype_name(p->dtype));
        return false;
    }
    uint64_t size = perk_dtype_size(dtype);
    int64_t end = PERK_MIN(col + count, (int64_t)p->cols);
    *out = (access){.tensor = tensor,
                    .row = row,
                    .col = col,
                    .end = end,
                    .place = p->offset + (uint64_t)(row * p->row_stride + col) * size,
                    .bytes = (uint64_t)count * size,
                    .live_bytes = end > col ? (uint64_t)(end - col) * size : 0};
    return true;
}

/* ---- what the regions declare ---- */

/* The end of what the region has of row `row` from column `col` on; `col` when it does not contain that. */
static int64_t covered_until(const perk_region *r, int64_t row, int64_t col) {
    if (row < r->row_begin || row >= r->row_end || col < r->col_begin) return col;
    int64_t interval = r->repeat > 1 ? (col - r->col_begin) / r->col_stride : 0;
    int64_t end = r->col_begin + interval * r->col_stride + r->col_count;
    return interval < r->repeat && col < end ? end : col;
}

static void check_declared(perk_sim_task *t, const access *a) {
    const perk_plan *plan = t->sim->plan;
    int begin = a->is_write ? t->task->write_begin : t->task->read_begin;
    int end = a->is_write ? t->task->write_end : t->task->read_end;
    int64_t col = a->col;
    for (int i = begin; i < end && col < a->end; i++) {
        if (plan->regions[i].tensor != a->tensor) continue;
        int64_t until = covered_until(&plan->regions[i], a->row, col);
        if (until == col) continue;
        col = until;
        i = begin - 1; /* what comes next may be in any of them */
    }
    if (a->is_write && t->stage->stream.deal == PERK_DEAL_UNITS) return; /* what it declares is a share, not a place */
    if (col >= a->end || t->sim->undeclared.status) return;
    perk_fail(&t->sim->undeclared, PERK_UNSAFE_PLAN, "%s %s %.95s[%lld, %lld:%lld], which its regions do not declare",
              perk_check_task_text(plan, t->index).text, a->is_write ? "writes" : "reads",
              plan->tensors[a->tensor].name, (long long)a->row, (long long)col, (long long)a->end);
}

/* ---- recording ---- */

static bool add_span(perk_sim_task *t, perk_sim_spans *spans, size_t task_begin, perk_sim_span span) {
    perk_sim_span *last = spans->count > task_begin ? &spans->items[spans->count - 1] : NULL;
    if (last && last->tensor == span.tensor && last->begin + last->count == span.begin) {
        last->count += span.count;
        return true;
    }
    if (!grow(t, &spans->items, &spans->capacity, spans->count + 1, sizeof *spans->items)) return false;
    spans->items[spans->count++] = span;
    return true;
}

static int32_t first_version_of_step(const perk_sim_task *t) {
    return 1 + (t->sim->steps_before + t->step) * t->sim->plan->task_count;
}

/* Activations are to be read after tasks of this step have written them, KV pages after any. */
static void check_written(perk_sim_task *t, const access *a, uint32_t begin) {
    const perk_plan_tensor *p = &t->sim->plan->tensors[a->tensor];
    uint32_t end = (uint32_t)((a->place + a->live_bytes + PERK_SIM_GRANULE - 1) / PERK_SIM_GRANULE);
    int32_t least = p->space == PERK_SPACE_KV ? 1 : first_version_of_step(t);
    if (p->external_input) return;
    for (uint32_t g = begin; g < end; g++)
        if (t->memory->versions[g] < least) {
            perk_sim_text where = perk_sim_place_text(t->sim, a->tensor, (uint64_t)g * PERK_SIM_GRANULE);
            perk_sim_fail(t, "reads %s, which no earlier stage %s", where.text,
                          p->space == PERK_SPACE_KV ? "has written" : "of the step has written");
            return;
        }
}

/* What a task reads it must not write, but where every element is read just before it is written. */
static void check_overlap(perk_sim_task *t, const access *a, uint32_t begin, uint32_t count) {
    perk_simulator *sim = t->sim;
    for (uint32_t g = begin; g < begin + count; g++) {
        if (sim->write_mark[g] == sim->mark || (a->is_write && sim->read_mark[g] == sim->mark)) {
            perk_sim_text where = perk_sim_place_text(sim, a->tensor, (uint64_t)g * PERK_SIM_GRANULE);
            perk_sim_fail(t, "%s %s, which it %s itself", a->is_write ? "writes" : "reads", where.text,
                          sim->write_mark[g] == sim->mark ? "has written" : "reads");
            return;
        }
        if (a->is_write)
            sim->write_mark[g] = sim->mark;
        else if (!a->in_place)
            sim->read_mark[g] = sim->mark;
    }
}

static void record(perk_sim_task *t, const access *a) {
    perk_sim_trace *trace = &t->sim->trace;
    struct perk_sim_task_trace *own =
        &trace->tasks[(size_t)t->step * (size_t)t->sim->plan->task_count + (size_t)t->index];
    uint32_t begin = (uint32_t)(a->place / PERK_SIM_GRANULE);
    uint32_t count = (uint32_t)((a->place + a->bytes + PERK_SIM_GRANULE - 1) / PERK_SIM_GRANULE) - begin;
    perk_sim_span span = {.begin = begin, .count = count, .tensor = a->tensor};
    check_overlap(t, a, begin, count);
    if (a->is_write) {
        add_span(t, &trace->writes, own->write_begin, span);
        return;
    }
    check_written(t, a, begin);
    span.expected = (uint32_t)trace->version_count;
    if (!grow(t, &trace->versions, &trace->version_capacity, trace->version_count + count, sizeof *trace->versions) ||
        !add_span(t, &trace->reads, own->read_begin, span))
        return;
    memcpy(trace->versions + trace->version_count, t->memory->versions + begin, count * sizeof *trace->versions);
    trace->version_count += count;
}

/* ---- accesses ---- */

static const void *read_at(perk_sim_task *t, const access *a) {
    bool is_constant = t->sim->plan->tensors[a->tensor].space == PERK_SPACE_CONSTANTS;
    if (t->records) check_declared(t, a);
    if (t->records && !is_constant) record(t, a);
    if (t->status) return NULL;
    return (is_constant ? t->sim->constants : t->memory->bytes) + a->place;
}

static void *write_at(perk_sim_task *t, const access *a) {
    perk_sim_pending *p = t->pending;
    if (t->sim->plan->tensors[a->tensor].space == PERK_SPACE_CONSTANTS)
        perk_sim_fail(t, "writes %.95s, which is written at load only", t->sim->plan->tensors[a->tensor].name);
    if (t->records && !t->status) {
        check_declared(t, a);
        record(t, a);
    }
    if (t->status || !grow(t, &p->pieces, &p->piece_capacity, p->piece_count + 1, sizeof *p->pieces) ||
        !grow(t, &p->bytes, &p->byte_capacity, p->byte_count + a->bytes, 1))
        return NULL;
    p->pieces[p->piece_count++] = (perk_sim_piece){a->place, p->byte_count, a->bytes};
    p->byte_count += perk_round_up(a->bytes, 16);
    /* rounding may leave byte_count beyond byte_capacity, never a piece */
    return p->bytes + p->pieces[p->piece_count - 1].at;
}

const void *perk_sim_read(perk_sim_task *t, int role, perk_dtype dtype, int64_t row, int64_t col, int64_t count) {
    access a;
    return locate(t, role, dtype, row, col, count, &a) ? read_at(t, &a) : NULL;
}

const void *perk_sim_read_in_place(perk_sim_task *t, int role, perk_dtype dtype, int64_t row, int64_t col,
                                   int64_t count) {
    access a;
    if (!locate(t, role, dtype, row, col, count, &a)) return NULL;
    a.in_place = true;
    return read_at(t, &a);
}

void *perk_sim_write(perk_sim_task *t, int role, perk_dtype dtype, int64_t row, int64_t col, int64_t count) {
    access a;
    if (!locate(t, role, dtype, row, col, count, &a)) return NULL;
    a.is_write = true;
    return write_at(t, &a);
}

/* ---- KV pages: K and V of a page as [position][dimension], for each layer, page and KV head ---- */

static bool locate_kv(perk_sim_task *t, int which, int head, int request, int position, int count, access *out) {
    const perk_simulator *sim = t->sim;
    const perk_config *config = &sim->config;
    const perk_attention_params *p = &t->op->attention;
    int layer = t->stage->scalar;
    if (t->status) return false;
    bool inside = layer >= 0 && layer < sim->graph->kv_layer_count && head >= 0 && head < p->num_kv_heads &&
                  request >= 0 && request < config->max_num_batched_requests && position >= 0 &&
                  position < config->max_seq_length && count >= 1;
    int page = inside ? perk_sim_page_of(t, request, position) : -1, slot = position % config->page_size;
    if (page < 0 || page >= config->max_num_pages || count > config->page_size - slot) {
        perk_sim_fail(t, "uses position %d of request %d, head %d, layer %d, which is in no KV page", position, request,
                      head, layer);
        return false;
    }
    uint64_t vector = (uint64_t)p->head_dim * 2, vectors = (uint64_t)config->page_size;
    uint64_t index = ((uint64_t)layer * (uint64_t)config->max_num_pages + (uint64_t)page) * (uint64_t)p->num_kv_heads;
    uint64_t first = ((index + (uint64_t)head) * 2 + (uint64_t)which) * vectors + (uint64_t)slot;
    *out = (access){.tensor = sim->kv_tensors[layer],
                    .row = sim->slot_rows[page * config->page_size + slot],
                    .col = head,
                    .end = head + 1,
                    .place = sim->activation_bytes + first * vector,
                    .bytes = (uint64_t)count * vector,
                    .live_bytes = (uint64_t)count * vector};
    return true;
}

/* The plan has a row of the KV tensor for each token of a step: that of the token that wrote a position. */
static void check_kv_rows(perk_sim_task *t, const access *a, int page, int slot, int count) {
    access one = *a;
    for (int i = 0; i < count; i++) {
        one.row = t->sim->slot_rows[page * t->sim->config.page_size + slot + i];
        check_declared(t, &one);
    }
}

const uint16_t *perk_sim_read_kv(perk_sim_task *t, int which, int head, int request, int position, int count) {
    access a;
    if (!locate_kv(t, which, head, request, position, count, &a)) return NULL;
    if (t->records) {
        int page = perk_sim_page_of(t, request, position), slot = position % t->sim->config.page_size;
        check_kv_rows(t, &a, page, slot, count);
        record(t, &a);
    }
    return t->status ? NULL : (const uint16_t *)(const void *)(t->memory->bytes + a.place);
}

uint16_t *perk_sim_write_kv(perk_sim_task *t, int which, int head, int request, int position, int token) {
    access a;
    if (!locate_kv(t, which, head, request, position, 1, &a)) return NULL;
    a.is_write = true;
    a.row = token;
    return write_at(t, &a);
}

/* ---- weights ---- */

void perk_sim_stream(perk_sim_task *t, int tile) {
    int tensor = t->stage->stream.tensor;
    if (!t->records || t->status) return;
    if (tensor < 0) {
        perk_sim_fail(t, "streams no weights");
        return;
    }
    access a = {.tensor = tensor, .end = t->sim->plan->tensors[tensor].cols};
    for (a.row = (int64_t)tile * PERK_TILE_ROWS; a.row < (int64_t)(tile + 1) * PERK_TILE_ROWS; a.row++)
        check_declared(t, &a);
}
