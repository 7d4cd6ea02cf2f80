/* What every piece of memory has gone through, and whether the next access may come on top of it.
 *
 * The distinct regions that tasks use are areas. The boundaries of a tensor's areas cut it into cells; a cell knows
 * its last write, and an area that is read knows who read it and who wrote any of its cells, so that a read looks at
 * one clock and a write at the cells it writes. Tensors that share bytes are kept apart as wholes: the first write to
 * one ends the content of the others and must come after all accesses to them. */
#include "check.h"

#include <stdio.h>
#include <xxhash.h>

/* For every worker the time of its last access; 0: none. As long as one worker is all, no array is needed. */
typedef struct access_clock {
    int32_t worker, time; /* NOBODY, MANY: see below */
    int32_t *times;       /* [clock_size]; owned by memory.blocks */
} access_clock;
enum { NOBODY = -1, MANY = -2 };

/* The latest stage that has done something in this life, and its task, or SEVERAL. */
typedef struct stage_mark {
    int32_t stage, task;
} stage_mark;
enum { SEVERAL = -2 };

typedef struct cell {
    int32_t worker, time, stage; /* of the last write; worker NOBODY: none */
    int32_t life;                /* the tensor's when it was written: content of an older life is gone */
    int32_t cover_begin;         /* in memory.covers: the areas read that contain the cell, up to the next cell's */
} cell;

typedef struct area {
    perk_region region; /* normalised */
    bool is_read;
    int32_t cell_begin, cell_count; /* in memory.cell_lists */
    /* of areas that are read */
    access_clock readers, writers;
    int32_t life, missing;    /* cells not written in this life */
    stage_mark read, written; /* in this life; stage -1: not yet */
    int64_t stamp;            /* the last write that was looked at */
} area;

typedef struct tensor_state {
    bool tracked;                       /* somebody writes it */
    bool live;                          /* its content has not been destroyed by a tensor that shares its bytes */
    int32_t life, step_life;            /* step_life: the life with which the step began */
    int32_t destroyed_by;               /* a tensor */
    int32_t overlap_begin, overlap_end; /* in memory.overlaps: tensors that share bytes */
    access_clock all;                   /* tensors with overlaps: accesses of any kind */
    int32_t *fence;                     /* what writes in this life must come after; owned by memory.blocks */
} tensor_state;

typedef struct int_list {
    int32_t *items;
    size_t count, capacity;
} int_list;

typedef struct vector_block {
    struct vector_block *next;
    int32_t used;
    int32_t times[];
} vector_block;
enum { VECTORS_PER_BLOCK = 64 };

struct perk_check_memory {
    const perk_plan *plan;
    int workers, clock_size;
    tensor_state *tensors;
    int32_t *region_areas; /* [region_count] -1: not tracked */
    area *areas;
    int area_count;
    cell *cells; /* one more than cell_count, for cover_begin */
    int cell_count;
    int_list cell_lists, overlaps;
    int32_t *covers;
    vector_block *blocks;
    int64_t stamp;
};

/* The access that is being looked at. */
typedef struct access {
    int task, stage, worker;
    int32_t time;
    const int32_t *clock;
    int region; /* in plan->regions */
} access;

/* ---- access clocks --------------------------------------------------------------------------------------------- */

static int32_t *new_vector(perk_check_memory *m) {
    if (!m->blocks || m->blocks->used == VECTORS_PER_BLOCK) {
        vector_block *block =
            perk_calloc(1, sizeof *block + (size_t)VECTORS_PER_BLOCK * (size_t)m->clock_size * sizeof block->times[0]);
        if (!block) return NULL;
        block->next = m->blocks;
        m->blocks = block;
    }
    return m->blocks->times + (size_t)m->blocks->used++ * (size_t)m->clock_size;
}

static bool add_access(perk_check_memory *m, access_clock *clock, const access *a) {
    if (clock->worker == MANY) {
        clock->times[a->worker] = a->time;
    } else if (clock->worker == NOBODY || clock->worker == a->worker) {
        clock->worker = a->worker;
        clock->time = a->time;
    } else {
        if (!clock->times && !(clock->times = new_vector(m))) return false;
        memset(clock->times, 0, (size_t)m->clock_size * sizeof *clock->times);
        clock->times[clock->worker] = clock->time;
        clock->times[a->worker] = a->time;
        clock->worker = MANY;
    }
    return true;
}

