/* The plan checker on lowered plans that were then corrupted, against the simulator, which shares nothing with it but
 * the check of indices: it runs the tasks of the plan in the order of stages, then in random orders, then with every
 * task held back, and knows what the plan computed before it was corrupted. A plan that the checker accepts and in
 * which the simulator finds a fault fails the test.
 *
 * That tasks do what their regions say is what the checker is told, not what it can find out. Where a region was
 * corrupted and the simulator sees an access that no region declares, the plan is counted apart.
 *
 *     test_check_corrupt [PLANS [SEED [v]]]     v: shows the refused plans in which no fault was found */
#include "random_graph.h"
#include "src/simulator/simulator.h"

static perk_error err;

/* ---- a plan that can be changed ---- */

enum { PLANS_PER_GRAPH = 25, MAX_WAITS = 8, MAX_SIGNALS = 4 };

#define COPY_ARRAY(to, from, used, size)                                                                               \
    do {                                                                                                               \
        (to) = perk_calloc((size_t)(size), sizeof *(to));                                                              \
        CHECK(to);                                                                                                     \
        memcpy((to), (from), (size_t)(used) * sizeof *(to));                                                           \
    } while (0)

/* Every task has its own waits and signals, with room for more. */
static perk_plan *copy_plan(const perk_plan *from) {
    perk_plan *plan = perk_calloc(1, sizeof *plan);
    int n = from->task_count;
    CHECK(plan);
    *plan = *from;
    COPY_ARRAY(plan->tensors, from->tensors, from->tensor_count, from->tensor_count);
    COPY_ARRAY(plan->stages, from->stages, from->stage_count, from->stage_count);
    COPY_ARRAY(plan->counter_per_step, from->counter_per_step, from->counter_count, from->counter_count);
    COPY_ARRAY(plan->tasks, from->tasks, n, n);
    COPY_ARRAY(plan->worker_begin, from->worker_begin, from->device.worker_count + 1, from->device.worker_count + 1);
    COPY_ARRAY(plan->regions, from->regions, from->region_count, from->region_count);
    COPY_ARRAY(plan->waits, from->waits, 0, n * MAX_WAITS);
    COPY_ARRAY(plan->signals, from->signals, 0, n * MAX_SIGNALS);
    for (int i = 0; i < n; i++) {
        perk_task *task = &plan->tasks[i];
        const perk_task *old = &from->tasks[i];
        task->wait_begin = i * MAX_WAITS;
        task->wait_end = task->wait_begin + old->wait_end - old->wait_begin;
        task->signal_begin = i * MAX_SIGNALS;
        task->signal_end = task->signal_begin + old->signal_end - old->signal_begin;
        for (int j = old->wait_begin; j < old->wait_end; j++)
            plan->waits[task->wait_begin + j - old->wait_begin] = from->waits[j];
        for (int j = old->signal_begin; j < old->signal_end; j++)
            plan->signals[task->signal_begin + j - old->signal_begin] = from->signals[j];
    }
    return plan;
}

static void free_plan(perk_plan *plan) {
    free(plan->tensors);
    free(plan->stages);
    free(plan->counter_per_step);
    free(plan->tasks);
    free(plan->worker_begin);
    free(plan->waits);
    free(plan->signals);
    free(plan->regions);
    free(plan);
}

/* Fills the gaps between the tasks' waits and signals with harmless ones, and sums the signals anew. */
static void close_plan(perk_plan *plan, bool sums) {
    plan->wait_count = plan->task_count * MAX_WAITS;
    plan->signal_count = plan->task_count * MAX_SIGNALS;
    for (int i = 0; i < plan->signal_count; i++)
        if (plan->signals[i].amount == 0) plan->signals[i] = (perk_signal){0, 1};
    if (!sums) return;
    memset(plan->counter_per_step, 0, (size_t)plan->counter_count * sizeof *plan->counter_per_step);
    for (int i = 0; i < plan->task_count; i++)
        for (int j = plan->tasks[i].signal_begin; j < plan->tasks[i].signal_end; j++)
            plan->counter_per_step[plan->signals[j].counter] += plan->signals[j].amount;
}

