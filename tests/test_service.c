/* A service over the reference executor: many threads submit, read, cancel and forget at once, and every answer is the
 * one that the request gets alone; what is wrong or late is refused. CI runs it under ThreadSanitizer, too. */
#include "perk/service.h"
#include "src/base.h"
#include "temp.h"

#include <poll.h>
#include <pthread.h>

#define FOLDER PERK_SOURCE_DIR "/tests/fixtures/checkpoints/single" /* Qwen3, vocabulary 128, 256 positions */

enum { VOCAB = 128, KINDS = 6, ANSWER = 24, CLIENTS = 5, ROUNDS = 12 };

static const perk_config CONFIG = {.max_num_batched_tokens = 12,
                                   .max_num_batched_requests = 4,
                                   .page_size = 16,
                                   .max_num_pages = 12,
                                   .max_seq_length = 96};

/* Requests of a few kinds, and what they get alone. */
typedef struct test_kind {
    int32_t prompt[60], answer[ANSWER];
    size_t length;
    perk_sampling sampling;
    float logprobs[ANSWER]; /* of the answer's tokens, where asked for */
} test_kind;

static test_kind kinds[KINDS];

static perk_engine *open_engine(void) {
    perk_error err = {0};
    perk_engine_options options = {
        .backend = PERK_BACKEND_REFERENCE, .config = CONFIG, .threads = 1, .random_weights = 1, .seed = 5};
    perk_engine *engine;
    CHECK_OK(perk_engine_open(&engine, FOLDER, &options, &err));
    return engine;
}

static const perk_logit_bias BIAS[] = {{3, 2}};

static void make_kinds(void) {
    perk_error err = {0};
    perk_engine *engine = open_engine();
    for (int k = 0; k < KINDS; k++) {
        test_kind *kind = &kinds[k];
        perk_request *request;
        int32_t running = 1;
        size_t count;
        kind->length = (size_t)(5 + 10 * k);
        for (size_t i = 0; i < kind->length; i++) kind->prompt[i] = (int32_t)((i * i + 3 * (size_t)(k % 2)) % VOCAB);
        kind->sampling = (perk_sampling){.max_tokens = ANSWER - k, .ignore_eos = 1, .seed = (uint64_t)k};
        if (k % 3) kind->sampling.temperature = 0.9f;
        if (k % 2) kind->sampling.repetition_penalty = 1.3f;
        kind->sampling.logprobs = k % 2;
        kind->sampling.bias = BIAS;
        kind->sampling.bias_count = k % 2;
        CHECK_OK(perk_engine_submit(engine, kind->prompt, kind->length, &kind->sampling, &request, &err));
        while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
        const int32_t *tokens = perk_request_tokens(request, &count);
        CHECK((int)count == ANSWER - k);
        memcpy(kind->answer, tokens, count * sizeof *tokens);
        for (size_t i = 0; i < count && k % 2; i++)
            kind->logprobs[i] = perk_request_logprobs(request, i, NULL)->logprob;
    }
    perk_engine_free(engine);
}

static uint64_t submit(perk_service *service, int kind) {
    perk_error err = {0};
    uint64_t id;
    perk_sampling sampling = kinds[kind].sampling;
    perk_logit_bias *bias = malloc(sizeof BIAS); /* the caller's lists are needed during the call only */
    CHECK(bias);
    memcpy(bias, BIAS, sizeof BIAS);
    sampling.bias = bias;
    CHECK_OK(perk_service_submit(service, kinds[kind].prompt, kinds[kind].length, &sampling, &id, &err));
    CHECK(id != 0);
    free(bias);
    return id;
}

