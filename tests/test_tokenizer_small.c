/* Every feature of tokenizer.json on two small tokenizers, byte-level and SentencePiece's kind, against what Hugging
 * Face's tokenizers gives (made by fixtures/tokenizer_make.py); then what no reference covers: streams, hostile texts,
 * malformed files, threads. */
#include "base.h"
#include "perk/tokenizer.h"
#include "test.h"

#include <jansson.h>
#include <pthread.h>
#include <time.h>

#define FIXTURES PERK_SOURCE_DIR "/tests/fixtures/"

static perk_error err;

static json_t *load_json(const char *name) {
    char path[512];
    json_error_t error;
    snprintf(path, sizeof path, FIXTURES "%s", name);
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    CHECK(json != NULL, "%s: %s", path, error.text);
    return json;
}

static perk_status load(perk_tokenizer **tokenizer, const json_t *json) {
    char *text = json_dumps(json, 0);
    CHECK(text != NULL, "dump");
    perk_status status = perk_tokenizer_load_buffer(tokenizer, text, strlen(text), &err);
    free(text);
    return status;
}

/* A copy of the small tokenizer with the keys of `patch` in place of its own; those that begin with a dot belong to its
 * model, and the tokens in "without" leave the vocabulary. */
static json_t *patched(const json_t *base, json_t *patch) {
    json_t *whole = json_deep_copy(base), *model = json_object_get(whole, "model"), *value;
    const json_t *without = json_object_get(patch, "without");
    const char *key;
    for (size_t i = 0; i < json_array_size(without); i++)
        json_object_del(json_object_get(model, "vocab"), json_string_value(json_array_get(without, i)));
    json_object_foreach(patch, key, value) json_object_set(*key == '.' ? model : whole, key + (*key == '.'), value);
    return whole;
}

/* ---- the reference's cases
 * --------------------------------------------------------------------------------------------------- */

static void check_encode(const perk_tokenizer *tokenizer, const json_t *text, int add_special, const json_t *wanted,
                         const char *name) {
    const perk_encode_options options = {.add_special_tokens = add_special, .parse_special = 1};
    int32_t *ids = NULL;
    size_t count = 0;
    CHECK_OK(perk_tokenizer_encode(tokenizer, json_string_value(text), json_string_length(text), &options, &ids, &count,
                                   &err));
    CHECK(count == json_array_size(wanted), "%s: \"%s\": %zu ids, %zu wanted", name, json_string_value(text), count,
          json_array_size(wanted));
    for (size_t i = 0; i < count; i++)
        CHECK(ids[i] == json_integer_value(json_array_get(wanted, i)), "%s: \"%s\": id %zu", name,
              json_string_value(text), i);
    free(ids);
}

/* The pieces, each well-formed, add up to `wanted`. */
static void check_stream(const perk_tokenizer *tokenizer, const int32_t *ids, size_t count, int skip,
                         const json_t *wanted, const char *name) {
    perk_text_stream *stream = NULL;
    perk_buffer all = {0};
    const char *piece = NULL;
    size_t size = 0;
    CHECK_OK(perk_text_stream_new(&stream, tokenizer, skip, &err));
    for (int round = 0; round < 2; round++) { /* a finished stream begins anew */
        all.size = 0;
        for (size_t i = 0; i <= count; i++) {
            CHECK_OK(i < count ? perk_text_stream_push(stream, ids[i], &piece, &size, &err)
                               : perk_text_stream_finish(stream, &piece, &size, &err));
            json_t *valid = json_stringn(piece, size); /* jansson takes well-formed UTF-8 only */
            CHECK(valid, "%s: piece %zu is not UTF-8", name, i);
            json_decref(valid);
            perk_buffer_append(&all, piece, size);
        }
        CHECK(all.size == json_string_length(wanted) && memcmp(all.data, json_string_value(wanted), all.size) == 0,
              "%s: streamed \"%s\" is not \"%s\"", name, all.data, json_string_value(wanted));
    }
    perk_buffer_free(&all);
    perk_text_stream_free(stream);
}

static void check_decode(const perk_tokenizer *tokenizer, const json_t *ids, int skip, const json_t *wanted,
                         const char *name) {
    int32_t list[1024];
    char *text = NULL;
    size_t size = 0, count = json_array_size(ids);
    CHECK(count <= PERK_COUNT(list), "%zu ids", count);
    for (size_t i = 0; i < count; i++) list[i] = (int32_t)json_integer_value(json_array_get(ids, i));
    CHECK_OK(perk_tokenizer_decode(tokenizer, list, count, skip, &text, &size, &err));
    CHECK(size == json_string_length(wanted) && memcmp(text, json_string_value(wanted), size + 1) == 0,
          "%s: \"%s\" is not \"%s\"", name, text, json_string_value(wanted));
    free(text);
    check_stream(tokenizer, list, count, skip, wanted, name);
}

static const json_t *field_or(const json_t *object, const char *key, const json_t *other) {
    const json_t *field = json_object_get(object, key);
    return field ? field : other;
}

