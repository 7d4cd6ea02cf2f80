/* What the commands share: messages, the progress bar, opening an engine, lists of ids. */
#include "cli.h"

#include <errno.h>
#include <stdarg.h>
#include <unistd.h>

/* ---- the bar: one line of stderr that is drawn over and wiped before anything else is written there ---- */

static int bar_percent = -1; /* what the drawn bar shows; -1: none is drawn */

static void wipe_bar(void) {
    if (bar_percent >= 0) fputs("\r\033[K", stderr);
    bar_percent = -1;
}

static int draw_bar(void *user, const char *phase, uint64_t done, uint64_t total) {
    (void)user;
    enum { WIDTH = 40 };
    static const char full[WIDTH + 1] = "########################################";
    int percent = total ? (int)((double)done / (double)total * 100.0) : 100;
    if (done >= total) {
        wipe_bar();
    } else if (percent != bar_percent) {
        int filled = percent * WIDTH / 100;
        fprintf(stderr, "\r\033[K%s [%.*s%*s] %3d%% of %.2f GB", phase, filled, full, WIDTH - filled, "", percent,
                (double)total * 1e-9);
        fflush(stderr);
        bar_percent = percent;
    }
    return 0;
}

perk_progress perk_cli_progress(void) { return (perk_progress){.report = isatty(STDERR_FILENO) ? draw_bar : NULL}; }

/* ---- messages ---- */

void perk_cli_error(const char *format, ...) {
    wipe_bar();
    fputs("perk: ", stderr);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
}

int perk_cli_usage(const perk_cli_command *command, const char *format, ...) {
    char message[512];
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    perk_cli_error("%s: %s (perk %s --help)", command->name, message, command->name);
    return PERK_EXIT_USAGE;
}

int perk_cli_fail(const perk_error *err) {
    perk_cli_error("%s", err->message[0] ? err->message : perk_status_text(err->status));
    return PERK_EXIT_FAILURE;
}

int perk_cli_finish(int exit_code) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return exit_code;
    perk_cli_error("cannot write to stdout: %s", strerror(errno));
    return PERK_EXIT_FAILURE;
}

bool perk_cli_print_json(json_t *value) {
    bool good = value && json_dumpf(value, stdout, JSON_ENCODE_ANY | JSON_REAL_PRECISION(10)) == 0;
    json_decref(value);
    if (good) putchar('\n');
    if (!good) perk_cli_error("the result cannot be written as JSON");
    return good;
}

static void write_warning(void *user, perk_log_level level, const char *message) {
    (void)user;
    if (level >= PERK_LOG_WARNING) perk_cli_error("warning: %s", message);
}

static void write_all(void *user, perk_log_level level, const char *message) {
    (void)user;
    perk_cli_error("%s%s", level >= PERK_LOG_WARNING ? "warning: " : "", message);
}

perk_log perk_cli_log(int verbose) { return (perk_log){.write = verbose ? write_all : write_warning}; }

/* ---- the engine's options ---- */

