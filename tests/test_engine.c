/* The engine over the reference executor: requests together answer as they do alone, however prompts are cut and pages
 * run short; what is wrong is refused and harms nothing. */
#include "perk/engine.h"
#include "src/base.h"
#include "src/stop_text.h"
#include "temp.h"

#include <math.h>

#define FOLDER PERK_SOURCE_DIR "/tests/fixtures/checkpoints/single" /* Qwen3, vocabulary 128, 256 positions */
#define TINY PERK_SOURCE_DIR "/examples/tiny"

enum { VOCAB = 128, REQUESTS = 6, MAX_ANSWER = 64 };

static perk_error err;

/* Weights drawn from a seed give livelier answers than those of the fixture. */
static perk_engine *open_engine(perk_config config) {
    perk_engine_options options = {
        .backend = PERK_BACKEND_REFERENCE, .config = config, .threads = 2, .random_weights = 1, .seed = 5};
    perk_engine *engine;
    CHECK_OK(perk_engine_open(&engine, FOLDER, &options, &err));
    CHECK(perk_engine_vocab_size(engine) == VOCAB);
    return engine;
}

/* ---- requests ---- */

typedef struct test_request {
    int32_t prompt[80], answer[MAX_ANSWER];
    size_t prompt_length, count;
    perk_sampling sampling;
} test_request;

static void make_requests(test_request *requests) {
    for (int i = 0; i < REQUESTS; i++) {
        requests[i].prompt_length = (size_t)(1 + i * 13);
        for (size_t k = 0; k < requests[i].prompt_length; k++)
            requests[i].prompt[k] = (int32_t)((k * k + 31 * (size_t)i + 3) % VOCAB);
        requests[i].sampling = (perk_sampling){.max_tokens = 12 + 8 * i, .ignore_eos = 1};
        if (i % 2) requests[i].sampling.temperature = 0.9f;
        requests[i].sampling.seed = (uint64_t)i;
    }
}

static void answer_alone(test_request *requests, perk_config config) {
    perk_engine *engine = open_engine(config);
    for (int i = 0; i < REQUESTS; i++) {
        perk_request *request;
        int32_t running = 1;
        CHECK_OK(perk_engine_submit(engine, requests[i].prompt, requests[i].prompt_length, &requests[i].sampling,
                                    &request, &err));
        while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
        const int32_t *tokens = perk_request_tokens(request, &requests[i].count);
        CHECK(perk_request_finish(request) == PERK_FINISH_LENGTH);
        CHECK((int32_t)requests[i].count == requests[i].sampling.max_tokens);
        memcpy(requests[i].answer, tokens, requests[i].count * sizeof *tokens);
        perk_request_free(request);
    }
    perk_engine_free(engine);
}

static void check_together(const test_request *requests, perk_config config) {
    perk_engine *engine = open_engine(config);
    perk_request *submitted[REQUESTS];
    int32_t running = 1;
    for (int i = 0; i < REQUESTS; i++) {
        CHECK_OK(perk_engine_submit(engine, requests[i].prompt, requests[i].prompt_length, &requests[i].sampling,
                                    &submitted[i], &err));
        if (i % 2) CHECK_OK(perk_engine_step(engine, &running, &err)); /* some arrive while others run */
    }
    while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
    for (int i = 0; i < REQUESTS; i++) {
        size_t count;
        const int32_t *tokens = perk_request_tokens(submitted[i], &count);
        CHECK(count == requests[i].count);
        CHECK(memcmp(tokens, requests[i].answer, count * sizeof *tokens) == 0, "request %d answers otherwise", i);
    }
    CHECK_OK(perk_engine_step(engine, &running, &err));
    CHECK(running == 0);
    perk_engine_free(engine); /* and the requests with it */
}