static void test_variants(const json_t *base, const char *file) {
    json_t *variants = load_json(file);
    size_t cases = 0;
    for (size_t v = 0; v < json_array_size(variants); v++) {
        json_t *variant = json_array_get(variants, v), *list = json_object_get(variant, "cases");
        const char *name = json_string_value(json_object_get(variant, "name"));
        json_t *whole = patched(base, json_object_get(variant, "patch"));
        perk_tokenizer *tokenizer = NULL;
        CHECK_OK(load(&tokenizer, whole));
        for (size_t c = 0; c < json_array_size(list); c++, cases++) {
            const json_t *item = json_array_get(list, c), *ids = json_object_get(item, "ids");
            const json_t *text = json_object_get(item, "text"), *decoded = field_or(item, "decoded", text);
            if (text) check_encode(tokenizer, text, 1, ids, name);
            if (text) check_encode(tokenizer, text, 0, field_or(item, "plain_ids", ids), name);
            check_decode(tokenizer, ids, 0, decoded, name);
            check_decode(tokenizer, ids, 1, field_or(item, "decoded_skip", decoded), name);
        }
        perk_tokenizer_free(tokenizer);
        json_decref(whole);
    }
    fprintf(stderr, "%s: %zu variants, %zu cases\n", file, json_array_size(variants), cases);
    CHECK(cases > 1000, "%zu cases", cases);
    json_decref(variants);
}

/* Merges as strings and as pairs are the same merges. */
static void test_merge_forms(const json_t *base) {
    json_t *other = json_deep_copy(base), *list = json_object_get(json_object_get(other, "model"), "merges");
    for (size_t i = 0; i < json_array_size(list); i++) {
        json_t *merge = json_array_get(list, i);
        CHECK(json_is_array(merge), "the fixture has pairs");
        json_array_set_new(list, i,
                           json_sprintf("%s %s", json_string_value(json_array_get(merge, 0)),
                                        json_string_value(json_array_get(merge, 1))));
    }
    perk_tokenizer *pairs = NULL, *strings = NULL;
    CHECK_OK(load(&pairs, base));
    CHECK_OK(load(&strings, other));
    const char text[] = "The kernel stays on every processor; they're there.";
    int32_t *first = NULL, *second = NULL;
    size_t first_count = 0, second_count = 0;
    CHECK_OK(perk_tokenizer_encode(pairs, text, strlen(text), NULL, &first, &first_count, &err));
    CHECK_OK(perk_tokenizer_encode(strings, text, strlen(text), NULL, &second, &second_count, &err));
    CHECK(first_count == second_count && first_count < strlen(text) / 2, "%zu and %zu", first_count, second_count);
    CHECK(memcmp(first, second, first_count * sizeof *first) == 0, "ids");
    free(first);
    free(second);
    perk_tokenizer_free(pairs);
    perk_tokenizer_free(strings);
    json_decref(other);
}

/* ---- text that is not UTF-8, pieces of characters
 * ------------------------------------------------------------------------------- */

static perk_tokenizer *small_tokenizer(const json_t *base) {
    perk_tokenizer *tokenizer = NULL;
    json_t *patch = json_pack("{s:[{s:i,s:s,s:b}]}", "added_tokens", "id", 400, "content", "<a>", "special", 1);
    json_t *whole = patched(base, patch);
    CHECK_OK(load(&tokenizer, whole));
    json_decref(whole);
    json_decref(patch);
    return tokenizer;
}

/* Encodes, decodes and compares with `wanted`. */
static void check_round_trip(const perk_tokenizer *tokenizer, const char *text, size_t size, const char *wanted) {
    int32_t *ids = NULL;
    char *back = NULL;
    size_t count = 0, back_size = 0;
    CHECK_OK(perk_tokenizer_encode(tokenizer, text, size, NULL, &ids, &count, &err));
    CHECK_OK(perk_tokenizer_decode(tokenizer, ids, count, 0, &back, &back_size, &err));
    CHECK(strcmp(back, wanted) == 0, "\"%s\" is not \"%s\"", back, wanted);
    free(ids);
    free(back);
}

