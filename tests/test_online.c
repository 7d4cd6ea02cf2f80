/* A service whose kernel stays on the GPU (PERK_MODE_ONLINE), on the emulator: requests come when they like, are
 * cancelled, run short of pages, sample; programs for 1, 4 and 8 tokens take turns; the service is paused and drained,
 * the kernel ends idle and comes back; every token is the one of single steps. And an engine without a service.
 * PERK_TEST_GPU=1 runs it on the GPU; the argument is the root of the repository, where that is not where it was built.
 */
#include "emulated.h"
#include "perk/service.h"
#include "sampler.h"

#include <poll.h>
#include <pthread.h>
#include <time.h>

enum { WORKERS = 2, KINDS = 8, POSITIONS = 64, REQUESTS = 16 };

static perk_error err;
static path_text cache, folder;
/* Pages for one of the largest requests: three that run together are short of them. */
static const perk_config CONFIG = {.max_num_batched_tokens = 8,
                                   .max_num_batched_requests = 3,
                                   .page_size = 16,
                                   .max_num_pages = 4,
                                   .max_seq_length = POSITIONS};

/* What a request asks for, and what it gets by single steps. */
typedef struct test_kind {
    int32_t prompt[POSITIONS], answer[POSITIONS];
    size_t length, answer_length;
    perk_sampling sampling;
} test_kind;

static test_kind kinds[KINDS];

static int draw(uint64_t seed, uint64_t *place, int low, int high) {
    return low + (int)(perk_uniform(seed, (*place)++) * (high - low + 1));
}

static void link_tokenizer(const char *root) {
    path_text from = path_in(root, "examples/tiny/tokenizer.json");
    char *target = realpath(from.text, NULL);
    CHECK(target && symlink(target, path_in(folder.text, "tokenizer.json").text) == 0, "%s", from.text);
    free(target);
}

static perk_engine *open_with(perk_engine_options options) {
    perk_engine *engine;
    options.backend = PERK_BACKEND_GPU;
    options.cache_folder = cache.text;
    options.program_tokens[0] = options.config.max_num_batched_tokens;
    if (options.mode != PERK_MODE_SINGLE) options.program_tokens[1] = 1;
    if (options.mode != PERK_MODE_SINGLE) options.program_tokens[2] = 4;
    CHECK_OK(perk_engine_open(&engine, folder.text, &options, &err));
    return engine;
}

static perk_engine *open_engine(perk_mode mode, int32_t idle_limit_ms) {
    return open_with((perk_engine_options){.config = CONFIG, .mode = mode, .idle_limit_ms = idle_limit_ms});
}

/* Half of the prompts begin alike. The last kind samples, though hardly. */
static void make_kinds(void) {
    uint64_t place = 0;
    perk_engine *engine = open_engine(PERK_MODE_SINGLE, 0);
    const int32_t vocab = perk_engine_vocab_size(engine);
    for (int k = 0; k < KINDS; k++) {
        test_kind *kind = &kinds[k];
        perk_request *request;
        int32_t running = 1;
        kind->length = (size_t)draw(9, &place, k % 2 ? 18 : 1, 22);
        for (size_t t = 0; t < kind->length; t++)
            kind->prompt[t] = k % 2 && t < 20 ? ((int32_t)t * 37 + 11) % vocab : draw(9, &place, 0, vocab - 1);
        kind->sampling = (perk_sampling){.max_tokens = draw(9, &place, 2, 9) + (k ? 0 : 30), .ignore_eos = 1};
        if (k == KINDS - 1) kind->sampling.temperature = 1e-4f;
        CHECK_OK(perk_engine_submit(engine, kind->prompt, kind->length, &kind->sampling, &request, &err));
        while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
        const int32_t *tokens = perk_request_tokens(request, &kind->answer_length);
        memcpy(kind->answer, tokens, kind->answer_length * sizeof *tokens);
        CHECK((int32_t)kind->answer_length == kind->sampling.max_tokens);
        perk_request_free(request);
    }
    perk_engine_free(engine);
}

/* ---- what the service's thread hears ---- */

typedef struct test_track {
    uint64_t id;
    int kind;
    size_t told; /* by the callback */
    perk_finish finish;
    bool cancelled;
} test_track;

typedef struct test_run {
    perk_service *service;
    pthread_mutex_t lock; /* guards all below */
    test_track tracks[REQUESTS];
    int count, ended, checked;
    uint64_t tokens; /* of those that were checked */
    uint64_t launches[PERK_MAX_PROGRAMS];
    double thread_cpu; /* of the service's thread, at its last call */
} test_run;