static void test_batches(void) {
    static test_request requests[REQUESTS];
    make_requests(requests);
    answer_alone(requests, (perk_config){.max_num_batched_tokens = 64, .max_seq_length = 160});
    /* chunks of many sizes, few places, few pages */
    check_together(requests, (perk_config){.max_num_batched_tokens = 16, .max_seq_length = 160});
    check_together(requests, (perk_config){.max_num_batched_tokens = 1, .max_seq_length = 160});
    check_together(requests, (perk_config){.max_num_batched_tokens = 7,
                                           .max_num_batched_requests = 2,
                                           .page_size = 16,
                                           .max_seq_length = 160});
    check_together(
        requests,
        (perk_config){.max_num_batched_tokens = 24, .page_size = 16, .max_num_pages = 10, .max_seq_length = 160});
    check_together(requests, (perk_config){.max_num_batched_tokens = 9,
                                           .max_num_logit_rows = 1,
                                           .page_size = 32,
                                           .max_num_pages = 6,
                                           .max_seq_length = 160});
}

/* A text that goes on, again and again: what is found in pages is not computed, and the answers stay the same. */
static void test_sharing(void) {
    perk_config config = {.page_size = 16, .max_seq_length = 160, .max_num_batched_tokens = 8};
    perk_engine_options options = {
        .backend = PERK_BACKEND_REFERENCE, .config = config, .threads = 2, .random_weights = 1, .seed = 5};
    perk_sampling sampling = {.max_tokens = 10, .ignore_eos = 1, .temperature = 0.9f};
    int32_t text[2][160] = {{0}};
    perk_engine_stats stats[2];
    perk_request_stats request_stats;
    for (int off = 0; off < 2; off++) {
        perk_engine *engine;
        perk_request *request;
        size_t count, length = 70;
        int32_t running = 1;
        options.no_prefix_sharing = off;
        CHECK_OK(perk_engine_open(&engine, FOLDER, &options, &err));
        for (int i = 0; i < 70; i++) text[off][i] = (i * i + 5) % VOCAB;
        for (int turn = 0; turn < 6; turn++, running = 1) {
            sampling.seed = (uint64_t)turn;
            CHECK_OK(perk_engine_submit(engine, text[off], length, &sampling, &request, &err));
            while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
            const int32_t *tokens = perk_request_tokens(request, &count);
            memcpy(text[off] + length, tokens, count * sizeof *tokens);
            perk_request_statistics(request, &request_stats);
            /* All full pages of the text before, but for the answer's last token, which was never read. */
            int32_t found = off || turn == 0 ? 0 : ((int32_t)length - 1) / 16 * 16;
            CHECK(request_stats.found_tokens == found, "%d", request_stats.found_tokens);
            CHECK(request_stats.prompt_tokens == (int32_t)length && request_stats.answer_tokens == 10);
            CHECK(request_stats.prefill_ms > 0 && request_stats.decode_ms > 0 && request_stats.queue_ms >= 0);
            length += count;
        }
        perk_engine_statistics(engine, &stats[off]);
        perk_engine_free(engine);
    }
    CHECK(memcmp(text[0], text[1], sizeof text[0]) == 0, "shared pages change the answer");
    CHECK(stats[0].answer_tokens == 60 && stats[0].found_tokens > 300 && stats[1].found_tokens == 0);
    CHECK(stats[0].step_tokens + stats[0].found_tokens == stats[1].step_tokens && stats[0].steps < stats[1].steps);
    CHECK(stats[0].submitted == 6 && stats[0].finished == 6 && stats[0].running == 0 && stats[0].waiting == 0);
    CHECK(stats[0].pages_in_use == 0 && stats[0].pages_kept > 0 && stats[1].pages_kept == 0 && stats[0].pages == 80);
    CHECK(stats[0].batch_fill > 0.3 && stats[0].batch_fill <= 1);
}

static void test_cancel(void) {
    perk_engine *engine = open_engine((perk_config){.max_seq_length = 64, .page_size = 16, .max_num_pages = 4});
    perk_request *first, *second;
    perk_sampling sampling = {.max_tokens = 30, .ignore_eos = 1};
    int32_t prompt[] = {1, 2, 3}, running;
    size_t count;
    CHECK_OK(perk_engine_submit(engine, prompt, 3, &sampling, &first, &err));
    CHECK_OK(perk_engine_submit(engine, prompt, 3, &sampling, &second, &err));
    for (int i = 0; i < 4; i++) CHECK_OK(perk_engine_step(engine, &running, &err));
    CHECK(running == 2 && perk_request_finish(first) == PERK_FINISH_NONE);
    perk_request_cancel(first);
    CHECK(perk_request_finish(first) == PERK_FINISH_CANCELLED);
    perk_request_tokens(first, &count);
    CHECK(count == 4);
    perk_request_free(first);
    while (running) CHECK_OK(perk_engine_step(engine, &running, &err));
    perk_request_tokens(second, &count);
    CHECK(count == 30 && perk_request_finish(second) == PERK_FINISH_LENGTH);
    perk_engine_free(engine);
}

