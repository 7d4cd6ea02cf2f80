/* perk run --prompts: a request a line, an answer a line in the same order. The engine has many of them at a time. */
#include "cli.h"

#include "src/scheduler.h"

#include <errno.h>

/* ---- a line of the file: a request ---- */

/* What a request points into until it is submitted. */
typedef struct request_lists {
    perk_cli_ids prompt, stop_tokens;
    const char *stop_strings[PERK_MAX_STOP_STRINGS]; /* the line's */
    perk_logit_bias *bias;
} request_lists;

static void lists_free(request_lists *lists) {
    perk_cli_ids_free(&lists->prompt);
    perk_cli_ids_free(&lists->stop_tokens);
    free(lists->bias);
}

typedef enum field_kind { FIELD_INT, FIELD_FLOAT, FIELD_SEED, FIELD_FLAG } field_kind;

static const struct field {
    const char *name;
    field_kind kind;
    size_t offset;
} fields[] = {
    {"max_tokens", FIELD_INT, offsetof(perk_sampling, max_tokens)},
    {"temperature", FIELD_FLOAT, offsetof(perk_sampling, temperature)},
    {"top_k", FIELD_INT, offsetof(perk_sampling, top_k)},
    {"top_p", FIELD_FLOAT, offsetof(perk_sampling, top_p)},
    {"min_p", FIELD_FLOAT, offsetof(perk_sampling, min_p)},
    {"seed", FIELD_SEED, offsetof(perk_sampling, seed)},
    {"ignore_eos", FIELD_FLAG, offsetof(perk_sampling, ignore_eos)},
    {"repetition_penalty", FIELD_FLOAT, offsetof(perk_sampling, repetition_penalty)},
    {"presence_penalty", FIELD_FLOAT, offsetof(perk_sampling, presence_penalty)},
    {"frequency_penalty", FIELD_FLOAT, offsetof(perk_sampling, frequency_penalty)},
    {"logprobs", FIELD_FLAG, offsetof(perk_sampling, logprobs)},
    {"top_logprobs", FIELD_INT, offsetof(perk_sampling, top_logprobs)},
};

/* Ranges are the engine's to check; here only what the type can hold. */
static perk_status read_field(const struct field *field, const json_t *value, perk_sampling *sampling,
                              perk_error *err) {
    void *target = (char *)sampling + field->offset;
    json_int_t number = json_integer_value(value);
    switch (field->kind) {
    case FIELD_INT:
        if (!json_is_integer(value) || number < INT32_MIN || number > INT32_MAX) break;
        return *(int32_t *)target = (int32_t)number, PERK_OK;
    case FIELD_SEED:
        if (!json_is_integer(value) || number < 0) break;
        return *(uint64_t *)target = (uint64_t)number, PERK_OK;
    case FIELD_FLOAT:
        if (!json_is_number(value)) break;
        return *(float *)target = (float)json_number_value(value), PERK_OK;
    case FIELD_FLAG:
        if (!json_is_boolean(value)) break;
        return *(int32_t *)target = json_is_true(value), PERK_OK;
    }
    static const char *const kinds[] = {"a whole number", "a number", "a whole number from 0", "true or false"};
    return perk_fail(err, PERK_BAD_FORMAT, "\"%s\" is not %s", field->name, kinds[field->kind]);
}

/* {"token id": bias, ...} */
static perk_status read_bias(const json_t *map, perk_sampling *sampling, request_lists *lists, perk_error *err) {
    if (!json_is_object(map) || json_object_size(map) > PERK_MAX_LOGIT_BIAS)
        return perk_fail(err, PERK_BAD_FORMAT, "\"logit_bias\" is not an object of at most %d numbers",
                         (int)PERK_MAX_LOGIT_BIAS);
    lists->bias = perk_calloc(json_object_size(map), sizeof *lists->bias);
    if (!lists->bias) return perk_fail_memory(err, "a request");
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)map, key, value) {
        char *end;
        errno = 0;
        long token = strtol(key, &end, 10);
        if (errno || end == key || *end || token < 0 || token > INT32_MAX || !json_is_number(value))
            return perk_fail(err, PERK_BAD_FORMAT, "\"logit_bias\": \"%.60s\" is no token id with a number", key);
        lists->bias[sampling->bias_count++] = (perk_logit_bias){(int32_t)token, (float)json_number_value(value)};
    }
    sampling->bias = lists->bias;
    return PERK_OK;
}

