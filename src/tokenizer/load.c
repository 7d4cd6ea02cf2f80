/* tokenizer.json -> perk_tokenizer. Every component that changes ids or text is either built or refused by name. */
#include "json.h"
#include "parts.h"
#include "utf8.h"

#define GPT2_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"
#define PUNCTUATION_PATTERN "[!-/:-@\\[-`{-~\\p{P}]"

/* ---- reading fields
 * ------------------------------------------------------------------------------------------------------ */

static perk_status malformed(perk_error *err, const char *where, const char *what) {
    return perk_fail(err, PERK_BAD_FORMAT, "%s %s", where, what);
}

static perk_status unsupported(perk_error *err, const char *where, const char *name) {
    return perk_fail(err, PERK_UNSUPPORTED,
                     "%s \"%.100s\" is not supported; perk reads byte-level and SentencePiece BPE tokenizers (see "
                     "perk/tokenizer.h for what they may consist of)",
                     where, name);
}

/* A boolean that may be missing (then `*value` stays). */
static perk_status read_flag(const json_t *object, const char *key, bool *value, const char *where, perk_error *err) {
    const json_t *field = json_object_get(object, key);
    if (!field) return PERK_OK;
    if (!json_is_boolean(field)) return perk_fail(err, PERK_BAD_FORMAT, "%s: \"%s\" is not true or false", where, key);
    *value = json_is_true(field);
    return PERK_OK;
}

static perk_status read_string(const json_t *object, const char *key, const char **value, size_t *size,
                               const char *where, perk_error *err) {
    const json_t *field = json_object_get(object, key);
    if (!json_is_string(field)) return perk_fail(err, PERK_BAD_FORMAT, "%s: \"%s\" is not a string", where, key);
    *value = json_string_value(field);
    *size = json_string_length(field);
    return PERK_OK;
}

static perk_status read_type(const json_t *object, const char **type, const char *where, perk_error *err) {
    size_t size;
    if (!json_is_object(object)) return malformed(err, where, "is not an object");
    return read_string(object, "type", type, &size, where, err);
}

static bool is_null(const json_t *value) { return !value || json_is_null(value); }

/* Calls `read` for the component, or for every member of the array `list_key` when it is a Sequence. */
typedef perk_status component_reader(perk_tokenizer *tokenizer, const json_t *component, const char *type,
                                     perk_error *err);
static perk_status read_component(perk_tokenizer *tokenizer, const json_t *component, const char *where,
                                  const char *list_key, component_reader *read, perk_error *err) {
    const char *type = NULL;
    perk_status status = read_type(component, &type, where, err);
    if (status != PERK_OK) return status;
    if (strcmp(type, "Sequence") != 0) return read(tokenizer, component, type, err);
    const json_t *list = json_object_get(component, list_key), *member;
    if (!json_is_array(list)) return perk_fail(err, PERK_BAD_FORMAT, "%s: \"%s\" is not a list", where, list_key);
    size_t i;
    json_array_foreach(list, i, member) {
        status = read_component(tokenizer, member, where, list_key, read, err);
        if (status != PERK_OK) return status;
    }
    return PERK_OK;
}

/* ---- vocabulary and merges
 * ------------------------------------------------------------------------------------------------- */

static perk_status read_vocab(perk_tokenizer *tokenizer, json_t *model, perk_error *err) {
    json_t *vocab = json_object_get(model, "vocab"), *id;
    if (!json_is_object(vocab)) return malformed(err, "model", "has no \"vocab\" object");
    perk_status status = perk_vocab_init(&tokenizer->vocab, json_object_size(vocab), err);
    if (status != PERK_OK) return status;
    const char *text;
    size_t size;
    json_object_keylen_foreach(vocab, text, size, id) {
        if (!json_is_integer(id))
            return perk_fail(err, PERK_BAD_FORMAT, "model: the id of \"%.60s\" is not an integer", text);
        status = perk_vocab_add(&tokenizer->vocab, text, size, json_integer_value(id), PERK_TOKEN_MODEL, err);
        if (status != PERK_OK) return perk_fail_prefix(err, status, "model");
    }
    return PERK_OK;
}

typedef struct span {
    const char *text;
    size_t size;
} span;

