/* Faults of the driver and of NVRTC, without either: the engine runs on the fakes of tests/fake_cuda, and every call
 * that it makes fails once, and once with all that follow. Each time: a clean error that says what was being done,
 * everything given back, the caller's context current again, and a failed step closes the engine for good. Then what
 * starts do to a cache together, and what a damaged cache does to a start: nothing but what the fake NVRTC made may
 * reach the driver. */
#include "fake_cuda/open_fake.h"
#include "src/base.h"
#include "src/engine.h"
#include "src/gpu.h"
#include "src/model.h"
#include "test_cache.h"

#include <nvrtc.h>
#include <pthread.h>
#include <sys/wait.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"

enum { STEPS = 3, SM_COUNT = 8 /* few, for small plans: the driver calls stay the same */ };

static perk_error err;
static fake_cuda *fake;
static fake_nvrtc *compiler;
static opened_fake opened;
static long calls_before_end;
static path_text folder; /* the tiny model without its tokenizer, whose reading would be most of the test's time */
static const char *cache_folder; /* of the engines; NULL: no cache */
static perk_log engine_log;
static char foreign; /* its address is a context of the embedding program's */

static void make_folder(void) {
    static const char *const files[] = {"config.json", "generation_config.json", "model.safetensors"};
    folder = path_in(scratch, "model");
    CHECK(mkdir(folder.text, 0755) == 0);
    for (size_t i = 0; i < PERK_COUNT(files); i++)
        CHECK(symlink(path_in(TINY, files[i]).text, path_in(folder.text, files[i]).text) == 0);
}

static void begin_run(fake_fault fault) {
    opened.reset_driver();
    opened.reset_compiler();
    fake->device.sm_count = SM_COUNT;
    fake->made_by_fake = true;
    fake->fault = fault;
    opened.make_current((CUcontext)(void *)&foreign);
}

static const char *fault_text(void) {
    static char text[128];
    snprintf(text, sizeof text, "call %ld, %s, with %d%s", fake->failed_call, fake->failed ? fake->failed : "no fault",
             (int)fake->fault.result, fake->fault.lasting ? " and all after it" : "");
    return text;
}

static void check_context(void) {
    CHECK(opened.current_context() == (CUcontext)(void *)&foreign, "after %s the caller's context is not current",
          fault_text());
}

/* Nothing may be left, whatever happened. Objects go with their context only where it cannot be made current. */
static void check_released(void) {
    const fake_live none = {0};
    bool unreachable = fake->failed && (fake->fault.lasting || strcmp(fake->failed, "cuCtxPushCurrent") == 0);
    CHECK(memcmp(&fake->live, &none, sizeof none) == 0,
          "after %s: %ld memory, %ld pinned, %ld modules, %ld streams, "
          "%ld events, %ld contexts are left",
          fault_text(), fake->live.memory, fake->live.pinned, fake->live.modules, fake->live.streams, fake->live.events,
          fake->live.contexts);
    CHECK(fake->swept == 0 || unreachable, "after %s %ld objects were not released", fault_text(), fake->swept);
    CHECK(compiler->programs == 0, "after %s the compiler's programs are left", fault_text());
    CHECK(!fake->misuse, "after %s: %s: %s", fault_text(), fake->misused_in, fake->misuse);
    check_context();
}

static perk_engine_options engine_options(perk_backend backend) {
    return (perk_engine_options){.backend = backend,
                                 .threads = 1,
                                 .cache_folder = cache_folder,
                                 .no_cache = !cache_folder,
                                 .log = engine_log,
                                 .program_tokens = {1, 8},
                                 .config = {.max_num_batched_tokens = 8,
                                            .max_num_batched_requests = 2,
                                            .page_size = 16,
                                            .max_num_pages = 8,
                                            .max_seq_length = 64}};
}

static perk_status open_engine(perk_engine **engine, perk_backend backend) {
    perk_engine_options options = engine_options(backend);
    memset(&err, 0, sizeof err);
    perk_status status = perk_engine_open(engine, folder.text, &options, &err);
    CHECK((status == PERK_OK) == (*engine != NULL), "%s", fault_text());
    check_context();
    return status;
}

/* ---- what a machine may lack ---- */