static perk_status read_stop_tokens(const json_t *list, perk_sampling *sampling, request_lists *lists,
                                    perk_error *err) {
    perk_status status = perk_cli_ids_from_json(&lists->stop_tokens, list, err);
    if (status) return perk_fail_prefix(err, status, "\"stop_tokens\"");
    if (lists->stop_tokens.count > PERK_MAX_STOP_TOKENS)
        return perk_fail(err, PERK_LIMIT, "\"stop_tokens\" are more than %d", (int)PERK_MAX_STOP_TOKENS);
    sampling->stop_tokens = lists->stop_tokens.items;
    sampling->stop_token_count = (int32_t)lists->stop_tokens.count;
    return PERK_OK;
}

/* A string, or a list of them. */
static perk_status read_stop_strings(const json_t *value, perk_sampling *sampling, request_lists *lists,
                                     perk_error *err) {
    size_t count = json_is_array(value) ? json_array_size(value) : 1;
    if (count > PERK_MAX_STOP_STRINGS)
        return perk_fail(err, PERK_LIMIT, "\"stop\" has more than %d strings", (int)PERK_MAX_STOP_STRINGS);
    for (size_t i = 0; i < count; i++) {
        const json_t *item = json_is_array(value) ? json_array_get(value, i) : value;
        const char *text = json_string_value(item);
        if (!text || strlen(text) != json_string_length(item))
            return perk_fail(err, PERK_BAD_FORMAT, "\"stop\" is neither a string nor a list of strings");
        lists->stop_strings[i] = text;
    }
    sampling->stop_strings = lists->stop_strings;
    sampling->stop_string_count = (int32_t)count;
    return PERK_OK;
}

/* "tokens", "prompt" or "messages": one of them. */
static perk_status read_prompt(const perk_engine *engine, const char *key, const json_t *value, perk_cli_ids *prompt,
                               perk_error *err) {
    const perk_tokenizer *tokenizer = perk_engine_tokenizer(engine);
    if (prompt->items) return perk_fail(err, PERK_BAD_FORMAT, "\"%s\" beside another prompt", key);
    if (strcmp(key, "tokens") == 0) return perk_cli_ids_from_json(prompt, value, err);
    if (!tokenizer)
        return perk_fail(err, PERK_NOT_FOUND, "the model has no usable tokenizer.json: give \"tokens\", not \"%s\"",
                         key);
    perk_encode_options options = {.add_special_tokens = 1, .parse_special = 1};
    if (strcmp(key, "prompt") == 0) {
        if (!json_is_string(value)) return perk_fail(err, PERK_BAD_FORMAT, "\"prompt\" is not a string");
        return perk_tokenizer_encode(tokenizer, json_string_value(value), json_string_length(value), &options,
                                     &prompt->items, &prompt->count, err);
    }
    char *text = NULL;
    perk_status status = perk_cli_chat_text(tokenizer, value, &text, err);
    options.add_special_tokens = 0; /* the text brings its special tokens */
    if (!status)
        status = perk_tokenizer_encode(tokenizer, text, strlen(text), &options, &prompt->items, &prompt->count, err);
    free(text);
    return status;
}

static perk_status read_member(const perk_engine *engine, const char *key, const json_t *value, perk_sampling *sampling,
                               request_lists *lists, perk_error *err) {
    if (strcmp(key, "id") == 0) return PERK_OK; /* the caller's own: the answer has it, too */
    if (strcmp(key, "prompt") == 0 || strcmp(key, "messages") == 0 || strcmp(key, "tokens") == 0)
        return read_prompt(engine, key, value, &lists->prompt, err);
    if (strcmp(key, "logit_bias") == 0) return read_bias(value, sampling, lists, err);
    if (strcmp(key, "stop_tokens") == 0) return read_stop_tokens(value, sampling, lists, err);
    if (strcmp(key, "stop") == 0) return read_stop_strings(value, sampling, lists, err);
    for (size_t i = 0; i < PERK_COUNT(fields); i++)
        if (strcmp(key, fields[i].name) == 0) return read_field(&fields[i], value, sampling, err);
    return perk_fail(err, PERK_BAD_FORMAT, "unknown field \"%.60s\"", key);
}

