/* tokenizer.json writes its regular expressions for Oniguruma (Ruby's syntax, Unicode 15). PCRE2 runs them here, after
 * a translation of what the two read differently; what cannot be translated is refused. */
#include "parts.h"

#include <ctype.h>

/* Members of a character class. PCRE2's own \s adds U+180E, its own \w leaves out marks and connectors. */
#define SPACE "\\x09-\\x0d\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{3000}"
#define NOT_SPACE                                                                                                      \
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}" \
    "\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"
#define WORD_IN_CLASS                                                                                                  \
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{24b6}-\\x{24e9}\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{"    \
    "1f189}"
#define WORD                                                                                                           \
    WORD_IN_CLASS                                                                                                      \
    "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}" /* Oniguruma's Latin-1 table has these outside of classes only */
#define AT_WORD "(?=[" WORD "])"
#define NOT_AT_WORD "(?![" WORD "])"
#define AFTER_WORD "(?<=[" WORD "])"
#define NOT_AFTER_WORD "(?<![" WORD "])"

typedef struct escape {
    char letter;
    const char *outside, *inside; /* of a class; NULL: refused there */
} escape;

/* Letters that are not listed are refused; other characters stand for themselves. */
static const escape escapes[] = {
    {'s', "[" SPACE "]", SPACE},
    {'S', "[^" SPACE "]", NOT_SPACE},
    {'w', "[" WORD "]", WORD_IN_CLASS},
    {'W', "[^" WORD "]", NULL},
    {'h', "[0-9A-Fa-f]", "0-9A-Fa-f"},
    {'H', "[^0-9A-Fa-f]", NULL},
    {'b', "(?:" AFTER_WORD NOT_AT_WORD "|" NOT_AFTER_WORD AT_WORD ")", "\\x08"},
    {'B', "(?:" AFTER_WORD AT_WORD "|" NOT_AFTER_WORD NOT_AT_WORD ")", NULL},
    {'d', "\\p{Nd}", "\\p{Nd}"},
    {'D', "\\P{Nd}", "\\P{Nd}"},
    {'v', "\\x0b", "\\x0b"},
    {'p', "\\p", "\\p"},
    {'P', "\\P", "\\P"},
    {'x', "\\x", "\\x"},
    {'n', "\\n", "\\n"},
    {'r', "\\r", "\\r"},
    {'t', "\\t", "\\t"},
    {'f', "\\f", "\\f"},
    {'a', "\\a", "\\a"},
    {'e', "\\e", "\\e"},
    {'A', "\\A", NULL},
    {'z', "\\z", NULL},
    {'Z', "\\Z", NULL},
};

typedef struct translation {
    const char *at, *end;
    perk_buffer out;
    perk_error *err;
} translation;

static void copy(translation *t, size_t size) {
    perk_buffer_append(&t->out, t->at, size);
    t->at += size;
}

static void put(translation *t, const char *text) { perk_buffer_append(&t->out, text, strlen(text)); }

static perk_status refuse(translation *t, const char *what) {
    return perk_fail(t->err, PERK_UNSUPPORTED, "%s is not supported, at \"%.40s\"", what, t->at);
}

static perk_status translate_unicode_escape(translation *t) {
    for (int i = 2; i < 6; i++)
        if (t->end - t->at <= i || !isxdigit((unsigned char)t->at[i])) return refuse(t, "\\u without four digits");
    put(t, "\\x{");
    perk_buffer_append(&t->out, t->at + 2, 4);
    put(t, "}");
    t->at += 6;
    return PERK_OK;
}