static bool is_before(const perk_check_memory *m, const access_clock *earlier, const int32_t *clock) {
    if (earlier->worker == NOBODY) return true;
    if (earlier->worker != MANY) return earlier->time <= clock[earlier->worker];
    return perk_check_covers(clock, earlier->times, m->clock_size);
}

static int32_t time_of(const access_clock *clock, int worker) {
    if (clock->worker == MANY) return clock->times[worker];
    return clock->worker == worker ? clock->time : 0;
}

/* ---- messages -------------------------------------------------------------------------------------------------- */

static perk_check_text earlier_text(const perk_plan *plan, int worker, int32_t time, const access *a) {
    perk_check_text out = perk_check_task_text(plan, perk_check_task_at(plan, worker, time));
    bool same_step = perk_check_step_at(plan, worker, time) == perk_check_step_at(plan, a->worker, a->time);
    size_t used = strlen(out.text);
    snprintf(out.text + used, sizeof out.text - used, "%s", same_step ? "" : " of the step before");
    return out;
}

static perk_status fail_race(const perk_check_memory *m, const access *a, const char *does, int worker, int32_t time,
                             const char *other, perk_error *err) {
    return perk_fail(err, PERK_UNSAFE_PLAN,
                     "%s %s %s while %s may still %s: no chain of lists and counters orders them",
                     perk_check_task_text(m->plan, a->task).text, does,
                     perk_check_region_text(m->plan, &m->plan->regions[a->region]).text,
                     earlier_text(m->plan, worker, time, a).text, other);
}

/* The same with the first access in `earlier` that is not in the clock. */
static perk_status fail_unordered(const perk_check_memory *m, const access *a, const char *does,
                                  const access_clock *earlier, const char *other, perk_error *err) {
    int worker = 0;
    while (worker < m->workers - 1 && time_of(earlier, worker) <= a->clock[worker]) worker++;
    return fail_race(m, a, does, worker, time_of(earlier, worker), other, err);
}

static perk_status fail_stage_order(const perk_check_memory *m, const access *a, const char *does, int other_stage,
                                    const char *other, perk_error *err) {
    return perk_fail(err, PERK_UNSAFE_PLAN, "%s %s %s after %s %.95s has %s it",
                     perk_check_task_text(m->plan, a->task).text, does,
                     perk_check_region_text(m->plan, &m->plan->regions[a->region]).text,
                     other_stage == a->stage ? "another task of the stage" : "the later stage",
                     m->plan->stages[other_stage].name, other);
}

static bool area_has_cell(const perk_check_memory *m, int index, int cell_index) {
    const area *r = &m->areas[index];
    for (int i = 0; i < r->cell_count; i++)
        if (m->cell_lists.items[r->cell_begin + i] == cell_index) return true;
    return false;
}

/* The task that should have written the cell before `a`: of the nearest stage before; else any; -1: none. */
static int find_writer(const perk_check_memory *m, const access *a, int cell_index) {
    int found = -1;
    for (int i = 0; i < m->plan->task_count; i++) {
        const perk_task *task = &m->plan->tasks[i];
        bool nearer = found < 0 || (task->stage <= a->stage && (m->plan->tasks[found].stage > a->stage ||
                                                                task->stage > m->plan->tasks[found].stage));
        for (int j = task->write_begin; j < task->write_end && nearer; j++)
            if (m->region_areas[j] >= 0 && area_has_cell(m, m->region_areas[j], cell_index)) found = i;
    }
    return found;
}

static perk_status fail_missing(const perk_check_memory *m, const access *a, perk_error *err) {
    const perk_plan *plan = m->plan;
    const perk_region *region = &plan->regions[a->region];
    const tensor_state *t = &m->tensors[region->tensor];
    perk_check_text reader = perk_check_task_text(plan, a->task), place = perk_check_region_text(plan, region);
    if (!t->tracked)
        return perk_fail(err, PERK_UNSAFE_PLAN, "%s reads %s, which nothing has written: no task writes it",
                         reader.text, place.text);
    const area *r = &m->areas[m->region_areas[a->region]];
    int index = m->cell_lists.items[r->cell_begin];
    for (int i = 1; i < r->cell_count && m->cells[index].life == t->life; i++)
        index = m->cell_lists.items[r->cell_begin + i];
    if (m->cells[index].worker != NOBODY && m->cells[index].life >= t->step_life)
        return perk_fail(err, PERK_UNSAFE_PLAN, "%s reads %s, which %.95s has destroyed: the two share bytes",
                         reader.text, place.text, plan->tensors[t->destroyed_by].name);
    int writer = find_writer(m, a, index);
    if (writer < 0 || plan->tasks[writer].stage > a->stage)
        return perk_fail(err, PERK_UNSAFE_PLAN, "%s reads %s, of which nothing has written a part in this step",
                         reader.text, place.text);
    return perk_fail(err, PERK_UNSAFE_PLAN,
                     "%s reads %s, of which nothing has written a part in this step: %s does, but no chain of lists "
                     "and counters puts it first",
                     reader.text, place.text, perk_check_task_text(plan, writer).text);
}

