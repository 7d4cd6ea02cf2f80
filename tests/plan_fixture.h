/* Small plans by hand, for the tests of everything that reads plans. Tasks are added in any order of workers; the
 * fixture keeps what belongs to them and lays the plan's arrays out when asked. Header only: a test is one program. */
#ifndef PERK_TESTS_PLAN_FIXTURE_H
#define PERK_TESTS_PLAN_FIXTURE_H

#include "src/plan.h"
#include "test.h"

enum { FIXTURE_TASK_ITEMS = 8 };

typedef struct fixture_task {
    perk_task task; /* its ranges are filled by fixture_plan */
    perk_wait waits[FIXTURE_TASK_ITEMS];
    perk_signal signals[FIXTURE_TASK_ITEMS];
    perk_region reads[FIXTURE_TASK_ITEMS], writes[FIXTURE_TASK_ITEMS];
    int wait_count, signal_count, read_count, write_count;
} fixture_task;

typedef struct plan_fixture {
    int workers;
    perk_plan_tensor *tensors;
    perk_stage *stages;
    fixture_task *tasks;
    int tensor_count, stage_count, task_count, counter_count;
    uint64_t space_bytes[PERK_SPACE_COUNT];
} plan_fixture;

#define FIXTURE_GROW(array, count)                                                                                     \
    do {                                                                                                               \
        if (((count) & ((count)-1)) == 0)                                                                              \
            (array) = perk_realloc_array((array), (count) ? 2 * (size_t)(count) : 1, sizeof *(array));                 \
        CHECK(array);                                                                                                  \
        memset(&(array)[count], 0, sizeof *(array));                                                                   \
    } while (0)

/* A bf16 tensor at `offset` of its space; offset -1: behind everything that is there. */
static inline int fixture_tensor(plan_fixture *f, const char *name, perk_space space, int64_t offset, int rows,
                                 int cols) {
    FIXTURE_GROW(f->tensors, f->tensor_count);
    perk_plan_tensor *t = &f->tensors[f->tensor_count];
    snprintf(t->name, sizeof t->name, "%s", name);
    t->graph_tensor = -1;
    t->space = space;
    t->rows = rows;
    t->cols = t->row_stride = cols;
    t->bytes = (uint64_t)rows * (uint64_t)cols * 2;
    t->offset = offset < 0 ? perk_round_up(f->space_bytes[space], 256) : (uint64_t)offset;
    f->space_bytes[space] = PERK_MAX(f->space_bytes[space], t->offset + t->bytes);
    return f->tensor_count++;
}

/* A stage with a counter of its own: both have the same number as long as no other counter is added. */
static inline int fixture_stage(plan_fixture *f, const char *name) {
    FIXTURE_GROW(f->stages, f->stage_count);
    perk_stage *s = &f->stages[f->stage_count];
    snprintf(s->name, sizeof s->name, "%s", name);
    s->counter = f->counter_count++;
    s->stream.tensor = -1;
    for (int i = 0; i < PERK_RECORD_OPERANDS; i++) s->operands[i] = -1;
    return f->stage_count++;
}

/* The other calls change the task that was added last. It does one unit of its stage and signals the stage's counter.
 * Returns its index; indices hold until fixture_swap. */
static inline int fixture_task_add(plan_fixture *f, int stage, int worker) {
    FIXTURE_GROW(f->tasks, f->task_count);
    fixture_task *t = &f->tasks[f->task_count];
    perk_stage *s = &f->stages[stage];
    t->task = (perk_task){.stage = stage, .worker = worker, .first = s->unit_count, .stride = 1, .count = 1};
    s->unit_count++;
    s->task_count++;
    t->signals[t->signal_count++] = (perk_signal){s->counter, 1};
    return f->task_count++;
}

static inline void fixture_wait(plan_fixture *f, int counter, int needed) {
    fixture_task *t = &f->tasks[f->task_count - 1];
    CHECK(t->wait_count < FIXTURE_TASK_ITEMS);
    t->waits[t->wait_count++] = (perk_wait){counter, needed};
}