/* The answer ends where max_seq_length does. */
static void test_full_sequence(void) {
    perk_engine *engine = open_engine((perk_config){.max_seq_length = 32});
    perk_sampling sampling = {.ignore_eos = 1};
    perk_generation generation;
    int32_t prompt[40] = {4, 5, 6};
    CHECK_OK(perk_engine_generate(engine, prompt, 3, &sampling, NULL, NULL, &generation, &err));
    CHECK(generation.tokens == 29 && generation.finish == PERK_FINISH_LENGTH && generation.prompt_tokens == 3);
    CHECK_OK(perk_engine_generate(engine, prompt, 31, &sampling, NULL, NULL, &generation, &err));
    CHECK(generation.tokens == 1);
    CHECK_FAILS(perk_engine_generate(engine, prompt, 40, &sampling, NULL, NULL, &generation, &err), PERK_LIMIT, "40");
    CHECK(strstr(err.message, "32"));
    perk_engine_free(engine);
}

/* ---- logits ---- */

static void test_logits(void) {
    enum { COUNT = 50 };
    static float whole[COUNT * VOCAB], chunked[COUNT * VOCAB];
    int32_t ids[COUNT + 1];
    for (int i = 0; i <= COUNT; i++) ids[i] = (i * i + 7) % VOCAB;
    perk_engine *engine = open_engine((perk_config){.max_num_batched_tokens = 64, .max_num_logit_rows = 64});
    CHECK_OK(perk_engine_logits(engine, ids, COUNT, whole, &err));
    CHECK_OK(perk_engine_logits(engine, ids, 0, NULL, &err));
    perk_engine_free(engine);

    /* In the middle of a request whose pages are needed: both come out as alone. */
    engine = open_engine((perk_config){.max_num_batched_tokens = 16,
                                       .max_num_logit_rows = 3,
                                       .page_size = 16,
                                       .max_num_pages = 4,
                                       .max_seq_length = 50});
    perk_sampling sampling = {.max_tokens = 9, .ignore_eos = 1};
    perk_request *request;
    int32_t running = 1;
    CHECK_OK(perk_engine_submit(engine, ids, 20, &sampling, &request, &err));
    for (int i = 0; i < 5; i++) CHECK_OK(perk_engine_step(engine, &running, &err));
    CHECK_OK(perk_engine_logits(engine, ids, COUNT, chunked, &err));
    CHECK(memcmp(whole, chunked, sizeof whole) == 0, "chunks change the logits");
    while (running) CHECK_OK(perk_engine_step(engine, &running, &err));

    /* Greedy tokens are the largest logits of the text that they make. */
    size_t count;
    const int32_t *tokens = perk_request_tokens(request, &count);
    memcpy(ids + 20, tokens, count * sizeof *tokens);
    CHECK_OK(perk_engine_logits(engine, ids, 20 + count, chunked, &err));
    for (size_t i = 0; i < count; i++) {
        const float *row = chunked + (19 + i) * VOCAB;
        for (int k = 0; k < VOCAB; k++) CHECK(row[k] <= row[tokens[i]]);
    }
    CHECK_FAILS(perk_engine_logits(engine, ids, 51, chunked, &err), PERK_LIMIT, "max_seq_length 50");
    ids[1] = VOCAB;
    CHECK_FAILS(perk_engine_logits(engine, ids, 2, chunked, &err), PERK_INVALID_ARGUMENT, "vocabulary");
    perk_engine_free(engine);
}

/* ---- opening ---- */

