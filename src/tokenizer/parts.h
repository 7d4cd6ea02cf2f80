/* The parts of a tokenizer and the way of a text through them:
 *     added tokens -> normalizer -> added tokens again -> pre-tokenizer (words) -> BPE (ids) -> template
 * One file a part; tokenizer.c has the whole, load.c builds it from JSON. */
#ifndef PERK_TOKENIZER_PARTS_H
#define PERK_TOKENIZER_PARTS_H

#include "base.h"
#include "perk/tokenizer.h"

#include <pcre2.h>

/* ---- vocabulary (vocab.c): texts, ids, and the bytes that an id stands for ----------------------------------------
 */

/* A token has at least one of the first two. PERK_TOKEN_BYTE: it stands for a byte, which may be part of a character.
 */
enum { PERK_TOKEN_MODEL = 1, PERK_TOKEN_ADDED = 2, PERK_TOKEN_SPECIAL = 4, PERK_TOKEN_BYTE = 8 };

/* How tokens spell what they stand for. */
typedef enum perk_spelling {
    PERK_SPELLED_AS_BYTES,      /* ByteLevel: every byte is one printable character */
    PERK_SPELLED_AS_CHARACTERS, /* SentencePiece: as it is, "<0x0A>" for a byte */
} perk_spelling;

/* Every `pattern` becomes `content`. Both are NUL-terminated beyond their size; no pattern: nothing is replaced. */
typedef struct perk_replacement {
    char *pattern, *content;
    size_t pattern_size, content_size;
} perk_replacement;

#define PERK_MAX_TOKEN_ID ((1 << 24) - 1)

typedef struct perk_token {
    uint32_t text, text_size;   /* in the pool: as tokenizer.json spells it, NUL-terminated */
    uint32_t bytes, bytes_size; /* in the pool: what it decodes to */
    uint32_t flags;
} perk_token;

typedef struct perk_vocab {
    perk_token *tokens; /* indexed by id; gaps have no flags */
    size_t count, capacity;
    perk_buffer pool;
    int32_t *slots; /* open addressing: text -> id, -1 empty */
    size_t slot_count, slots_used;
    size_t longest;         /* bytes of the longest text */
    int32_t byte_ids[256];  /* the model's token of each byte, -1 none; set by perk_vocab_finish */
    int32_t ascii_ids[128]; /* the model's token of each of these characters, -1 none; set by perk_vocab_finish */
} perk_vocab;

perk_status perk_vocab_init(perk_vocab *vocab, size_t expected, perk_error *err);
/* PERK_BAD_FORMAT when the id or the text is taken by another token, or the id is out of range. Adding the same token
 * again only adds flags. */
perk_status perk_vocab_add(perk_vocab *vocab, const char *text, size_t size, int64_t id, uint32_t flags,
                           perk_error *err);
int32_t perk_vocab_find(const perk_vocab *vocab, const char *text, size_t size);       /* -1 none */
int32_t perk_vocab_find_model(const perk_vocab *vocab, const char *text, size_t size); /* of the model's tokens */
/* Once all tokens are there: what each decodes to. `replaced` is done in tokens that are spelled as characters, and
 * `has_bytes` says that some of them stand for bytes. */
perk_status perk_vocab_finish(perk_vocab *vocab, perk_spelling spelling, const perk_replacement *replaced,
                              bool has_bytes, perk_error *err);
void perk_vocab_free(perk_vocab *vocab);

/* The printable character that stands for a byte in byte-level vocabularies, in UTF-8; returns its length, 1 or 2. */
size_t perk_byte_character(uint8_t byte, char out[2]);

/* ---- BPE (bpe.c) ---------------------------------------------------------------------------------------------------
 */

typedef struct perk_merge {
    int32_t left, right; /* left -1: an empty slot */
    uint32_t rank;
    int32_t result;
} perk_merge;

/* What SentencePiece writes for a space: it begins a word. */
#define PERK_SPACE_MARK "\xE2\x96\x81" /* U+2581 */

typedef struct perk_bpe {
    perk_merge *slots; /* open addressing: (left, right) */
    size_t slot_count;
    perk_spelling spelling; /* what a word is made of to begin with: bytes or characters */
    bool ignore_merges;     /* a word that is a token is that token, whatever the merges say */
    /* Of characters that are no token: */
    bool byte_fallback; /* they become the tokens of their bytes, where there are all of them, */
    int32_t unknown_id; /* else this token; -1: nothing */
    bool fuse_unknown;  /* one for all that follow each other */
    bool cuts_at_marks; /* no merge joins a space mark to another character before it */
} perk_bpe;

