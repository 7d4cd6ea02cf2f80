/* Many steps of one launch (src/gpu_many.h), on the emulator: the tokens are those of single steps, no page is lost,
 * requests come and go while the launch runs, launches end when they should, and a hang is reported.
 * EMULATOR_SEED=N runs everything in another order; PERK_TEST_GPU=1 runs it on the GPU, PERK_TEST_PORTABLE=1 with
 * portable device code. The argument is the root of the repository, where that is not where it was built. */
#include "device.h"
#include "emulated.h"
#include "gpu_many.h"
#include "model.h"
#include "perk/engine.h"
#include "plan_steps.h"
#include "sampler.h"
#include "schedule_checks.h"
#include "scheduler.h"
#include "test_cache.h"

#include <math.h>
#include <pthread.h>
#include <unistd.h>

enum { WORKERS = 2, MANY_WORKERS = 7, REQUESTS = 6, POSITIONS = 64, TOP = 3, STOPS = 6 };

static perk_error err;
static perk_model *model;
static fake_cuda *driver_of_emulator;
static path_text cache, folder;
/* Pages for two of the largest requests: three of them run into a shortage. */
static perk_config config = {.max_num_batched_tokens = 8,
                             .max_num_batched_requests = 3,
                             .page_size = 16,
                             .max_num_pages = 6,
                             .max_seq_length = POSITIONS};

/* With programs for 1 and 4 tokens beside that of the configuration, or alone. */
static perk_executor *open_with(perk_gpu_alter_plan alter, bool has_smaller) {
    perk_executor *gpu;
    const perk_gpu_options options = {.many_steps = true,
                                      .portable = getenv("PERK_TEST_PORTABLE") != NULL,
                                      .wait_limit_ms = alter ? 20 : 0,
                                      .alter = alter,
                                      .smaller_programs = {1, 4},
                                      .smaller_program_count = has_smaller ? 2 : 0,
                                      .cache_folder = cache.text};
    CHECK_OK(perk_gpu_create(&gpu, model->graph, model->checkpoint, &config, &options, NULL, &err));
    return gpu;
}

static perk_executor *open_executor(perk_gpu_alter_plan alter) { return open_with(alter, false); }

/* ---- requests, and what they get by single steps ---- */

typedef struct test_request {
    int32_t prompt[POSITIONS], prompt_length, limit;
    int32_t wanted[POSITIONS], wanted_count;
    int32_t got[POSITIONS], got_count, end, slot, found, set_backs;
    int32_t stop_ids[STOPS], stop_count;
    bool cancelled;
    perk_sampling sampling;
    perk_logprob wanted_logprobs[POSITIONS][1 + TOP], got_logprobs[POSITIONS][1 + TOP];
} test_request;

/* How request i picks its tokens. Those that really draw get the same ones only where all steps are the same: in
 * another batch, attention's sums are rounded otherwise. The others are as good as greedy. */
static const perk_logit_bias biases[] = {{7, 3}, {9, -100}, {7, 1.5f}};
static const perk_sampling drawing[] = {
    {.temperature = 0},
    {.temperature = 1.5f, .top_p = 0.95f, .seed = 11, .logprobs = 1, .top_logprobs = TOP},
    {.temperature = 1, .top_k = 30, .repetition_penalty = 1.3f, .frequency_penalty = 0.5f, .seed = 5},
    {.presence_penalty = 1, .logprobs = 1},
    {.temperature = 0},
    {.temperature = 2, .min_p = 0.01f, .bias = biases, .bias_count = 3},
};
static const perk_sampling sure[] = {
    {.temperature = 0},
    {.temperature = 1e-3f, .top_p = 0.95f, .logprobs = 1, .top_logprobs = TOP},
    {.logprobs = 1},
};

static int draw(uint64_t seed, uint64_t *place, int low, int high) {
    return low + (int)(perk_uniform(seed, (*place)++) * (high - low + 1));
}

/* Half of the prompts begin alike. */
static void draw_requests(test_request *requests, int count, bool draws, uint64_t seed) {
    uint64_t place = 0;
    for (int i = 0; i < count; i++) {
        test_request *r = &requests[i];
        *r = (test_request){.slot = -1, .sampling = draws ? drawing[i % 6] : sure[i % 3]};
        r->prompt_length = i == 0 ? 1 : draw(seed, &place, i % 2 ? 18 : 1, 22);
        r->limit = i == 0 ? 12 : r->prompt_length + draw(seed, &place, 1, 4);
        for (int t = 0; t < r->prompt_length; t++)
            r->prompt[t] =
                i % 2 && t < 20 ? (t * 37 + 11) % model->vocab_size : draw(seed, &place, 0, model->vocab_size - 1);
    }
}

