#include "parts.h"
#include "utf8.h"

#include <stdio.h>
#include <xxhash.h>

/* Byte-level vocabularies spell every byte as one printable character: the printable ones of Latin-1 as themselves,
 * the others, in order, as U+0100, U+0101, ... */
static bool byte_is_printable(int byte) {
    return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || (byte >= 0xAE && byte <= 0xFF);
}

static int byte_code_point(int byte) {
    if (byte_is_printable(byte)) return byte;
    int hidden = 0;
    for (int b = 0; b < byte; b++) hidden += !byte_is_printable(b);
    return 0x100 + hidden;
}

size_t perk_byte_character(uint8_t byte, char out[2]) { return perk_utf8_put(byte_code_point(byte), out); }

/* The byte that a character stands for, -1 for none: the inverse of the above. */
static int character_byte(int32_t c) {
    if (c < 0x100) return byte_is_printable(c) ? c : -1;
    if (c <= 0x120) return c - 0x100;        /* 00..20 */
    if (c <= 0x142) return c - 0x121 + 0x7F; /* 7F..A0 */
    return c == 0x143 ? 0xAD : -1;
}

perk_status perk_vocab_init(perk_vocab *vocab, size_t expected, perk_error *err) {
    *vocab = (perk_vocab){.slot_count = 1024};
    while (vocab->slot_count < expected * 2) vocab->slot_count *= 2;
    vocab->slots = perk_realloc_array(NULL, vocab->slot_count, sizeof *vocab->slots);
    if (!vocab->slots) return perk_fail_memory(err, "the vocabulary");
    memset(vocab->slots, 0xFF, vocab->slot_count * sizeof *vocab->slots);
    return PERK_OK;
}

void perk_vocab_free(perk_vocab *vocab) {
    free(vocab->tokens);
    free(vocab->slots);
    perk_buffer_free(&vocab->pool);
    *vocab = (perk_vocab){0};
}

/* The slot that holds `text`, or the empty one where it would go. */
static size_t find_slot(const perk_vocab *vocab, const char *text, size_t size) {
    size_t mask = vocab->slot_count - 1;
    size_t slot = (size_t)XXH3_64bits(text, size) & mask;
    for (; vocab->slots[slot] >= 0; slot = (slot + 1) & mask) {
        const perk_token *token = &vocab->tokens[vocab->slots[slot]];
        if (token->text_size == size && memcmp(vocab->pool.data + token->text, text, size) == 0) break;
    }
    return slot;
}

int32_t perk_vocab_find(const perk_vocab *vocab, const char *text, size_t size) {
    return vocab->slot_count ? vocab->slots[find_slot(vocab, text, size)] : -1;
}

int32_t perk_vocab_find_model(const perk_vocab *vocab, const char *text, size_t size) {
    int32_t id = perk_vocab_find(vocab, text, size);
    return id >= 0 && (vocab->tokens[id].flags & PERK_TOKEN_MODEL) ? id : -1;
}

static bool grow_tokens(perk_vocab *vocab, size_t count) {
    if (count > vocab->capacity) {
        size_t capacity = PERK_MAX(count, vocab->capacity * 2);
        perk_token *tokens = perk_realloc_array(vocab->tokens, capacity, sizeof *tokens);
        if (!tokens) return false;
        memset(tokens + vocab->capacity, 0, (capacity - vocab->capacity) * sizeof *tokens);
        vocab->tokens = tokens;
        vocab->capacity = capacity;
    }
    vocab->count = PERK_MAX(vocab->count, count);
    return true;
}

static bool grow_slots(perk_vocab *vocab) {
    if ((vocab->slots_used + 1) * 2 <= vocab->slot_count) return true;
    int32_t *old = vocab->slots;
    size_t old_count = vocab->slot_count;
    int32_t *slots = perk_realloc_array(NULL, old_count * 2, sizeof *slots);
    if (!slots) return false;
    memset(slots, 0xFF, old_count * 2 * sizeof *slots);
    vocab->slots = slots;
    vocab->slot_count = old_count * 2;
    for (size_t i = 0; i < old_count; i++) {
        if (old[i] < 0) continue;
        const perk_token *token = &vocab->tokens[old[i]];
        slots[find_slot(vocab, vocab->pool.data + token->text, token->text_size)] = old[i];
    }
    free(old);
    return true;
}

static bool store_text(perk_vocab *vocab, perk_token *token, const char *text, size_t size) {
    token->text = token->bytes = (uint32_t)vocab->pool.size;
    token->text_size = token->bytes_size = (uint32_t)size;
    perk_buffer_append(&vocab->pool, text, size);
    perk_buffer_append(&vocab->pool, "", 1);
    return !vocab->pool.failed;
}

