/* Runs the plan for two steps, one step after the other, and derives with vector clocks which tasks are certainly
 * complete when a task begins. That the run ends proves that no run can get stuck; the clocks hold for every run.
 *
 * What a wait proves. The signals of a counter fall into segments: those of a step, or, where a wait means a part of a
 * step, those of one stage in a step. While every signal of a segment comes after all signals of the segment before,
 * a counter that has reached the sum up to a segment's end says that all signals up to there were given. Within a
 * segment, a signal is certain when all others together cannot reach the threshold. That segments stay apart is
 * assumed first and held against the resulting clocks then; where it fails, the counter's segments are made coarser,
 * finally it orders nothing, and everything is done again. */
#include "check.h"
#include "plan_steps.h"

#include <stdio.h>

enum { STEPS = 2 };
/* Passes before all counters are taken as coarser: it bounds the time, and gives up no safety. */
enum { PATIENCE = 8 };

typedef enum counter_level { LEVEL_STAGES, LEVEL_STEP, LEVEL_NONE } counter_level;

/* A signal to a segment that some wait needs only in part. */
typedef struct signal_record {
    struct signal_record *previous;
    int32_t worker, before; /* before: what the worker had signalled to this segment earlier */
    int32_t clock[];        /* at the task's end */
} signal_record;

typedef struct segment {
    int32_t stage; /* of its signals, when the counter's level is LEVEL_STAGES */
    int32_t end;   /* the counter's value in a step when all signals up to this segment's last were given */
    bool partial;
    int32_t *totals;               /* partial: by worker, what it signals in a step */
    int32_t *given[STEPS];         /* partial: by worker, what it has signalled so far */
    signal_record *records[STEPS]; /* partial: newest first */
} segment;

typedef struct counter_state {
    counter_level level, next_level;
    int32_t value;                      /* in this step */
    int32_t segment_begin, segment_end; /* in order.segments */
    int32_t first_waiter;               /* a worker; -1: none */
    int32_t lowest_needed;              /* of all waiters */
} counter_state;

typedef struct worker_state {
    int32_t position;    /* in its list */
    int32_t wait;        /* in plan->waits: what blocks it, -1: nothing */
    int32_t next_waiter; /* of the same counter */
} worker_state;

typedef struct order {
    const perk_plan *plan;
    perk_check_memory *memory;
    int workers, clock_size, step;
    int32_t *clocks; /* [workers][clock_size] */
    worker_state *states;
    int32_t *queue; /* workers that can advance: a ring of `workers` entries */
    int queue_head, queue_size;
    counter_state *counters;
    segment *segments;
    int segment_count;
    int32_t *joins;                /* [STEPS][segments][clock_size]: the clocks of the signals given so far */
    bool changed;                  /* a level, in this pass */
    bool restart;                  /* the pass is worth no more */
    int mixed_counter, mixed_task; /* the first counter that came to order nothing, and the task that showed it */
} order;

static int32_t *clock_of(const order *o, int worker) { return o->clocks + (size_t)worker * (size_t)o->clock_size; }

static int32_t *join_of(const order *o, int step, int index) {
    return o->joins + ((size_t)step * (size_t)o->segment_count + (size_t)index) * (size_t)o->clock_size;
}

/* ---- segments -------------------------------------------------------------------------------------------------- */

typedef struct stage_signal {
    int32_t counter, stage, amount;
} stage_signal;

static int compare_stage_signals(const void *a, const void *b) {
    const stage_signal *x = a, *y = b;
    if (x->counter != y->counter) return x->counter < y->counter ? -1 : 1;
    return (x->stage > y->stage) - (x->stage < y->stage);
}