/* All at once, over the host's schedule. */
static void run_single_steps(perk_executor *gpu, test_request *requests, int count) {
    perk_request *handles[REQUESTS];
    perk_scheduler *scheduler;
    perk_step_result result;
    const perk_batch *batch;
    bool want_logits;
    CHECK_OK(perk_scheduler_create(&scheduler, &config, model->vocab_size, NULL, 0, false, &err));
    for (int i = 0; i < count; i++) {
        perk_sampling sampling = requests[i].sampling;
        sampling.max_tokens = requests[i].limit - requests[i].prompt_length;
        CHECK_OK(perk_scheduler_submit(scheduler, requests[i].prompt, (size_t)requests[i].prompt_length, &sampling,
                                       &handles[i], &err));
    }
    while (perk_scheduler_unfinished(scheduler)) {
        CHECK_OK(perk_scheduler_fill(scheduler, &batch, &want_logits, &err));
        CHECK_OK(gpu->type->step(gpu, batch, want_logits, &result, &err));
        CHECK_OK(perk_scheduler_commit(scheduler, &result, &err));
    }
    for (int i = 0; i < count; i++) {
        size_t answer;
        const int32_t *tokens = perk_request_tokens(handles[i], &answer);
        requests[i].wanted_count = (int32_t)answer;
        memcpy(requests[i].wanted, tokens, answer * sizeof *tokens);
        for (size_t t = 0, each; t < answer; t++) {
            const perk_logprob *logprobs = perk_request_logprobs(handles[i], t, &each);
            if (logprobs) memcpy(requests[i].wanted_logprobs[t], logprobs, each * sizeof *logprobs);
        }
    }
    perk_scheduler_free(scheduler);
}

/* ---- the same by many steps ---- */

static perk_status submit(perk_executor *gpu, test_request *r, bool share) {
    const perk_gpu_arrival arrival = {.prompt = r->prompt,
                                      .prompt_length = r->prompt_length,
                                      .limit = r->limit,
                                      .stop_ids = r->stop_ids,
                                      .stop_count = r->stop_count,
                                      .sampling = &r->sampling,
                                      .share_prefix = share};
    r->got_count = r->end = 0;
    return perk_gpu_many_submit(gpu, &arrival, &r->slot, &err);
}

/* Returns how many requests ended. */
static int read_tokens(perk_executor *gpu, test_request *requests, int count) {
    perk_token_record records[7];
    perk_draw_record details[7];
    int ended = 0;
    for (size_t got; (got = perk_gpu_many_read(gpu, records, details, PERK_COUNT(records))) > 0;)
        for (size_t i = 0; i < got; i++) {
            int r = 0;
            while (r < count && (requests[r].slot != records[i].slot || requests[r].end)) r++;
            CHECK(r < count, "a token of nobody, slot %d", records[i].slot);
            if (records[i].token < 0 && !records[i].end) continue; /* it begins to run */
            CHECK(!records[i].has_details == !(requests[r].sampling.logprobs && records[i].token >= 0));
            if (records[i].has_details)
                perk_sampler_logprobs(&details[i], records[i].token, requests[r].sampling.top_logprobs,
                                      requests[r].got_logprobs[requests[r].got_count]);
            if (records[i].token >= 0) requests[r].got[requests[r].got_count++] = records[i].token;
            CHECK(requests[r].got_count <= POSITIONS);
            requests[r].end = records[i].end;
            requests[r].found = records[i].found;
            requests[r].set_backs = records[i].set_backs;
            ended += records[i].end != PERK_END_NONE;
        }
    return ended;
}

