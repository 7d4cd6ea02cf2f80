/* perk bench serve: what arrives when. */
#include "bench_serve.h"

#include <errno.h>
#include <math.h>

enum { MAX_REQUESTS = 1 << 20, MAX_TOKENS = 1 << 20, TEXTS = 4 };

/* ---- numbers that depend on the seed alone ---- */

/* The finaliser of splitmix64 (Steele, Lea and Flood 2014): a good hash of a counter. */
static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t draw(uint64_t *state) { return mix(*state += 0x9e3779b97f4a7c15u); }

/* In [0, 1). */
static double draw_unit(uint64_t *state) { return (double)(draw(state) >> 11) * 0x1p-53; }

typedef struct token_range {
    int32_t least, most;
} token_range;

static int32_t draw_range(uint64_t *state, token_range range) {
    return range.least + (int32_t)(draw(state) % (uint64_t)(range.most - range.least + 1));
}

static perk_status parse_range(const char *option, const char *text, token_range *range, perk_error *err) {
    long ends[2] = {0, 0};
    char *end = NULL;
    errno = 0;
    ends[0] = ends[1] = strtol(text, &end, 10);
    if (end > text && *end == '-') {
        const char *second = end + 1;
        ends[1] = strtol(second, &end, 10);
        if (end == second) ends[1] = 0;
    }
    if (errno || *end || ends[0] < 1 || ends[1] < ends[0] || ends[1] > MAX_TOKENS)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "--%s must be a number of tokens from 1 to %d, or two with a dash between, not \"%s\"", option,
                         (int)MAX_TOKENS, text);
    *range = (token_range){(int32_t)ends[0], (int32_t)ends[1]};
    return PERK_OK;
}

/* ---- the list ---- */

static perk_status add(perk_serve_plan *plan, perk_serve_request request, perk_error *err) {
    if (plan->count == MAX_REQUESTS)
        return perk_fail(err, PERK_LIMIT, "more than %d requests arrive: lower --rate or --duration",
                         (int)MAX_REQUESTS);
    if (plan->count == plan->capacity) {
        size_t capacity = PERK_MAX(plan->capacity * 2, (size_t)256);
        perk_serve_request *requests = perk_realloc_array(plan->requests, capacity, sizeof *requests);
        if (!requests) return perk_fail_memory(err, "arrivals");
        plan->requests = requests;
        plan->capacity = capacity;
    }
    request.sample = -1;
    plan->requests[plan->count++] = request;
    plan->longest_prompt = PERK_MAX(plan->longest_prompt, request.prompt_tokens);
    plan->longest_answer = PERK_MAX(plan->longest_answer, request.answer_tokens);
    plan->longest = PERK_MAX(plan->longest, request.prompt_tokens + request.answer_tokens);
    return PERK_OK;
}

/* What neither ranges nor a trace say. */
static void draw_rest(perk_serve_request *request, const perk_serve_options *o, uint64_t *state) {
    bool cancelled = draw_unit(state) < (double)o->cancels, alike = draw_unit(state) < (double)o->alike;
    uint64_t after = draw(state), text = draw(state);
    if (cancelled && request->cancel_after < 0)
        request->cancel_after = (int32_t)(after % (uint64_t)request->answer_tokens);
    request->text = alike ? (int32_t)(text % TEXTS) : -1;
}

static perk_status draw_all(perk_serve_plan *plan, const perk_serve_options *o, uint64_t *state, perk_error *err) {
    token_range prompts = {1, 1}, answers = {1, 1};
    perk_status status = parse_range("prompts", o->prompts, &prompts, err);
    if (!status) status = parse_range("answers", o->answers, &answers, err);
    double now = 0;
    while (!status) {
        now -= log1p(-draw_unit(state)) / (double)o->rate;
        if (now >= (double)o->duration) break;
        perk_serve_request request = {.arrival = now, .cancel_after = -1};
        request.prompt_tokens = draw_range(state, prompts);
        request.answer_tokens = draw_range(state, answers);
        draw_rest(&request, o, state);
        status = add(plan, request, err);
    }
    return status;
}

/* ---- a trace ---- */

static perk_status read_tokens(const json_t *line, const char *key, int32_t least, int32_t most, int32_t *out,
                               perk_error *err) {
    const json_t *value = json_object_get(line, key);
    json_int_t number = json_integer_value(value);
    if (!json_is_integer(value) || number < least || number > most)
        return perk_fail(err, PERK_BAD_FORMAT, "\"%s\" must be a whole number from %d to %d", key, least, most);
    *out = (int32_t)number;
    return PERK_OK;
}

static perk_status read_line(const json_t *line, double earliest, perk_serve_request *request, perk_error *err) {
    static const char *const known[] = {"arrival_s", "prompt_tokens", "answer_tokens", "cancel_after"};
    const char *key;
    json_t *value;
    if (!json_is_object(line)) return perk_fail(err, PERK_BAD_FORMAT, "not a JSON object");
    json_object_foreach((json_t *)line, key, value) {
        size_t i = 0;
        while (i < PERK_COUNT(known) && strcmp(key, known[i]) != 0) i++;
        if (i == PERK_COUNT(known)) return perk_fail(err, PERK_BAD_FORMAT, "unknown field \"%.60s\"", key);
    }
    value = json_object_get(line, "arrival_s");
    request->arrival = json_number_value(value);
    if (!json_is_number(value) || !(request->arrival >= earliest) || request->arrival > 1e6)
        return perk_fail(err, PERK_BAD_FORMAT, "\"arrival_s\" must be seconds, not before those of the line above");
    perk_status status = read_tokens(line, "prompt_tokens", 1, MAX_TOKENS, &request->prompt_tokens, err);
    if (!status) status = read_tokens(line, "answer_tokens", 1, MAX_TOKENS, &request->answer_tokens, err);
    if (!status && json_object_get(line, "cancel_after"))
        status = read_tokens(line, "cancel_after", 0, request->answer_tokens - 1, &request->cancel_after, err);
    return status;
}

