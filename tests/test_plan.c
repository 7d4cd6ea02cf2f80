/* Plans and programs of the real Qwen3 shapes: lowered, proven by the checker, emitted, and compiled for every
 * architecture, with no spill and within the launch configuration. No GPU needed; compiling needs NVRTC. */
#include "jit/cubin_info.h"
#include "jit/emit.h"
#include "src/device.h"
#include "src/model.h"
#include "test.h"

static perk_error err;

typedef struct shape {
    const char *folder;
    int tokens, requests;
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
    perk_config config = {.max_num_batched_tokens = tokens, .max_num_batched_requests = requests, .max_num_pages = 512,
                          .max_seq_length = 2048};
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    perk_plan *plan;
    CHECK_OK(perk_plan_create(&plan, graph, &device, &config, &err));
    return plan;
}

/* Every byte of every matrix is streamed exactly once a step. */
static void check_stream(const perk_plan *plan) {
    uint64_t streamed = 0, packed = 0;
    for (int i = 0; i < plan->task_count; i++) streamed += plan->tasks[i].stream_bytes;
    for (int i = 0; i < plan->stage_count; i++)
        if (plan->stages[i].stream.tensor >= 0) packed += plan->tensors[plan->stages[i].stream.tensor].bytes;
    CHECK(streamed == packed && packed > 0, "%llu of %llu", (unsigned long long)streamed, (unsigned long long)packed);
}

static void compile_plan(const perk_nvrtc *nvrtc, const perk_plan *plan, const char *what) {
    perk_buffer source = {0};
    perk_compile_header *headers;
    size_t header_count;
    CHECK_OK(perk_emit_source(plan, &source, &err));
    CHECK_OK(perk_emit_headers(&headers, &header_count, &err));
    perk_compile_request request = {.source = source.data, .name = "program.cu", .headers = headers,
                                    .header_count = header_count, .arch = plan->device.arch};
    perk_compile_result result;
    CHECK_OK(perk_compile(nvrtc, &request, &result, &err));
    perk_cubin_kernel_info info;
    CHECK_OK(perk_cubin_info(result.cubin, result.cubin_size, PERK_KERNEL_NAME, &info, &err));
    printf("%-28s %-8s %s%3d workers  ring %2d  staging %6d  %3u registers  %u spills  frame %u  %6zu bytes  %.0f ms\n", what,
           plan->device.arch, plan->device.portable ? "portable " : "", plan->device.worker_count, plan->ring_slots,
           plan->staging_bytes, info.registers, info.spill_instructions, info.frame_bytes, result.cubin_size,
           result.milliseconds);
    CHECK(!info.spills && result.spill_bytes == 0 && info.frame_bytes == 0, "%s spills for %s:\n%s", what,
          plan->device.arch, result.log);
    CHECK(info.registers * PERK_BLOCK_THREADS <= 65536);
    CHECK(result.performance_warnings == 0);
    CHECK((uint32_t)plan->shared_bytes + info.shared_bytes + info.reserved_shared_bytes <=
          (uint32_t)plan->device.shared_memory + info.reserved_shared_bytes);
    perk_compile_result_free(&result);
    perk_emit_headers_free(headers, header_count);
    perk_buffer_free(&source);
}

static void run_shape(const perk_nvrtc *nvrtc, const shape *s) {
    perk_model *model = open_model(s->folder);
    for (size_t a = 0; a < PERK_COUNT(archs); a++)
        for (int portable = 0; portable <= !strcmp(archs[a], "sm_90a"); portable++) {
            perk_plan *plan = make_plan(model->graph, archs[a], portable, s->tokens, s->requests);
            double begin = perk_now();
            CHECK_OK(perk_plan_check(plan, &err));
            if (a == 3)
                printf("%s: %d stages, %d tasks, %d kinds, %.1f MB activations, checked in %.0f ms\n", s->folder,
                       plan->stage_count, plan->task_count, plan->kind_count,
                       (double)plan->space_bytes[PERK_SPACE_ACTIVATIONS] / 1e6, (perk_now() - begin) * 1e3);
            check_stream(plan);
            if (nvrtc) compile_plan(nvrtc, plan, s->folder);
            perk_plan_free(plan);
        }
    perk_model_free(model);
}

int main(int argc, char **argv) {
    static const shape shapes[] = {
        {"examples/tiny", 8, 4},
        {"bench/configs/qwen3-0.6b", 1, 1},
        {"bench/configs/qwen3-8b", 16, 8},
        {"bench/configs/qwen3-32b", 64, 8},
    };
    perk_nvrtc *nvrtc = NULL;
    if (perk_nvrtc_open(&nvrtc, NULL, &err) != PERK_OK) fprintf(stderr, "not compiled, no NVRTC: %s\n", err.message);
    for (size_t i = 0; i < PERK_COUNT(shapes); i++)
        if (argc < 2 || atoi(argv[1]) == (int)i) run_shape(nvrtc, &shapes[i]);
    perk_nvrtc_free(nvrtc);
    return 0;
}