/* Other batches on the way round attention's sums otherwise. */
static void check_logprobs(const test_request *r, int number, float limit) {
    int each = r->sampling.logprobs ? 1 + r->sampling.top_logprobs : 0;
    for (int t = 0; t < r->got_count; t++)
        for (int k = 0; k < each; k++)
            CHECK((k || r->got_logprobs[t][0].token == r->got[t]) &&
                      fabsf(r->got_logprobs[t][k].logprob - r->wanted_logprobs[t][k].logprob) < limit,
                  "request %d, place %d: log probability %g of token %d, wanted %g of %d", number, t,
                  (double)r->got_logprobs[t][k].logprob, r->got_logprobs[t][k].token,
                  (double)r->wanted_logprobs[t][k].logprob, r->wanted_logprobs[t][k].token);
}

static void check_answers(const test_request *requests, int count, float limit) {
    for (int i = 0; i < count; i++) {
        const test_request *r = &requests[i];
        bool whole = r->end == PERK_END_LENGTH || r->end == PERK_END_STOP;
        CHECK(whole ? r->got_count == r->wanted_count : r->cancelled && r->got_count <= r->wanted_count,
              "request %d ended for %d with %d of %d tokens", i, r->end, r->got_count, r->wanted_count);
        CHECK(memcmp(r->got, r->wanted, (size_t)r->got_count * sizeof *r->got) == 0,
              "request %d: other tokens than by single steps", i);
        check_logprobs(r, i, limit);
    }
}

/* The kernel's pages and requests, recounted. Slots are the host's: those of requests that ended count as free. Returns
 * how many positions were found in pages of others so far. */
static uint64_t check_pages(perk_executor *gpu) {
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
    uint64_t found = schedule.state->found_tokens;
    free(block);
    return found;
}

static perk_gpu_many_result run(perk_executor *gpu, uint32_t max_steps, uint32_t idle_limit_ms) {
    const perk_launch_options options = {.max_steps = max_steps, .idle_limit_ms = idle_limit_ms};
    perk_gpu_many_result result;
    CHECK_OK(perk_gpu_many_run(gpu, &options, &result, &err));
    return result;
}

/* Requests that draw, in one launch, and in several. */
static void test_drawing(perk_executor *gpu) {
    static test_request requests[REQUESTS];
    draw_requests(requests, REQUESTS, true, 5);
    run_single_steps(gpu, requests, REQUESTS);
    for (uint32_t steps = 0; steps <= 4; steps += 4) {
        for (int i = 0; i < REQUESTS; i++) CHECK_OK(submit(gpu, &requests[i], false));
        for (int ended = 0; ended < REQUESTS;) {
            run(gpu, steps, 0);
            ended += read_tokens(gpu, requests, REQUESTS);
        }
        check_answers(requests, REQUESTS, 1e-5f);
    }
}

/* The same where rows are shared by workers, and not all workers have one. */
static void test_drawing_together(void) {
    driver_of_emulator->device.sm_count = MANY_WORKERS;
    perk_executor *gpu = open_executor(NULL);
    test_drawing(gpu);
    gpu->type->free(gpu);
    driver_of_emulator->device.sm_count = WORKERS;
}

/* One launch; then launches of a few steps, where requests that begin alike share pages. */
static void test_completion(perk_executor *gpu, test_request *requests) {
    for (int i = 0; i < REQUESTS; i++) CHECK_OK(submit(gpu, &requests[i], false));
    perk_gpu_many_result result = run(gpu, 0, 0);
    CHECK(result.end == PERK_LAUNCH_IDLE && result.unfinished == 0 && result.undealt == 0, "%u", result.end);
    CHECK(read_tokens(gpu, requests, REQUESTS) == REQUESTS);
    check_answers(requests, REQUESTS, 0.05f);
    CHECK(check_pages(gpu) == 0);
    fprintf(stderr, "%u steps in one launch\n", result.steps);

    for (int i = 0; i < REQUESTS; i++) CHECK_OK(submit(gpu, &requests[i], true));
    for (int ended = 0; ended < REQUESTS; check_pages(gpu)) {
        result = run(gpu, 7, 0);
        ended += read_tokens(gpu, requests, REQUESTS);
        CHECK(result.end == PERK_LAUNCH_IDLE ? ended == REQUESTS
                                             : result.end == PERK_LAUNCH_STEPS && result.steps == 7);
    }
    check_answers(requests, REQUESTS, 0.05f);
    CHECK(check_pages(gpu) > 0, "no pages were shared");
}

static bool has_token(const test_request *r, int count, int32_t token) {
    for (int i = 0; i < count; i++)
        if (r->wanted[i] == token) return true;
    return false;
}

