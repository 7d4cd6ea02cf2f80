/* Keys: hashing named parts, and the file names that come from a key. */
#include "cache/internal.h"

#include <stdio.h>
#include <xxhash.h>

struct perk_cache_key_builder {
    XXH3_state_t *state;
};

static void add_number(XXH3_state_t *state, uint64_t number) {
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) bytes[i] = (uint8_t)(number >> (8 * i));
    XXH3_128bits_update(state, bytes, sizeof bytes);
}

static void add_sized(XXH3_state_t *state, const void *data, size_t size) {
    add_number(state, size);
    if (size) XXH3_128bits_update(state, data, size);
}

perk_cache_key_builder *perk_cache_key_begin(void) {
    perk_cache_key_builder *builder = perk_calloc(1, sizeof *builder);
    if (!builder) return NULL;
    builder->state = XXH3_createState();
    if (!builder->state) {
        free(builder);
        return NULL;
    }
    XXH3_128bits_reset(builder->state);
    add_number(builder->state, PERK_CACHE_FORMAT_VERSION);
    return builder;
}

void perk_cache_key_add(perk_cache_key_builder *builder, const char *name, const void *data, size_t size) {
    if (!builder) return;
    add_sized(builder->state, name, strlen(name));
    add_sized(builder->state, data, size);
}

perk_status perk_cache_key_finish(perk_cache_key_builder *builder, perk_cache_key *key, perk_error *err) {
    if (key) memset(key, 0, sizeof *key);
    if (!builder) return perk_fail_memory(err, "a cache key");
    if (key) {
        XXH128_canonical_t canonical;
        XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(builder->state));
        memcpy(key->bytes, canonical.digest, sizeof key->bytes);
    }
    XXH3_freeState(builder->state);
    free(builder);
    return PERK_OK;
}

void perk_cache_key_hex(const perk_cache_key *key, char hex[PERK_CACHE_KEY_HEX_SIZE]) {
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < PERK_CACHE_KEY_SIZE; i++) {
        hex[2 * i] = digits[key->bytes[i] >> 4];
        hex[2 * i + 1] = digits[key->bytes[i] & 15];
    }
    hex[2 * PERK_CACHE_KEY_SIZE] = '\0';
}

static int digit_value(char digit) {
    if (digit >= '0' && digit <= '9') return digit - '0';
    if (digit >= 'a' && digit <= 'f') return digit - 'a' + 10;
    return -1;
}

bool perk_cache_name_parse(const char *name, const char *suffix, perk_cache_key *key) {
    for (size_t i = 0; i < PERK_CACHE_KEY_SIZE; i++) {
        int high = digit_value(name[2 * i]);
        int low = high < 0 ? -1 : digit_value(name[2 * i + 1]); /* never reads past the NUL */
        if (low < 0) return false;
        key->bytes[i] = (uint8_t)(high << 4 | low);
    }
    return strcmp(name + 2 * PERK_CACHE_KEY_SIZE, suffix) == 0;
}

perk_status perk_cache_key_parse(const char *hex, perk_cache_key *key, perk_error *err) {
    if (perk_cache_name_parse(hex, "", key)) return PERK_OK;
    memset(key, 0, sizeof *key);
    return perk_fail(err, PERK_INVALID_ARGUMENT, "'%.64s' is not a cache key: give its 32 hexadecimal digits", hex);
}

perk_cache_name perk_cache_file_name(const perk_cache_key *key, const char *suffix) {
    perk_cache_name name;
    char hex[PERK_CACHE_KEY_HEX_SIZE];
    perk_cache_key_hex(key, hex);
    snprintf(name.text, sizeof name.text, "%s%s", hex, suffix);
    return name;
}
