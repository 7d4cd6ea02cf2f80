/* Device code without a GPU: what NVRTC would compile runs on the CPU, on an emulator of the block, its warps, barriers
 * and copies (tests/emulator/), behind the fake driver. Ops against the reference, native and portable; the shipped
 * model; and device code that was broken on purpose, which must show. EMULATOR_SEED=N runs everything in another order,
 * EMULATOR_FAULT=WORDS of the broken ones those alone that are called so. */
#include "emulated.h"
#include "op_cases.h"
#include "perk/engine.h"

#include <fcntl.h>
#include <math.h>
#include <sys/wait.h>
#include <unistd.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"

enum { WORKERS = 3 };

static perk_error err;
static opened_fake fake;

/* ---- ops ---- */

static path_text cache;

static bool run_op(const perk_op_case *c, int portable, perk_op_verdict *v) {
    const perk_test_options options = {
        .backend = PERK_BACKEND_GPU, .portable = portable, .seed = 11, .cache_folder = cache.text};
    char shape[128];
    perk_op_case_shape(c, shape, sizeof shape);
    perk_status status = perk_op_case_run(c, &options, v, &err);
    CHECK(status == PERK_OK, "%s %s: %s", c->op, shape, err.message);
    CHECK(v->compared && fake.driver->launches > 0, "%s %s ran on %s", c->op, shape, v->report.executor);
    CHECK(!fake.driver->misuse, "%s: %s", fake.driver->misused_in, fake.driver->misuse);
    return v->passed;
}

/* What an emulated tensor core does in a second. */
static bool is_small(const perk_op_case *c) {
    double rows = (double)(c->rows + 7) / 8 * (double)PERK_MAX(1, PERK_MIN(c->experts, c->rows * c->top_k));
    return rows * (double)c->in * (double)c->out <= (c->experts ? 1e6 : 4e6) &&
           rows * (double)c->heads * (double)c->head_dim * (double)(c->context + c->rows) <= 2e6;
}

static void test_ops(void) {
    size_t count;
    int ran = 0;
    const perk_op_case *grid = perk_op_grid(&count);
    for (size_t i = 0; i < count; i++) {
        perk_op_verdict v;
        char shape[128];
        if (!is_small(&grid[i])) continue;
        for (int portable = 0; portable < 1 + (i % 3 == 0); portable++, ran++)
            CHECK(run_op(&grid[i], portable, &v), "%s %s, %s: %s[%zu, %zu] is %g, wanted %g; %s", grid[i].op,
                  perk_op_case_shape(&grid[i], shape, sizeof shape), portable ? "portable" : "native", v.tensor,
                  v.by.row, v.by.col, v.by.got, v.by.wanted, v.problem);
    }
    CHECK(ran >= 24, "%d cases", ran);
    fprintf(stderr, "%d cases of ops\n", ran);
}

/* More than 8 rows: linears on wgmma, with one to eight row tiles together, cut ones, odd numbers of blocks, rows that
 * the step does not have. */
static void test_wide(void) {
    static const perk_op_case cases[] = {
        {.op = "linear", .rows = 9, .in = 2080, .out = 33, .bias = true},
        {.op = "linear", .rows = 64, .in = 200, .out = 380, .residual = true},
        {.op = "linear", .rows = 33, .live = 20, .in = 544, .out = 489, .bias = true, .residual = true},
        {.op = "linear", .rows = 48, .in = 64, .out = 190, .residual = true},
        {.op = "mlp", .rows = 32, .live = 17, .in = 320, .out = 250},
        {.op = "vocabulary", .rows = 20, .in = 96, .out = 590},
        ODD_DECODER(40, 33),
        {.op = "linear", .rows = 128, .in = 200, .out = 90, .bias = true, .residual = true},
        {.op = "linear", .rows = 100, .in = 544, .out = 489, .residual = true},
        {.op = "linear", .rows = 256, .live = 70, .in = 64, .out = 40},
        {.op = "mlp", .rows = 256, .live = 200, .in = 136, .out = 150},
        {.op = "mlp", .rows = 65, .in = 320, .out = 250},
        {.op = "linear", .rows = 530, .live = 270, .in = 64, .out = 130},
        {.op = "vocabulary", .rows = 80, .in = 96, .out = 300},
        ODD_DECODER(128, 90),
        {.op = "decoder",
         .rows = 80,
         .in = 64,
         .out = 50,
         .heads = 4,
         .kv_heads = 2,
         .head_dim = 64,
         .context = 150,
         .requests = 2,
         .norms = true},
        {.op = "attention", .rows = 70, .heads = 8, .kv_heads = 1, .head_dim = 128, .context = 130, .norms = true},
        {.op = "attention",
         .rows = 100,
         .live = 99,
         .heads = 10,
         .kv_heads = 2,
         .head_dim = 64,
         .context = 300,
         .window = 90,
         .requests = 3},
        {.op = "attention", .rows = 80, .live = 78, .heads = 4, .kv_heads = 4, .head_dim = 64},
        {.op = "attention", .rows = 72, .heads = 4, .kv_heads = 2, .head_dim = 96, .context = 20},
    };
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_op_verdict v;
        char shape[128];
        CHECK(run_op(&cases[i], 0, &v), "%s %s: %s[%zu, %zu] is %g, wanted %g; %s", cases[i].op,
              perk_op_case_shape(&cases[i], shape, sizeof shape), v.tensor, v.by.row, v.by.col, v.by.got, v.by.wanted,
              v.problem);
    }
}

