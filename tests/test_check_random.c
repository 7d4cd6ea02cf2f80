/* The plan checker against an oracle that shares no idea with it: an executor that runs small plans in adversarial
 * orders allowed by their counters, on memory where every element says who wrote it last.
 *
 * A task starts (reads, and spoils what it will write) and later ends (writes, signals); between the two anything else
 * may happen. The truth is the run in the order of steps and stages. Beside random orders, every task in turn is held
 * back before its start or before its end until nothing else can go on: what may overtake a task does so in such a run.
 * A plan that the checker accepts must give every read, in every run, what the truth gives it. */
#include "plan_fixture.h"

enum { STEPS = 3, MAX_WORKERS = 4, MAX_ELEMENTS = 4096, MAX_TASKS = 64, MAX_COUNTERS = 32 };

static uint64_t random_state = 0x853c49e6748fea9bu;
static int random_below(int bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (int)((uint32_t)(random_state >> 32) % (uint32_t)bound);
}
static bool chance(int percent) { return random_below(100) < percent; }

/* ---- the oracle ------------------------------------------------------------------------------------------------ */

typedef struct element {
    int writer; /* 1 + step * task_count + task; negative while that task is under way; 0: nobody */
    int tensor; /* through which it was written */
} element;

typedef struct machine {
    const perk_plan *plan;
    element memory[PERK_SPACE_COUNT][MAX_ELEMENTS];
    int64_t counters[MAX_COUNTERS];
    uint64_t seen[STEPS][MAX_TASKS]; /* a digest of all that the task has read */
    bool race;                       /* two tasks with conflicting accesses were under way at once */
    bool garbage;                    /* an activation was read that no task of the step had written */
} machine;

typedef void visit(machine *m, const perk_region *region, element *e, int id, uint64_t *digest);

static void for_elements(machine *m, const perk_region *r, visit *f, int id, uint64_t *digest) {
    const perk_plan_tensor *t = &m->plan->tensors[r->tensor];
    for (int row = r->row_begin; row < r->row_end; row++)
        for (int i = 0; i < r->repeat; i++)
            for (int col = 0; col < r->col_count; col++) {
                uint64_t at = t->offset / 2 + (uint64_t)(row * t->row_stride + r->col_begin + i * r->col_stride + col);
                f(m, r, &m->memory[t->space][at], id, digest);
            }
}

static void read_element(machine *m, const perk_region *region, element *e, int id, uint64_t *digest) {
    const perk_plan_tensor *t = &m->plan->tensors[region->tensor];
    int step = (id - 1) / m->plan->task_count;
    if (t->space == PERK_SPACE_ACTIVATIONS && !t->external_input &&
        (e->writer <= 0 || (e->writer - 1) / m->plan->task_count != step || e->tensor != region->tensor))
        m->garbage = true;
    *digest = (*digest ^ (uint64_t)(int64_t)e->writer) * 0x100000001b3u;
}

static void spoil_element(machine *m, const perk_region *region, element *e, int id, uint64_t *digest) {
    (void)m, (void)digest;
    *e = (element){-id, region->tensor};
}

static void write_element(machine *m, const perk_region *region, element *e, int id, uint64_t *digest) {
    (void)m, (void)digest;
    *e = (element){id, region->tensor};
}

static void start_task(machine *m, int step, int index) {
    const perk_task *task = &m->plan->tasks[index];
    int id = 1 + step * m->plan->task_count + index;
    uint64_t digest = 1;
    for (int i = task->read_begin; i < task->read_end; i++)
        for_elements(m, &m->plan->regions[i], read_element, id, &digest);
    m->seen[step][index] = digest;
    for (int i = task->write_begin; i < task->write_end; i++)
        for_elements(m, &m->plan->regions[i], spoil_element, id, NULL);
}

static void end_task(machine *m, int step, int index) {
    const perk_task *task = &m->plan->tasks[index];
    for (int i = task->write_begin; i < task->write_end; i++)
        for_elements(m, &m->plan->regions[i], write_element, 1 + step * m->plan->task_count + index, NULL);
    for (int i = task->signal_begin; i < task->signal_end; i++)
        m->counters[m->plan->signals[i].counter] += m->plan->signals[i].amount;
}

static machine *new_machine(const perk_plan *plan) {
    machine *m = perk_calloc(1, sizeof *m);
    CHECK(m && plan->task_count <= MAX_TASKS && plan->counter_count <= MAX_COUNTERS);
    m->plan = plan;
    return m;
}

/* The truth. */
static void run_serially(machine *m) {
    for (int step = 0; step < STEPS; step++)
        for (int stage = 0; stage < m->plan->stage_count; stage++)
            for (int i = 0; i < m->plan->task_count; i++)
                if (m->plan->tasks[i].stage == stage) {
                    start_task(m, step, i);
                    end_task(m, step, i);
                }
}

