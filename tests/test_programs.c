/* Several programs of one model in one engine: which there are, what their plans must have in common, that each step
 * runs the smallest that fits, and, on the emulator (tests/test_emulator.c), that requests get their tokens right while
 * programs take turns over the same pages. */
#include "fake_cuda/open_fake.h"
#include "model_noise.h"
#include "perk/engine.h"
#include "src/base.h"
#include "src/device.h"
#include "src/model.h"
#include "src/plan_shared.h"
#include "test_cache.h"

#define TINY PERK_SOURCE_DIR "/examples/tiny"

static perk_error err;
static opened_fake fake;
static perk_mode mode; /* of the engines that are opened to see what programs they have */
static path_text cache;

static void begin_run(int workers, bool emulates) {
    fake.reset_driver();
    fake.reset_compiler();
    fake.driver->device.sm_count = workers;
    fake.compiler->emulates = emulates;
}

static void check_released(void) {
    const fake_live none = {0};
    CHECK(memcmp(&fake.driver->live, &none, sizeof none) == 0 && fake.driver->swept == 0);
    CHECK(!fake.driver->misuse, "%s: %s", fake.driver->misused_in, fake.driver->misuse);
}

/* ---- plans over the same memory ---- */

static perk_plan *make_plan(const perk_graph *graph, const perk_config *config) {
    perk_device_desc device;
    perk_plan *plan;
    CHECK_OK(perk_device_describe_arch("sm_90a", &device, &err));
    CHECK_OK(perk_plan_create(&plan, graph, &device, config, &err));
    return plan;
}

static perk_config config_of(const perk_model *model, int tokens) {
    perk_config config = {.max_num_batched_tokens = tokens, .max_num_pages = 40};
    CHECK_OK(perk_config_resolve(&config, model->max_positions, &err));
    return config;
}

/* The stored tensor that lies last; its plan is the test's own. */
static perk_plan_tensor *last_stored(perk_plan *plan) {
    int i = plan->tensor_count - 1;
    while (plan->tensors[i].space != PERK_SPACE_WEIGHTS) i--;
    return &plan->tensors[i];
}

static void check_refused(const perk_plan *plan, const perk_plan *other, const char *why) {
    CHECK_FAILS(perk_plan_check_shared(plan, other, &err), PERK_UNSUPPORTED, why);
    CHECK_FAILS(perk_plan_check_shared(other, plan, &err), PERK_UNSUPPORTED, "cannot share their memory");
}

static void check_differences(const perk_plan *plan, perk_plan *other) {
    perk_plan_tensor *t = last_stored(other), kept = *t;
    t->offset += 1024;
    check_refused(plan, other, "in another place or layout");
    *t = kept;
    t->layout = PERK_LAYOUT_ROWS;
    check_refused(plan, other, kept.name);
    *t = kept;
    t->space = PERK_SPACE_ACTIVATIONS;
    check_refused(plan, other, kept.name);
    *t = kept;
    uint64_t *numbers[] = {&other->kv_layer_bytes, &other->space_bytes[PERK_SPACE_WEIGHTS],
                           &other->space_bytes[PERK_SPACE_CONSTANTS]};
    for (size_t i = 0; i < PERK_COUNT(numbers); i++) {
        *numbers[i] += 256;
        check_refused(plan, other, "is ");
        *numbers[i] -= 256;
    }
    int i = 0;
    while (other->stages[i].work != PERK_WORK_PARTIAL || other->stages[i].scalar == 0) i++;
    other->stages[i].scalar--;
    check_refused(plan, other, "of the KV pages in one");
    other->stages[i].scalar++;
    CHECK_OK(perk_plan_check_shared(plan, other, &err));
}

