/* A text or ids through a tokenizer, for the two targets that do so: what must hold whatever the tokenizer is. */
#ifndef PERK_TESTS_FUZZ_TEXT_H
#define PERK_TESTS_FUZZ_TEXT_H

#include "fuzz.h"

#include "perk/tokenizer.h"

/* All pieces of a stream, which must each be well-formed. */
static inline perk_buffer fuzz_stream(const perk_tokenizer *tokenizer, const int32_t *ids, size_t count, int skip) {
    perk_error err = {0};
    perk_text_stream *stream = NULL;
    perk_buffer all = {0};
    perk_status status = perk_text_stream_new(&stream, tokenizer, skip, &err);
    FUZZ_CHECK(status == PERK_OK, "%s", err.message);
    for (size_t i = 0; i <= count; i++) {
        const char *piece = NULL;
        size_t size = 0;
        status = i < count ? perk_text_stream_push(stream, ids[i], &piece, &size, &err)
                           : perk_text_stream_finish(stream, &piece, &size, &err);
        FUZZ_CHECK(status == PERK_OK && piece && piece[size] == '\0', "%s", err.message);
        FUZZ_CHECK(perk_utf8_valid(piece, size), "piece %zu", i);
        perk_buffer_append(&all, piece, size);
    }
    perk_text_stream_free(stream);
    return all;
}

/* Decoding at once and piece by piece give the same, well-formed text. The caller frees it. */
static inline fuzz_part fuzz_decode(const perk_tokenizer *tokenizer, const int32_t *ids, size_t count, int skip) {
    perk_error err = {0};
    fuzz_part text = {0};
    perk_status status = perk_tokenizer_decode(tokenizer, ids, count, skip, &text.data, &text.size, &err);
    FUZZ_CHECK(status == PERK_OK && text.data[text.size] == '\0', "%s", err.message);
    FUZZ_CHECK(perk_utf8_valid(text.data, text.size));
    perk_buffer pieces = fuzz_stream(tokenizer, ids, count, skip);
    FUZZ_CHECK(pieces.size == text.size && memcmp(pieces.data, text.data, text.size) == 0, "\"%s\" is not \"%s\"",
               pieces.data, text.data);
    perk_buffer_free(&pieces);
    return text;
}

/* Encodes, and decodes what came out. Returns the decoded text, data NULL where the text was refused (a pattern that
 * backtracks beyond its limit). */
static inline fuzz_part fuzz_round_trip(const perk_tokenizer *tokenizer, const char *text, size_t size,
                                        perk_encode_options options) {
    perk_error err = {0};
    int32_t *ids = NULL;
    size_t count = 0;
    perk_status status = perk_tokenizer_encode(tokenizer, text, size, &options, &ids, &count, &err);
    fuzz_check_result(status, &err, ids != NULL);
    if (!ids) return (fuzz_part){0};
    for (size_t i = 0; i < count; i++) FUZZ_CHECK(ids[i] >= 0, "id %zu is %d", i, ids[i]);
    free(fuzz_decode(tokenizer, ids, count, 1).data);
    fuzz_part back = fuzz_decode(tokenizer, ids, count, 0);
    free(ids);
    return back;
}

#endif