#define BAD "\xEF\xBF\xBD"
static const struct ill_formed {
    const char *bytes, *repaired; /* as Unicode's table 3-8 and Python's errors="replace" have it */
} ill_formed[] = {
    {"\xFF", BAD},
    {"a\x80z", "a" BAD "z"},
    {"\xC0\xAF", BAD BAD},
    {"\xE0\x80\xAF", BAD BAD BAD},
    {"\xED\xA0\x80", BAD BAD BAD},
    {"\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42", BAD BAD BAD BAD BAD "\x41" BAD BAD "\x42"},
    {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41", BAD BAD BAD BAD "\x41"},
    {"\xE4\xBD", BAD},
    {"\xF0\x9F\x98", BAD},
    {"ok \xE4\xBD\xA0", "ok \xE4\xBD\xA0"},
};

/* The ids of single bytes, pushed one at a time: whatever is pushed, the pieces are the whole decoding. */
static void check_byte_stream(const perk_tokenizer *tokenizer, const char *bytes, const char *wanted) {
    perk_text_stream *stream = NULL;
    perk_buffer all = {0};
    const char *piece = NULL;
    size_t size = 0;
    int32_t ids[64];
    CHECK_OK(perk_text_stream_new(&stream, tokenizer, 1, &err));
    for (int round = 0; round < 2; round++) { /* a finished stream begins anew */
        all.size = 0;
        for (size_t i = 0; bytes[i]; i++) {
            for (int32_t id = 0; id < 400; id++) {
                char *text = NULL;
                const int32_t pair[2] = {id, id};
                CHECK_OK(perk_tokenizer_decode(tokenizer, pair, 1, 0, &text, &size, &err));
                bool same = (uint8_t)bytes[i] < 0x80 && size == 1 && text[0] == bytes[i];
                free(text);
                if (same) ids[i] = id;
            }
            if ((uint8_t)bytes[i] >=
                0x80) { /* the byte-level alphabet: A1-AC, AE-FF are themselves, 80-A0 follow U+0122 */
                uint8_t byte = (uint8_t)bytes[i];
                int code = byte == 0xAD ? 0x143 : byte <= 0xA0 ? 0x122 + byte - 0x80 : byte;
                const char name[] = {(char)(0xC0 | code >> 6), (char)(0x80 | (code & 0x3F)), 0};
                ids[i] = perk_tokenizer_token_id(tokenizer, name);
                CHECK(ids[i] >= 0, "byte %02x", byte);
            }
            CHECK_OK(perk_text_stream_push(stream, ids[i], &piece, &size, &err));
            perk_buffer_append(&all, piece, size);
            CHECK_OK(perk_text_stream_push(stream, 400, &piece, &size, &err)); /* special: skipped, and parts nothing */
            CHECK(size == 0, "a skipped token gave %zu bytes", size);
        }
        CHECK_OK(perk_text_stream_finish(stream, &piece, &size, &err));
        perk_buffer_append(&all, piece, size);
        CHECK(all.data && strcmp(all.data, wanted) == 0, "\"%s\" is not \"%s\"", all.data, wanted);
    }
    perk_buffer_free(&all);
    perk_text_stream_free(stream);
}

static void test_ill_formed(const perk_tokenizer *tokenizer) {
    for (size_t i = 0; i < PERK_COUNT(ill_formed); i++) {
        check_round_trip(tokenizer, ill_formed[i].bytes, strlen(ill_formed[i].bytes), ill_formed[i].repaired);
        check_byte_stream(tokenizer, ill_formed[i].bytes, ill_formed[i].repaired);
    }
}

/* Every piece is complete: each character appears with its last byte. */
static void test_stream_pieces(const perk_tokenizer *tokenizer) {
    const char text[] = "\xF0\x9F\x98\xB9\xE4\xB8\xAD"; /* 4 and 3 bytes, several tokens each */
    int32_t *ids = NULL;
    size_t count = 0, size = 0;
    const char *piece = NULL;
    perk_text_stream *stream = NULL;
    CHECK_OK(perk_tokenizer_encode(tokenizer, text, strlen(text), NULL, &ids, &count, &err));
    CHECK(count >= 4, "%zu ids", count);
    CHECK_OK(perk_text_stream_new(&stream, tokenizer, 0, &err));
    size_t done = 0;
    for (size_t i = 0; i < count; i++) {
        CHECK_OK(perk_text_stream_push(stream, ids[i], &piece, &size, &err));
        CHECK(size == 0 || size == (done == 0 ? 4 : 3), "piece %zu has %zu bytes", i, size);
        CHECK(memcmp(piece, text + done, size) == 0 && piece[size] == 0, "piece %zu", i);
        done += size;
    }
    CHECK(done == strlen(text), "%zu bytes", done);
    perk_text_stream_free(stream);
    perk_text_stream_free(NULL);
    free(ids);
}

static void test_options(const perk_tokenizer *tokenizer) {
    const perk_encode_options plain = {.add_special_tokens = 1, .parse_special = 0};
    int32_t *ids = NULL;
    size_t count = 0, size = 0;
    char *text = NULL;
    CHECK_OK(perk_tokenizer_encode(tokenizer, "<a>", 3, NULL, &ids, &count, NULL));
    CHECK(count == 1 && ids[0] == 400, "%zu ids", count);
    free(ids);
    CHECK_OK(perk_tokenizer_encode(tokenizer, "<a>", 3, &plain, &ids, &count, &err));
    CHECK(count > 1, "%zu ids", count);
    for (size_t i = 0; i < count; i++) CHECK(ids[i] != 400, "a token in plain text");
    free(ids);
    CHECK(perk_tokenizer_vocab_size(tokenizer) == 401, "%d", perk_tokenizer_vocab_size(tokenizer));
    CHECK(perk_tokenizer_is_special(tokenizer, 400) && !perk_tokenizer_is_special(tokenizer, 0), "special");
    CHECK(!perk_tokenizer_is_special(tokenizer, -1) && !perk_tokenizer_is_special(tokenizer, INT32_MAX), "range");
    CHECK(perk_tokenizer_token_id(tokenizer, "<a>") == 400 && perk_tokenizer_token_id(tokenizer, "<b>") == -1, "id");
    CHECK(strcmp(perk_tokenizer_token_text(tokenizer, 400), "<a>") == 0, "text");
    CHECK(perk_tokenizer_token_text(tokenizer, 401) == NULL, "text");
    CHECK(perk_tokenizer_eos_id(tokenizer) == -1 && perk_tokenizer_bos_id(tokenizer) == -1, "no configuration");
    const int32_t strange[] = {-1, INT32_MIN, 401, INT32_MAX};
    CHECK_OK(perk_tokenizer_decode(tokenizer, strange, PERK_COUNT(strange), 0, &text, &size, &err));
    CHECK(text && size == 0, "%zu bytes", size);
    free(text);
    CHECK_OK(perk_tokenizer_encode(tokenizer, "", 0, &plain, &ids, &count, &err));
    CHECK(ids && count == 0, "%zu ids", count);
    free(ids);
}

/* ---- no quadratic case
 * -------------------------------------------------------------------------------------------------------------- */

/* Of this process: the machine may be busy with others. */
static double processor_seconds(void) { return (double)clock() / CLOCKS_PER_SEC; }

static void test_repeated(const perk_tokenizer *tokenizer, const char *what) {
    static const char *const units[] = {
        "a",    "A",  " ",  "\n", "\r\n", "7", "中", "😀", "!", " a", "a\xCC\x81", "'", "<", "<a", "\xCC\x81\xCC\xA3",
        "\xFF", "th", " \n"};
    enum { SIZE = 1000000 };
    char *text = malloc(SIZE + 16);
    CHECK(text != NULL, "memory");
    for (size_t u = 0; u < PERK_COUNT(units); u++) {
        size_t unit = strlen(units[u]), size = 0, count = 0;
        for (; size < SIZE; size += unit) memcpy(text + size, units[u], unit);
        int32_t *ids = NULL;
        double start = processor_seconds();
        CHECK_OK(perk_tokenizer_encode(tokenizer, text, size, NULL, &ids, &count, &err));
        double seconds = processor_seconds() - start;
        CHECK(seconds < 10, "%s: 1 MB of \"%s\" took %.1f s", what, units[u], seconds); /* under sanitizers, too */
        free(ids);
    }
    free(text);
}

/* Half a million marks of one class before half a million of a lower one: the worst of canonical ordering. */
static void test_marks(const perk_tokenizer *tokenizer) {
    enum { HALF = 500000 };
    char *text = malloc(4 * HALF);
    CHECK(text != NULL, "memory");
    for (size_t i = 0; i < 2 * HALF; i++) memcpy(text + 2 * i, i < HALF ? "\xCC\x81" : "\xCC\xA3", 2);
    int32_t *ids = NULL;
    size_t count = 0;
    double start = processor_seconds();
    CHECK_OK(perk_tokenizer_encode(tokenizer, text, 4 * HALF, NULL, &ids, &count, &err));
    double seconds = processor_seconds() - start;
    CHECK(seconds < 10, "%.1f s", seconds);
    CHECK(count > 0 && ids[0] != ids[count - 1], "%zu ids", count);
    free(ids);
    free(text);
}

static void test_no_quadratic_case(const json_t *base, const perk_tokenizer *gpt2) {
    test_repeated(gpt2, "gpt2");
    json_t *variants = load_json("tokenizer_cases.json"); /* "qwen" is the third */
    json_t *whole = patched(base, json_object_get(json_array_get(variants, 2), "patch"));
    perk_tokenizer *qwen = NULL;
    CHECK_OK(load(&qwen, whole));
    test_repeated(qwen, "qwen");
    test_marks(qwen);
    perk_tokenizer_free(qwen);
    json_decref(whole);
    json_decref(variants);
}

/* ---- SentencePiece's kind, beyond the cases
 * ----------------------------------------------------------------------------------- */

/* A byte alone is no text yet; a run of them is decided by the token after it; one space goes, and only the first. */
static void test_byte_runs(const perk_tokenizer *tokenizer) {
    static const struct step {
        const char *token, *piece;
    } steps[] = {{"<s>", ""},
                 {"\xE2\x96\x81the", "the"},
                 {"\xE2\x96\x81the", " the"},
                 {"<0xF0>", ""},
                 {"<0x9F>", ""},
                 {"<0x98>", ""},
                 {"<0x80>", ""},
                 {"<0x0A>", ""},
                 {"e", "😀\ne"},
                 {"<0xE2>", ""},
                 {"</s>", ""},
                 {"t", BAD "t"},
                 {"<0xE2>", ""},
                 {"<0x41>", ""},
                 {"<unk>", ""},
                 {"h", BAD BAD "h"},
                 {"<0x41>", ""}};
    perk_text_stream *stream = NULL;
    const char *piece = NULL;
    size_t size = 0;
    CHECK_OK(perk_text_stream_new(&stream, tokenizer, 1, &err));
    for (size_t i = 0; i < PERK_COUNT(steps); i++) {
        int32_t id = perk_tokenizer_token_id(tokenizer, steps[i].token);
        CHECK(id >= 0, "%s", steps[i].token);
        CHECK_OK(perk_text_stream_push(stream, id, &piece, &size, &err));
        CHECK(strcmp(piece, steps[i].piece) == 0, "step %zu: \"%s\"", i, piece);
    }
    CHECK_OK(perk_text_stream_finish(stream, &piece, &size, &err));
    CHECK(strcmp(piece, "A") == 0, "\"%s\"", piece);
    perk_text_stream_free(stream);
}

/* A file that makes gigabytes of a line is refused when it does so, not when memory is gone. */
static void test_growth(const json_t *base) {
    char grown[201];
    memset(grown, 'a', 200);
    grown[200] = '\0';
    json_t *list = json_array(), *whole = json_deep_copy(base);
    for (int i = 0; i < 5; i++)
        json_array_append_new(
            list, json_pack("{s:s, s:{s:s}, s:s}", "type", "Replace", "pattern", "String", "a", "content", grown));
    json_object_set_new(whole, "normalizer", json_pack("{s:s, s:o}", "type", "Sequence", "normalizers", list));
    perk_tokenizer *tokenizer = NULL;
    int32_t *ids = NULL;
    size_t count = 0;
    CHECK_OK(load(&tokenizer, whole));
    CHECK_FAILS(perk_tokenizer_encode(tokenizer, "a", 1, NULL, &ids, &count, &err), PERK_LIMIT, "normalized");
    perk_tokenizer_free(tokenizer);
    json_decref(whole);
}

static void test_sentencepiece(const json_t *base) {
    perk_tokenizer *tokenizer = NULL;
    json_t *plain = json_deep_copy(base);
    json_object_set_new(plain, "post_processor", json_null());
    CHECK_OK(load(&tokenizer, plain));
    json_decref(plain);
    for (size_t i = 0; i < PERK_COUNT(ill_formed); i++)
        check_round_trip(tokenizer, ill_formed[i].bytes, strlen(ill_formed[i].bytes), ill_formed[i].repaired);
    const perk_encode_options as_text = {0, 0};
    int32_t *ids = NULL;
    size_t count = 1;
    CHECK_OK(perk_tokenizer_encode(tokenizer, "", 0, &as_text, &ids, &count, &err));
    CHECK(count == 0, "nothing comes before an empty text: %zu ids", count);
    free(ids);
    test_byte_runs(tokenizer);
    test_growth(base);
    test_repeated(tokenizer, "sentencepiece");
    perk_tokenizer_free(tokenizer);
}

/* A pattern that backtracks without end is an error, not a hang. */
static void test_hostile_pattern(const json_t *base) {
    json_t *patch = json_pack("{s:{s:s,s:[{s:s,s:{s:s},s:s},{s:s,s:b,s:b}]}}", "pre_tokenizer", "type", "Sequence",
                              "pretokenizers", "type", "Split", "pattern", "Regex", "(a|aa)+[bc]", "behavior",
                              "Isolated", "type", "ByteLevel", "add_prefix_space", 0, "use_regex", 0);
    json_t *whole = patched(base, patch);
    perk_tokenizer *tokenizer = NULL;
    int32_t *ids = NULL;
    size_t count = 0;
    char text[64];
    memset(text, 'a', sizeof text);
    CHECK_OK(load(&tokenizer, whole));
    CHECK_FAILS(perk_tokenizer_encode(tokenizer, text, sizeof text, NULL, &ids, &count, &err), PERK_LIMIT,
                "regular expression");
    CHECK(ids == NULL && count == 0, "nothing to free");
    CHECK(perk_tokenizer_encode(tokenizer, text, sizeof text, NULL, &ids, &count, NULL) == PERK_LIMIT,
          "without a record");
    perk_tokenizer_free(tokenizer);
    json_decref(whole);
    json_decref(patch);
}

/* ---- malformed and unsupported files
 * ---------------------------------------------------------------------------------------------- */

/* Replaces the value at the key (in "model" when it begins with a dot) by the JSON text. */
static void check_refused(const json_t *base, const char *key, const char *value, perk_status status,
                          const char *message) {
    json_t *whole = json_deep_copy(base), *target = key[0] == '.' ? json_object_get(whole, "model") : whole;
    json_t *json = json_loads(value, JSON_DECODE_ANY, NULL);
    CHECK(json != NULL, "%s", value);
    json_object_set_new(target, key[0] == '.' ? key + 1 : key, json);
    perk_tokenizer *tokenizer = (perk_tokenizer *)&err; /* must be reset */
    CHECK_FAILS(load(&tokenizer, whole), status, message);
    CHECK(tokenizer == NULL, "nothing to free");
    json_decref(whole);
}

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define SPLIT(pattern)                                                                                                 \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"behavior\":\"Isolated\",\"pattern\":" pattern     \
    "}," BYTE_LEVEL "]}"
#define METASPACE(more) "{\"type\":\"Metaspace\",\"replacement\":\"\xE2\x96\x81\"" more "}"
#define DECODERS(list) "{\"type\":\"Sequence\",\"decoders\":[" list "]}"
#define REPLACE(pattern, content) "{\"type\":\"Replace\",\"pattern\":" pattern ",\"content\":" content "}"
#define STRIP(start, stop) "{\"type\":\"Strip\",\"content\":\" \",\"start\":" start ",\"stop\":" stop "}"
#define FALLBACK "{\"type\":\"ByteFallback\"}"
#define FUSE "{\"type\":\"Fuse\"}"
#define TEMPLATE(single) "{\"type\":\"TemplateProcessing\",\"special_tokens\":{},\"single\":" single "}"

static const struct refusal {
    const char *key, *value;
    perk_status status;
    const char *message;
} refusals[] = {
    {"model", "null", PERK_BAD_FORMAT, "model"},
    {"model", "[]", PERK_BAD_FORMAT, "model"},
    {".type", "\"WordPiece\"", PERK_UNSUPPORTED, "WordPiece"},
    {".type", "3", PERK_BAD_FORMAT, "type"},
    {".dropout", "0.5", PERK_UNSUPPORTED, "dropout"},
    {".end_of_word_suffix", "\"</w>\"", PERK_UNSUPPORTED, "end_of_word_suffix"},
    {".ignore_merges", "\"yes\"", PERK_BAD_FORMAT, "ignore_merges"},
    {".vocab", "null", PERK_BAD_FORMAT, "vocab"},
    {".vocab", "{\"a\":0,\"b\":0}", PERK_BAD_FORMAT, "same id"},
    {".vocab", "{\"a\":-1}", PERK_BAD_FORMAT, "id -1"},
    {".vocab", "{\"a\":2000000000}", PERK_BAD_FORMAT, "2000000000"},
    {".vocab", "{\"a\":9223372036854775807}", PERK_BAD_FORMAT, "9223372036854775807"},
    {".vocab", "{\"a\":1.5}", PERK_BAD_FORMAT, "not an integer"},
    {".vocab", "{}", PERK_BAD_FORMAT, "not in the vocabulary"},
    {".merges", "{}", PERK_BAD_FORMAT, "merges"},
    {".merges", "[\"a b c\"]", PERK_BAD_FORMAT, "merge 0"},
    {".merges", "[\"ab\"]", PERK_BAD_FORMAT, "merge 0"},
    {".merges", "[[\"a\"]]", PERK_BAD_FORMAT, "merge 0"},
    {".merges", "[[\"a\",1]]", PERK_BAD_FORMAT, "merge 0"},
    {".merges", "[17]", PERK_BAD_FORMAT, "merge 0"},
    {".merges", "[\"nope nope\"]", PERK_BAD_FORMAT, "nope"},
    {".merges", "[[\"z\",\"q\"]]", PERK_BAD_FORMAT, "zq"},
    {"normalizer", "{\"type\":\"Lowercase\"}", PERK_UNSUPPORTED, "Lowercase"},
    {"normalizer", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Strip\"}]}", PERK_UNSUPPORTED, "Strip"},
    {"normalizer", "{\"type\":\"Sequence\"}", PERK_BAD_FORMAT, "normalizers"},
    {"normalizer", "{}", PERK_BAD_FORMAT, "type"},
    {"normalizer", "\"NFC\"", PERK_BAD_FORMAT, "normalizer"},
    {"pre_tokenizer", "null", PERK_UNSUPPORTED, "ByteLevel"},
    {"pre_tokenizer", METASPACE(""), PERK_UNSUPPORTED, "without ByteLevel"},
    {"pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL "," METASPACE("") "]}", PERK_UNSUPPORTED,
     "after ByteLevel"},
    {"pre_tokenizer", "{\"type\":\"BertPreTokenizer\"}", PERK_UNSUPPORTED, "BertPreTokenizer"},
    {"pre_tokenizer", "{\"type\":\"Sequence\",\"pretokenizers\":[" BYTE_LEVEL "," BYTE_LEVEL "]}", PERK_UNSUPPORTED,
     "after ByteLevel"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"(\"}"), PERK_UNSUPPORTED, "PCRE2"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"a{1,3}+\"}"), PERK_UNSUPPORTED, "quantifier"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"[a&&b]\"}"), PERK_UNSUPPORTED, "&&"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"[a[b]]\"}"), PERK_UNSUPPORTED, "class"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"[a\"}"), PERK_UNSUPPORTED, "without an end"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"a\\\\\"}"), PERK_UNSUPPORTED, "backslash"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"\\\\R\"}"), PERK_UNSUPPORTED, "escape"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"(?m:.)\"}"), PERK_UNSUPPORTED, "group"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"(*UTF)a\"}"), PERK_UNSUPPORTED, "(*"},
    {"pre_tokenizer", SPLIT("{\"Regex\":\"\\\\p{Nonsense}\"}"), PERK_UNSUPPORTED, "Nonsense"},
    {"pre_tokenizer", SPLIT("{\"Regex\":7}"), PERK_BAD_FORMAT, "pattern"},
    {"pre_tokenizer", SPLIT("\"a\""), PERK_BAD_FORMAT, "pattern"},
    {"post_processor", "{\"type\":\"RobertaProcessing\"}", PERK_UNSUPPORTED, "RobertaProcessing"},
    {"post_processor", TEMPLATE("null"), PERK_BAD_FORMAT, "single"},
    {"post_processor", TEMPLATE("[]"), PERK_UNSUPPORTED, "without a sequence"},
    {"post_processor", TEMPLATE("[{\"Sequence\":{\"id\":\"B\"}}]"), PERK_UNSUPPORTED, "sequence A"},
    {"post_processor", TEMPLATE("[{\"SpecialToken\":{\"id\":\"x\"}}]"), PERK_BAD_FORMAT, "\"x\""},
    {"post_processor", TEMPLATE("[3]"), PERK_BAD_FORMAT, "id"},
    {"decoder", "null", PERK_BAD_FORMAT, "decoder"},
    {"decoder", "{\"type\":\"Fuse\"}", PERK_UNSUPPORTED, "without ByteLevel"},
    {"decoder", DECODERS("{\"type\":\"Fuse\"}," BYTE_LEVEL), PERK_UNSUPPORTED, "ByteLevel"},
    {"decoder", DECODERS(BYTE_LEVEL ",{\"type\":\"ByteFallback\"}"), PERK_UNSUPPORTED, "ByteFallback"},
    {"decoder", "{\"type\":\"WordPiece\"}", PERK_UNSUPPORTED, "WordPiece"},
    {"added_tokens", "{}", PERK_BAD_FORMAT, "added_tokens"},
    {"added_tokens", "[1]", PERK_BAD_FORMAT, "added_tokens"},
    {"added_tokens", "[{\"id\":500}]", PERK_BAD_FORMAT, "content"},
    {"added_tokens", "[{\"content\":\"x\"}]", PERK_BAD_FORMAT, "id"},
    {"added_tokens", "[{\"id\":1,\"content\":\"<x>\"}]", PERK_BAD_FORMAT, "same id"},
    {"added_tokens", "[{\"id\":500,\"content\":\"a\"}]", PERK_BAD_FORMAT, "two ids"},
    {"added_tokens", "[{\"id\":99999999999,\"content\":\"<x>\"}]", PERK_BAD_FORMAT, "99999999999"},
    {"added_tokens", "[{\"id\":500,\"content\":\"<x>\",\"lstrip\":1}]", PERK_BAD_FORMAT, "lstrip"},
};

