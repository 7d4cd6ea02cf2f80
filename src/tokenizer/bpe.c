/* Byte-pair encoding of a word: start from its bytes or characters; while some neighbours have a merge, apply the merge
 * of the lowest rank, the leftmost first. Short words scan for it, long ones keep a heap, so that no word costs more
 * than n log n. Words seen before in the same call are copied. */
#include "parts.h"
#include "utf8.h"

#include <xxhash.h>

enum { SHORT_WORD = 64, MAX_SEEN = 1 << 16 };
#define NO_RANK UINT32_MAX

/* ---- merges
 * ---------------------------------------------------------------------------------------------------------- */

perk_status perk_bpe_init(perk_bpe *bpe, size_t merge_count, perk_error *err) {
    if (merge_count >= NO_RANK) return perk_fail(err, PERK_LIMIT, "%zu merges are more than 2^32 - 2", merge_count);
    bpe->slot_count = 16;
    while (bpe->slot_count < merge_count + merge_count / 2) bpe->slot_count *= 2;
    bpe->slots = perk_realloc_array(NULL, bpe->slot_count, sizeof *bpe->slots);
    if (!bpe->slots) return perk_fail_memory(err, "the merges");
    for (size_t i = 0; i < bpe->slot_count; i++) bpe->slots[i] = (perk_merge){-1, -1, NO_RANK, -1};
    return PERK_OK;
}

void perk_bpe_free(perk_bpe *bpe) {
    free(bpe->slots);
    *bpe = (perk_bpe){0};
}

/* The slot of the pair, or the empty one where it would go. */
static perk_merge *find_merge(const perk_bpe *bpe, int32_t left, int32_t right) {
    uint64_t key = ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) * 0x9E3779B97F4A7C15u;
    size_t mask = bpe->slot_count - 1, slot = (size_t)(key >> 32 ^ key >> 15) & mask;
    while (bpe->slots[slot].left >= 0 && (bpe->slots[slot].left != left || bpe->slots[slot].right != right))
        slot = (slot + 1) & mask;
    return &bpe->slots[slot];
}

void perk_bpe_add(perk_bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t result) {
    *find_merge(bpe, left, right) = (perk_merge){left, right, rank, result};
}

static uint32_t merge_rank(const perk_bpe *bpe, int32_t left, int32_t right) {
    return find_merge(bpe, left, right)->rank;
}

/* ---- a short word: scan for the lowest rank
 * --------------------------------------------------------------------------- */

static size_t merge_short(const perk_bpe *bpe, int32_t *ids, size_t count) {
    uint32_t ranks[SHORT_WORD]; /* ranks[i]: of the pair (i, i + 1) */
    for (size_t i = 0; i + 1 < count; i++) ranks[i] = merge_rank(bpe, ids[i], ids[i + 1]);
    while (count > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < count; i++)
            if (ranks[i] < ranks[best]) best = i;
        if (ranks[best] == NO_RANK) break;
        ids[best] = find_merge(bpe, ids[best], ids[best + 1])->result;
        count--;
        memmove(ids + best + 1, ids + best + 2, (count - best - 1) * sizeof *ids);
        if (best + 1 < count) {
            memmove(ranks + best + 1, ranks + best + 2, (count - best - 2) * sizeof *ranks);
            ranks[best] = merge_rank(bpe, ids[best], ids[best + 1]);
        }
        if (best > 0) ranks[best - 1] = merge_rank(bpe, ids[best - 1], ids[best]);
    }
    return count;
}

/* ---- a long word: a linked list of symbols and a heap of candidate merges
 * ----------------------------------------------- */

typedef struct symbol {
    int32_t id;             /* -1: merged into its left neighbour */
    int32_t previous, next; /* -1 none */
} symbol;

/* A candidate is rank << 32 | position: the smallest is the merge to apply. Candidates whose pair has since changed
 * stay in the heap and are recognised by their rank, which belongs to one pair alone. */
typedef struct merge_heap {
    uint64_t *items;
    size_t count;
} merge_heap;

static void heap_sink(merge_heap *heap, size_t at) {
    uint64_t item = heap->items[at];
    for (size_t child; (child = 2 * at + 1) < heap->count; at = child) {
        if (child + 1 < heap->count && heap->items[child + 1] < heap->items[child]) child++;
        if (heap->items[child] >= item) break;
        heap->items[at] = heap->items[child];
    }
    heap->items[at] = item;
}

static void heap_push(merge_heap *heap, uint64_t item) {
    size_t at = heap->count++;
    for (; at > 0 && heap->items[(at - 1) / 2] > item; at = (at - 1) / 2) heap->items[at] = heap->items[(at - 1) / 2];
    heap->items[at] = item;
}