/* ---- experts: every way to spread tokens over them ---- */

enum { EXPERTS = 11, TOP = 2, WIDTH = 40, INNER = 19, ROWS = 16, PATTERNS = 5 };

typedef struct expert_test {
    perk_test *test;
    perk_tensor *x, *router, *experts, *y;
} expert_test;

/* The router's weight is a unit matrix: what a row has in its first columns are its logits. */
static void open_experts(expert_test *t, perk_backend backend) {
    const perk_test_options options = {
        .backend = backend, .rows = ROWS, .threads = 1, .seed = 5, .cache_folder = cache.text};
    float unit[EXPERTS * WIDTH] = {0};
    CHECK_OK(perk_test_create(&t->test, &options, &err));
    perk_graph *g = perk_test_graph(t->test);
    t->x = perk_input(g, "x", WIDTH);
    t->router = perk_attach_matrix(g, "router", EXPERTS, WIDTH);
    perk_routing routing = perk_moe_route(g, "route", perk_logits(g, "logits", t->x, t->router), TOP, 1);
    perk_tensor *gate = perk_attach_experts(g, "*.gate", EXPERTS, INNER, WIDTH);
    perk_tensor *parts[] = {gate, perk_attach_experts(g, "*.up", EXPERTS, INNER, WIDTH)};
    perk_tensor *both = perk_moe_linear(g, "both", t->x, perk_stack(g, "gate_up", parts, 2), routing.experts);
    perk_tensor *weight = perk_attach_experts(g, "*.down", EXPERTS, WIDTH, INNER);
    perk_tensor *down = perk_moe_linear(g, "down", perk_silu_mul(g, "inner", both), weight, routing.experts);
    t->experts = routing.experts;
    perk_keep(g, t->experts);
    t->y = perk_moe_sum(g, "y", down, routing.shares, t->x);
    perk_keep(g, t->y);
    for (int i = 0; i < EXPERTS; i++) unit[i * WIDTH + i] = 1;
    CHECK_OK(perk_test_set(t->test, t->router, unit, EXPERTS * WIDTH, &err));
}

/* All to two experts, to all in turn, most to the last, to one more and one less, to those of the row before. */
static int first_choice(int pattern, int row) {
    const int choices[PATTERNS] = {3, row % EXPERTS, row ? EXPERTS - 1 : 0, row % 2 ? 4 : 9, row / 2 % EXPERTS};
    return choices[pattern];
}

static void run_experts(expert_test *t, int pattern, float *experts, float *y) {
    float x[ROWS * WIDTH];
    for (int i = 0; i < ROWS * WIDTH; i++) x[i] = (float)(i * 37 % 61 - 30) / 64;
    for (int row = 0; row < ROWS; row++) {
        int first = first_choice(pattern, row), second = (first + 1 + pattern) % EXPERTS;
        for (int i = 0; i < EXPERTS; i++) x[row * WIDTH + i] = i == first ? 3 : i == second ? 2 : (float)-i / 16;
    }
    CHECK_OK(perk_test_set(t->test, t->x, x, ROWS * WIDTH, &err));
    CHECK_OK(perk_test_run(t->test, &err));
    CHECK_OK(perk_test_read(t->test, t->experts, experts, ROWS * TOP, &err));
    CHECK_OK(perk_test_read(t->test, t->y, y, ROWS * WIDTH, &err));
    for (int row = 0; row < ROWS; row++)
        CHECK((int)experts[row * TOP] == first_choice(pattern, row), "pattern %d, row %d", pattern, row);
}

