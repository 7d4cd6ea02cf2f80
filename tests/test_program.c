/* Programs: cold from the compiler, warm from the cache without opening NVRTC, through the alias without having one;
 * keys; what spills; entries that are no cubins. Runs where NVRTC is installed; no GPU is needed. */
#include "src/device.h"
#include "src/model.h"
#include "src/program.h"
#include "test_cache.h"

#include <sys/wait.h>

static perk_error err;

static const perk_compile_header HEADERS[] = {{"twice.cuh", "float twice(float x) { return 2.0f * x; }\n"}};

static const perk_program_source SMALL = {
    .name = "small.cu",
    .text = "#include \"twice.cuh\"\n"
            "extern \"C\" __global__ void small(float *x) { x[threadIdx.x] = twice(x[threadIdx.x]); }\n",
    .headers = HEADERS,
    .header_count = 1,
    .arch = "sm_80",
    .kernel = "small",
};

/* More live values than 64 registers hold. */
static const perk_program_source CROWDED = {
    .name = "crowded.cu",
    .text = "extern \"C\" __global__ void __launch_bounds__(1024, 1) crowded(float *p, int n) {\n"
            "    float a[96];\n"
            "    for (int i = 0; i < 96; i++) a[i] = p[i * 1024 + threadIdx.x];\n"
            "    for (int r = 0; r < n; r++)\n"
            "        for (int i = 0; i < 95; i++) a[i] = a[i] * a[i + 1] + a[0];\n"
            "    for (int i = 0; i < 96; i++) p[i * 1024 + threadIdx.x] = a[i];\n"
            "}\n",
    .arch = "sm_80",
    .kernel = "crowded",
};

static perk_cache *open_named(const char *name) { return open_cache(path_in(scratch, name).text, 0); }

static void collect_log(void *user, perk_log_level level, const char *message) {
    (void)level;
    perk_buffer_printf(user, "%s\n", message);
}

static bool is_mapped(const char *library) {
    char line[4096];
    bool found = false;
    FILE *maps = fopen("/proc/self/maps", "r");
    CHECK(maps);
    while (fgets(line, sizeof line, maps)) found = found || strstr(line, library);
    fclose(maps);
    return found;
}

/* ---- the tiny model's program ---- */

static perk_plan *plan_tiny(perk_model **model, const char *arch) {
    perk_device_desc device;
    perk_config config = {.max_num_batched_tokens = 4, .max_num_batched_requests = 2, .max_seq_length = 128};
    perk_plan *plan;
    CHECK_OK(perk_model_describe(model, PERK_SOURCE_DIR "/examples/tiny", &err));
    CHECK_OK(perk_device_describe_arch(arch, &device, &err));
    device.worker_count = 8;
    CHECK_OK(perk_config_resolve(&config, (*model)->max_positions, &err));
    CHECK_OK(perk_plan_create(&plan, (*model)->graph, &device, &config, &err));
    return plan;
}

static perk_program build_tiny(const char *arch, const perk_program_options *options) {
    perk_model *model;
    perk_program program;
    perk_plan *plan = plan_tiny(&model, arch);
    CHECK_OK(perk_program_build(plan, options, &program, &err));
    CHECK(memcmp(program.cubin, "\177ELF", 4) == 0 && program.cubin_size > 1000);
    CHECK(program.kernel.registers > 0 && program.kernel.code_bytes > 0 && program.source_bytes > 100);
    perk_plan_free(plan);
    perk_model_free(model);
    return program;
}

/* In a process of its own, so that this one has not opened NVRTC yet. */
static void compile_elsewhere(void) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        perk_program_options options = {.cache = open_named("cubins")};
        perk_program program = build_tiny("sm_80", &options);
        CHECK(!program.cache_hit && program.compile_ms > 0 && program.nvrtc[0]);
        CHECK(program.spill_bytes == 0 && !program.kernel.spills);
        fprintf(stderr, "cold: compile %.0f ms, lookup %.2f ms\n", program.compile_ms, program.lookup_ms);
        perk_program_free(&program);
        perk_cache_free(options.cache);
        exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "status %x", status);
}

static void test_warm(void) {
    compile_elsewhere();
    perk_program_options options = {.cache = open_named("cubins"), .compile_forbidden = true};
    perk_program warm = build_tiny("sm_80", &options);
    CHECK(warm.cache_hit && warm.compile_ms == 0);
    CHECK(!is_mapped("libnvrtc"), "a warm start opened NVRTC");
    fprintf(stderr, "warm: emit %.2f ms, lookup %.2f ms\n", warm.emit_ms, warm.lookup_ms);

    const char *chosen = getenv("PERK_LIBNVRTC");
    char *before = chosen ? perk_strdup(chosen) : NULL;
    setenv("PERK_LIBNVRTC", "/nonexistent/libnvrtc.so", 1);
    options.compile_forbidden = false;
    perk_program alias = build_tiny("sm_80", &options);
    CHECK(alias.cache_hit && alias.nvrtc[0] == '\0' && !is_mapped("libnvrtc"));
    CHECK(alias.cubin_size == warm.cubin_size && memcmp(alias.cubin, warm.cubin, warm.cubin_size) == 0);
    CHECK(memcmp(&alias.key, &warm.key, sizeof warm.key) != 0);

    perk_model *model;
    perk_program missing;
    perk_plan *plan = plan_tiny(&model, "sm_90a");
    CHECK_FAILS(perk_program_build(plan, &options, &missing, &err), PERK_NO_COMPILER, "/nonexistent/libnvrtc.so");
    CHECK(strstr(err.message, "sm_90a is not in the cubin cache") && !missing.cubin, "%s", err.message);
    if (before)
        setenv("PERK_LIBNVRTC", before, 1);
    else
        unsetenv("PERK_LIBNVRTC");
    free(before);
    options.compile_forbidden = true;
    CHECK_FAILS(perk_program_build(plan, &options, &missing, &err), PERK_NOT_FOUND, "compiling is forbidden");
    CHECK(!is_mapped("libnvrtc"));
    perk_plan_free(plan);
    perk_model_free(model);
    perk_program_free(&warm);
    perk_program_free(&alias);
    perk_cache_free(options.cache);
}