static void check_refused(perk_status expected, const char *text) {
    perk_engine *engine;
    CHECK_FAILS(open_engine(&engine, PERK_BACKEND_GPU), expected, text);
    check_released();
}

static void check_reference_instead(void) {
    perk_engine *engine;
    CHECK_OK(open_engine(&engine, PERK_BACKEND_AUTO));
    CHECK(perk_engine_report(engine)->backend == PERK_BACKEND_REFERENCE);
    perk_engine_free(engine);
    check_released();
}

static void test_missing_libraries(void) {
    begin_run((fake_fault){0});
    setenv("PERK_LIBCUDA", "/nonexistent/libcuda.so.1", 1);
    check_refused(PERK_NO_DRIVER, "/nonexistent/libcuda.so.1: no such file");
    check_reference_instead();
    setenv("PERK_LIBCUDA", FAKE_CUDA, 1);

    cache_folder = NULL;
    setenv("PERK_LIBNVRTC", "/nonexistent/libnvrtc.so", 1);
    check_refused(PERK_NO_COMPILER, "/nonexistent/libnvrtc.so: no such file");
    setenv("PERK_LIBNVRTC", FAKE_CUDA, 1);
    begin_run((fake_fault){0});
    compiler->major = 11;
    check_refused(PERK_NO_COMPILER, "NVRTC 11.0 is too old");
    begin_run((fake_fault){0});
    fake->device.cc_major = 12;
    check_refused(PERK_UNSUPPORTED, "does not compile for sm_120a");
    cache_folder = scratch;
}

static void test_unusable_machines(void) {
    begin_run((fake_fault){0});
    fake->device.driver_version = 11080;
    check_refused(PERK_NO_DRIVER, "the driver supports CUDA 11.8, perk needs 12.0 or newer");
    check_reference_instead();

    begin_run((fake_fault){0});
    fake->device.count = 0;
    check_refused(PERK_NO_DEVICE, "sees no GPU");
    check_reference_instead();

    begin_run((fake_fault){.call = 1, .function = "cuInit", .result = CUDA_ERROR_SYSTEM_DRIVER_MISMATCH});
    check_refused(PERK_NO_DRIVER, "does not start");

    begin_run((fake_fault){0});
    fake->device.cc_major = 7;
    fake->device.cc_minor = 5;
    check_refused(PERK_UNSUPPORTED, "compute capability 7.5: perk needs 8.0");

    begin_run((fake_fault){0});
    fake->device.cooperative = false;
    check_refused(PERK_UNSUPPORTED, "Fake GPU cannot launch cooperative kernels");
}

/* ---- a run: start, steps, logits, end ---- */

/* Once failed, always failed, in the same words, and without a call to the driver. */
static void check_closed(perk_engine *engine, perk_request *request, perk_status status) {
    perk_error first = err;
    long calls = fake->calls;
    int32_t id = 1, running = 7;
    size_t count;
    float *logits = calloc((size_t)perk_engine_vocab_size(engine), sizeof *logits);
    perk_request *another = request;
    CHECK(logits);
    CHECK_FAILS(perk_engine_step(engine, &running, &err), status, first.message);
    CHECK(running == 0);
    CHECK_FAILS(perk_engine_submit(engine, &id, 1, NULL, &another, &err), status, first.message);
    CHECK(another == NULL);
    CHECK_FAILS(perk_engine_logits(engine, &id, 1, logits, &err), status, first.message);
    CHECK(fake->calls == calls, "%s: a closed engine calls the driver", fault_text());
    perk_request_tokens(request, &count);
    CHECK(count <= STEPS);
    free(logits);
    err = first;
}

/* Submits a request and makes some of its steps, then logits; *closed where that failed. */
static perk_status use_engine(perk_engine *engine) {
    static const int32_t prompt[] = {5, 6, 7};
    const perk_sampling sampling = {.max_tokens = 20, .ignore_eos = 1};
    perk_request *request;
    perk_status status = PERK_OK;
    size_t count = 0;
    float *logits = calloc(2 * (size_t)perk_engine_vocab_size(engine), sizeof *logits);
    CHECK(logits);
    CHECK_OK(perk_engine_submit(engine, prompt, 3, &sampling, &request, &err));
    for (int i = 0; i < STEPS && !status; i++) {
        status = perk_engine_step(engine, NULL, &err);
        check_context();
    }
    perk_request_tokens(request, &count);
    CHECK(status || count == STEPS, "%zu tokens", count);
    if (!status) status = perk_engine_logits(engine, prompt, 2, logits, &err);
    check_context();
    if (status) check_closed(engine, request, status);
    free(logits);
    return status;
}