static void test_experts(void) {
    expert_test gpu, reference;
    float experts[ROWS * TOP], other[ROWS * TOP], got[ROWS * WIDTH], wanted[ROWS * WIDTH];
    for (int i = 0; i < PATTERNS; i++) {
        double difference = 0, norm = 0;
        open_experts(&gpu, PERK_BACKEND_GPU);
        open_experts(&reference, PERK_BACKEND_REFERENCE);
        run_experts(&gpu, i, experts, got);
        run_experts(&reference, i, other, wanted);
        CHECK(!memcmp(experts, other, sizeof experts), "pattern %d: other experts", i);
        for (int j = 0; j < ROWS * WIDTH; j++) {
            difference += (double)(got[j] - wanted[j]) * (double)(got[j] - wanted[j]);
            norm += (double)wanted[j] * (double)wanted[j];
        }
        CHECK(difference <= norm * 3e-3 * 3e-3, "pattern %d: %g", i, sqrt(difference / norm));
        perk_test_free(gpu.test);
        perk_test_free(reference.test);
    }
}

/* ---- models ---- */

enum { TOKENS = 20, VOCABULARY = 2048 };

/* Returns how wide the vocabulary is. */
static int compute_logits(const char *folder, perk_backend backend, int rows, float *logits) {
    const perk_engine_options options = {
        .backend = backend,
        .precision = 1,
        .no_cache = 1,
        .program_tokens = {rows},
        .config = {.max_num_batched_tokens = rows, .max_num_logit_rows = rows, .max_seq_length = 64, .page_size = 16}};
    perk_engine *engine;
    int32_t ids[TOKENS];
    CHECK_OK(perk_engine_open(&engine, folder, &options, &err));
    CHECK(perk_engine_vocab_size(engine) <= VOCABULARY);
    for (int i = 0; i < TOKENS; i++) ids[i] = (i * i * 53 + 7) % perk_engine_vocab_size(engine);
    CHECK_OK(perk_engine_logits(engine, ids, TOKENS, logits, &err));
    int vocabulary = perk_engine_vocab_size(engine);
    perk_engine_free(engine);
    return vocabulary;
}

/* Of the shipped model's logits on the GPU, against the reference executor's. */
static double model_error(const float *wanted, int rows) {
    static float got[TOKENS * VOCABULARY];
    double difference = 0, norm = 0;
    compute_logits(TINY, PERK_BACKEND_GPU, rows, got);
    for (int i = 0; i < TOKENS * VOCABULARY; i++) {
        difference += (double)(got[i] - wanted[i]) * (double)(got[i] - wanted[i]);
        norm += (double)wanted[i] * (double)wanted[i];
    }
    return sqrt(difference / norm);
}

static const double most_model_error = 2e-2; /* that of the tests on a GPU */

static void test_model(void) {
    static float wanted[TOKENS * VOCABULARY];
    compute_logits(TINY, PERK_BACKEND_REFERENCE, 8, wanted);
    for (int rows = 1; rows <= 20; rows += rows == 1 ? 7 : 12) {
        double error = model_error(wanted, rows);
        CHECK(error <= most_model_error, "%d rows: relative error %g", rows, error);
    }
}

/* Rows of logits that differ by more than rounding explains. */
static int count_strays(const float *got, const float *wanted, int vocabulary) {
    int strays = 0;
    for (int row = 0; row < TOKENS; row++) {
        double difference = 0, norm = 0;
        for (int i = row * vocabulary; i < (row + 1) * vocabulary; i++) {
            difference += (double)(got[i] - wanted[i]) * (double)(got[i] - wanted[i]);
            norm += (double)wanted[i] * (double)wanted[i];
        }
        strays += !(difference <= norm * 4e-2 * 4e-2);
    }
    return strays;
}

/* A token whose experts all but tie may go to another one than in the reference, and those that attend to it feel that;
 * but not where all experts are picked. */
static void test_expert_models(void) {
    static const struct {
        const char *name;
        int most_strays;
    } models[] = {{"window", 0}, {"top2", TOKENS / 3}, {"some_layers", TOKENS / 3}};
    static float wanted[TOKENS * VOCABULARY], got[TOKENS * VOCABULARY];
    for (size_t i = 0; i < PERK_COUNT(models); i++) {
        char folder[1024];
        snprintf(folder, sizeof folder, "%s/tests/fixtures/qwen3_moe/%s", PERK_SOURCE_DIR, models[i].name);
        int vocabulary = compute_logits(folder, PERK_BACKEND_REFERENCE, 16, wanted);
        for (int rows = 1; rows <= 16; rows *= 4) {
            compute_logits(folder, PERK_BACKEND_GPU, rows, got);
            int strays = count_strays(got, wanted, vocabulary);
            CHECK(strays <= models[i].most_strays, "%s, %d rows: %d strays", models[i].name, rows, strays);
        }
    }
}

