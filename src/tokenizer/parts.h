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

/* A token has at least one of the first two. */
enum { PERK_TOKEN_MODEL = 1, PERK_TOKEN_ADDED = 2, PERK_TOKEN_SPECIAL = 4 };

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
    size_t longest;        /* bytes of the longest text */
    int32_t byte_ids[256]; /* the token of each byte, -1 none; set by perk_vocab_finish */
} perk_vocab;

perk_status perk_vocab_init(perk_vocab *vocab, size_t expected, perk_error *err);
/* PERK_BAD_FORMAT when the id or the text is taken by another token, or the id is out of range. Adding the same token
 * again only adds flags. */
perk_status perk_vocab_add(perk_vocab *vocab, const char *text, size_t size, int64_t id, uint32_t flags,
                           perk_error *err);
int32_t perk_vocab_find(const perk_vocab *vocab, const char *text, size_t size); /* -1 none */
void perk_vocab_finish(perk_vocab *vocab);
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

typedef struct perk_bpe {
    perk_merge *slots; /* open addressing: (left, right) */
    size_t slot_count;
    bool ignore_merges; /* a word that is a token is that token, whatever the merges say */
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

typedef struct perk_split_step {
    pcre2_code *pattern; /* NULL: the piece passes whole */
    perk_split_behavior behavior;
    bool invert;
    bool prefix_space; /* first put a space before a piece that does not begin with one */
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

perk_status perk_split(const perk_splitter *splitter, size_t step, const char *piece, size_t size);

/* ---- the whole (tokenizer.c)
 * ------------------------------------------------------------------------------------------------ */

#define PERK_MAX_STEPS 16 /* bounds the recursion of perk_split */
#define PERK_MAX_NORMALIZERS 16

typedef struct perk_id_list {
    int32_t *ids;
    size_t count;
} perk_id_list;

struct perk_tokenizer {
    perk_vocab vocab;
    perk_bpe bpe;
    perk_normal_form normalizers[PERK_MAX_NORMALIZERS];
    size_t normalizer_count;
    perk_added_token *added;
    size_t added_count;
    perk_trie raw_trie;        /* tokens looked for in the text as it comes */
    perk_trie normalized_trie; /* tokens looked for after the normalizer */
    perk_split_step steps[PERK_MAX_STEPS];
    size_t step_count;
    bool byte_level, decodes_bytes; /* a ByteLevel pre-tokenizer, a ByteLevel decoder was read */
    perk_id_list prefix, suffix;    /* the post-processor's template */
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
