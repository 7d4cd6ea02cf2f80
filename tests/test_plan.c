/* Plans and programs of the real Qwen3 shapes: lowered, proven by the checker, emitted, and compiled for every
 * architecture, with no spill and within the launch configuration. No GPU needed; compiling needs NVRTC. */
#include "jit/emit.h"
#include "src/device.h"
#include "src/model.h"
#include "src/program.h"
#include "test.h"

static perk_error err;

typedef struct shape {
    const char *folder;
    int tokens, requests;
    bool hopper_only; /* compiled for sm_90a alone, planned and checked for all */
    bool many_steps;  /* compiled for sm_90a as a program of many steps, too */
} shape;

static const char *const archs[] = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"};

static perk_model *open_model(const char *folder) {
    char path[512];
    perk_model *model;
    snprintf(path, sizeof path, "%s/%s", PERK_SOURCE_DIR, folder);
    CHECK_OK(perk_model_describe(&model, path, &err));
    return model;
}

static perk_plan *make_plan(const perk_graph *graph, const char *arch, int portable, int tokens, int requests) {
    perk_device_desc device;
    CHECK_OK(perk_device_describe_arch(arch, &device, &err));
    if (portable) perk_device_make_portable(&device);
    perk_config config = {.max_num_batched_tokens = tokens,
                          .max_num_batched_requests = requests,
                          .max_num_pages = 512,
                          .max_seq_length = 2048};
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    perk_plan *plan;
    CHECK_OK(perk_plan_create(&plan, graph, &device, &config, &err));
    return plan;
}

/* Every byte of every matrix is streamed exactly once a step, or once for each share of the tokens. */
static void check_stream(const perk_plan *plan) {
    uint64_t streamed = 0, packed = 0;
    for (int i = 0; i < plan->task_count; i++) streamed += plan->tasks[i].stream_bytes;
    for (int i = 0; i < plan->stage_count; i++)
        if (plan->stages[i].stream.tensor >= 0)
            packed += plan->tensors[plan->stages[i].stream.tensor].bytes *
                      (uint64_t)PERK_MAX(1, plan->stages[i].stream.shares);
    CHECK(streamed == packed && packed > 0, "%llu of %llu", (unsigned long long)streamed, (unsigned long long)packed);
}

/* Columns between a tensor's width and its stride are zero: nothing of another width may share its bytes. */
static void check_padding(const perk_plan *plan) {
    for (int i = 0; i < plan->tensor_count; i++)
        for (int j = 0; j < i; j++) {
            const perk_plan_tensor *a = &plan->tensors[i], *b = &plan->tensors[j];
            if (a->space != PERK_SPACE_ACTIVATIONS || b->space != a->space) continue;
            if (a->offset + a->bytes <= b->offset || b->offset + b->bytes <= a->offset) continue;
            CHECK(a->offset == b->offset && a->cols == b->cols && a->rows == b->rows && a->layout == b->layout,
                  "%s and %s", a->name, b->name);
        }
}

/* Compiles the plan's program. */
static void compile_plan(const perk_plan *plan, const char *what) {
    const perk_program_options options = {0};
    perk_program program;
    CHECK_OK(perk_program_build(plan, &options, &program, &err));
    printf("%-28s T%-2d %-8s %s%3d workers  ring %2d  staging %6d  %3u registers  %zu bytes spilled  %6zu bytes  %.0f "
           "ms\n",
           what, plan->config.max_num_batched_tokens, plan->device.arch, plan->device.portable ? "portable " : "",
           plan->device.worker_count, plan->ring_slots, plan->staging_bytes, program.kernel.registers,
           program.spill_bytes, program.cubin_size, program.compile_ms);
    fflush(stdout);
    CHECK(!program.kernel.spills && program.spill_bytes == 0, "%s spills for %s", what, plan->device.arch);
    CHECK(program.kernel.registers * PERK_BLOCK_THREADS <= 65536);
    CHECK((uint32_t)plan->shared_bytes + program.kernel.shared_bytes <= (uint32_t)plan->device.shared_memory);
    perk_program_free(&program);
}

/* Steps of so many tokens need wgmma. */
static void check_refused(const perk_graph *graph, const char *arch, int portable, int tokens) {
    perk_device_desc device;
    CHECK_OK(perk_device_describe_arch(arch, &device, &err));
    if (portable) perk_device_make_portable(&device);
    perk_config config = {.max_num_batched_tokens = tokens, .max_seq_length = 2048};
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    perk_plan *plan;
    CHECK_FAILS(perk_plan_create(&plan, graph, &device, &config, &err), PERK_UNSUPPORTED, "at most 64 rows");
}