/* Columns [col, col + cols) of all rows. */
static inline perk_region fixture_region(const plan_fixture *f, int tensor, int col, int cols) {
    return (perk_region){tensor, 0, f->tensors[tensor].rows, col, cols, 0, 1};
}

static inline void fixture_read(plan_fixture *f, int tensor, int col, int cols) {
    fixture_task *t = &f->tasks[f->task_count - 1];
    CHECK(t->read_count < FIXTURE_TASK_ITEMS);
    t->reads[t->read_count++] = fixture_region(f, tensor, col, cols);
}

static inline void fixture_read_all(plan_fixture *f, int tensor) {
    fixture_read(f, tensor, 0, f->tensors[tensor].cols);
}

static inline void fixture_write(plan_fixture *f, int tensor, int col, int cols) {
    fixture_task *t = &f->tasks[f->task_count - 1];
    CHECK(t->write_count < FIXTURE_TASK_ITEMS);
    t->writes[t->write_count++] = fixture_region(f, tensor, col, cols);
}

/* Waits for all tasks that the stage has so far. */
static inline void fixture_wait_stage(plan_fixture *f, int stage) {
    fixture_wait(f, f->stages[stage].counter, f->stages[stage].task_count);
}

static inline void fixture_swap(plan_fixture *f, int a, int b) {
    fixture_task t = f->tasks[a];
    f->tasks[a] = f->tasks[b];
    f->tasks[b] = t;
}

/* The plan of what was added, tasks of a worker in the order of adding. Owns all its memory: fixture_plan_free. */
static inline perk_plan *fixture_plan(const plan_fixture *f) {
    perk_plan *p = perk_calloc(1, sizeof *p);
    CHECK(p);
    int waits = 0, signals = 0, regions = 0;
    for (int i = 0; i < f->task_count; i++) {
        waits += f->tasks[i].wait_count;
        signals += f->tasks[i].signal_count;
        regions += f->tasks[i].read_count + f->tasks[i].write_count;
    }
    p->device.worker_count = f->workers;
    p->tensor_count = f->tensor_count;
    p->stage_count = f->stage_count;
    p->counter_count = f->counter_count;
    p->kind_count = 1;
    p->tensors = perk_calloc((size_t)f->tensor_count, sizeof *p->tensors);
    p->stages = perk_calloc((size_t)f->stage_count, sizeof *p->stages);
    p->kinds = perk_calloc(1, sizeof *p->kinds);
    p->counter_per_step = perk_calloc((size_t)f->counter_count, sizeof *p->counter_per_step);
    p->tasks = perk_calloc((size_t)f->task_count, sizeof *p->tasks);
    p->worker_begin = perk_calloc((size_t)f->workers + 1, sizeof *p->worker_begin);
    p->waits = perk_calloc((size_t)waits, sizeof *p->waits);
    p->signals = perk_calloc((size_t)signals, sizeof *p->signals);
    p->regions = perk_calloc((size_t)regions, sizeof *p->regions);
    CHECK(p->tensors && p->stages && p->kinds && p->counter_per_step && p->tasks && p->worker_begin && p->waits &&
          p->signals && p->regions);
    if (f->tensor_count) memcpy(p->tensors, f->tensors, (size_t)f->tensor_count * sizeof *p->tensors);
    if (f->stage_count) memcpy(p->stages, f->stages, (size_t)f->stage_count * sizeof *p->stages);
    memcpy(p->space_bytes, f->space_bytes, sizeof p->space_bytes);
    for (int worker = 0; worker < f->workers; worker++) {
        for (int i = 0; i < f->task_count; i++) {
            const fixture_task *from = &f->tasks[i];
            if (from->task.worker != worker) continue;
            perk_task *t = &p->tasks[p->task_count++];
            *t = from->task;
            t->wait_begin = p->wait_count;
            for (int j = 0; j < from->wait_count; j++) p->waits[p->wait_count++] = from->waits[j];
            t->wait_end = p->wait_count;
            t->signal_begin = p->signal_count;
            for (int j = 0; j < from->signal_count; j++) {
                p->signals[p->signal_count++] = from->signals[j];
                p->counter_per_step[from->signals[j].counter] += from->signals[j].amount;
            }
            t->signal_end = p->signal_count;
            t->read_begin = p->region_count;
            for (int j = 0; j < from->read_count; j++) p->regions[p->region_count++] = from->reads[j];
            t->read_end = t->write_begin = p->region_count;
            for (int j = 0; j < from->write_count; j++) p->regions[p->region_count++] = from->writes[j];
            t->write_end = p->region_count;
        }
        p->worker_begin[worker + 1] = p->task_count;
    }
    return p;
}

