/* perk logits: what the model says after every one of given ids. */
#include "activations.h"
#include "cli.h"
#include "npy.h"

#include "src/engine.h"

#include <math.h>

typedef struct logits_options {
    perk_cli_engine engine;
    const char *ids, *out;
    int perplexity;
    perk_cli_dump dump;
} logits_options;

/* One list on its way through: rows go to the file, and to the sum of -log p(next id). */
typedef struct score_sum {
    const perk_cli_ids *list;
    size_t vocab;
    perk_npy *npy; /* file NULL: no file */
    double loss;
    uint64_t scored;
} score_sum;

static int parse(const perk_cli_command *command, logits_options *logits, int argc, char **argv) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("ids", &logits->ids, "FILE.json", "a list of lists of ids"),
        PERK_CLI_OPTION_TEXT("out", &logits->out, "FILE.npy", "where the logits go"),
        PERK_CLI_OPTION_FLAG("perplexity", &logits->perplexity, "print the perplexity of the ids"),
        PERK_CLI_OPTION_CHOICE("precision", &logits->engine.precision, "auto|bf16|fp32", "of the reference executor"),
    };
    perk_cli_options options = {0};
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    perk_cli_add_dump(&options, &logits->dump);
    perk_cli_add_engine(&options, &logits->engine);
    int code = perk_cli_parse(command, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    if (!logits->ids) return perk_cli_usage(command, "--ids is missing");
    if (!logits->out && !logits->perplexity && !logits->dump.folder)
        return perk_cli_usage(command, "give --out, --perplexity or --dump-activations");
    return PERK_EXIT_GO_ON;
}

/* ---- the lists ---- */

static void free_lists(perk_cli_ids *lists, size_t count) {
    for (size_t i = 0; lists && i < count; i++) perk_cli_ids_free(&lists[i]);
    free(lists);
}

static perk_status read_lists(const char *path, perk_cli_ids **out, size_t *count, perk_error *err) {
    json_error_t json_err;
    *out = NULL;
    *count = 0;
    json_t *json = json_load_file(path, 0, &json_err);
    if (!json)
        return perk_fail(err, PERK_BAD_FORMAT, "%s: %s (line %d)", path, json_err.text, PERK_MAX(json_err.line, 0));
    perk_status status = PERK_OK;
    perk_cli_ids *lists = perk_calloc(json_array_size(json), sizeof *lists);
    if (!lists)
        status = perk_fail_memory(err, path);
    else if (!json_is_array(json))
        status = perk_fail(err, PERK_BAD_FORMAT, "%s: must be a list of lists of ids", path);
    for (size_t i = 0; !status && i < json_array_size(json); i++) {
        status = perk_cli_ids_from_json(&lists[i], json_array_get(json, i), err);
        if (status) perk_fail_prefix(err, status, "%s: list %zu", path, i);
    }
    if (status) {
        free_lists(lists, json_array_size(json));
    } else {
        *out = lists;
        *count = json_array_size(json);
    }
    json_decref(json);
    return status;
}

/* ---- scoring ---- */

/* -log of the softmax's share of `id`. */
static double surprise(const float *logits, size_t vocab, int32_t id) {
    double largest = -INFINITY, sum = 0;
    for (size_t i = 0; i < vocab; i++) largest = fmax(largest, (double)logits[i]);
    for (size_t i = 0; i < vocab; i++) sum += exp((double)logits[i] - largest);
    return log(sum) + largest - (double)logits[id];
}

static perk_status take_rows(void *user, size_t first, size_t count, const float *logits, perk_error *err) {
    score_sum *scoring = user;
    for (size_t row = first; row < first + count && row + 1 < scoring->list->count; row++) {
        scoring->loss +=
            surprise(logits + (row - first) * scoring->vocab, scoring->vocab, scoring->list->items[row + 1]);
        scoring->scored++;
    }
    return scoring->npy->file ? perk_npy_write(scoring->npy, logits, count, err) : PERK_OK;
}

static perk_status score_lists(perk_engine *engine, const perk_cli_ids *lists, size_t count, score_sum *scoring,
                               perk_error *err) {
    for (size_t i = 0; i < count; i++) {
        scoring->list = &lists[i];
        perk_status status = perk_engine_stream_logits(engine, lists[i].items, lists[i].count, take_rows, scoring, err);
        if (status) return perk_fail_prefix(err, status, "list %zu", i);
    }
    return PERK_OK;
}

static int print_perplexity(const logits_options *logits, const perk_engine *engine, const score_sum *scoring) {
    double mean = scoring->scored ? scoring->loss / (double)scoring->scored : 0;
    if (!logits->engine.json) {
        printf("perplexity %.6f over %llu tokens (mean loss %.6f)\n", exp(mean), (unsigned long long)scoring->scored,
               mean);
        return PERK_EXIT_OK;
    }
    json_t *json = json_pack("{s:f, s:f, s:I, s:o}", "perplexity", exp(mean), "mean_loss", mean, "tokens",
                             (json_int_t)scoring->scored, "start", perk_cli_report_json(perk_engine_report(engine)));
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

static int score(perk_engine *engine, logits_options *logits, const perk_cli_ids *lists, size_t count) {
    perk_error err = {0};
    perk_npy npy = {0};
    score_sum scoring = {.vocab = (size_t)perk_engine_vocab_size(engine), .npy = &npy};
    uint64_t rows = 0;
    for (size_t i = 0; i < count; i++) rows += lists[i].count;
    perk_status status = PERK_OK;
    if (logits->out) status = perk_npy_create(&npy, logits->out, rows, scoring.vocab, &err);
    if (!status) status = perk_cli_dump_begin(&logits->dump, engine, &err);
    if (!status) status = score_lists(engine, lists, count, &scoring, &err);
    if (!status) status = perk_cli_dump_end(&logits->dump, &err);
    perk_status closed = perk_npy_close(&npy, !status, status ? NULL : &err);
    if (status || closed) return perk_cli_fail(&err);
    if (logits->perplexity) return print_perplexity(logits, engine, &scoring);
    return PERK_EXIT_OK;
}

/* 16 tokens a step, but a whole list in one where its activations are wanted. */
static int32_t tokens_a_step(const logits_options *logits, const perk_cli_ids *lists, size_t count) {
    size_t tokens = 16;
    for (size_t i = 0; logits->dump.folder && i < count; i++) tokens = PERK_MAX(tokens, lists[i].count);
    return (int32_t)PERK_MIN(tokens, (size_t)4096);
}

int perk_cli_logits(const perk_cli_command *self, int argc, char **argv) {
    logits_options logits = {0};
    int code = parse(self, &logits, argc, argv);
    if (code != PERK_EXIT_GO_ON) return code;
    perk_config *config = &logits.engine.options.config;
    perk_error err = {0};
    perk_cli_ids *lists;
    size_t count;
    if (read_lists(logits.ids, &lists, &count, &err)) return perk_cli_fail(&err);
    if (!config->max_num_batched_tokens) config->max_num_batched_tokens = tokens_a_step(&logits, lists, count);
    config->max_num_logit_rows = config->max_num_batched_tokens; /* every row is wanted */
    if (!logits.engine.programs) logits.engine.options.program_tokens[0] = config->max_num_batched_tokens;
    if (!config->max_num_batched_requests) config->max_num_batched_requests = 1;
    perk_engine *engine;
    code = perk_cli_open(self, &logits.engine, &engine);
    if (code == PERK_EXIT_GO_ON) code = score(engine, &logits, lists, count);
    perk_engine_free(engine);
    free_lists(lists, count);
    return code;
}