/* ---- corruptions ---- */

#define KINDS(X)                                                                                                       \
    X(drop_wait, "drop a wait")                                                                                        \
    X(add_wait, "add a wait")                                                                                          \
    X(move_wait, "move a wait to another task")                                                                        \
    X(retarget_wait, "retarget a wait")                                                                                \
    X(change_threshold, "change a threshold")                                                                          \
    X(drop_signal, "drop a signal")                                                                                    \
    X(add_signal, "add a signal")                                                                                      \
    X(move_signal, "move a signal to another task")                                                                    \
    X(retarget_signal, "retarget a signal")                                                                            \
    X(change_counter, "change the counter of a stage")                                                                 \
    X(shift_region, "shift a region")                                                                                  \
    X(resize_region, "shrink or widen a region")                                                                       \
    X(swap_workers, "swap tasks of two workers")                                                                       \
    X(swap_in_list, "swap tasks in a list")                                                                            \
    X(share_buffer, "share a buffer")

typedef enum corruption {
#define KIND(name, text) KIND_##name,
    KINDS(KIND)
#undef KIND
        KIND_COUNT,
    KIND_SEVERAL = KIND_COUNT,
    KIND_ALL
} corruption;

static const char *const kind_texts[] = {
#define KIND(name, text) text,
    KINDS(KIND)
#undef KIND
        "two or three of these"};

static perk_task *random_task(random_graph *g, perk_plan *plan) {
    return &plan->tasks[random_graph_below(g, plan->task_count)];
}

/* A random one of a task's waits or signals; -1 when it has none. */
static int random_wait(random_graph *g, const perk_task *task) {
    int count = task->wait_end - task->wait_begin;
    return count ? task->wait_begin + random_graph_below(g, count) : -1;
}
static int random_signal(random_graph *g, const perk_task *task) {
    int count = task->signal_end - task->signal_begin;
    return count ? task->signal_begin + random_graph_below(g, count) : -1;
}

static void append_wait(perk_plan *plan, perk_task *task, perk_wait wait) {
    if (task->wait_end - task->wait_begin < MAX_WAITS) plan->waits[task->wait_end++] = wait;
}
static void append_signal(perk_plan *plan, perk_task *task, perk_signal signal) {
    if (task->signal_end - task->signal_begin < MAX_SIGNALS) plan->signals[task->signal_end++] = signal;
}

static void drop_wait(random_graph *g, perk_plan *plan) {
    perk_task *task = random_task(g, plan);
    int wait = random_wait(g, task);
    if (wait >= 0) plan->waits[wait] = plan->waits[--task->wait_end];
}

static void add_wait(random_graph *g, perk_plan *plan) {
    int counter = random_graph_below(g, plan->counter_count), all = plan->counter_per_step[counter];
    int needed = random_graph_chance(g, 30) ? 0 : random_graph_between(g, -all, all);
    append_wait(plan, random_task(g, plan), (perk_wait){counter, needed});
}

static void move_wait(random_graph *g, perk_plan *plan) {
    perk_task *task = random_task(g, plan), *other = random_task(g, plan);
    int wait = random_wait(g, task);
    if (wait < 0) return;
    append_wait(plan, other, plan->waits[wait]);
    plan->waits[wait] = plan->waits[--task->wait_end];
}

static void retarget_wait(random_graph *g, perk_plan *plan) {
    int wait = random_wait(g, random_task(g, plan));
    if (wait < 0) return;
    int counter = random_graph_below(g, plan->counter_count);
    bool is_last_step = plan->waits[wait].needed <= 0;
    plan->waits[wait] = (perk_wait){counter, is_last_step ? 0 : plan->counter_per_step[counter]};
}

