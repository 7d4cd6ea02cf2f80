/* Sampling in the kernel (kernels_src/sample.cuh) against that of the host: the same tokens, whatever the logits and
 * the settings, and the same log probabilities; and that rows beside it change nothing. On the emulator;
 * EMULATOR_SEED=N runs everything in another order. PERK_TEST_GPU=1 runs it on the GPU and tells how long a row takes.
 */
#include "driver.h"
#include "fake_cuda/open_fake.h"
#include "jit/compile.h"
#include "jit/cubin_info.h"
#include "jit/emit.h"
#include "kernels_src/abi.h"
#include "sampler.h"
#include "test.h"

#include <assert.h>
#include <math.h>
#include <stddef.h>

enum { SCRATCH_BYTES = 8192, RING_BYTES = 16384, MOST_ROWS = 40, TOKENS = 64, BIASES = 8 };

/* As in the source below. */
typedef struct sample_row {
    perk_draw_rule rule;
    perk_draw_record record;
    perk_draw_bias bias[BIASES];
    int32_t tokens[TOKENS];
    int32_t prompt_length, length, best, token, meetings, reserved;
    uint64_t nanoseconds;
} sample_row;

typedef struct sample_args {
    CUdeviceptr rows, logits, adjusted, seen, rooms, hang_claim, hang;
    uint32_t row_count, stride, members, lost;
} sample_args;

static const char SOURCE[] =
    "#define PERK_PORTABLE %d\n#define PERK_PROFILE 0\n#define PERK_WIDE 0\n#include \"abi.h\"\n"
    "namespace program {\n"
    "constexpr uint32_t tasks_per_worker = 1, ring_slots = 1, chunks_in_flight = 1, chunks_in_flight_behind = 1, "
    "chunks_ahead = 0, cycles_per_chunk = 0;\n"
    "constexpr uint32_t staging_bytes = 0, reduction_bytes = %d, batch_shared_bytes = 0, shared_bytes = %d;\n"
    "constexpr bool eager_pieces = false;\nconstexpr uint32_t eager_place = 0;\nconstexpr uint64_t eager_bytes = 0;\n"
    "constexpr uint32_t batch_page_table = 0, max_tokens = 1;\n"
    "constexpr uint32_t own_experts = 0, own_slots = 0;\n"
    "constexpr bool waits_are_limited = true, has_experts = false, many_steps = false;\n"
    "}\n"
    "#include \"ptx.cuh\"\n#include \"routing.cuh\"\n#include \"worker.cuh\"\n#include \"sample.cuh\"\n"
    "struct Row {\n"
    "    perk_draw_rule rule;\n    perk_draw_record record;\n    perk_draw_bias bias[%d];\n    int32_t tokens[%d];\n"
    "    int32_t prompt_length, length, best, token, meetings, reserved;\n    uint64_t nanoseconds;\n};\n"
    "struct Args {\n"
    "    Row *rows;\n    const float *logits;\n    float *adjusted;\n    uint32_t *seen;\n"
    "    perk_draw_room *rooms;\n    uint32_t *hang_claim;\n    perk_hang_report *hang;\n"
    "    uint32_t row_count, stride, members, lost;\n};\n"
    "struct Input {\n"
    "    const Args &args;\n    uint32_t r;\n"
    "    uint32_t row() const { return r; }\n"
    "    Row &data() const { return args.rows[r]; }\n"
    "    const float *logits() const { return args.logits + uint64_t(r) * args.stride; }\n"
    "    const perk_draw_rule *rule() const { return &data().rule; }\n"
    "    uint32_t length() const { return data().length; }\n"
    "    uint32_t prompt_length() const { return data().prompt_length; }\n"
    "    const int32_t *tokens() const { return data().tokens; }\n"
    "    const perk_draw_bias *biases() const { return data().bias; }\n"
    "    float *adjusted() const { return args.adjusted + uint64_t(r) * args.stride; }\n"
    "    uint32_t *seen() const { return args.seen + uint64_t(r) * args.stride; }\n"
    "    perk_draw_room *room() const { return args.rooms + r; }\n"
    "    perk_draw_record *record() const { return &data().record; }\n"
    "};\n"
    "extern \"C\" __global__ void __launch_bounds__(PERK_BLOCK_THREADS, 1)\n" PERK_KERNEL_NAME
    "(const __grid_constant__ Args args) {\n"
    "    using namespace perk;\n"
    "    perk_kernel_args none{};\n"
    "    none.wait_limit_ns = args.lost < gridDim.x ? 1000000 : 1000000000;\n"
    "    none.hang_claim = args.hang_claim;\n"
    "    none.hang = args.hang;\n"
    "    Worker w{none, threadIdx.x / 32, threadIdx.x %% 32, threadIdx.x, dynamic_shared(), 0};\n"
    "    if (w.warp >= PERK_CONSUMER_WARPS || w.index() == args.lost) return;\n"
    "    if (w.thread == 0) store_shared4(w.shared + SharedMap::given_up, 0);\n"
    "    const uint32_t groups = gridDim.x / args.members, own = w.index() / args.members;\n"
    "    for (uint32_t r = own; own < groups && r < args.row_count; r += groups) {\n"
    "        const uint64_t begin = global_timer();\n"
    "        const Input in{args, r};\n"
    "        uint32_t token = in.data().best;\n"
    "        Draw<%d, Input> draw(w, in, {own * args.members, args.members});\n"
    "        if (!draw.run(token) || w.thread != 0) continue;\n"
    "        in.data().token = int32_t(token);\n"
    "        in.data().nanoseconds = global_timer() - begin;\n"
    "        in.data().meetings = draw.meetings;\n"
    "    }\n"
    "}\n";