static perk_status add_line(perk_serve_plan *plan, const char *text, size_t size, const perk_serve_options *o,
                            uint64_t *state, perk_error *err) {
    json_error_t malformed;
    perk_serve_request request = {.cancel_after = -1};
    double earliest = plan->count ? plan->requests[plan->count - 1].arrival : 0;
    json_t *line = json_loadb(text, size, JSON_REJECT_DUPLICATES, &malformed);
    if (!line) return perk_fail(err, PERK_BAD_FORMAT, "not JSON: %s", malformed.text);
    perk_status status = read_line(line, earliest, &request, err);
    json_decref(line);
    if (status) return status;
    draw_rest(&request, o, state);
    bool too_late = o->duration > 0 && request.arrival >= (double)o->duration;
    return too_late ? PERK_OK : add(plan, request, err);
}

static perk_status read_trace(perk_serve_plan *plan, const perk_serve_options *o, uint64_t *state, perk_error *err) {
    perk_buffer file = {0};
    perk_status status = perk_cli_read_file(o->trace, &file, err);
    size_t number = 0;
    const char *end = file.size ? file.data + file.size : file.data; /* NULL where nothing was read */
    for (const char *line = file.data, *next; !status && line != end; line = next) {
        const char *newline = memchr(line, '\n', (size_t)(end - line));
        next = newline ? newline + 1 : end;
        number++;
        if (strspn(line, " \t\r\n") >= (size_t)(next - line)) continue;
        status = add_line(plan, line, (size_t)(next - line), o, state, err);
        if (status) perk_fail_prefix(err, status, "%s: line %zu", o->trace, number);
    }
    perk_buffer_free(&file);
    return status;
}

/* ---- the plan ---- */

static perk_status make_samples(perk_serve_plan *plan, int32_t wanted, perk_error *err) {
    int32_t count = (int32_t)PERK_MIN((size_t)wanted, plan->count);
    plan->samples = perk_calloc((size_t)count, sizeof *plan->samples);
    if (!plan->samples) return perk_fail_memory(err, "answers to compare");
    plan->sample_count = count;
    for (int32_t i = 0; i < count; i++) {
        perk_serve_sample *sample = &plan->samples[i];
        size_t tokens = (size_t)plan->longest_answer;
        sample->alone = perk_calloc(tokens, sizeof *sample->alone);
        sample->read = perk_calloc(tokens, sizeof *sample->read);
        sample->gap = perk_calloc(tokens, sizeof *sample->gap);
        if (!sample->alone || !sample->read || !sample->gap) return perk_fail_memory(err, "answers to compare");
    }
    return PERK_OK;
}

perk_status perk_serve_plan_make(perk_serve_plan *plan, const perk_serve_options *o, uint64_t seed, perk_error *err) {
    uint64_t state = mix(seed + 1);
    *plan = (perk_serve_plan){.seed = seed};
    perk_status status = o->trace ? read_trace(plan, o, &state, err) : draw_all(plan, o, &state, err);
    if (!status && plan->count == 0)
        status = perk_fail(err, PERK_INVALID_ARGUMENT, "no request arrives: raise --rate or --duration");
    return status ? status : make_samples(plan, o->checks, err);
}

/* The first of each part of the plan that is not refused. */
void perk_serve_sample_taken(perk_serve_plan *plan, size_t request) {
    if (plan->sample_count == 0) return;
    size_t part = request * (size_t)plan->sample_count / plan->count;
    if (plan->samples[part].is_taken) return;
    plan->samples[part].is_taken = true;
    plan->samples[part].request = request;
    plan->requests[request].sample = (int32_t)part;
}

void perk_serve_plan_free(perk_serve_plan *plan) {
    for (int32_t i = 0; i < plan->sample_count; i++) {
        free(plan->samples[i].alone);
        free(plan->samples[i].read);
        free(plan->samples[i].gap);
    }
    free(plan->samples);
    free(plan->requests);
    *plan = (perk_serve_plan){0};
}

/* Of requests that begin alike, the first half of the shorter prompt is the same. */
void perk_serve_prompt(const perk_serve_plan *plan, size_t request, int32_t vocab, int32_t *ids) {
    const perk_serve_request *r = &plan->requests[request];
    for (int32_t i = 0; i < r->prompt_tokens; i++) {
        uint64_t text = r->text >= 0 && i < r->prompt_tokens / 2 ? (uint64_t)r->text : TEXTS + (uint64_t)request;
        ids[i] = (int32_t)(mix(mix(plan->seed + text * 0x9e3779b97f4a7c15u) + (uint64_t)i) % (uint64_t)vocab);
    }
}

perk_sampling perk_serve_sampling(const perk_serve_request *request) {
    return (perk_sampling){.max_tokens = request->answer_tokens, .ignore_eos = 1};
}
