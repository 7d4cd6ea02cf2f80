/* The plan checker on plans made by hand: good ones pass, and every way to break them is found and named. */
#include "plan_fixture.h"

static perk_error err;

static void expect_good(const plan_fixture *f) {
    perk_plan *plan = fixture_plan(f);
    CHECK_OK(perk_plan_check(plan, &err));
    CHECK(perk_plan_check(plan, NULL) == PERK_OK);
    fixture_plan_free(plan);
}

/* Frees the fixture. */
static void expect_bad(plan_fixture *f, const char *text) {
    perk_plan *plan = fixture_plan(f);
    CHECK_FAILS(perk_plan_check(plan, &err), PERK_UNSAFE_PLAN, text);
    CHECK(perk_plan_check(plan, NULL) == PERK_UNSAFE_PLAN);
    fixture_plan_free(plan);
    fixture_free(f);
}

/* Two workers, three stages: `first` writes a by halves, `second` reads all of a and writes b by halves, `third`
 * (worker 0) reads b and writes c. Tasks 0 to 4 in this order; counters 0 to 2. */
static plan_fixture small(void) {
    plan_fixture f = {.workers = 2};
    int a = fixture_tensor(&f, "a", PERK_SPACE_ACTIVATIONS, -1, 4, 64);
    int b = fixture_tensor(&f, "b", PERK_SPACE_ACTIVATIONS, -1, 4, 64);
    int c = fixture_tensor(&f, "c", PERK_SPACE_ACTIVATIONS, -1, 4, 64);
    int first = fixture_stage(&f, "first"), second = fixture_stage(&f, "second"), third = fixture_stage(&f, "third");
    for (int i = 0; i < 2; i++) {
        fixture_task_add(&f, first, i);
        fixture_wait(&f, 2, 0);
        fixture_write(&f, a, 32 * i, 32);
    }
    for (int i = 0; i < 2; i++) {
        fixture_task_add(&f, second, i);
        fixture_wait(&f, 0, 2);
        fixture_read_all(&f, a);
        fixture_write(&f, b, 32 * i, 32);
    }
    fixture_task_add(&f, third, 0);
    fixture_wait(&f, 1, 2);
    fixture_read_all(&f, b);
    fixture_write(&f, c, 0, 64);
    return f;
}

static void test_good(void) {
    plan_fixture f = small();
    expect_good(&f);
    fixture_free(&f);
    f = (plan_fixture){.workers = 3};
    expect_good(&f); /* no task at all */
    fixture_free(&f);
    const fixture_model models[] = {{2, 1, 1, 4, 6, 2, 8, 16},
                                    {5, 3, 4, 8, 12, 4, 24, 40},
                                    {1, 2, 2, 4, 6, 2, 8, 16},
                                    {132, 2, 8, 64, 96, 8, 384, 500}};
    for (size_t i = 0; i < PERK_COUNT(models); i++) {
        f = fixture_model_plan(&models[i]);
        expect_good(&f);
        fixture_free(&f);
    }
}

static void test_signals_and_waits(void) {
    plan_fixture f = small();
    perk_plan *plan = fixture_plan(&f);
    plan->tasks[0].signal_end--; /* dropped behind the back of counter_per_step */
    CHECK_FAILS(perk_plan_check(plan, &err), PERK_UNSAFE_PLAN, "counter 0 (first) gets 1 in signals a step");
    fixture_plan_free(plan);

    f.tasks[0].signal_count = 0; /* dropped, and the sum made to fit */
    expect_bad(&f, "second (worker 0, position 1) waits for 2 on counter 0 (first), which gets only 1");

    f = small();
    f.tasks[3].wait_count = 0; /* second on worker 1 */
    expect_bad(&f, "second (worker 1, position 1) reads a[0:4, 0:64]");

    f = small();
    f.tasks[2].waits[0].needed = 1; /* too small: its own worker's signal could be the one */
    expect_bad(&f, "second (worker 0, position 1) reads a[0:4, 0:64]");

    f = small();
    f.tasks[4].waits[0].needed = 3; /* too large */
    expect_bad(&f, "third (worker 0, position 2) waits for 3 on counter 1 (second), which gets only 2");

    f = small();
    f.tasks[1].waits[0].needed = 1; /* first waits for third, which waits for first */
    expect_bad(&f, "a cycle");
    CHECK(strstr(err.message, "first (worker 1, position 0) waits for 1 on counter 2 (third), which has 0"));
    CHECK(strstr(err.message, "second (worker 0, position 1) waits for 2 on counter 0 (first)"));

    f = small();
    fixture_swap(&f, 2, 4); /* on worker 0, third now comes before second */
    expect_bad(&f, "a cycle");

    f = small();
    f.tasks[0].wait_count = f.tasks[1].wait_count = 0; /* the next step overwrites a while second still reads it */
    expect_bad(&f, "first (worker 1, position 0) writes a[0:4, 32:64] while second (worker 0, position 1) of the step "
                   "before may still read it");
}