static inline void fixture_plan_free(perk_plan *p) {
    if (!p) return;
    free(p->tensors);
    free(p->stages);
    free(p->kinds);
    free(p->counter_per_step);
    free(p->tasks);
    free(p->worker_begin);
    free(p->waits);
    free(p->signals);
    free(p->regions);
    free(p);
}

static inline void fixture_free(plan_fixture *f) {
    free(f->tensors);
    free(f->stages);
    free(f->tasks);
    *f = (plan_fixture){0};
}

/* ---- a decoder's plan ------------------------------------------------------------------------------------------ */

/* Widths in tiles of 16 columns. */
typedef struct fixture_model {
    int workers, layers, rows;
    int hidden, qkv, heads, ffn, vocab;
} fixture_model;

enum { FIXTURE_TILE = 16 };

/* Worker `worker`'s share of the `tiles` of `tensor`, strided like real plans: worker, worker + workers, ... */
static inline perk_region fixture_tiles(const plan_fixture *f, int tensor, int tiles, int worker) {
    int repeat = (tiles - worker + f->workers - 1) / f->workers;
    return (perk_region){tensor,
                         0,
                         f->tensors[tensor].rows,
                         worker * FIXTURE_TILE,
                         FIXTURE_TILE,
                         repeat > 1 ? f->workers * FIXTURE_TILE : 0,
                         repeat};
}

/* One task a worker, as far as there are tiles: waits for all of `before`, reads all of `in` (and its own tiles of
 * `out` where `in_place`), writes its tiles of `out`. before < 0: the first stage, which waits for the end of the step
 * before on counter 0 - before - 1. */
static inline int fixture_matrix_stage(plan_fixture *f, const char *name, int before, int in, int out, int tiles,
                                       bool in_place) {
    int stage = fixture_stage(f, name);
    for (int worker = 0; worker < PERK_MIN(tiles, f->workers); worker++) {
        fixture_task_add(f, stage, worker);
        fixture_wait(f, f->stages[before].counter, f->stages[before].task_count);
        fixture_read_all(f, in);
        fixture_task *t = &f->tasks[f->task_count - 1];
        if (in_place) t->reads[t->read_count++] = fixture_tiles(f, out, tiles, worker);
        t->writes[t->write_count++] = fixture_tiles(f, out, tiles, worker);
    }
    return stage;
}

/* Attention by heads: reads its part of q, writes new keys to the KV cache, reads it, writes its part of `out`. */
static inline int fixture_attention_stage(plan_fixture *f, const char *name, int before, int qkv, int kv, int out,
                                          const fixture_model *m) {
    int stage = fixture_stage(f, name);
    int q = m->qkv * FIXTURE_TILE / m->heads, head = m->hidden * FIXTURE_TILE / m->heads;
    int per_kv = f->tensors[kv].cols / m->heads;
    for (int i = 0; i < m->heads; i++) {
        fixture_task_add(f, stage, i % f->workers);
        fixture_wait(f, f->stages[before].counter, f->stages[before].task_count);
        fixture_read(f, qkv, i * q, q);
        fixture_read(f, kv, i * per_kv, per_kv);
        fixture_write(f, kv, i * per_kv, per_kv);
        fixture_write(f, out, i * head, head);
    }
    return stage;
}