static bool can_start(const machine *m, int step, const perk_task *task) {
    for (int i = task->wait_begin; i < task->wait_end; i++) {
        const perk_wait *wait = &m->plan->waits[i];
        if (m->counters[wait->counter] < (int64_t)step * m->plan->counter_per_step[wait->counter] + wait->needed)
            return false;
    }
    return true;
}

static bool bytes_touch(const perk_plan *plan, int a, int b) {
    const perk_region *x = &plan->regions[a], *y = &plan->regions[b];
    const perk_plan_tensor *s = &plan->tensors[x->tensor], *t = &plan->tensors[y->tensor];
    uint64_t x_begin = s->offset + (uint64_t)x->col_begin * 2, y_begin = t->offset + (uint64_t)y->col_begin * 2;
    return s->space == t->space && x_begin < y_begin + (uint64_t)y->col_count * 2 &&
           y_begin < x_begin + (uint64_t)x->col_count * 2;
}

static bool has_race(const perk_plan *plan, int first, int second) {
    const perk_task *a = &plan->tasks[first], *b = &plan->tasks[second];
    for (int i = a->write_begin; i < a->write_end; i++) {
        for (int j = b->read_begin; j < b->read_end; j++)
            if (bytes_touch(plan, i, j)) return true;
        for (int j = b->write_begin; j < b->write_end; j++)
            if (bytes_touch(plan, i, j)) return true;
    }
    for (int i = a->read_begin; i < a->read_end; i++)
        for (int j = b->write_begin; j < b->write_end; j++)
            if (bytes_touch(plan, i, j)) return true;
    return false;
}

static int current_task(const perk_plan *plan, int worker, int done) {
    return plan->worker_begin[worker] + done % (plan->worker_begin[worker + 1] - plan->worker_begin[worker]);
}

/* What must not happen while anything else can: the start or the end of a task. */
typedef struct hold {
    int step, task; /* task -1: nothing is held */
    bool end;
} hold;

/* Runs in a random order; false when everyone waits before the end. */
static bool run_randomly(machine *m, hold held) {
    const perk_plan *plan = m->plan;
    int done[MAX_WORKERS] = {0};
    bool started[MAX_WORKERS] = {false};
    for (;;) {
        int choices[MAX_WORKERS], count = 0, spare = -1;
        bool finished = true;
        for (int w = 0; w < plan->device.worker_count; w++) {
            int length = plan->worker_begin[w + 1] - plan->worker_begin[w];
            if (done[w] == STEPS * length) continue;
            finished = false;
            int step = done[w] / length, task = current_task(plan, w, done[w]);
            if (!started[w] && !can_start(m, step, &plan->tasks[task])) continue;
            if (held.task == task && held.step == step && held.end == started[w])
                spare = w;
            else
                choices[count++] = w;
        }
        if (finished) return true;
        if (!count && spare < 0) return false;
        int w = count ? choices[random_below(count)] : spare;
        int length = plan->worker_begin[w + 1] - plan->worker_begin[w];
        int step = done[w] / length, task = current_task(plan, w, done[w]);
        if (started[w]) {
            end_task(m, step, task);
        } else {
            start_task(m, step, task);
            for (int v = 0; v < plan->device.worker_count; v++)
                if (started[v]) m->race |= has_race(plan, task, current_task(plan, v, done[v]));
        }
        done[w] += started[w];
        started[w] = !started[w];
    }
}

/* NULL: nothing wrong in this run. */
static const char *try_run(const perk_plan *plan, const machine *truth, hold held) {
    machine *m = new_machine(plan);
    const char *wrong = NULL;
    if (!run_randomly(m, held))
        wrong = "it stops";
    else if (m->race)
        wrong = "two tasks in conflict run at once";
    else if (m->garbage)
        wrong = "a read found nothing of its step and tensor";
    else
        for (int step = 0; step < STEPS; step++)
            for (int i = 0; i < plan->task_count; i++)
                if (m->seen[step][i] != truth->seen[step][i]) wrong = "a read found another version";
    if (!wrong && memcmp(m->memory[PERK_SPACE_KV], truth->memory[PERK_SPACE_KV], sizeof m->memory[0]))
        wrong = "the KV cache ends with another version";
    free(m);
    return wrong;
}

static const char *find_fault(const perk_plan *plan) {
    machine *truth = new_machine(plan);
    run_serially(truth);
    const char *wrong = truth->garbage ? "even in serial order a read finds nothing" : NULL;
    for (int i = 0; i < 8 && !wrong; i++) wrong = try_run(plan, truth, (hold){0, -1, false});
    for (int i = 0; i < 4 * plan->task_count && !wrong; i++)
        wrong = try_run(plan, truth, (hold){i & 1, i / 4, (i & 2) != 0});
    free(truth);
    return wrong;
}

