#include "utf8.h"

typedef enum utf8_verdict { UTF8_GOOD, UTF8_BAD, UTF8_CUT } utf8_verdict;

/* Judges the character at `p`. `*length`: GOOD: its bytes; BAD: the bytes that one U+FFFD stands for; CUT: all `size`
 * bytes, which begin a character and do not finish it. */
static utf8_verdict utf8_judge(const uint8_t *p, size_t size, size_t *length) {
    uint8_t lead = p[0], low = 0x80, high = 0xBF;
    size_t more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    *length = 1;
    if (lead >= 0x80 && (lead < 0xC2 || lead > 0xF4)) return UTF8_BAD;
    if (lead == 0xE0) low = 0xA0; /* the rest would be overlong, */
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xED) high = 0x9F; /* a surrogate, */
    if (lead == 0xF4) high = 0x8F; /* or past U+10FFFF */
    for (; more > 0; more--, ++*length) {
        if (*length == size) return UTF8_CUT;
        if (p[*length] < low || p[*length] > high) return UTF8_BAD;
        low = 0x80;
        high = 0xBF;
    }
    return UTF8_GOOD;
}

static size_t ascii_prefix(const char *text, size_t size) {
    size_t i = 0;
    for (uint64_t word; i + sizeof word <= size; i += sizeof word) {
        memcpy(&word, text + i, sizeof word);
        if (word & 0x8080808080808080u) break;
    }
    while (i < size && (uint8_t)text[i] < 0x80) i++;
    return i;
}

bool perk_utf8_valid(const char *text, size_t size) {
    for (size_t i = ascii_prefix(text, size), length; i < size; i += length) {
        if ((uint8_t)text[i] < 0x80)
            length = ascii_prefix(text + i, size - i);
        else if (utf8_judge((const uint8_t *)text + i, size - i, &length) != UTF8_GOOD)
            return false;
    }
    return true;
}

void perk_utf8_mask(char *text) {
    size_t size = strlen(text);
    for (size_t i = ascii_prefix(text, size), length; i < size; i += length)
        if (utf8_judge((const uint8_t *)text + i, size - i, &length) != UTF8_GOOD) memset(text + i, '?', length);
}

size_t perk_utf8_repair(const char *text, size_t size, bool final, perk_buffer *out) {
    if (size == 0) text = ""; /* it may be NULL, to which nothing may be added, not even 0 */
    size_t copied = 0, i = 0;
    while (i < size) {
        size_t length = 1;
        utf8_verdict verdict = utf8_judge((const uint8_t *)text + i, size - i, &length);
        if (verdict == UTF8_CUT && !final) break;
        if (verdict != UTF8_GOOD) {
            perk_buffer_append(out, text + copied, i - copied);
            perk_buffer_append(out, PERK_REPLACEMENT, 3);
            copied = i + length;
        }
        i += length;
    }
    perk_buffer_append(out, text + copied, i - copied);
    return i;
}

int32_t perk_utf8_next(const char *text, size_t *length) {
    const uint8_t *p = (const uint8_t *)text;
    if (p[0] < 0x80) return *length = 1, p[0];
    if (p[0] < 0xE0) return *length = 2, (p[0] & 0x1F) << 6 | (p[1] & 0x3F);
    if (p[0] < 0xF0) return *length = 3, (p[0] & 0x0F) << 12 | (p[1] & 0x3F) << 6 | (p[2] & 0x3F);
    return *length = 4, (p[0] & 0x07) << 18 | (p[1] & 0x3F) << 12 | (p[2] & 0x3F) << 6 | (p[3] & 0x3F);
}

const char *perk_utf8_previous(const char *begin, const char *end) {
    do end--;
    while (end > begin && ((uint8_t)*end & 0xC0) == 0x80);
    return end;
}

size_t perk_utf8_put(int32_t c, char *out) {
    if (c < 0x80) return out[0] = (char)c, 1;
    size_t length = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = length - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3F));
    out[0] = (char)((length == 2 ? 0xC0 : length == 3 ? 0xE0 : 0xF0) | c);
    return length;
}