static perk_status fail_fence(const perk_check_memory *m, const access *a, perk_error *err) {
    const perk_plan *plan = m->plan;
    const tensor_state *t = &m->tensors[plan->regions[a->region].tensor];
    for (int i = t->overlap_begin; i < t->overlap_end; i++) {
        int other = m->overlaps.items[i];
        const access_clock *all = &m->tensors[other].all;
        for (int worker = 0; worker < m->workers; worker++)
            if (time_of(all, worker) > a->clock[worker])
                return perk_fail(err, PERK_UNSAFE_PLAN,
                                 "%s writes %s while %s may still use %.95s, which shares its bytes: no chain of lists "
                                 "and counters orders them",
                                 perk_check_task_text(plan, a->task).text,
                                 perk_check_region_text(plan, &plan->regions[a->region]).text,
                                 earlier_text(plan, worker, time_of(all, worker), a).text, plan->tensors[other].name);
    }
    return perk_fail(err, PERK_INTERNAL, "the plan checker lost an access");
}

/* Device code reads and writes as it goes. */
static perk_status fail_own(const perk_check_memory *m, const access *a, perk_error *err) {
    return perk_fail(err, PERK_UNSAFE_PLAN, "%s writes %s and also uses another tensor that shares its bytes",
                     perk_check_task_text(m->plan, a->task).text,
                     perk_check_region_text(m->plan, &m->plan->regions[a->region]).text);
}

static perk_status fail_result(const perk_check_memory *m, const access *a, int result, perk_error *err) {
    return perk_fail(err, PERK_UNSAFE_PLAN,
                     "%s writes %s, which shares bytes with %.95s: the host reads that after the step",
                     perk_check_task_text(m->plan, a->task).text,
                     perk_check_region_text(m->plan, &m->plan->regions[a->region]).text, m->plan->tensors[result].name);
}

/* ---- accesses -------------------------------------------------------------------------------------------------- */

static perk_status out_of_memory(perk_error *err) { return perk_fail_memory(err, "the plan checker's clocks"); }

/* Begins the tensor's present life in the area where that has not been done. */
static void refresh(area *r, const tensor_state *t) {
    if (r->life == t->life) return;
    r->life = t->life;
    r->missing = r->cell_count;
    r->read = r->written = (stage_mark){-1, -1};
}

static void mark_stage(stage_mark *mark, const access *a) {
    if (mark->stage < a->stage)
        *mark = (stage_mark){a->stage, a->task};
    else if (mark->stage == a->stage && mark->task != a->task)
        mark->task = SEVERAL;
}

/* The stages' order says what content an access means; tasks of one stage are none before the other. */
static bool is_out_of_order(const stage_mark *earlier, const access *a) {
    return earlier->stage > a->stage || (earlier->stage == a->stage && earlier->task != a->task);
}

static perk_status do_read(perk_check_memory *m, const access *a, perk_error *err) {
    const perk_plan_tensor *tensor = &m->plan->tensors[m->plan->regions[a->region].tensor];
    tensor_state *t = &m->tensors[m->plan->regions[a->region].tensor];
    bool must_be_written = tensor->space == PERK_SPACE_ACTIVATIONS && !tensor->external_input;
    if (!t->tracked) return must_be_written ? fail_missing(m, a, err) : PERK_OK;
    area *r = &m->areas[m->region_areas[a->region]];
    refresh(r, t);
    if (must_be_written && r->missing) return fail_missing(m, a, err);
    if (!is_before(m, &r->writers, a->clock)) return fail_unordered(m, a, "reads", &r->writers, "write it", err);
    if (is_out_of_order(&r->written, a)) return fail_stage_order(m, a, "reads", r->written.stage, "written", err);
    mark_stage(&r->read, a);
    bool shared = t->overlap_begin < t->overlap_end;
    return add_access(m, &r->readers, a) && (!shared || add_access(m, &t->all, a)) ? PERK_OK : out_of_memory(err);
}