static perk_status run(void) {
    perk_engine *engine;
    perk_status status = open_engine(&engine, PERK_BACKEND_GPU);
    if (status == PERK_OK) status = use_engine(engine);
    calls_before_end = fake->calls;
    perk_engine_free(engine);
    check_released();
    return status;
}

static bool is_one_of(const char *name, const char *const *list) {
    for (; *list; list++)
        if (strcmp(*list, name) == 0) return true;
    return false;
}

/* Calls that give something back, and what perk can do without. */
static bool may_be_survived(const char *function) {
    static const char *const names[] = {"cuMemFree",
                                        "cuMemFreeHost",
                                        "cuModuleUnload",
                                        "cuStreamDestroy",
                                        "cuEventDestroy",
                                        "cuCtxPopCurrent",
                                        "cuDevicePrimaryCtxRelease",
                                        "cuDeviceGetAttribute",
                                        "cuDeviceGetUuid",
                                        NULL};
    return is_one_of(function, names);
}

/* ---- a lost device in the middle of decoding, with requests that run and requests that wait ---- */

enum { REQUESTS = 5, FREED = 2 }; /* 2 fit into a step */

static void check_requests_of_closed(perk_engine *engine, perk_request **requests, perk_status status) {
    check_closed(engine, requests[0], status);
    const int32_t id = 1;
    CHECK_FAILS(perk_engine_generate(engine, &id, 1, NULL, NULL, NULL, NULL, &err), status, "FAKE_ERROR_700");
    for (int i = 0; i < REQUESTS; i++) {
        size_t count;
        const int32_t *tokens = perk_request_tokens(requests[i], &count);
        CHECK(tokens && count <= STEPS && perk_request_finish(requests[i]) == PERK_FINISH_NONE);
    }
    perk_request_cancel(requests[4]);
    CHECK(perk_request_finish(requests[4]) == PERK_FINISH_CANCELLED);
    perk_request_free(requests[3]);
    perk_request_free(requests[FREED]); /* the others go with the engine */
}

/* Call `call` of the last step and all after it fail; 0: none. Returns the number of that step's calls. */
static long decode_and_lose(long call) {
    perk_engine *engine;
    perk_request *requests[REQUESTS];
    const int32_t prompt[] = {5, 6, 7};
    const perk_sampling sampling = {.max_tokens = 20, .ignore_eos = 1};
    begin_run((fake_fault){0});
    CHECK_OK(open_engine(&engine, PERK_BACKEND_GPU));
    for (int i = 0; i < REQUESTS; i++) CHECK_OK(perk_engine_submit(engine, prompt, 3, &sampling, &requests[i], &err));
    for (int i = 1; i < STEPS; i++) CHECK_OK(perk_engine_step(engine, NULL, &err));
    long before = fake->calls;
    fake->fault = (fake_fault){.call = call ? before + call : 0, .result = CUDA_ERROR_ILLEGAL_ADDRESS, .lasting = true};
    perk_status status = perk_engine_step(engine, NULL, &err);
    long calls = fake->calls - before;
    bool survived = !call || may_be_survived(fake->failed);
    CHECK(status == (survived ? PERK_OK : PERK_DRIVER), "%s", fault_text());
    if (status) {
        CHECK(strstr(err.message, "FAKE_ERROR_700"), "%s", err.message);
        check_requests_of_closed(engine, requests, status);
    }
    perk_engine_free(engine);
    check_released();
    return calls;
}

static void test_lost_while_decoding(void) {
    long calls = decode_and_lose(0);
    CHECK(calls > 4);
    for (long call = 1; call <= calls; call++) decode_and_lose(call);
    fprintf(stderr, "device lost at each of the %ld calls of a step of %d requests\n", calls, REQUESTS);
}

/* ---- every call fails ---- */

