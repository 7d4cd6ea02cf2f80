#include "parts.h"
#include "utf8.h"

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

/* Puts text and decoded bytes into the pool. A text with a character that stands for no byte decodes to itself. */
static bool store_token(perk_vocab *vocab, perk_token *token, const char *text, size_t size) {
    perk_buffer *pool = &vocab->pool;
    token->text = token->bytes = (uint32_t)pool->size;
    token->text_size = token->bytes_size = (uint32_t)size;
    perk_buffer_append(pool, text, size);
    perk_buffer_append(pool, "", 1);
    uint32_t bytes = (uint32_t)pool->size;
    bool spelled = false; /* as something else than its bytes */
    for (size_t i = 0, length; i < size && !pool->failed; i += length) {
        int byte = character_byte(perk_utf8_next(text + i, &length));
        if (byte < 0) {
            pool->size = bytes;
            return true;
        }
        spelled |= length > 1;
        char raw = (char)byte;
        perk_buffer_append(pool, &raw, 1);
    }
    if (spelled) {
        token->bytes = bytes;
        token->bytes_size = (uint32_t)pool->size - bytes;
    } else if (!pool->failed) {
        pool->size = bytes;
    }
    return !pool->failed;
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
        if (!store_token(vocab, token, text, size)) return perk_fail_memory(err, "the vocabulary");
        vocab->slots[slot] = (int32_t)id;
        vocab->slots_used++;
        vocab->longest = PERK_MAX(vocab->longest, size);
    }
    token->flags |= flags;
    return PERK_OK;
}

void perk_vocab_finish(perk_vocab *vocab) {
    for (int byte = 0; byte < 256; byte++) {
        char text[2];
        vocab->byte_ids[byte] = perk_vocab_find(vocab, text, perk_byte_character((uint8_t)byte, text));
    }
}