/* The level that the waits ask for: by stages where one of them means a part of a step. */
static void choose_levels(order *o) {
    const perk_plan *plan = o->plan;
    for (int c = 0; c < plan->counter_count; c++) o->counters[c].next_level = LEVEL_NONE;
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].wait_begin; j < plan->tasks[i].wait_end; j++) {
            const perk_wait *wait = &plan->waits[j];
            int64_t per_step = plan->counter_per_step[wait->counter];
            bool part = wait->needed != 0 && wait->needed != per_step && wait->needed > -per_step;
            counter_level level = part ? LEVEL_STAGES : LEVEL_STEP;
            counter_level *old = &o->counters[wait->counter].next_level;
            *old = PERK_MIN(*old, level);
        }
}

/* All signals by counter and stage: by stage 0 alone for counters that are not of LEVEL_STAGES. Sorted, NULL when out
 * of memory. */
static stage_signal *list_signals(const order *o, int *count) {
    const perk_plan *plan = o->plan;
    size_t uses = 0;
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].signal_begin; j < plan->tasks[i].signal_end; j++)
            uses += o->counters[plan->signals[j].counter].level == LEVEL_STAGES;
    stage_signal *list = perk_calloc(uses + (size_t)plan->counter_count, sizeof *list);
    if (!list) return NULL;
    *count = 0;
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].signal_begin; j < plan->tasks[i].signal_end; j++) {
            const perk_signal *signal = &plan->signals[j];
            if (o->counters[signal->counter].level == LEVEL_STAGES)
                list[(*count)++] = (stage_signal){signal->counter, plan->tasks[i].stage, signal->amount};
        }
    for (int c = 0; c < plan->counter_count; c++)
        if (o->counters[c].level == LEVEL_STEP) list[(*count)++] = (stage_signal){c, 0, plan->counter_per_step[c]};
    qsort(list, (size_t)*count, sizeof *list, compare_stage_signals);
    return list;
}

static perk_status make_segments(order *o, perk_error *err) {
    int count = 0;
    stage_signal *list = list_signals(o, &count);
    o->segments = perk_calloc((size_t)count, sizeof *o->segments);
    if (!list || !o->segments) {
        free(list);
        return perk_fail_memory(err, "the plan checker's counters");
    }
    for (int c = 0; c < o->plan->counter_count; c++) o->counters[c].segment_begin = o->counters[c].segment_end = 0;
    for (int i = 0; i < count; i++) {
        counter_state *counter = &o->counters[list[i].counter];
        bool same_counter = i > 0 && list[i - 1].counter == list[i].counter;
        if (!same_counter) counter->segment_begin = o->segment_count;
        if (!same_counter || list[i - 1].stage != list[i].stage) {
            segment *s = &o->segments[o->segment_count++];
            s->stage = list[i].stage;
            s->end = same_counter ? s[-1].end : 0;
        }
        o->segments[o->segment_count - 1].end += list[i].amount;
        counter->segment_end = o->segment_count;
    }
    free(list);
    return PERK_OK;
}

/* The segment that a task of `stage` signals. */
static int find_segment(const order *o, const counter_state *counter, int stage) {
    int index = counter->segment_begin;
    if (counter->level == LEVEL_STAGES)
        while (o->segments[index].stage != stage) index++;
    return index;
}

/* What a wait means: the segment in which its threshold lies and how far in, in step `step` or the one before. */
typedef struct wait_target {
    int step, segment; /* segment -1: proves nothing */
    int32_t base, needed;
} wait_target;

static wait_target resolve_wait(const order *o, const perk_wait *wait, int step) {
    const counter_state *counter = &o->counters[wait->counter];
    wait_target out = {step, -1, 0, wait->needed};
    int32_t per_step = o->plan->counter_per_step[wait->counter];
    if (out.needed <= 0) {
        if (out.needed <= -per_step || step == 0) return out;
        out.needed += per_step;
        out.step--;
    }
    if (counter->level == LEVEL_NONE) return out;
    out.segment = counter->segment_begin;
    while (o->segments[out.segment].end < out.needed) out.base = o->segments[out.segment++].end;
    return out;
}

