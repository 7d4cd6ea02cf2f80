/* The text of an answer as its tokens come, up to the first of the request's stop strings. What may yet become one is
 * held back; without stop strings this is a plain text stream. */
#ifndef PERK_SRC_STOP_TEXT_H
#define PERK_SRC_STOP_TEXT_H

#include "base.h"
#include "perk/engine.h"

typedef struct perk_stop_text perk_stop_text;

/* `tokenizer` and `sampling`, which was checked, are borrowed until it is freed. */
perk_status perk_stop_text_create(perk_stop_text **out, const perk_tokenizer *tokenizer, const perk_sampling *sampling,
                                  perk_error *err);
void perk_stop_text_free(perk_stop_text *self);

/* One token more. `*text` (complete UTF-8, NUL-terminated, valid until the next call) is what can be said now. `last`:
 * the answer ends with this token, so that nothing is held back. *found: a stop string is complete; no more tokens. */
perk_status perk_stop_text_push(perk_stop_text *self, int32_t token, bool last, const char **text, size_t *size,
                                bool *found, perk_error *err);

/* Bytes of a whole text that stand before the first stop string in it. */
size_t perk_stop_text_cut(const perk_sampling *sampling, const char *text, size_t size);

#endif