/* ---- random plans ---------------------------------------------------------------------------------------------- */

enum { TILES = 4, TILE = 2 };

static bool regions_touch(const plan_fixture *f, const perk_region *a, const perk_region *b) {
    const perk_plan_tensor *x = &f->tensors[a->tensor], *y = &f->tensors[b->tensor];
    if (a->tensor != b->tensor)
        return x->space == y->space && x->offset < y->offset + y->bytes && y->offset < x->offset + x->bytes;
    return a->col_begin < b->col_begin + b->col_count && b->col_begin < a->col_begin + a->col_count;
}

static bool tasks_conflict(const plan_fixture *f, const fixture_task *a, const fixture_task *b) {
    for (int i = 0; i < a->write_count; i++) {
        for (int j = 0; j < b->write_count; j++)
            if (regions_touch(f, &a->writes[i], &b->writes[j])) return true;
        for (int j = 0; j < b->read_count; j++)
            if (regions_touch(f, &a->writes[i], &b->reads[j])) return true;
    }
    for (int i = 0; i < a->read_count; i++)
        for (int j = 0; j < b->write_count; j++)
            if (regions_touch(f, &a->reads[i], &b->writes[j])) return true;
    return false;
}

/* Waits for every stage that has a task in conflict: earlier ones of this step, its own and later ones of the last. */
static void add_waits(plan_fixture *f, int index) {
    fixture_task *t = &f->tasks[index];
    for (int stage = 0; stage < f->stage_count; stage++) {
        bool needed = false;
        for (int i = 0; i < f->task_count && !needed; i++)
            needed = f->tasks[i].task.stage == stage && tasks_conflict(f, t, &f->tasks[i]);
        if (!needed || t->wait_count == FIXTURE_TASK_ITEMS) continue;
        bool earlier = stage < t->task.stage;
        t->waits[t->wait_count++] = (perk_wait){stage, earlier ? f->stages[stage].task_count : 0};
    }
}

/* Stage after stage, every task waits for all of the stage before; the first for the last of the step before. */
static void add_chain(plan_fixture *f, int index) {
    fixture_task *t = &f->tasks[index];
    int before = t->task.stage ? t->task.stage - 1 : f->stage_count - 1;
    t->waits[t->wait_count++] = (perk_wait){before, t->task.stage ? f->stages[before].task_count : 0};
}

/* All stages on counter 0. */
static void merge_counters(plan_fixture *f) {
    int before[MAX_COUNTERS] = {0}, sum = 0;
    for (int s = 0; s < f->stage_count; s++) {
        before[s] = sum;
        sum += f->stages[s].task_count;
        f->stages[s].counter = 0;
    }
    for (int i = 0; i < f->task_count; i++) {
        fixture_task *t = &f->tasks[i];
        t->signals[0].counter = 0;
        for (int j = 0; j < t->wait_count; j++) {
            int stage = t->waits[j].counter;
            int end = before[stage] + f->stages[stage].task_count;
            t->waits[j] = (perk_wait){0, t->waits[j].needed ? end : end - sum};
        }
    }
}

static int random_tensor(plan_fixture *f, bool first) {
    char name[32];
    snprintf(name, sizeof name, "t%d", f->tensor_count);
    perk_space space = !first && chance(20) ? PERK_SPACE_KV : PERK_SPACE_ACTIVATIONS;
    int64_t offset = -1;
    if (!first && space == PERK_SPACE_ACTIVATIONS && chance(40)) {
        const perk_plan_tensor *shared = &f->tensors[1 + random_below(f->tensor_count - 1)];
        if (shared->space == space) offset = (int64_t)shared->offset;
    }
    return fixture_tensor(f, name, space, offset, 1, TILES * TILE);
}

/* Tensors that hold content where the generator is, in the order of stages. */
typedef struct contents {
    bool live[16];
} contents;

static bool tensors_overlap(const plan_fixture *f, int a, int b) {
    const perk_plan_tensor *x = &f->tensors[a], *y = &f->tensors[b];
    return x->space == y->space && x->offset == y->offset;
}

/* A live tensor that shares no bytes with `out`, the newest first; the input when there is none. */
static int pick_input(const plan_fixture *f, const contents *now, int out) {
    int picked = 0;
    for (int i = 0; i < f->tensor_count; i++)
        if (now->live[i] && !tensors_overlap(f, i, out) && chance(60)) picked = i;
    return picked;
}