/* Reads up to `room` tokens at a time until the request has ended or has `enough`; returns how many it got. */
static size_t read_answer(perk_service *service, uint64_t id, int kind, size_t room, size_t enough,
                          perk_finish *finish) {
    perk_error err = {0};
    perk_answer answer = {0};
    int32_t tokens[ANSWER];
    size_t got = 0;
    while (answer.finish == PERK_FINISH_NONE && got < enough) {
        CHECK_OK(perk_service_wait(service, id, tokens + got, PERK_MIN(room, ANSWER - got), -1, &answer, &err));
        got += answer.count;
    }
    CHECK(memcmp(tokens, kinds[kind].answer, got * sizeof *tokens) == 0, "a wrong token of kind %d", kind);
    if (answer.finish) CHECK(answer.stats.answer_tokens == (int32_t)got, "%d", answer.stats.answer_tokens);
    if (answer.finish) CHECK(answer.stats.prompt_tokens == (int32_t)kinds[kind].length);
    for (size_t i = 0; i <= got; i++) {
        perk_logprob logprob[3];
        size_t count;
        CHECK_OK(perk_service_logprobs(service, id, i, logprob, PERK_COUNT(logprob), &count, &err));
        if (i == got) break; /* more may have come */
        CHECK(count == (size_t)(kind % 2), "%zu log probabilities", count);
        if (count) CHECK(logprob->token == tokens[i] && logprob->logprob == kinds[kind].logprobs[i], "place %zu", i);
    }
    *finish = answer.finish;
    return got;
}

/* ---- many threads ---- */

typedef struct test_client {
    perk_service *service;
    int number;
    pthread_t thread;
} test_client;

static void *run_client(void *argument) {
    const test_client *client = argument;
    perk_error err = {0};
    perk_finish finish;
    perk_answer answer;
    perk_engine_stats stats;
    for (int round = 0; round < ROUNDS; round++) {
        int kind = (client->number + round) % KINDS, how = (client->number * 7 + round) % 4;
        uint64_t id = submit(client->service, kind), second = submit(client->service, (kind + 1) % KINDS);
        size_t got = read_answer(client->service, id, kind, how == 0 ? 1 : ANSWER, how == 1 ? 3 : ANSWER, &finish);
        if (how == 1)
            CHECK_OK(perk_service_cancel(client->service, id, &err));
        else
            CHECK(finish == PERK_FINISH_LENGTH && (int)got == ANSWER - kind);
        if (how == 2)
            CHECK_OK(perk_service_release(client->service, second, &err)); /* under way, or not yet */
        else
            CHECK((int)read_answer(client->service, second, (kind + 1) % KINDS, ANSWER, ANSWER, &finish) > 0);
        CHECK_OK(perk_service_release(client->service, id, &err));
        CHECK(perk_service_release(client->service, id, &err) == PERK_NOT_FOUND);
        CHECK(perk_service_poll(client->service, id, NULL, 0, &answer, &err) == PERK_NOT_FOUND);
        if (how == 2)
            CHECK(perk_service_cancel(client->service, second, &err) == PERK_NOT_FOUND);
        else if (how != 3)
            CHECK_OK(perk_service_release(client->service, second, &err)); /* the rest is the service's */
        perk_service_statistics(client->service, &stats);
        CHECK(stats.running <= CONFIG.max_num_batched_requests && stats.pages_in_use <= stats.pages);
    }
    return NULL;
}

/* While they run, somebody stops the service now and then. */
static void test_threads(void) {
    perk_error err = {0};
    perk_service *service;
    test_client clients[CLIENTS];
    perk_engine_stats before, after;
    CHECK_OK(perk_service_open(&service, open_engine(), NULL, &err));
    for (int i = 0; i < CLIENTS; i++) {
        clients[i] = (test_client){.service = service, .number = i};
        CHECK(pthread_create(&clients[i].thread, NULL, run_client, &clients[i]) == 0);
    }
    for (int i = 0; i < 5; i++) {
        CHECK_OK(perk_service_pause(service, &err));
        perk_service_statistics(service, &before);
        usleep(3000);
        perk_service_statistics(service, &after);
        CHECK(after.steps == before.steps, "a step during the pause");
        CHECK_OK(perk_service_resume(service, &err));
        usleep(3000);
    }
    for (int i = 0; i < CLIENTS; i++) CHECK(pthread_join(clients[i].thread, NULL) == 0);
    CHECK_OK(perk_service_drain(service, &err));
    perk_service_statistics(service, &after);
    CHECK(after.running == 0 && after.waiting == 0 && after.submitted == CLIENTS * ROUNDS * 2 &&
          after.finished == after.submitted && after.found_tokens > 0);
    perk_service_free(service);
}

/* ---- an event loop ---- */