static void test_memory(void) {
    plan_fixture f = small();
    f.tensors[2].offset = f.tensors[1].offset; /* c is written while b is read, by the same task */
    expect_bad(&f, "third (worker 0, position 2) writes c[0:4, 0:64] and also uses another tensor that shares its");

    f = small();
    f.tensors[1].offset = f.tensors[0].offset; /* b is written while a is read */
    expect_bad(&f, "writes b[0:4, 32:64] and also uses another tensor that shares its");

    f = small();
    f.tasks[3].read_count = 0; /* the same by another task */
    f.tensors[1].offset = f.tensors[0].offset;
    expect_bad(&f, "reads a[0:4, 0:64], which b has destroyed: the two share bytes");

    f = small();
    f.tensors[2].space = PERK_SPACE_CONSTANTS;
    f.tensors[1].space = PERK_SPACE_CONSTANTS;
    f.tasks[4].write_count = f.tasks[2].write_count = f.tasks[3].write_count = 0;
    f.space_bytes[PERK_SPACE_CONSTANTS] = f.space_bytes[PERK_SPACE_ACTIVATIONS];
    f.tensors[2].offset = f.tensors[1].offset;
    expect_bad(&f, "b and c share bytes, but both are loaded there");

    f = small(); /* c takes the bytes of a, whose columns would no longer end with zeros */
    f.tensors[2].offset = f.tensors[0].offset;
    f.tensors[0].row_stride = 64;
    f.tensors[0].cols = 48;
    for (int i = 0; i < 4; i++) (i < 2 ? f.tasks[i].writes : f.tasks[i].reads)->col_count = i < 2 ? 16 : 48;
    expect_bad(&f, "a and c share bytes, but what lies between the columns and the stride of one must stay zero");

    f = small(); /* third takes the bytes of a without waiting for second */
    f.tensors[2].offset = f.tensors[0].offset;
    expect_good(&f);
    f.tasks[4].wait_count = f.tasks[4].read_count = 0;
    expect_bad(&f, "third (worker 0, position 2) writes c[0:4, 0:64] while second (worker 1, position 1) may still use "
                   "a, which shares its bytes");

    f = small(); /* third reads a although b has taken its bytes: everything is ordered, the content is gone */
    f.tensors[1].offset = f.tensors[0].offset;
    f.tasks[2].read_count = f.tasks[3].read_count = 0;
    expect_good(&f);
    f.tasks[4].reads[0].tensor = 0;
    expect_bad(&f, "third (worker 0, position 2) reads a[0:4, 0:64], which b has destroyed");

    f = small();
    f.tasks[1].writes[0].col_count = 16; /* a quarter of a is never written */
    expect_bad(&f, "of which nothing has written a part");

    f = small();
    f.tasks[0].write_count = f.tasks[1].write_count = 0;
    expect_bad(&f, "which nothing has written: no task writes it");
    f = small();
    f.tasks[0].write_count = f.tasks[1].write_count = 0;
    f.tensors[0].external_input = true;
    expect_good(&f);
    f.tensors[1].offset = f.tensors[0].offset;
    expect_bad(&f, "a and b share bytes, but the host writes one of them");

    f = small();
    f.tasks[3].writes[0].col_begin = 16; /* both write columns 16 to 32 */
    expect_bad(&f, "second (worker 0, position 1) writes b[0:4, 0:32] while second (worker 1, position 1) may still "
                   "write it");

    f = small();
    f.tasks[4].writes[0].tensor = 0; /* third overwrites a: second has read it, first of the next step waits */
    expect_good(&f);
    f.tasks[1].wait_count = 0;
    expect_bad(&f, "counter");

    f = small(); /* the right order of everything, but of the wrong stages */
    for (int i = 0; i < 5; i++) f.tasks[i].task.stage = 2 - f.tasks[i].task.stage;
    f.stages[0].task_count = f.stages[0].unit_count = 1;
    f.stages[2].task_count = f.stages[2].unit_count = 2;
    f.tasks[4].task.first = 0;
    expect_bad(&f, "after the later stage");
}