void perk_cli_add_engine(perk_cli_options *options, perk_cli_engine *engine) {
    perk_config *config = &engine->options.config;
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("model", &engine->model, "DIR", "a model folder; a config.json with --random-weights"),
        PERK_CLI_OPTION_CHOICE("backend", &engine->backend, "auto|gpu|reference", "auto: the GPU where there is one"),
        PERK_CLI_OPTION_INT("device", &engine->options.device, "N", "which GPU, from 0", 0, 1023),
        PERK_CLI_OPTION_INT("threads", &engine->options.threads, "N", "CPU threads; 0: all cores", 0, 4096),
        PERK_CLI_OPTION_INT("max-seq-length", &config->max_seq_length, "N", "prompt and answer together", 1, INT32_MAX),
        PERK_CLI_OPTION_INT("max-batched-tokens", &config->max_num_batched_tokens, "N",
                            "tokens a step; prompts enter so", 1, INT32_MAX),
        PERK_CLI_OPTION_TEXT("programs", &engine->programs, "N,N...",
                             "programs for steps of so many tokens; default: 1, 8 and all"),
        PERK_CLI_OPTION_INT("max-batched-requests", &config->max_num_batched_requests, "N", "requests a step", 1,
                            INT32_MAX),
        PERK_CLI_OPTION_INT("page-size", &config->page_size, "N", "positions in a KV page, a power of two", 1,
                            INT32_MAX),
        PERK_CLI_OPTION_INT("max-pages", &config->max_num_pages, "N", "KV pages in the pool", 1, INT32_MAX),
        PERK_CLI_OPTION_FLAG("random-weights", &engine->random_weights, "draw the weights, read none"),
        PERK_CLI_OPTION_SEED("weights-seed", &engine->options.seed, "of random weights"),
        PERK_CLI_OPTION_FLAG("portable", &engine->portable, "nothing newer than sm_80 instructions"),
        PERK_CLI_OPTION_FLAG("unchecked", &engine->unchecked, "launch without the plan checker"),
        PERK_CLI_OPTION_TEXT("cache-dir", &engine->options.cache_folder, "DIR", "of compiled programs"),
        PERK_CLI_OPTION_FLAG("no-cache", &engine->no_cache, "compile anew, keep nothing"),
        PERK_CLI_OPTION_FLAG("verbose", &engine->verbose, "the log and the start report on stderr"),
        PERK_CLI_OPTION_FLAG("json", &engine->json, "the result as one JSON object"),
    };
    perk_cli_add(options, items, (int)PERK_COUNT(items));
}

/* The phases of a start, for printing in both forms. */
/* clang-format off */
#define START_PHASES(X) \
    X(open_ms) X(driver_ms) X(context_ms) X(plan_ms) X(check_ms) X(emit_ms) X(compile_ms) X(module_ms) X(weights_ms) \
    X(total_ms)
/* clang-format on */

static const char *backend_name(perk_backend backend) { return backend == PERK_BACKEND_GPU ? "gpu" : "reference"; }

static json_t *program_json(const perk_program_report *program) {
    return json_pack("{s:i, s:b, s:f, s:f, s:f, s:f, s:f, s:i, s:i, s:i, s:i, s:I}", "tokens", (int)program->tokens,
                     "cache_hit", program->cache_hit != 0, "plan_ms", program->plan_ms, "check_ms", program->check_ms,
                     "emit_ms", program->emit_ms, "compile_ms", program->compile_ms, "module_ms", program->module_ms,
                     "registers", (int)program->registers, "spill_bytes", (int)program->spill_bytes, "shared_bytes",
                     (int)program->shared_bytes, "cubin_bytes", (int)program->cubin_bytes, "memory_bytes",
                     (json_int_t)program->memory_bytes);
}

json_t *perk_cli_program_steps_json(const perk_engine *engine) {
    perk_engine_stats stats;
    json_t *steps = json_array();
    perk_engine_statistics(engine, &stats);
    for (int i = 0; i < perk_engine_report(engine)->program_count; i++)
        json_array_append_new(steps, json_integer((json_int_t)stats.program_steps[i]));
    return steps;
}

json_t *perk_cli_report_json(const perk_start_report *report) {
    json_t *json = json_pack("{s:s, s:s, s:s, s:b, s:I, s:i, s:i, s:i, s:i}", "backend", backend_name(report->backend),
                             "device", report->device, "arch", report->arch, "cache_hit", report->cache_hit != 0,
                             "weights_bytes", (json_int_t)report->weights_bytes, "registers", (int)report->registers,
                             "spill_bytes", (int)report->spill_bytes, "shared_bytes", (int)report->shared_bytes,
                             "cubin_bytes", (int)report->cubin_bytes);
#define ADD_PHASE(phase) json_object_set_new(json, #phase, json_real(report->phase));
    START_PHASES(ADD_PHASE)
#undef ADD_PHASE
    json_t *programs = json_array();
    for (int i = 0; i < report->program_count; i++) json_array_append_new(programs, program_json(&report->programs[i]));
    json_object_set_new(json, "programs", programs);
    return json;
}