/* A program for many tokens a step takes the weights where a program for one has left them. */
static void check_same_weights(const perk_plan *plan, const perk_graph *graph) {
    perk_plan *other = make_plan(graph, plan->device.arch, 0, 1, 1);
    int weights = 0, found = 0;
    for (int i = 0; i < plan->tensor_count; i++) {
        const perk_plan_tensor *a = &plan->tensors[i];
        if (a->space != PERK_SPACE_WEIGHTS) continue;
        weights++;
        for (int j = 0; j < other->tensor_count; j++) {
            const perk_plan_tensor *b = &other->tensors[j];
            found += b->space == a->space && b->graph_tensor == a->graph_tensor && b->layout == a->layout &&
                     b->offset == a->offset && b->bytes == a->bytes;
        }
    }
    CHECK(found == weights && plan->space_bytes[PERK_SPACE_WEIGHTS] == other->space_bytes[PERK_SPACE_WEIGHTS],
          "%d of %d matrices lie where they lay", found, weights);
    perk_plan_free(other);
}

static void run_shape(bool compile, const shape *s) {
    perk_model *model = open_model(s->folder);
    for (size_t a = 0; a < PERK_COUNT(archs); a++)
        for (int portable = 0; portable <= !strcmp(archs[a], "sm_90a"); portable++) {
            if (s->tokens > 64 && (portable || strcmp(archs[a], "sm_90a") != 0)) {
                check_refused(model->graph, archs[a], portable, s->tokens);
                continue;
            }
            perk_plan *plan = make_plan(model->graph, archs[a], portable, s->tokens, s->requests);
            double begin = perk_now();
            CHECK_OK(perk_plan_check(plan, &err));
            if (!strcmp(archs[a], "sm_90a"))
                printf("%s: %d stages, %d tasks, %d kinds, %.1f MB activations, checked in %.0f ms\n", s->folder,
                       plan->stage_count, plan->task_count, plan->kind_count,
                       (double)plan->space_bytes[PERK_SPACE_ACTIVATIONS] / 1e6, (perk_now() - begin) * 1e3);
            check_stream(plan);
            check_padding(plan);
            if (plan->wide_tokens > 0) check_same_weights(plan, model->graph);
            if (compile && (!s->hopper_only || !strcmp(archs[a], "sm_90a"))) compile_plan(plan, s->folder);
            plan->many_steps = true; /* with what happens between steps, tokens that are drawn among it */
            CHECK_OK(perk_plan_check(plan, &err));
            /* Its clerk has few registers, where warps give theirs away. */
            if (compile && s->many_steps && !portable && !strcmp(archs[a], "sm_90a")) compile_plan(plan, s->folder);
            perk_plan_free(plan);
        }
    perk_model_free(model);
}

int main(int argc, char **argv) {
    static const shape shapes[] = {
        {"examples/tiny", 8, 4, false, true},
        {"tests/fixtures/qwen3/gqa5_odd", 16, 4, false, false},
        {"tests/fixtures/qwen3/bias", 16, 4, false, false},
        {"tests/fixtures/qwen3/gqa1_fp32", 16, 4, false, false},
        {"tests/fixtures/qwen3/gqa2_fp16", 16, 4, false, false},
        {"tests/fixtures/qwen3/gqa3_head96", 16, 4, false, false},
        {"tests/fixtures/qwen3/gqa4_head128", 16, 4, false, false},
        {"tests/fixtures/qwen3/window_types", 16, 4, false,
         false}, /* the other fixtures differ in tables, not in the program */
        {"bench/configs/qwen3-0.6b", 1, 1, false, false},
        {"bench/configs/qwen3-8b", 16, 8, true, true},
        {"bench/configs/qwen3-8b", 32, 32, true, false},
        {"bench/configs/llama-3.2-1b", 40, 8, true, false},
        {"bench/configs/qwen3-8b", 256, 8, true, false},
        {"bench/configs/qwen3-8b", 1024, 8, true, false},
        {"tests/fixtures/qwen3/bias", 100, 4, false, false},
        {"bench/configs/qwen3-32b", 64, 8, true, false},
    };
    perk_nvrtc_identity nvrtc;
    bool compile = perk_nvrtc_identify(0, &nvrtc, &err) == PERK_OK;
    if (!compile) fprintf(stderr, "not compiled, no NVRTC: %s\n", err.message);
    for (size_t i = 0; i < PERK_COUNT(shapes); i++)
        if (argc < 2 || atoi(argv[1]) == (int)i) run_shape(compile, &shapes[i]);
    return 0;
}