/* A merge is "left right" or ["left", "right"]. */
static bool read_merge(const json_t *merge, span *left, span *right) {
    const json_t *first = json_array_get(merge, 0), *second = json_array_get(merge, 1);
    if (json_is_array(merge)) {
        if (json_array_size(merge) != 2 || !json_is_string(first) || !json_is_string(second)) return false;
        *left = (span){json_string_value(first), json_string_length(first)};
        *right = (span){json_string_value(second), json_string_length(second)};
        return true;
    }
    if (!json_is_string(merge)) return false;
    const char *text = json_string_value(merge), *end = text + json_string_length(merge);
    const char *space = memchr(text, ' ', (size_t)(end - text));
    if (!space || memchr(space + 1, ' ', (size_t)(end - space - 1))) return false;
    *left = (span){text, (size_t)(space - text)};
    *right = (span){space + 1, (size_t)(end - space - 1)};
    return true;
}

static bool begins_with_mark(span text) {
    const size_t mark = strlen(PERK_SPACE_MARK);
    return text.size >= mark && memcmp(text.text, PERK_SPACE_MARK, mark) == 0;
}

static bool ends_with_mark(span text) {
    const size_t mark = strlen(PERK_SPACE_MARK);
    return text.size >= mark && memcmp(text.text + text.size - mark, PERK_SPACE_MARK, mark) == 0;
}

static perk_status add_merge(perk_tokenizer *tokenizer, size_t rank, span left, span right, perk_buffer *joined,
                             perk_error *err) {
    joined->size = 0;
    perk_buffer_append(joined, left.text, left.size);
    perk_buffer_append(joined, right.text, right.size);
    if (joined->failed) return perk_fail_memory(err, "the merges");
    span parts[3] = {left, right, {joined->data, joined->size}};
    int32_t ids[3];
    for (int i = 0; i < 3; i++) {
        ids[i] = perk_vocab_find(&tokenizer->vocab, parts[i].text, parts[i].size);
        if (ids[i] < 0)
            return perk_fail(err, PERK_BAD_FORMAT, "model: merge %zu: \"%.*s\" is not in the vocabulary", rank,
                             (int)PERK_MIN(parts[i].size, (size_t)60), parts[i].text);
    }
    perk_bpe_add(&tokenizer->bpe, ids[0], ids[1], (uint32_t)rank, ids[2]);
    if (begins_with_mark(right) && !ends_with_mark(left)) tokenizer->bpe.cuts_at_marks = false;
    return PERK_OK;
}

static perk_status read_merges(perk_tokenizer *tokenizer, const json_t *model, perk_error *err) {
    const json_t *merges = json_object_get(model, "merges"), *merge;
    if (!json_is_array(merges)) return malformed(err, "model", "has no list \"merges\"");
    perk_status status = perk_bpe_init(&tokenizer->bpe, json_array_size(merges), err);
    perk_buffer joined = {0};
    for (size_t i = 0; i < json_array_size(merges) && status == PERK_OK; i++) {
        span left = {0}, right = {0};
        merge = json_array_get(merges, i);
        if (read_merge(merge, &left, &right))
            status = add_merge(tokenizer, i, left, right, &joined, err);
        else
            status = perk_fail(err, PERK_BAD_FORMAT,
                               "model: merge %zu is neither \"left right\" nor [\"left\", \"right\"]", i);
    }
    perk_buffer_free(&joined);
    return status;
}

/* What a model may say that BPE here does not do. */
static perk_status check_model(const json_t *model, perk_error *err) {
    if (!json_is_object(model)) return malformed(err, "model", "is missing or not an object");
    const json_t *type = json_object_get(model, "type");
    if (type && !json_is_string(type)) return malformed(err, "model", "has a \"type\" that is not a string");
    if (type && strcmp(json_string_value(type), "BPE") != 0) return unsupported(err, "model", json_string_value(type));
    const json_t *dropout = json_object_get(model, "dropout");
    if (!is_null(dropout) && json_number_value(dropout) != 0) return unsupported(err, "model field", "dropout");
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < PERK_COUNT(affixes); i++) {
        const json_t *affix = json_object_get(model, affixes[i]);
        if (!is_null(affix) && !(json_is_string(affix) && json_string_length(affix) == 0))
            return unsupported(err, "model field", affixes[i]);
    }
    return PERK_OK;
}

