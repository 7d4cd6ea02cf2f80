/* NVRTC through perk: every architecture, headers from memory, errors that say where, spills, threads, identity. Runs
 * where NVRTC is installed; no GPU and no driver are needed. */
#include "jit/compile.h"
#include "spilling_kernel.h"
#include "test.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sys/resource.h>
#include <unistd.h>

static const perk_compile_header HEADERS[] = {
    {"scale.cuh", "#line 1 \"kernels_src/scale.cuh\"\nstruct scale { float factor; };\n"
                  "float scaled(scale s, float x) { return s.factor * x; }\n"},
};

static const char SOURCE[] = "#include \"scale.cuh\"\n"
                             "extern \"C\" __global__ void __launch_bounds__(256, 1) scale_all(float *x, int n) {\n"
                             "    __shared__ float last[256];\n"
                             "    int i = blockIdx.x * 256 + threadIdx.x;\n"
                             "    last[threadIdx.x] = i < n ? scaled({2.0f}, x[i]) : 0.0f;\n"
                             "    __syncthreads();\n"
                             "    if (i < n) x[i] = last[255 - threadIdx.x];\n"
                             "}\n";

static const char SPILLING[] = SPILLING_KERNEL;

static perk_compile_request request_for(const char *source, const char *arch) {
    return (perk_compile_request){
        .source = source, .name = "program.cu", .headers = HEADERS, .header_count = PERK_COUNT(HEADERS), .arch = arch};
}

static void test_architectures(const perk_nvrtc *nvrtc) {
    static const char *const archs[] = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a"};
    perk_error err = {0};
    for (size_t i = 0; i < PERK_COUNT(archs); i++) {
        if (perk_nvrtc_check_arch(nvrtc, archs[i], &err) == PERK_UNSUPPORTED) {
            fprintf(stderr, "skipped %s: NVRTC %d.%d does not know it\n", archs[i], nvrtc->major, nvrtc->minor);
            continue;
        }
        perk_compile_request request = request_for(SOURCE, archs[i]);
        perk_compile_result result;
        CHECK_OK(perk_compile(nvrtc, &request, &result, &err));
        CHECK(result.cubin_size > 1000 && memcmp(result.cubin, "\177ELF", 4) == 0, "%s", archs[i]);
        CHECK(strstr(result.log, "scale_all") && result.spill_bytes == 0, "%s: %s", archs[i], result.log);
        CHECK(result.performance_warnings == 0 && result.milliseconds > 0, "%s", archs[i]);
        fprintf(stderr, "%s: %zu bytes, %.0f ms\n", archs[i], result.cubin_size, result.milliseconds);
        perk_compile_result_free(&result);
    }
}

static void test_arch_names(const perk_nvrtc *nvrtc) {
    perk_error err;
    char arch[16];
    perk_arch_of_capability(8, 6, arch);
    CHECK(strcmp(arch, "sm_86") == 0, "%s", arch);
    perk_arch_of_capability(9, 0, arch);
    CHECK(strcmp(arch, "sm_90a") == 0, "%s", arch);
    perk_arch_of_capability(12, 0, arch);
    CHECK(strcmp(arch, "sm_120a") == 0, "%s", arch);
    static const char *const malformed[] = {"", "90", "sm_", "sm_90aa", "sm_90 ", "compute_90", "sm_99999999999"};
    for (size_t i = 0; i < PERK_COUNT(malformed); i++)
        CHECK_FAILS(perk_nvrtc_check_arch(nvrtc, malformed[i], &err), PERK_INVALID_ARGUMENT, "architecture");
    CHECK_FAILS(perk_nvrtc_check_arch(nvrtc, NULL, &err), PERK_INVALID_ARGUMENT, "architecture");
    perk_compile_request request = request_for(SOURCE, "sm_35");
    perk_compile_result result;
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_UNSUPPORTED, " 80 ");
    CHECK(result.cubin == NULL && result.log == NULL);
}