static bool is_readable(const perk_service *service, int timeout_ms) {
    struct pollfd fd = {.fd = perk_service_fd(service), .events = POLLIN};
    return poll(&fd, 1, timeout_ms) == 1;
}

static void test_event_loop(void) {
    perk_error err = {0};
    perk_service *service;
    perk_answer answer;
    uint64_t ids[KINDS], named[2];
    size_t got[KINDS] = {0}, count;
    int32_t tokens[KINDS][ANSWER];
    int left = KINDS;
    CHECK_OK(perk_service_open(&service, open_engine(), NULL, &err));
    CHECK(!is_readable(service, 0));
    for (int k = 0; k < KINDS; k++) ids[k] = submit(service, k);
    while (left > 0) {
        CHECK(is_readable(service, 10000), "no news");
        CHECK_OK(perk_service_news(service, named, 2, &count, &err));
        CHECK(count >= 1 && count <= 2);
        for (size_t i = 0; i < count; i++) {
            int k = 0;
            while (k < KINDS && ids[k] != named[i]) k++;
            CHECK(k < KINDS);
            CHECK_OK(perk_service_poll(service, ids[k], tokens[k] + got[k], ANSWER - got[k], &answer, &err));
            got[k] += answer.count;
            if (answer.finish == PERK_FINISH_NONE) continue;
            left--;
            CHECK((int)got[k] == ANSWER - k && memcmp(tokens[k], kinds[k].answer, got[k] * sizeof(int32_t)) == 0);
        }
    }
    CHECK(!is_readable(service, 0));
    CHECK_OK(perk_service_poll(service, ids[0], tokens[0], ANSWER, &answer, &err));
    CHECK(answer.count == 0 && answer.finish == PERK_FINISH_LENGTH);
    CHECK(answer.stats.decode_ms > 0 && answer.stats.tokens_per_second > 0);
    perk_service_free(service);
}

/* ---- the callback ---- */

typedef struct heard {
    perk_service *service;
    pthread_mutex_t lock;
    uint64_t id[2];
    size_t count[2];
    perk_finish finish[2];
    int32_t tokens[2][ANSWER];
} heard;

/* The end of the first request brings a second one, and is forgotten on the spot. */
static void hear(void *user, uint64_t id, const int32_t *tokens, size_t count, perk_finish finish) {
    heard *h = user;
    perk_error err = {0};
    perk_answer answer;
    pthread_mutex_lock(&h->lock);
    int which = h->id[1] == id;
    CHECK(id == h->id[which] && h->finish[which] == PERK_FINISH_NONE && h->count[which] + count <= ANSWER);
    if (count) memcpy(h->tokens[which] + h->count[which], tokens, count * sizeof *tokens);
    h->count[which] += count;
    h->finish[which] = finish;
    CHECK(perk_service_close(h->service, &err) == PERK_INVALID_ARGUMENT && strstr(err.message, "callback"));
    CHECK(perk_service_pause(h->service, &err) == PERK_INVALID_ARGUMENT);
    CHECK(perk_service_drain(h->service, &err) == PERK_INVALID_ARGUMENT);
    CHECK(perk_service_wait(h->service, id, NULL, 0, 1, &answer, &err) == PERK_INVALID_ARGUMENT);
    if (finish && which == 0) {
        CHECK_OK(perk_service_release(h->service, id, &err));
        h->id[1] = submit(h->service, 2);
    }
    pthread_mutex_unlock(&h->lock);
}

static void test_callback(void) {
    perk_error err = {0};
    heard h = {.lock = PTHREAD_MUTEX_INITIALIZER};
    perk_service_options options = {.on_news = hear, .user = &h};
    pthread_mutex_lock(&h.lock);
    CHECK_OK(perk_service_open(&h.service, open_engine(), &options, &err));
    h.id[0] = submit(h.service, 1);
    pthread_mutex_unlock(&h.lock);
    for (perk_finish finish = PERK_FINISH_NONE; finish == PERK_FINISH_NONE; usleep(1000)) {
        pthread_mutex_lock(&h.lock);
        finish = h.finish[1];
        pthread_mutex_unlock(&h.lock);
    }
    CHECK_OK(perk_service_close(h.service, &err));
    CHECK(h.finish[0] == PERK_FINISH_LENGTH && h.count[0] == ANSWER - 1 && h.count[1] == ANSWER - 2);
    CHECK(memcmp(h.tokens[0], kinds[1].answer, h.count[0] * sizeof(int32_t)) == 0);
    CHECK(memcmp(h.tokens[1], kinds[2].answer, h.count[1] * sizeof(int32_t)) == 0);
    perk_service_free(h.service);
}