/* ---- requests under way ---- */

typedef struct prompt_job {
    const char *line;
    size_t line_size;
    json_t *id;            /* as the line gave it, or NULL */
    perk_request *request; /* NULL: it failed, or its turn has not come */
    char *failure;
} prompt_job;

static perk_status begin(perk_engine *engine, const perk_sampling *defaults, prompt_job *job, perk_error *err) {
    json_error_t json_err;
    request_lists lists = {0};
    perk_sampling sampling = *defaults;
    perk_status status = PERK_OK;
    json_t *line = json_loadb(job->line, job->line_size, JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES, &json_err), *value;
    const char *key;
    if (!line) return perk_fail(err, PERK_BAD_FORMAT, "not JSON: %s", json_err.text);
    if (!json_is_object(line)) status = perk_fail(err, PERK_BAD_FORMAT, "not a JSON object");
    job->id = json_incref(json_object_get(line, "id"));
    json_object_foreach(line, key, value) {
        if (!status) status = read_member(engine, key, value, &sampling, &lists, err);
    }
    if (!status && !lists.prompt.items)
        status = perk_fail(err, PERK_BAD_FORMAT, "needs a \"prompt\", \"messages\" or \"tokens\"");
    if (!status)
        status = perk_engine_submit(engine, lists.prompt.items, lists.prompt.count, &sampling, &job->request, err);
    lists_free(&lists);
    json_decref(line);
    return status;
}

/* ---- answers ---- */

static json_t *logprobs_json(const perk_request *request, size_t count) {
    json_t *list = json_array();
    for (size_t place = 0, each; place < count; place++) {
        const perk_logprob *logprobs = perk_request_logprobs(request, place, &each);
        json_t *top = json_array();
        for (size_t i = 1; i < each && logprobs[i].token >= 0; i++)
            json_array_append_new(
                top, json_pack("{s:i, s:f}", "token", (int)logprobs[i].token, "logprob", (double)logprobs[i].logprob));
        json_array_append_new(list, json_pack("{s:i, s:f, s:o}", "token", (int)logprobs[0].token, "logprob",
                                              (double)logprobs[0].logprob, "top", top));
    }
    return list;
}

perk_status perk_cli_answer_json(const perk_engine *engine, const perk_request *request, json_t **out,
                                 perk_error *err) {
    const perk_tokenizer *tokenizer = perk_engine_tokenizer(engine);
    size_t count = 0, size = 0;
    const int32_t *tokens = perk_request_tokens(request, &count);
    char *text = NULL;
    *out = NULL;
    if (tokenizer) {
        perk_status status = perk_tokenizer_decode(tokenizer, tokens, count, 1, &text, &size, err);
        if (status) return status;
        size = perk_stop_text_cut(&request->sampling, text, size);
    }
    perk_request_stats stats;
    perk_request_statistics(request, &stats);
    json_t *ids = json_array();
    for (size_t i = 0; i < count; i++) json_array_append_new(ids, json_integer(tokens[i]));
    json_t *times = json_pack("{s:f, s:f, s:f, s:f}", "queue_ms", stats.queue_ms, "prefill_ms", stats.prefill_ms,
                              "decode_ms", stats.decode_ms, "decode_tokens_per_second", stats.tokens_per_second);
    *out = json_pack("{s:s%, s:o, s:i, s:i, s:s, s:o}", "text", text ? text : "", size, "tokens", ids, "prompt_tokens",
                     (int)stats.prompt_tokens, "found_tokens", (int)stats.found_tokens, "finish",
                     perk_cli_finish_name(perk_request_finish(request)), "times", times);
    if (perk_request_logprobs(request, 0, NULL)) json_object_set_new(*out, "logprobs", logprobs_json(request, count));
    free(text);
    return *out ? PERK_OK : perk_fail_memory(err, "an answer");
}

