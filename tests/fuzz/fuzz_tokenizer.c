/* A tokenizer.json, 0xff, a tokenizer_config.json, 0xff, a text that the tokenizer then encodes. */
#include "fuzz_json.h"
#include "fuzz_text.h"

#include "src/tokenizer/parts.h"

/* Ids index an array, so an id of eight digits costs memory and time, and nothing else. Longer ones are out of range
 * and wanted. */
static bool has_large_ids(fuzz_part json) {
    size_t digits = 0;
    for (size_t i = 0; i < json.size; i++) {
        bool digit = isdigit((unsigned char)json.data[i]);
        if (!digit && digits >= 6 && digits <= 8) return true;
        digits = digit ? digits + 1 : 0;
    }
    return false;
}

static void check_tokens(const perk_tokenizer *tokenizer) {
    perk_error err = {0};
    for (int32_t id = -1; id <= perk_tokenizer_vocab_size(tokenizer); id++) {
        const char *text = perk_tokenizer_token_text(tokenizer, id);
        bool whole = text && strlen(text) == tokenizer->vocab.tokens[id].text_size; /* no NUL inside */
        if (whole) FUZZ_CHECK(perk_tokenizer_token_id(tokenizer, text) == id, "%d", id);
    }
    const perk_chat_message messages[] = {{"user", "a"}, {"assistant", "b"}};
    char *chat = NULL;
    perk_status status = perk_chat_format(tokenizer, messages, PERK_COUNT(messages), 1, &chat, &err);
    fuzz_check_result(status, &err, chat != NULL);
    free(chat);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_part json = fuzz_take(&data, &size, false), config = fuzz_take(&data, &size, false);
    fuzz_part text = fuzz_take(&data, &size, true);
    perk_tokenizer *tokenizer = NULL;
    perk_error err = {0};
    perk_status status = PERK_BAD_FORMAT;
    if (!has_large_ids(json)) {
        status = perk_tokenizer_load_buffer(&tokenizer, json.data, json.size, &err);
        fuzz_check_result(status, &err, tokenizer != NULL);
    }
    if (tokenizer) {
        status = perk_tokenizer_read_config(tokenizer, config.data, config.size, &err);
        if (status) fuzz_check_result(status, &err, false);
        check_tokens(tokenizer);
        free(fuzz_round_trip(tokenizer, text.data, text.size, (perk_encode_options){1, 1}).data);
        free(fuzz_round_trip(tokenizer, text.data, text.size, (perk_encode_options){0, 0}).data);
    }
    perk_tokenizer_free(tokenizer);
    free(json.data);
    free(config.data);
    free(text.data);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    return fuzz_mutate_json(data, size, max_size, seed, 0);
}
