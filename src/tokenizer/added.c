/* Added tokens are found in the text before anything else looks at it: the leftmost first, of those that begin at the
 * same place the longest. */
#include "parts.h"
#include "utf8.h"

#include <utf8proc.h>

static int32_t find_child(const perk_trie *trie, int32_t node, uint8_t byte) {
    int32_t child = trie->nodes[node].child;
    while (child >= 0 && trie->nodes[child].byte != byte) child = trie->nodes[child].sibling;
    return child;
}

/* Index of a new node, -1: out of memory. */
static int32_t new_node(perk_trie *trie, uint8_t byte) {
    if (trie->count == trie->capacity) {
        size_t capacity = PERK_MAX(trie->capacity * 2, (size_t)64);
        if (capacity > INT32_MAX) return -1;
        perk_trie_node *nodes = perk_realloc_array(trie->nodes, capacity, sizeof *nodes);
        if (!nodes) return -1;
        trie->nodes = nodes;
        trie->capacity = capacity;
    }
    trie->nodes[trie->count] = (perk_trie_node){.child = -1, .sibling = -1, .token = -1, .byte = byte};
    return (int32_t)trie->count++;
}

bool perk_trie_add(perk_trie *trie, const char *text, size_t size, int32_t token) {
    if (!size) return true;
    if (!trie->count && new_node(trie, 0) < 0) return false;
    int32_t node = 0;
    for (size_t i = 0; i < size; i++) {
        uint8_t byte = (uint8_t)text[i];
        int32_t child = find_child(trie, node, byte);
        if (child < 0) {
            if ((child = new_node(trie, byte)) < 0) return false;
            trie->nodes[child].sibling = trie->nodes[node].child;
            trie->nodes[node].child = child;
        }
        node = child;
    }
    trie->nodes[node].token = token;
    trie->starts[(uint8_t)text[0]] = true;
    return true;
}

void perk_trie_free(perk_trie *trie) {
    free(trie->nodes);
    *trie = (perk_trie){0};
}

/* The longest token at `text`; its index and `*length`, or -1. */
static int32_t longest_at(const perk_trie *trie, const char *text, size_t size, size_t *length) {
    int32_t found = -1;
    for (int32_t node = 0, i = 0; (size_t)i < size; i++) {
        if ((node = find_child(trie, node, (uint8_t)text[i])) < 0) break;
        if (trie->nodes[node].token < 0) continue;
        found = trie->nodes[node].token;
        *length = (size_t)i + 1;
    }
    return found;
}

static bool is_space(int32_t c) {
    return (c >= 9 && c <= 13) || c == 0x85 ||
           (c != 0x180E && utf8proc_category(c) >= UTF8PROC_CATEGORY_ZS &&
            utf8proc_category(c) <= UTF8PROC_CATEGORY_ZP);
}

/* What \w means to the regular expressions of Unicode's UTS 18: alphabetic, marks, decimal digits, connectors,
 * joiners. */
static bool is_word(int32_t c) {
    if (c == 0x200C || c == 0x200D) return true;
    if ((c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
        (c >= 0x1F170 && c <= 0x1F189))
        return true; /* letters in circles and squares are symbols, yet alphabetic */
    utf8proc_category_t category = utf8proc_category(c);
    return (category >= UTF8PROC_CATEGORY_LU && category <= UTF8PROC_CATEGORY_NL) || category == UTF8PROC_CATEGORY_PC;
}

static bool stands_alone(const char *text, size_t size, size_t begin, size_t end) {
    size_t length;
    if (begin > 0 && is_word(perk_utf8_next(perk_utf8_previous(text, text + begin), &length))) return false;
    return end == size || !is_word(perk_utf8_next(text + end, &length));
}

static size_t skip_spaces_back(const char *text, size_t from, size_t to) {
    while (from > to) {
        size_t length;
        const char *previous = perk_utf8_previous(text + to, text + from);
        if (!is_space(perk_utf8_next(previous, &length))) break;
        from = (size_t)(previous - text);
    }
    return from;
}

static size_t skip_spaces(const char *text, size_t from, size_t size) {
    for (size_t length; from < size && is_space(perk_utf8_next(text + from, &length)); from += length) continue;
    return from;
}

perk_status perk_added_split(const perk_trie *trie, const perk_added_token *tokens, const char *text, size_t size,
                             const perk_added_visitor *visitor) {
    perk_status status = PERK_OK;
    size_t done = 0; /* everything before was given to the visitor */
    for (size_t at = 0, length = 1; trie->count && at < size; at += length) {
        length = 1;
        if (!trie->starts[(uint8_t)text[at]]) continue;
        int32_t index = longest_at(trie, text + at, size - at, &length);
        if (index < 0) continue;
        const perk_added_token *token = &tokens[index];
        if (token->single_word && !stands_alone(text, size, at, at + length)) continue;
        /* A token that takes the spaces around it may have taken some that begin this one: then begin is before done,
         * and this token is given all the same. */
        size_t begin = token->lstrip ? skip_spaces_back(text, at, PERK_MIN(done, at)) : at;
        size_t end = token->rstrip ? skip_spaces(text, at + length, size) : at + length;
        if (done < begin) status = visitor->plain(visitor->user, text + done, begin - done);
        if (status == PERK_OK) status = visitor->token(visitor->user, token->id);
        if (status != PERK_OK) return status;
        done = end;
    }
    return done < size ? visitor->plain(visitor->user, text + done, size - done) : PERK_OK;
}