/* Prints the job's line and lets go of it. False: nothing more can be printed. */
static bool print(const perk_engine *engine, prompt_job *job) {
    perk_error err = {0};
    json_t *answer = job->failure ? json_pack("{s:s}", "error", job->failure) : NULL;
    if (!job->failure && perk_cli_answer_json(engine, job->request, &answer, &err)) return perk_cli_fail(&err), false;
    if (job->id) json_object_set(answer, "id", job->id);
    perk_request_free(job->request);
    job->request = NULL;
    return perk_cli_print_json(answer) && !fflush(stdout);
}

/* ---- the file ---- */

enum { MAX_UNDER_WAY = 256 }; /* waiting requests cost memory, and more of them make no step fuller */

typedef struct prompt_run {
    perk_engine *engine;
    const perk_sampling *defaults;
    prompt_job *jobs;
    size_t count, begun, printed, failed; /* jobs */
} prompt_run;

static bool is_done(const prompt_job *job) {
    return job->failure || perk_request_finish(job->request) != PERK_FINISH_NONE;
}

/* A line that is wrong becomes an answer that says so; only what is no line's fault ends the run. */
static perk_status begin_next(prompt_run *run, perk_error *err) {
    prompt_job *job = &run->jobs[run->begun++];
    perk_error wrong = {0};
    if (!begin(run->engine, run->defaults, job, &wrong)) return PERK_OK;
    job->failure = wrong.status == PERK_OUT_OF_MEMORY ? NULL : perk_strdup(wrong.message);
    run->failed++;
    return job->failure ? PERK_OK : perk_fail_memory(err, "the requests");
}

static int answer_all(prompt_run *run) {
    perk_error err = {0};
    while (run->printed < run->count) {
        while (run->begun < run->count && run->begun - run->printed < MAX_UNDER_WAY)
            if (begin_next(run, &err)) return perk_cli_fail(&err);
        for (; run->printed < run->begun && is_done(&run->jobs[run->printed]); run->printed++)
            if (!print(run->engine, &run->jobs[run->printed])) return PERK_EXIT_FAILURE;
        if (run->printed == run->begun) continue; /* all of them failed: more may begin */
        int32_t running;
        if (perk_engine_step(run->engine, &running, &err)) return perk_cli_fail(&err);
    }
    if (run->failed) perk_cli_error("%zu of %zu requests failed: see their \"error\"", run->failed, run->count);
    return run->failed ? PERK_EXIT_FAILURE : PERK_EXIT_OK;
}

/* Calls for every line that is not blank; returns how many there are. `jobs` may be NULL. */
static size_t find_lines(const perk_buffer *file, prompt_job *jobs) {
    size_t count = 0;
    for (const char *line = file->data, *end = line + file->size, *next; line < end; line = next) {
        const char *newline = memchr(line, '\n', (size_t)(end - line));
        next = newline ? newline + 1 : end;
        size_t size = (size_t)(next - line);
        if (strspn(line, " \t\r\n") >= size) continue;
        if (jobs) jobs[count] = (prompt_job){.line = line, .line_size = size};
        count++;
    }
    return count;
}

int perk_cli_run_prompts(perk_engine *engine, const perk_buffer *file, const perk_sampling *defaults) {
    prompt_run run = {.engine = engine, .defaults = defaults, .count = find_lines(file, NULL)};
    run.jobs = perk_calloc(run.count, sizeof *run.jobs);
    if (!run.jobs) {
        perk_error err = {0};
        perk_fail_memory(&err, "the requests");
        return perk_cli_fail(&err);
    }
    find_lines(file, run.jobs);
    int code = answer_all(&run);
    for (size_t i = 0; i < run.count; i++) {
        perk_request_free(run.jobs[i].request);
        json_decref(run.jobs[i].id);
        free(run.jobs[i].failure);
    }
    free(run.jobs);
    return code;
}
