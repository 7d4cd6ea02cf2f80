/* Mutation of JSON as JSON: bytes alone rarely stay valid, so half of all mutations edit values instead. */
#ifndef PERK_TESTS_FUZZ_JSON_H
#define PERK_TESTS_FUZZ_JSON_H

#include "fuzz.h"

#include <jansson.h>

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

/* xorshift: below `limit`, which is at least 1. */
static inline uint32_t fuzz_draw(uint64_t *state, size_t limit) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (uint32_t)((*state >> 16) % limit);
}

/* A place in a tree: what an array has at `index`, or an object under `key`. */
typedef struct fuzz_place {
    json_t *parent, *value;
    const char *key;
    size_t index;
} fuzz_place;

static inline size_t fuzz_children(const json_t *value) {
    return json_is_object(value) ? json_object_size(value) : json_array_size(value);
}

static inline fuzz_place fuzz_child(json_t *parent, size_t index) {
    fuzz_place place = {.parent = parent, .index = index};
    if (json_is_array(parent)) return place.value = json_array_get(parent, index), place;
    void *iterator = json_object_iter(parent);
    while (index-- > 0) iterator = json_object_iter_next(parent, iterator);
    return (fuzz_place){parent, json_object_iter_value(iterator), json_object_iter_key(iterator), 0};
}

/* Somewhere in the tree, as often near the root as deep down; `root` has children. */
static inline fuzz_place fuzz_pick(json_t *root, uint64_t *random) {
    fuzz_place place = {.value = root};
    do place = fuzz_child(place.value, fuzz_draw(random, fuzz_children(place.value)));
    while (fuzz_children(place.value) && fuzz_draw(random, 4));
    return place;
}

static inline json_t *fuzz_other_string(const json_t *value) {
    char text[256];
    size_t size = PERK_MIN(json_string_length(value), sizeof text / 2);
    memcpy(text, json_string_value(value), size);
    return json_stringn(text, LLVMFuzzerMutate((uint8_t *)text, size, sizeof text)); /* NULL where it is no UTF-8 */
}

static inline json_t *fuzz_other_number(const json_t *value, uint64_t *random) {
    static const json_int_t edges[] = {0, 1, -1, 2, 3, 7, 64, 255, 4096, 65536, INT32_MAX, INT32_MIN, INT64_MAX};
    uint64_t number = (uint64_t)json_integer_value(value);
    switch (fuzz_draw(random, 6)) {
    case 0: return json_integer((json_int_t)(number + 1));
    case 1: return json_integer((json_int_t)(number - 1));
    case 2: return json_integer((json_int_t)(number * 2));
    case 3: return json_integer((json_int_t)(number / 2));
    case 4: return json_real(json_number_value(value) * (0.5 + fuzz_draw(random, 4)));
    default: return json_integer(edges[fuzz_draw(random, PERK_COUNT(edges))]);
    }
}

/* What could be there instead of `value`; may be NULL. */
static inline json_t *fuzz_other(json_t *root, const json_t *value, uint64_t *random) {
    if (fuzz_draw(random, 2) && json_is_string(value)) return fuzz_other_string(value);
    if (fuzz_draw(random, 4) && json_is_number(value)) return fuzz_other_number(value, random);
    if (fuzz_draw(random, 2) && json_is_boolean(value)) return json_boolean(!json_is_true(value));
    switch (fuzz_draw(random, 9)) {
    case 0: return json_null();
    case 1: return json_boolean(fuzz_draw(random, 2));
    case 2: return json_string("");
    case 3: return json_array();
    case 4: return json_object();
    case 5: return json_real(1e30);
    case 6: return json_integer(fuzz_draw(random, 1000));
    default: return json_deep_copy(fuzz_pick(root, random).value);
    }
}

static inline void fuzz_edit(json_t *root, uint64_t *random) {
    if (!fuzz_children(root)) return;
    fuzz_place place = fuzz_pick(root, random);
    uint32_t action = fuzz_draw(random, 8);
    json_t *other = action ? fuzz_other(root, place.value, random) : NULL;
    char key[256];
    snprintf(key, sizeof key, "%.200s%s", place.key ? place.key : "", action == 1 ? "x" : "");
    if (!perk_utf8_valid(key, strlen(key))) {
        json_decref(other);
    } else if (!place.key) {
        if (action == 0) json_array_remove(place.parent, place.index);
        if (action == 1) json_array_insert_new(place.parent, place.index, other);
        if (action >= 2) json_array_set_new(place.parent, place.index, other);
    } else if (action == 0) {
        json_object_del(place.parent, key);
    } else {
        json_object_set_new(place.parent, key, other);
    }
}

/* Writes an edited copy of `json` to `out`; returns its size, 0 when it is no JSON container or has no room. */
static inline size_t fuzz_edit_json(const void *json, size_t size, char *out, size_t room, uint64_t *random) {
    json_t *root = json_loadb(json, size, JSON_ALLOW_NUL, NULL);
    if (!root) return 0;
    for (uint32_t edits = 1 + fuzz_draw(random, 3); edits > 0; edits--) fuzz_edit(root, random);
    size_t written = json_dumpb(root, out, room, JSON_COMPACT);
    json_decref(root);
    return written <= room ? written : 0;
}

/* The mutator of inputs that have `prefix` bytes, JSON, and perhaps 0xff and further parts. */
static inline size_t fuzz_mutate_json(uint8_t *data, size_t size, size_t max_size, unsigned seed, size_t prefix) {
    uint64_t random = seed * 0x9e3779b97f4a7c15u | 1;
    if (size <= prefix || fuzz_draw(&random, 2)) return LLVMFuzzerMutate(data, size, max_size);
    const uint8_t *mark = memchr(data + prefix, 0xff, size - prefix);
    size_t json = (mark ? (size_t)(mark - data) : size) - prefix, rest = size - prefix - json;
    char *edited = malloc(max_size);
    FUZZ_CHECK(edited);
    size_t written = fuzz_edit_json(data + prefix, json, edited, max_size - prefix - rest, &random);
    if (written) {
        memmove(data + prefix + written, data + prefix + json, rest);
        memcpy(data + prefix, edited, written);
    }
    free(edited);
    return written ? prefix + written + rest : LLVMFuzzerMutate(data, size, max_size);
}

#endif