static perk_status prepare_partial(order *o, perk_error *err) {
    const perk_plan *plan = o->plan;
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].wait_begin; j < plan->tasks[i].wait_end; j++) {
            wait_target target = resolve_wait(o, &plan->waits[j], 1);
            if (target.segment >= 0 && target.needed != o->segments[target.segment].end)
                o->segments[target.segment].partial = true;
        }
    for (int i = 0; i < o->segment_count; i++) {
        segment *s = &o->segments[i];
        if (!s->partial) continue;
        s->totals = perk_calloc((size_t)o->workers * (1 + STEPS), sizeof *s->totals);
        if (!s->totals) return perk_fail_memory(err, "the plan checker's counters");
        for (int step = 0; step < STEPS; step++) s->given[step] = s->totals + (size_t)o->workers * (size_t)(1 + step);
    }
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].signal_begin; j < plan->tasks[i].signal_end; j++) {
            const counter_state *counter = &o->counters[plan->signals[j].counter];
            if (counter->level == LEVEL_NONE) continue;
            segment *s = &o->segments[find_segment(o, counter, plan->tasks[i].stage)];
            if (s->partial) s->totals[plan->tasks[i].worker] += plan->signals[j].amount;
        }
    return PERK_OK;
}

static void free_segments(order *o) {
    for (int i = 0; i < o->segment_count; i++) {
        for (int step = 0; step < STEPS; step++)
            for (signal_record *r = o->segments[i].records[step], *previous; r; r = previous) {
                previous = r->previous;
                free(r);
            }
        free(o->segments[i].totals);
    }
    free(o->segments);
    free(o->joins);
    o->segments = NULL;
    o->joins = NULL;
    o->segment_count = 0;
}

/* ---- waits and signals ----------------------------------------------------------------------------------------- */

/* The segment before: in the same step, or the last one of the step before. */
static const int32_t *join_before(const order *o, const counter_state *counter, int step, int index) {
    if (index > counter->segment_begin) return join_of(o, step, index - 1);
    return step > 0 ? join_of(o, step - 1, counter->segment_end - 1) : NULL;
}

/* A signal is certain when everything but it, and what its worker signals after it, stays below the threshold. */
static void join_partial(const order *o, const wait_target *target, int32_t *clock) {
    const segment *s = &o->segments[target->segment];
    int32_t others_may_reach = s->end - target->base, needed = target->needed - target->base;
    for (const signal_record *r = s->records[target->step]; r; r = r->previous) {
        int32_t from_it_on = s->totals[r->worker] - r->before;
        bool known = clock[r->worker] >= r->clock[r->worker];
        if (!known && others_may_reach - from_it_on < needed) perk_check_join(clock, r->clock, o->clock_size);
    }
}

/* Adds to the task's clock what a satisfied wait proves. */
static void learn_from_wait(const order *o, const perk_wait *wait, int32_t *clock) {
    wait_target target = resolve_wait(o, wait, o->step);
    if (target.segment < 0) return;
    if (target.needed == o->segments[target.segment].end) {
        perk_check_join(clock, join_of(o, target.step, target.segment), o->clock_size);
        return;
    }
    const int32_t *before = join_before(o, &o->counters[wait->counter], target.step, target.segment);
    if (before) perk_check_join(clock, before, o->clock_size);
    join_partial(o, &target, clock);
}

/* The segments of the counter are not apart: this task's signal may come before one of the segment before. The levels
 * hold for a pass, so the new one is only noted. */
static void make_coarser(order *o, int c, int task) {
    counter_state *counter = &o->counters[c];
    o->changed = true;
    if (counter->level == LEVEL_STAGES) {
        counter->next_level = LEVEL_STEP;
        o->restart = true;
    } else {
        counter->next_level = LEVEL_NONE;
        if (o->mixed_counter >= 0) return;
        o->mixed_counter = c;
        o->mixed_task = task;
    }
}

