/* How fast a tokenizer loads, encodes and decodes: bench/tokenizer FOLDER TEXT_FILE [seconds]
 * Prints MB/s (10^6 bytes a second) of the best pass on one thread, and MB/s of 1 MB of one character repeated. */
#include "perk/tokenizer.h"
#include "src/base.h"

#include <stdio.h>

enum { MAX_TEXT = 1 << 30, REPEATED_SIZE = 1000000 };

static perk_error err;

static int fail(void) {
    fprintf(stderr, "%s: %s\n", perk_status_text(err.status), err.message);
    return 1;
}

/* Seconds of one encoding; negative: failed. */
static double time_encode(const perk_tokenizer *tokenizer, const char *text, size_t size, int32_t **ids,
                          size_t *count) {
    const perk_encode_options plain = {.add_special_tokens = 0, .parse_special = 1};
    double start = perk_now();
    if (perk_tokenizer_encode(tokenizer, text, size, &plain, ids, count, &err) != PERK_OK) return -1;
    return perk_now() - start;
}

static int bench_text(const perk_tokenizer *tokenizer, const char *text, size_t size, double limit) {
    double best = 1e9, best_decode = 1e9, begin = perk_now();
    size_t count = 0;
    do {
        int32_t *ids = NULL;
        char *back = NULL;
        size_t back_size = 0;
        double seconds = time_encode(tokenizer, text, size, &ids, &count);
        if (seconds < 0) return fail();
        double start = perk_now();
        perk_status status = perk_tokenizer_decode(tokenizer, ids, count, 0, &back, &back_size, &err);
        best_decode = PERK_MIN(best_decode, perk_now() - start);
        best = PERK_MIN(best, seconds);
        free(ids);
        free(back);
        if (status != PERK_OK) return fail();
    } while (perk_now() - begin < limit);
    printf("encode  %.2f MB in %.3f s: %.1f MB/s, %zu tokens\n", (double)size * 1e-6, best, (double)size * 1e-6 / best,
           count);
    printf("decode  %.1f MB/s\n", (double)size * 1e-6 / best_decode);
    return 0;
}

static int bench_repeated(const perk_tokenizer *tokenizer, const char *name, const char *unit) {
    size_t unit_size = strlen(unit), size = 0, count = 0;
    char *text = malloc(REPEATED_SIZE + unit_size);
    int32_t *ids = NULL;
    if (!text) return 1;
    for (; size < REPEATED_SIZE; size += unit_size) memcpy(text + size, unit, unit_size);
    double seconds = time_encode(tokenizer, text, size, &ids, &count);
    if (seconds >= 0) printf("1 MB of %-16s %.3f s, %zu tokens\n", name, seconds, count);
    free(ids);
    free(text);
    return seconds < 0 ? fail() : 0;
}

static int bench_all_repeated(const perk_tokenizer *tokenizer) {
    static const char *const units[][2] = {{"a", "a"},
                                           {"spaces", " "},
                                           {"newlines", "\n"},
                                           {"digits", "7"},
                                           {"CJK", "中"},
                                           {"emoji", "😀"},
                                           {"bang", "!"},
                                           {"A", "A"},
                                           {"e + acute", "e\xCC\x81"},
                                           {"CRLF", "\r\n"},
                                           {"<", "<"},
                                           {"space a", " a"},
                                           {"apostrophe", "'"},
                                           {"marks", "\xCC\x81\xCC\xA3"}};
    int failed = 0;
    for (size_t i = 0; i < PERK_COUNT(units) && !failed; i++)
        failed = bench_repeated(tokenizer, units[i][0], units[i][1]);
    return failed;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s FOLDER TEXT_FILE [SECONDS]\n", argv[0]);
        return 2;
    }
    perk_tokenizer *tokenizer = NULL;
    char *text = NULL;
    size_t size = 0;
    double start = perk_now();
    if (perk_tokenizer_load(&tokenizer, argv[1], &err) != PERK_OK) return fail();
    printf("load    %.0f ms\n", (perk_now() - start) * 1e3);
    int failed = 1;
    if (perk_read_file(argv[2], MAX_TEXT, &text, &size, &err) != PERK_OK)
        fail();
    else
        failed = bench_text(tokenizer, text, size, argc > 3 ? atof(argv[3]) : 2.0) || bench_all_repeated(tokenizer);
    free(text);
    perk_tokenizer_free(tokenizer);
    return failed;
}