/* ---- device code that is wrong ---- */

/* What the program does: linears of up to 8, 64, 256 tokens; attention over a cache that comes through the ring; steps
 * of a model, whose stages signal eagerly. */
typedef enum program_form { NARROW, BATCHED, WIDE, CACHE, STEPS } program_form;

static const struct {
    const char *what;
    fake_edit edits[FAKE_EDITS];
    bool passes; /* stays right: what the others are held against */
    program_form form;
} faults[] = {
    {"nothing wrong", {{"linear.cuh", "// the products need the slots no more", "//"}}, true, NARROW},
    {"a ring slot is given back before it was read",
     {{"linear.cuh", "if (in_chunk == 0) place.await(w);",
       "if (in_chunk == 0) place.await(w);\nif (in_chunk + kGroupBlocks >= kShare) place.release(w, 0);"},
      {"linear.cuh", "place.release(w, word_of(a) | word_of(b));", ";"}},
     false,
     NARROW},
    {"a chunk is not waited for", {{"linear.cuh", "if (in_chunk == 0) place.await(w);", ""}}, false, NARROW},
    {"outputs are signalled before all warps have stored them",
     {{"worker.cuh",
       "    named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);\n    if (w.thread != 0 || given_up) return;",
       "    if (w.thread != 0 || given_up) return;"}},
     false,
     NARROW},
    {"inputs are not waited for",
     {{"worker.cuh", "if (w.lane < PERK_RECORD_WAITS && per_step != 0) wait_counter(w, counter, target);", ""}},
     false,
     NARROW},
    {"experts are streamed before they are picked",
     {{"worker.cuh", "if (w.lane == 0) wait_counter(w, __ldg(&record->routing_counter), w.step() * signals + signals);",
       ""}},
     false,
     NARROW},
    {"a worker picks experts by logits that are not there",
     {{"worker.cuh", "if (w.lane == 0) wait_counter(w, counter, w.step() * signals + signals);", ""}},
     false,
     NARROW},
    {"experts are listed before all warps have picked",
     {{"moe.cuh",
       "named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);\n        if (w.warp == 0) list_hits(w, routing);",
       "if (w.warp == 0) list_hits(w, routing);"}},
     false,
     NARROW},
    {"half of the warp goes another way",
     {{"rows.cuh", "int offset = 16; offset", "int offset = w_half(); offset"},
      {"rows.cuh", "// Sum over the 32 lanes",
       "__device__ inline int w_half() { return threadIdx.x % 2 ? 16 : 8; }\n//"}},
     false,
     NARROW},
    {"a store outside of shared memory",
     {{"linear.cuh", "store_shared16(base + (piece", "store_shared16(base + (1u << 20) + (piece"}},
     false,
     NARROW},
    {"nothing wrong, wide", {{"wide.cuh", "// Adds the products of one slice.", "//"}}, true, WIDE},
    {"a slice is not waited for",
     {{"wide.cuh", "wait_slot<false>(w, w.input_full(number)", "if (0) wait_slot<false>(w, 0"}},
     false,
     WIDE},
    {"a slice is given back before its products are done",
     {{"wide.cuh", "wgmma_wait<0>();",
       "mbarrier_arrive_after(w.input_empty(number), w.lane, 0);pause(20000);wgmma_wait<0>();"},
      {"wide.cuh", "wgmma_keep(sums[1]);\n        mbarrier_arrive_after(w.input_empty(number), w.lane, 0);", ""}},
     false,
     WIDE},
    {"sums are read before they are there", {{"wide.cuh", "wgmma_wait<0>();", ""}}, false, WIDE},
    {"slices are brought before they are written",
     {{"worker.cuh", "if (w.lane < PERK_RECORD_WAITS && __ldg(&record->wait_per_step[w.lane]) != 0)", "if (0)"}},
     false,
     WIDE},
    {"columns are not dealt as the weights are",
     {{"rows.cuh", "(sixteen ^ row % 8) * 16 + lane * 4", "(sixteen ^ row % 8) * 16 + (lane ^ 1) * 4"}},
     false,
     WIDE},
    {"nothing wrong, batched", {{"batched.cuh", "// ---- the products ----", "//"}}, true, BATCHED},
    {"a slice of x is not waited for",
     {{"batched.cuh", "wait_slot<false>(w, w.input_full(number)", "if (0) wait_slot<false>(w, 0"}},
     false,
     BATCHED},
    {"a slice of x is given back before it is read",
     {{"batched.cuh",
       "const bool is_there =", "mbarrier_arrive_after(w.input_empty(number), w.lane, 0); const bool is_there ="},
      {"batched.cuh", "mbarrier_arrive_after(w.input_empty(number), w.lane, word_of(", "(void)(word_of("}},
     false,
     BATCHED},
    {"a chunk is not waited for", {{"batched.cuh", "place.await(w, chunk);", ""}}, false, BATCHED},
    {"a chunk is given back before it is read",
     {{"batched.cuh", "place.await(w, chunk);", "place.await(w, chunk); place.release(w, 0);"},
      {"batched.cuh", "place.release(w, word_of(a) | word_of(b));", ""}},
     false,
     BATCHED},
    {"sums are added up before they are shared",
     {{"batched.cuh", "share_sums(w, sums);\n            named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS);",
       "share_sums(w, sums);"}},
     false,
     BATCHED},
    {"sums of the next tile do not move up",
     {{"batched.cuh", "next_round(sums);\n            if", "if"}},
     false,
     BATCHED},
    {"a lane finds the first lane's chunk",
     {{"worker.cuh", "min(n + w.lane, count - 1)", "min(n, count - 1)"}},
     false,
     BATCHED},
    {"sums are shared where others are read",
     {{"batched.cuh", "named_barrier(kConsumerBarrier, PERK_CONSUMER_THREADS); // what was shared before is read", ""}},
     false,
     BATCHED},
    {"nothing wrong, the cache streamed",
     {{"attention.cuh", "// the products need the ring no more", "//"}},
     true,
     CACHE},
    {"a round of the cache is not waited for",
     {{"kv_stream.cuh", "w.lane >= round_chunks(__popc(live)));", "true);"}},
     false,
     CACHE},
    {"a round is given back before it is read",
     {{"attention.cuh", "load_unit(w, rounds.await(w, live), unit);", "0, from = rounds.await(w, live);"},
      {"attention.cuh", "// the products need the ring no more", "load_unit(w, from, unit);"}},
     false,
     CACHE},
    {"rounds are kept by warps that have nothing in them",
     {{"attention.cuh", "return rounds.finish(w);", "return rounds.chunk;"}},
     false,
     CACHE},
    {"units come to the wrong warps",
     {{"kv_stream.cuh", "unit = __popc(live & ((1u << w.warp) - 1));", "unit = w.warp % __popc(live | 1);"}},
     false,
     CACHE},
    {"nothing wrong, eager", {{"worker.cuh", "// ---- eager values (abi.h) ----", "//"}}, true, STEPS},
    {"vacant places are taken for values",
     {{"worker.cuh", "if (!__any_sync(0xffffffffu, is_vacant)) return false;", "return false;"}},
     false,
     STEPS},
    {"vacant places are taken for pieces",
     {{"attention.cuh", "} while (look.again_words(w));", "} while (0);"}},
     false,
     STEPS},
    {"pieces of the layer before stay in their places",
     {{"attention.cuh", "PERK_VACANT_WORD, [](uint32_t, uint32_t) { return PERK_VACANT_WORD; });",
       "0, [](uint32_t, uint32_t) { return 0; });"}},
     false,
     STEPS},
    {"values of an earlier step stay in their places",
     {{"worker.cuh", "copy[i] = {kVacant, kVacant, kVacant, kVacant};", "continue;"}},
     false,
     STEPS},
};