static void test_errors(const perk_nvrtc *nvrtc) {
    perk_error err;
    perk_compile_result result;
    const perk_compile_header broken[] = {
        {"a.cuh", "#line 41 \"kernels_src/rmsnorm.cuh\"\n__device__ int unused_function_kept();\n"
                  "float f(float x) { return x * undefined_thing; }\n"}};
    perk_compile_request request = {.source = "int unused;\n#warning first\n#include \"a.cuh\"\n",
                                    .headers = broken,
                                    .header_count = 1,
                                    .arch = "sm_80"};
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_COMPILE, "kernels_src/rmsnorm.cuh(42): error");
    CHECK(strstr(err.message, "undefined_thing") && strstr(err.message, "perk.cu does not compile for sm_80"), "%s",
          err.message);
    CHECK(!strstr(err.message, "#warning"), "%s", err.message);
    CHECK(result.cubin == NULL && result.log == NULL);

    request = request_for("extern \"C\" __global__ void k(int *p) { asm(\"mov.u32 %0, %%no_such;\" : \"=r\"(*p)); }",
                          "sm_90a");
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_COMPILE, "of the PTX: mov.u32 ");
    request = request_for("#include \"absent.cuh\"\n", "sm_90a");
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_COMPILE, "absent.cuh");
    static const char *const bad_option[] = {"--no-such-option"};
    request = request_for(SOURCE, "sm_90a");
    request.options = bad_option;
    request.option_count = 1;
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_COMPILE, "--no-such-option");
    request = request_for(NULL, "sm_90a");
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_INVALID_ARGUMENT, "without source");
}

/* Hundreds of errors: the first is there, the message ends properly. */
static void test_long_log_is_cut(const perk_nvrtc *nvrtc) {
    perk_error err;
    perk_compile_result result;
    perk_buffer source = {0};
    for (int i = 0; i < 90; i++) perk_buffer_printf(&source, "int v%d = missing_name_%d;\n", i, i);
    CHECK(!source.failed);
    perk_compile_request request = request_for(source.data, "sm_80");
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_COMPILE, "missing_name_0");
    CHECK(strstr(err.message, "more errors)") && strlen(err.message) < sizeof err.message - 1, "%s", err.message);
    perk_buffer_free(&source);
}

/* A file on the disk beside the program must not be included: it is not in the cache key. */
static void test_disk_is_not_searched(const perk_nvrtc *nvrtc) {
    char folder[] = "/tmp/perk-compile-XXXXXX", header[64], name[64];
    perk_error err;
    perk_compile_result result;
    CHECK(mkdtemp(folder));
    snprintf(header, sizeof header, "%s/beside.cuh", folder);
    snprintf(name, sizeof name, "%s/program.cu", folder);
    FILE *file = fopen(header, "w");
    CHECK(file && fputs("#define BESIDE 1\n", file) >= 0 && fclose(file) == 0);
    perk_compile_request request = request_for("#include \"beside.cuh\"\n", "sm_80");
    request.name = name;
    CHECK_FAILS(perk_compile(nvrtc, &request, &result, &err), PERK_COMPILE, "beside.cuh");
    CHECK(unlink(header) == 0 && rmdir(folder) == 0);
}

static void collect_warnings(void *user, perk_log_level level, const char *message) {
    if (level == PERK_LOG_WARNING && strstr(message, "spilled")) ++*(int *)user;
}

static void test_spills_are_seen(const perk_nvrtc *nvrtc) {
    perk_error err = {0};
    perk_compile_result result;
    int warnings = 0;
    perk_log log = {collect_warnings, &warnings};
    perk_compile_request request = request_for(SPILLING, "sm_80");
    request.log = &log;
    CHECK_OK(perk_compile(nvrtc, &request, &result, &err));
    CHECK(result.spill_bytes > 100 && warnings == 1, "%zu bytes, %d warnings", result.spill_bytes, warnings);
    perk_compile_result_free(&result);
}

typedef struct worker {
    const perk_nvrtc *nvrtc;
    perk_compile_result result;
    perk_status status;
} worker;

static void *compile_on_thread(void *user) {
    worker *work = user;
    perk_compile_request request = request_for(SOURCE, "sm_90a");
    work->status = perk_compile(work->nvrtc, &request, &work->result, NULL);
    return NULL;
}