static perk_status translate_escape(translation *t, bool inside) {
    if (t->end - t->at < 2) return refuse(t, "a backslash at the end");
    char letter = t->at[1];
    if (letter == 'u') return translate_unicode_escape(t);
    for (size_t i = 0; i < PERK_COUNT(escapes); i++) {
        if (escapes[i].letter != letter) continue;
        const char *replacement = inside ? escapes[i].inside : escapes[i].outside;
        if (!replacement) return refuse(t, "this escape in a character class");
        put(t, replacement);
        t->at += 2;
        if (strchr("pPx", letter) && t->at < t->end && *t->at == '{') { /* \p{L}, \x{2603} */
            const char *close = memchr(t->at, '}', (size_t)(t->end - t->at));
            if (!close) return refuse(t, "a brace without an end");
            bool negated = t->at[1] == '^';
            copy(t, 1 + negated);
            /* A longer name is a script: PCRE2 would take the characters that other scripts share with it, too. */
            if (letter != 'x' && close - t->at > 2) put(t, "sc:");
            copy(t, (size_t)(close - t->at) + 1);
        }
        return PERK_OK;
    }
    if (isalnum((unsigned char)letter)) return refuse(t, "this escape");
    copy(t, 2);
    return PERK_OK;
}

static perk_status translate_class(translation *t) {
    perk_status status = PERK_OK;
    copy(t, 1);
    if (t->at < t->end && *t->at == '^') copy(t, 1);
    if (t->at < t->end && *t->at == ']') return refuse(t, "] at the start of a character class");
    while (t->at < t->end && *t->at != ']' && status == PERK_OK) {
        bool more = t->end - t->at > 1;
        if (*t->at == '\\')
            status = translate_escape(t, true);
        else if (*t->at == '[')
            status = refuse(t, "a character class in a character class");
        else if (*t->at == '&' && more && t->at[1] == '&')
            status = refuse(t, "&& in a character class");
        else
            copy(t, 1);
    }
    if (status != PERK_OK) return status;
    if (t->at == t->end) return refuse(t, "a character class without an end");
    copy(t, 1);
    return PERK_OK;
}

/* {n}, {n,}, {n,m} and {,m}. Oniguruma takes a following + or, after {n}, a following ? for another quantifier. */
static perk_status translate_braces(translation *t) {
    const char *p = t->at + 1, *first = p;
    while (p < t->end && isdigit((unsigned char)*p)) p++;
    bool from = p > first, comma = p < t->end && *p == ',';
    const char *second = p += comma;
    while (p < t->end && isdigit((unsigned char)*p)) p++;
    if (p == t->end || *p != '}' || (!from && p == second)) return refuse(t, "a brace that is not a quantifier");
    if (p + 1 < t->end && (p[1] == '+' || (p[1] == '?' && !comma))) return refuse(t, "a quantifier on a quantifier");
    put(t, from ? "{" : "{0");
    t->at++;
    copy(t, (size_t)(p - t->at) + 1);
    return PERK_OK;
}

/* After "(?": the letters i and x mean the same in both dialects, m does not; options without a colon reach
 * differently far unless they come first. */
static perk_status translate_group(translation *t, bool at_start) {
    if (t->end - t->at < 2 || t->at[1] != '?') {
        if (t->end - t->at >= 2 && t->at[1] == '*') return refuse(t, "(*");
        copy(t, 1);
        return PERK_OK;
    }
    const char *p = t->at + 2;
    while (p < t->end && (*p == 'i' || *p == '-')) p++;
    if (p == t->end) return refuse(t, "a group without an end");
    bool options = p > t->at + 2;
    if (options ? *p != ':' && !(*p == ')' && at_start) : !strchr(":=!<>", *p)) return refuse(t, "this kind of group");
    copy(t, (size_t)(p - t->at) + 1);
    return PERK_OK;
}

static perk_status translate(translation *t) {
    const char *start = t->at;
    perk_status status = PERK_OK;
    while (t->at < t->end && status == PERK_OK) switch (*t->at) {
        case '\\': status = translate_escape(t, false); break;
        case '[': status = translate_class(t); break;
        case '{': status = translate_braces(t); break;
        case '(': status = translate_group(t, t->at == start); break;
        default: copy(t, 1);
        }
    if (status == PERK_OK && t->out.failed) status = perk_fail_memory(t->err, "a regular expression");
    return status;
}