static void check_failure(perk_status status) {
    static const char *const starting[] = {"cuDriverGetVersion", "cuInit", NULL};
    const char *says = "the driver says FAKE_ERROR_";
    if (getenv("PERK_TEST_VERBOSE"))
        fprintf(stderr, "%s\n    %s: %s\n", fault_text(), perk_status_text(status), err.message);
    CHECK(err.status == status && strlen(err.message) > 20, "%s: %s", fault_text(), err.message);
    if (is_one_of(fake->failed, starting)) {
        CHECK(status == PERK_NO_DRIVER, "%s: %s: %s", fault_text(), perk_status_text(status), err.message);
    } else if (fake->fault.result == CUDA_ERROR_OUT_OF_MEMORY) {
        CHECK(status == PERK_DEVICE_MEMORY || status == PERK_OUT_OF_MEMORY, "%s: %s", fault_text(), err.message);
    } else {
        CHECK(status == PERK_DRIVER, "%s: %s: %s", fault_text(), perk_status_text(status), err.message);
        CHECK(strstr(err.message, says) && strstr(err.message, says) > err.message + 8, "%s: %s", fault_text(),
              err.message);
    }
}

static void sweep(long calls, CUresult result, bool lasting) {
    long failures = 0;
    double start = perk_now();
    for (long n = 1; n <= calls; n++) {
        begin_run((fake_fault){.call = n, .result = result, .lasting = lasting});
        perk_status status = run();
        CHECK(fake->failed, "call %ld was not made", n);
        failures += status != PERK_OK;
        bool alone = !lasting || n == calls_before_end; /* no other call fails before the end */
        bool survived = n > calls_before_end || (alone && may_be_survived(fake->failed));
        if (status)
            check_failure(status);
        else
            CHECK(survived, "%s went unnoticed", fault_text());
    }
    CHECK(failures > calls / 2);
    fprintf(stderr, "driver error %d%s: %ld calls, %ld failures, %.1f s\n", (int)result, lasting ? ", lasting" : "",
            calls, failures, perk_now() - start);
}

static void test_every_call(void) {
    begin_run((fake_fault){0});
    CHECK_OK(run());
    CHECK(fake->calls > 50 && fake->launches > STEPS, "%ld calls", fake->calls);
    long calls = fake->calls;
    begin_run((fake_fault){0});
    CHECK_OK(run());
    CHECK(fake->calls == calls, "%ld calls, then %ld", calls, fake->calls);
    sweep(calls, CUDA_ERROR_OUT_OF_MEMORY, false);
    sweep(calls, CUDA_ERROR_INVALID_VALUE, false);
    sweep(calls, CUDA_ERROR_ILLEGAL_ADDRESS, true); /* the device is lost */
}

/* ---- every call of the compiler fails ---- */

static path_text fresh_folder(const char *name) {
    path_text path = path_in(scratch, name);
    remove_tree(path.text);
    CHECK(mkdir(path.text, 0700) == 0);
    cache_folder = NULL;
    return path;
}

/* What a failed start has left in the cache is whole, and nobody holds it. */
static void check_cache_is_sound(const char *path) {
    perk_cache_report report;
    perk_cache *cache = open_cache(path, 0);
    CHECK_OK(perk_cache_verify(cache, 0, &report, &err));
    CHECK(report.bad == 0 && report.entries == (uint64_t)count_files(path, ""), "%s", fault_text());
    perk_cache_free(cache);
}

static void check_compiler_failure(perk_status status, int result) {
    perk_status expected = result == NVRTC_ERROR_OUT_OF_MEMORY ? PERK_OUT_OF_MEMORY : PERK_COMPILE;
    CHECK(status == expected || status == PERK_NO_COMPILER, "%s: %s", compiler->failed, perk_status_text(status));
    CHECK(err.status == status && strlen(err.message) > 20, "%s: %s", compiler->failed, err.message);
    bool by_name = strstr(err.message, "NVRTC") || strstr(err.message, "compile") || strstr(err.message, FAKE_CUDA);
    CHECK(by_name, "%s: %s", compiler->failed, err.message);
    if (strcmp(compiler->failed, "nvrtcCompileProgram") == 0 && status == PERK_COMPILE)
        CHECK(strstr(err.message, "perk.cu(3): error: as the test asked"), "%s", err.message);
}