/* The host reads it when the step is done. */
static bool is_result(const perk_plan *plan, const perk_plan_tensor *t) {
    if (!plan->graph || t->graph_tensor < 0) return false;
    return plan->graph->tensors[t->graph_tensor]->kept || t->dtype != PERK_BF16;
}

/* The first write in a life: ends the content of all tensors that share bytes with it. */
static perk_status come_alive(perk_check_memory *m, const access *a, int index, perk_error *err) {
    tensor_state *t = &m->tensors[index];
    if (!t->fence && !(t->fence = new_vector(m))) return out_of_memory(err);
    memset(t->fence, 0, (size_t)m->clock_size * sizeof *t->fence);
    for (int i = t->overlap_begin; i < t->overlap_end; i++) {
        tensor_state *other = &m->tensors[m->overlaps.items[i]];
        if (other->all.worker == MANY)
            perk_check_join(t->fence, other->all.times, m->clock_size);
        else if (other->all.worker != NOBODY)
            t->fence[other->all.worker] = PERK_MAX(t->fence[other->all.worker], other->all.time);
        if (other->live && is_result(m->plan, &m->plan->tensors[m->overlaps.items[i]]))
            return fail_result(m, a, m->overlaps.items[i], err);
        other->live = false;
        other->life++;
        other->destroyed_by = index;
    }
    t->live = true;
    return PERK_OK;
}

/* A write to a part of an area that tasks read. */
static perk_status write_over(perk_check_memory *m, const access *a, area *r, perk_error *err) {
    if (!is_before(m, &r->readers, a->clock)) return fail_unordered(m, a, "writes", &r->readers, "read it", err);
    if (is_out_of_order(&r->read, a)) return fail_stage_order(m, a, "writes", r->read.stage, "read", err);
    mark_stage(&r->written, a);
    r->stamp = m->stamp;
    return add_access(m, &r->writers, a) ? PERK_OK : out_of_memory(err);
}

static perk_status write_cell(perk_check_memory *m, const access *a, const tensor_state *t, int index,
                              perk_error *err) {
    cell *c = &m->cells[index];
    if (c->worker != NOBODY && c->time > a->clock[c->worker])
        return fail_race(m, a, "writes", c->worker, c->time, "write it", err);
    bool renewed = c->life != t->life;
    bool other_task = c->worker != a->worker || c->time != a->time;
    if (!renewed && other_task && c->stage >= a->stage)
        return fail_stage_order(m, a, "writes", c->stage, "written", err);
    c->worker = a->worker;
    c->time = a->time;
    c->stage = a->stage;
    c->life = t->life;
    for (int i = c->cover_begin; i < c[1].cover_begin; i++) {
        area *r = &m->areas[m->covers[i]];
        refresh(r, t);
        r->missing -= renewed;
        perk_status status = r->stamp != m->stamp ? write_over(m, a, r, err) : PERK_OK;
        if (status) return status;
    }
    return PERK_OK;
}

static perk_status do_write(perk_check_memory *m, const access *a, perk_error *err) {
    int index = m->plan->regions[a->region].tensor;
    tensor_state *t = &m->tensors[index];
    if (t->overlap_begin < t->overlap_end) {
        perk_status status = t->live ? PERK_OK : come_alive(m, a, index, err);
        if (status) return status;
        if (t->fence[a->worker] == a->time) return fail_own(m, a, err);
        if (!perk_check_covers(a->clock, t->fence, m->clock_size)) return fail_fence(m, a, err);
        if (!add_access(m, &t->all, a)) return out_of_memory(err);
    }
    m->stamp++;
    const area *r = &m->areas[m->region_areas[a->region]];
    for (int i = 0; i < r->cell_count; i++) {
        perk_status status = write_cell(m, a, t, m->cell_lists.items[r->cell_begin + i], err);
        if (status) return status;
    }
    return PERK_OK;
}

perk_status perk_check_memory_task(perk_check_memory *m, int task, int32_t time, const int32_t *clock,
                                   perk_error *err) {
    const perk_task *p = &m->plan->tasks[task];
    access a = {task, p->stage, p->worker, time, clock, 0};
    perk_status status = PERK_OK;
    for (a.region = p->read_begin; a.region < p->read_end && !status; a.region++) status = do_read(m, &a, err);
    for (a.region = p->write_begin; a.region < p->write_end && !status; a.region++) status = do_write(m, &a, err);
    return status;
}