static const struct refusal sentencepiece_refusals[] = {
    {".unk_token", "7", PERK_BAD_FORMAT, "unk_token"},
    {".fuse_unk", "1", PERK_BAD_FORMAT, "fuse_unk"},
    {".byte_fallback", "\"yes\"", PERK_BAD_FORMAT, "byte_fallback"},
    {"normalizer", "{\"type\":\"Precompiled\"}", PERK_UNSUPPORTED, "Precompiled"},
    {"normalizer", "{\"type\":\"Prepend\"}", PERK_BAD_FORMAT, "prepend"},
    {"normalizer", "{\"type\":\"Replace\"}", PERK_BAD_FORMAT, "String"},
    {"normalizer", REPLACE("{\"Regex\":\" +\"}", "\"\""), PERK_UNSUPPORTED, "Regex"},
    {"normalizer", REPLACE("{\"String\":\"\"}", "\"\""), PERK_BAD_FORMAT, "empty"},
    {"normalizer", REPLACE("{\"String\":\" \"}", "null"), PERK_BAD_FORMAT, "content"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\"}", PERK_BAD_FORMAT, "replacement"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"ab\"}", PERK_BAD_FORMAT, "one character"},
    {"pre_tokenizer", "{\"type\":\"Metaspace\",\"replacement\":\"\"}", PERK_BAD_FORMAT, "one character"},
    {"pre_tokenizer", METASPACE(",\"prepend_scheme\":\"last\""), PERK_BAD_FORMAT, "last"},
    {"pre_tokenizer", METASPACE(",\"add_prefix_space\":false"), PERK_BAD_FORMAT, "add_prefix_space"},
    {"pre_tokenizer", METASPACE(",\"split\":0"), PERK_BAD_FORMAT, "split"},
    {"pre_tokenizer", BYTE_LEVEL, PERK_UNSUPPORTED, "decoder"},
    {"decoder", "null", PERK_BAD_FORMAT, "decoder"},
    {"decoder", BYTE_LEVEL, PERK_UNSUPPORTED, "pre_tokenizer"},
    {"decoder", "{\"type\":\"CTC\"}", PERK_UNSUPPORTED, "CTC"},
    {"decoder", DECODERS(FALLBACK "," REPLACE("{\"String\":\" \"}", "\"\"")), PERK_UNSUPPORTED, "Replace"},
    {"decoder", DECODERS(FUSE "," FALLBACK), PERK_UNSUPPORTED, "ByteFallback"},
    {"decoder", DECODERS(METASPACE("") "," METASPACE("")), PERK_UNSUPPORTED, "Metaspace"},
    {"decoder", REPLACE("{\"Regex\":\" +\"}", "\"\""), PERK_UNSUPPORTED, "Regex"},
    {"decoder", STRIP("1", "0"), PERK_UNSUPPORTED, "Fuse"},
    {"decoder", DECODERS(FUSE "," STRIP("1", "1")), PERK_UNSUPPORTED, "stop"},
    {"decoder", DECODERS(FUSE "," STRIP("-1", "0")), PERK_BAD_FORMAT, "start"},
    {"decoder", DECODERS(FUSE "," STRIP("1", "0") "," STRIP("1", "0")), PERK_UNSUPPORTED, "Strip"},
};