/* What becomes of text that no token of the model spells. */
static perk_status read_unknown(perk_tokenizer *tokenizer, const json_t *model, perk_error *err) {
    perk_bpe *bpe = &tokenizer->bpe;
    const json_t *unknown = json_object_get(model, "unk_token");
    bool all_bytes = true;
    for (int byte = 0; byte < 256; byte++) all_bytes &= tokenizer->vocab.byte_ids[byte] >= 0;
    if (bpe->spelling == PERK_SPELLED_AS_BYTES) {
        bool fills_gaps = bpe->byte_fallback || !is_null(unknown);
        if (!fills_gaps || all_bytes) return PERK_OK;
        return unsupported(err, "model field", bpe->byte_fallback ? "byte_fallback" : "unk_token");
    }
    /* A character that gives nothing makes neighbours of those around it. */
    if (is_null(unknown) && !(bpe->byte_fallback && all_bytes)) bpe->cuts_at_marks = false;
    if (is_null(unknown)) return PERK_OK;
    if (!json_is_string(unknown)) return malformed(err, "model", "has an \"unk_token\" that is not a string");
    bpe->unknown_id = perk_vocab_find_model(&tokenizer->vocab, json_string_value(unknown), json_string_length(unknown));
    if (bpe->unknown_id >= 0 || (bpe->byte_fallback && all_bytes)) return PERK_OK;
    return perk_fail(err, PERK_BAD_FORMAT, "model: the unk_token \"%.60s\" is not in the vocabulary",
                     json_string_value(unknown));
}

static perk_status read_model(perk_tokenizer *tokenizer, json_t *model, perk_error *err) {
    perk_bpe *bpe = &tokenizer->bpe;
    perk_status status = check_model(model, err);
    if (status == PERK_OK) status = read_flag(model, "ignore_merges", &bpe->ignore_merges, "model", err);
    if (status == PERK_OK) status = read_flag(model, "byte_fallback", &bpe->byte_fallback, "model", err);
    if (status == PERK_OK) status = read_flag(model, "fuse_unk", &bpe->fuse_unknown, "model", err);
    if (status == PERK_OK) status = read_vocab(tokenizer, model, err);
    if (status != PERK_OK) return status;
    const size_t mark = strlen(PERK_SPACE_MARK);
    bpe->unknown_id = -1;
    bpe->spelling = tokenizer->byte_level ? PERK_SPELLED_AS_BYTES : PERK_SPELLED_AS_CHARACTERS;
    /* A merge may still take the last back. A mark that is no token would be part of what is unknown before it. */
    bpe->cuts_at_marks = bpe->spelling == PERK_SPELLED_AS_CHARACTERS && !bpe->ignore_merges &&
                         perk_vocab_find_model(&tokenizer->vocab, PERK_SPACE_MARK, mark) >= 0;
    return read_merges(tokenizer, model, err);
}

/* ---- normalizer, pre-tokenizer, decoder
 * ----------------------------------------------------------------------------------------- */

/* Copies the string at `key` of `json`, NUL-terminated. */
static perk_status copy_string(const json_t *json, const char *key, char **copy, size_t *size, const char *where,
                               perk_error *err) {
    const char *text = NULL;
    perk_status status = read_string(json, key, &text, size, where, err);
    if (status != PERK_OK) return status;
    *copy = malloc(*size + 1);
    if (!*copy) return perk_fail_memory(err, "the tokenizer");
    memcpy(*copy, text, *size + 1);
    return PERK_OK;
}

/* {"pattern": {"String": ...}, "content": ...} */
static perk_status read_replacement(const json_t *json, perk_replacement *replaced, const char *where,
                                    perk_error *err) {
    const json_t *pattern = json_object_get(json, "pattern");
    if (json_object_get(pattern, "Regex")) return unsupported(err, where, "with a \"Regex\"");
    perk_status status = copy_string(pattern, "String", &replaced->pattern, &replaced->pattern_size, where, err);
    if (status == PERK_OK)
        status = copy_string(json, "content", &replaced->content, &replaced->content_size, where, err);
    if (status == PERK_OK && !replaced->pattern_size) status = malformed(err, where, "replaces an empty text");
    return status;
}