static void print_report(const perk_start_report *report) {
    perk_cli_error("backend %s, device %s %s", backend_name(report->backend), report->device, report->arch);
    for (int i = 0; i < report->program_count; i++) {
        const perk_program_report *p = &report->programs[i];
        perk_cli_error("program for %d tokens a step, %s: %d registers, %d bytes spilled, %d bytes of shared memory, "
                       "cubin %d bytes, %.1f MB on the device; plan %.1f ms, check %.1f, emit %.1f, compile %.1f",
                       p->tokens, p->cache_hit ? "from the cache" : "compiled", p->registers, p->spill_bytes,
                       p->shared_bytes, p->cubin_bytes, (double)p->memory_bytes * 1e-6, p->plan_ms, p->check_ms,
                       p->emit_ms, p->compile_ms);
    }
#define PRINT_PHASE(phase)                                                                                             \
    if (report->phase > 0) perk_cli_error("  %-12s%9.1f ms", #phase, report->phase);
    START_PHASES(PRINT_PHASE)
#undef PRINT_PHASE
    if (report->weights_ms > 0)
        perk_cli_error("  weights: %.3f GB, %.2f GB/s", (double)report->weights_bytes * 1e-9,
                       (double)report->weights_bytes * 1e-6 / report->weights_ms);
}

perk_status perk_cli_programs_parse(const char *text, int32_t tokens[PERK_MAX_PROGRAMS], perk_error *err) {
    perk_cli_ids sizes = {0};
    perk_status status = perk_cli_ids_parse(&sizes, text, err);
    if (!status && (sizes.count == 0 || sizes.count > PERK_MAX_PROGRAMS))
        status = perk_fail(err, PERK_INVALID_ARGUMENT, "%zu programs: an engine holds 1 to %d", sizes.count,
                           PERK_MAX_PROGRAMS);
    for (size_t i = 0; i < sizes.count && !status; i++) {
        tokens[i] = sizes.items[i];
        if (tokens[i] < 1) status = perk_fail(err, PERK_INVALID_ARGUMENT, "a program for 0 tokens a step");
    }
    perk_cli_ids_free(&sizes);
    return status;
}

int perk_cli_open(const perk_cli_command *command, perk_cli_engine *engine, perk_engine **out) {
    *out = NULL;
    if (!engine->model) return perk_cli_usage(command, "--model is missing");
    perk_engine_options *options = &engine->options;
    options->backend = (perk_backend)engine->backend;
    options->precision = engine->precision;
    options->random_weights = engine->random_weights;
    options->portable = engine->portable;
    options->unchecked = engine->unchecked;
    options->no_cache = engine->no_cache;
    options->log = perk_cli_log(engine->verbose);
    options->progress = perk_cli_progress();
    perk_error err = {0};
    if (engine->programs && perk_cli_programs_parse(engine->programs, options->program_tokens, &err))
        return perk_cli_usage(command, "--programs: %s", err.message);
    if (perk_engine_open(out, engine->model, options, &err)) return perk_cli_fail(&err);
    wipe_bar();
    if (engine->verbose) print_report(perk_engine_report(*out));
    return PERK_EXIT_GO_ON;
}

/* ---- ids and streams ---- */

void perk_cli_ids_free(perk_cli_ids *ids) {
    free(ids->items);
    *ids = (perk_cli_ids){0};
}

static perk_status append_id(perk_cli_ids *ids, int32_t id, perk_error *err) {
    if (ids->count == ids->capacity) {
        size_t capacity = PERK_MAX(ids->capacity * 2, (size_t)64);
        int32_t *items = perk_realloc_array(ids->items, capacity, sizeof *items);
        if (!items) return perk_fail_memory(err, "token ids");
        ids->items = items;
        ids->capacity = capacity;
    }
    ids->items[ids->count++] = id;
    return PERK_OK;
}

perk_status perk_cli_ids_parse(perk_cli_ids *ids, const char *text, perk_error *err) {
    static const char separators[] = ", \t\r\n";
    for (text += strspn(text, separators); *text; text += strspn(text, separators)) {
        char *end;
        errno = 0;
        long id = strtol(text, &end, 10);
        if (errno || end == text || (*end && !strchr(separators, *end)) || id < 0 || id > INT32_MAX)
            return perk_fail(err, PERK_BAD_FORMAT, "\"%.*s\" is not a token id", (int)strcspn(text, separators), text);
        perk_status status = append_id(ids, (int32_t)id, err);
        if (status) return status;
        text = end;
    }
    return PERK_OK;
}

perk_status perk_cli_ids_from_json(perk_cli_ids *ids, const json_t *list, perk_error *err) {
    if (!json_is_array(list)) return perk_fail(err, PERK_BAD_FORMAT, "token ids must be a list of whole numbers");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *item = json_array_get(list, i);
        json_int_t id = json_is_integer(item) ? json_integer_value(item) : -1;
        if (id < 0 || id > INT32_MAX) return perk_fail(err, PERK_BAD_FORMAT, "element %zu of a list is no token id", i);
        perk_status status = append_id(ids, (int32_t)id, err);
        if (status) return status;
    }
    return PERK_OK;
}

