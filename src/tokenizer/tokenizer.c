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
    for (size_t i = 0; i < tokenizer->normalizer_count; i++) perk_replacement_free(&tokenizer->normalizers[i].replaced);
    perk_replacement_free(&tokenizer->decoder.replaced);
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
    const char *begin;            /* of the whole text, */
    const char *normalized_begin; /* and of it when normalized; NULL: the stretch at hand is another */
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
    return perk_split(&encode->splitter, 0, text, size, text == encode->normalized_begin);
}

static bool is_ascii(const char *text, size_t size) {
    size_t ascii = 0;
    while (ascii < size && (uint8_t)text[ascii] < 0x80) ascii++;
    return ascii == size;
}

static perk_status run_normalizer(const perk_normalizer *normalizer, const char *text, size_t size, size_t limit,
                                  perk_buffer *out, perk_error *err) {
    switch (normalizer->kind) {
    case PERK_NORMALIZE_FORM: return perk_normalize(normalizer->form, text, size, out, err);
    case PERK_NORMALIZE_PREPEND:
        perk_buffer_append(out, normalizer->replaced.content, normalizer->replaced.content_size);
        perk_buffer_append(out, text, size);
        break;
    case PERK_NORMALIZE_REPLACE: perk_replace(&normalizer->replaced, text, size, limit, out); break;
    }
    return out->failed ? perk_fail_memory(err, "normalizing a text") : PERK_OK;
}