static perk_status read_normalizer(perk_tokenizer *tokenizer, const json_t *json, const char *type, perk_error *err) {
    static const char *const names[] = {"NFC", "NFD", "NFKC", "NFKD"}; /* in the order of perk_normal_form */
    if (tokenizer->normalizer_count == PERK_MAX_NORMALIZERS)
        return perk_fail(err, PERK_LIMIT, "normalizer: more than %d", PERK_MAX_NORMALIZERS);
    perk_normalizer *normalizer = &tokenizer->normalizers[tokenizer->normalizer_count++];
    if (strcmp(type, "Replace") == 0) {
        normalizer->kind = PERK_NORMALIZE_REPLACE;
        return read_replacement(json, &normalizer->replaced, "normalizer Replace", err);
    }
    if (strcmp(type, "Prepend") == 0) {
        normalizer->kind = PERK_NORMALIZE_PREPEND;
        return copy_string(json, "prepend", &normalizer->replaced.content, &normalizer->replaced.content_size,
                           "normalizer Prepend", err);
    }
    for (size_t i = 0; i < PERK_COUNT(names); i++) {
        if (strcmp(type, names[i]) != 0) continue;
        normalizer->form = (perk_normal_form)i;
        return PERK_OK;
    }
    return unsupported(err, "normalizer", type);
}

static perk_status read_behavior(const json_t *json, perk_split_behavior *behavior, perk_error *err) {
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
    const char *name = NULL;
    size_t size;
    perk_status status = read_string(json, "behavior", &name, &size, "pre_tokenizer", err);
    if (status != PERK_OK) return status;
    for (size_t i = 0; i < PERK_COUNT(names); i++) {
        if (strcmp(name, names[i]) != 0) continue;
        *behavior = (perk_split_behavior)i;
        return PERK_OK;
    }
    return perk_fail(err, PERK_BAD_FORMAT, "pre_tokenizer: unknown behavior \"%.60s\"", name);
}

static perk_status read_split(const json_t *json, perk_split_step *step, perk_error *err) {
    const json_t *pattern = json_object_get(json, "pattern");
    const json_t *regex = json_object_get(pattern, "Regex"), *text = json_object_get(pattern, "String");
    perk_status status = read_behavior(json, &step->behavior, err);
    if (status == PERK_OK) status = read_flag(json, "invert", &step->invert, "pre_tokenizer", err);
    if (status != PERK_OK) return status;
    if (json_is_string(regex))
        status = perk_pattern_compile(json_string_value(regex), json_string_length(regex), &step->pattern, err);
    else if (json_is_string(text))
        status = perk_pattern_compile_literal(json_string_value(text), json_string_length(text), &step->pattern, err);
    else
        return malformed(err, "pre_tokenizer Split", "has no \"pattern\" with a \"Regex\" or \"String\"");
    return status == PERK_OK ? status : perk_fail_prefix(err, status, "pre_tokenizer Split");
}

static perk_status read_digits(const json_t *json, perk_split_step *step, perk_error *err) {
    bool each = false;
    perk_status status = read_flag(json, "individual_digits", &each, "pre_tokenizer Digits", err);
    const char *pattern = each ? "\\p{N}" : "\\p{N}+";
    return status == PERK_OK ? perk_pattern_compile(pattern, strlen(pattern), &step->pattern, err) : status;
}

static perk_status read_byte_level(const json_t *json, perk_split_step *step, perk_error *err) {
    bool use_regex = true, prefix_space = true;
    perk_status status = read_flag(json, "add_prefix_space", &prefix_space, "pre_tokenizer ByteLevel", err);
    if (status == PERK_OK) status = read_flag(json, "use_regex", &use_regex, "pre_tokenizer ByteLevel", err);
    strcpy(step->mark, " ");
    step->prepend = prefix_space ? PERK_PREPEND_ALWAYS : PERK_PREPEND_NEVER;
    if (status != PERK_OK || !use_regex) return status;
    return perk_pattern_compile(GPT2_PATTERN, strlen(GPT2_PATTERN), &step->pattern, err);
}

/* A string of one character. */
static perk_status read_character(const json_t *json, const char *key, char out[8], const char *where,
                                  perk_error *err) {
    const char *text = NULL;
    size_t size = 0, length = 0;
    perk_status status = read_string(json, key, &text, &size, where, err);
    if (status != PERK_OK) return status;
    if (size) perk_utf8_next(text, &length);
    if (!size || size != length || !*text)
        return perk_fail(err, PERK_BAD_FORMAT, "%s: \"%s\" is not one character", where, key);
    memcpy(out, text, size + 1);
    return PERK_OK;
}