static void change_threshold(random_graph *g, perk_plan *plan) {
    int wait = random_wait(g, random_task(g, plan));
    if (wait < 0) return;
    int all = plan->counter_per_step[plan->waits[wait].counter];
    if (random_graph_chance(g, 50))
        plan->waits[wait].needed += random_graph_chance(g, 80) ? -1 : 1;
    else
        plan->waits[wait].needed = random_graph_between(g, -all, all);
}

static void drop_signal(random_graph *g, perk_plan *plan) {
    perk_task *task = random_task(g, plan);
    int signal = random_signal(g, task);
    if (signal >= 0) plan->signals[signal] = plan->signals[--task->signal_end];
}

static void add_signal(random_graph *g, perk_plan *plan) {
    int counter = random_graph_below(g, plan->counter_count);
    append_signal(plan, random_task(g, plan), (perk_signal){counter, random_graph_between(g, 1, 2)});
}

static void move_signal(random_graph *g, perk_plan *plan) {
    perk_task *task = random_task(g, plan), *other = random_task(g, plan);
    int signal = random_signal(g, task);
    if (signal < 0) return;
    append_signal(plan, other, plan->signals[signal]);
    plan->signals[signal] = plan->signals[--task->signal_end];
}

static void retarget_signal(random_graph *g, perk_plan *plan) {
    int signal = random_signal(g, random_task(g, plan));
    if (signal >= 0) plan->signals[signal].counter = random_graph_below(g, plan->counter_count);
}

/* All tasks of a stage signal another counter, and often those who waited for the old one wait for the new one. */
static void change_counter(random_graph *g, perk_plan *plan) {
    int stage = random_graph_below(g, plan->stage_count), to = random_graph_below(g, plan->counter_count);
    int from = plan->stages[stage].counter;
    bool waits_too = random_graph_chance(g, 60);
    plan->stages[stage].counter = to;
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        for (int j = task->signal_begin; j < task->signal_end && task->stage == stage; j++)
            if (plan->signals[j].counter == from) plan->signals[j].counter = to;
        for (int j = task->wait_begin; j < task->wait_end && waits_too; j++)
            if (plan->waits[j].counter == from) plan->waits[j].counter = to;
    }
}

/* A region of an activation or of the KV cache, if luck has it. */
static perk_region *random_region(random_graph *g, perk_plan *plan) {
    for (int i = 0; i < 20; i++) {
        const perk_task *task = random_task(g, plan);
        int count = task->write_end - task->read_begin;
        perk_region *region = &plan->regions[task->read_begin + random_graph_below(g, PERK_MAX(1, count))];
        perk_space space = plan->tensors[region->tensor].space;
        if (count > 0 && (space == PERK_SPACE_ACTIVATIONS || space == PERK_SPACE_KV)) return region;
    }
    return &plan->regions[0];
}

static void shift_region(random_graph *g, perk_plan *plan) {
    perk_region *region = random_region(g, plan);
    const perk_plan_tensor *t = &plan->tensors[region->tensor];
    int width = region->col_count + (region->repeat - 1) * region->col_stride,
        rows = region->row_end - region->row_begin;
    if (random_graph_chance(g, 70)) {
        region->col_begin = random_graph_below(g, PERK_MAX(1, t->cols - width + 1));
    } else {
        region->row_begin = random_graph_below(g, t->rows - rows + 1);
        region->row_end = region->row_begin + rows;
    }
}

static void resize_region(random_graph *g, perk_plan *plan) {
    perk_region *region = random_region(g, plan);
    const perk_plan_tensor *t = &plan->tensors[region->tensor];
    if (random_graph_chance(g, 30)) {
        *region = (perk_region){region->tensor, 0, t->rows, 0, t->cols, t->cols, 1};
    } else if (random_graph_chance(g, 50) && region->col_count > 1) {
        region->col_count = random_graph_between(g, 1, region->col_count - 1);
    } else if (region->row_end - region->row_begin > 1) {
        region->row_end = random_graph_between(g, region->row_begin + 1, region->row_end - 1);
    } else if (region->repeat > 1) {
        region->repeat--;
    }
}

