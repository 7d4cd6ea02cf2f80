#include "stop_text.h"

struct perk_stop_text {
    perk_text_stream *stream;
    const perk_sampling *sampling;
    perk_buffer held; /* text that was not said yet */
    perk_buffer said; /* by the last call */
};

perk_status perk_stop_text_create(perk_stop_text **out, const perk_tokenizer *tokenizer, const perk_sampling *sampling,
                                  perk_error *err) {
    perk_stop_text *self = *out = perk_calloc(1, sizeof *self);
    if (!self) return perk_fail_memory(err, "the text of an answer");
    self->sampling = sampling;
    perk_status status = perk_text_stream_new(&self->stream, tokenizer, 1, err);
    if (!status) return PERK_OK;
    free(self);
    *out = NULL;
    return status;
}

void perk_stop_text_free(perk_stop_text *self) {
    if (!self) return;
    perk_text_stream_free(self->stream);
    perk_buffer_free(&self->held);
    perk_buffer_free(&self->said);
    free(self);
}

size_t perk_stop_text_cut(const perk_sampling *sampling, const char *text, size_t size) {
    size_t cut = size;
    for (int32_t i = 0; i < sampling->stop_string_count && size; i++) {
        const char *stop = sampling->stop_strings[i], *found = memmem(text, size, stop, strlen(stop));
        if (found) cut = PERK_MIN(cut, (size_t)(found - text));
    }
    return cut;
}

/* Bytes at the end of the text with which a stop string may begin. */
static size_t count_open(const perk_sampling *sampling, const char *text, size_t size) {
    for (size_t count = PERK_MIN(size, (size_t)PERK_MAX_STOP_STRING); count > 0; count--)
        for (int32_t i = 0; i < sampling->stop_string_count; i++) {
            const char *stop = sampling->stop_strings[i];
            if (count < strlen(stop) && memcmp(stop, text + size - count, count) == 0) return count;
        }
    return 0;
}

static perk_status append_token(perk_stop_text *self, int32_t token, bool last, perk_error *err) {
    const char *piece;
    size_t size;
    perk_status status = perk_text_stream_push(self->stream, token, &piece, &size, err);
    if (status) return status;
    perk_buffer_append(&self->held, piece, size);
    if (last && (status = perk_text_stream_finish(self->stream, &piece, &size, err))) return status;
    if (last) perk_buffer_append(&self->held, piece, size);
    return self->held.failed ? perk_fail_memory(err, "the text of a token") : PERK_OK;
}

perk_status perk_stop_text_push(perk_stop_text *self, int32_t token, bool last, const char **text, size_t *size,
                                bool *found, perk_error *err) {
    perk_status status = append_token(self, token, last, err);
    if (status) return status;
    perk_buffer *held = &self->held;
    size_t count = perk_stop_text_cut(self->sampling, held->data, held->size);
    *found = count < held->size;
    if (!*found && !last) count -= count_open(self->sampling, held->data, held->size);
    self->said.size = 0;
    perk_buffer_append(&self->said, held->data, count);
    if (self->said.failed) return perk_fail_memory(err, "the text of a token");
    held->size = *found ? 0 : held->size - count;
    memmove(held->data, held->data + count, held->size);
    *text = self->said.data;
    *size = count;
    return PERK_OK;
}
