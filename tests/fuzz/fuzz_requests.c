/* What scripts hand to the CLI as files and on stdin: a byte that chooses the command, then its input. The lists of ids
 * of `perk logits --ids`, the lines of `perk tokenize --jsonl`, with --chat and --decode, plain ids, and the requests
 * of `perk run --prompts`, which a model of 128 tokens answers. */
#include "fuzz_json.h"

#include "src/cli/cli.h"

static const struct model_file {
    const char *name, *target;
} model_files[] = {
    {"tokenizer.json", PERK_SOURCE_DIR "/tests/fuzz/tokenizer.json"},
    {"config.json", PERK_SOURCE_DIR "/tests/fixtures/checkpoints/single/config.json"},
    {"model.safetensors", PERK_SOURCE_DIR "/tests/fixtures/checkpoints/single/model.safetensors"},
};
static char folder[] = "/tmp/perk-fuzz-XXXXXX";
static perk_engine *engine;
static fuzz_file file;

static void remove_all(void) {
    perk_engine_free(engine);
    for (size_t i = 0; i < PERK_COUNT(model_files); i++) {
        char path[64];
        snprintf(path, sizeof path, "%s/%s", folder, model_files[i].name);
        unlink(path);
    }
    rmdir(folder);
}

static void open_model(void) {
    perk_error err = {0};
    perk_engine_options options = {.backend = PERK_BACKEND_REFERENCE, .threads = 1, .config.max_seq_length = 24};
    FUZZ_CHECK(mkdtemp(folder));
    for (size_t i = 0; i < PERK_COUNT(model_files); i++) {
        char path[64];
        snprintf(path, sizeof path, "%s/%s", folder, model_files[i].name);
        FUZZ_CHECK(symlink(model_files[i].target, path) == 0);
    }
    FUZZ_CHECK(perk_engine_open(&engine, folder, &options, &err) == PERK_OK, "%s", err.message);
}

/* The commands write to stdout and stderr. glibc's streams are variables, and libFuzzer has its own copies. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    open_model();
    atexit(remove_all);
    stdout = fopen("/dev/null", "w");
    stderr = fopen("/dev/null", "w");
    FUZZ_CHECK(stdout && stderr);
    return 0;
}

static int tokenize(const char *path, const char *first, const char *second) {
    static const perk_cli_command command = {.name = "tokenize", .usage = "", .run = perk_cli_tokenize};
    const char *arguments[] = {"--model", folder, first, second};
    stdin = fopen(path, "r");
    if (!stdin) return PERK_EXIT_FAILURE;
    int code = command.run(&command, second ? 4 : 3, (char **)(uintptr_t)arguments);
    fclose(stdin);
    return code;
}

/* The lists are read before the model is missed. */
static int logits(const char *path) {
    static const perk_cli_command command = {.name = "logits", .usage = "", .run = perk_cli_logits};
    const char *arguments[] = {"--perplexity", "--ids", path};
    return command.run(&command, 3, (char **)(uintptr_t)arguments);
}

static int run_prompts(const char *path) {
    perk_buffer text = {0};
    perk_error err = {0};
    perk_sampling sampling = {.max_tokens = 3};
    FUZZ_CHECK(perk_cli_read_file(path, &text, &err) == PERK_OK, "%s", err.message);
    int code = perk_cli_run_prompts(engine, &text, &sampling);
    perk_buffer_free(&text);
    int32_t running = 0;
    FUZZ_CHECK(perk_engine_step(engine, &running, &err) == PERK_OK && running == 0, "%d still run", running);
    return code;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    const char *path = fuzz_file_fill(&file, data + 1, size - 1);
    int code;
    if (data[0] >= 128) {
        code = run_prompts(path);
        FUZZ_CHECK(code == PERK_EXIT_OK || code == PERK_EXIT_FAILURE, "%d", code);
        return 0;
    }
    switch (data[0] % 5) {
    case 0: code = logits(path); break;
    case 1: code = tokenize(path, "--jsonl", NULL); break;
    case 2: code = tokenize(path, "--jsonl", "--chat"); break;
    case 3: code = tokenize(path, "--jsonl", "--decode"); break;
    default: code = tokenize(path, "--decode", NULL); break;
    }
    FUZZ_CHECK(code >= PERK_EXIT_OK && code <= PERK_EXIT_USAGE, "%d", code);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    return fuzz_mutate_json(data, size, max_size, seed, 1);
}