void perk_check_memory_begin_step(perk_check_memory *m) {
    for (int i = 0; i < m->plan->tensor_count; i++) {
        m->tensors[i].live = false;
        m->tensors[i].step_life = ++m->tensors[i].life;
    }
}

void perk_check_memory_forget(perk_check_memory *m) {
    for (int i = 0; i < m->plan->tensor_count; i++) m->tensors[i].all.worker = NOBODY;
    for (int i = 0; i < m->cell_count; i++) m->cells[i].worker = NOBODY;
    for (int i = 0; i < m->area_count; i++) m->areas[i].readers.worker = m->areas[i].writers.worker = NOBODY;
}

/* ---- creation -------------------------------------------------------------------------------------------------- */

/* Makes the list longer by `count` items, for the caller to fill. NULL when out of memory. */
static int32_t *extend(int_list *list, size_t count) {
    if (list->count + count > list->capacity) {
        size_t capacity = PERK_MAX(list->capacity * 2, list->count + count + 255);
        int32_t *items = perk_realloc_array(list->items, capacity, sizeof *items);
        if (!items) return NULL;
        list->items = items;
        list->capacity = capacity;
    }
    list->count += count;
    return list->items + list->count - count;
}

static perk_status too_fine(const perk_plan *plan, int tensor, perk_error *err) {
    return perk_fail(err, PERK_LIMIT, "the regions of %.95s make more than %d pieces: they cannot be checked",
                     plan->tensors[tensor].name, PERK_CHECK_MAX_PIECES);
}

/* Equal sets of elements get equal fields, as far as that is cheap. */
static perk_region normalise(perk_region r) {
    if (r.repeat > 1 && r.col_stride == r.col_count) {
        r.col_count *= r.repeat; /* within the tensor's columns, so within int32_t */
        r.repeat = 1;
    }
    if (r.repeat == 1) r.col_stride = 0;
    return r;
}

/* Finds or adds the area of a region. `table` has `mask` + 1 entries, -1 where free. */
static int find_area(perk_check_memory *m, int32_t *table, size_t mask, const perk_region *region) {
    perk_region r = normalise(*region);
    size_t at = (size_t)XXH3_64bits(&r, sizeof r) & mask;
    for (; table[at] >= 0; at = (at + 1) & mask)
        if (!memcmp(&m->areas[table[at]].region, &r, sizeof r)) return table[at];
    m->areas[m->area_count] = (area){.region = r, .readers.worker = NOBODY, .writers.worker = NOBODY};
    return table[at] = m->area_count++;
}

/* Areas of all regions that tasks use on tracked tensors. */
static perk_status make_areas(perk_check_memory *m, perk_error *err) {
    const perk_plan *plan = m->plan;
    size_t size = 16, count = (size_t)plan->region_count;
    while (size < 2 * count) size *= 2;
    int32_t *table = perk_calloc(size, sizeof *table);
    m->areas = perk_calloc(count, sizeof *m->areas);
    m->region_areas = perk_calloc(count, sizeof *m->region_areas);
    if (!table || !m->areas || !m->region_areas) {
        free(table);
        return perk_fail_memory(err, "the plan checker's regions");
    }
    memset(table, -1, size * sizeof *table);
    memset(m->region_areas, -1, count * sizeof *m->region_areas);
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        for (int pass = 0; pass < 2; pass++)
            for (int j = pass ? task->write_begin : task->read_begin; j < (pass ? task->write_end : task->read_end);
                 j++) {
                if (!m->tensors[plan->regions[j].tensor].tracked) continue;
                if (m->region_areas[j] < 0) m->region_areas[j] = find_area(m, table, size - 1, &plan->regions[j]);
                if (pass == 0) m->areas[m->region_areas[j]].is_read = true;
            }
    }
    free(table);
    return PERK_OK;
}

/* Where the areas of one tensor begin and end along its rows or its columns. All of that lies on multiples of
 * `quantum`, so a boundary's rank is found by indexing. */
typedef struct axis {
    int32_t quantum;
    int32_t *ranks; /* [extent / quantum + 1]: of a boundary its rank, -1 elsewhere */
    int count;      /* boundaries */
} axis;