static perk_status record_partial(order *o, segment *s, int worker, int32_t amount, perk_error *err) {
    signal_record *record = malloc(sizeof *record + (size_t)o->clock_size * sizeof record->clock[0]);
    if (!record) return perk_fail_memory(err, "the plan checker's signals");
    *record = (signal_record){s->records[o->step], worker, s->given[o->step][worker]};
    memcpy(record->clock, clock_of(o, worker), (size_t)o->clock_size * sizeof record->clock[0]);
    s->records[o->step] = record;
    s->given[o->step][worker] += amount;
    return PERK_OK;
}

static void wake(order *o, int c) {
    counter_state *counter = &o->counters[c];
    if (counter->value < counter->lowest_needed) return;
    counter->lowest_needed = INT32_MAX;
    int32_t *link = &counter->first_waiter;
    while (*link >= 0) {
        worker_state *waiter = &o->states[*link];
        int32_t needed = o->plan->waits[waiter->wait].needed;
        if (needed > counter->value) {
            counter->lowest_needed = PERK_MIN(counter->lowest_needed, needed);
            link = &waiter->next_waiter;
            continue;
        }
        o->queue[(o->queue_head + o->queue_size++) % o->workers] = *link;
        waiter->wait = -1;
        *link = waiter->next_waiter;
    }
}

static perk_status give_signal(order *o, int task, const perk_signal *signal, perk_error *err) {
    counter_state *counter = &o->counters[signal->counter];
    int worker = o->plan->tasks[task].worker;
    const int32_t *clock = clock_of(o, worker);
    if (counter->level != LEVEL_NONE && counter->segment_end > counter->segment_begin) {
        int index = find_segment(o, counter, o->plan->tasks[task].stage);
        int32_t *now = join_of(o, o->step, index);
        const int32_t *before = join_before(o, counter, o->step, index);
        bool early = index > counter->segment_begin && counter->value < o->segments[index - 1].end;
        if (before && (early || !perk_check_covers(clock, before, o->clock_size))) {
            make_coarser(o, signal->counter, task);
            perk_check_join(now, before, o->clock_size); /* what the assumption says, until it is given up */
        }
        perk_check_join(now, clock, o->clock_size);
        if (o->segments[index].partial && record_partial(o, &o->segments[index], worker, signal->amount, err))
            return PERK_OUT_OF_MEMORY;
    }
    counter->value += signal->amount;
    wake(o, signal->counter);
    return PERK_OK;
}

/* ---- the run --------------------------------------------------------------------------------------------------- */

/* The first wait of the task that the counters do not satisfy; -1: none. */
static int find_blocking_wait(const order *o, const perk_task *task) {
    for (int i = task->wait_begin; i < task->wait_end; i++)
        if (o->plan->waits[i].needed > o->counters[o->plan->waits[i].counter].value) return i;
    return -1;
}

static perk_status run_task(order *o, int index, perk_error *err) {
    const perk_task *task = &o->plan->tasks[index];
    int32_t *clock = clock_of(o, task->worker);
    int32_t begin = o->plan->worker_begin[task->worker], count = o->plan->worker_begin[task->worker + 1] - begin;
    for (int i = task->wait_begin; i < task->wait_end; i++) learn_from_wait(o, &o->plan->waits[i], clock);
    clock[task->worker] = o->step * count + (index - begin) + 1;
    perk_status status = perk_check_memory_task(o->memory, index, clock[task->worker], clock, err);
    for (int i = task->signal_begin; i < task->signal_end && !status; i++)
        status = give_signal(o, index, &o->plan->signals[i], err);
    return status;
}