perk_status perk_bpe_init(perk_bpe *bpe, size_t merge_count, perk_error *err);
void perk_bpe_add(perk_bpe *bpe, int32_t left, int32_t right, uint32_t rank, int32_t result);
void perk_bpe_free(perk_bpe *bpe);

/* Scratch of one encode call. Words seen before are copied from where their ids lie in `ids`. */
typedef struct perk_bpe_seen {
    uint64_t hash;
    const char *word;
    uint32_t size, count;
    size_t first;
} perk_bpe_seen;

typedef struct perk_bpe_run {
    const perk_bpe *bpe;
    const perk_vocab *vocab;
    int32_t *ids;
    size_t count, capacity;
    perk_bpe_seen *seen;
    size_t seen_count; /* a power of two */
    void *scratch;
    size_t scratch_size;
} perk_bpe_run;

/* `text_size` is how much text is to come, for the size of the tables. */
perk_status perk_bpe_begin(perk_bpe_run *run, const perk_bpe *bpe, const perk_vocab *vocab, size_t text_size,
                           perk_error *err);
/* Appends the word's ids. The word's memory must stay in place until perk_bpe_end. False: out of memory. */
bool perk_bpe_word(perk_bpe_run *run, const char *word, size_t size);
bool perk_bpe_push(perk_bpe_run *run, int32_t id);
void perk_bpe_end(perk_bpe_run *run); /* frees the tables and `ids`, unless the caller took them and set NULL */

/* ---- normalizer (normalize.c) ---------------------------------------------------------------------------------------
 */

typedef enum perk_normal_form { PERK_NFC, PERK_NFD, PERK_NFKC, PERK_NFKD } perk_normal_form;

typedef enum perk_normalizer_kind {
    PERK_NORMALIZE_FORM,
    PERK_NORMALIZE_PREPEND,
    PERK_NORMALIZE_REPLACE
} perk_normalizer_kind;

typedef struct perk_normalizer {
    perk_normalizer_kind kind;
    perk_normal_form form;
    perk_replacement replaced; /* PREPEND: its content comes first, unless the text is empty */
} perk_normalizer;

/* How long a text may become when things in it are replaced: a hostile file could make gigabytes of a line. */
static inline size_t perk_grown_limit(size_t size) {
    return size > (INT32_MAX - 65536) / 64 ? INT32_MAX : size * 64 + 65536;
}

/* Appends `text` with everything replaced; stops where `out` has become longer than `limit`. */
void perk_replace(const perk_replacement *replaced, const char *text, size_t size, size_t limit, perk_buffer *out);
void perk_replacement_free(perk_replacement *replaced);

/* Appends well-formed `text` in the given form. PERK_OUT_OF_MEMORY is the only failure. */
perk_status perk_normalize(perk_normal_form form, const char *text, size_t size, perk_buffer *out, perk_error *err);

/* ---- added tokens (added.c): the longest token at the leftmost place
 * --------------------------------------------------- */

typedef struct perk_added_token {
    int32_t id;
    bool single_word, lstrip, rstrip, normalized;
} perk_added_token;

typedef struct perk_trie_node {
    int32_t child, sibling; /* -1 none */
    int32_t token;          /* index of the added token that ends here, -1 none */
    uint8_t byte;
} perk_trie_node;

typedef struct perk_trie {
    perk_trie_node *nodes; /* nodes[0] is the root */
    size_t count, capacity;
    bool starts[256]; /* bytes that begin a token */
} perk_trie;

/* The last to add a text has it. False: out of memory. */
bool perk_trie_add(perk_trie *trie, const char *text, size_t size, int32_t token);
void perk_trie_free(perk_trie *trie);

/* Calls `plain` for the stretches between tokens and `token` for the tokens, in order; stops when one fails. */
typedef struct perk_added_visitor {
    perk_status (*plain)(void *user, const char *text, size_t size);
    perk_status (*token)(void *user, int32_t id);
    void *user;
} perk_added_visitor;
perk_status perk_added_split(const perk_trie *trie, const perk_added_token *tokens, const char *text, size_t size,
                             const perk_added_visitor *visitor);

/* ---- patterns (pattern.c): regular expressions in Oniguruma's dialect, run by PCRE2
 * -------------------------------------- */

perk_status perk_pattern_compile(const char *pattern, size_t size, pcre2_code **out, perk_error *err);
/* The pattern that matches `text` itself. */
perk_status perk_pattern_compile_literal(const char *text, size_t size, pcre2_code **out, perk_error *err);

/* Scratch of one encode call, shared by all patterns. */
typedef struct perk_matcher {
    pcre2_match_data *data;
    pcre2_match_context *limits;
} perk_matcher;