/* Few and many units a warp, warps without any, a ring that goes round. */
static const perk_op_case cached[] = {
    {.op = "attention", .rows = 1, .heads = 4, .kv_heads = 2, .head_dim = 64, .context = 700, .requests = 1},
    {.op = "attention", .rows = 5, .heads = 2, .kv_heads = 2, .head_dim = 128, .context = 200, .requests = 3},
    {.op = "attention", .rows = 12, .heads = 4, .kv_heads = 1, .head_dim = 32, .context = 90, .requests = 4}};

static bool run_cases(const perk_op_case *cases, size_t count, size_t runs) {
    perk_op_verdict v;
    for (size_t run = 0; run < runs; run++)
        if (!run_op(&cases[run % count], 0, &v)) return false;
    return true;
}

static bool is_model_right(void) {
    static float wanted[TOKENS * VOCABULARY];
    compute_logits(TINY, PERK_BACKEND_REFERENCE, 8, wanted);
    return model_error(wanted, 1) <= most_model_error;
}

/* In a process of its own, since the emulator ends it where it finds something. */
static bool shows(const char *what, const fake_edit *edits, program_form form) {
    static const perk_op_case narrow[] = {
        {.op = "mlp", .rows = 8, .in = 512, .out = 1000},
        {.op = "decoder", .rows = 3, .in = 72, .out = 500, .heads = 3, .kv_heads = 1, .head_dim = 32, .context = 20},
        {.op = "experts", .rows = 3, .in = 72, .out = 40, .experts = 9, .top_k = 2},
        {.op = "experts", .rows = 1, .in = 72, .out = 40, .experts = 40, .top_k = 3}};
    static const perk_op_case wide[] = {{.op = "mlp", .rows = 70, .in = 512, .out = 100}};
    static const perk_op_case batched[] = {
        {.op = "mlp", .rows = 20, .in = 2400, .out = 100},
        {.op = "linear", .rows = 12, .in = 2400, .out = 100},
        {.op = "decoder", .rows = 10, .in = 72, .out = 100, .heads = 3, .kv_heads = 1, .head_dim = 32, .context = 20}};
    static const struct {
        const perk_op_case *cases;
        size_t count;
    } forms[] = {[NARROW] = {narrow, PERK_COUNT(narrow)},
                 [BATCHED] = {batched, PERK_COUNT(batched)},
                 [WIDE] = {wide, PERK_COUNT(wide)},
                 [CACHE] = {cached, PERK_COUNT(cached)},
                 [STEPS] = {NULL, 0}};
    const perk_op_case *cases = forms[form].cases;
    size_t count = forms[form].count;
    int result = -1;
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        int quiet = open("/dev/null", O_WRONLY | O_CLOEXEC);
        if (!getenv("EMULATOR_VERBOSE")) dup2(quiet, STDERR_FILENO);
        cache = path_in(scratch, what);
        memcpy(fake.compiler->edits, edits, sizeof fake.compiler->edits);
        fake.driver->launches = 0;
        bool passed = form == STEPS ? is_model_right() : run_cases(cases, count, form == WIDE ? 24 : 20);
        _exit(passed ? 0 : 1);
    }
    CHECK(child > 0 && waitpid(child, &result, 0) == child);
    CHECK(!WIFEXITED(result) || WEXITSTATUS(result) != FAKE_EDIT_MISSES,
          "%s: the device code has changed, or cannot be compiled", what);
    return result != 0;
}

