#include "parts.h"
#include "utf8.h"

enum { MAX_TOKENIZER_FILE = 256 << 20, MAX_CONFIG_FILE = 16 << 20 };

/* ---- life -----------------------------------------------------------------------------------------------------------
 */

void perk_tokenizer_free(perk_tokenizer *tokenizer) {
    if (!tokenizer) return;
    perk_vocab_free(&tokenizer->vocab);
    perk_bpe_free(&tokenizer->bpe);
    perk_trie_free(&tokenizer->raw_trie);
    perk_trie_free(&tokenizer->normalized_trie);
    for (size_t i = 0; i < tokenizer->step_count; i++) pcre2_code_free(tokenizer->steps[i].pattern);
    free(tokenizer->added);
    free(tokenizer->prefix.ids);
    free(tokenizer->suffix.ids);
    free(tokenizer);
}

perk_status perk_tokenizer_load_buffer(perk_tokenizer **out, const char *json, size_t size, perk_error *err) {
    *out = NULL;
    perk_tokenizer *tokenizer = perk_calloc(1, sizeof *tokenizer);
    if (!tokenizer) return perk_fail_memory(err, "a tokenizer");
    tokenizer->bos_id = tokenizer->eos_id = -1;
    perk_status status = perk_tokenizer_read_json(tokenizer, json, size, err);
    if (status == PERK_OK)
        *out = tokenizer;
    else
        perk_tokenizer_free(tokenizer);
    return status;
}

static perk_status load_config(perk_tokenizer *tokenizer, const char *path, perk_error *err) {
    char *json = NULL;
    size_t size = 0;
    perk_status status = perk_read_file(path, MAX_CONFIG_FILE, &json, &size, err);
    if (status == PERK_NOT_FOUND) return PERK_OK;
    if (status != PERK_OK) return status;
    status = perk_tokenizer_read_config(tokenizer, json, size, err);
    free(json);
    return status == PERK_OK ? status : perk_fail_prefix(err, status, "%s", path);
}

perk_status perk_tokenizer_load(perk_tokenizer **out, const char *folder, perk_error *err) {
    *out = NULL;
    perk_tokenizer *tokenizer = NULL;
    char *json = NULL, *path = perk_format("%s/tokenizer.json", folder);
    char *config_path = perk_format("%s/tokenizer_config.json", folder);
    size_t size = 0;
    perk_status status = path && config_path ? PERK_OK : perk_fail_memory(err, "a path");
    if (status == PERK_OK) status = perk_read_file(path, MAX_TOKENIZER_FILE, &json, &size, err);
    if (status != PERK_OK) goto out;
    status = perk_tokenizer_load_buffer(&tokenizer, json, size, err);
    if (status != PERK_OK) {
        perk_fail_prefix(err, status, "%s", path);
        goto out;
    }
    status = load_config(tokenizer, config_path, err);
    if (status != PERK_OK) goto out;
    *out = tokenizer;
    tokenizer = NULL;
out:
    perk_tokenizer_free(tokenizer);
    free(json);
    free(path);
    free(config_path);
    return status;
}

/* ---- questions
 * ---------------------------------------------------------------------------------------------------------- */

static const perk_token *find_token(const perk_tokenizer *tokenizer, int32_t id) {
    if (id < 0 || (size_t)id >= tokenizer->vocab.count) return NULL;
    const perk_token *token = &tokenizer->vocab.tokens[id];
    return token->flags ? token : NULL;
}

int32_t perk_tokenizer_vocab_size(const perk_tokenizer *tokenizer) { return (int32_t)tokenizer->vocab.count; }

int32_t perk_tokenizer_token_id(const perk_tokenizer *tokenizer, const char *text) {
    return text ? perk_vocab_find(&tokenizer->vocab, text, strlen(text)) : -1;
}

const char *perk_tokenizer_token_text(const perk_tokenizer *tokenizer, int32_t id) {
    const perk_token *token = find_token(tokenizer, id);
    return token ? tokenizer->vocab.pool.data + token->text : NULL;
}

int perk_tokenizer_is_special(const perk_tokenizer *tokenizer, int32_t id) {
    const perk_token *token = find_token(tokenizer, id);
    return token && (token->flags & PERK_TOKEN_SPECIAL) != 0;
}

int32_t perk_tokenizer_bos_id(const perk_tokenizer *tokenizer) { return tokenizer->bos_id; }
int32_t perk_tokenizer_eos_id(const perk_tokenizer *tokenizer) { return tokenizer->eos_id; }