static void swap_tasks(perk_plan *plan, perk_task *a, perk_task *b) {
    perk_task task = *a;
    int worker_a = a->worker, worker_b = b->worker;
    (void)plan;
    *a = *b;
    *b = task;
    a->worker = worker_a;
    b->worker = worker_b;
}

static void swap_workers(random_graph *g, perk_plan *plan) {
    swap_tasks(plan, random_task(g, plan), random_task(g, plan));
}

static void swap_in_list(random_graph *g, perk_plan *plan) {
    int worker = random_task(g, plan)->worker, begin = plan->worker_begin[worker];
    int length = plan->worker_begin[worker + 1] - begin, a = random_graph_below(g, length);
    int b = random_graph_chance(g, 50) ? PERK_MIN(a + 1, length - 1) : random_graph_below(g, length);
    swap_tasks(plan, &plan->tasks[begin + a], &plan->tasks[begin + b]);
}

static void share_buffer(random_graph *g, perk_plan *plan) {
    for (int i = 0; i < 20; i++) {
        perk_plan_tensor *a = &plan->tensors[random_graph_below(g, plan->tensor_count)];
        const perk_plan_tensor *b = &plan->tensors[random_graph_below(g, plan->tensor_count)];
        uint64_t offset = b->offset;
        if (random_graph_chance(g, 20)) offset += 256 * (uint64_t)random_graph_below(g, (int)(b->bytes / 256));
        if (a == b || a->space != b->space || offset + a->bytes > plan->space_bytes[a->space]) continue;
        if (a->space != PERK_SPACE_ACTIVATIONS && random_graph_chance(g, 80)) continue;
        a->offset = offset;
        return;
    }
}

static corruption corrupt(random_graph *g, perk_plan *plan) {
    static void (*const corruptions[])(random_graph *, perk_plan *) = {
#define KIND(name, text) name,
        KINDS(KIND)
#undef KIND
    };
    corruption kind = (corruption)random_graph_below(g, KIND_COUNT);
    corruptions[kind](g, plan);
    return kind;
}

/* ---- the oracle ---- */

/* What the plan computes: results of all steps, then a digest of the KV cache. */
typedef struct outcome {
    float *values;
    size_t count;
    uint64_t kv;
} outcome;

static void read_outcome(const random_graph *g, const perk_executor *simulator, outcome *out) {
    size_t count = 0;
    for (int s = 0; s < g->step_count; s++)
        for (int i = -2; i < g->kept_count; i++) {
            const perk_tensor *tensor = i == -2 ? perk_graph_find(g->graph, "next") : i == -1 ? g->logits : g->kept[i];
            int64_t rows = perk_tensor_rows(tensor, g->batches[s]->num_tokens, g->batches[s]->num_logit_rows);
            size_t size = (size_t)rows * (size_t)tensor->cols;
            if (size == 0) continue;
            if (count + size > out->count) {
                out->values = perk_realloc_array(out->values, 2 * (count + size), sizeof *out->values);
                CHECK(out->values);
                out->count = 2 * (count + size);
            }
            CHECK_OK(perk_simulator_read(simulator, s, tensor, out->values + count, rows, &err));
            count += size;
        }
    for (size_t i = count; i < out->count; i++) out->values[i] = 0;
}

typedef struct oracle {
    const random_graph *g;
    perk_executor *simulator;
    outcome wanted, found;
    uint64_t seed;
    int step; /* in which tasks are held back */
    perk_error fault;
    bool undeclared;
} oracle;

static bool is_wanted(oracle *o) {
    read_outcome(o->g, o->simulator, &o->found);
    size_t count = PERK_MIN(o->wanted.count, o->found.count);
    return count == 0 || !memcmp(o->wanted.values, o->found.values, count * sizeof(float));
}