static void test_shared(const char *folder) {
    static const int sizes[] = {1, 2, 7, 8, 16, 33, 64};
    perk_model *model;
    perk_plan *plans[PERK_COUNT(sizes)];
    CHECK_OK(perk_model_open(&model, folder, strstr(folder, ".json") != NULL, 0, &err));
    for (size_t i = 0; i < PERK_COUNT(sizes); i++) {
        perk_config config = config_of(model, sizes[i]);
        plans[i] = make_plan(model->graph, &config);
        CHECK(perk_plan_check_shared(plans[i], plans[0], &err) == PERK_OK, "%s, %d tokens: %s", folder, sizes[i],
              err.message);
    }
    check_differences(plans[0], plans[4]);
    plans[0]->many_steps = true; /* over one schedule, with rows for all of its requests */
    check_refused(plans[0], plans[3], "whether a launch runs many steps");
    plans[3]->many_steps = true;
    check_refused(plans[0], plans[3], "max_num_batched_requests is");
    plans[4]->many_steps = true;
    CHECK_OK(perk_plan_check_shared(plans[3], plans[4], &err));
    perk_config longer = config_of(model, 8);
    longer.max_num_pages++;
    perk_plan *other = make_plan(model->graph, &longer);
    check_refused(plans[1], other, "KV pages is");
    perk_plan_free(other);
    for (size_t i = 0; i < PERK_COUNT(sizes); i++) perk_plan_free(plans[i]);
    perk_model_free(model);
}

/* ---- which programs there are ---- */

static perk_engine_options options_for(int tokens) {
    return (perk_engine_options){
        .backend = PERK_BACKEND_GPU,
        .precision = 1,
        .cache_folder = cache.text,
        .config = {
            .max_num_batched_tokens = tokens, .max_num_logit_rows = tokens, .page_size = 16, .max_seq_length = 128}};
}

static void check_programs(int tokens, const int32_t *asked_for, int asked_count, const char *expected) {
    perk_engine *engine;
    perk_engine_options options = options_for(tokens);
    char text[128] = "";
    options.mode = mode;
    for (int i = 0; i < asked_count; i++) options.program_tokens[i] = asked_for[i];
    begin_run(8, false);
    CHECK(perk_engine_open(&engine, TINY, &options, &err) == PERK_OK, "%d tokens: %s", tokens, err.message);
    const perk_start_report *report = perk_engine_report(engine);
    for (int i = 0; i < report->program_count; i++) {
        const perk_program_report *p = &report->programs[i];
        size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "%s%d", i ? " " : "", p->tokens);
        CHECK(p->registers == 96 && p->shared_bytes > 0 && p->cubin_bytes > 0 && p->memory_bytes > 1000);
        bool is_narrow = p->tokens <= 8; /* others have no second copy of eager values, and may need less */
        CHECK(i == 0 || !is_narrow || p->memory_bytes > p[-1].memory_bytes);
        CHECK(p->plan_ms > 0 && p->plan_ms <= report->plan_ms && p->compile_ms <= report->compile_ms);
    }
    CHECK(strcmp(text, expected) == 0, "%d tokens: %s, not %s", tokens, text, expected);
    perk_engine_free(engine);
    check_released();
}

#define ASK(...) (const int32_t[]){__VA_ARGS__}, (int)(sizeof((const int32_t[]){__VA_ARGS__}) / sizeof(int32_t))

static void test_choice(void) {
    check_programs(1, NULL, 0, "1");
    check_programs(2, NULL, 0, "1 2");
    check_programs(15, NULL, 0, "1 15");
    check_programs(16, NULL, 0, "1 8 16");
    check_programs(64, NULL, 0, "1 8 64");
    check_programs(0, NULL, 0, "1 8 16");
    check_programs(16, ASK(16), "16");
    check_programs(0, ASK(4), "4");
    check_programs(0, ASK(4, 1, 0, 4), "1 4");
    check_programs(32, ASK(4, 9, 2), "2 4 9 32");
    check_programs(32, ASK(8, 7, 6, 5, 4, 3, 2, 32), "2 3 4 5 6 7 8 32");
}

static void check_bad(int tokens, int32_t wanted, perk_status status, const char *text) {
    perk_engine *engine;
    perk_engine_options options = options_for(tokens);
    options.program_tokens[3] = wanted;
    begin_run(8, false);
    CHECK_FAILS(perk_engine_open(&engine, TINY, &options, &err), status, text);
    check_released();
}

static void test_bad_choice(void) {
    check_bad(16, 17, PERK_INVALID_ARGUMENT, "a program for 17 tokens a step: max_num_batched_tokens is 16");
    check_bad(16, -1, PERK_INVALID_ARGUMENT, "a program for -1 tokens a step");
    check_bad(0, 1 << 20, PERK_INVALID_ARGUMENT, "max_num_batched_tokens must be between 1 and 65536");
    perk_engine *engine;
    perk_engine_options options = options_for(32);
    options.program_tokens[0] = 32; /* and 7 smaller ones */
    for (int i = 1; i < PERK_MAX_PROGRAMS; i++) options.program_tokens[i] = i;
    begin_run(8, false);
    CHECK_OK(perk_engine_open(&engine, TINY, &options, &err));
    perk_engine_free(engine);
    options.program_tokens[0] = 8; /* 8 smaller ones */
    CHECK_FAILS(perk_engine_open(&engine, TINY, &options, &err), PERK_INVALID_ARGUMENT, "at most 7");
}