/* ---- plain source ---- */

static perk_cache_key key_of(perk_program_source source, const perk_program_options *options) {
    perk_program program;
    CHECK_OK(perk_program_build_source(&source, options, &program, &err));
    perk_cache_key key = program.key;
    perk_program_free(&program);
    return key;
}

static void test_keys(void) {
    static const perk_compile_header other_text[] = {{"twice.cuh", "float twice(float x) { return x + x; }\n"}};
    const perk_compile_header other_name[] = {{"twice.cuh", HEADERS[0].text}, {"more.cuh", ""}};
    perk_program_options options = {.cache = open_named("keys")};
    perk_program_source variants[] = {SMALL, SMALL, SMALL, SMALL, SMALL};
    perk_cache_key keys[PERK_COUNT(variants)];
    variants[1].arch = "sm_86";
    variants[2].headers = other_text;
    variants[3].headers = other_name;
    variants[3].header_count = 2;
    variants[4].name = NULL;
    for (size_t i = 0; i < PERK_COUNT(variants); i++) keys[i] = key_of(variants[i], &options);
    for (size_t i = 0; i < PERK_COUNT(variants); i++)
        for (size_t j = 0; j < i; j++) CHECK(memcmp(&keys[i], &keys[j], sizeof *keys) != 0, "%zu and %zu", i, j);
    options.compile_forbidden = true; /* all of them are there, and no key depends on how it was asked for */
    for (size_t i = 0; i < PERK_COUNT(variants); i++) {
        perk_cache_key again = key_of(variants[i], &options);
        CHECK(memcmp(&again, &keys[i], sizeof again) == 0, "%zu", i);
    }
    perk_cache_free(options.cache);
}

static void test_no_cache(void) {
    perk_program_options options = {0};
    perk_program program;
    for (int i = 0; i < 2; i++) {
        CHECK_OK(perk_program_build_source(&SMALL, &options, &program, &err));
        CHECK(!program.cache_hit && program.emit_ms == 0);
        perk_program_free(&program);
        perk_program_free(&program);
    }
}

static void test_failures(void) {
    perk_program_options options = {.cache = open_named("failures")};
    perk_program_source source = SMALL;
    perk_program program;
    source.text = "this is no C++\n";
    CHECK_FAILS(perk_program_build_source(&source, &options, &program, &err), PERK_COMPILE, "small.cu");
    CHECK(!program.cubin);
    source = SMALL;
    source.kernel = "large";
    CHECK_FAILS(perk_program_build_source(&source, &options, &program, &err), PERK_NOT_FOUND, "large");
    source.kernel = NULL;
    CHECK_FAILS(perk_program_build_source(&source, &options, &program, &err), PERK_INVALID_ARGUMENT, "kernel");
    source = SMALL;
    source.arch = "sm_1";
    CHECK_FAILS(perk_program_build_source(&source, &options, &program, &err), PERK_UNSUPPORTED, "sm_1");
    perk_cache_free(options.cache);
}

/* An entry with a good checksum around what is no cubin. */
static void test_foreign_entry(void) {
    perk_buffer text = {0};
    perk_log log = {collect_log, &text};
    perk_program_options options = {.cache = open_named("foreign"), .log = &log};
    perk_program program;
    perk_cache_key key = key_of(SMALL, &options);
    CHECK(perk_cache_store(options.cache, &key, "no cubin", 8));
    CHECK_OK(perk_program_build_source(&SMALL, &options, &program, &err));
    CHECK(!program.cache_hit && strstr(text.data, "made anew"), "%s", text.data);
    perk_program_free(&program);
    CHECK_OK(perk_program_build_source(&SMALL, &options, &program, &err));
    CHECK(program.cache_hit);
    perk_program_free(&program);
    perk_cache_free(options.cache);
    perk_buffer_free(&text);
}

static void test_spills(void) {
    perk_buffer text = {0};
    perk_log log = {collect_log, &text};
    perk_program_options options = {.cache = open_named("spills"), .log = &log};
    perk_program first, again;
    CHECK_OK(perk_program_build_source(&CROWDED, &options, &first, &err));
    CHECK(first.spill_bytes > 0 && strstr(text.data, "-O1") && strstr(text.data, "is kept"), "%s", text.data);
    fprintf(stderr, "%.*s\n", (int)strcspn(strstr(text.data, "crowded.cu for"), "\n"),
            strstr(text.data, "crowded.cu for"));
    CHECK_OK(perk_program_build_source(&CROWDED, &options, &again, &err));
    CHECK(again.cache_hit && again.spill_bytes == first.spill_bytes);
    perk_program_free(&first);
    perk_program_free(&again);
    perk_cache_free(options.cache);
    perk_buffer_free(&text);
}

int main(void) {
    perk_nvrtc_identity identity;
    if (perk_nvrtc_identify(0, &identity, &err) != PERK_OK) {
        fprintf(stderr, "skipped: %s\n", err.message);
        return TEST_SKIP;
    }
    make_scratch();
    test_warm(); /* first: it looks whether this process has opened NVRTC */
    test_keys();
    test_no_cache();
    test_failures();
    test_foreign_entry();
    test_spills();
    return 0;
}
