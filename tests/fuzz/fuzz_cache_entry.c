/* Entries of the cubin cache. The first byte chooses: raw bytes under a key, or a good entry made from a payload and
 * then edited, which must never be believed. (Mutation alone would not get past the hashes.) */
#include "fuzz.h"

#include "cache/internal.h"

static void check_raw(const uint8_t *data, size_t size) {
    perk_cache_key key = {{0}};
    if (size < sizeof key.bytes) return;
    memcpy(key.bytes, data, sizeof key.bytes);
    const uint8_t *bytes = data + sizeof key.bytes;
    size -= sizeof key.bytes;
    if (perk_cache_entry_check(bytes, size, &key) != NULL) return;
    uint8_t header[PERK_CACHE_HEADER_SIZE];
    FUZZ_CHECK(size >= sizeof header);
    perk_cache_entry_header(header, &key, bytes + sizeof header, size - sizeof header);
    FUZZ_CHECK(memcmp(header, bytes, sizeof header) == 0, "an entry that perk would not have written");
}

/* Edits are a place, two bytes little-endian, and a byte that is XORed into it. Cut or grown by a byte, no entry is
 * believed either. */
static void check_edited(const uint8_t *data, size_t size) {
    if (size < 1 + sizeof(perk_cache_key)) return;
    size_t edits = data[0] % 8, payload = size - 1 - sizeof(perk_cache_key);
    if (payload < 3 * edits) return;
    payload -= 3 * edits;
    perk_cache_key key;
    memcpy(key.bytes, data + 1, sizeof key.bytes);
    const uint8_t *edit = data + 1 + sizeof key.bytes;
    size_t whole = PERK_CACHE_HEADER_SIZE + payload;
    uint8_t *entry = malloc(whole), *edited = calloc(1, whole + 1);
    FUZZ_CHECK(entry && edited);
    if (payload) memcpy(entry + PERK_CACHE_HEADER_SIZE, edit + 3 * edits, payload);
    perk_cache_entry_header(entry, &key, entry + PERK_CACHE_HEADER_SIZE, payload);
    FUZZ_CHECK(perk_cache_entry_check(entry, whole, &key) == NULL);
    memcpy(edited, entry, whole);
    for (size_t i = 0; i < edits; i++, edit += 3) edited[(edit[0] | (size_t)edit[1] << 8) % whole] ^= edit[2];
    bool same = memcmp(edited, entry, whole) == 0;
    FUZZ_CHECK((perk_cache_entry_check(edited, whole, &key) == NULL) == same);
    FUZZ_CHECK(perk_cache_entry_check(edited, whole - 1, &key) && perk_cache_entry_check(edited, whole + 1, &key));
    free(entry);
    free(edited);
}

/* File names lead to keys, too: a name that is read is the one that would be written. */
static void check_name(const uint8_t *data, size_t size) {
    char *name = strndup((const char *)data, size);
    perk_cache_key key;
    FUZZ_CHECK(name);
    if (perk_cache_name_parse(name, PERK_CACHE_ENTRY_SUFFIX, &key))
        FUZZ_CHECK(strcmp(perk_cache_file_name(&key, PERK_CACHE_ENTRY_SUFFIX).text, name) == 0, "%s", name);
    free(name);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    fuzz_part part = fuzz_take(&(const uint8_t *){data + 1}, &(size_t){size - 1}, true);
    switch (data[0] % 3) {
    case 0: check_raw((const uint8_t *)part.data, part.size); break;
    case 1: check_edited((const uint8_t *)part.data, part.size); break;
    default: check_name((const uint8_t *)part.data, part.size); break;
    }
    free(part.data);
    return 0;
}