static perk_status read_prepend_scheme(const json_t *json, perk_prepend_scheme *scheme, const char *where,
                                       perk_error *err) {
    static const char *const names[] = {"never", "first", "always"}; /* in the order of perk_prepend_scheme */
    const char *name = "always";
    size_t size;
    bool prefix = true;
    perk_status status = json_object_get(json, "prepend_scheme")
                             ? read_string(json, "prepend_scheme", &name, &size, where, err)
                             : PERK_OK;
    if (status == PERK_OK) status = read_flag(json, "add_prefix_space", &prefix, where, err);
    if (status != PERK_OK) return status;
    size_t i = 0;
    while (i < PERK_COUNT(names) && strcmp(name, names[i]) != 0) i++;
    if (i == PERK_COUNT(names))
        return perk_fail(err, PERK_BAD_FORMAT, "%s: unknown prepend_scheme \"%.60s\"", where, name);
    if (!prefix && i != PERK_PREPEND_NEVER)
        return perk_fail(err, PERK_BAD_FORMAT, "%s: add_prefix_space is false, and prepend_scheme is not \"never\"",
                         where);
    *scheme = (perk_prepend_scheme)i;
    return PERK_OK;
}

static perk_status read_metaspace(const json_t *json, perk_split_step *step, perk_error *err) {
    static const char where[] = "pre_tokenizer Metaspace";
    bool split = true;
    perk_status status = read_character(json, "replacement", step->mark, where, err);
    if (status == PERK_OK) status = read_prepend_scheme(json, &step->prepend, where, err);
    if (status == PERK_OK) status = read_flag(json, "split", &split, where, err);
    if (status != PERK_OK || !split) return status;
    step->behavior = PERK_SPLIT_MERGED_WITH_NEXT;
    return perk_pattern_compile_literal(step->mark, strlen(step->mark), &step->pattern, err);
}

static perk_status read_pre_tokenizer(perk_tokenizer *tokenizer, const json_t *json, const char *type,
                                      perk_error *err) {
    if (tokenizer->byte_level)
        return perk_fail(err, PERK_UNSUPPORTED, "pre_tokenizer \"%.60s\" after ByteLevel is not supported", type);
    if (tokenizer->step_count == PERK_MAX_STEPS)
        return perk_fail(err, PERK_LIMIT, "pre_tokenizer: more than %d", PERK_MAX_STEPS);
    perk_split_step *step = &tokenizer->steps[tokenizer->step_count++];
    if (strcmp(type, "Split") == 0) return read_split(json, step, err);
    if (strcmp(type, "Digits") == 0) return read_digits(json, step, err);
    if (strcmp(type, "Metaspace") == 0) return read_metaspace(json, step, err);
    if (strcmp(type, "Punctuation") == 0) {
        perk_status status = json_object_get(json, "behavior") ? read_behavior(json, &step->behavior, err) : PERK_OK;
        if (status != PERK_OK) return status;
        return perk_pattern_compile(PUNCTUATION_PATTERN, strlen(PUNCTUATION_PATTERN), &step->pattern, err);
    }
    if (strcmp(type, "ByteLevel") != 0) return unsupported(err, "pre_tokenizer", type);
    tokenizer->byte_level = true;
    return read_byte_level(json, step, err);
}

/* Fuse joins the pieces, which is done in any case; but what follows it sees them as one. */
static perk_status read_strip(const json_t *json, perk_decoder *decoder, perk_error *err) {
    static const char where[] = "decoder Strip";
    const json_t *start = json_object_get(json, "start"), *stop = json_object_get(json, "stop");
    if (!decoder->fuse) return unsupported(err, where, "without Fuse before it");
    if (!json_is_integer(start) || json_integer_value(start) < 0 || json_integer_value(start) > INT32_MAX)
        return malformed(err, where, "has a \"start\" that is not a number of characters");
    if (!json_is_integer(stop) || json_integer_value(stop) != 0) return unsupported(err, where, "stop");
    decoder->strip_count = (size_t)json_integer_value(start);
    return read_character(json, "content", decoder->strip, where, err);
}