static void test_opening(void) {
    perk_engine *engine;
    perk_engine_options options = {.backend = PERK_BACKEND_GPU};
    setenv("PERK_LIBCUDA", "/nonexistent/libcuda.so.1", 1);
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_NO_DRIVER, "");
    CHECK(engine == NULL);
    CHECK_OK(perk_engine_open(&engine, FOLDER, NULL, &err)); /* auto: falls back */
    CHECK(perk_engine_report(engine)->backend == PERK_BACKEND_REFERENCE);
    CHECK(perk_engine_report(engine)->total_ms > 0 && perk_engine_report(engine)->weights_bytes > 0);
    CHECK(perk_engine_tokenizer(engine) == NULL && perk_engine_config(engine)->max_seq_length == 256);
    CHECK_FAILS(perk_engine_generate_text(engine, "Hello", NULL, NULL, NULL, NULL, &err), PERK_NOT_FOUND, "tokenizer");
    perk_engine_free(engine);
    perk_engine_free(NULL);

    options = (perk_engine_options){.backend = PERK_BACKEND_REFERENCE};
    CHECK_FAILS(perk_engine_open(&engine, NULL, &options, &err), PERK_INVALID_ARGUMENT, "folder");
    CHECK_FAILS(perk_engine_open(&engine, "/nonexistent", &options, &err), PERK_NOT_FOUND, "/nonexistent");
    options.config = (perk_config){.max_num_pages = 3, .max_seq_length = 200};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_LIMIT, "max_num_pages to 4");
    options.config.max_seq_length = 0; /* not asked for: what three pages of 64 hold */
    CHECK_OK(perk_engine_open(&engine, FOLDER, &options, &err));
    CHECK(perk_engine_config(engine)->max_seq_length == 192);
    perk_engine_free(engine);
    options.config = (perk_config){.page_size = 17};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_INVALID_ARGUMENT, "page_size");
    options = (perk_engine_options){.backend = (perk_backend)9};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_INVALID_ARGUMENT, "backend");
    options = (perk_engine_options){.precision = 3};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_INVALID_ARGUMENT, "precision");
    options = (perk_engine_options){.threads = -1};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_INVALID_ARGUMENT, "threads");
    options = (perk_engine_options){.mode = (perk_mode)4};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_INVALID_ARGUMENT, "mode 4");
    options = (perk_engine_options){.steps_a_launch = -1};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_INVALID_ARGUMENT, "steps_a_launch -1");
    options = (perk_engine_options){.idle_limit_ms = -1};
    CHECK_FAILS(perk_engine_open(&engine, FOLDER, &options, &err), PERK_INVALID_ARGUMENT, "idle_limit_ms -1");
    CHECK(engine == NULL);
}

/* ---- a failed step ---- */

static void copy_file(const temp_folder *folder, const char *name, size_t spoil_from) {
    char *data;
    size_t size;
    char path[1024];
    snprintf(path, sizeof path, FOLDER "/%s", name);
    CHECK_OK(perk_read_file(path, 1 << 24, &data, &size, &err));
    if (spoil_from < size) memset(data + spoil_from, 0xff, size - spoil_from);
    temp_write(folder, name, data, size);
    free(data);
}

/* Weights that are all NaN: nothing can be sampled, and the engine stays closed with that reason. */
static void test_failed_step(void) {
    temp_folder folder = temp_make();
    char *data;
    size_t size;
    uint64_t header;
    CHECK_OK(perk_read_file(FOLDER "/model.safetensors", 1 << 24, &data, &size, &err));
    memcpy(&header, data, 8);
    free(data);
    copy_file(&folder, "config.json", SIZE_MAX);
    copy_file(&folder, "model.safetensors", 8 + (size_t)header);
    perk_engine_options options = {.backend = PERK_BACKEND_REFERENCE};
    perk_engine *engine;
    perk_request *request;
    perk_sampling sampling = {.temperature = 1};
    int32_t prompt[] = {1, 2}, running;
    float logits[2 * VOCAB];
    CHECK_OK(perk_engine_open(&engine, folder.path, &options, &err));
    CHECK_OK(perk_engine_submit(engine, prompt, 2, &sampling, &request, &err));
    CHECK_FAILS(perk_engine_step(engine, &running, &err), PERK_INTERNAL, "not finite");
    CHECK_FAILS(perk_engine_step(engine, &running, &err), PERK_INTERNAL, "not finite");
    CHECK_FAILS(perk_engine_submit(engine, prompt, 2, &sampling, &request, &err), PERK_INTERNAL, "not finite");
    CHECK_FAILS(perk_engine_logits(engine, prompt, 2, logits, &err), PERK_INTERNAL, "not finite");
    CHECK_FAILS(perk_engine_generate(engine, prompt, 2, NULL, NULL, NULL, NULL, &err), PERK_INTERNAL, "not finite");
    perk_engine_free(engine);
    temp_remove(&folder);
}