static double thread_cpu(void) {
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double wall(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static void hear(void *user, uint64_t id, const int32_t *tokens, size_t count, perk_finish finish) {
    test_run *run = user;
    pthread_mutex_lock(&run->lock);
    int i = 0;
    while (i < run->count && run->tracks[i].id != id) i++;
    CHECK(i < run->count, "news of nobody");
    test_track *track = &run->tracks[i];
    const test_kind *kind = &kinds[track->kind];
    CHECK(!track->finish && track->told + count <= kind->answer_length);
    CHECK(count == 0 || memcmp(tokens, kind->answer + track->told, count * sizeof *tokens) == 0,
          "request %d: other tokens than by single steps", i);
    track->told += count;
    track->finish = finish;
    run->ended += finish != PERK_FINISH_NONE;
    run->thread_cpu = thread_cpu();
    pthread_mutex_unlock(&run->lock);
}

static void submit(test_run *run, int k) {
    pthread_mutex_lock(&run->lock); /* the callback must find it */
    test_track *track = &run->tracks[run->count];
    *track = (test_track){.kind = k};
    CHECK_OK(perk_service_submit(run->service, kinds[k].prompt, kinds[k].length, &kinds[k].sampling, &track->id, &err));
    run->count++;
    pthread_mutex_unlock(&run->lock);
}

static int ended(test_run *run) {
    pthread_mutex_lock(&run->lock);
    int count = run->ended;
    pthread_mutex_unlock(&run->lock);
    return count;
}

static void open_run(test_run *run, int32_t idle_limit_ms) {
    *run = (test_run){.lock = PTHREAD_MUTEX_INITIALIZER};
    const perk_service_options options = {.on_news = hear, .user = run};
    CHECK_OK(perk_service_open(&run->service, open_engine(PERK_MODE_ONLINE, idle_limit_ms), &options, &err));
}

static void cancel(test_run *run, int i) {
    pthread_mutex_lock(&run->lock);
    run->tracks[i].cancelled |= !run->tracks[i].finish;
    pthread_mutex_unlock(&run->lock);
    CHECK_OK(perk_service_cancel(run->service, run->tracks[i].id, &err));
}

/* Everything that was submitted has ended, and is accounted for. */
static void check_run(test_run *run) {
    perk_engine_stats stats;
    uint64_t set_backs = 0;
    CHECK_OK(perk_service_drain(run->service, &err));
    CHECK(ended(run) == run->count);
    for (; run->checked < run->count; run->checked++) {
        const test_track *track = &run->tracks[run->checked];
        perk_answer answer;
        int32_t got[POSITIONS];
        CHECK_OK(perk_service_poll(run->service, track->id, got, POSITIONS, &answer, &err));
        CHECK(answer.count == track->told && answer.finish == track->finish);
        CHECK(memcmp(got, kinds[track->kind].answer, answer.count * sizeof *got) == 0);
        CHECK(track->finish == PERK_FINISH_LENGTH ? track->told == kinds[track->kind].answer_length
                                                  : track->cancelled && track->finish == PERK_FINISH_CANCELLED);
        const perk_request_stats *s = &answer.stats;
        CHECK(s->queue_ms >= 0 && s->prefill_ms >= 0 && s->decode_ms >= 0);
        CHECK(track->cancelled || (s->prefill_ms > 0 && s->answer_tokens == (int32_t)track->told));
        run->tokens += track->told;
        set_backs += (uint64_t)s->set_backs;
    }
    perk_service_statistics(run->service, &stats);
    CHECK(stats.submitted == (uint64_t)run->count && stats.finished == stats.submitted);
    CHECK(stats.running == 0 && stats.waiting == 0 && stats.pages_in_use == 0, "%d running, %d waiting, %d pages",
          stats.running, stats.waiting, stats.pages_in_use);
    CHECK(stats.answer_tokens == run->tokens && stats.steps > 0 && stats.step_tokens >= stats.steps);
    CHECK(stats.set_backs >= set_backs && stats.batch_fill > 0 && stats.batch_fill <= 1);
    uint64_t steps = 0;
    for (int i = 0; i < PERK_MAX_PROGRAMS; i++) {
        steps += stats.program_steps[i];
        run->launches[i] = stats.program_launches[i];
        CHECK(stats.program_steps[i] == 0 || stats.program_launches[i] > 0);
    }
    CHECK(steps == stats.steps, "programs ran %llu of %llu steps", (unsigned long long)steps,
          (unsigned long long)stats.steps);
    fprintf(stderr, "  %d requests, %llu steps, %llu set back, %llu positions found; %llu, %llu, %llu launches\n",
            run->count, (unsigned long long)stats.steps, (unsigned long long)stats.set_backs,
            (unsigned long long)stats.found_tokens, (unsigned long long)run->launches[0],
            (unsigned long long)run->launches[1], (unsigned long long)run->launches[2]);
}

/* ---- requests that come and go ---- */

static void test_arrivals(uint64_t seed, int32_t idle_limit_ms, int kind_count) {
    test_run run;
    uint64_t place = 0;
    open_run(&run, idle_limit_ms);
    while (ended(&run) < REQUESTS) {
        if (run.count < REQUESTS) submit(&run, draw(seed, &place, 0, kind_count - 1));
        int victim = draw(seed, &place, 0, 5 * REQUESTS);
        if (victim < run.count) cancel(&run, victim);
        usleep((useconds_t)draw(seed, &place, 0, 40000));
    }
    check_run(&run);
    perk_service_free(run.service);
}

static size_t told(test_run *run, int i) {
    pthread_mutex_lock(&run->lock);
    size_t count = run->tracks[i].told;
    pthread_mutex_unlock(&run->lock);
    return count;
}

/* While a long answer is under way, others come, and end or are cancelled: to larger programs and back. `pauses`: at
 * the same time. */
static void test_turns(bool pauses) {
    test_run run;
    open_run(&run, 0);
    submit(&run, 0);
    for (int k = 1; k < 4; k++) {
        while (told(&run, 0) < (size_t)(k < 3 ? 10 : 22)) usleep(1000);
        submit(&run, k);
        if (k == 2) cancel(&run, 2);
        if (!pauses) continue;
        CHECK_OK(perk_service_pause(run.service, &err));
        CHECK_OK(perk_service_resume(run.service, &err));
    }
    check_run(&run);
    CHECK(pauses || (run.launches[0] + run.launches[1] > 0 && run.launches[2] > 1));
    perk_service_free(run.service);
}

/* A pause ends the kernel with requests under way, and they go on after it. Waiting costs the service's thread little.
 */
static void test_pause(void) {
    test_run run;
    perk_engine_stats before, after;
    open_run(&run, 0);
    for (int k = 0; k < 4; k++) submit(&run, k);
    for (int i = 0; i < 3; i++) {
        usleep(60000);
        CHECK_OK(perk_service_pause(run.service, &err));
        perk_service_statistics(run.service, &before);
        if (i == 1) submit(&run, 4);
        if (i == 1) cancel(&run, 4);
        if (i == 2) cancel(&run, 0);
        usleep(20000);
        perk_service_statistics(run.service, &after);
        CHECK(after.steps == before.steps, "a step during the pause");
        CHECK_OK(perk_service_resume(run.service, &err));
    }
    check_run(&run);
    CHECK_OK(perk_service_resume(run.service, &err));
    double begin = wall(), cpu = run.thread_cpu;
    for (int k = 0; k < 6; k++) submit(&run, k);
    check_run(&run);
    double share = (run.thread_cpu - cpu) / (wall() - begin);
    fprintf(stderr, "  the service's thread: %.1f %% of a core\n", 100 * share);
    CHECK(share < 0.1 || getenv("PERK_TEST_GPU")); /* there a step takes some 50 us, too short to sleep through */
    CHECK_OK(perk_service_resume(run.service, &err));
    for (int k = 0; k < 4; k++) submit(&run, k);
    usleep(50000);
    perk_service_free(run.service); /* in the middle of it */
}

/* Closed with requests under way, the service has no kernel on the GPU any more, and every call still returns. */
static void test_close(void) {
    perk_service *service;
    perk_answer answer;
    perk_engine_stats stats;
    int32_t tokens[POSITIONS];
    uint64_t ids[3];
    size_t count;
    CHECK_OK(perk_service_open(&service, open_engine(PERK_MODE_ONLINE, 60000), NULL, &err));
    for (int k = 0; k < 3; k++)
        CHECK_OK(perk_service_submit(service, kinds[k].prompt, kinds[k].length, &kinds[k].sampling, &ids[k], &err));
    CHECK_OK(perk_service_wait(service, ids[0], tokens, POSITIONS, -1, &answer, &err));
    count = answer.count;
    CHECK(count > 0);
    CHECK_OK(perk_service_close(service, &err));
    perk_service_statistics(service, &stats);
    CHECK(stats.running == 0 && stats.waiting == 0 && stats.pages_in_use == 0 && stats.finished == 3);
    CHECK_OK(perk_service_pause(service, &err));
    CHECK_OK(perk_service_resume(service, &err));
    CHECK_OK(perk_service_drain(service, &err));
    CHECK_OK(perk_service_poll(service, ids[0], tokens + count, POSITIONS - count, &answer, &err));
    count += answer.count;
    CHECK(answer.finish != PERK_FINISH_NONE && count <= kinds[0].answer_length);
    CHECK(memcmp(tokens, kinds[0].answer, count * sizeof *tokens) == 0);
    CHECK_FAILS(perk_service_submit(service, tokens, 1, NULL, &ids[1], &err), PERK_CANCELLED, "closed");
    perk_service_free(service);
}

/* ---- an engine of its own ---- */

static int count_tokens(void *user, int32_t token, const char *text, size_t size) {
    const test_kind *kind = &kinds[1];
    size_t *count = user;
    (void)text, (void)size;
    CHECK(token == kind->answer[*count]);
    ++*count;
    return 0;
}

static void test_engine(void) {
    perk_engine *engine = open_engine(PERK_MODE_ONLINE, 1000);
    perk_request *other;
    perk_generation generation;
    size_t count = 0;
    int32_t running;
    float *logits = calloc((size_t)perk_engine_vocab_size(engine), sizeof *logits);
    CHECK(logits);
    CHECK_OK(perk_engine_submit(engine, kinds[0].prompt, kinds[0].length, &kinds[0].sampling, &other, &err));
    CHECK_OK(perk_engine_generate(engine, kinds[1].prompt, kinds[1].length, &kinds[1].sampling, count_tokens, &count,
                                  &generation, &err));
    CHECK(count == kinds[1].answer_length && generation.finish == PERK_FINISH_LENGTH);
    CHECK_OK(perk_engine_logits(engine, kinds[2].prompt, 1, logits, &err)); /* whatever runs */
    CHECK_OK(perk_engine_pause(engine, &err));
    do CHECK_OK(perk_engine_step(engine, &running, &err));
    while (running);
    const int32_t *tokens = perk_request_tokens(other, &count);
    CHECK(count == kinds[0].answer_length && memcmp(tokens, kinds[0].answer, count * sizeof *tokens) == 0);
    CHECK_OK(perk_engine_submit(engine, kinds[2].prompt, kinds[2].length, &kinds[2].sampling, &other, &err));
    perk_request_cancel(other);
    CHECK(perk_request_finish(other) == PERK_FINISH_CANCELLED);
    CHECK_OK(perk_engine_step(engine, &running, &err));
    CHECK(running == 0);
    free(logits);
    perk_engine_free(engine);
}

/* Answers `prompt`, to which the answer is appended; returns how many positions were found in pages of others. */
static int32_t answer(perk_engine *engine, int32_t *prompt, size_t *length, int32_t max_tokens) {
    const perk_sampling sampling = {.max_tokens = max_tokens, .ignore_eos = 1};
    perk_request *request;
    perk_request_stats stats;
    int32_t running = 1;
    size_t count;
    CHECK_OK(perk_engine_submit(engine, prompt, *length, &sampling, &request, &err));
    while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
    const int32_t *tokens = perk_request_tokens(request, &count);
    CHECK(count == (size_t)max_tokens);
    memcpy(prompt + *length, tokens, count * sizeof *tokens);
    *length += count;
    perk_request_statistics(request, &stats);
    return stats.found_tokens;
}

/* The second question of a conversation, which begins with the first one and its answer, finds the full pages of both
 * in every mode; nothing where nothing is shared. */
static void test_conversation(void) {
    static const perk_mode modes[] = {PERK_MODE_SINGLE, PERK_MODE_SINGLE, PERK_MODE_COMPLETION, PERK_MODE_ONLINE,
                                      PERK_MODE_ONLINE};
    int32_t wanted[POSITIONS];
    for (int i = 0; i < (int)PERK_COUNT(modes); i++) {
        bool alone = i == 0 || i == 4;
        perk_engine *engine = open_with((perk_engine_options){
            .config = CONFIG, .mode = modes[i], .idle_limit_ms = 60000, .no_prefix_sharing = alone});
        int32_t text[POSITIONS] = {5, 9, 200, 4};
        size_t length = 30; /* of one page and most of another */
        CHECK(answer(engine, text, &length, 5) == 0);
        text[length++] = 7;
        int32_t found = answer(engine, text, &length, 3);
        CHECK(found == (alone ? 0 : 2 * CONFIG.page_size), "mode %d: found %d", (int)modes[i], found);
        if (i == 0) memcpy(wanted, text, sizeof wanted);
        CHECK(memcmp(wanted, text, sizeof wanted) == 0, "mode %d: other tokens", (int)modes[i]);
        perk_engine_free(engine);
    }
}

/* A stop string, which the host finds while the kernel goes on: the same tokens as by single steps, and every page
 * comes back. */
static void test_stop_string(void) {
    size_t count[2] = {0};
    int32_t tokens[2][POSITIONS];
    char stop[8] = "";
    for (int i = -1; i < 2; i++) { /* first of all the whole answer, of which the stop string is a piece */
        perk_engine *engine = open_engine(i == 1 ? PERK_MODE_ONLINE : PERK_MODE_SINGLE, 60000);
        const char *const strings[] = {stop};
        const perk_sampling sampling = {
            .max_tokens = 30, .ignore_eos = 1, .stop_strings = strings, .stop_string_count = i >= 0};
        perk_request *request;
        perk_engine_stats stats;
        int32_t running = 1, prompt[] = {5, 9, 200};
        size_t made, size;
        char *text;
        CHECK_OK(perk_engine_submit(engine, prompt, 3, &sampling, &request, &err));
        while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
        const int32_t *answer = perk_request_tokens(request, &made);
        CHECK_OK(perk_tokenizer_decode(perk_engine_tokenizer(engine), answer, made, 1, &text, &size, &err));
        if (i < 0) CHECK(size > 24);
        if (i < 0) memcpy(stop, text + size / 2, 5);
        if (i >= 0)
            CHECK(perk_request_finish(request) == PERK_FINISH_STOP && strstr(text, stop) && made < 30, "%s", text);
        if (i >= 0) memcpy(tokens[i], answer, (count[i] = made) * sizeof *answer);
        free(text);
        CHECK_OK(perk_engine_pause(engine, &err));
        perk_engine_statistics(engine, &stats);
        CHECK(stats.pages_in_use == 0 && stats.finished == 1 && stats.answer_tokens == made);
        perk_engine_free(engine);
    }
    CHECK(count[0] == count[1] && memcmp(tokens[0], tokens[1], count[0] * sizeof **tokens) == 0);
}

/* A program for more than 64 tokens has a third role beside consumers and producer; it goes from step to step, too. */
static void test_wide(void) {
    perk_engine_options options = {.config = CONFIG, .mode = PERK_MODE_COMPLETION};
    options.config.max_num_batched_tokens = 72;
    perk_engine *engine = open_with(options);
    perk_request *requests[4];
    int32_t running;
    for (int k = 0; k < 4; k++)
        CHECK_OK(perk_engine_submit(engine, kinds[k].prompt, kinds[k].length, &kinds[k].sampling, &requests[k], &err));
    CHECK_OK(perk_engine_step(engine, &running, &err));
    CHECK(running == 0);
    for (int k = 0; k < 4; k++) {
        size_t count;
        const int32_t *tokens = perk_request_tokens(requests[k], &count);
        CHECK(count == kinds[k].answer_length && memcmp(tokens, kinds[k].answer, count * sizeof *tokens) == 0, "%d", k);
    }
    perk_engine_free(engine);
}

int main(int argc, char **argv) {
    if (strstr(EMULATOR_CXX, "NOTFOUND") && !getenv("PERK_TEST_GPU")) {
        fprintf(stderr, "skipped: no C++ compiler was found\n");
        return TEST_SKIP;
    }
    make_scratch();
    if (!getenv("PERK_TEST_GPU")) open_emulator(WORKERS);
    cache = path_in(scratch, "cache");
    folder = make_small_model(argc > 1 ? argv[1] : PERK_SOURCE_DIR);
    link_tokenizer(argc > 1 ? argv[1] : PERK_SOURCE_DIR);
    make_kinds();
    test_engine();
    test_conversation();
    test_stop_string();
    test_wide();
    test_arrivals(1, 0, KINDS - 1);
    test_arrivals(2, 1, KINDS - 1);
    test_arrivals(3, 0, KINDS);
    test_turns(false);
    test_turns(true);
    test_pause();
    test_close();
    return 0;
}
