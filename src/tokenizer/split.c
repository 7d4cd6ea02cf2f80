#include "parts.h"

struct perk_arena_block {
    perk_arena_block *older;
    char data[];
};

char *perk_arena_take(perk_arena *arena, size_t size) {
    if (!arena->blocks || size > arena->size - arena->used) {
        size_t room = PERK_MAX(size, (size_t)1 << 16);
        perk_arena_block *block = room > SIZE_MAX / 2 ? NULL : malloc(sizeof *block + room);
        if (!block) return NULL;
        block->older = arena->blocks;
        *arena = (perk_arena){.blocks = block, .used = 0, .size = room};
    }
    char *taken = arena->blocks->data + arena->used;
    arena->used += size;
    return taken;
}

void perk_arena_free(perk_arena *arena) {
    while (arena->blocks) {
        perk_arena_block *older = arena->blocks->older;
        free(arena->blocks);
        arena->blocks = older;
    }
    *arena = (perk_arena){0};
}

/* A pattern cuts a piece into segments that match and segments between matches; the behaviour says which of them stay
 * and which join their neighbour. `begin`..`end` is the segment that is still open. */
typedef struct cutter {
    const perk_split_step *step;
    const char *piece;
    size_t begin, end;
    bool at_start;      /* the text begins with the piece */
    bool open, matched; /* `matched`: the last segment matched */
} cutter;

static bool joins_previous(const cutter *cut, bool matches) {
    if (!cut->open) return false;
    switch (cut->step->behavior) {
    case PERK_SPLIT_CONTIGUOUS: return matches == cut->matched;
    case PERK_SPLIT_MERGED_WITH_PREVIOUS: return matches && !cut->matched;
    case PERK_SPLIT_MERGED_WITH_NEXT: return !matches && cut->matched;
    default: return false;
    }
}

/* Passes the open segment to the next step. */
static perk_status close_segment(const perk_splitter *splitter, size_t step, cutter *cut) {
    if (!cut->open) return PERK_OK;
    cut->open = false;
    return perk_split(splitter, step + 1, cut->piece + cut->begin, cut->end - cut->begin,
                      cut->at_start && cut->begin == 0);
}

static perk_status add_segment(const perk_splitter *splitter, size_t step, cutter *cut, size_t begin, size_t end,
                               bool matches) {
    perk_status status = PERK_OK;
    matches ^= cut->step->invert;
    if (joins_previous(cut, matches)) {
        cut->end = end;
    } else {
        status = close_segment(splitter, step, cut);
        cut->open = !(matches && cut->step->behavior == PERK_SPLIT_REMOVED);
        cut->begin = begin;
        cut->end = end;
    }
    cut->matched = matches;
    return status;
}

static size_t character_length(const char *text) {
    uint8_t lead = (uint8_t)*text;
    return lead < 0xC0 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
}

/* The pattern sees the piece alone: lookarounds end at its ends. An empty match right after a match does not count. */
static perk_status cut_piece(const perk_splitter *splitter, size_t step, const char *piece, size_t size,
                             bool at_start) {
    cutter cut = {.step = &splitter->steps[step], .piece = piece, .at_start = at_start};
    perk_status status = PERK_OK;
    size_t done = 0, search = 0, begin, end;
    bool any = false;
    while (search <= size && status == PERK_OK) {
        int found =
            perk_matcher_find(splitter->matcher, cut.step->pattern, piece, size, search, &begin, &end, splitter->err);
        if (found < 0) return splitter->err ? splitter->err->status : PERK_LIMIT;
        if (!found) break;
        if (begin == end && any && end == done) {
            search += search < size ? character_length(piece + search) : 1;
            continue;
        }
        if (begin > done) status = add_segment(splitter, step, &cut, done, begin, false);
        if (status == PERK_OK) status = add_segment(splitter, step, &cut, begin, end, true);
        done = search = end;
        any = true;
    }
    if (status == PERK_OK && done < size) status = add_segment(splitter, step, &cut, done, size, false);
    return status == PERK_OK ? close_segment(splitter, step, &cut) : status;
}

static bool begins_with(const char *piece, size_t size, const char *mark, size_t mark_size) {
    return size >= mark_size && memcmp(piece, mark, mark_size) == 0;
}

/* Puts the step's mark in the place of spaces and, where the step wants it, in front. */
static perk_status mark_piece(const perk_splitter *splitter, const perk_split_step *step, const char **piece,
                              size_t *size, bool at_start) {
    const char *text = *piece, *end = text + *size;
    size_t mark_size = strlen(step->mark), spaces = 0;
    bool prefix = step->prepend == PERK_PREPEND_ALWAYS || (step->prepend == PERK_PREPEND_FIRST && at_start);
    prefix = prefix && *text != ' ' && !begins_with(text, *size, step->mark, mark_size);
    if (strcmp(step->mark, " ") != 0)
        for (const char *p = text; p < end; p++) spaces += *p == ' ';
    if (!mark_size || (!prefix && !spaces)) return PERK_OK;
    size_t marked_size = *size + spaces * (mark_size - 1) + (prefix ? mark_size : 0);
    if (marked_size > INT32_MAX)
        return perk_fail(splitter->err, PERK_LIMIT,
                         "the text is %zu bytes long with its spaces marked; the limit is %d", marked_size, INT32_MAX);
    char *marked = perk_arena_take(splitter->arena, marked_size), *out = marked;
    if (!marked) return perk_fail_memory(splitter->err, "encoding a text");
    if (prefix) out = mempcpy(out, step->mark, mark_size);
    for (const char *space; text < end; text = space + (space < end)) {
        space = spaces ? memchr(text, ' ', (size_t)(end - text)) : NULL;
        if (!space) space = end;
        out = mempcpy(out, text, (size_t)(space - text));
        if (space < end) out = mempcpy(out, step->mark, mark_size);
    }
    *piece = marked;
    *size = marked_size;
    return PERK_OK;
}

perk_status perk_split(const perk_splitter *splitter, size_t step, const char *piece, size_t size, bool at_start) {
    if (!size) return PERK_OK;
    if (step == splitter->step_count)
        return perk_bpe_word(splitter->words, piece, size) ? PERK_OK
                                                           : perk_fail_memory(splitter->err, "encoding a text");
    const perk_split_step *this = &splitter->steps[step];
    perk_status status = mark_piece(splitter, this, &piece, &size, at_start);
    if (status != PERK_OK) return status;
    return this->pattern ? cut_piece(splitter, step, piece, size, at_start)
                         : perk_split(splitter, step + 1, piece, size, at_start);
}