perk_status perk_tokenizer_normalize(const perk_tokenizer *tokenizer, perk_arena *arena, const char *text, size_t size,
                                     const char **out, size_t *out_size, perk_error *err) {
    *out = text;
    *out_size = size;
    size_t limit = perk_grown_limit(size); /* at most INT32_MAX, by which words are indexed */
    for (size_t i = 0; i < tokenizer->normalizer_count; i++) {
        const perk_normalizer *normalizer = &tokenizer->normalizers[i];
        if (*out_size == 0) return PERK_OK;
        if (normalizer->kind == PERK_NORMALIZE_FORM && is_ascii(*out, *out_size)) continue; /* in every normal form */
        perk_buffer buffer = {0};
        perk_status status = run_normalizer(normalizer, *out, *out_size, limit, &buffer, err);
        if (status == PERK_OK && buffer.size > limit)
            status = perk_fail(err, PERK_LIMIT, "the text is %zu bytes long when normalized; the limit is %zu",
                               buffer.size, limit);
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
    bool at_start = text == encode->begin;
    perk_status status = perk_tokenizer_normalize(tokenizer, &encode->arena, text, size, &text, &size, encode->err);
    encode->normalized_begin = at_start ? text : NULL;
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
    encode->begin = text;
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

/* Ids become bytes, and bytes become text once it is sure what they are. */
typedef struct text_decoder {
    const perk_tokenizer *tokenizer;
    bool skip_special;
    bool begun;          /* a token was seen */
    size_t strip_left;   /* characters that may still be left out at the beginning */
    perk_buffer waiting; /* bytes of an unfinished character; with byte fallback, of an unfinished run of byte tokens */
} text_decoder;

static void decode_begin(text_decoder *decoder) {
    decoder->begun = false;
    decoder->strip_left = decoder->tokenizer->decoder.strip_count;
    decoder->waiting.size = 0;
}

/* Appends text less what is left out at the beginning. */
static void decode_text(text_decoder *decoder, const char *text, size_t size, perk_buffer *out) {
    const char *strip = decoder->tokenizer->decoder.strip;
    size_t length = strlen(strip);
    for (; decoder->strip_left && size >= length && memcmp(text, strip, length) == 0; decoder->strip_left--) {
        text += length;
        size -= length;
    }
    if (size) decoder->strip_left = 0;
    perk_buffer_append(out, text, size);
}

/* A run of byte tokens is text when all of it is UTF-8, and else as many U+FFFD as there are tokens. */
static void decode_run(text_decoder *decoder, perk_buffer *out) {
    perk_buffer *run = &decoder->waiting;
    if (!run->size) return;
    bool valid = perk_utf8_valid(run->data, run->size);
    if (valid) decode_text(decoder, run->data, run->size, out);
    for (size_t i = 0; !valid && i < run->size; i++)
        decode_text(decoder, PERK_REPLACEMENT, strlen(PERK_REPLACEMENT), out);
    run->size = 0;
}

/* Appends what of the waiting bytes is text by now. */
static void decode_characters(text_decoder *decoder, bool final, perk_buffer *out) {
    perk_buffer *waiting = &decoder->waiting;
    if (!waiting->size || waiting->failed) return;
    size_t used = perk_utf8_repair(waiting->data, waiting->size, final, out);
    waiting->size -= used;
    memmove(waiting->data, waiting->data + used, waiting->size);
}

static void decode_id(text_decoder *decoder, int32_t id, perk_buffer *out) {
    const perk_tokenizer *tokenizer = decoder->tokenizer;
    const perk_token *token = find_token(tokenizer, id);
    if (!token || (decoder->skip_special && (token->flags & PERK_TOKEN_SPECIAL))) return;
    const char *pool = tokenizer->vocab.pool.data;
    bool first = !decoder->begun;
    decoder->begun = true;
    if (tokenizer->decoder.byte_level || (token->flags & PERK_TOKEN_BYTE)) {
        perk_buffer_append(&decoder->waiting, pool + token->bytes, token->bytes_size);
        if (tokenizer->decoder.byte_level) decode_characters(decoder, false, out);
        return;
    }
    decode_run(decoder, out);
    if (first && tokenizer->decoder.drops_first) {
        perk_replacement dropped = tokenizer->decoder.replaced;
        dropped.content_size = 0;
        perk_replace(&dropped, pool + token->text, token->text_size, SIZE_MAX, &decoder->waiting); /* which is empty */
        if (!decoder->waiting.failed) decode_text(decoder, decoder->waiting.data, decoder->waiting.size, out);
        decoder->waiting.size = 0;
    } else {
        decode_text(decoder, pool + token->bytes, token->bytes_size, out);
    }
}

static void decode_end(text_decoder *decoder, perk_buffer *out) {
    if (decoder->tokenizer->decoder.byte_level)
        decode_characters(decoder, true, out);
    else
        decode_run(decoder, out);
}

perk_status perk_tokenizer_decode(const perk_tokenizer *tokenizer, const int32_t *ids, size_t count, int skip_special,
                                  char **text, size_t *size, perk_error *err) {
    text_decoder decoder = {.tokenizer = tokenizer, .skip_special = skip_special != 0};
    perk_buffer out = {0};
    *text = NULL;
    *size = 0;
    decode_begin(&decoder);
    perk_buffer_append(&out, "", 0); /* so that even an empty text is allocated */
    for (size_t i = 0; i < count; i++) decode_id(&decoder, ids[i], &out);
    decode_end(&decoder, &out);
    bool failed = decoder.waiting.failed || out.failed;
    perk_buffer_free(&decoder.waiting);
    if (failed) {
        perk_buffer_free(&out);
        return perk_fail_memory(err, "decoding tokens");
    }
    *text = out.data;
    *size = out.size;
    return PERK_OK;
}

struct perk_text_stream {
    text_decoder decoder;
    perk_buffer out; /* what the last call gave */
};

perk_status perk_text_stream_new(perk_text_stream **out, const perk_tokenizer *tokenizer, int skip_special,
                                 perk_error *err) {
    *out = perk_calloc(1, sizeof **out);
    if (!*out) return perk_fail_memory(err, "a text stream");
    (*out)->decoder = (text_decoder){.tokenizer = tokenizer, .skip_special = skip_special != 0};
    decode_begin(&(*out)->decoder);
    return PERK_OK;
}

static perk_status give_text(perk_text_stream *stream, const char **text, size_t *size, perk_error *err) {
    if (stream->decoder.waiting.failed || stream->out.failed) return perk_fail_memory(err, "decoding tokens");
    *text = stream->out.data;
    *size = stream->out.size;
    return PERK_OK;
}

perk_status perk_text_stream_push(perk_text_stream *stream, int32_t id, const char **text, size_t *size,
                                  perk_error *err) {
    stream->out.size = 0;
    perk_buffer_append(&stream->out, "", 0);
    decode_id(&stream->decoder, id, &stream->out);
    return give_text(stream, text, size, err);
}

perk_status perk_text_stream_finish(perk_text_stream *stream, const char **text, size_t *size, perk_error *err) {
    stream->out.size = 0;
    perk_buffer_append(&stream->out, "", 0);
    decode_end(&stream->decoder, &stream->out);
    decode_begin(&stream->decoder);
    return give_text(stream, text, size, err);
}

void perk_text_stream_free(perk_text_stream *stream) {
    if (!stream) return;
    perk_buffer_free(&stream->decoder.waiting);
    perk_buffer_free(&stream->out);
    free(stream);
}
