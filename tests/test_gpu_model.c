/* Whole models on the GPU against the reference executor: the shipped model and the small configurations of all
 * families in the fixtures; logits in chunks of several sizes, several requests at once. Skipped where there is no GPU.
 */
#include "perk/engine.h"

#include "gpu_cases.h"
#include "model_noise.h"

#include <dirent.h>

enum { LOGIT_TOKENS = 50, REQUESTS = 5, NEW_TOKENS = 32 };

static perk_error err;
static const char *root;
static bool with_smaller; /* programs, which take turns with the one under test */

static perk_engine *open_engine(const char *folder, perk_backend backend, int tokens, int portable) {
    perk_engine_options options = {.backend = backend, .portable = portable, .precision = 1};
    options.config = (perk_config){.max_num_batched_tokens = tokens,
                                   .max_num_batched_requests = tokens < REQUESTS ? tokens : REQUESTS,
                                   .max_num_logit_rows = tokens,
                                   .page_size = 16,
                                   .max_seq_length = 128};
    if (!with_smaller) options.program_tokens[0] = tokens;
    perk_engine *engine = NULL;
    perk_status status = perk_engine_open(&engine, folder, &options, &err);
    if (status == PERK_UNSUPPORTED) return NULL;
    CHECK(status == PERK_OK, "%s: %s", folder, err.message);
    return engine;
}

static double run_requests(perk_engine *gpu, perk_engine *reference) {
    int vocab = perk_engine_vocab_size(gpu);
    int32_t prompts[REQUESTS][64];
    int lengths[REQUESTS] = {1, 15, 16, 17, 40};
    perk_request *requests[REQUESTS];
    perk_sampling sampling = {.max_tokens = NEW_TOKENS, .ignore_eos = 1};
    for (int r = 0; r < REQUESTS; r++) {
        some_ids(prompts[r], lengths[r], vocab, r);
        CHECK_OK(perk_engine_submit(gpu, prompts[r], (size_t)lengths[r], &sampling, &requests[r], &err));
    }
    int32_t running = 1;
    for (int steps = 0; running > 0; steps++) {
        CHECK_OK(perk_engine_step(gpu, &running, &err));
        CHECK(steps < 2000, "the requests do not end");
    }
    double worst = 0;
    for (int r = 0; r < REQUESTS; r++) {
        size_t count;
        const int32_t *tokens = perk_request_tokens(requests[r], &count);
        CHECK(count == NEW_TOKENS, "%zu tokens", count);
        worst = fmax(worst, worst_choice(reference, prompts[r], lengths[r], tokens, (int)count));
        perk_request_free(requests[r]);
    }
    return worst;
}

static void test_folder(const char *folder, int tokens, int portable) {
    int32_t ids[LOGIT_TOKENS];
    perk_engine *gpu = open_engine(folder, PERK_BACKEND_GPU, tokens, portable);
    if (!gpu) {
        printf("%-24s refused: %.90s\n", strrchr(folder, '/') + 1, err.message);
        return;
    }
    perk_engine *reference = open_engine(folder, PERK_BACKEND_REFERENCE, 16, 0);
    size_t values = LOGIT_TOKENS * (size_t)perk_engine_vocab_size(gpu);
    float *got = malloc(values * sizeof *got), *want = malloc(values * sizeof *want);
    some_ids(ids, LOGIT_TOKENS, perk_engine_vocab_size(gpu), 3);
    CHECK_OK(perk_engine_logits(gpu, ids, LOGIT_TOKENS, got, &err));
    CHECK_OK(perk_engine_logits(reference, ids, LOGIT_TOKENS, want, &err));
    double error = relative_error(got, want, values), top = 0;
    for (size_t i = 0; i < values; i++) top = fmax(top, fabs((double)want[i]));
    double gap = run_requests(gpu, reference);
    printf("%-24s T%-3d %-9s logits %.2e, worst choice %.2e below the best of top %.1f\n", strrchr(folder, '/') + 1,
           tokens, portable ? "portable" : "native", error, gap, top);
    CHECK(error <= LOGITS_NOISE, "%s", folder);
    CHECK(gap <= CHOICE_NOISE * top, "%s: a request chose a token %.3g below the best", folder, gap);
    free(got);
    free(want);
    perk_engine_free(gpu);
    perk_engine_free(reference);
}

static gpu_cases cases;

/* `folder` below the root. */
static void run_case(const char *folder, int tokens, int portable) {
    char name[160], path[1200];
    snprintf(name, sizeof name, "%.120s T%d%s%s", folder, tokens, portable ? " portable" : "",
             with_smaller ? ", 8 and 1" : "");
    snprintf(path, sizeof path, "%s/%s", root, folder);
    if (gpu_case_begin(&cases, name)) {
        test_folder(path, tokens, portable);
        gpu_case_end();
    }
}

static int has_gpu(void) {
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        char folder[600];
        perk_engine *engine;
        perk_engine_options options = {.backend = PERK_BACKEND_GPU};
        snprintf(folder, sizeof folder, "%s/examples/tiny", root);
        perk_status status = perk_engine_open(&engine, folder, &options, &err);
        if (status == PERK_NO_DRIVER || status == PERK_NO_DEVICE) fprintf(stderr, "skipped, no GPU: %s\n", err.message);
        _exit(status == PERK_NO_DRIVER || status == PERK_NO_DEVICE ? TEST_SKIP : 0);
    }
    int result = 1;
    waitpid(child, &result, 0);
    return !(WIFEXITED(result) && WEXITSTATUS(result) == TEST_SKIP);
}

static void run_family(const char *family) {
    char path[1200], folder[600];
    snprintf(path, sizeof path, "%s/%s", root, family);
    DIR *entries = opendir(path);
    CHECK(entries, "%s", path);
    for (struct dirent *entry; (entry = readdir(entries));) {
        if (entry->d_name[0] == '.') continue;
        snprintf(folder, sizeof folder, "%s/%s", family, entry->d_name);
        run_case(folder, 16, 0);
    }
    closedir(entries);
}

int main(int argc, char **argv) {
    static const char *const families[] = {"tests/fixtures/qwen3", "tests/fixtures/qwen2", "tests/fixtures/llama",
                                           "tests/fixtures/mistral"};
    root = argc > 1 ? argv[1] : PERK_SOURCE_DIR;
    if (!has_gpu()) return TEST_SKIP;
    for (int portable = 0; portable < 2; portable++)
        for (int tokens = 1; tokens <= 64; tokens *= 4) run_case("examples/tiny", tokens, portable);
    with_smaller = true;
    run_case("examples/tiny", 64, 0);
    with_smaller = false;
    for (size_t i = 0; i < PERK_COUNT(families); i++) run_family(families[i]);
    return gpu_cases_finish(&cases);
}
