/* What scripts hand to the CLI as files and on stdin: a byte that chooses the command, then its input. The lists of ids
 * of `perk logits --ids`, the lines of `perk tokenize --jsonl`, with --chat and --decode, and plain ids. */
#include "fuzz_json.h"

#include "src/cli/cli.h"

static char folder[] = "/tmp/perk-fuzz-XXXXXX", tokenizer_path[64];
static fuzz_file file;

static void remove_folder(void) {
    unlink(tokenizer_path);
    rmdir(folder);
}

/* The commands write to stdout and stderr. glibc's streams are variables, and libFuzzer has its own copies. */
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    FUZZ_CHECK(mkdtemp(folder));
    snprintf(tokenizer_path, sizeof tokenizer_path, "%s/tokenizer.json", folder);
    FUZZ_CHECK(symlink(PERK_SOURCE_DIR "/tests/fuzz/tokenizer.json", tokenizer_path) == 0);
    atexit(remove_folder);
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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size == 0) return 0;
    const char *path = fuzz_file_fill(&file, data + 1, size - 1);
    int code;
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