static perk_status read_metaspace_decoder(const json_t *json, perk_decoder *decoder, perk_error *err) {
    static const char where[] = "decoder Metaspace";
    perk_prepend_scheme scheme = PERK_PREPEND_ALWAYS;
    char mark[8];
    perk_status status = read_character(json, "replacement", mark, where, err);
    if (status == PERK_OK) status = read_prepend_scheme(json, &scheme, where, err);
    if (status != PERK_OK) return status;
    decoder->drops_first = scheme != PERK_PREPEND_NEVER;
    decoder->replaced = (perk_replacement){perk_strdup(mark), perk_strdup(" "), strlen(mark), 1};
    return decoder->replaced.pattern && decoder->replaced.content ? PERK_OK : perk_fail_memory(err, "the decoder");
}

/* The parts come in the order of their stages, one of each, and as many Fuse as one likes; ByteLevel begins. */
static perk_status read_decoder(perk_tokenizer *tokenizer, const json_t *json, const char *type, perk_error *err) {
    static const struct decoder_part {
        const char *type;
        int stage;
    } parts[] = {{"Replace", 1}, {"Metaspace", 1}, {"ByteFallback", 2}, {"ByteLevel", 3}, {"Fuse", 3}, {"Strip", 4}};
    perk_decoder *decoder = &tokenizer->decoder;
    size_t i = 0;
    while (i < PERK_COUNT(parts) && strcmp(type, parts[i].type) != 0) i++;
    if (i == PERK_COUNT(parts)) return unsupported(err, "decoder", type);
    bool byte_level = strcmp(type, "ByteLevel") == 0, fuse = strcmp(type, "Fuse") == 0;
    int before = decoder->stage, stage = decoder->stage = parts[i].stage;
    if (stage < before || (stage == before && !fuse) || (before && byte_level) || (stage == 4 && decoder->byte_level))
        return perk_fail(err, PERK_UNSUPPORTED, "decoder \"%.60s\" in this place is not supported", type);
    if (stage == 4) return read_strip(json, decoder, err);
    if (strcmp(type, "Replace") == 0) return read_replacement(json, &decoder->replaced, "decoder Replace", err);
    if (strcmp(type, "Metaspace") == 0) return read_metaspace_decoder(json, decoder, err);
    decoder->byte_level |= byte_level;
    decoder->byte_fallback |= stage == 2;
    decoder->fuse |= fuse;
    return PERK_OK;
}

/* ---- added tokens
 * ------------------------------------------------------------------------------------------------------------------ */

static perk_status read_added_token(perk_tokenizer *tokenizer, const json_t *json, perk_error *err) {
    static const char where[] = "added_tokens";
    if (!json_is_object(json)) return malformed(err, where, "has a member that is not an object");
    const json_t *id = json_object_get(json, "id");
    const char *text = NULL;
    size_t size = 0;
    bool special = false;
    perk_added_token token = {0};
    perk_status status = read_string(json, "content", &text, &size, where, err);
    if (status == PERK_OK && !json_is_integer(id)) status = malformed(err, where, "has a token without an integer id");
    if (status == PERK_OK) status = read_flag(json, "special", &special, where, err);
    if (status == PERK_OK) status = read_flag(json, "single_word", &token.single_word, where, err);
    if (status == PERK_OK) status = read_flag(json, "lstrip", &token.lstrip, where, err);
    if (status == PERK_OK) status = read_flag(json, "rstrip", &token.rstrip, where, err);
    if (status == PERK_OK) status = read_flag(json, "normalized", &token.normalized, where, err);
    if (status != PERK_OK || !size) return status; /* an empty token is never found, and means nothing */
    uint32_t flags = PERK_TOKEN_ADDED | (special ? PERK_TOKEN_SPECIAL : 0);
    status = perk_vocab_add(&tokenizer->vocab, text, size, json_integer_value(id), flags, err);
    if (status != PERK_OK) return perk_fail_prefix(err, status, "%s", where);
    token.id = (int32_t)json_integer_value(id);
    tokenizer->added[tokenizer->added_count++] = token;
    return PERK_OK;
}