/* A stage cuts its output among up to TILES tasks; each reads all or a part of an earlier output. */
static void random_stage(plan_fixture *f, contents *now) {
    char name[32];
    snprintf(name, sizeof name, "s%d", f->stage_count);
    int stage = fixture_stage(f, name);
    int out = stage > 0 && chance(70) ? random_tensor(f, false) : 1 + random_below(f->tensor_count - 1);
    now->live[0] = true;
    for (int i = 1; i < f->tensor_count; i++) {
        if (f->tensors[i].space == PERK_SPACE_KV)
            now->live[i] = true;
        else if (i != out && tensors_overlap(f, i, out))
            now->live[i] = false;
    }
    int in = pick_input(f, now, out);
    bool whole = chance(60), in_place = now->live[out] && chance(60);
    now->live[out] = true;
    int tasks = chance(20) ? 1 : chance(50) ? 2 : TILES, width = TILES * TILE / tasks;
    for (int i = 0; i < tasks; i++) {
        fixture_task_add(f, stage, random_below(f->workers));
        fixture_read(f, in, whole ? 0 : i * width, whole ? TILES * TILE : width);
        if (in_place) fixture_read(f, out, i * width, width);
        fixture_write(f, out, i * width, width);
    }
}

static plan_fixture random_plan(void) {
    plan_fixture f = {.workers = 1 + random_below(MAX_WORKERS)};
    fixture_tensor(&f, "input", PERK_SPACE_ACTIVATIONS, -1, 1, TILES * TILE);
    f.tensors[0].external_input = true;
    random_tensor(&f, true);
    contents now = {{false}};
    for (int i = 2 + random_below(5); i > 0; i--) random_stage(&f, &now);
    bool chain = chance(40);
    for (int i = 0; i < f.task_count; i++) {
        if (chain)
            add_chain(&f, i);
        else
            add_waits(&f, i);
    }
    if (chance(25)) merge_counters(&f);
    return f;
}

/* One random change of a kind that a broken lowering could make. */
static void mutate(plan_fixture *f) {
    fixture_task *t = &f->tasks[random_below(f->task_count)];
    perk_wait *wait = t->wait_count ? &t->waits[random_below(t->wait_count)] : NULL;
    perk_region *write = t->write_count ? &t->writes[random_below(t->write_count)] : NULL;
    perk_region *read = t->read_count ? &t->reads[random_below(t->read_count)] : NULL;
    switch (random_below(12)) {
    case 0:
        if (wait) *wait = t->waits[--t->wait_count];
        break;
    case 1: t->signal_count = 0; break;
    case 2:
        if (wait) wait->needed += random_below(5) - 2;
        break;
    case 3:
        if (wait) wait->counter = random_below(f->counter_count);
        break;
    case 4: t->task.worker = random_below(f->workers); break;
    case 5: fixture_swap(f, random_below(f->task_count), (int)(t - f->tasks)); break;
    case 6:
        if (write) write->col_begin = random_below(TILES * TILE - write->col_count + 1);
        break;
    case 7:
        if (read) read->tensor = random_below(f->tensor_count);
        break;
    case 8: {
        perk_plan_tensor *a = &f->tensors[1 + random_below(f->tensor_count - 1)];
        const perk_plan_tensor *b = &f->tensors[random_below(f->tensor_count)];
        if (a->space == b->space) a->offset = b->offset;
        break;
    }
    case 9:
        if (t->signal_count) t->signals[0].counter = random_below(f->counter_count);
        break;
    case 10:
        if (t->signal_count) t->signals[0].amount = 1 + random_below(3);
        break;
    case 11:
        if (t->wait_count < FIXTURE_TASK_ITEMS)
            t->waits[t->wait_count++] = (perk_wait){random_below(f->counter_count), random_below(4)};
        break;
    }
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 4000, first = argc > 2 ? atoi(argv[2]) : 0;
    int accepted[4] = {0}, refused[4] = {0}, refused_safe[4] = {0};
    for (int i = first; i < first + rounds; i++) {
        random_state = 0x853c49e6748fea9bu * (uint64_t)(2 * i + 1);
        plan_fixture f = random_plan();
        int mutations = random_below(4);
        for (int j = 0; j < mutations; j++) mutate(&f);
        perk_plan *plan = fixture_plan(&f);
        perk_error err = {0};
        perk_status status = perk_plan_check(plan, &err);
        CHECK(status == PERK_OK || status == PERK_UNSAFE_PLAN, "round %d: %s", i, err.message);
        const char *fault = find_fault(plan);
        CHECK(status != PERK_OK || !fault, "round %d: the checker accepts a plan in which %s", i, fault);
        accepted[mutations] += status == PERK_OK;
        refused[mutations] += status != PERK_OK;
        refused_safe[mutations] += status != PERK_OK && !fault;
        if (status != PERK_OK && !fault && argc > 3) fprintf(stderr, "round %d: %s\n", i, err.message);
        fixture_plan_free(plan);
        fixture_free(&f);
    }
    for (int j = 0; j < 4; j++)
        fprintf(
            stderr,
            "test_check_random: %d changes: %d accepted, none at fault; %d refused, %d of them without a fault seen\n",
            j, accepted[j], refused[j], refused_safe[j]);
    return 0;
}