/* Compiled ahead of time for one size alone: the defaults do without the others, who asked for them does not. */
static void test_ahead_of_time(void) {
    perk_engine *engine;
    perk_engine_options options = options_for(24);
    options.program_tokens[0] = 24;
    options.mode = mode;
    options.config.max_seq_length = 112; /* what no other test has compiled */
    begin_run(8, false);
    CHECK_OK(perk_engine_open(&engine, TINY, &options, &err));
    perk_engine_free(engine);
    setenv("PERK_LIBNVRTC", "/nonexistent/libnvrtc.so", 1);
    options.program_tokens[0] = 0;
    CHECK_OK(perk_engine_open(&engine, TINY, &options, &err));
    CHECK(perk_engine_report(engine)->program_count == 1 && perk_engine_report(engine)->programs[0].tokens == 24);
    CHECK(perk_engine_report(engine)->programs[1].tokens == 0 && perk_engine_report(engine)->cache_hit);
    perk_engine_free(engine);
    options.program_tokens[0] = 5;
    CHECK_FAILS(perk_engine_open(&engine, TINY, &options, &err), PERK_NO_COMPILER, "the program for 5 tokens a step");
    setenv("PERK_LIBNVRTC", FAKE_CUDA, 1);
    check_released();
}

/* Another size of batch, another program: the counts tell, and each counts its own steps. */
static void test_steps(void) {
    perk_engine *engine;
    perk_engine_options options = options_for(16);
    perk_engine_stats stats;
    int32_t ids[40] = {0};
    float *logits;
    begin_run(8, false);
    CHECK_OK(perk_engine_open(&engine, TINY, &options, &err));
    logits = malloc(40 * (size_t)perk_engine_vocab_size(engine) * sizeof *logits);
    CHECK(logits);
    const perk_sampling sampling = {.max_tokens = 5, .ignore_eos = 1};
    CHECK_OK(perk_engine_generate(engine, ids, 40, &sampling, NULL, NULL, NULL, &err)); /* 16, 16, 8, then 4 of 1 */
    perk_engine_statistics(engine, &stats);
    CHECK(stats.program_steps[0] == 4 && stats.program_steps[1] == 1 && stats.program_steps[2] == 2 &&
          stats.program_steps[3] == 0 && stats.steps == 7);
    CHECK_OK(perk_engine_logits(engine, ids, 17, logits, &err)); /* 16, and 1, both in the largest */
    CHECK_OK(perk_engine_generate(engine, ids, 1, &sampling, NULL, NULL, NULL, &err));
    perk_engine_statistics(engine, &stats);
    CHECK(stats.program_steps[0] == 9 && stats.program_steps[1] == 1 && stats.program_steps[2] == 4);
    free(logits);
    perk_engine_free(engine);
    check_released();
}

/* ---- what programs cost a warm start ---- */

static double warm_start(const perk_engine_options *options) {
    double best = 1e9;
    for (int i = 0; i < 6; i++) { /* the first fills the cache */
        perk_engine *engine;
        begin_run(132, false);
        CHECK_OK(perk_engine_open(&engine, TINY, options, &err));
        CHECK(i == 0 || perk_engine_report(engine)->cache_hit);
        if (i > 0) best = PERK_MIN(best, perk_engine_report(engine)->total_ms);
        perk_engine_free(engine);
    }
    return best;
}

static void test_warm_start(void) {
    perk_engine_options options = options_for(64);
    double several = warm_start(&options);
    options.program_tokens[0] = 64;
    fprintf(stderr, "a warm start: %.1f ms with one program, %.1f ms with three\n", warm_start(&options), several);
}

/* ---- tokens while programs take turns ---- */

enum { REQUESTS = 5, PROMPT_ROOM = 40 };

typedef struct job {
    int prompt_length, tokens, submitted_before; /* which step */
    int32_t prompt[PROMPT_ROOM];
    perk_request *request;
} job;