static perk_error err;
static perk_driver *driver;
static perk_nvrtc *nvrtc;

/* ---- the kernel ---- */

typedef struct probe {
    int vocab_size, stride, blocks;
    CUmodule module;
    CUfunction function;
    CUstream stream;
    CUdeviceptr rows, logits, adjusted, seen, rooms, hang_claim, hang;
} probe;

static void cuda(CUresult result, const char *doing) { CHECK_OK(perk_driver_check(driver, result, &err, "%s", doing)); }

static void compile(int vocab_size, int portable, const char *arch, perk_compile_result *result) {
    perk_compile_header *headers;
    size_t header_count;
    CHECK_OK(perk_emit_headers(&headers, &header_count, &err));
    char *source =
        perk_format(SOURCE, portable, SCRATCH_BYTES, RING_BYTES + SCRATCH_BYTES + 2048, BIASES, TOKENS, vocab_size);
    CHECK(source);
    perk_compile_request request = {
        .source = source, .name = "sample.cu", .headers = headers, .header_count = header_count, .arch = arch};
    CHECK_OK(perk_compile(nvrtc, &request, result, &err));
    fprintf(stderr, "%d ids, %s: %.0f ms, %zu bytes spilled\n", vocab_size, arch, result->milliseconds,
            (size_t)result->spill_bytes);
    CHECK(result->spill_bytes == 0);
    perk_emit_headers_free(headers, header_count);
    free(source);
}

static void load(probe *p, int portable) {
    perk_compile_result result;
    perk_device_info info;
    char arch[16];
    CHECK_OK(perk_driver_device_info(driver, 0, &info, &err));
    snprintf(arch, sizeof arch, "sm_%d%d%s", info.cc_major, info.cc_minor, info.cc_major == 9 ? "a" : "");
    compile(p->vocab_size, portable, arch, &result);
    cuda(driver->cuModuleLoadData(&p->module, result.cubin), "loading");
    cuda(driver->cuModuleGetFunction(&p->function, p->module, PERK_KERNEL_NAME), "finding the kernel");
    perk_compile_result_free(&result);
}

static void allocate(CUdeviceptr *memory, size_t bytes) {
    cuda(driver->cuMemAlloc(memory, bytes), "reserving memory");
    cuda(driver->cuMemsetD8(*memory, 0, bytes), "clearing");
}

static void open_probe(probe *p, int vocab_size, int portable, int blocks) {
    *p = (probe){.vocab_size = vocab_size, .stride = PERK_ROW_STRIDE(vocab_size), .blocks = blocks};
    size_t bytes = (size_t)MOST_ROWS * (size_t)p->stride * 4;
    load(p, portable);
    cuda(driver->cuStreamCreate(&p->stream, CU_STREAM_DEFAULT), "making a stream");
    allocate(&p->rows, MOST_ROWS * sizeof(sample_row));
    allocate(&p->logits, bytes);
    allocate(&p->adjusted, bytes);
    allocate(&p->seen, bytes);
    allocate(&p->rooms, MOST_ROWS * sizeof(perk_draw_room));
    allocate(&p->hang_claim, 4);
    allocate(&p->hang, sizeof(perk_hang_report));
}