/* Tokens to be found in normalized text are normalized themselves. */
static perk_status add_to_trie(perk_tokenizer *tokenizer, size_t index, perk_error *err) {
    const perk_added_token *added = &tokenizer->added[index];
    const perk_token *token = &tokenizer->vocab.tokens[added->id];
    const char *text = tokenizer->vocab.pool.data + token->text;
    size_t size = token->text_size;
    perk_arena arena = {0};
    perk_status status = PERK_OK;
    if (added->normalized) status = perk_tokenizer_normalize(tokenizer, &arena, text, size, &text, &size, err);
    perk_trie *trie = added->normalized ? &tokenizer->normalized_trie : &tokenizer->raw_trie;
    if (status == PERK_OK && !perk_trie_add(trie, text, size, (int32_t)index))
        status = perk_fail_memory(err, "the added tokens");
    perk_arena_free(&arena);
    return status;
}

static perk_status read_added_tokens(perk_tokenizer *tokenizer, const json_t *list, perk_error *err) {
    if (is_null(list)) return PERK_OK;
    if (!json_is_array(list)) return malformed(err, "added_tokens", "is not a list");
    tokenizer->added = perk_calloc(json_array_size(list), sizeof *tokenizer->added);
    if (!tokenizer->added) return perk_fail_memory(err, "the added tokens");
    perk_status status = PERK_OK;
    for (size_t i = 0; i < json_array_size(list) && status == PERK_OK; i++)
        status = read_added_token(tokenizer, json_array_get(list, i), err);
    /* Where several tokens normalize to the same text, the last one is found, special ones before the others. */
    for (int special = 1; special >= 0; special--) {
        for (size_t i = 0; i < tokenizer->added_count && status == PERK_OK; i++)
            if (perk_tokenizer_is_special(tokenizer, tokenizer->added[i].id) == special)
                status = add_to_trie(tokenizer, i, err);
    }
    return status;
}

/* ---- post-processor
 * -------------------------------------------------------------------------------------------------------------------
 */

/* Puts the ids of the template's special token `name` at the end of `list`. */
static perk_status append_special(perk_id_list *list, const json_t *special_tokens, const char *name, perk_error *err) {
    const json_t *ids = json_object_get(json_object_get(special_tokens, name), "ids");
    if (!json_is_array(ids))
        return perk_fail(err, PERK_BAD_FORMAT, "post_processor: special token \"%.60s\" has no list \"ids\"", name);
    size_t count = json_array_size(ids);
    int32_t *grown = perk_realloc_array(list->ids, list->count + count, sizeof *grown);
    if (!grown) return perk_fail_memory(err, "the post-processor");
    list->ids = grown;
    for (size_t i = 0; i < count; i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id) || json_integer_value(id) < 0 || json_integer_value(id) > PERK_MAX_TOKEN_ID)
            return perk_fail(err, PERK_BAD_FORMAT, "post_processor: an id of \"%.60s\" is not from 0 to %d", name,
                             PERK_MAX_TOKEN_ID);
        list->ids[list->count++] = (int32_t)json_integer_value(id);
    }
    return PERK_OK;
}

static perk_status read_template(perk_tokenizer *tokenizer, const json_t *json, perk_error *err) {
    const json_t *single = json_object_get(json, "single"), *piece;
    size_t i;
    bool text_seen = false;
    if (!json_is_array(single)) return malformed(err, "post_processor TemplateProcessing", "has no list \"single\"");
    json_array_foreach(single, i, piece) {
        const char *name = NULL;
        size_t size;
        const json_t *special = json_object_get(piece, "SpecialToken"), *sequence = json_object_get(piece, "Sequence");
        perk_status status = read_string(special ? special : sequence, "id", &name, &size, "post_processor", err);
        if (status != PERK_OK) return status;
        if (special) {
            status = append_special(text_seen ? &tokenizer->suffix : &tokenizer->prefix,
                                    json_object_get(json, "special_tokens"), name, err);
            if (status != PERK_OK) return status;
        } else if (text_seen || strcmp(name, "A") != 0) {
            return unsupported(err, "post_processor", "TemplateProcessing with other than one sequence A");
        } else {
            text_seen = true;
        }
    }
    return text_seen ? PERK_OK : unsupported(err, "post_processor", "TemplateProcessing without a sequence");
}