/* ---- a drain that another thread ends ---- */

static void wait_at_gate(void *user, uint64_t id, const int32_t *tokens, size_t count, perk_finish finish) {
    (void)id, (void)tokens, (void)count, (void)finish;
    pthread_mutex_lock(user);
    pthread_mutex_unlock(user);
}

static void *drain(void *service) {
    perk_error err = {0};
    CHECK_FAILS(perk_service_drain(service, &err), PERK_CANCELLED, "resume");
    return NULL;
}

static void test_resumed_drain(void) {
    perk_error err = {0};
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    const perk_service_options options = {.on_news = wait_at_gate, .user = &gate};
    perk_service *service;
    pthread_t drainer;
    perk_finish finish;
    int32_t prompt[] = {1};
    uint64_t other;
    CHECK_OK(perk_service_open(&service, open_engine(), &options, &err));
    pthread_mutex_lock(&gate); /* the thread comes no further than to the first token */
    uint64_t id = submit(service, 0);
    CHECK(pthread_create(&drainer, NULL, drain, service) == 0);
    perk_status status = PERK_OK;
    for (; !status; usleep(1000)) {
        status = perk_service_submit(service, prompt, 1, NULL, &other, &err);
        if (!status) CHECK_OK(perk_service_release(service, other, &err));
    }
    CHECK(status == PERK_CANCELLED);
    CHECK_OK(perk_service_resume(service, &err));
    CHECK(pthread_join(drainer, NULL) == 0);
    pthread_mutex_unlock(&gate);
    CHECK(read_answer(service, id, 0, ANSWER, ANSWER, &finish) == ANSWER);
    CHECK_OK(perk_service_drain(service, &err));
    perk_service_free(service);
}

/* ---- what is wrong ---- */