/* The answer is to end at the last of its tokens that was not there before. It is the last of the ids that are watched,
 * whose others never come. */
static void end_at_token(test_request *r) {
    int last = r->wanted_count - 1;
    while (last > 0 && has_token(r, last, r->wanted[last])) last--;
    CHECK(last > 4, "it says the same again and again");
    for (int32_t id = 0; r->stop_count < STOPS - 1; id++)
        if (!has_token(r, r->wanted_count, id)) r->stop_ids[r->stop_count++] = id;
    r->stop_ids[r->stop_count++] = r->wanted[last];
    r->wanted_count = last + 1;
}

/* Two long answers: most steps are the one before moved on, over the ends of pages, until one of them ends at a token.
 */
static void test_long_answers(perk_executor *gpu) {
    static test_request requests[2];
    uint64_t place = 0;
    for (int i = 0; i < 2; i++) {
        test_request *r = &requests[i];
        *r = (test_request){.slot = -1, .prompt_length = i ? 7 : 3, .limit = i ? 48 : 46};
        for (int t = 0; t < r->prompt_length; t++) r->prompt[t] = draw(9, &place, 0, model->vocab_size - 1);
    }
    run_single_steps(gpu, requests, 2);
    end_at_token(&requests[1]);
    for (int share = 0; share < 2; share++) {
        for (int i = 0; i < 2; i++) CHECK_OK(submit(gpu, &requests[i], share));
        CHECK(run(gpu, 0, 0).end == PERK_LAUNCH_IDLE && read_tokens(gpu, requests, 2) == 2);
        check_answers(requests, 2, 0.05f);
        CHECK(requests[1].end == PERK_END_STOP, "it ended for %d", requests[1].end);
        check_pages(gpu);
    }
}

/* ---- online ---- */

/* The thread that launches, and launches again, until it is told to stop. */
typedef struct launcher {
    perk_executor *gpu;
    uint32_t idle_limit_ms;
    int launches, idle_ends; /* launches: that have ended, atomic as the next */
    bool stop;
    pthread_t thread;
} launcher;

static void *launch_again(void *argument) {
    launcher *l = argument;
    perk_gpu_many_result result = {0};
    do {
        bool last = __atomic_load_n(&l->stop, __ATOMIC_ACQUIRE);
        result = run(l->gpu, 0, l->idle_limit_ms);
        __atomic_add_fetch(&l->launches, 1, __ATOMIC_RELEASE);
        l->idle_ends += result.end == PERK_LAUNCH_IDLE;
        if (last && result.unfinished == 0 && result.undealt == 0) break;
    } while (result.end == PERK_LAUNCH_IDLE || result.end == PERK_LAUNCH_STOPPED);
    return NULL;
}

static void launch(launcher *l) { CHECK(pthread_create(&l->thread, NULL, launch_again, l) == 0); }

/* When nothing is unfinished. */
static void end_launches(launcher *l) {
    __atomic_store_n(&l->stop, true, __ATOMIC_RELEASE);
    perk_gpu_many_command(l->gpu, PERK_COMMAND_DRAIN);
    pthread_join(l->thread, NULL);
    perk_gpu_many_command(l->gpu, PERK_COMMAND_NONE);
}

/* Requests come while the launch runs, in any slot that is free, and some are taken back. */
static void test_online(perk_executor *gpu, test_request *requests, uint64_t seed, uint32_t idle_limit_ms) {
    launcher l = {.gpu = gpu, .idle_limit_ms = idle_limit_ms};
    uint64_t place = 0;
    int submitted = 0, ended = 0;
    for (int i = 0; i < REQUESTS; i++) requests[i].slot = -1, requests[i].end = 0;
    launch(&l);
    while (ended < REQUESTS) {
        if (submitted < REQUESTS && submit(gpu, &requests[submitted], seed % 2) == PERK_OK) submitted++;
        ended += read_tokens(gpu, requests, submitted);
        for (int i = 1; i < submitted; i++)
            if (draw(seed, &place, 0, 60) == 0 && !requests[i].end) {
                requests[i].cancelled = true;
                perk_gpu_many_cancel(gpu, requests[i].slot);
            }
        usleep((useconds_t)draw(seed, &place, 0, 30000));
    }
    end_launches(&l);
    CHECK(read_tokens(gpu, requests, REQUESTS) == 0);
    check_answers(requests, REQUESTS, 0.05f);
    check_pages(gpu);
    fprintf(stderr, "online, seed %llu: %d launches, %d ended idle\n", (unsigned long long)seed, l.launches,
            l.idle_ends);
}