/* Those that have `only` in their names; NULL: all. */
static void test_faults(const char *only) {
    int wrong = 0, ran = 0;
    for (size_t i = 0; i < PERK_COUNT(faults); i++) {
        if (only && !strstr(faults[i].what, only)) continue;
        bool shown = shows(faults[i].what, faults[i].edits, faults[i].form);
        wrong += shown == faults[i].passes;
        ran++;
        fprintf(stderr, "%s: %s\n", faults[i].what, shown ? "shows" : "does not show");
    }
    CHECK(ran > 0, "no fault is called %s", only);
    CHECK(wrong == 0, "%d faults were judged wrongly", wrong);
}

/* Shared memory for three chunks, the fewest that a program works with. */
static void test_short_ring(void) {
    const int bytes = fake.driver->device.shared_bytes;
    fake.driver->device.shared_bytes = 60 * 1024;
    for (size_t i = 0; i < PERK_COUNT(cached); i++) {
        perk_op_verdict v;
        CHECK(run_op(&cached[i], 0, &v), "case %zu: %s", i, v.problem);
    }
    fake.driver->device.shared_bytes = bytes;
}

int main(void) {
    if (strstr(EMULATOR_CXX, "NOTFOUND")) {
        fprintf(stderr, "skipped: no C++ compiler was found\n");
        return TEST_SKIP;
    }
    make_scratch();
    fake = open_emulator(WORKERS);
    cache = path_in(scratch, "cache");
    const char *only = getenv("EMULATOR_FAULT");
    test_faults(only);
    if (only) return 0;
    test_experts();
    test_ops();
    test_short_ring();
    test_wide();
    test_model();
    test_expert_models();
    return 0;
}