static void test_bad_calls(void) {
    perk_error err = {0};
    perk_service *service;
    perk_answer answer;
    uint64_t id, paused, other;
    int32_t prompt[200] = {1}, tokens[ANSWER];
    perk_service_options options = {.max_unfinished = -1};
    CHECK_FAILS(perk_service_open(&service, NULL, NULL, &err), PERK_INVALID_ARGUMENT, "engine");
    CHECK_FAILS(perk_service_open(&service, open_engine(), &options, &err), PERK_INVALID_ARGUMENT, "max_unfinished");
    options.max_unfinished = 2;
    CHECK_OK(perk_service_open(&service, open_engine(), &options, &err));
    CHECK_FAILS(perk_service_submit(service, prompt, 0, NULL, &id, &err), PERK_INVALID_ARGUMENT, "empty");
    CHECK_FAILS(perk_service_submit(service, NULL, 1, NULL, &id, &err), PERK_INVALID_ARGUMENT, "empty");
    CHECK_FAILS(perk_service_submit(service, prompt, 96, NULL, &id, &err), PERK_LIMIT, "max_seq_length");
    prompt[1] = VOCAB;
    CHECK_FAILS(perk_service_submit(service, prompt, 2, NULL, &id, &err), PERK_INVALID_ARGUMENT, "vocabulary");
    CHECK_FAILS(perk_service_submit(service, prompt, 1, &(perk_sampling){.top_p = 2}, &id, &err), PERK_INVALID_ARGUMENT,
                "top_p");
    CHECK(id == 0);
    CHECK_FAILS(perk_service_poll(service, 0, tokens, 1, &answer, &err), PERK_NOT_FOUND, "request 0");
    CHECK_FAILS(perk_service_cancel(service, UINT64_MAX, &err), PERK_NOT_FOUND, "released before");

    /* Paused, requests wait; two are as many as there may be. */
    CHECK_OK(perk_service_pause(service, &err));
    paused = submit(service, 3);
    other = submit(service, 4);
    CHECK_FAILS(perk_service_submit(service, prompt, 1, NULL, &id, &err), PERK_LIMIT, "2 requests");
    CHECK_FAILS(perk_service_drain(service, &err), PERK_INVALID_ARGUMENT, "resume");
    CHECK_OK(perk_service_wait(service, paused, tokens, ANSWER, 5, &answer, &err));
    CHECK(answer.count == 0 && answer.finish == PERK_FINISH_NONE);
    CHECK_OK(perk_service_cancel(service, other, &err)); /* also works while paused */
    CHECK_OK(perk_service_wait(service, other, tokens, ANSWER, -1, &answer, &err));
    CHECK(answer.count == 0 && answer.finish == PERK_FINISH_CANCELLED);
    CHECK_OK(perk_service_cancel(service, other, &err));
    CHECK_OK(perk_service_release(service, other, &err));

    CHECK_OK(perk_service_resume(service, &err));
    CHECK_OK(perk_service_drain(service, &err));
    CHECK_FAILS(perk_service_submit(service, prompt, 1, NULL, &id, &err), PERK_CANCELLED, "resume");
    CHECK_OK(perk_service_poll(service, paused, tokens, ANSWER, &answer, &err));
    CHECK(answer.finish == PERK_FINISH_LENGTH && answer.count == ANSWER - 3);
    CHECK_OK(perk_service_resume(service, &err));
    id = submit(service, 5);
    CHECK(id != paused && id != other);
    CHECK_OK(perk_service_close(service, &err));
    CHECK_OK(perk_service_close(service, &err));
    CHECK_FAILS(perk_service_submit(service, prompt, 1, NULL, &other, &err), PERK_CANCELLED, "closed");
    CHECK_OK(perk_service_wait(service, id, tokens, ANSWER, -1, &answer, &err));
    CHECK(answer.finish != PERK_FINISH_NONE);
    CHECK_OK(perk_service_release(service, id, &err)); /* the thread is gone: freed here */
    CHECK_FAILS(perk_service_release(service, id, &err), PERK_NOT_FOUND, "released before");
    CHECK_OK(perk_service_drain(service, &err));
    perk_service_free(service);
    perk_service_free(NULL);
}

/* Weights that are all NaN: the first sampled token fails the step, and with it everything. */
static void test_failed_step(void) {
    perk_error err = {0};
    temp_folder folder = temp_make();
    const char *names[] = {"config.json", "model.safetensors"};
    for (int i = 0; i < 2; i++) {
        char path[600], *data;
        size_t size;
        uint64_t header;
        snprintf(path, sizeof path, "%s/%s", FOLDER, names[i]);
        CHECK_OK(perk_read_file(path, 1 << 24, &data, &size, &err));
        memcpy(&header, data, sizeof header);
        if (i == 1) memset(data + 8 + header, 0xff, size - 8 - (size_t)header);
        temp_write(&folder, names[i], data, size);
        free(data);
    }
    perk_engine_options options = {.backend = PERK_BACKEND_REFERENCE, .threads = 1};
    perk_engine *engine;
    perk_service *service;
    perk_answer answer;
    int32_t prompt[] = {1, 2}, token;
    uint64_t id;
    CHECK_OK(perk_engine_open(&engine, folder.path, &options, &err));
    CHECK_OK(perk_service_open(&service, engine, NULL, &err));
    CHECK_OK(perk_service_submit(service, prompt, 2, &(perk_sampling){.temperature = 1}, &id, &err));
    CHECK_FAILS(perk_service_wait(service, id, &token, 1, -1, &answer, &err), PERK_INTERNAL, "not finite");
    CHECK(answer.finish == PERK_FINISH_CANCELLED && answer.count == 0);
    CHECK_FAILS(perk_service_submit(service, prompt, 2, NULL, &id, &err), PERK_INTERNAL, "not finite");
    CHECK_OK(perk_service_drain(service, &err));
    perk_service_free(service);
    temp_remove(&folder);
}

int main(void) {
    make_kinds();
    test_event_loop();
    test_callback();
    test_bad_calls();
    test_failed_step();
    test_resumed_drain();
    test_threads();
    return 0;
}