perk_status perk_vocab_add(perk_vocab *vocab, const char *text, size_t size, int64_t id, uint32_t flags,
                           perk_error *err) {
    if (id < 0 || id > PERK_MAX_TOKEN_ID)
        return perk_fail(err, PERK_BAD_FORMAT, "token \"%.60s\" has id %lld; ids go from 0 to %d", text, (long long)id,
                         PERK_MAX_TOKEN_ID);
    if (size > UINT32_MAX / 4 - vocab->pool.size) return perk_fail(err, PERK_LIMIT, "the token texts exceed 1 GiB");
    if (!grow_slots(vocab) || !grow_tokens(vocab, (size_t)id + 1)) return perk_fail_memory(err, "the vocabulary");
    size_t slot = find_slot(vocab, text, size);
    perk_token *token = &vocab->tokens[id];
    if (vocab->slots[slot] >= 0 && vocab->slots[slot] != id)
        return perk_fail(err, PERK_BAD_FORMAT, "token \"%.60s\" has two ids, %d and %lld", text, vocab->slots[slot],
                         (long long)id);
    if (vocab->slots[slot] < 0) {
        if (token->flags)
            return perk_fail(err, PERK_BAD_FORMAT, "tokens \"%.60s\" and \"%.60s\" have the same id %lld",
                             vocab->pool.data + token->text, text, (long long)id);
        if (!store_text(vocab, token, text, size)) return perk_fail_memory(err, "the vocabulary");
        vocab->slots[slot] = (int32_t)id;
        vocab->slots_used++;
        vocab->longest = PERK_MAX(vocab->longest, size);
    }
    token->flags |= flags;
    return PERK_OK;
}

/* ---- what tokens decode to
 * ----------------------------------------------------------------------------------------- */

/* Appends the bytes that the characters stand for. False when one of them stands for none. */
static bool spell_bytes(const char *text, size_t size, perk_buffer *out) {
    for (size_t i = 0, length; i < size; i += length) {
        int byte = character_byte(perk_utf8_next(text + i, &length));
        if (byte < 0) return false;
        char raw = (char)byte;
        perk_buffer_append(out, &raw, 1);
    }
    return true;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* The byte that a text like "<0x0A>" names, -1 for none. */
static int named_byte(const char *text, size_t size) {
    if (size != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    int high = hex_digit(text[3]), low = hex_digit(text[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* Puts what the token decodes to into `out`. */
static void decode_token(perk_token *token, const char *text, perk_spelling spelling, const perk_replacement *replaced,
                         bool has_bytes, perk_buffer *out) {
    size_t size = token->text_size;
    out->size = 0;
    if (spelling == PERK_SPELLED_AS_BYTES) {
        if (spell_bytes(text, size, out)) return;
        out->size = 0; /* a character that stands for no byte: the text stands for itself */
        perk_buffer_append(out, text, size);
        return;
    }
    perk_replace(replaced, text, size, perk_grown_limit(size), out);
    int byte = has_bytes && !out->failed ? named_byte(out->data, out->size) : -1;
    if (byte < 0) return;
    char raw = (char)byte;
    token->flags |= PERK_TOKEN_BYTE;
    out->size = 0;
    perk_buffer_append(out, &raw, 1);
}

static void index_bytes(perk_vocab *vocab, perk_spelling spelling) {
    for (int byte = 0; byte < 256; byte++) {
        char text[8];
        size_t size = 6;
        if (spelling == PERK_SPELLED_AS_BYTES)
            size = perk_byte_character((uint8_t)byte, text);
        else
            snprintf(text, sizeof text, "<0x%02X>", (unsigned)byte);
        vocab->byte_ids[byte] = perk_vocab_find_model(vocab, text, size);
        if (byte >= 128) continue;
        text[0] = (char)byte;
        vocab->ascii_ids[byte] = perk_vocab_find_model(vocab, text, 1);
    }
}

perk_status perk_vocab_finish(perk_vocab *vocab, perk_spelling spelling, const perk_replacement *replaced,
                              bool has_bytes, perk_error *err) {
    perk_buffer bytes = {0};
    for (size_t id = 0; id < vocab->count && !vocab->pool.failed && !bytes.failed; id++) {
        perk_token *token = &vocab->tokens[id];
        if (!token->flags) continue;
        const char *text = vocab->pool.data + token->text;
        decode_token(token, text, spelling, replaced, has_bytes, &bytes);
        if (bytes.size == token->text_size && (!bytes.size || memcmp(bytes.data, text, bytes.size) == 0)) continue;
        if (bytes.size > perk_grown_limit(token->text_size) || bytes.size > UINT32_MAX / 2 - vocab->pool.size) {
            perk_buffer_free(&bytes);
            return perk_fail(err, PERK_LIMIT, "what token %zu decodes to is too long", id);
        }
        token->bytes = (uint32_t)vocab->pool.size;
        token->bytes_size = (uint32_t)bytes.size;
        perk_buffer_append(&vocab->pool, bytes.data, bytes.size);
    }
    bool failed = vocab->pool.failed || bytes.failed;
    perk_buffer_free(&bytes);
    if (failed) return perk_fail_memory(err, "the vocabulary");
    index_bytes(vocab, spelling);
    return PERK_OK;
}