static void sweep_compiler(long calls, int result) {
    long failures = 0;
    for (long n = 1; n <= calls; n++) {
        path_text folder_path = fresh_folder("compiler");
        cache_folder = folder_path.text;
        begin_run((fake_fault){0});
        compiler->failing_call = n;
        compiler->result = result;
        perk_status status = run();
        CHECK(compiler->failed, "call %ld was not made", n);
        failures += status != PERK_OK;
        if (status)
            check_compiler_failure(status, result);
        else
            CHECK(strcmp(compiler->failed, "nvrtcDestroyProgram") == 0, "%s went unnoticed", compiler->failed);
        check_cache_is_sound(folder_path.text);
        begin_run((fake_fault){0});
        CHECK_OK(run());
    }
    fprintf(stderr, "NVRTC error %d: %ld calls, %ld failures\n", result, calls, failures);
    CHECK(failures > calls / 2);
}

static void test_every_call_of_the_compiler(void) {
    path_text folder_path = fresh_folder("compiler");
    cache_folder = folder_path.text;
    begin_run((fake_fault){0});
    CHECK_OK(run());
    long calls = compiler->calls;
    CHECK(calls > 12 && compiler->compiles == 3 /* two sizes of a step, and packing */, "%ld calls", calls);
    begin_run((fake_fault){0});
    CHECK_OK(run());
    CHECK(compiler->calls == 0, "a warm start called NVRTC");
    sweep_compiler(calls, NVRTC_ERROR_INTERNAL_ERROR);
    sweep_compiler(calls, NVRTC_ERROR_OUT_OF_MEMORY);
    sweep_compiler(calls, NVRTC_ERROR_COMPILATION);
    cache_folder = scratch;
}

/* ---- starts and their cache ---- */

static char start_log[8192];

static void keep_start_log(void *user, perk_log_level level, const char *message) {
    size_t used = strlen(start_log);
    (void)user;
    if (level >= PERK_LOG_WARNING) snprintf(start_log + used, sizeof start_log - used, "%s\n", message);
}

/* A cached program that the driver does not take is no reason to fail where a cold start would not. */
static void test_refused_cubins(void) {
    static const CUresult results[] = {CUDA_ERROR_INVALID_IMAGE, CUDA_ERROR_NO_BINARY_FOR_GPU};
    engine_log = (perk_log){keep_start_log, NULL};
    for (long call = 1; call <= 3; call++) /* those of steps, then packing's */
        for (size_t i = 0; i < PERK_COUNT(results); i++) {
            begin_run((fake_fault){.call = call, .function = "cuModuleLoadData", .result = results[i]});
            start_log[0] = '\0';
            CHECK_OK(run());
            CHECK(compiler->compiles == 1 && strstr(start_log, "the driver refuses it"), "%s", start_log);
            begin_run((fake_fault){0});
            CHECK_OK(run());
            CHECK(compiler->calls == 0, "what was made anew was not kept");
        }
    begin_run((fake_fault){.call = 1, .function = "cuModuleLoadData", .result = results[0], .lasting = true});
    CHECK_FAILS(run(), PERK_DRIVER, "loading the program: the driver says FAKE_ERROR_200");
    cache_folder = NULL; /* refused although just made: once is enough */
    begin_run((fake_fault){.call = 1, .function = "cuModuleLoadData", .result = results[0]});
    CHECK_FAILS(run(), PERK_DRIVER, "loading the program: the driver says FAKE_ERROR_200");
    CHECK(compiler->compiles == 2);
    cache_folder = scratch;
    setenv("PERK_LIBNVRTC", "/nonexistent/libnvrtc.so", 1); /* nothing to make it anew with */
    begin_run((fake_fault){.call = 1, .function = "cuModuleLoadData", .result = results[1]});
    CHECK_FAILS(run(), PERK_DRIVER, "loading the program: the driver says FAKE_ERROR_209");
    setenv("PERK_LIBNVRTC", FAKE_CUDA, 1);
    engine_log = (perk_log){0};
}