static bool runs_well(oracle *o, bool computes, perk_simulator_order order) {
    order.seed = o->seed++;
    order.skewed = o->seed % 2;
    if (computes ? perk_simulator_compute(o->simulator, &order, &o->fault)
                 : perk_simulator_try(o->simulator, &order, &o->fault))
        return false;
    if (!computes || (is_wanted(o) && perk_simulator_kv_digest(o->simulator) == o->wanted.kv)) return true;
    perk_fail(&o->fault, PERK_UNSAFE_PLAN, "in another order the plan computes something else");
    return false;
}

/* False when the plan is at fault; `thorough`: look longer. */
static bool seems_safe(oracle *o, const perk_plan *plan, bool thorough) {
    const perk_simulator_order any = {.hold = PERK_HOLD_NOTHING};
    const random_graph *g = o->g;
    o->undeclared = false;
    if (perk_simulator_set_plan(o->simulator, plan, &o->fault)) return false;
    if (perk_simulator_begin(o->simulator, (const perk_batch *const *)g->batches, g->step_count, &o->fault))
        return false;
    o->undeclared = perk_simulator_undeclared(o->simulator) != NULL;
    if (!is_wanted(o)) {
        perk_fail(&o->fault, PERK_UNSAFE_PLAN, "even in the order of stages the plan computes something else");
        return false;
    }
    for (int i = 0; i < 4; i++)
        if (!runs_well(o, false, any)) return false;
    if (!runs_well(o, true, any)) return false;
    for (int i = 0; i < plan->task_count * (thorough ? 4 : 1); i++) {
        perk_simulator_order order = {.task = i % plan->task_count, .hold = PERK_HOLD_END, .step = o->step};
        int round = i / plan->task_count;
        if (round % 2) order.hold = PERK_HOLD_START;
        if (round / 2) order.step = 0;
        if (!runs_well(o, false, order)) return false;
    }
    return true;
}

/* ---- the count ---- */

typedef struct tally {
    long plans, accepted, lying, lying_at_fault, refused, refused_safe;
} tally;

static tally tallies[KIND_ALL];
static bool verbose;

static bool is_of_regions(corruption kind) { return kind == KIND_shift_region || kind == KIND_resize_region; }

static void judge(oracle *o, const perk_plan *plan, corruption kind, bool regions_changed, long number) {
    perk_error refusal = {0};
    tally *t = &tallies[kind];
    perk_status status = perk_plan_check(plan, &refusal);
    CHECK(status == PERK_OK || status == PERK_UNSAFE_PLAN, "plan %ld: %s", number, refusal.message);
    bool is_safe = seems_safe(o, plan, status == PERK_OK), lies = regions_changed && o->undeclared;
    CHECK(!o->undeclared || regions_changed, "plan %ld: %s", number, perk_simulator_undeclared(o->simulator)->message);
    CHECK(status != PERK_OK || is_safe || lies, "plan %ld (%s) is accepted: %s", number, kind_texts[kind],
          o->fault.message);
    t->plans++;
    t->accepted += status == PERK_OK && !lies;
    t->lying += status == PERK_OK && lies;
    t->lying_at_fault += status == PERK_OK && lies && !is_safe;
    t->refused += status != PERK_OK;
    t->refused_safe += status != PERK_OK && is_safe && !lies;
    if (status != PERK_OK && is_safe && verbose) fprintf(stderr, "plan %ld: %s\n", number, refusal.message);
}

static void corrupt_and_judge(random_graph *g, oracle *o, const perk_plan *sound, long number) {
    perk_plan *plan = copy_plan(sound);
    corruption kind = KIND_SEVERAL;
    bool regions_changed = false;
    int count = random_graph_chance(g, 70) ? 1 : random_graph_between(g, 2, 3);
    for (int i = 0; i < count; i++) {
        kind = corrupt(g, plan);
        regions_changed |= is_of_regions(kind);
    }
    close_plan(plan, random_graph_chance(g, 90));
    judge(o, plan, count == 1 ? kind : KIND_SEVERAL, regions_changed, number);
    free_plan(plan);
}

