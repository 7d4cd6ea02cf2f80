/* Configurations (src/limits.c), batches (src/batch.c) and the thread pool (src/threads.c). */
#include "batch.h"
#include "test.h"
#include "threads.h"

static perk_error err;

static void test_defaults(void) {
    perk_config c = {0};
    CHECK_OK(perk_config_resolve(&c, 40960, &err));
    CHECK(c.max_num_batched_tokens == 16 && c.max_num_batched_requests == 8 && c.max_num_logit_rows == 8);
    CHECK(c.page_size == 64 && c.max_seq_length == 4096 && c.max_num_pages == 8 * 64);
    perk_config again = c;
    CHECK_OK(perk_config_resolve(&again, 40960, &err));
    CHECK(!memcmp(&again, &c, sizeof c), "a resolved configuration changed");

    c = (perk_config){.max_num_batched_tokens = 4};
    CHECK_OK(perk_config_resolve(&c, 1000, &err));
    CHECK(c.max_num_batched_requests == 4 && c.max_num_logit_rows == 4 && c.max_seq_length == 1000);
    CHECK(c.max_num_pages == 4 * 16);
    c = (perk_config){.max_num_pages = 3, .page_size = 16};
    CHECK_OK(perk_config_resolve(&c, 0, &err));
    CHECK(c.max_num_pages == 3 && c.max_seq_length == 4096);
}

static void test_ranges(void) {
    const struct {
        perk_config config;
        int32_t model;
        perk_status status;
        const char *text;
    } cases[] = {
        {{.max_num_batched_tokens = -1}, 0, PERK_INVALID_ARGUMENT, "max_num_batched_tokens"},
        {{.max_num_batched_tokens = 1 << 20}, 0, PERK_INVALID_ARGUMENT, "65536"},
        {{.max_num_batched_requests = 17}, 0, PERK_INVALID_ARGUMENT, "between 1 and 16, found 17"},
        {{.max_num_logit_rows = 17}, 0, PERK_INVALID_ARGUMENT, "max_num_logit_rows"},
        {{.page_size = 8}, 0, PERK_INVALID_ARGUMENT, "page_size"},
        {{.page_size = 48}, 0, PERK_INVALID_ARGUMENT, "power of two"},
        {{.page_size = 8192}, 0, PERK_INVALID_ARGUMENT, "page_size"},
        {{.page_size = INT32_MIN}, 0, PERK_INVALID_ARGUMENT, "page_size"},
        {{.max_num_pages = -5}, 0, PERK_INVALID_ARGUMENT, "max_num_pages"},
        {{.max_num_pages = INT32_MAX}, 0, PERK_INVALID_ARGUMENT, "max_num_pages"},
        {{.max_seq_length = 2048}, 1024, PERK_LIMIT, "1024"},
        {{.max_seq_length = -1}, 1024, PERK_INVALID_ARGUMENT, "max_seq_length"},
        {{.max_seq_length = INT32_MAX}, 0, PERK_INVALID_ARGUMENT, "max_seq_length"},
        {{.max_num_batched_tokens = 65536, .max_num_batched_requests = 65536, .max_seq_length = 1 << 24},
         0,
         PERK_LIMIT,
         "max_num_pages"},
    };
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        perk_config c = cases[i].config;
        CHECK_FAILS(perk_config_resolve(&c, cases[i].model, &err), cases[i].status, cases[i].text);
        CHECK(!memcmp(&c, &cases[i].config, sizeof c), "case %zu: a refused configuration changed", i);
    }
}