static void test_refusals(const json_t *base, const json_t *marked) {
    for (size_t i = 0; i < PERK_COUNT(refusals); i++)
        check_refused(base, refusals[i].key, refusals[i].value, refusals[i].status, refusals[i].message);
    for (size_t i = 0; i < PERK_COUNT(sentencepiece_refusals); i++) {
        const struct refusal *refusal = &sentencepiece_refusals[i];
        check_refused(marked, refusal->key, refusal->value, refusal->status, refusal->message);
    }
    json_t *no_fallback = json_deep_copy(marked); /* with it, no text is unknown */
    json_object_set_new(json_object_get(no_fallback, "model"), "byte_fallback", json_false());
    check_refused(no_fallback, ".unk_token", "\"<what>\"", PERK_BAD_FORMAT, "<what>");
    json_decref(no_fallback);
    perk_tokenizer *tokenizer = NULL;
    CHECK_FAILS(perk_tokenizer_load(&tokenizer, FIXTURES "nowhere", &err), PERK_NOT_FOUND, "nowhere/tokenizer.json");
    CHECK_FAILS(perk_tokenizer_load_buffer(&tokenizer, "[1]", 3, &err), PERK_BAD_FORMAT, "object");
    CHECK_FAILS(perk_tokenizer_load_buffer(&tokenizer, "", 0, &err), PERK_BAD_FORMAT, "JSON");
    perk_tokenizer_free(NULL);
}