/* Runs the worker's tasks until one must wait. */
static perk_status advance(order *o, int worker, perk_error *err) {
    worker_state *state = &o->states[worker];
    int begin = o->plan->worker_begin[worker], count = o->plan->worker_begin[worker + 1] - begin;
    for (; state->position < count; state->position++) {
        int wait = find_blocking_wait(o, &o->plan->tasks[begin + state->position]);
        if (wait >= 0) {
            counter_state *counter = &o->counters[o->plan->waits[wait].counter];
            state->wait = wait;
            state->next_waiter = counter->first_waiter;
            counter->first_waiter = worker;
            counter->lowest_needed = PERK_MIN(counter->lowest_needed, o->plan->waits[wait].needed);
            return PERK_OK;
        }
        perk_status status = run_task(o, begin + state->position, err);
        if (status || o->restart) return status;
    }
    return PERK_OK;
}

/* A worker that has tasks left that signal the counter; -1: none. */
static int find_signaller(const order *o, int counter) {
    for (int worker = 0; worker < o->workers; worker++)
        for (int i = o->plan->worker_begin[worker] + o->states[worker].position; i < o->plan->worker_begin[worker + 1];
             i++)
            for (int j = o->plan->tasks[i].signal_begin; j < o->plan->tasks[i].signal_end; j++)
                if (o->plan->signals[j].counter == counter) return worker;
    return -1;
}

/* Follows who waits for whom until a worker comes up again or a counter that nobody signals any more. */
static perk_status fail_deadlock(const order *o, int worker, perk_error *err) {
    const perk_plan *plan = o->plan;
    perk_buffer text = {0};
    bool *seen = perk_calloc((size_t)o->workers, sizeof *seen);
    perk_buffer_printf(&text, "the plan stops, everyone waits:");
    while (worker >= 0 && seen && !seen[worker]) {
        seen[worker] = true;
        const worker_state *state = &o->states[worker];
        const perk_wait *wait = &plan->waits[state->wait];
        int next = find_signaller(o, wait->counter);
        perk_buffer_printf(&text, "\n  %s waits for %d on %s, which has %d; %s",
                           perk_check_task_text(plan, plan->worker_begin[worker] + state->position).text, wait->needed,
                           perk_check_counter_text(plan, wait->counter).text, o->counters[wait->counter].value,
                           next < 0     ? "nothing signals it any more"
                           : seen[next] ? "the rest comes after one of these tasks: a cycle"
                                        : "the rest comes after:");
        worker = next;
    }
    perk_status status = !seen || text.failed ? perk_fail_memory(err, "the plan checker")
                                              : perk_fail(err, PERK_UNSAFE_PLAN, "%s", text.data);
    free(seen);
    perk_buffer_free(&text);
    return status;
}

static perk_status run_step(order *o, perk_error *err) {
    perk_check_memory_begin_step(o->memory);
    for (int c = 0; c < o->plan->counter_count; c++) {
        o->counters[c].value = 0;
        o->counters[c].first_waiter = -1;
        o->counters[c].lowest_needed = INT32_MAX;
    }
    o->queue_head = 0;
    o->queue_size = o->workers;
    for (int worker = 0; worker < o->workers; worker++) {
        o->states[worker] = (worker_state){0, -1, -1};
        o->queue[worker] = worker;
    }
    while (o->queue_size > 0) {
        int worker = o->queue[o->queue_head];
        o->queue_head = (o->queue_head + 1) % o->workers;
        o->queue_size--;
        perk_status status = advance(o, worker, err);
        if (status || o->restart) return status;
    }
    for (int worker = 0; worker < o->workers; worker++)
        if (o->states[worker].wait >= 0) return fail_deadlock(o, worker, err);
    return PERK_OK;
}

/* Between two steps of a launch the kernel changes the batch, and what it keeps of requests, when the counters of the
 * step's end are complete: they must prove that every task of the step has signalled. */