/* ---- text ---- */

typedef struct heard {
    perk_buffer text;
    int32_t tokens[256];
    size_t count, stop_after;
} heard;

static int hear(void *user, int32_t token, const char *text, size_t size) {
    heard *all = user;
    CHECK(text && text[size] == '\0' && all->count < 256);
    perk_buffer_append(&all->text, text, size);
    all->tokens[all->count++] = token;
    return all->stop_after && all->count == all->stop_after;
}

static void test_text(void) {
    perk_engine_options options = {.backend = PERK_BACKEND_REFERENCE};
    perk_engine *engine;
    if (access(TINY "/model.safetensors", R_OK) != 0) {
        fprintf(stderr, "examples/tiny is not there: text generation is not tested\n");
        return;
    }
    CHECK_OK(perk_engine_open(&engine, TINY, &options, &err));
    const perk_tokenizer *tokenizer = perk_engine_tokenizer(engine);
    CHECK(tokenizer);
    for (uint64_t seed = 0; seed < 6; seed++) {
        /* Hot sampling makes all kinds of bytes: the pieces must add up to the text of the whole. */
        perk_sampling sampling = {.temperature = seed ? 1.0f + (float)seed : 0, .seed = seed, .max_tokens = 60};
        perk_generation generation;
        heard all = {.stop_after = seed == 5 ? 7 : 0};
        CHECK_OK(perk_engine_generate_text(engine, "Once upon a time", &sampling, hear, &all, &generation, &err));
        CHECK(generation.tokens == (int32_t)all.count && generation.prompt_tokens > 0);
        CHECK(generation.finish == (seed == 5                 ? PERK_FINISH_CANCELLED
                                    : generation.tokens == 60 ? PERK_FINISH_LENGTH
                                                              : PERK_FINISH_STOP));
        char *text;
        size_t size;
        CHECK_OK(perk_tokenizer_decode(tokenizer, all.tokens, all.count, 1, &text, &size, &err));
        if (seed < 5) CHECK(all.text.size == size && memcmp(all.text.data, text, size) == 0, "%s", text);
        if (seed == 5) CHECK(all.count == 7);
        free(text);
        perk_buffer_free(&all.text);
    }
    CHECK_FAILS(perk_engine_generate_text(engine, "", NULL, NULL, NULL, NULL, &err), PERK_INVALID_ARGUMENT, "empty");
    CHECK_FAILS(perk_engine_generate_text(engine, NULL, NULL, NULL, NULL, NULL, &err), PERK_INVALID_ARGUMENT, "prompt");
    perk_engine_free(engine);
}

/* ---- stop strings ---- */

typedef struct stop_case {
    const char *strings[3];
    const char *tokens; /* a character each */
    const char *said;   /* piece by piece, with a bar behind each */
} stop_case;