static void test_batch(void) {
    perk_config c = {.max_num_batched_tokens = 8,
                     .max_num_batched_requests = 3,
                     .max_num_logit_rows = 4,
                     .page_size = 16,
                     .max_num_pages = 5,
                     .max_seq_length = 40};
    perk_batch *b;
    CHECK_OK(perk_config_resolve(&c, 0, &err));
    CHECK_OK(perk_batch_create(&b, &c, &err));
    CHECK(b->pages_per_request == 3);
    const int32_t ids[] = {5, 6, 7, 8, 9, 10, 11, 12, 13};
    const int32_t first[] = {4, 0, 77}, second[] = {1, -1, -1}, bad[] = {0, 5, 0};
    CHECK_OK(perk_batch_add(b, &c, ids, 3, 15, first, 2, &err));
    CHECK_OK(perk_batch_add(b, &c, ids + 3, 2, 0, second, 1, &err));
    CHECK(b->num_tokens == 5 && b->num_requests == 2 && b->num_logit_rows == 4);
    const int32_t positions[] = {15, 16, 17, 0, 1}, owners[] = {0, 0, 0, 1, 1}, rows[] = {0, 1, 2, 4};
    CHECK(!memcmp(b->token_ids, ids, 5 * sizeof *ids) && !memcmp(b->positions, positions, sizeof positions));
    CHECK(!memcmp(b->token_request, owners, sizeof owners) && !memcmp(b->logit_rows, rows, sizeof rows));
    CHECK(b->first_token[1] == 3 && b->token_count[1] == 2 && b->kv_length[0] == 18 && b->kv_length[1] == 2);
    CHECK(!memcmp(b->page_table, first, sizeof first) && !memcmp(b->page_table + 3, second, sizeof second));

    CHECK_FAILS(perk_batch_add(b, &c, ids, 1, 0, second, 1, &err), PERK_LIMIT, "full"); /* rows of logits */
    CHECK_FAILS(perk_batch_add(b, &c, ids, 4, 0, second, 0, &err), PERK_LIMIT, "full"); /* tokens */
    CHECK_FAILS(perk_batch_add(b, &c, ids, 2, 39, second, 0, &err), PERK_LIMIT, "max_seq_length");
    CHECK_FAILS(perk_batch_add(b, &c, ids, INT32_MAX, 39, second, 0, &err), PERK_LIMIT, "max_seq_length");
    CHECK_FAILS(perk_batch_add(b, &c, ids, 1, INT32_MAX, second, 0, &err), PERK_LIMIT, "max_seq_length");
    CHECK_FAILS(perk_batch_add(b, &c, ids, 0, 0, second, 0, &err), PERK_INVALID_ARGUMENT, "0 tokens");
    CHECK_FAILS(perk_batch_add(b, &c, ids, 1, -1, second, 0, &err), PERK_INVALID_ARGUMENT, "position -1");
    CHECK_FAILS(perk_batch_add(b, &c, ids, 1, 16, bad, 0, &err), PERK_INVALID_ARGUMENT, "page 1 of a request is 5");
    CHECK_FAILS(perk_batch_add(b, &c, ids, 1, 16, second, 0, &err), PERK_INVALID_ARGUMENT, "is -1");
    CHECK_FAILS(perk_batch_add(b, &c, ids, 1, 0, second, 3, &err), PERK_INVALID_ARGUMENT, "want_logits");
    CHECK_FAILS(perk_batch_add(b, &c, (int32_t[]){-2}, 1, 0, second, 0, &err), PERK_INVALID_ARGUMENT, "-2");
    CHECK(b->num_tokens == 5 && b->num_requests == 2, "a refused request left traces");
    CHECK_OK(perk_batch_add(b, &c, ids, 3, 0, second, 0, &err));
    perk_batch_clear(b);
    CHECK(b->num_tokens == 0 && b->num_requests == 0 && b->num_logit_rows == 0);
    CHECK_OK(perk_batch_add(b, &c, ids, 8, 32, (int32_t[]){1, 2, 3}, 1, &err));
    CHECK_FAILS(perk_batch_add(b, &c, ids, 1, 0, second, 0, &err), PERK_LIMIT, "full");
    perk_batch_free(b);
    perk_batch_free(NULL);
}

enum { ITEMS = 1000 };
typedef struct visits {
    int count[ITEMS], thread[ITEMS];
} visits;

static void visit(void *context, size_t begin, size_t end, int thread) {
    visits *v = context;
    for (size_t i = begin; i < end; i++) {
        v->count[i]++;
        v->thread[i] = thread;
    }
}

/* Every item once, chunks contiguous and not too small, loop after loop. */
static void test_threads(void) {
    const int counts[] = {1, 2, 3, 7, 0};
    for (size_t k = 0; k < PERK_COUNT(counts); k++) {
        perk_threads *threads;
        CHECK_OK(perk_threads_create(&threads, counts[k], &err));
        CHECK(perk_threads_count(threads) >= 1);
        if (counts[k]) CHECK(perk_threads_count(threads) == counts[k]);
        for (size_t items = 0; items <= ITEMS; items = items * 2 + 1) {
            visits v = {0};
            perk_threads_run(threads, items, 10, visit, &v);
            for (size_t i = 0; i < ITEMS; i++) CHECK(v.count[i] == (i < items));
            for (size_t i = 1; i < items; i++) CHECK(v.thread[i] >= v.thread[i - 1]);
            if (items < 20)
                for (size_t i = 0; i < items; i++) CHECK(v.thread[i] == 0);
        }
        perk_threads_free(threads);
    }
    perk_threads *none;
    CHECK_FAILS(perk_threads_create(&none, 5000, &err), PERK_INVALID_ARGUMENT, "5000 threads");
    CHECK(!none);
    perk_threads_free(NULL);
}

int main(void) {
    test_defaults();
    test_ranges();
    test_batch();
    test_threads();
    return 0;
}
