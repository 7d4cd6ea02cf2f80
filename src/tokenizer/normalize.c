/* Unicode normalization. utf8proc knows the characters; the canonical reordering is done here, because utf8proc's takes
 * quadratic time on a long run of combining marks and text comes from outside. */
#include "parts.h"
#include "utf8.h"

#include <utf8proc.h>

typedef struct characters {
    int32_t *items;
    size_t count, capacity;
} characters;

static bool reserve(characters *list, size_t extra) {
    if (extra <= list->capacity - list->count) return true;
    size_t capacity = PERK_MAX(list->capacity * 2, list->count + extra + 64);
    int32_t *items = perk_realloc_array(list->items, capacity, sizeof *items);
    if (!items) return false;
    list->items = items;
    list->capacity = capacity;
    return true;
}

/* Hugging Face normalizes with the tables of Unicode 9. What later versions gave a combining class or a decomposition
 * stays as it is there, and so here: the ids must be the same. */
static const int32_t younger[][2] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},
    {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},
    {0x32ff, 0x32ff},   {0xa7f2, 0xa7f4},   {0xa82c, 0xa82c},   {0xab69, 0xab69},   {0x10781, 0x10785},
    {0x10787, 0x107b0}, {0x107b2, 0x107ba}, {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff},
    {0x10f46, 0x10f50}, {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e},
    {0x11839, 0x1183a}, {0x11938, 0x11938}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0},
    {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e030, 0x1e06d}, {0x1e08f, 0x1e08f},
    {0x1e130, 0x1e136}, {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}, {0x1f16c, 0x1f16c},
    {0x1fbf0, 0x1fbf9}};

static bool is_younger(int32_t c) {
    const utf8proc_property_t *property = utf8proc_get_property(c);
    if (!property->combining_class && property->decomp_seqindex == UINT16_MAX) return false; /* almost all text */
    for (size_t i = 0; i < PERK_COUNT(younger); i++)
        if (c >= younger[i][0] && c <= younger[i][1]) return true;
    return false;
}

static int combining_class(int32_t c) { return is_younger(c) ? 0 : utf8proc_get_property(c)->combining_class; }

/* Stable counting sort of one run of combining marks by their class. */
static bool reorder_run(int32_t *run, size_t count) {
    size_t starts[256] = {0};
    bool sorted = true;
    for (size_t i = 1; i < count && sorted; i++) sorted = combining_class(run[i - 1]) <= combining_class(run[i]);
    if (sorted) return true;
    int32_t *copy = perk_realloc_array(NULL, count, sizeof *copy);
    if (!copy) return false;
    memcpy(copy, run, count * sizeof *copy);
    for (size_t i = 0; i < count; i++)
        if (combining_class(copy[i]) < 255) starts[combining_class(copy[i]) + 1]++;
    for (size_t i = 1; i < PERK_COUNT(starts); i++) starts[i] += starts[i - 1];
    for (size_t i = 0; i < count; i++) run[starts[combining_class(copy[i])]++] = copy[i];
    free(copy);
    return true;
}

static bool reorder(characters *list) {
    for (size_t i = 0, end; i < list->count; i = end) {
        end = i + 1;
        if (combining_class(list->items[i]) == 0) continue;
        while (end < list->count && combining_class(list->items[end]) != 0) end++;
        if (!reorder_run(list->items + i, end - i)) return false;
    }
    return true;
}

static bool decompose(characters *list, const char *text, size_t size, bool compatible) {
    utf8proc_option_t options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : 0);
    for (size_t i = 0, length; i < size; i += length) {
        int32_t c = perk_utf8_next(text + i, &length);
        if (!reserve(list, 32)) return false; /* no character has a decomposition longer than 18 */
        if (is_younger(c)) {
            list->items[list->count++] = c;
            continue;
        }
        int boundary = 0;
        utf8proc_ssize_t got = utf8proc_decompose_char(
            c, list->items + list->count, (utf8proc_ssize_t)(list->capacity - list->count), options, &boundary);
        if (got < 0 || (size_t)got > list->capacity - list->count)
            list->items[list->count] = c, got = 1; /* utf8proc has no such case */
        list->count += (size_t)got;
    }
    return true;
}

/* Nothing composes across a younger character. */
static void compose(characters *list) {
    size_t kept = 0;
    for (size_t i = 0, end; i < list->count; i = end) {
        for (end = i + 1; end < list->count && !is_younger(list->items[end]);) end++;
        utf8proc_ssize_t left =
            utf8proc_normalize_utf32(list->items + i, (utf8proc_ssize_t)(end - i), UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        size_t count = left >= 0 ? (size_t)left : end - i;
        memmove(list->items + kept, list->items + i, count * sizeof *list->items);
        kept += count;
    }
    list->count = kept;
}

/* A stretch that may change, with the starter before it. */
static bool normalize_stretch(perk_normal_form form, const char *text, size_t size, characters *list,
                              perk_buffer *out) {
    list->count = 0;
    if (!decompose(list, text, size, form == PERK_NFKC || form == PERK_NFKD) || !reorder(list)) return false;
    if (form == PERK_NFC || form == PERK_NFKC) compose(list);
    for (size_t i = 0; i < list->count; i++) {
        char bytes[4];
        perk_buffer_append(out, bytes, perk_utf8_put(list->items[i], bytes));
    }
    return true;
}

/* ---- replacing
 * ------------------------------------------------------------------------------------------------------------- */

void perk_replace(const perk_replacement *replaced, const char *text, size_t size, size_t limit, perk_buffer *out) {
    const char *end = text + size, *found;
    while (replaced->pattern_size && out->size <= limit &&
           (found = memmem(text, (size_t)(end - text), replaced->pattern, replaced->pattern_size))) {
        perk_buffer_append(out, text, (size_t)(found - text));
        perk_buffer_append(out, replaced->content, replaced->content_size);
        text = found + replaced->pattern_size;
    }
    perk_buffer_append(out, text, (size_t)(end - text));
}

void perk_replacement_free(perk_replacement *replaced) {
    free(replaced->pattern);
    free(replaced->content);
    *replaced = (perk_replacement){0};
}

/* ---- the forms
 * ------------------------------------------------------------------------------------------------------------- */

perk_status perk_normalize(perk_normal_form form, const char *text, size_t size, perk_buffer *out, perk_error *err) {
    characters list = {0};
    bool fits = true;
    for (size_t i = 0, end; i < size && fits; i = end) {
        end = i;
        while (end < size && (uint8_t)text[end] < 0x80) end++;
        /* ASCII is in every form already, but the last of it may compose with a mark that follows. */
        size_t plain = end < size && end > i ? end - 1 : end;
        perk_buffer_append(out, text + i, plain - i);
        while (end < size && (uint8_t)text[end] >= 0x80) end++;
        if (plain < end) fits = normalize_stretch(form, text + plain, end - plain, &list, out);
    }
    free(list.items);
    return fits && !out->failed ? PERK_OK : perk_fail_memory(err, "normalizing a text");
}