/* Cut anywhere, or with a byte changed, a file is refused or read, and never crashes or leaks. */
static void test_damaged(const json_t *base, size_t stride) {
    char *text = json_dumps(base, JSON_COMPACT);
    size_t size = strlen(text);
    perk_tokenizer *tokenizer = NULL;
    for (size_t cut = 0; cut < size; cut += 2 * stride)
        CHECK_FAILS(perk_tokenizer_load_buffer(&tokenizer, text, cut, &err), PERK_BAD_FORMAT, "JSON");
    for (size_t at = 0; at < size; at += stride) {
        char kept = text[at];
        text[at] ^= 1;
        if (perk_tokenizer_load_buffer(&tokenizer, text, size, &err) == PERK_OK) perk_tokenizer_free(tokenizer);
        text[at] = kept;
    }
    free(text);
}

/* ---- one tokenizer, many threads
 * -------------------------------------------------------------------------------------------------------- */

static void *encode_often(void *user) {
    static const char text[] = "The kernel <a> stays on every processor; they're there. 中 \xF0\x9F\x98\xB9";
    for (int i = 0; i < 200; i++) check_round_trip(user, text, strlen(text), text);
    return NULL;
}

static void test_threads(perk_tokenizer *tokenizer) {
    pthread_t threads[4];
    for (size_t i = 0; i < PERK_COUNT(threads); i++)
        CHECK(pthread_create(&threads[i], NULL, encode_often, tokenizer) == 0, "thread");
    for (size_t i = 0; i < PERK_COUNT(threads); i++) pthread_join(threads[i], NULL);
}

int main(void) {
    json_t *base = load_json("tokenizer_small.json");
    test_variants(base, "tokenizer_cases.json");
    json_t *marked = load_json("tokenizer_sentencepiece.json");
    test_variants(marked, "tokenizer_sentencepiece_cases.json");
    test_merge_forms(base);
    perk_tokenizer *tokenizer = small_tokenizer(base);
    test_ill_formed(tokenizer);
    test_stream_pieces(tokenizer);
    test_options(tokenizer);
    test_no_quadratic_case(base, tokenizer);
    test_sentencepiece(marked);
    test_threads(tokenizer);
    perk_tokenizer_free(tokenizer);
    test_hostile_pattern(base);
    test_refusals(base, marked);
    test_damaged(base, 7);
    test_damaged(marked, 23);
    json_decref(marked);
    json_decref(base);
    return 0;
}