/* Its prompt is one page and most of another. */
static void long_request(test_request *r, int32_t limit, uint64_t seed) {
    uint64_t place = 0;
    *r = (test_request){.prompt_length = 30, .limit = limit};
    for (int t = 0; t < r->prompt_length; t++) r->prompt[t] = draw(seed, &place, 0, model->vocab_size - 1);
}

/* What is asked next begins with what was asked before and its answer, and finds the full pages of both while the
 * launch goes on. */
static void test_conversation(perk_executor *gpu) {
    static test_request turns[2];
    long_request(&turns[0], 35, 3);
    run_single_steps(gpu, turns, 1);
    turns[1] = (test_request){.prompt_length = 37, .limit = 39};
    memcpy(turns[1].prompt, turns[0].prompt, 30 * sizeof(int32_t));
    memcpy(turns[1].prompt + 30, turns[0].wanted, 5 * sizeof(int32_t));
    run_single_steps(gpu, turns + 1, 1);
    for (int share = 1; share >= 0; share--) {
        launcher l = {.gpu = gpu, .idle_limit_ms = 100000};
        launch(&l);
        for (int i = share ? 0 : 1; i < 2; i++) {
            CHECK_OK(submit(gpu, &turns[i], share));
            while (read_tokens(gpu, &turns[i], 1) == 0) usleep(1000);
            CHECK(turns[i].found == (share && i ? 2 * config.page_size : 0), "turn %d found %d", i, turns[i].found);
        }
        CHECK(__atomic_load_n(&l.launches, __ATOMIC_ACQUIRE) == 0);
        end_launches(&l);
        check_answers(turns, 2, 0.05f);
    }
}

/* Two that have room while they are short: the newer one is set back, and finds what it had answered. */
static void test_set_back(perk_executor *gpu) {
    static test_request two[2];
    for (int i = 0; i < 2; i++) long_request(&two[i], 51, (uint64_t)i);
    run_single_steps(gpu, two, 2);
    for (int i = 0; i < 2; i++) CHECK_OK(submit(gpu, &two[i], true));
    run(gpu, 0, 0);
    CHECK(read_tokens(gpu, two, 2) == 2);
    check_answers(two, 2, 0.05f);
    CHECK(two[0].set_backs == 0 && two[1].set_backs == 1 && two[1].found == 2 * config.page_size,
          "set back %d times, and found %d", two[1].set_backs, two[1].found);
    check_pages(gpu);
}

/* By an executor of its own: single steps write to pages that others would find. */
static void test_answers(void) {
    perk_executor *gpu = open_executor(NULL);
    test_set_back(gpu);
    test_conversation(gpu);
    gpu->type->free(gpu);
}

/* A launch that is stopped goes on later as if nothing had been; submitting too much is refused. */
static void test_stop(perk_executor *gpu, test_request *requests) {
    for (int i = 0; i < REQUESTS; i++) {
        requests[i].cancelled = false;
        CHECK_OK(submit(gpu, &requests[i], true));
    }
    test_request more = requests[0];
    CHECK(submit(gpu, &more, true) == PERK_LIMIT);
    run(gpu, 3, 0);
    perk_gpu_many_command(gpu, PERK_COMMAND_STOP);
    perk_gpu_many_result result = run(gpu, 0, 0);
    CHECK(result.end == PERK_LAUNCH_STOPPED && result.steps == 0 && result.unfinished > 0, "%u", result.end);
    perk_gpu_many_command(gpu, PERK_COMMAND_NONE);
    CHECK(run(gpu, 0, 0).end == PERK_LAUNCH_IDLE && read_tokens(gpu, requests, REQUESTS) == REQUESTS);
    check_answers(requests, REQUESTS, 0.05f);
    result = run(gpu, 0, 1);
    CHECK(result.end == PERK_LAUNCH_IDLE && result.steps == 0);
    more.prompt_length = 0;
    CHECK(submit(gpu, &more, true) == PERK_INVALID_ARGUMENT);
}

/* ---- programs that take turns ---- */