perk_status perk_matcher_init(perk_matcher *matcher, perk_error *err);
void perk_matcher_free(perk_matcher *matcher);
/* Searches `text` from `start`. 1: found at [*begin, *end); 0: no match; -1: `err` is filled. */
int perk_matcher_find(perk_matcher *matcher, const pcre2_code *pattern, const char *text, size_t size, size_t start,
                      size_t *begin, size_t *end, perk_error *err);

/* ---- pre-tokenizer (split.c): steps, each splitting every piece of the one before
 * ------------------------------------------ */

typedef enum perk_split_behavior {
    PERK_SPLIT_ISOLATED,
    PERK_SPLIT_REMOVED,
    PERK_SPLIT_MERGED_WITH_PREVIOUS,
    PERK_SPLIT_MERGED_WITH_NEXT,
    PERK_SPLIT_CONTIGUOUS,
} perk_split_behavior;

typedef enum perk_prepend_scheme { PERK_PREPEND_NEVER, PERK_PREPEND_FIRST, PERK_PREPEND_ALWAYS } perk_prepend_scheme;

/* A piece's spaces become marks, a piece without a mark in front gets one, and then it is cut. */
typedef struct perk_split_step {
    char mark[8];                /* a character; empty: spaces stay and `prepend` is NEVER */
    perk_prepend_scheme prepend; /* FIRST: to the piece that the text begins with */
    pcre2_code *pattern;         /* NULL: the piece passes whole */
    perk_split_behavior behavior;
    bool invert;
} perk_split_step;

/* Memory that lives as long as an encode call. */
typedef struct perk_arena_block perk_arena_block;
typedef struct perk_arena {
    perk_arena_block *blocks;
    size_t used, size; /* of the newest block */
} perk_arena;
char *perk_arena_take(perk_arena *arena, size_t size); /* NULL: out of memory */
void perk_arena_free(perk_arena *arena);

typedef struct perk_splitter {
    const perk_split_step *steps;
    size_t step_count;
    perk_matcher *matcher;
    perk_arena *arena;
    perk_bpe_run *words; /* where finished words go */
    perk_error *err;
} perk_splitter;

/* `at_start`: the text begins with this piece. */
perk_status perk_split(const perk_splitter *splitter, size_t step, const char *piece, size_t size, bool at_start);

/* ---- the whole (tokenizer.c)
 * ------------------------------------------------------------------------------------------------ */

#define PERK_MAX_STEPS 16 /* bounds the recursion of perk_split */
#define PERK_MAX_NORMALIZERS 16

typedef struct perk_id_list {
    int32_t *ids;
    size_t count;
} perk_id_list;

/* What is done with the texts of tokens, in this order. */
typedef struct perk_decoder {
    int stage;                 /* how far reading it has come; 0: there is none */
    bool byte_level;           /* they are bytes, a printable character each */
    perk_replacement replaced; /* in every token; */
    bool drops_first;          /* in the first token, the pattern is left out instead */
    bool byte_fallback;        /* tokens like "<0x0A>" are bytes: a run of them is text if it is UTF-8 */
    bool fuse;
    char strip[8];      /* a character that is left out at the beginning of the text, */
    size_t strip_count; /* at most so many times */
} perk_decoder;

struct perk_tokenizer {
    perk_vocab vocab;
    perk_bpe bpe;
    perk_normalizer normalizers[PERK_MAX_NORMALIZERS];
    size_t normalizer_count;
    perk_added_token *added;
    size_t added_count;
    perk_trie raw_trie;        /* tokens looked for in the text as it comes */
    perk_trie normalized_trie; /* tokens looked for after the normalizer */
    perk_split_step steps[PERK_MAX_STEPS];
    size_t step_count;
    bool byte_level; /* a ByteLevel pre-tokenizer was read */
    perk_decoder decoder;
    perk_id_list prefix, suffix; /* the post-processor's template */
    int32_t bos_id, eos_id;
};

/* Fills `tokenizer` (zeroed) from the text of a tokenizer.json; on failure the caller frees what is there. */
perk_status perk_tokenizer_read_json(perk_tokenizer *tokenizer, const char *json, size_t size, perk_error *err);
/* Takes the names of special tokens from the text of a tokenizer_config.json. */
perk_status perk_tokenizer_read_config(perk_tokenizer *tokenizer, const char *json, size_t size, perk_error *err);
/* Runs the tokenizer's normalizers; on success `*out` is `text` itself or memory in the arena. */
perk_status perk_tokenizer_normalize(const perk_tokenizer *tokenizer, perk_arena *arena, const char *text, size_t size,
                                     const char **out, size_t *out_size, perk_error *err);

#endif