/* One sound plan, corrupted PLANS_PER_GRAPH times. Plan `number` depends on its graph and those before it alone. */
static void run_graph(long graph, uint64_t seed, long plans, int experts, bool own_routing) {
    const random_graph_limits most = {.layers = 2,
                                      .hidden = 48,
                                      .heads = 4,
                                      .workers = 6,
                                      .tokens = 4,
                                      .steps = 3,
                                      .experts = experts,
                                      .own_routing = own_routing};
    random_graph g;
    random_graph_make(&g, seed * 1000003u + (uint64_t)graph, &most);
    oracle o = {.g = &g, .step = g.step_count / 2};
    perk_plan *sound;
    CHECK_OK(perk_plan_create(&sound, g.graph, &g.device, &g.config, &err));
    const perk_simulator_options options = {.plan = sound};
    CHECK_OK(perk_simulator_create(&o.simulator, g.graph, g.weights, &g.config, &options, &err));
    CHECK_OK(perk_simulator_begin(o.simulator, (const perk_batch *const *)g.batches, g.step_count, &err));
    CHECK_OK(perk_simulator_compute(o.simulator, &options.order, &err));
    o.wanted.kv = perk_simulator_kv_digest(o.simulator);
    read_outcome(&g, o.simulator, &o.wanted);
    CHECK(seems_safe(&o, sound, true), "graph %ld: %s", graph, o.fault.message);
    for (long i = 0; i < plans; i++) corrupt_and_judge(&g, &o, sound, graph * PLANS_PER_GRAPH + i);
    o.simulator->type->free(o.simulator);
    perk_plan_free(sound);
    free(o.wanted.values);
    free(o.found.values);
    random_graph_free(&g);
}

static void print_tallies(double seconds) {
    tally all = {0};
    printf("%-32s %8s %9s %9s %9s %9s %9s\n", "corruption", "plans", "accepted", "lying", "at fault", "refused",
           "safe");
    for (int i = 0; i < KIND_ALL; i++) {
        all.plans += tallies[i].plans;
        all.accepted += tallies[i].accepted;
        all.lying += tallies[i].lying;
        all.lying_at_fault += tallies[i].lying_at_fault;
        all.refused += tallies[i].refused;
        all.refused_safe += tallies[i].refused_safe;
    }
    for (int i = 0; i <= KIND_ALL; i++) {
        const tally *t = i < KIND_ALL ? &tallies[i] : &all;
        printf("%-32s %8ld %9ld %9ld %9ld %9ld %9ld\n", i < KIND_ALL ? kind_texts[i] : "all", t->plans, t->accepted,
               t->lying, t->lying_at_fault, t->refused, t->refused_safe);
    }
    printf(
        "lying: accepted, but its regions are not what its tasks do; at fault: of these; safe: refused, and no fault "
        "was found\n%.0f plans a second\n",
        (double)all.plans / fmax(seconds, 1e-3));
}

int main(int argc, char **argv) {
    long plans = argc > 1 ? atol(argv[1]) : 1000;
    uint64_t seed = argc > 2 ? (uint64_t)atoll(argv[2]) : 0;
    verbose = argc > 3;
    double begin = perk_now();
    for (long graph = 0; graph * PLANS_PER_GRAPH < plans; graph++)
        run_graph(graph, seed, PERK_MIN((long)PLANS_PER_GRAPH, plans - graph * PLANS_PER_GRAPH), 0, false);
    for (long graph = 0; graph * PLANS_PER_GRAPH < plans / 2; graph++)
        run_graph(graph, seed, PLANS_PER_GRAPH, 7, graph % 2);
    print_tallies(perk_now() - begin);
    return 0;
}
