/* UTF-8 as bytes from outside bring it: checking, replacing what is ill-formed, walking. */
#ifndef PERK_TOKENIZER_UTF8_H
#define PERK_TOKENIZER_UTF8_H

#include "base.h"

#define PERK_REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

bool perk_utf8_valid(const char *text, size_t size);

/* Puts a '?' in the place of every byte of an ill-formed sequence, which a text cut to its room may end with. */
void perk_utf8_mask(char *text);

/* Appends `text` to `out` with every maximal ill-formed sequence replaced by U+FFFD and returns the bytes consumed: all
 * of them when `final`, else all but an unfinished character (at most 3 bytes) at the end. */
size_t perk_utf8_repair(const char *text, size_t size, bool final, perk_buffer *out);

/* The character at `text`, which is well-formed and not at its end; `*length` is its bytes. */
int32_t perk_utf8_next(const char *text, size_t *length);
/* The start of the character before `end`, given `begin` < `end` in well-formed text. */
const char *perk_utf8_previous(const char *begin, const char *end);
/* Writes the character and returns its length, 1 to 4. */
size_t perk_utf8_put(int32_t character, char *out);

#endif