static void test_kv(void) {
    plan_fixture f = small();
    f.space_bytes[PERK_SPACE_KV] = 4096;
    f.tensors[0].space = PERK_SPACE_KV;
    f.tasks[0].write_count = 0; /* never written: content of earlier steps or none */
    expect_good(&f);
    f.tasks[0].wait_count = f.tasks[1].wait_count = 0;
    expect_bad(&f, "may still read it");

    f = small();
    f.space_bytes[PERK_SPACE_KV] = 4096;
    for (int i = 0; i < 2; i++) {
        f.tensors[i].space = PERK_SPACE_KV;
        f.tensors[i].offset = 0;
    }
    expect_bad(&f, "the KV cache outlives the step");

    f = small();
    f.space_bytes[PERK_SPACE_CONSTANTS] = 4096;
    f.tensors[0].space = PERK_SPACE_CONSTANTS;
    expect_bad(&f, "first (worker 0, position 0) writes a[0:4, 0:32], which is written at load only");
    f = small();
    f.tensors[0].external_input = true;
    expect_bad(&f, "which is the host's to write");
}

/* One counter for all: every stage signals it, waits ask for sums up to a stage's end. */
static void test_shared_counter(void) {
    plan_fixture f = small();
    for (int i = 0; i < f.task_count; i++) f.tasks[i].signals[0].counter = 0;
    for (int i = 0; i < 3; i++) f.stages[i].counter = 0;
    for (int i = 0; i < 2; i++) f.tasks[i].waits[0].counter = 0;
    f.tasks[4].waits[0] = (perk_wait){0, 4};
    expect_good(&f);
    f.tasks[4].waits[0].needed = 3; /* any three of the first four */
    expect_bad(&f, "third");
}

/* A threshold inside a stage is a proof where the other signals cannot reach it. */
static void test_counting(void) {
    plan_fixture f = small();
    f.tasks[1].signals[0].amount = 3; /* first on worker 1: 3 of 4 */
    f.tasks[2].waits[0].needed = 4;
    f.tasks[3].waits[0].needed = 2; /* worker 1's own half is certain, worker 0's is not */
    f.tasks[3].reads[0] = fixture_region(&f, 0, 32, 32);
    expect_good(&f);
    f.tasks[2].waits[0].needed = 2; /* certain for worker 0: the 3 of worker 1; its own comes before by the list */
    expect_good(&f);
    f.tasks[2].waits[0].needed = 1;
    expect_bad(&f, "second (worker 0, position 1)");
}

static void test_bounds(void) {
    plan_fixture f = small();
    f.tasks[0].writes[0].row_end = 5;
    expect_bad(&f, "reaches beyond its tensor");
    f = small();
    f.tasks[0].writes[0].col_begin = 33;
    expect_bad(&f, "reaches beyond its tensor");
    f = small();
    f.tasks[0].writes[0] = (perk_region){0, 0, 4, 0, 8, 8, 9};
    expect_bad(&f, "reaches beyond its tensor");
    f = small();
    f.tasks[0].writes[0] = (perk_region){0, 0, 4, 0, 8, 7, 2};
    expect_bad(&f, "overlaps itself");
    f = small();
    f.tasks[0].writes[0] = (perk_region){0, 0, 4, 0, INT32_MAX, INT32_MAX, INT32_MAX};
    expect_bad(&f, "reaches beyond its tensor");
    f = small();
    f.tasks[0].writes[0] = (perk_region){0, 0, 4, 0, 8, 8, 4}; /* the same columns in intervals */
    expect_good(&f);
    f.tensors[0].bytes--;
    expect_bad(&f, "do not fit");
    f = small();
    f.tensors[2].offset = 1 << 20;
    expect_bad(&f, "not in its space");
    f = small();
    f.tensors[1].offset = UINT64_MAX - 255;
    expect_bad(&f, "not in its space");
    f = small();
    f.tensors[1].row_stride = 63;
    expect_bad(&f, "is no shape");
    f = small();
    f.tasks[3].task.count = 2;
    expect_bad(&f, "units");
}

/* ---- corruption of single fields ------------------------------------------------------------------------------- */

static uint64_t random_state = 0x9e3779b97f4a7c15u;
static uint32_t random_below(uint32_t bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32) % bound;
}

static int32_t random_value(int32_t old) {
    static const int32_t special[] = {0, -1, 1, 2, INT32_MAX, INT32_MIN, 1 << 16, 1 << 24, -(1 << 20)};
    switch (random_below(3)) {
    case 0: return special[random_below(PERK_COUNT(special))];
    case 1: return (int32_t)((uint32_t)old + random_below(7) - 3);
    default: return (int32_t)random_below(64);
    }
}

/* Changes the flags that word `word` behind the name holds; false: it holds none. A flag is 0 or 1, whatever else is
 * wrong. */
