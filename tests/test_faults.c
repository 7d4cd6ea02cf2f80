/* Faults of the driver, without a GPU: the engine runs on the fake driver of tests/fake_cuda, and every call that it
 * makes fails once, and once with all that follow. Each time: a clean error that says what was being done, everything
 * given back, the caller's context current again, and a failed step closes the engine for good. */
#include "fake_cuda/fake_cuda.h"
#include "src/base.h"
#include "src/gpu.h"
#include "src/model.h"
#include "test_cache.h"

#include <dlfcn.h>
#include <pthread.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"

enum { STEPS = 3, SM_COUNT = 8 /* few, for small plans: the driver calls stay the same */ };

static perk_error err;
static fake_cuda *fake;
static CUcontext (*current_context)(void);
static void (*make_current)(CUcontext context);
static void (*reset_fake)(void);
static long calls_before_end;
static path_text folder; /* the tiny model without its tokenizer, whose reading would be most of the test's time */
static char foreign;     /* its address is a context of the embedding program's */

static void *symbol(void *library, const char *name) {
    void *address = dlsym(library, name);
    CHECK(address, "%s", name);
    return address;
}

static void open_fake(void) {
    void *library = dlopen(FAKE_CUDA, RTLD_NOW | RTLD_LOCAL);
    CHECK(library, "%s", dlerror());
    fake_cuda *(*state)(void);
    *(void **)&state = symbol(library, "fake_cuda_state");
    *(void **)&current_context = symbol(library, "fake_cuda_current");
    *(void **)&make_current = symbol(library, "fake_cuda_make_current");
    *(void **)&reset_fake = symbol(library, "fake_cuda_reset");
    fake = state();
    setenv("PERK_LIBCUDA", FAKE_CUDA, 1);
}

static void make_folder(void) {
    static const char *const files[] = {"config.json", "generation_config.json", "model.safetensors"};
    folder = path_in(scratch, "model");
    CHECK(mkdir(folder.text, 0755) == 0);
    for (size_t i = 0; i < PERK_COUNT(files); i++)
        CHECK(symlink(path_in(TINY, files[i]).text, path_in(folder.text, files[i]).text) == 0);
}

static void begin_run(fake_fault fault) {
    reset_fake();
    fake->device.sm_count = SM_COUNT;
    fake->fault = fault;
    make_current((CUcontext)(void *)&foreign);
}

static const char *fault_text(void) {
    static char text[128];
    snprintf(text, sizeof text, "call %ld, %s, with %d%s", fake->failed_call, fake->failed ? fake->failed : "no fault",
             (int)fake->fault.result, fake->fault.lasting ? " and all after it" : "");
    return text;
}

static void check_context(void) {
    CHECK(current_context() == (CUcontext)(void *)&foreign, "after %s the caller's context is not current",
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
    CHECK(!fake->misuse, "after %s: %s: %s", fault_text(), fake->misused_in, fake->misuse);
    check_context();
}

static perk_engine_options engine_options(perk_backend backend) {
    return (perk_engine_options){.backend = backend,
                                 .threads = 1,
                                 .cache_folder = scratch,
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

/* ---- every call fails ---- */

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
    CHECK(strstr(err.message, "worker 3, task 2 (") && strstr(err.message, "seen 4, wanted 5"), "%s", err.message);
    perk_engine_free(engine);
    check_released();
}

/* The last things in the driver's hands when a load is cancelled. */
static int cancel(void *user, const char *phase, uint64_t done, uint64_t total) {
    (void)phase, (void)done, (void)total;
    return --*(int *)user == 0;
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
    make_current((CUcontext)(void *)&foreign);
    CHECK_OK(use_engine(engine));
    perk_engine_free(engine);
    check_context();
    make_current(NULL);
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
    make_folder();
    open_fake();
    test_unusable_machines();
    begin_run((fake_fault){0});
    perk_status status = run(); /* also fills the cache */
    if (status == PERK_NO_COMPILER) {
        fprintf(stderr, "skipped but for unusable machines: no NVRTC to compile the program with\n");
        return TEST_SKIP;
    }
    CHECK_OK(status);
    test_too_little_memory();
    test_program_does_not_fit();
    test_hang_report();
    test_cancelled_load();
    test_two_engines();
    test_other_thread();
    test_executor();
    test_every_call();
    return 0;
}