/* Batches go up and down: prompts of several lengths, answers of several lengths, some that come late. */
static void run_jobs(perk_engine *engine, job *jobs) {
    int32_t running = 1;
    for (int step = 0; running > 0 || step < 12; step++) {
        for (int i = 0; i < REQUESTS; i++) {
            const perk_sampling sampling = {.max_tokens = jobs[i].tokens, .ignore_eos = 1, .logprobs = i % 2};
            if (jobs[i].submitted_before != step) continue;
            some_ids(jobs[i].prompt, jobs[i].prompt_length, perk_engine_vocab_size(engine), i);
            CHECK_OK(perk_engine_submit(engine, jobs[i].prompt, (size_t)jobs[i].prompt_length, &sampling,
                                        &jobs[i].request, &err));
        }
        CHECK_OK(perk_engine_step(engine, &running, &err));
        CHECK(!fake.driver->misuse, "%s: %s", fake.driver->misused_in, fake.driver->misuse);
        CHECK(step < 200, "the requests do not end");
    }
}

static void test_turns(void) {
    job jobs[REQUESTS] = {{1, 6, 0, {0}, NULL},
                          {15, 3, 0, {0}, NULL},
                          {40, 9, 2, {0}, NULL},
                          {3, 4, 7, {0}, NULL},
                          {17, 5, 12, {0}, NULL}};
    perk_engine *engine, *reference;
    perk_engine_options options = options_for(16);
    options.program_tokens[0] = 1;
    options.program_tokens[1] = 4;
    begin_run(3, true);
    CHECK_OK(perk_engine_open(&engine, TINY, &options, &err));
    options.backend = PERK_BACKEND_REFERENCE;
    CHECK_OK(perk_engine_open(&reference, TINY, &options, &err));
    run_jobs(engine, jobs);
    size_t values = 20 * (size_t)perk_engine_vocab_size(engine);
    float *got = malloc(values * sizeof *got), *want = malloc(values * sizeof *want);
    CHECK(got && want);
    CHECK_OK(perk_engine_logits(engine, jobs[2].prompt, 20, got, &err)); /* after all those steps of others */
    CHECK_OK(perk_engine_logits(reference, jobs[2].prompt, 20, want, &err));
    double error = relative_error(got, want, values), top = 0, worst = 0;
    for (size_t i = 0; i < values; i++) top = fmax(top, fabs((double)want[i]));
    for (int i = 0; i < REQUESTS; i++) {
        size_t count;
        const int32_t *tokens = perk_request_tokens(jobs[i].request, &count);
        CHECK((int)count == jobs[i].tokens, "%zu tokens", count);
        for (size_t t = 0; t < count && i % 2; t++)
            CHECK(perk_request_logprobs(jobs[i].request, t, NULL)->token == tokens[t]);
        worst = fmax(worst, worst_choice(reference, jobs[i].prompt, jobs[i].prompt_length, tokens, (int)count));
    }
    perk_engine_stats stats;
    perk_engine_statistics(engine, &stats);
    fprintf(stderr, "%llu, %llu and %llu steps of programs for 1, 4 and 16 tokens: logits %.2e, worst choice %.2e\n",
            (unsigned long long)stats.program_steps[0], (unsigned long long)stats.program_steps[1],
            (unsigned long long)stats.program_steps[2], error, worst);
    CHECK(stats.program_steps[0] >= 4 && stats.program_steps[1] >= 4 && stats.program_steps[2] >= 4);
    CHECK(stats.program_steps[0] + stats.program_steps[1] + stats.program_steps[2] == stats.steps + 2 /* logits */);
    CHECK(error <= LOGITS_NOISE, "%g", error);
    CHECK(worst <= CHOICE_NOISE * top, "a request chose a token %.3g below the best", worst);
    free(got);
    free(want);
    perk_engine_free(engine);
    perk_engine_free(reference);
    check_released();
}

int main(void) {
    make_scratch();
    fake = open_fake();
    cache = path_in(scratch, "cache");
    test_shared(TINY);
    test_shared(PERK_SOURCE_DIR "/bench/configs/qwen3-0.6b/config.json");
    for (mode = PERK_MODE_SINGLE; mode <= PERK_MODE_ONLINE; mode++) {
        test_choice();
        test_ahead_of_time();
    }
    test_bad_choice();
    test_steps();
    test_warm_start();
    if (strstr(EMULATOR_CXX, "NOTFOUND")) {
        fprintf(stderr, "without a C++ compiler, no program runs\n");
        return 0;
    }
    cache = path_in(scratch, "emulated");
    test_turns();
    return 0;
}