/* Several at once, from threads whose own stacks are too small for a compiler, give the same bytes. */
static void test_threads(const perk_nvrtc *nvrtc) {
    enum { THREADS = 4 };
    pthread_t threads[THREADS];
    worker workers[THREADS] = {{0}};
    pthread_attr_t small;
    struct rlimit before, after;
    CHECK(getrlimit(RLIMIT_STACK, &before) == 0);
    CHECK(pthread_attr_init(&small) == 0 && pthread_attr_setstacksize(&small, 128 * 1024) == 0);
    for (int i = 0; i < THREADS; i++) {
        workers[i].nvrtc = nvrtc;
        CHECK(pthread_create(&threads[i], &small, compile_on_thread, &workers[i]) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(workers[i].status == PERK_OK && workers[i].result.cubin_size == workers[0].result.cubin_size);
        CHECK(memcmp(workers[i].result.cubin, workers[0].result.cubin, workers[0].result.cubin_size) == 0);
    }
    CHECK(getrlimit(RLIMIT_STACK, &after) == 0 && before.rlim_cur == after.rlim_cur);
    for (int i = 0; i < THREADS; i++) perk_compile_result_free(&workers[i].result);
    pthread_attr_destroy(&small);
}

/* What the file says without being loaded is what is then loaded; the override names it by another path. */
static void test_identity(const perk_nvrtc_identity *identity, const perk_nvrtc *nvrtc) {
    perk_error err = {0};
    char loaded[PERK_BUILD_ID_SIZE], folder[] = "/tmp/perk-nvrtc-XXXXXX", path[64], real[PERK_LIBRARY_PATH_SIZE];
    bool has_build_id = perk_library_build_id(&nvrtc->library, loaded, &err) == PERK_OK; /* pip's 12.4 has none */
    if (has_build_id)
        CHECK(strcmp(loaded, identity->build_id) == 0, "%s, not %s", loaded, identity->build_id);
    else
        CHECK(strncmp(identity->build_id, "file-", 5) == 0, "%s", identity->build_id);
    CHECK(strncmp(nvrtc->identity.version, identity->version, strlen(nvrtc->identity.version)) == 0, "%s, not %s",
          identity->version, nvrtc->identity.version);
    CHECK(mkdtemp(folder) && realpath(identity->path, real));
    snprintf(path, sizeof path, "%s/renamed.so", folder);
    CHECK(symlink(real, path) == 0 && setenv("PERK_LIBNVRTC", path, 1) == 0);
    perk_nvrtc_identity chosen;
    CHECK_OK(perk_nvrtc_identify(0, &chosen, &err));
    CHECK(strcmp(chosen.path, path) == 0 && strcmp(chosen.build_id, identity->build_id) == 0, "%s", chosen.path);
    perk_nvrtc *second;
    CHECK_OK(perk_nvrtc_open(&second, NULL, &err));
    CHECK(strcmp(second->library.path, path) == 0 && second->major == nvrtc->major, "%s", second->library.path);
    perk_nvrtc_free(second);
    perk_nvrtc_identity exchanged = *identity;
    exchanged.build_id[0] = exchanged.build_id[0] == '0' ? '1' : '0';
    if (has_build_id) CHECK_FAILS(perk_nvrtc_open(&second, &exchanged, &err), PERK_NO_COMPILER, "restart the process");
    CHECK(unlink(path) == 0 && rmdir(folder) == 0);
}

int main(void) {
    perk_error err = {0};
    perk_nvrtc_identity identity;
    if (perk_nvrtc_identify(0, &identity, &err) != PERK_OK) {
        fprintf(stderr, "skipped: %s\n", err.message);
        return TEST_SKIP;
    }
    double start = perk_now();
    CHECK_OK(perk_nvrtc_identify(0, &identity, &err));
    fprintf(stderr, "%s: NVRTC %s, build %s, identified in %.2f ms\n", identity.path, identity.version,
            identity.build_id, (perk_now() - start) * 1e3);
    CHECK(dlopen(identity.path, RTLD_LAZY | RTLD_NOLOAD) == NULL, "identifying has loaded NVRTC");
    perk_nvrtc *nvrtc;
    CHECK_OK(perk_nvrtc_open(&nvrtc, &identity, &err));
    test_architectures(nvrtc);
    test_arch_names(nvrtc);
    test_errors(nvrtc);
    test_long_log_is_cut(nvrtc);
    test_disk_is_not_searched(nvrtc);
    test_spills_are_seen(nvrtc);
    test_threads(nvrtc);
    CHECK(dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD) == NULL, "compiling has loaded the driver");
    test_identity(&identity, nvrtc);
    perk_nvrtc_free(nvrtc);
    return 0;
}