static void close_probe(probe *p) {
    const CUdeviceptr memory[] = {p->rows, p->logits, p->adjusted, p->seen, p->rooms, p->hang_claim, p->hang};
    for (size_t i = 0; i < PERK_COUNT(memory); i++) driver->cuMemFree(memory[i]);
    driver->cuStreamDestroy(p->stream);
    driver->cuModuleUnload(p->module);
}

/* Every row is drawn by `members` blocks, of which `lost` never comes; -1: all do. */
static void launch(probe *p, sample_row *rows, const float *logits, int count, int members, int lost) {
    const sample_args args = {
        p->rows, p->logits,       p->adjusted,         p->seen,           p->rooms,      p->hang_claim,
        p->hang, (uint32_t)count, (uint32_t)p->stride, (uint32_t)members, (uint32_t)lost};
    perk_kernel_args room = {0}; /* the fake driver looks whether a kernel of this name is of many steps */
    static_assert(sizeof args <= offsetof(perk_kernel_args, many), "the arguments lie in front of that");
    memcpy(&room, &args, sizeof args);
    void *params[] = {&room};
    for (int r = 0; r < count; r++)
        cuda(driver->cuMemcpyHtoD(p->logits + (size_t)r * (size_t)p->stride * 4, logits + r * p->vocab_size,
                                  (size_t)p->vocab_size * 4),
             "copying logits");
    cuda(driver->cuMemcpyHtoD(p->rows, rows, (size_t)count * sizeof *rows), "copying rows");
    cuda(driver->cuLaunchCooperativeKernel(p->function, (unsigned)p->blocks, 1, 1, PERK_BLOCK_THREADS, 1, 1,
                                           RING_BYTES + SCRATCH_BYTES + 2048, p->stream, params),
         "launching");
    cuda(driver->cuCtxSynchronize(), "sampling");
    cuda(driver->cuMemcpyDtoH(rows, p->rows, (size_t)count * sizeof *rows), "copying tokens");
}

/* ---- settings and logits ---- */

static const perk_logit_bias BIAS[] = {{3, 4}, {17, -100}, {5, 0.5f}, {11, 12}};

static const perk_sampling SETTINGS[] = {
    {.temperature = 1},
    {.temperature = 0.6f, .seed = 3},
    {.temperature = 4},
    {.temperature = 1e-30f},
    {.temperature = 1, .top_k = 1},
    {.temperature = 1, .top_k = 20},
    {.temperature = 1.3f, .top_k = 3000},
    {.temperature = 1, .top_p = 0.9f},
    {.temperature = 3, .top_p = 0.97f},
    {.temperature = 1, .top_p = 1e-6f},
    {.temperature = 1, .min_p = 0.05f},
    {.temperature = 0.7f, .top_k = 20, .top_p = 0.8f},
    {.temperature = 1.5f, .top_k = 2500, .top_p = 0.9f, .min_p = 0.02f, .seed = UINT64_MAX},
    {.logprobs = 1, .top_logprobs = 20},
    {.logprobs = 1},
    {.repetition_penalty = 1.3f},
    {.temperature = 1, .repetition_penalty = 1.2f, .presence_penalty = 0.5f, .frequency_penalty = 0.25f},
    {.bias = BIAS, .bias_count = 4},
    {.temperature = 0.9f,
     .top_p = 0.95f,
     .bias = BIAS,
     .bias_count = 4,
     .frequency_penalty = -1.0f,
     .logprobs = 1,
     .top_logprobs = 3},
};

/* Kinds of rows: as models make them; flat; all equal; few that count; coarse, with many equal ones; odd ones. */
enum { NORMAL, FLAT, EQUAL, PEAKED, COARSE, ODD, KINDS };