/* What the programs have run since `before`, which moves on. Returns how many launches were of each but the last's. */
static void tell_turns(perk_executor *gpu, uint64_t before[3], int least) {
    uint64_t steps[PERK_MAX_PROGRAMS], launches[PERK_MAX_PROGRAMS];
    perk_gpu_program_counts(gpu, steps, launches);
    fprintf(stderr,
            "  %llu, %llu, %llu launches of the programs for 1, 4 and 8 tokens; %llu, %llu, %llu steps so far\n",
            (unsigned long long)(launches[0] - before[0]), (unsigned long long)(launches[1] - before[1]),
            (unsigned long long)(launches[2] - before[2]), (unsigned long long)steps[0], (unsigned long long)steps[1],
            (unsigned long long)steps[2]);
    CHECK(launches[0] - before[0] >= (uint64_t)least && launches[2] - before[2] >= (uint64_t)least);
    memcpy(before, launches, 3 * sizeof *before);
}

/* One answer goes on when all others have ended. */
static void test_turns(void) {
    static test_request requests[REQUESTS];
    uint64_t before[3] = {0};
    perk_executor *gpu = open_with(NULL, true);
    draw_requests(requests, REQUESTS, false, 6);
    requests[0].limit += 30;
    run_single_steps(gpu, requests, REQUESTS);
    tell_turns(gpu, before, 0);
    test_completion(gpu, requests);
    tell_turns(gpu, before, 2);
    test_stop(gpu, requests);
    test_online(gpu, requests, 3, 2);
    tell_turns(gpu, before, 2);
    gpu->type->free(gpu);
}

/* ---- plans that are wrong ---- */

static int last_stage_of(const perk_plan *plan, const char *name) {
    int found = -1;
    for (int i = 0; i < plan->stage_count; i++)
        if (strstr(plan->stages[i].name, name)) found = i;
    CHECK(found >= 0);
    return found;
}

/* A stage in the middle waits for more than there is. */
static void want_too_much(perk_plan *plan, void *user) {
    int stage = last_stage_of(plan, ".gate_up"), task = 0;
    (void)user;
    while (plan->tasks[task].stage != stage) task++;
    plan->waits[plan->tasks[task].wait_begin].needed++;
}

/* The end of a step wants more signals than there are. */
static void never_end(perk_plan *plan, void *user) {
    int counters[PERK_RECORD_WAITS];
    (void)user;
    CHECK(perk_plan_step_end(plan, counters) >= 1);
    plan->counter_per_step[counters[0]]++;
}

static void test_hang(perk_gpu_alter_plan alter, const char *waiter, test_request *requests) {
    perk_executor *gpu = open_executor(alter);
    const perk_launch_options options = {0};
    perk_gpu_many_result result;
    CHECK_OK(submit(gpu, &requests[0], false));
    CHECK_FAILS(perk_gpu_many_run(gpu, &options, &result, &err), PERK_HANG, waiter);
    fprintf(stderr, "%s\n", err.message);
    CHECK_FAILS(perk_gpu_many_run(gpu, &options, &result, &err), PERK_HANG, "waited more than");
    gpu->type->free(gpu);
}

/* The first tasks of a step wait for one counter less of the step before. */
static void test_check(void) {
    perk_device_desc device;
    perk_plan *plan;
    int counters[PERK_RECORD_WAITS];
    CHECK_OK(perk_device_describe_arch("sm_90a", &device, &err));
    CHECK_OK(perk_plan_create(&plan, model->graph, &device, &config, &err));
    CHECK(perk_plan_step_end(plan, counters) >= 1);
    plan->many_steps = true;
    CHECK_OK(perk_plan_check(plan, &err));
    for (int lost = 0; lost < perk_plan_step_end(plan, counters); lost++) {
        perk_plan copy = *plan;
        copy.waits = malloc((size_t)plan->wait_count * sizeof *copy.waits);
        CHECK(copy.waits);
        memcpy(copy.waits, plan->waits, (size_t)plan->wait_count * sizeof *copy.waits);
        for (int i = 0; i < plan->wait_count; i++)
            if (copy.waits[i].needed == 0 && copy.waits[i].counter == counters[lost]) copy.waits[i].needed = INT32_MIN;
        perk_status status = perk_plan_check(&copy, &err);
        fprintf(stderr, "without %s: %s\n", plan->stages[counters[lost]].name, err.message);
        CHECK(status == PERK_UNSAFE_PLAN);
        free(copy.waits);
    }
    perk_plan_free(plan);
}