perk_status perk_cli_read_all(FILE *file, perk_buffer *text, perk_error *err) {
    char chunk[65536];
    size_t got;
    while ((got = fread(chunk, 1, sizeof chunk, file)) > 0) perk_buffer_append(text, chunk, got);
    perk_buffer_append(text, "", 0); /* data is a string even when nothing came */
    if (ferror(file)) return perk_fail(err, PERK_IO, "cannot read stdin: %s", strerror(errno));
    return text->failed ? perk_fail_memory(err, "the input") : PERK_OK;
}

perk_status perk_cli_read_file(const char *path, perk_buffer *text, perk_error *err) {
    if (strcmp(path, "-") == 0) return perk_cli_read_all(stdin, text, err);
    char *data = NULL;
    size_t size = 0;
    perk_status status = perk_read_file(path, (size_t)1 << 30, &data, &size, err);
    if (!status) *text = (perk_buffer){.data = data, .size = size, .capacity = size + 1};
    return status;
}

perk_status perk_cli_write_file(const char *path, const void *data, size_t size, perk_error *err) {
    FILE *file = fopen(path, "wbe");
    if (!file) return perk_fail(err, PERK_IO, "%s: cannot create: %s", path, strerror(errno));
    bool written = fwrite(data, 1, size, file) == size;
    if (fclose(file) != 0 || !written) return perk_fail(err, PERK_IO, "%s: cannot write: %s", path, strerror(errno));
    return PERK_OK;
}

/* ---- requests and answers ---- */

const char *perk_cli_finish_name(perk_finish finish) {
    static const char *const names[] = {"none", "stop", "length", "cancelled"};
    return names[finish];
}

perk_status perk_cli_chat_text(const perk_tokenizer *tokenizer, const json_t *list, char **text, perk_error *err) {
    *text = NULL;
    size_t count = json_array_size(list);
    if (count == 0) return perk_fail(err, PERK_BAD_FORMAT, "expected a list of {\"role\": ..., \"content\": ...}");
    perk_chat_message *messages = perk_calloc(count, sizeof *messages);
    if (!messages) return perk_fail_memory(err, "chat messages");
    perk_status status = PERK_OK;
    for (size_t i = 0; i < count && !status; i++) {
        const json_t *message = json_array_get(list, i);
        messages[i].role = json_string_value(json_object_get(message, "role"));
        messages[i].content = json_string_value(json_object_get(message, "content"));
        if (!messages[i].role || !messages[i].content)
            status = perk_fail(err, PERK_BAD_FORMAT, "message %zu needs the strings \"role\" and \"content\"", i);
    }
    if (!status) status = perk_chat_format(tokenizer, messages, count, 1, text, err);
    free(messages);
    return status;
}