static void make_logits(float *logits, int count, int kind, uint64_t seed) {
    for (int i = 0; i < count; i++) {
        double u = perk_uniform(seed, 2 * (uint64_t)i), v = perk_uniform(seed, 2 * (uint64_t)i + 1);
        double normal = sqrt(-2 * log(1 - u)) * cos(6.283185307179586 * v);
        logits[i] = (float)(kind == FLAT     ? normal * 0.2
                            : kind == EQUAL  ? -2.5
                            : kind == PEAKED ? normal * 2 - 20 + (i % 701 == 5 ? 30 : 0)
                            : kind == COARSE ? floor(normal * 2) * 0.5
                                             : normal * 3 - 1);
        if (kind == ODD && i % 3 == 0) logits[i] = -INFINITY;
        if (kind == ODD && i % 7 == 1) logits[i] = NAN;
        if (kind == ODD && i % 11 == 2) logits[i] *= 1e-30f;
    }
}

static int find_best(const float *logits, int count) {
    int best = -1;
    for (int i = 0; i < count; i++)
        if (logits[i] > -INFINITY && (best < 0 || logits[i] > logits[best])) best = i;
    return best;
}

/* A row's settings, its text, and what the kernel gets to see of them. */
static void make_row(sample_row *row, const perk_sampling *sampling, const float *logits, int vocab_size,
                     uint64_t seed) {
    *row = (sample_row){.rule = perk_sampling_rule(sampling), .best = find_best(logits, vocab_size)};
    row->length = 1 + (int)(perk_uniform(seed, 1) * (TOKENS - 1));
    row->prompt_length = 1 + (int)(perk_uniform(seed, 2) * (row->length - 1));
    for (int i = 0; i < row->length; i++)
        row->tokens[i] = i % 4 ? (int)(perk_uniform(seed, 3 + (uint64_t)i) * vocab_size) : i % 3 ? row->best : 5;
    row->rule.bias_count = perk_sampling_slot_biases(sampling, row->bias);
}

static void check_logprobs(const sample_row *row, const perk_logprob *wanted, int count, const char *what) {
    perk_logprob got[1 + PERK_MAX_TOP_LOGPROBS];
    perk_sampler_logprobs(&row->record, row->token, count - 1, got);
    for (int i = 0; i < count; i++)
        CHECK(got[i].token == wanted[i].token && got[i].logprob == wanted[i].logprob,
              "%s: place %d is token %d with %g, wanted %d with %g", what, i, got[i].token, (double)got[i].logprob,
              wanted[i].token, (double)wanted[i].logprob);
}

static void check_row(perk_sampler *sampler, const perk_sampling *sampling, const float *logits, sample_row *row,
                      const char *what) {
    perk_logprob logprobs[1 + PERK_MAX_TOP_LOGPROBS];
    perk_history history = {row->tokens, row->tokens + row->prompt_length, row->prompt_length,
                            row->length - row->prompt_length};
    int32_t wanted;
    CHECK_OK(perk_sampler_pick(sampler, logits, sampling, &history, &wanted, logprobs, &err));
    CHECK(row->token == wanted, "%s: token %d, wanted %d", what, row->token, wanted);
    if (sampling->logprobs) check_logprobs(row, logprobs, perk_sampling_logprob_count(sampling), what);
}

/* All settings over all kinds of rows, `rounds` times with other seeds, by so many blocks together. */
static void test_settings(int vocab_size, int portable, int rounds, int blocks, int members) {
    enum { COUNT = PERK_COUNT(SETTINGS) };
    static sample_row rows[COUNT];
    probe p;
    perk_sampler *sampler;
    bool tells = getenv("PERK_TEST_GPU") || getenv("SAMPLE_TELLS");
    float *logits = malloc((size_t)COUNT * (size_t)vocab_size * sizeof *logits);
    CHECK(logits && (int)COUNT <= (int)MOST_ROWS);
    CHECK_OK(perk_sampler_create(&sampler, vocab_size, &err));
    open_probe(&p, vocab_size, portable, blocks);
    for (int round = 0; round < rounds * KINDS; round++) {
        perk_sampling settings[COUNT];
        double times[COUNT];
        for (int i = 0; i < COUNT; i++) {
            uint64_t seed = (uint64_t)(round * 100 + i);
            settings[i] = SETTINGS[i];
            settings[i].seed += seed;
            make_logits(logits + i * vocab_size, vocab_size, round % KINDS, seed);
            make_row(&rows[i], &settings[i], logits + i * vocab_size, vocab_size, seed);
        }
        launch(&p, rows, logits, COUNT, members, -1);
        for (int i = 0; i < COUNT; i++) {
            char what[64];
            snprintf(what, sizeof what, "%d ids, kind %d, setting %d", vocab_size, round % KINDS, i);
            check_row(sampler, &settings[i], logits + i * vocab_size, &rows[i], what);
            times[i] = (double)rows[i].nanoseconds * 1e-3;
        }
        if (!tells) continue;
        fprintf(stderr, "%d blocks a row, kind %d, us (meetings) a row:", members, round % KINDS);
        for (int i = 0; i < COUNT; i++) fprintf(stderr, " %.1f(%d)", times[i], rows[i].meetings);
        fprintf(stderr, "\n");
    }
    close_probe(&p);
    perk_sampler_free(sampler);
    free(logits);
}

