/* The published tokenizers: every case of ../shared/data/tokenizers, whole and streamed. */
#include "base.h"
#include "perk/tokenizer.h"
#include "test.h"

#include <jansson.h>
#include <unistd.h>

static perk_error err;

static void check_ids(const int32_t *ids, size_t count, const json_t *wanted, const char *text) {
    CHECK(count == json_array_size(wanted), "%zu ids, %zu wanted: %.60s", count, json_array_size(wanted), text);
    for (size_t i = 0; i < count; i++)
        CHECK(ids[i] == json_integer_value(json_array_get(wanted, i)), "id %zu is %d, wanted %lld: %.60s", i, ids[i],
              (long long)json_integer_value(json_array_get(wanted, i)), text);
}

static void check_stream(const perk_tokenizer *tokenizer, const int32_t *ids, size_t count, const json_t *wanted) {
    perk_text_stream *stream = NULL;
    perk_buffer all = {0};
    const char *piece;
    size_t size;
    CHECK_OK(perk_text_stream_new(&stream, tokenizer, 0, &err));
    for (size_t i = 0; i < count; i++) {
        CHECK_OK(perk_text_stream_push(stream, ids[i], &piece, &size, &err));
        json_t *valid = json_stringn(piece, size); /* jansson takes well-formed UTF-8 only */
        CHECK(valid, "piece %zu is not UTF-8", i);
        json_decref(valid);
        perk_buffer_append(&all, piece, size);
    }
    CHECK_OK(perk_text_stream_finish(stream, &piece, &size, &err));
    perk_buffer_append(&all, piece, size);
    CHECK(all.size == json_string_length(wanted) && memcmp(all.data, json_string_value(wanted), all.size) == 0);
    perk_buffer_free(&all);
    perk_text_stream_free(stream);
}

static void check_case(const perk_tokenizer *tokenizer, const json_t *item) {
    const json_t *text = json_object_get(item, "text"), *decoded = json_object_get(item, "decoded");
    const perk_encode_options plain = {.add_special_tokens = 0, .parse_special = 1};
    int32_t *ids = NULL;
    size_t count = 0, size = 0;
    char *back = NULL;
    CHECK_OK(perk_tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text), &plain, &ids, &count,
                                   &err));
    check_ids(ids, count, json_object_get(item, "ids"), json_string_value(text));
    CHECK_OK(perk_tokenizer_decode(tokenizer, ids, count, 0, &back, &size, &err));
    CHECK(size == json_string_length(decoded) && memcmp(back, json_string_value(decoded), size) == 0, "%s", back);
    check_stream(tokenizer, ids, count, decoded);
    free(ids);
    free(back);
}

static void check_folder(const char *folder, const char *eos, bool bos_in_template) {
    char path[512];
    json_error_t error;
    snprintf(path, sizeof path, "%s/cases.json", folder);
    json_t *cases = json_load_file(path, JSON_ALLOW_NUL, &error);
    CHECK(cases, "%s: %s", path, error.text);
    perk_tokenizer *tokenizer = NULL;
    double start = perk_now();
    CHECK_OK(perk_tokenizer_load(&tokenizer, folder, &err));
    double loaded = perk_now();
    for (size_t i = 0; i < json_array_size(cases); i++) check_case(tokenizer, json_array_get(cases, i));
    fprintf(stderr, "%s: %zu cases, loaded in %.0f ms\n", folder, json_array_size(cases), (loaded - start) * 1e3);
    CHECK(json_array_size(cases) > 100);
    CHECK(perk_tokenizer_eos_id(tokenizer) == perk_tokenizer_token_id(tokenizer, eos));
    int32_t *ids = NULL;
    size_t count = 0;
    CHECK_OK(perk_tokenizer_encode(tokenizer, "", 0, NULL, &ids, &count, &err));
    CHECK(count == bos_in_template && (!count || ids[0] == perk_tokenizer_bos_id(tokenizer)));
    free(ids);
    perk_tokenizer_free(tokenizer);
    json_decref(cases);
}

int main(void) {
    const char *root = PERK_SOURCE_DIR "/../shared/data/tokenizers";
    if (access(root, R_OK) != 0) {
        fprintf(stderr, "skipped: no ../shared/data/tokenizers\n");
        return TEST_SKIP;
    }
    check_folder(PERK_SOURCE_DIR "/../shared/data/tokenizers/qwen3", "<|im_end|>", false);
    check_folder(PERK_SOURCE_DIR "/../shared/data/tokenizers/llama3_1", "<|eot_id|>", true);
    check_folder(PERK_SOURCE_DIR "/../shared/data/tokenizers/deepseek_v3", "<｜end▁of▁sentence｜>", false);
    return 0;
}