/* ---- an engine ---- */

enum { ENGINE_REQUESTS = 4 };

/* Tokens of all requests, one after the other, and log probabilities of one. All of them draw. Returns how many calls
 * it took. */
static int run_engine(perk_mode mode, int32_t *tokens, perk_logprob *logprobs) {
    const perk_engine_options options = {
        .backend = PERK_BACKEND_GPU,
        .config = config,
        .cache_folder = cache.text,
        .mode = mode,
        .steps_a_launch = 5,
        .program_tokens = {config.max_num_batched_tokens}}; /* others round otherwise */
    perk_request *requests[ENGINE_REQUESTS];
    perk_engine *engine;
    int32_t running = 1;
    int calls;
    CHECK_OK(perk_engine_open(&engine, folder.text, &options, &err));
    for (int i = 0; i < ENGINE_REQUESTS; i++) {
        perk_sampling sampling = drawing[i + 1];
        const int32_t prompt[] = {5 + i, 9, 200};
        sampling.max_tokens = 3 + i;
        sampling.ignore_eos = 1;
        CHECK_OK(perk_engine_submit(engine, prompt, 3, &sampling, &requests[i], &err));
    }
    for (calls = 0; running > 0; calls++) CHECK_OK(perk_engine_step(engine, &running, &err));
    for (int i = 0; i < ENGINE_REQUESTS; i++) {
        size_t count;
        const int32_t *answer = perk_request_tokens(requests[i], &count);
        CHECK(perk_request_finish(requests[i]) == PERK_FINISH_LENGTH && count == (size_t)(3 + i));
        for (size_t t = 0; t < count; t++) *tokens++ = answer[t];
    }
    for (size_t t = 0; t < 3; t++)
        memcpy(logprobs + t * (1 + TOP), perk_request_logprobs(requests[0], t, NULL), (1 + TOP) * sizeof *logprobs);
    perk_engine_free(engine);
    return calls;
}

static void test_engine(void) {
    int32_t wanted[64] = {0}, got[64] = {0};
    perk_logprob wanted_logprobs[3 * (1 + TOP)], got_logprobs[3 * (1 + TOP)];
    int single_calls = run_engine(PERK_MODE_SINGLE, wanted, wanted_logprobs);
    int calls = run_engine(PERK_MODE_COMPLETION, got, got_logprobs);
    fprintf(stderr, "an engine: %d calls instead of %d\n", calls, single_calls);
    CHECK(memcmp(wanted, got, sizeof got) == 0, "other tokens than by single steps");
    CHECK(memcmp(wanted_logprobs, got_logprobs, sizeof got_logprobs) == 0, "other log probabilities");
}

int main(int argc, char **argv) {
    if (strstr(EMULATOR_CXX, "NOTFOUND") && !getenv("PERK_TEST_GPU")) {
        fprintf(stderr, "skipped: no C++ compiler was found\n");
        return TEST_SKIP;
    }
    static test_request requests[REQUESTS];
    make_scratch();
    if (!getenv("PERK_TEST_GPU")) driver_of_emulator = open_emulator(WORKERS).driver;
    cache = path_in(scratch, "cache");
    folder = make_small_model(argc > 1 ? argv[1] : PERK_SOURCE_DIR);
    CHECK_OK(perk_model_open(&model, folder.text, false, 0, &err));
    CHECK_OK(perk_config_resolve(&config, model->max_positions, &err));
    draw_requests(requests, REQUESTS, false, 5);
    test_check();
    perk_executor *gpu = open_executor(NULL);
    run_single_steps(gpu, requests, REQUESTS);
    test_drawing(gpu);
    if (driver_of_emulator) test_drawing_together();
    test_answers();
    test_long_answers(gpu); /* its single steps write to pages that requests would find later */
    test_completion(gpu, requests);
    test_stop(gpu, requests);
    test_online(gpu, requests, 1, 100000);
    test_online(gpu, requests, 2, 2);
    test_engine();
    test_turns();
    test_hang(want_too_much, "waited more than 20 ms for counter", requests);
    test_hang(never_end, "the end of the step waited more than 20 ms for counter", requests);
    gpu->type->free(gpu);
    perk_model_free(model);
    return 0;
}