/* Those who draw a row together do not wait for ever for one who is lost: they say so, and come to an end. */
static void test_lost(int vocab_size, int blocks) {
    static sample_row rows[2];
    perk_sampling sampling[] = {{.temperature = 1, .top_p = 0.9f}, {.temperature = 1, .presence_penalty = 1}};
    perk_hang_report report;
    probe p;
    float *logits = malloc(2 * (size_t)vocab_size * sizeof *logits);
    CHECK(logits);
    open_probe(&p, vocab_size, 0, blocks);
    for (int r = 0; r < 2; r++) {
        make_logits(logits + r * vocab_size, vocab_size, FLAT, 1);
        make_row(&rows[r], &sampling[r], logits + r * vocab_size, vocab_size, 1);
    }
    launch(&p, rows, logits, 2, blocks, blocks - 1);
    cuda(driver->cuMemcpyDtoH(&report, p.hang, sizeof report), "copying the report");
    CHECK(report.complete && report.role == PERK_ROLE_DRAW && report.counter == 0, "%u", report.role);
    CHECK((int)report.wanted == blocks && report.seen < report.wanted, "%u of %u", report.seen, report.wanted);
    close_probe(&p);
    free(logits);
}

/* Where there is a compiler of device code. */
static void test_nvrtc(void) {
    perk_compile_result result;
    perk_cubin_kernel_info info;
    if (perk_nvrtc_open(&nvrtc, NULL, &err) != PERK_OK) {
        fprintf(stderr, "not compiled as device code: %s\n", err.message);
        return;
    }
    compile(151936, 0, "sm_90a", &result);
    CHECK_OK(perk_cubin_info(result.cubin, result.cubin_size, PERK_KERNEL_NAME, &info, &err));
    fprintf(stderr, "%d registers, frame %d, %llu bytes\n", (int)info.registers, (int)info.frame_bytes,
            (unsigned long long)info.code_bytes);
    CHECK(info.frame_bytes == 0);
    perk_compile_result_free(&result);
    perk_nvrtc_free(nvrtc);
}

int main(void) {
    bool on_gpu = getenv("PERK_TEST_GPU") != NULL;
    if (strstr(EMULATOR_CXX, "NOTFOUND") && !on_gpu) {
        fprintf(stderr, "skipped: no C++ compiler was found\n");
        return TEST_SKIP;
    }
    if (!on_gpu) test_nvrtc();
    if (!on_gpu) open_fake().compiler->emulates = true;
    perk_device_info info;
    CUcontext context;
    CHECK_OK(perk_driver_open(&driver, &err));
    CHECK_OK(perk_nvrtc_open(&nvrtc, NULL, &err));
    CHECK_OK(perk_driver_device_info(driver, 0, &info, &err));
    cuda(driver->cuDevicePrimaryCtxRetain(&context, info.device), "opening the device");
    cuda(driver->cuCtxPushCurrent(context), "opening the device");
    const char *sms = getenv("FAKE_CUDA_SMS");
    int blocks = on_gpu ? info.sm_count : sms ? atoi(sms) : 3;
    test_settings(29, 0, 1, blocks, blocks);
    test_settings(5003, 1, 1, blocks, blocks);
    test_settings(5003, 0, 1, blocks, PERK_MAX(1, blocks / 2));
    if (blocks > 1) test_lost(5003, blocks);
    if (on_gpu) test_settings(151936, 0, 5, blocks, blocks);
    if (on_gpu) test_settings(151936, 0, 1, blocks, blocks / 8);
    if (on_gpu) test_settings(151936, 0, 1, blocks, 1);
    driver->cuCtxPopCurrent(&context);
    driver->cuDevicePrimaryCtxRelease(info.device);
    perk_nvrtc_free(nvrtc);
    perk_driver_free(driver);
    return 0;
}