/* Engines of 64 processes, all cold: each of the three programs is compiled once. */
static void test_cold_starts_together(void) {
    enum { PROCESSES = 64, PROGRAMS = 3 };
    path_text folder_path = fresh_folder("together"), tally = path_in(scratch, "tally");
    pid_t children[PROCESSES];
    int gate[2];
    struct stat info;
    CHECK(pipe(gate) == 0);
    setenv("FAKE_NVRTC_TALLY", tally.text, 1);
    for (int i = 0; i < PROCESSES; i++) {
        children[i] = fork();
        CHECK(children[i] >= 0);
        if (children[i]) continue;
        char byte;
        close(gate[1]);
        CHECK(read(gate[0], &byte, 1) == 0); /* until the parent closes its end */
        cache_folder = folder_path.text;
        start_log[0] = '\0';
        engine_log = (perk_log){keep_start_log, NULL};
        begin_run((fake_fault){0});
        compiler->milliseconds = 100;
        CHECK_OK(run());
        CHECK(start_log[0] == '\0', "%s", start_log);
        _exit(0);
    }
    close(gate[0]);
    close(gate[1]);
    for (int i = 0; i < PROCESSES; i++) {
        int status;
        CHECK(waitpid(children[i], &status, 0) == children[i] && status == 0, "status %x", status);
    }
    unsetenv("FAKE_NVRTC_TALLY");
    CHECK(stat(tally.text, &info) == 0 && info.st_size == PROGRAMS, "%ld compiles", (long)info.st_size);
    check_cache_is_sound(folder_path.text);
    CHECK(count_files(folder_path.text, "") == 2 * PROGRAMS, "beside an alias each, something is left");
    fprintf(stderr, "%d processes cold at once: %ld compiles of %d programs\n", PROCESSES, (long)info.st_size,
            PROGRAMS);
    cache_folder = scratch;
}

static void flip(const char *path, size_t at, uint8_t bits) {
    uint8_t byte;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0 && pread(fd, &byte, 1, (off_t)at) == 1);
    byte ^= bits;
    CHECK(pwrite(fd, &byte, 1, (off_t)at) == 1);
    close(fd);
}

/* Engines start on entries with a flipped bit in each region; the fake driver would notice a changed file. */
static void test_starts_on_damaged_entries(void) {
    path_text folder_path = fresh_folder("damaged");
    char names[8][64];
    int count = 0, starts = 0;
    cache_folder = folder_path.text;
    begin_run((fake_fault){0});
    CHECK_OK(run());
    DIR *listing = opendir(folder_path.text);
    CHECK(listing);
    for (struct dirent *item; (item = readdir(listing)) && count < 8;)
        if (item->d_name[0] != '.') snprintf(names[count++], sizeof names[0], "%.60s", item->d_name);
    closedir(listing);
    CHECK(count == 6, "%d entries", count);
    engine_log = (perk_log){keep_start_log, NULL};
    for (int i = 0; i < count; i++) {
        path_text path = path_in(folder_path.text, names[i]);
        struct stat info;
        CHECK(stat(path.text, &info) == 0);
        for (size_t at = 0; at < (size_t)info.st_size; at += at < 72 ? 5 : 61, starts++) {
            flip(path.text, at, (uint8_t)(1u << at % 8));
            start_log[0] = '\0';
            begin_run((fake_fault){0});
            CHECK_OK(run());
            bool used = start_log[0] != '\0'; /* else an alias, which is looked at where there is no NVRTC */
            CHECK(compiler->compiles == used && (!used || strstr(start_log, "is not used")), "%s", start_log);
            if (used) continue;
            flip(path.text, at, (uint8_t)(1u << at % 8));
            break;
        }
    }
    CHECK(starts > 50, "%d", starts);
    check_cache_is_sound(folder_path.text);
    fprintf(stderr, "%d starts on damaged entries\n", starts);
    engine_log = (perk_log){0};
    cache_folder = scratch;
}

/* ---- faults with a report of their own ---- */

static void test_too_little_memory(void) {
    begin_run((fake_fault){0});
    fake->device.memory = 1 << 20;
    check_refused(PERK_DEVICE_MEMORY, "Fake GPU: the model needs");
    CHECK(strstr(err.message, "for weights") && strstr(err.message, "are free"), "%s", err.message);
    /* Room for the model, none for what loading it takes. */
    bool loading = false;
    for (size_t memory = 1 << 20; memory < (size_t)64 << 20 && run() != PERK_OK; memory += 1 << 19) {
        CHECK(memory == 1 << 20 || err.status == PERK_DEVICE_MEMORY, "%s", err.message);
        loading = loading || strstr(err.message, "for loading");
        begin_run((fake_fault){0});
        fake->device.memory = memory;
    }
    CHECK(loading && !fake->failed);
}