static bool corrupt_flags(perk_plan *plan, bool of_tensor, size_t item, size_t word, int32_t value) {
    size_t flags = of_tensor ? offsetof(perk_plan_tensor, external_input) - sizeof plan->tensors->name
                             : offsetof(perk_stage, takes_inputs) - sizeof plan->stages->name;
    if (word != flags / 4) return false;
    if (of_tensor) {
        plan->tensors[item].external_input = value & 1;
        plan->tensors[item].eager = value >> 1 & 1;
    } else {
        perk_stage *stage = &plan->stages[item];
        stage->takes_inputs = value & 1;
        stage->is_vocabulary = value >> 1 & 1;
        stage->eager = value >> 2 & 1;
    }
    return true;
}

/* Changes one 32-bit word of one array, or a count (downwards only: the lengths of arrays are what is trusted). */
static void corrupt(perk_plan *plan) {
    struct {
        void *array;
        int count;
        size_t size, skip; /* skip: the name */
    } arrays[] = {{plan->tensors, plan->tensor_count, sizeof *plan->tensors, sizeof plan->tensors->name},
                  {plan->stages, plan->stage_count, sizeof *plan->stages, sizeof plan->stages->name},
                  {plan->counter_per_step, plan->counter_count, 4, 0},
                  {plan->tasks, plan->task_count, sizeof *plan->tasks, 0},
                  {plan->worker_begin, plan->device.worker_count + 1, 4, 0},
                  {plan->waits, plan->wait_count, sizeof *plan->waits, 0},
                  {plan->signals, plan->signal_count, sizeof *plan->signals, 0},
                  {plan->regions, plan->region_count, sizeof *plan->regions, 0},
                  {plan->space_bytes, PERK_SPACE_COUNT, sizeof *plan->space_bytes, 0}};
    int *counts[] = {&plan->tensor_count,  &plan->stage_count,  &plan->kind_count,
                     &plan->counter_count, &plan->task_count,   &plan->wait_count,
                     &plan->signal_count,  &plan->region_count, &plan->device.worker_count};
    uint32_t which = random_below(PERK_COUNT(arrays) + 1);
    if (which == PERK_COUNT(arrays)) {
        int *count = counts[random_below(PERK_COUNT(counts))];
        *count = random_below(2) ? (int)random_below((uint32_t)*count + 1) : -1 - (int)random_below(5);
        return;
    }
    size_t words = (arrays[which].size - arrays[which].skip) / 4;
    size_t item = random_below((uint32_t)arrays[which].count), word = random_below((uint32_t)words);
    char *at = (char *)arrays[which].array + item * arrays[which].size + arrays[which].skip + 4 * word;
    int32_t value;
    memcpy(&value, at, 4);
    value = random_value(value);
    if (which > 1 || !corrupt_flags(plan, which == 0, item, word, value)) memcpy(at, &value, 4);
}

static void test_corruption(void) {
    const fixture_model m = {3, 2, 2, 4, 6, 2, 8, 10};
    plan_fixture f = fixture_model_plan(&m);
    int accepted = 0, rounds = 20000, unsafe = 0;
    for (int i = 0; i < rounds; i++) {
        perk_plan *plan = fixture_plan(&f);
        corrupt(plan);
        memset(&err, 0, sizeof err);
        perk_status status = perk_plan_check(plan, &err);
        CHECK(status == PERK_OK || status == PERK_UNSAFE_PLAN || status == PERK_LIMIT, "%s", err.message);
        CHECK(status == PERK_OK || err.message[0]);
        accepted += status == PERK_OK;
        unsafe += status == PERK_UNSAFE_PLAN;
        fixture_plan_free(plan);
    }
    fprintf(stderr,
            "test_check: %d corruptions: %d refused as unsafe, %d accepted (fields without a say, equal values)\n",
            rounds, unsafe, accepted);
    fixture_free(&f);
}

/* The size of Qwen3-8B on 132 workers. */
static void test_time(void) {
    const fixture_model m = {132, 36, 8, 256, 384, 8, 1536, 9496};
    plan_fixture f = fixture_model_plan(&m);
    perk_plan *plan = fixture_plan(&f);
    double best = 1e9;
    for (int i = 0; i < 5; i++) {
        double begin = perk_now();
        CHECK_OK(perk_plan_check(plan, &err));
        best = PERK_MIN(best, perk_now() - begin);
    }
    fprintf(stderr, "test_check: %d tasks, %d stages, %d workers: %.1f ms\n", plan->task_count, plan->stage_count,
            plan->device.worker_count, best * 1e3);
    fixture_plan_free(plan);
    fixture_free(&f);
}

int main(void) {
    test_good();
    test_signals_and_waits();
    test_memory();
    test_kv();
    test_shared_counter();
    test_counting();
    test_bounds();
    test_corruption();
    test_time();
    return 0;
}