static perk_status read_post_processor(perk_tokenizer *tokenizer, const json_t *json, const char *type,
                                       perk_error *err) {
    if (strcmp(type, "ByteLevel") == 0) return PERK_OK; /* it moves offsets, which perk does not give */
    if (strcmp(type, "TemplateProcessing") != 0) return unsupported(err, "post_processor", type);
    if (tokenizer->prefix.count || tokenizer->suffix.count)
        return unsupported(err, "post_processor", "TemplateProcessing after another");
    return read_template(tokenizer, json, err);
}

/* ---- the whole
 * ----------------------------------------------------------------------------------------------------------------------------
 */

static perk_status read_components(perk_tokenizer *tokenizer, const json_t *root, perk_error *err) {
    const struct {
        const char *key, *list_key;
        component_reader *read;
    } components[] = {
        {"normalizer", "normalizers", read_normalizer},
        {"pre_tokenizer", "pretokenizers", read_pre_tokenizer},
        {"post_processor", "processors", read_post_processor},
        {"decoder", "decoders", read_decoder},
    };
    for (size_t i = 0; i < PERK_COUNT(components); i++) {
        const json_t *component = json_object_get(root, components[i].key);
        if (is_null(component)) continue;
        perk_status status =
            read_component(tokenizer, component, components[i].key, components[i].list_key, components[i].read, err);
        if (status != PERK_OK) return status;
    }
    if (!tokenizer->decoder.stage) return malformed(err, "decoder", "is missing");
    if (tokenizer->decoder.byte_level && !tokenizer->byte_level)
        return unsupported(err, "pre_tokenizer", "without ByteLevel, which the decoder is,");
    if (tokenizer->byte_level && !tokenizer->decoder.byte_level)
        return unsupported(err, "decoder", "without ByteLevel, which the pre_tokenizer is,");
    return PERK_OK;
}

static perk_status parse_object(json_t **root, const char *json, size_t size, size_t flags, perk_error *err) {
    json_error_t error;
    *root = json_loadb(json, size, flags | JSON_ALLOW_NUL, &error);
    if (!*root && perk_json_status(&error) == PERK_OUT_OF_MEMORY) return perk_fail_memory(err, "its JSON");
    if (!*root)
        return perk_fail(err, PERK_BAD_FORMAT, "not valid JSON: line %d, column %d: %s", error.line, error.column,
                         error.text);
    if (json_is_object(*root)) return PERK_OK;
    json_decref(*root);
    *root = NULL;
    return perk_fail(err, PERK_BAD_FORMAT, "not a JSON object");
}

perk_status perk_tokenizer_read_json(perk_tokenizer *tokenizer, const char *json, size_t size, perk_error *err) {
    json_t *root = NULL;
    perk_status status = parse_object(&root, json, size, 0, err);
    json_t *model = json_object_get(root, "model");
    const perk_decoder *decoder = &tokenizer->decoder;
    if (status == PERK_OK) status = read_components(tokenizer, root, err);
    if (status == PERK_OK) status = read_model(tokenizer, model, err);
    if (status == PERK_OK) status = read_added_tokens(tokenizer, json_object_get(root, "added_tokens"), err);
    if (status == PERK_OK)
        status = perk_vocab_finish(&tokenizer->vocab, tokenizer->bpe.spelling, &decoder->replaced,
                                   decoder->byte_fallback, err);
    if (status == PERK_OK) status = read_unknown(tokenizer, model, err);
    json_decref(root);
    return status;
}

/* bos_token and eos_token are null, a string, or an object with "content". */
static int32_t named_token(const perk_tokenizer *tokenizer, const json_t *root, const char *key) {
    const json_t *name = json_object_get(root, key);
    if (json_is_object(name)) name = json_object_get(name, "content");
    if (!json_is_string(name)) return -1;
    return perk_vocab_find(&tokenizer->vocab, json_string_value(name), json_string_length(name));
}

perk_status perk_tokenizer_read_config(perk_tokenizer *tokenizer, const char *json, size_t size, perk_error *err) {
    json_t *root = NULL;
    /* model_max_length is often 10^30, which no integer holds. */
    perk_status status = parse_object(&root, json, size, JSON_DECODE_INT_AS_REAL, err);
    if (status != PERK_OK) return status;
    tokenizer->bos_id = named_token(tokenizer, root, "bos_token");
    tokenizer->eos_id = named_token(tokenizer, root, "eos_token");
    json_decref(root);
    return PERK_OK;
}