static perk_status check_step_end(const order *o, perk_error *err) {
    const perk_plan *plan = o->plan;
    int counters[PERK_RECORD_WAITS], count = perk_plan_step_end(plan, counters);
    int32_t *clock = perk_calloc((size_t)o->clock_size, sizeof *clock);
    perk_status status = clock ? PERK_OK : perk_fail_memory(err, "the plan checker's clocks");
    for (int i = 0; i < count && !status; i++) {
        perk_wait wait = {.counter = counters[i], .needed = plan->counter_per_step[counters[i]]};
        learn_from_wait(o, &wait, clock);
    }
    for (int w = 0; w < o->workers && !status; w++) {
        int32_t tasks = plan->worker_begin[w + 1] - plan->worker_begin[w];
        if (tasks == 0 || clock[w] >= (o->step + 1) * tasks) continue;
        status = perk_fail(err, PERK_UNSAFE_PLAN,
                           "a step can seem to be over while %s has not signalled: the counters that the next step's "
                           "first tasks wait for do not prove it",
                           perk_check_task_text(plan, plan->worker_begin[w + 1] - 1).text);
    }
    free(clock);
    return status;
}

/* Two steps from the beginning, under the counters' present levels. */
static perk_status run_pass(order *o, perk_error *err) {
    size_t clock_count = (size_t)o->workers * (size_t)o->clock_size;
    o->changed = o->restart = false;
    memset(o->clocks, 0, clock_count * sizeof *o->clocks);
    perk_check_memory_forget(o->memory);
    perk_status status = make_segments(o, err);
    if (!status) status = prepare_partial(o, err);
    if (!status) {
        o->joins = perk_calloc((size_t)STEPS * (size_t)o->segment_count, (size_t)o->clock_size * sizeof *o->joins);
        if (!o->joins) status = perk_fail_memory(err, "the plan checker's clocks");
    }
    for (o->step = 0; o->step < STEPS && !status && !o->restart; o->step++) {
        status = run_step(o, err);
        if (o->plan->many_steps && !status && !o->changed) status = check_step_end(o, err);
    }
    free_segments(o);
    return status;
}

/* A counter that orders nothing is most often the reason for what was found. */
static perk_status explain(const order *o, perk_status status, perk_error *err) {
    if (status != PERK_UNSAFE_PLAN || o->mixed_counter < 0 || !err) return status;
    size_t used = strlen(err->message);
    snprintf(err->message + used, sizeof err->message - used,
             "\n  %s does not order all its tasks: %s may signal it before all of what the waits count first has",
             perk_check_counter_text(o->plan, o->mixed_counter).text,
             perk_check_task_text(o->plan, o->mixed_task).text);
    return status;
}

perk_status perk_check_order(const perk_plan *plan, perk_check_memory *memory, perk_error *err) {
    size_t workers = (size_t)plan->device.worker_count;
    order o = {.plan = plan, .memory = memory, .workers = (int)workers, .mixed_counter = -1};
    perk_status status = PERK_OK;
    o.clock_size = perk_check_clock_size(plan);
    o.clocks = perk_calloc(workers * (size_t)o.clock_size, sizeof *o.clocks);
    o.states = perk_calloc(workers, sizeof *o.states);
    o.queue = perk_calloc(workers, sizeof *o.queue);
    o.counters = perk_calloc((size_t)plan->counter_count, sizeof *o.counters);
    if (!o.clocks || !o.states || !o.queue || !o.counters) {
        status = perk_fail_memory(err, "the plan checker's clocks");
        goto out;
    }
    choose_levels(&o);
    for (int pass = 0; pass == 0 || (o.changed && !status); pass++) {
        counter_level finest = pass < PATIENCE ? LEVEL_STAGES : pass < 2 * PATIENCE ? LEVEL_STEP : LEVEL_NONE;
        for (int c = 0; c < plan->counter_count; c++) o.counters[c].level = PERK_MAX(o.counters[c].next_level, finest);
        status = run_pass(&o, err);
    }
    status = explain(&o, status, err);
out:
    free(o.clocks);
    free(o.states);
    free(o.queue);
    free(o.counters);
    return status;
}