/* Seven stages a layer less norms: embed, then qkv, attention, o, gate_up, down in every layer, logits, argmax.
 * Activations of layers share bytes, as the arena of a real plan does; the residual is updated in place. */
static inline plan_fixture fixture_model_plan(const fixture_model *m) {
    plan_fixture f = {.workers = m->workers};
    char name[96];
    int T = FIXTURE_TILE;
    int tokens = fixture_tensor(&f, "tokens", PERK_SPACE_ACTIVATIONS, -1, m->rows, 1);
    f.tensors[tokens].external_input = true;
    int x = fixture_tensor(&f, "x", PERK_SPACE_ACTIVATIONS, -1, m->rows, m->hidden * T);
    int64_t qkv_at = (int64_t)perk_round_up(f.space_bytes[PERK_SPACE_ACTIVATIONS], 256);
    int64_t attention_at = (int64_t)perk_round_up((uint64_t)qkv_at + (uint64_t)(m->rows * m->qkv * T * 2), 256);
    int picked = -1, before = fixture_stage(&f, "embed");
    for (int i = 0; i < PERK_MIN(m->hidden, m->workers); i++) {
        fixture_task_add(&f, before, i);
        fixture_read_all(&f, tokens);
        f.tasks[f.task_count - 1].writes[f.tasks[f.task_count - 1].write_count++] = fixture_tiles(&f, x, m->hidden, i);
    }
    int embed_tasks = f.task_count;
    for (int layer = 0; layer < m->layers; layer++) {
#define LAYER_NAME(text) (snprintf(name, sizeof name, "layers.%d." text, layer), name)
        int kv = fixture_tensor(&f, LAYER_NAME("kv"), PERK_SPACE_KV, -1, 64, m->heads * T);
        int qkv = fixture_tensor(&f, LAYER_NAME("qkv.out"), PERK_SPACE_ACTIVATIONS, qkv_at, m->rows, m->qkv * T);
        int mixed = fixture_tensor(&f, LAYER_NAME("attention.out"), PERK_SPACE_ACTIVATIONS, attention_at, m->rows,
                                   m->hidden * T);
        int wide = fixture_tensor(&f, LAYER_NAME("gate_up.out"), PERK_SPACE_ACTIVATIONS, qkv_at, m->rows, m->ffn * T);
        before = fixture_matrix_stage(&f, LAYER_NAME("qkv"), before, x, qkv, m->qkv, false);
        before = fixture_attention_stage(&f, LAYER_NAME("attention"), before, qkv, kv, mixed, m);
        before = fixture_matrix_stage(&f, LAYER_NAME("o"), before, mixed, x, m->hidden, true);
        before = fixture_matrix_stage(&f, LAYER_NAME("gate_up"), before, x, wide, m->ffn, false);
        before = fixture_matrix_stage(&f, LAYER_NAME("down"), before, wide, x, m->hidden, true);
#undef LAYER_NAME
    }
    int logits = fixture_tensor(&f, "logits", PERK_SPACE_ACTIVATIONS, -1, m->rows, m->vocab * T);
    picked = fixture_tensor(&f, "picked", PERK_SPACE_ACTIVATIONS, -1, m->rows, 1);
    before = fixture_matrix_stage(&f, "logits", before, x, logits, m->vocab, false);
    int argmax = fixture_stage(&f, "argmax");
    fixture_task_add(&f, argmax, 0);
    fixture_wait_stage(&f, before);
    fixture_read_all(&f, logits);
    fixture_write(&f, picked, 0, 1);
    for (int i = 0; i < embed_tasks; i++)
        f.tasks[i].waits[f.tasks[i].wait_count++] = (perk_wait){f.stages[argmax].counter, 0};
    return f;
}

#endif