/* Byte by byte: what may become a stop string waits, and comes when it does not. */
static void test_held_back(const perk_tokenizer *tokenizer) {
    static const stop_case cases[] = {
        {{"xyz"}, "abxxyab", "a|b||x||xya|b|"},
        {{"xyz"}, "abxyzab", "a|b||||"},
        {{"xyz"}, "abxy", "a|b||xy|"}, /* at its end all is said */
        {{"aab"}, "caaaabd", "c|||a|a||"},
        {{"b", "abc"}, "aabc", "|a|a|"}, /* whichever is complete first */
        {{"abcd", "bx"}, "abcx", "|||abcx|"},
        {{"abcd", "bc"}, "abce", "||a|"},
        {{NULL}, "abc", "a|b|c|"},
    };
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_sampling sampling = {.stop_strings = cases[i].strings};
        while (cases[i].strings[sampling.stop_string_count]) sampling.stop_string_count++;
        perk_stop_text *text;
        perk_buffer said = {0};
        bool found = false;
        CHECK_OK(perk_stop_text_create(&text, tokenizer, &sampling, &err));
        for (const char *c = cases[i].tokens; *c && !found; c++) {
            const char name[] = {*c, '\0'}, *piece;
            int32_t token = perk_tokenizer_token_id(tokenizer, name);
            size_t size;
            CHECK_OK(perk_stop_text_push(text, token, !c[1], &piece, &size, &found, &err));
            CHECK(strlen(piece) == size);
            perk_buffer_printf(&said, "%s|", piece);
        }
        CHECK(strcmp(said.data, cases[i].said) == 0, "case %zu: %s", i, said.data);
        perk_buffer_free(&said);
        perk_stop_text_free(text);
    }
}

static bool has_text(const perk_tokenizer *tokenizer, const int32_t *tokens, size_t count, const char *wanted) {
    char *text;
    size_t size;
    CHECK_OK(perk_tokenizer_decode(tokenizer, tokens, count, 1, &text, &size, &err));
    bool found = strstr(text, wanted) != NULL;
    free(text);
    return found;
}

/* Any piece of the text of an answer, cut out anywhere, ends the answer where it stands first, and with the token that
 * completes it. */
static void test_stops(perk_engine *engine, const char *whole, size_t whole_size) {
    const perk_tokenizer *tokenizer = perk_engine_tokenizer(engine);
    for (size_t i = 0; i < 40; i++) {
        char stop[PERK_MAX_STOP_STRING + 1] = "";
        size_t from = i * 37 % whole_size, cut;
        const char *strings[] = {"not in there", stop};
        perk_sampling sampling = {.max_tokens = 60, .stop_strings = strings, .stop_string_count = 2};
        perk_generation generation;
        heard all = {0};
        memcpy(stop, whole + from, PERK_MIN(1 + i % 9, whole_size - from));
        cut = (size_t)(strstr(whole, stop) - whole);
        CHECK_OK(perk_engine_generate_text(engine, "Once upon a time", &sampling, hear, &all, &generation, &err));
        CHECK(generation.finish == PERK_FINISH_STOP && all.text.size == cut, "\"%s\": %s", stop, all.text.data);
        CHECK(memcmp(all.text.data, whole, cut) == 0);
        CHECK(has_text(tokenizer, all.tokens, all.count, stop) &&
              !has_text(tokenizer, all.tokens, all.count - 1, stop));
        perk_buffer_free(&all.text);
    }
}

static void test_stop_strings(void) {
    perk_engine_options options = {.backend = PERK_BACKEND_REFERENCE};
    perk_sampling sampling = {.max_tokens = 60};
    perk_request *request;
    perk_engine *engine;
    heard all = {0};
    int32_t prompt = 1;
    const char *stop = "a";
    if (access(TINY "/model.safetensors", R_OK) != 0) return;
    CHECK_OK(perk_engine_open(&engine, TINY, &options, &err));
    test_held_back(perk_engine_tokenizer(engine));
    CHECK_OK(perk_engine_generate_text(engine, "Once upon a time", &sampling, hear, &all, NULL, &err));
    test_stops(engine, all.text.data, all.text.size);
    perk_buffer_free(&all.text);
    perk_engine_free(engine);
    CHECK_OK(perk_engine_open(&engine, FOLDER, &options, &err));
    sampling = (perk_sampling){.stop_strings = &stop, .stop_string_count = 1};
    CHECK_FAILS(perk_engine_submit(engine, &prompt, 1, &sampling, &request, &err), PERK_NOT_FOUND, "stop_strings");
    perk_engine_free(engine);
}

int main(void) {
    test_batches();
    test_sharing();
    test_cancel();
    test_full_sequence();
    test_logits();
    test_opening();
    test_failed_step();
    test_text();
    test_stop_strings();
    return 0;
}
