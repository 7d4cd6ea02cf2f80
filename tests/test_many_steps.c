/* Many steps of one launch (src/gpu_many.h), on the emulator: the tokens are those of single steps, no page is lost,
 * requests come and go while the launch runs, launches end when they should, and a hang is reported.
 * EMULATOR_SEED=N runs everything in another order. */
#include "fake_cuda/fake_cuda.h"
#include "gpu_many.h"
#include "model.h"
#include "plan_steps.h"
#include "sampler.h"
#include "schedule_checks.h"
#include "scheduler.h"
#include "temp.h"
#include "test_cache.h"

#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"

enum { WORKERS = 2, REQUESTS = 6, POSITIONS = 64 };

static perk_error err;
static perk_model *model;
static path_text cache;
/* Pages for two of the largest requests: three of them run into a shortage. */
static perk_config config = {.max_num_batched_tokens = 6,
                             .max_num_batched_requests = 3,
                             .page_size = 16,
                             .max_num_pages = 6,
                             .max_seq_length = POSITIONS};

static void open_fake(void) {
    setenv("PERK_LIBCUDA", FAKE_CUDA, 1);
    setenv("PERK_LIBNVRTC", FAKE_CUDA, 1);
    void *library = dlopen(FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
    CHECK(library, "%s", dlerror());
    fake_cuda *(*driver_state)(void);
    fake_nvrtc *(*compiler_state)(void);
    *(void **)&driver_state = dlsym(library, "fake_cuda_state");
    *(void **)&compiler_state = dlsym(library, "fake_nvrtc_state");
    CHECK(driver_state && compiler_state);
    driver_state()->device.sm_count = WORKERS;
    compiler_state()->emulates = true;
}

static perk_executor *open_executor(bool many_steps, perk_gpu_alter_plan alter, void *user) {
    perk_executor *gpu;
    const perk_gpu_options options = {.many_steps = many_steps,
                                      .wait_limit_ms = alter ? 300 : 0,
                                      .alter = alter,
                                      .alter_user = user,
                                      .cache_folder = cache.text};
    CHECK_OK(perk_gpu_create(&gpu, model->graph, model->checkpoint, &config, &options, NULL, &err));
    return gpu;
}

/* ---- requests, and what they get by single steps ---- */

typedef struct test_request {
    int32_t prompt[POSITIONS], prompt_length, limit;
    int32_t wanted[POSITIONS], wanted_count;
    int32_t got[POSITIONS], got_count, end, slot;
    bool cancelled;
} test_request;

static int draw(uint64_t seed, uint64_t *place, int low, int high) {
    return low + (int)(perk_uniform(seed, (*place)++) * (high - low + 1));
}

/* Half of the prompts begin alike. */
static void draw_requests(test_request *requests, int count, uint64_t seed) {
    uint64_t place = 0;
    for (int i = 0; i < count; i++) {
        test_request *r = &requests[i];
        *r = (test_request){.slot = -1};
        r->prompt_length = draw(seed, &place, 1, 36);
        r->limit = r->prompt_length + draw(seed, &place, 1, i ? 8 : POSITIONS - r->prompt_length);
        for (int t = 0; t < r->prompt_length; t++)
            r->prompt[t] = i % 2 && t < 30 ? (t * 37 + 11) % model->vocab_size
                                           : draw(seed, &place, 0, model->vocab_size - 1);
    }
}

/* All at once, over a host's schedule of as many requests. */
static void run_single_steps(test_request *requests, int count) {
    perk_executor *gpu = open_executor(false, NULL, NULL);
    perk_request *handles[REQUESTS];
    perk_scheduler *scheduler;
    perk_step_result result;
    const perk_batch *batch;
    bool want_logits;
    CHECK_OK(perk_scheduler_create(&scheduler, &config, model->vocab_size, NULL, 0, false, &err));
    for (int i = 0; i < count; i++) {
        const perk_sampling sampling = {.max_tokens = requests[i].limit - requests[i].prompt_length};
        CHECK_OK(perk_scheduler_submit(scheduler, requests[i].prompt, (size_t)requests[i].prompt_length, &sampling,
                                       &handles[i], &err));
    }
    while (perk_scheduler_unfinished(scheduler)) {
        CHECK_OK(perk_scheduler_fill(scheduler, &batch, &want_logits, &err));
        CHECK_OK(gpu->type->step(gpu, batch, false, &result, &err));
        CHECK_OK(perk_scheduler_commit(scheduler, &result, &err));
    }
    for (int i = 0; i < count; i++) {
        size_t answer;
        const int32_t *tokens = perk_request_tokens(handles[i], &answer);
        requests[i].wanted_count = (int32_t)answer;
        memcpy(requests[i].wanted, tokens, answer * sizeof *tokens);
    }
    perk_scheduler_free(scheduler);
    gpu->type->free(gpu);
}

/* ---- the same by many steps ---- */

static perk_status submit(perk_executor *gpu, test_request *r, bool share) {
    const perk_gpu_arrival arrival = {
        .prompt = r->prompt, .prompt_length = r->prompt_length, .limit = r->limit, .share_prefix = share};
    r->got_count = r->end = 0;
    return perk_gpu_many_submit(gpu, &arrival, &r->slot, &err);
}

/* Returns how many requests ended. */
static int read_tokens(perk_executor *gpu, test_request *requests, int count) {
    perk_token_record records[7];
    int ended = 0;
    for (size_t got; (got = perk_gpu_many_read(gpu, records, PERK_COUNT(records))) > 0;)
        for (size_t i = 0; i < got; i++) {
            int r = 0;
            while (r < count && (requests[r].slot != records[i].slot || requests[r].end)) r++;
            CHECK(r < count, "a token of nobody, slot %d", records[i].slot);
            if (records[i].token >= 0) requests[r].got[requests[r].got_count++] = records[i].token;
            CHECK(requests[r].got_count <= POSITIONS && (records[i].token >= 0 || records[i].end));
            requests[r].end = records[i].end;
            ended += records[i].end != PERK_END_NONE;
        }
    return ended;
}

static void check_answers(const test_request *requests, int count) {
    for (int i = 0; i < count; i++) {
        const test_request *r = &requests[i];
        bool whole = r->end == PERK_END_LENGTH;
        CHECK(whole ? r->got_count == r->wanted_count : r->cancelled && r->got_count <= r->wanted_count,
              "request %d ended for %d with %d of %d tokens", i, r->end, r->got_count, r->wanted_count);
        CHECK(memcmp(r->got, r->wanted, (size_t)r->got_count * sizeof *r->got) == 0,
              "request %d: other tokens than by single steps", i);
    }
}

/* The kernel's pages and requests, recounted. Slots are the host's: those of requests that ended count as free. */
static void check_pages(perk_executor *gpu) {
    perk_schedule schedule;
    perk_schedule_limits limits = perk_plan_schedule_limits(perk_gpu_plan(gpu));
    uint64_t *block = calloc(perk_schedule_lay_out(&limits).words, sizeof *block);
    CHECK(block);
    CHECK_OK(perk_gpu_many_schedule(gpu, block, &err));
    perk_schedule_bind(&schedule, &limits, block);
    for (int32_t slot = 0; slot < limits.slots; slot++) {
        perk_slot *r = &schedule.slots[slot];
        if (r->state != PERK_SLOT_WAITING && r->state != PERK_SLOT_RUNNING) r->state = PERK_SLOT_FREE;
    }
    schedule.state->free_slots = limits.slots - schedule.state->unfinished;
    check_schedule(&schedule, 0);
    free(block);
}

static perk_gpu_many_result run(perk_executor *gpu, uint32_t max_steps, uint32_t idle_limit_ms) {
    const perk_gpu_many_options options = {.max_steps = max_steps, .idle_limit_ms = idle_limit_ms};
    perk_gpu_many_result result;
    CHECK_OK(perk_gpu_many_run(gpu, &options, &result, &err));
    return result;
}

/* One launch, then launches of a few steps. */
static void test_completion(perk_executor *gpu, test_request *requests) {
    uint32_t steps = 0;
    for (int share = 0; share < 2; share++) {
        for (int i = 0; i < REQUESTS; i++) CHECK_OK(submit(gpu, &requests[i], share));
        perk_gpu_many_result result = run(gpu, 0, 0);
        CHECK(result.end == PERK_LAUNCH_IDLE && result.unfinished == 0 && result.undealt == 0, "%u", result.end);
        CHECK(read_tokens(gpu, requests, REQUESTS) == REQUESTS);
        if (share == 0) check_answers(requests, REQUESTS);
        check_pages(gpu);
        steps = share ? steps : result.steps;
        printf("%u steps in one launch\n", result.steps);
    }
    for (int i = 0; i < REQUESTS; i++) CHECK_OK(submit(gpu, &requests[i], false));
    for (uint32_t done = 0; done < steps; done += 7) {
        perk_gpu_many_result result = run(gpu, 7, 0);
        CHECK(result.end == (steps - done > 7 ? PERK_LAUNCH_STEPS : PERK_LAUNCH_IDLE) || steps - done == 7);
        CHECK(result.steps == PERK_MIN(7, steps - done), "%u steps", result.steps);
        read_tokens(gpu, requests, REQUESTS);
        check_pages(gpu);
    }
    check_answers(requests, REQUESTS);
}

int main(void) {
    if (strstr(EMULATOR_CXX, "NOTFOUND")) {
        fprintf(stderr, "skipped: no C++ compiler was found\n");
        return TEST_SKIP;
    }
    static test_request requests[REQUESTS];
    make_scratch();
    open_fake();
    cache = path_in(scratch, "cache");
    CHECK_OK(perk_model_open(&model, TINY, false, 0, &err));
    CHECK_OK(perk_config_resolve(&config, model->max_positions, &err));
    draw_requests(requests, REQUESTS, 5);
    double t0 = perk_now();
    run_single_steps(requests, REQUESTS);
    printf("single %.1f s\n", perk_now() - t0);
    perk_executor *gpu = open_executor(true, NULL, NULL);
    t0 = perk_now();
    test_completion(gpu, requests);
    printf("many %.1f s\n", perk_now() - t0);
    gpu->type->free(gpu);
    perk_model_free(model);
    return 0;
}