static void test_program_does_not_fit(void) {
    begin_run((fake_fault){0});
    fake->device.fits_sm = false;
    check_refused(PERK_INTERNAL, "does not fit an SM of Fake GPU");
}

static void test_hang_report(void) {
    perk_engine *engine;
    begin_run((fake_fault){0});
    CHECK_OK(open_engine(&engine, PERK_BACKEND_GPU));
    fake->hang = true;
    CHECK(use_engine(engine) == PERK_HANG);
    CHECK(strstr(err.message, "step 0: task ") && strstr(err.message, "(worker 3, position 2)") &&
              strstr(err.message, ", waited more than 10000 ms for counter 1 ("),
          "%s", err.message);
    CHECK(strstr(err.message, "to reach 5, where it stood at 4. The first stage that did not finish is "), "%s",
          err.message);
    perk_engine_free(engine);
    check_released();
}

/* The last things in the driver's hands when a load is cancelled. */
static int cancel(void *user, const char *phase, uint64_t done, uint64_t total) {
    (void)phase, (void)done, (void)total;
    return --*(int *)user == 0;
}

static void test_no_watching(void) {
    perk_engine *engine;
    CHECK_OK(open_engine(&engine, PERK_BACKEND_GPU));
    CHECK_FAILS(perk_engine_watch(engine, NULL, NULL, &err), PERK_UNSUPPORTED, "reference backend");
    perk_engine_free(engine);
    check_released();
}

static void test_cancelled_load(void) {
    for (int after = 1; after < 6; after++) {
        int left = after;
        perk_engine *engine;
        perk_engine_options options = engine_options(PERK_BACKEND_GPU);
        options.progress = (perk_progress){cancel, &left};
        begin_run((fake_fault){0});
        CHECK_FAILS(perk_engine_open(&engine, folder.text, &options, &err), PERK_CANCELLED, "loading was cancelled");
        check_released();
    }
}

/* Loading with threads, slice after slice through all buffers: whatever fails in it, and whenever. */
static perk_status load_large(fake_fault fault) {
    perk_engine *engine;
    perk_engine_options options = engine_options(PERK_BACKEND_GPU);
    options.threads = 4;
    options.random_weights = 1;
    begin_run(fault);
    perk_status status = perk_engine_open(&engine, path_in(scratch, "large.json").text, &options, &err);
    CHECK((status == PERK_OK) == (engine != NULL));
    perk_engine_free(engine);
    check_released();
    return status;
}

static void test_load_with_threads(void) {
    static const char config[] =
        "{\"architectures\": [\"Qwen3ForCausalLM\"], \"hidden_size\": 512, \"intermediate_size\": 1024, "
        "\"num_attention_heads\": 4, \"num_key_value_heads\": 2, \"head_dim\": 64, \"num_hidden_layers\": 1, "
        "\"vocab_size\": 24000, \"max_position_embeddings\": 256, \"rms_norm_eps\": 1e-6, \"rope_theta\": 10000.0, "
        "\"hidden_act\": \"silu\", \"tie_word_embeddings\": true, \"eos_token_id\": 1}";
    static const char *const functions[] = {"cuMemHostAlloc", "cuMemcpyHtoDAsync",  "cuLaunchKernel",
                                            "cuEventRecord",  "cuEventSynchronize", "cuStreamSynchronize"};
    put_file(path_in(scratch, "large.json").text, config, sizeof config - 1);
    CHECK_OK(load_large((fake_fault){0}));
    int failures = 0;
    for (size_t i = 0; i < PERK_COUNT(functions); i++)
        for (long call = 1; call <= 5; call += 2)
            for (int lasting = 0; lasting < 2; lasting++) {
                perk_status status = load_large((fake_fault){
                    .call = call, .function = functions[i], .result = CUDA_ERROR_ILLEGAL_ADDRESS, .lasting = lasting});
                CHECK(status || !fake->failed || strcmp(fake->failed, "cuStreamSynchronize") == 0 /* at the end */,
                      "%s went unnoticed", fault_text());
                if (status) check_failure(status);
                failures += status != PERK_OK;
            }
    CHECK(failures > 24, "%d", failures);
}