static uint64_t heap_pop(merge_heap *heap) {
    uint64_t top = heap->items[0];
    heap->items[0] = heap->items[--heap->count];
    if (heap->count) heap_sink(heap, 0);
    return top;
}

static void push_candidate(merge_heap *heap, const perk_bpe *bpe, const symbol *symbols, int32_t at) {
    int32_t next = at < 0 ? -1 : symbols[at].next;
    if (next < 0) return;
    uint32_t rank = merge_rank(bpe, symbols[at].id, symbols[next].id);
    if (rank != NO_RANK) heap_push(heap, (uint64_t)rank << 32 | (uint32_t)at);
}

/* `candidates` has room for 3 * count items: one a pair at the start, and two for each of fewer than `count` merges. */
static size_t merge_long(const perk_bpe *bpe, int32_t *ids, size_t count, symbol *symbols, uint64_t *candidates) {
    merge_heap heap = {candidates, 0};
    for (size_t i = 0; i < count; i++)
        symbols[i] = (symbol){ids[i], (int32_t)i - 1, i + 1 < count ? (int32_t)i + 1 : -1};
    for (size_t i = 0; i + 1 < count; i++) {
        uint32_t rank = merge_rank(bpe, ids[i], ids[i + 1]);
        if (rank != NO_RANK) heap.items[heap.count++] = (uint64_t)rank << 32 | i;
    }
    for (size_t i = heap.count / 2; i-- > 0;) heap_sink(&heap, i);
    while (heap.count) {
        uint64_t candidate = heap_pop(&heap);
        int32_t at = (int32_t)(uint32_t)candidate, next = symbols[at].next;
        if (symbols[at].id < 0 || next < 0) continue;
        const perk_merge *merge = find_merge(bpe, symbols[at].id, symbols[next].id);
        if (merge->rank != candidate >> 32) continue;
        symbols[at].id = merge->result;
        symbols[at].next = symbols[next].next;
        if (symbols[at].next >= 0) symbols[symbols[at].next].previous = at;
        symbols[next].id = -1;
        push_candidate(&heap, bpe, symbols, symbols[at].previous);
        push_candidate(&heap, bpe, symbols, at);
    }
    size_t kept = 0;
    for (int32_t at = 0; at >= 0; at = symbols[at].next) ids[kept++] = symbols[at].id;
    return kept;
}

/* ---- a run
 * -------------------------------------------------------------------------------------------------------------- */

perk_status perk_bpe_begin(perk_bpe_run *run, const perk_bpe *bpe, const perk_vocab *vocab, size_t text_size,
                           perk_error *err) {
    *run = (perk_bpe_run){.bpe = bpe, .vocab = vocab, .seen_count = 16};
    while (run->seen_count < MAX_SEEN && run->seen_count < text_size / 8) run->seen_count *= 2;
    run->seen = perk_calloc(run->seen_count, sizeof *run->seen);
    run->capacity = text_size / 3 + 16;
    run->ids = perk_realloc_array(NULL, run->capacity, sizeof *run->ids);
    if (run->seen && run->ids) return PERK_OK;
    perk_bpe_end(run);
    return perk_fail_memory(err, "encoding a text");
}

void perk_bpe_end(perk_bpe_run *run) {
    free(run->ids);
    free(run->seen);
    free(run->scratch);
    *run = (perk_bpe_run){0};
}

static bool reserve_ids(perk_bpe_run *run, size_t extra) {
    if (extra <= run->capacity - run->count) return true;
    size_t capacity = PERK_MAX(run->capacity + run->capacity / 2, run->count + extra);
    int32_t *ids = perk_realloc_array(run->ids, capacity, sizeof *ids);
    if (!ids) return false;
    run->ids = ids;
    run->capacity = capacity;
    return true;
}

bool perk_bpe_push(perk_bpe_run *run, int32_t id) {
    if (!reserve_ids(run, 1)) return false;
    run->ids[run->count++] = id;
    return true;
}

/* The token of the model that the whole word is; -1: none, -2: out of memory. */
static int32_t find_whole(const perk_bpe_run *run, const char *word, size_t size) {
    char text[256];
    if (run->bpe->spelling == PERK_SPELLED_AS_CHARACTERS) return perk_vocab_find_model(run->vocab, word, size);
    if (size * 2 > sizeof text && size > run->vocab->longest) return -1;
    char *spelled = size * 2 <= sizeof text ? text : malloc(size * 2);
    if (!spelled) return -2;
    size_t length = 0;
    for (size_t i = 0; i < size; i++) length += perk_byte_character((uint8_t)word[i], spelled + length);
    int32_t id = perk_vocab_find_model(run->vocab, spelled, length);
    if (spelled != text) free(spelled);
    return id;
}

