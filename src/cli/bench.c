/* perk bench: the command line of all measurements. */
#include "bench.h"

enum { MAX_ROWS = 65536 };

typedef struct measurement {
    const char *name;
    int (*run)(const perk_bench_command *command);
    bool needs_model;
} measurement;

static const measurement measurements[] = {
    {"decode", perk_bench_measure_decode, true},   {"prefill", perk_bench_measure_prefill, true},
    {"startup", perk_bench_measure_startup, true}, {"load", perk_bench_measure_load, true},
    {"sync", perk_bench_measure_sync, false},      {"serve", perk_bench_measure_serve, true},
};

static const measurement *find_measurement(const char *name) {
    for (size_t i = 0; i < PERK_COUNT(measurements); i++)
        if (strcmp(measurements[i].name, name) == 0) return &measurements[i];
    return NULL;
}

static void add_options(perk_cli_options *options, perk_bench_command *c) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("batch", &c->batches, "N,...", "decode, serve: requests in a step; 1, in serve 8"),
        PERK_CLI_OPTION_TEXT("context", &c->contexts, "N,...", "decode: tokens that every request has before; 512"),
        PERK_CLI_OPTION_INT("steps", &c->bench.steps, "N", "decode: steps to time; 64", 1, 100000),
        PERK_CLI_OPTION_FLAG("many-steps", &c->bench.many_steps,
                             "decode: the steps follow each other in one launch; tokens as with a launch a step"),
        PERK_CLI_OPTION_INT("prompt-tokens", &c->prompt_tokens, "N", "prefill: tokens of the prompt; 2048", 1, 1 << 20),
        PERK_CLI_OPTION_INT("max-batched-tokens", &c->bench.tokens, "N",
                            "tokens that the program is built for; the batch, in prefill 64, in serve 16", 1, MAX_ROWS),
        PERK_CLI_OPTION_INT("runs", &c->runs, "N",
                            "startup: starts of each kind, prefill: prompts; 5; sync: launches; 64", 1, 10000),
        PERK_CLI_OPTION_INT("check-tokens", &c->check_tokens, "N",
                            "prompt of the comparison with the reference; 4, in prefill up to 64", 1, MAX_ROWS),
        PERK_CLI_OPTION_FLAG("no-check", &c->no_check, "do not compare; the result says so"),
        PERK_CLI_OPTION_FLAG("page-cache", &c->page_cache, "load: leave the files in the page cache"),
        PERK_CLI_OPTION_FLAG("one-start", &c->one_start, "startup: start once, in this process, and say how it went"),
        PERK_CLI_OPTION_FLAG("json", &c->json, "a JSON object a result, one a line"),
    };
    perk_bench_add_model_options(options, &c->bench);
    perk_serve_add_options(options, &c->serve);
    perk_cli_add(options, items, (int)PERK_COUNT(items));
}

static int measure(perk_bench_command *c, int argc, char **argv) {
    const perk_cli_command *self = c->self;
    perk_cli_options options = {0};
    perk_cli_arguments arguments = {0};
    add_options(&options, c);
    int code = perk_cli_parse(self, &options, argc, argv, 1, &arguments);
    if (code != PERK_EXIT_GO_ON) return code;
    const measurement *found = arguments.count == 1 ? find_measurement(arguments.items[0]) : NULL;
    if (!found)
        return perk_cli_usage(self, "say what to measure: perk bench decode, prefill, startup, load, sync or "
                                    "serve");
    if (found->needs_model && !c->bench.model) return perk_cli_usage(self, "--model is missing");
    return perk_cli_finish(found->run(c));
}

int perk_cli_bench(const perk_cli_command *self, int argc, char **argv) {
    perk_bench_command c = {
        .self = self, .bench = PERK_BENCH_DEFAULTS, .entered = perk_now(), .prompt_tokens = 2048, .word_count = argc};
    perk_error err = {0};
    c.bench.tokens = 0;
    c.words = perk_calloc((size_t)argc + 1, sizeof *c.words); /* parsing moves the words about */
    if (!c.words) {
        perk_fail_memory(&err, "the command line");
        return perk_cli_fail(&err);
    }
    memcpy(c.words, argv, (size_t)argc * sizeof *argv);
    int code = measure(&c, argc, argv);
    free(c.words);
    return code;
}
