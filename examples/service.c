/* Several prompts from two threads, tokens as they come: an engine in a thread of its own, and an event loop that waits
 * for its descriptor. cc service.c $(pkg-config --cflags --libs perk) -pthread && ./a.out FOLDER */
#include <perk/service.h>

#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 2, PROMPTS = 2, REQUESTS = THREADS * PROMPTS };

typedef struct asker {
    perk_service *service;
    const perk_tokenizer *tokenizer; /* any thread may use it */
    const char *prompts[PROMPTS];
    perk_error failure;
    pthread_t thread;
} asker;

/* A thread that submits its prompts and is done: the answers are for whoever reads them. */
static void *ask(void *argument) {
    asker *self = argument;
    for (int i = 0; i < PROMPTS; i++) {
        perk_sampling sampling = {.max_tokens = 40, .ignore_eos = 1};
        uint64_t request;
        int32_t *ids;
        size_t count;
        const char *prompt = self->prompts[i];
        if (perk_tokenizer_encode(self->tokenizer, prompt, strlen(prompt), NULL, &ids, &count, &self->failure))
            return NULL;
        perk_status status = perk_service_submit(self->service, ids, count, &sampling, &request, &self->failure);
        free(ids); /* submit has copied them */
        if (status != PERK_OK) return NULL;
    }
    return NULL;
}

/* Prints what a request has to tell. *ended: it is complete, and forgotten. (A perk_text_stream for each request would
 * hold back the first bytes of a character that several tokens make up.) */
static perk_status print_news(perk_service *service, const perk_tokenizer *tokenizer, uint64_t request, int *ended,
                              perk_error *err) {
    int32_t tokens[16];
    perk_answer answer;
    *ended = 0;
    do {
        char *text;
        size_t size;
        perk_status status = perk_service_poll(service, request, tokens, 16, &answer, err);
        if (status == PERK_OK) status = perk_tokenizer_decode(tokenizer, tokens, answer.count, 1, &text, &size, err);
        if (status != PERK_OK) return status;
        if (answer.count) printf("%llx: %s\n", (unsigned long long)request, text);
        free(text);
    } while (answer.count == 16 && answer.finish == PERK_FINISH_NONE);
    if (answer.finish == PERK_FINISH_NONE) return PERK_OK;
    *ended = 1;
    printf("%llx: ended, %d tokens, the first after %.1f ms\n", (unsigned long long)request, answer.stats.answer_tokens,
           answer.stats.queue_ms + answer.stats.prefill_ms);
    return perk_service_release(service, request, err);
}

/* The event loop: here it waits for perk alone; other descriptors would stand beside it. */
static perk_status read_answers(perk_service *service, const perk_tokenizer *tokenizer, int expected, perk_error *err) {
    struct pollfd watched = {.fd = perk_service_fd(service), .events = POLLIN};
    while (expected > 0) {
        uint64_t requests[8];
        size_t count;
        if (poll(&watched, 1, -1) < 0) continue; /* a signal */
        perk_status status = perk_service_news(service, requests, 8, &count, err);
        for (size_t i = 0; i < count && status == PERK_OK; i++) {
            int ended;
            status = print_news(service, tokenizer, requests[i], &ended, err);
            expected -= ended;
        }
        fflush(stdout);
        if (status != PERK_OK) return status;
    }
    return PERK_OK;
}

static perk_status serve(perk_service *service, const perk_tokenizer *tokenizer, perk_error *err) {
    asker askers[THREADS] = {{.prompts = {"Once upon a time", "The little boat"}},
                             {.prompts = {"In the garden", "Every morning"}}};
    perk_status status = PERK_OK;
    for (int i = 0; i < THREADS; i++) {
        askers[i].service = service;
        askers[i].tokenizer = tokenizer;
        if (pthread_create(&askers[i].thread, NULL, ask, &askers[i]) != 0) abort();
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(askers[i].thread, NULL);
        if (askers[i].failure.status != PERK_OK) *err = askers[i].failure, status = err->status;
    }
    return status == PERK_OK ? read_answers(service, tokenizer, REQUESTS, err) : status;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL_FOLDER\n", argv[0]);
        return 2;
    }
    perk_error err = {0};
    perk_engine *engine;
    perk_service *service = NULL;
    perk_status status = perk_engine_open(&engine, argv[1], NULL, &err);
    const perk_tokenizer *tokenizer = status == PERK_OK ? perk_engine_tokenizer(engine) : NULL;
    if (status == PERK_OK && !tokenizer) {
        fprintf(stderr, "%s: no tokenizer.json\n", argv[1]);
        perk_engine_free(engine);
        return 1;
    }
    if (status == PERK_OK) status = perk_service_open(&service, engine, NULL, &err); /* the engine is its own now */
    if (status == PERK_OK) status = serve(service, tokenizer, &err);
    if (status != PERK_OK) fprintf(stderr, "%s\n", err.message);
    perk_service_free(service);
    return status == PERK_OK ? 0 : 1;
}