/* With PCRE2_MULTILINE, because ^ and $ are about lines in Ruby. */
static perk_status compile(const char *pattern, size_t size, uint32_t options, pcre2_code **out, perk_error *err) {
    int code = 0;
    PCRE2_SIZE place = 0;
    *out = pcre2_compile((PCRE2_SPTR)pattern, size, options | PCRE2_UTF | PCRE2_MULTILINE, &code, &place, NULL);
    if (!*out) {
        PCRE2_UCHAR text[128] = {0};
        if (code == PCRE2_ERROR_HEAP_FAILED) return perk_fail_memory(err, "its program");
        pcre2_get_error_message(code, text, sizeof text);
        return perk_fail(err, PERK_UNSUPPORTED, "PCRE2 cannot compile it: %s", (const char *)text);
    }
    pcre2_jit_compile(*out, PCRE2_JIT_COMPLETE); /* where there is no JIT, the interpreter does the work */
    return PERK_OK;
}

perk_status perk_pattern_compile(const char *pattern, size_t size, pcre2_code **out, perk_error *err) {
    translation t = {.at = pattern, .end = pattern + size, .err = err};
    *out = NULL;
    perk_status status = translate(&t);
    if (status == PERK_OK) status = compile(t.out.data ? t.out.data : "", t.out.size, PCRE2_UCP, out, err);
    perk_buffer_free(&t.out);
    if (status == PERK_OK) return status;
    return perk_fail_prefix(err, status, "regular expression \"%.200s\"", pattern);
}

perk_status perk_pattern_compile_literal(const char *text, size_t size, pcre2_code **out, perk_error *err) {
    perk_buffer quoted = {0};
    *out = NULL;
    for (size_t i = 0; i < size; i++) {
        if (ispunct((unsigned char)text[i])) perk_buffer_append(&quoted, "\\", 1);
        perk_buffer_append(&quoted, text + i, 1);
    }
    perk_status status = quoted.failed ? perk_fail_memory(err, "a regular expression")
                                       : compile(quoted.data ? quoted.data : "", quoted.size, 0, out, err);
    perk_buffer_free(&quoted);
    return status;
}

perk_status perk_matcher_init(perk_matcher *matcher, perk_error *err) {
    matcher->data = pcre2_match_data_create(1, NULL);
    matcher->limits = pcre2_match_context_create(NULL);
    if (matcher->data && matcher->limits) return PERK_OK;
    perk_matcher_free(matcher);
    return perk_fail_memory(err, "matching a regular expression");
}

void perk_matcher_free(perk_matcher *matcher) {
    pcre2_match_data_free(matcher->data);
    pcre2_match_context_free(matcher->limits);
    *matcher = (perk_matcher){0};
}

int perk_matcher_find(perk_matcher *matcher, const pcre2_code *pattern, const char *text, size_t size, size_t start,
                      size_t *begin, size_t *end, perk_error *err) {
    /* Linear in the text, so that an honest pattern never meets the limit and a hostile one does. */
    size_t limit = (size - start) * 16 + 1000000;
    pcre2_set_match_limit(matcher->limits, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    const PCRE2_SPTR subject = (PCRE2_SPTR)text;
    int found = pcre2_match(pattern, subject, size, start, PCRE2_NO_UTF_CHECK, matcher->data, matcher->limits);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter's stack is the heap */
        found = pcre2_match(pattern, subject, size, start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, matcher->data,
                            matcher->limits);
    if (found == PCRE2_ERROR_NOMATCH) return 0;
    if (found < 0) {
        PCRE2_UCHAR message[128] = {0};
        pcre2_get_error_message(found, message, sizeof message);
        perk_fail(err, found == PCRE2_ERROR_NOMEMORY ? PERK_OUT_OF_MEMORY : PERK_LIMIT,
                  "a regular expression of the pre-tokenizer failed on %zu bytes of text: %s; split the text, or mend "
                  "the expression in tokenizer.json",
                  size - start, (const char *)message);
        return -1;
    }
    const PCRE2_SIZE *place = pcre2_get_ovector_pointer(matcher->data);
    *begin = place[0];
    *end = place[1];
    return 1;
}