/* Writes the tokens of the bytes, of those that have one; returns how many. */
static size_t byte_symbols(const perk_vocab *vocab, const char *bytes, size_t size, int32_t *ids) {
    size_t count = 0;
    for (size_t i = 0; i < size; i++) {
        ids[count] = vocab->byte_ids[(uint8_t)bytes[i]];
        count += ids[count] >= 0; /* a byte that the vocabulary lacks gives nothing */
    }
    return count;
}

/* Writes the tokens of the characters, never more than there are bytes; returns how many. The unknown token comes once
 * a known character or the end of the word follows: after the bytes of characters that fall back to them. */
static size_t character_symbols(const perk_bpe *bpe, const perk_vocab *vocab, const char *word, size_t size,
                                int32_t *ids) {
    size_t count = 0;
    bool unknown = false;
    for (size_t i = 0, length; i < size; i += length) {
        int32_t c = perk_utf8_next(word + i, &length);
        int32_t id = c < 128 ? vocab->ascii_ids[c] : perk_vocab_find_model(vocab, word + i, length);
        if (id < 0 && bpe->byte_fallback && byte_symbols(vocab, word + i, length, ids + count) == length) {
            count += length;
        } else if (id >= 0) {
            if (unknown) ids[count++] = bpe->unknown_id;
            ids[count++] = id;
            unknown = false;
        } else if (bpe->unknown_id >= 0) {
            if (unknown && !bpe->fuse_unknown) ids[count++] = bpe->unknown_id;
            unknown = true;
        }
    }
    if (unknown) ids[count++] = bpe->unknown_id;
    return count;
}

/* Encodes a word that was not seen before. */
static bool encode_word(perk_bpe_run *run, const char *word, size_t size) {
    if (run->bpe->ignore_merges) {
        int32_t whole = find_whole(run, word, size);
        if (whole == -2) return false;
        if (whole >= 0) return perk_bpe_push(run, whole);
    }
    if (!reserve_ids(run, size)) return false;
    int32_t *ids = run->ids + run->count;
    size_t count = run->bpe->spelling == PERK_SPELLED_AS_BYTES
                       ? byte_symbols(run->vocab, word, size, ids)
                       : character_symbols(run->bpe, run->vocab, word, size, ids);
    if (count <= SHORT_WORD) {
        run->count += merge_short(run->bpe, ids, count);
        return true;
    }
    size_t each = sizeof(symbol) + 3 * sizeof(uint64_t);
    if (count > SIZE_MAX / each) return false;
    if (run->scratch_size < count * each) {
        free(run->scratch);
        run->scratch_size = 0;
        run->scratch = malloc(count * each);
        if (!run->scratch) return false;
        run->scratch_size = count * each;
    }
    uint64_t *candidates = run->scratch;
    run->count += merge_long(run->bpe, ids, count, (symbol *)(candidates + 3 * count), candidates);
    return true;
}

/* Encodes a word, or copies what it gave before. */
static bool encode_part(perk_bpe_run *run, const char *word, size_t size) {
    uint64_t hash = XXH3_64bits(word, size);
    perk_bpe_seen *seen = &run->seen[hash & (run->seen_count - 1)];
    if (seen->hash == hash && seen->size == size && seen->word && memcmp(seen->word, word, size) == 0) {
        if (!reserve_ids(run, seen->count)) return false;
        memcpy(run->ids + run->count, run->ids + seen->first, seen->count * sizeof *run->ids);
        run->count += seen->count;
        return true;
    }
    size_t first = run->count;
    if (!encode_word(run, word, size)) return false;
    *seen = (perk_bpe_seen){hash, word, (uint32_t)size, (uint32_t)(run->count - first), first};
    return true;
}

/* The first mark in [from, end) that does not follow another; `end` when there is none. */
static const char *next_cut(const char *begin, const char *from, const char *end) {
    const size_t mark = strlen(PERK_SPACE_MARK);
    for (const char *found; (found = memmem(from, (size_t)(end - from), PERK_SPACE_MARK, mark)); from = found + mark)
        if ((size_t)(found - begin) < mark || memcmp(found - mark, PERK_SPACE_MARK, mark) != 0) return found;
    return end;
}

bool perk_bpe_word(perk_bpe_run *run, const char *word, size_t size) {
    if (!run->bpe->cuts_at_marks) return encode_part(run, word, size);
    const char *end = word + size;
    for (const char *cut; word < end; word = cut) {
        cut = next_cut(word, word + 1, end); /* what is joined to nothing before it is a word of its own */
        if (!encode_part(run, word, (size_t)(cut - word))) return false;
    }
    return true;
}
