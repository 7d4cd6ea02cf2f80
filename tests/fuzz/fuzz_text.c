/* A byte that chooses, then a text or ids, through two good tokenizers: tests/fixtures/tokenizer_small.json, which is
 * bare and gives every text back, and tokenizer.json beside this file, which has all that a tokenizer may have. */
#include "fuzz_text.h"

enum { BARE = 1, AS_IDS = 2, ADD_SPECIAL = 4, PARSE_SPECIAL = 8, SKIP_SPECIAL = 16 };

static perk_tokenizer *bare, *full;

static perk_tokenizer *load(const char *path) {
    perk_error err = {0};
    perk_tokenizer *tokenizer = NULL;
    fuzz_part json = fuzz_read(path);
    perk_status status = perk_tokenizer_load_buffer(&tokenizer, json.data, json.size, &err);
    FUZZ_CHECK(status == PERK_OK, "%s", err.message);
    free(json.data);
    return tokenizer;
}

static void free_both(void) {
    perk_tokenizer_free(bare);
    perk_tokenizer_free(full);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    bare = load(PERK_SOURCE_DIR "/tests/fixtures/tokenizer_small.json");
    full = load(PERK_SOURCE_DIR "/tests/fuzz/tokenizer.json");
    atexit(free_both);
    return 0;
}

/* Two bytes an id, signed: those of the vocabulary, beyond it, and negative ones. */
static void check_ids(const perk_tokenizer *tokenizer, fuzz_part bytes, int skip) {
    size_t count = bytes.size / 2;
    int32_t *ids = perk_calloc(count, sizeof *ids);
    FUZZ_CHECK(ids);
    for (size_t i = 0; i < count; i++) {
        int16_t id;
        memcpy(&id, bytes.data + 2 * i, sizeof id);
        ids[i] = id == INT16_MIN ? INT32_MIN : id == INT16_MAX ? INT32_MAX : id;
    }
    free(fuzz_decode(tokenizer, ids, count, skip).data);
    free(ids);
}

static void check_text(const perk_tokenizer *tokenizer, fuzz_part text, perk_encode_options options) {
    fuzz_part back = fuzz_round_trip(tokenizer, text.data, text.size, options);
    FUZZ_CHECK(back.data, "refused");
    perk_buffer repaired = {0};
    if (tokenizer == bare) {
        perk_utf8_repair(text.data, text.size, true, &repaired);
        FUZZ_CHECK(repaired.size == back.size && (!back.size || memcmp(repaired.data, back.data, back.size) == 0),
                   "\"%s\" came back as \"%s\"", repaired.data, back.data);
    }
    perk_buffer_free(&repaired);
    free(back.data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    uint8_t choice = *data++;
    size--;
    const perk_tokenizer *tokenizer = choice & BARE ? bare : full;
    fuzz_part part = fuzz_take(&data, &size, true);
    if (choice & AS_IDS)
        check_ids(tokenizer, part, !!(choice & SKIP_SPECIAL));
    else
        check_text(tokenizer, part, (perk_encode_options){!!(choice & ADD_SPECIAL), !!(choice & PARSE_SPECIAL)});
    free(part.data);
    return 0;
}