/* Two engines share a primary context; the end of one leaves the other whole. */
static void test_two_engines(void) {
    perk_engine *first, *second;
    begin_run((fake_fault){0});
    CHECK_OK(open_engine(&first, PERK_BACKEND_GPU));
    CHECK_OK(open_engine(&second, PERK_BACKEND_GPU));
    CHECK(fake->live.contexts == 2);
    perk_engine_free(first);
    check_context();
    CHECK_OK(use_engine(second));
    perk_engine_free(second);
    check_released();
}

/* An engine may move from thread to thread. */
static void *use_elsewhere(void *engine) {
    opened.make_current((CUcontext)(void *)&foreign);
    CHECK_OK(use_engine(engine));
    perk_engine_free(engine);
    check_context();
    opened.make_current(NULL);
    return NULL;
}

static void test_other_thread(void) {
    perk_engine *engine;
    pthread_t thread;
    begin_run((fake_fault){0});
    CHECK_OK(open_engine(&engine, PERK_BACKEND_GPU));
    CHECK(pthread_create(&thread, NULL, use_elsewhere, engine) == 0 && pthread_join(thread, NULL) == 0);
    check_released();
}

/* ---- the executor's other calls: tensors and measurements ---- */

static perk_status use_executor(perk_executor *executor, perk_model *model, bool ceiling) {
    const perk_tensor *input = model->graph->ops[0]->output;
    double value;
    float values[4096] = {0};
    perk_status status = executor->type->write(executor, input, values, 1, &err);
    check_context();
    if (status == PERK_NOT_FOUND) status = PERK_OK; /* its memory is shared */
    if (!status) status = executor->type->read(executor, input, values, 1, &err);
    check_context();
    if (status == PERK_NOT_FOUND) status = PERK_OK;
    if (!status && ceiling) status = perk_gpu_read_ceiling(executor, 2, &value, &err);
    check_context();
    return status;
}

static void run_executor(const fake_fault *fault, bool ceiling) {
    perk_engine_options from = engine_options(PERK_BACKEND_GPU);
    perk_gpu_options options = {.timing = true, .cache_folder = scratch, .threads = 1};
    perk_config config = from.config;
    perk_model *model;
    perk_executor *executor;
    begin_run((fake_fault){0});
    CHECK_OK(perk_model_open(&model, TINY, false, 0, &err));
    CHECK_OK(perk_config_resolve(&config, model->max_positions, &err));
    CHECK_OK(perk_gpu_create(&executor, model->graph, model->checkpoint, &config, &options, NULL, &err));
    check_context();
    fake->fault = *fault;
    fake->calls = 0;
    perk_status status = use_executor(executor, model, ceiling);
    if (status) check_failure(status);
    CHECK((status != PERK_OK) == (fake->failed && !may_be_survived(fake->failed)), "%s", fault_text());
    executor->type->free(executor);
    perk_model_free(model);
    check_released();
}

static void test_executor(void) {
    static const char *const functions[] = {"cuModuleLoadData",    "cuModuleGetFunction", "cuFuncSetAttribute",
                                            "cuEventCreate",       "cuEventRecord",       "cuLaunchKernel",
                                            "cuStreamSynchronize", "cuEventElapsedTime",  "cuCtxPushCurrent"};
    run_executor(&(fake_fault){0}, true);
    for (size_t i = 0; i < PERK_COUNT(functions); i++)
        run_executor(&(fake_fault){.call = 1, .function = functions[i], .result = CUDA_ERROR_UNKNOWN}, true);
    run_executor(&(fake_fault){.call = 2, .function = "cuEventCreate", .result = CUDA_ERROR_UNKNOWN}, true);
}

int main(void) {
    make_scratch();
    cache_folder = scratch;
    make_folder();
    opened = open_fake();
    fake = opened.driver;
    compiler = opened.compiler;
    test_missing_libraries();
    test_unusable_machines();
    begin_run((fake_fault){0});
    CHECK_OK(run()); /* also fills the cache */
    test_too_little_memory();
    test_program_does_not_fit();
    test_hang_report();
    test_no_watching();
    test_cancelled_load();
    test_load_with_threads();
    test_two_engines();
    test_other_thread();
    test_executor();
    test_lost_while_decoding();
    test_every_call();
    test_every_call_of_the_compiler();
    test_refused_cubins();
    test_cold_starts_together();
    test_starts_on_damaged_entries();
    return 0;
}