/* ---- encoding
 * ------------------------------------------------------------------------------------------------------------ */

typedef struct encoding {
    const perk_tokenizer *tokenizer;
    perk_bpe_run run;
    perk_matcher matcher;
    perk_arena arena;
    perk_splitter splitter;
    bool parse_special;
    perk_error *err;
} encoding;

static perk_status push_id(void *user, int32_t id) {
    encoding *encode = user;
    return perk_bpe_push(&encode->run, id) ? PERK_OK : perk_fail_memory(encode->err, "encoding a text");
}

static perk_status push_ids(encoding *encode, const perk_id_list *list) {
    perk_status status = PERK_OK;
    for (size_t i = 0; i < list->count && status == PERK_OK; i++) status = push_id(encode, list->ids[i]);
    return status;
}

static perk_status encode_normalized(void *user, const char *text, size_t size) {
    encoding *encode = user;
    return perk_split(&encode->splitter, 0, text, size);
}

perk_status perk_tokenizer_normalize(const perk_tokenizer *tokenizer, perk_arena *arena, const char *text, size_t size,
                                     const char **out, size_t *out_size, perk_error *err) {
    *out = text;
    *out_size = size;
    size_t ascii = 0;
    while (ascii < size && (uint8_t)text[ascii] < 0x80) ascii++;
    if (ascii == size) return PERK_OK; /* in every normal form */
    for (size_t i = 0; i < tokenizer->normalizer_count; i++) {
        perk_buffer buffer = {0};
        perk_status status = perk_normalize(tokenizer->normalizers[i], *out, *out_size, &buffer, err);
        if (status == PERK_OK && buffer.size > INT32_MAX) /* words are indexed by int32 */
            status = perk_fail(err, PERK_LIMIT, "the text is %zu bytes long when normalized; the limit is %d",
                               buffer.size, INT32_MAX);
        char *kept = status == PERK_OK ? perk_arena_take(arena, buffer.size) : NULL;
        if (kept && buffer.size) memcpy(kept, buffer.data, buffer.size);
        *out = kept;
        *out_size = buffer.size;
        perk_buffer_free(&buffer);
        if (!kept) return status == PERK_OK ? perk_fail_memory(err, "normalizing a text") : status;
    }
    return PERK_OK;
}

/* A stretch of the text between the tokens that are recognised in it as it came. */
static perk_status encode_raw(void *user, const char *text, size_t size) {
    encoding *encode = user;
    const perk_tokenizer *tokenizer = encode->tokenizer;
    perk_status status = perk_tokenizer_normalize(tokenizer, &encode->arena, text, size, &text, &size, encode->err);
    if (status != PERK_OK || !encode->parse_special)
        return status != PERK_OK ? status : encode_normalized(encode, text, size);
    perk_added_visitor visitor = {encode_normalized, push_id, encode};
    return perk_added_split(&tokenizer->normalized_trie, tokenizer->added, text, size, &visitor);
}

static perk_status encode_text(encoding *encode, const char *text, size_t size) {
    if (!perk_utf8_valid(text, size)) {
        perk_buffer repaired = {0};
        perk_utf8_repair(text, size, true, &repaired);
        char *kept = repaired.failed ? NULL : perk_arena_take(&encode->arena, repaired.size);
        if (kept) memcpy(kept, repaired.data, repaired.size);
        text = kept;
        size = repaired.size;
        perk_buffer_free(&repaired);
        if (!kept) return perk_fail_memory(encode->err, "encoding a text");
    }
    if (!encode->parse_special) return encode_raw(encode, text, size);
    perk_added_visitor visitor = {encode_raw, push_id, encode};
    return perk_added_split(&encode->tokenizer->raw_trie, encode->tokenizer->added, text, size, &visitor);
}