static int32_t greatest_divisor(int32_t a, int32_t b) {
    while (b) {
        int32_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

static int rank_of(const axis *along, int32_t value) { return along->ranks[value / along->quantum]; }

static void count_boundaries(axis *along, int32_t extent) {
    along->count = 0;
    for (int32_t i = 0; i <= extent / along->quantum; i++)
        if (!along->ranks[i]) along->ranks[i] = along->count++;
}

/* `ranks` is scratch that the axes then point into. */
static perk_status find_boundaries(const perk_check_memory *m, int tensor, const int32_t *areas, int count,
                                   int_list *ranks, axis *rows, axis *cols, perk_error *err) {
    const perk_plan_tensor *t = &m->plan->tensors[tensor];
    *rows = *cols = (axis){0};
    for (int i = 0; i < count; i++) {
        const perk_region *r = &m->areas[areas[i]].region;
        rows->quantum = greatest_divisor(greatest_divisor(r->row_begin, r->row_end), rows->quantum);
        cols->quantum = greatest_divisor(greatest_divisor(r->col_begin, r->col_count), cols->quantum);
        cols->quantum = greatest_divisor(r->col_stride, cols->quantum);
    }
    int64_t row_places = t->rows / rows->quantum + 1, places = row_places + t->cols / cols->quantum + 1;
    if (places > PERK_CHECK_MAX_PIECES) return too_fine(m->plan, tensor, err);
    ranks->count = 0;
    rows->ranks = extend(ranks, (size_t)places);
    if (!rows->ranks) return perk_fail_memory(err, "the plan checker's regions");
    cols->ranks = rows->ranks + row_places;
    memset(rows->ranks, -1, (size_t)places * sizeof *rows->ranks);
    for (int i = 0; i < count; i++) {
        const perk_region *r = &m->areas[areas[i]].region;
        rows->ranks[r->row_begin / rows->quantum] = rows->ranks[r->row_end / rows->quantum] = 0;
        for (int j = 0; j < r->repeat; j++) {
            int32_t begin = r->col_begin + j * r->col_stride;
            cols->ranks[begin / cols->quantum] = cols->ranks[(begin + r->col_count) / cols->quantum] = 0;
        }
    }
    count_boundaries(rows, t->rows);
    count_boundaries(cols, t->cols);
    return PERK_OK;
}

/* Lists the cells of an area. */
static perk_status cut_area(perk_check_memory *m, area *a, int first_cell, const axis *rows, const axis *cols,
                            perk_error *err) {
    const perk_region *r = &a->region;
    int row_begin = rank_of(rows, r->row_begin), row_end = rank_of(rows, r->row_end), width = cols->count - 1;
    a->cell_begin = (int32_t)m->cell_lists.count;
    for (int i = 0; i < r->repeat; i++) {
        int32_t begin = r->col_begin + i * r->col_stride;
        int col_begin = rank_of(cols, begin), col_end = rank_of(cols, begin + r->col_count);
        int64_t pieces = (int64_t)(col_end - col_begin) * (row_end - row_begin);
        if (pieces + (int64_t)m->cell_lists.count > PERK_CHECK_MAX_PIECES) return too_fine(m->plan, r->tensor, err);
        int32_t *cells = extend(&m->cell_lists, (size_t)pieces);
        if (!cells) return perk_fail_memory(err, "the plan checker's cells");
        for (int row = row_begin; row < row_end; row++)
            for (int col = col_begin; col < col_end; col++) *cells++ = first_cell + row * width + col;
    }
    a->cell_count = (int32_t)m->cell_lists.count - a->cell_begin;
    return PERK_OK;
}

/* Cuts one tensor, whose areas are `areas`, into cells. */
static perk_status cut_tensor(perk_check_memory *m, int tensor, const int32_t *areas, int count, int_list *ranks,
                              perk_error *err) {
    axis rows, cols;
    if (!count) return PERK_OK;
    perk_status status = find_boundaries(m, tensor, areas, count, ranks, &rows, &cols, err);
    if (status) return status;
    int64_t cells = (int64_t)(rows.count - 1) * (int64_t)(cols.count - 1);
    if (m->cell_count + cells > PERK_CHECK_MAX_PIECES) return too_fine(m->plan, tensor, err);
    for (int i = 0; i < count && !status; i++)
        status = cut_area(m, &m->areas[areas[i]], m->cell_count, &rows, &cols, err);
    m->cell_count += (int)cells;
    return status;
}

/* Groups the areas by tensor and cuts the tensors. */
static perk_status cut_tensors(perk_check_memory *m, perk_error *err) {
    int tensors = m->plan->tensor_count;
    int_list ranks = {0};
    perk_status status = PERK_OK;
    int32_t *begin = perk_calloc((size_t)tensors + 1, sizeof *begin);
    int32_t *sorted = perk_calloc((size_t)m->area_count, sizeof *sorted);
    if (!begin || !sorted) {
        status = perk_fail_memory(err, "the plan checker's regions");
        goto out;
    }
    for (int i = 0; i < m->area_count; i++) begin[m->areas[i].region.tensor]++;
    for (int i = 0, sum = 0; i <= tensors; i++) {
        sum += begin[i];
        begin[i] = sum; /* the end of its areas: filling backwards leaves the begin */
    }
    for (int i = m->area_count - 1; i >= 0; i--) sorted[--begin[m->areas[i].region.tensor]] = i;
    for (int i = 0; i < tensors && !status; i++)
        status = cut_tensor(m, i, sorted + begin[i], begin[i + 1] - begin[i], &ranks, err);
out:
    free(begin);
    free(sorted);
    free(ranks.items);
    return status;
}

/* Lists for every cell the areas that are read and contain it. */
static perk_status cover_cells(perk_check_memory *m, perk_error *err) {
    m->cells = perk_calloc((size_t)m->cell_count + 2, sizeof *m->cells);
    m->covers = perk_calloc(m->cell_lists.count, sizeof *m->covers);
    if (!m->cells || !m->covers) return perk_fail_memory(err, "the plan checker's cells");
    /* counts go two cells on, so that filling moves cell + 1's begin up to where it belongs */
    for (int i = 0; i < m->area_count; i++)
        for (int j = 0; j < m->areas[i].cell_count && m->areas[i].is_read; j++)
            m->cells[m->cell_lists.items[m->areas[i].cell_begin + j] + 2].cover_begin++;
    for (int i = 2; i < m->cell_count + 2; i++) m->cells[i].cover_begin += m->cells[i - 1].cover_begin;
    for (int i = 0; i < m->area_count; i++)
        for (int j = 0; j < m->areas[i].cell_count && m->areas[i].is_read; j++)
            m->covers[m->cells[m->cell_lists.items[m->areas[i].cell_begin + j] + 1].cover_begin++] = i;
    return PERK_OK;
}

typedef struct byte_range {
    uint64_t begin, end;
    int32_t tensor;
} byte_range;

static int compare_ranges(const void *a, const void *b) {
    const byte_range *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->tensor > y->tensor) - (x->tensor < y->tensor);
}

/* Readers of whole blocks count on zeros between width and stride, which nobody writes. */
static bool needs_zeros(const perk_plan_tensor *t) { return t->dtype == PERK_BF16 && t->cols < t->row_stride; }

static bool is_same_layout(const perk_plan_tensor *x, const perk_plan_tensor *y) {
    return x->offset == y->offset && x->cols == y->cols && x->row_stride == y->row_stride && x->dtype == y->dtype;
}

/* Only what every step writes anew may share bytes: neither what is loaded, nor the host's inputs, nor the KV cache. */
static perk_status check_sharing(const perk_check_memory *m, int a, int b, perk_error *err) {
    const perk_plan_tensor *x = &m->plan->tensors[a], *y = &m->plan->tensors[b];
    const char *reason = NULL;
    if (x->space == PERK_SPACE_CONSTANTS || x->space == PERK_SPACE_WEIGHTS)
        reason = "both are loaded there";
    else if (!m->tensors[a].tracked && !m->tensors[b].tracked)
        return PERK_OK;
    else if (x->space == PERK_SPACE_KV)
        reason = "the KV cache outlives the step";
    else if (x->external_input || y->external_input)
        reason = "the host writes one of them";
    else if ((needs_zeros(x) || needs_zeros(y)) && !is_same_layout(x, y))
        reason = "what lies between the columns and the stride of one must stay zero";
    if (!reason) return PERK_OK;
    return perk_fail(err, PERK_UNSAFE_PLAN, "%.95s and %.95s share bytes, but %s", x->name, y->name, reason);
}

static bool add_pair(int_list *pairs, int32_t a, int32_t b) {
    int32_t *pair = extend(pairs, 2);
    if (pair) pair[0] = a, pair[1] = b;
    return pair != NULL;
}

/* Every pair of tensors of a space that share bytes, in `pairs`: two entries a pair. */
static perk_status find_pairs(const perk_check_memory *m, perk_space space, int_list *pairs, perk_error *err) {
    const perk_plan *plan = m->plan;
    perk_status status = PERK_OK;
    int count = 0;
    byte_range *ranges = perk_calloc((size_t)plan->tensor_count, sizeof *ranges);
    if (!ranges) return perk_fail_memory(err, "the plan checker's tensors");
    for (int i = 0; i < plan->tensor_count; i++) {
        const perk_plan_tensor *t = &plan->tensors[i];
        if (t->space == space) ranges[count++] = (byte_range){t->offset, t->offset + t->bytes, i};
    }
    qsort(ranges, (size_t)count, sizeof *ranges, compare_ranges);
    for (int i = 0; i < count && !status; i++)
        for (int j = i + 1; j < count && ranges[j].begin < ranges[i].end && !status; j++) {
            int a = ranges[i].tensor, b = ranges[j].tensor;
            status = check_sharing(m, a, b, err);
            if (status || !m->tensors[a].tracked || !m->tensors[b].tracked) continue;
            if (pairs->count >= PERK_CHECK_MAX_PIECES)
                status = too_fine(plan, a, err);
            else if (!add_pair(pairs, a, b))
                status = perk_fail_memory(err, "the plan checker's tensors");
        }
    free(ranges);
    return status;
}

static perk_status find_overlaps(perk_check_memory *m, perk_error *err) {
    int_list pairs = {0};
    perk_status status = find_pairs(m, PERK_SPACE_ACTIVATIONS, &pairs, err);
    if (!status) status = find_pairs(m, PERK_SPACE_KV, &pairs, err);
    if (!status) status = find_pairs(m, PERK_SPACE_CONSTANTS, &pairs, err);
    if (!status) status = find_pairs(m, PERK_SPACE_WEIGHTS, &pairs, err);
    for (size_t i = 0; i < pairs.count; i++) m->tensors[pairs.items[i]].overlap_end++;
    for (int i = 0, sum = 0; i < m->plan->tensor_count; i++) {
        m->tensors[i].overlap_begin = sum;
        sum += m->tensors[i].overlap_end;
        m->tensors[i].overlap_end = m->tensors[i].overlap_begin;
    }
    m->overlaps.items = perk_calloc(pairs.count, sizeof *m->overlaps.items);
    if (!status && !m->overlaps.items) status = perk_fail_memory(err, "the plan checker's tensors");
    for (size_t i = 0; i < pairs.count && !status; i++)
        m->overlaps.items[m->tensors[pairs.items[i]].overlap_end++] = pairs.items[i ^ 1];
    free(pairs.items);
    return status;
}

static void find_tracked(perk_check_memory *m) {
    for (int i = 0; i < m->plan->tensor_count; i++) m->tensors[i].all.worker = NOBODY;
    for (int i = 0; i < m->plan->task_count; i++)
        for (int j = m->plan->tasks[i].write_begin; j < m->plan->tasks[i].write_end; j++)
            m->tensors[m->plan->regions[j].tensor].tracked = true;
}

perk_status perk_check_memory_create(perk_check_memory **out, const perk_plan *plan, perk_error *err) {
    *out = NULL;
    perk_check_memory *m = perk_calloc(1, sizeof *m);
    if (!m) return perk_fail_memory(err, "the plan checker");
    m->plan = plan;
    m->workers = plan->device.worker_count;
    m->clock_size = perk_check_clock_size(plan);
    m->tensors = perk_calloc((size_t)plan->tensor_count, sizeof *m->tensors);
    perk_status status = m->tensors ? PERK_OK : perk_fail_memory(err, "the plan checker's tensors");
    if (!status) find_tracked(m);
    if (!status) status = make_areas(m, err);
    if (!status) status = cut_tensors(m, err);
    if (!status) status = cover_cells(m, err);
    if (!status) status = find_overlaps(m, err);
    if (status) {
        perk_check_memory_free(m);
        return status;
    }
    *out = m;
    return PERK_OK;
}

void perk_check_memory_free(perk_check_memory *m) {
    if (!m) return;
    for (vector_block *block = m->blocks, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(m->tensors);
    free(m->region_areas);
    free(m->areas);
    free(m->cells);
    free(m->cell_lists.items);
    free(m->overlaps.items);
    free(m->covers);
    free(m);
}