perk_status perk_tokenizer_encode(const perk_tokenizer *tokenizer, const char *text, size_t size,
                                  const perk_encode_options *options, int32_t **ids, size_t *count, perk_error *err) {
    static const perk_encode_options defaults = {1, 1};
    if (!options) options = &defaults;
    *ids = NULL;
    *count = 0;
    if (size > INT32_MAX / 3) /* repair makes a byte three, and words are indexed by int32 */
        return perk_fail(err, PERK_LIMIT, "cannot encode %zu bytes in one call; the limit is %d", size, INT32_MAX / 3);
    perk_error local; /* the callbacks report through the record, so there must be one */
    encoding encode = {.tokenizer = tokenizer, .parse_special = options->parse_special != 0, .err = err ? err : &local};
    encode.splitter = (perk_splitter){tokenizer->steps, tokenizer->step_count, &encode.matcher,
                                      &encode.arena,    &encode.run,           encode.err};
    perk_status status = perk_bpe_begin(&encode.run, &tokenizer->bpe, &tokenizer->vocab, size, err);
    if (status == PERK_OK) status = perk_matcher_init(&encode.matcher, err);
    if (status == PERK_OK && options->add_special_tokens) status = push_ids(&encode, &tokenizer->prefix);
    if (status == PERK_OK) status = encode_text(&encode, text, size);
    if (status == PERK_OK && options->add_special_tokens) status = push_ids(&encode, &tokenizer->suffix);
    if (status == PERK_OK) {
        *ids = encode.run.ids;
        *count = encode.run.count;
        encode.run.ids = NULL;
    }
    perk_bpe_end(&encode.run);
    perk_matcher_free(&encode.matcher);
    perk_arena_free(&encode.arena);
    return status;
}

/* ---- decoding
 * --------------------------------------------------------------------------------------------------------------- */

static void append_bytes(const perk_tokenizer *tokenizer, int32_t id, bool skip_special, perk_buffer *bytes) {
    const perk_token *token = find_token(tokenizer, id);
    if (!token || (skip_special && (token->flags & PERK_TOKEN_SPECIAL))) return;
    perk_buffer_append(bytes, tokenizer->vocab.pool.data + token->bytes, token->bytes_size);
}

perk_status perk_tokenizer_decode(const perk_tokenizer *tokenizer, const int32_t *ids, size_t count, int skip_special,
                                  char **text, size_t *size, perk_error *err) {
    perk_buffer bytes = {0}, out = {0};
    *text = NULL;
    *size = 0;
    for (size_t i = 0; i < count; i++) append_bytes(tokenizer, ids[i], skip_special != 0, &bytes);
    perk_buffer_append(&out, "", 0); /* so that even an empty text is allocated */
    if (!bytes.failed) perk_utf8_repair(bytes.data, bytes.size, true, &out);
    bool failed = bytes.failed || out.failed;
    perk_buffer_free(&bytes);
    if (failed) {
        perk_buffer_free(&out);
        return perk_fail_memory(err, "decoding tokens");
    }
    *text = out.data;
    *size = out.size;
    return PERK_OK;
}

struct perk_text_stream {
    const perk_tokenizer *tokenizer;
    bool skip_special;
    perk_buffer waiting; /* bytes of an unfinished character */
    perk_buffer out;     /* what the last call gave */
};

perk_status perk_text_stream_new(perk_text_stream **out, const perk_tokenizer *tokenizer, int skip_special,
                                 perk_error *err) {
    *out = perk_calloc(1, sizeof **out);
    if (!*out) return perk_fail_memory(err, "a text stream");
    (*out)->tokenizer = tokenizer;
    (*out)->skip_special = skip_special != 0;
    return PERK_OK;
}

static perk_status give_text(perk_text_stream *stream, bool final, const char **text, size_t *size, perk_error *err) {
    perk_buffer *waiting = &stream->waiting;
    stream->out.size = 0;
    perk_buffer_append(&stream->out, "", 0);
    if (waiting->size && !waiting->failed) {
        size_t used = perk_utf8_repair(waiting->data, waiting->size, final, &stream->out);
        waiting->size -= used;
        memmove(waiting->data, waiting->data + used, waiting->size);
    }
    if (waiting->failed || stream->out.failed) return perk_fail_memory(err, "decoding tokens");
    *text = stream->out.data;
    *size = stream->out.size;
    return PERK_OK;
}

perk_status perk_text_stream_push(perk_text_stream *stream, int32_t id, const char **text, size_t *size,
                                  perk_error *err) {
    append_bytes(stream->tokenizer, id, stream->skip_special, &stream->waiting);
    return give_text(stream, false, text, size, err);
}

perk_status perk_text_stream_finish(perk_text_stream *stream, const char **text, size_t *size, perk_error *err) {
    return give_text(stream, true, text, size, err);
}

void perk_text_stream_free(perk_text_stream *stream) {
    if (!stream) return;
    perk_buffer_free(&stream->waiting);
    perk_buffer_free(&stream->out);
    free(stream);
}
