/* perk doctor: what works here. Each part is looked at into a JSON object with "ok" and, where not, "problem"; the text
 * is printed from the same objects. */
#include "test_op.h"

#include "jit/compile.h"
#include "perk/cache.h"
#include "src/driver.h"
#include "src/nccl.h"

#include <unistd.h>

enum { OLDEST_CAPABILITY = 80 };

static json_t *problem(const perk_error *err) { return json_pack("{s:b, s:s}", "ok", 0, "problem", err->message); }

static json_t *look_at_device(const perk_driver *driver, int ordinal) {
    perk_error err = {0};
    perk_device_info info;
    if (perk_driver_device_info(driver, ordinal, &info, &err)) return problem(&err);
    char arch[16];
    perk_arch_of_capability(info.cc_major, info.cc_minor, arch);
    const char *trouble = NULL;
    if (info.cc_major * 10 + info.cc_minor < OLDEST_CAPABILITY)
        trouble = "older than compute capability 8.0, the oldest that perk runs on: use --backend reference";
    else if (!info.cooperative_launch)
        trouble = "cannot launch cooperatively (is it shared through MPS or a virtual GPU?): use --backend reference";
    return json_pack("{s:b, s:s?, s:s, s:s, s:i, s:I, s:I, s:I, s:I}", "ok", trouble == NULL, "problem", trouble,
                     "name", info.name, "arch", arch, "multiprocessors", info.sm_count, "memory_bytes",
                     (json_int_t)info.total_memory, "shared_bytes_per_block", (json_int_t)info.shared_per_block_optin,
                     "shared_bytes_per_multiprocessor", (json_int_t)info.shared_per_sm, "l2_bytes",
                     (json_int_t)info.l2_bytes);
}

static json_t *look_at_driver(json_t *devices, int *version) {
    perk_error err = {0};
    perk_driver *driver;
    if (perk_driver_open(&driver, &err)) return problem(&err);
    int count = 0;
    json_t *result;
    *version = driver->version;
    if (perk_driver_device_count(driver, &count, &err)) {
        result = problem(&err);
    } else {
        char text[32];
        snprintf(text, sizeof text, "%d.%d", driver->version / 1000, driver->version % 1000 / 10);
        result =
            json_pack("{s:b, s:s, s:s, s:i}", "ok", 1, "cuda", text, "path", driver->library.path, "devices", count);
    }
    for (int i = 0; i < count; i++) json_array_append_new(devices, look_at_device(driver, i));
    perk_driver_free(driver);
    return result;
}

/* Also says of every device whether this NVRTC can compile for it. */
static json_t *look_at_nvrtc(json_t *devices, int driver_version) {
    perk_error err = {0};
    perk_nvrtc_identity identity;
    perk_nvrtc *nvrtc;
    if (perk_nvrtc_identify(driver_version, &identity, &err)) return problem(&err);
    if (perk_nvrtc_open(&nvrtc, &identity, &err)) return problem(&err);
    for (size_t i = 0; i < json_array_size(devices); i++) {
        json_t *device = json_array_get(devices, i);
        const char *arch = json_string_value(json_object_get(device, "arch"));
        perk_status status = arch ? perk_nvrtc_check_arch(nvrtc, arch, &err) : PERK_OK;
        if (status && json_is_true(json_object_get(device, "ok"))) {
            json_object_set_new(device, "ok", json_false());
            json_object_set_new(device, "problem", json_string(err.message));
        }
    }
    char version[32];
    snprintf(version, sizeof version, "%d.%d", nvrtc->major, nvrtc->minor);
    json_t *result = json_pack("{s:b, s:s, s:s, s:s}", "ok", 1, "version", version, "path", identity.path, "build_id",
                               identity.build_id);
    perk_nvrtc_free(nvrtc);
    return result;
}

static json_t *look_at_nccl(void) {
    perk_error err = {0};
    perk_nccl_info info;
    if (perk_nccl_probe(&info, &err)) return problem(&err);
    return json_pack("{s:b, s:i, s:s}", "ok", 1, "version", info.version, "path", info.path);
}

static json_t *look_at_cache(void) {
    perk_error err = {0};
    perk_cache *cache;
    perk_cache_report report = {0};
    perk_cache_options options = {.log = perk_cli_log(0)};
    if (perk_cache_open(&cache, &options, &err)) return problem(&err);
    const char *folder = perk_cache_folder(cache);
    json_t *result;
    if (!folder) {
        perk_fail(&err, PERK_IO, "no folder can be written: every start compiles anew; set PERK_CACHE_DIR to one");
        result = problem(&err);
    } else if (perk_cache_verify(cache, 0, &report, &err)) {
        result = problem(&err);
    } else {
        result =
            json_pack("{s:b, s:s, s:I, s:I, s:I}", "ok", report.bad == 0, "folder", folder, "entries",
                      (json_int_t)report.entries, "bytes", (json_int_t)report.bytes, "bad", (json_int_t)report.bad);
        if (report.bad)
            json_object_set_new(
                result, "problem",
                json_sprintf("%llu bad entries: run perk cache verify --remove", (unsigned long long)report.bad));
    }
    perk_cache_free(cache);
    return result;
}

/* ---- the self-test ---- */

/* Keeps the device's context for the duration, which every test would make anew. */
static perk_driver *hold_context(int ordinal) {
    perk_driver *driver;
    perk_device_info info;
    CUcontext context;
    if (perk_driver_open(&driver, NULL)) return NULL;
    if (!perk_driver_device_info(driver, ordinal, &info, NULL) &&
        driver->cuDevicePrimaryCtxRetain(&context, info.device) == CUDA_SUCCESS)
        return driver;
    perk_driver_free(driver);
    return NULL;
}

static void let_context_go(perk_driver *driver, int ordinal) {
    perk_device_info info;
    if (!driver) return;
    if (!perk_driver_device_info(driver, ordinal, &info, NULL)) driver->cuDevicePrimaryCtxRelease(info.device);
    perk_driver_free(driver);
}

/* Every op and a decoder, as this device runs them best and as any would. */
static void test_device(int ordinal, json_t *list, bool print, perk_cli_test_tally *tally) {
    size_t count;
    const perk_op_case *grid = perk_op_grid(&count);
    const perk_cli_test_output output = {.list = list, .print = print, .failed_only = true};
    perk_driver *held = hold_context(ordinal);
    for (int portable = 0; portable < 2; portable++)
        for (size_t i = 0; i < count; i++) {
            const perk_test_options options = {.backend = PERK_BACKEND_GPU,
                                               .device = ordinal,
                                               .portable = portable,
                                               .seed = (uint64_t)(perk_now() * 1e6)};
            if (grid[i].quick) perk_cli_run_op_cases(&grid[i], 1, &options, &output, tally);
        }
    let_context_go(held, ordinal);
}

static json_t *run_self_test(const json_t *devices, bool print) {
    perk_cli_test_tally tally = {0};
    json_t *list = json_array();
    double begin = perk_now();
    for (size_t i = 0; i < json_array_size(devices); i++)
        if (json_is_true(json_object_get(json_array_get(devices, i), "ok"))) test_device((int)i, list, print, &tally);
    const char *problem = NULL;
    if (tally.failed)
        problem = "a GPU computes wrong, or a program does not run; perk test-op looks closer";
    else if (!tally.passed)
        problem = "cannot run: there is no GPU here that a model could run on";
    return json_pack("{s:b, s:s?, s:i, s:i, s:f, s:o}", "ok", problem == NULL, "problem", problem, "passed",
                     tally.passed, "failed", tally.failed, "seconds", perk_now() - begin, "cases", list);
}

/* ---- text ---- */

static bool is_ok(const json_t *part) { return json_is_true(json_object_get(part, "ok")); }

static const char *text_of(const json_t *part, const char *key) {
    const char *text = json_string_value(json_object_get(part, key));
    return text ? text : "?";
}

static long long number_of(const json_t *part, const char *key) {
    return (long long)json_integer_value(json_object_get(part, key));
}

/* "driver    ok   " and then, where it is not, what is wrong, its lines indented. */
static void print_head(const char *name, const json_t *part, const char *bad) {
    printf("%-10s%-5s", name, is_ok(part) ? "ok" : bad);
    if (is_ok(part)) return;
    for (const char *line = text_of(part, "problem"); *line;) {
        size_t length = strcspn(line, "\n");
        printf("%.*s\n", (int)length, line);
        line += length + (line[length] == '\n');
        if (*line) printf("%15s", "");
    }
}

static void print_self_test(const json_t *test) {
    if (!test) return;
    printf("\n");
    print_head("selftest", test, "no");
    if (is_ok(test))
        printf("this machine's GPUs compute right: %lld tests in %.1f s\n", number_of(test, "passed"),
               json_number_value(json_object_get(test, "seconds")));
}

static void print_text(const json_t *all) {
    const json_t *driver = json_object_get(all, "driver"), *devices = json_object_get(all, "devices");
    const json_t *nvrtc = json_object_get(all, "nvrtc"), *nccl = json_object_get(all, "nccl");
    const json_t *cache = json_object_get(all, "cache");
    printf("perk %s\n", perk_version());
    print_head("driver", driver, "no");
    if (is_ok(driver)) printf("CUDA %s, %s\n", text_of(driver, "cuda"), text_of(driver, "path"));
    for (size_t i = 0; i < json_array_size(devices); i++) {
        const json_t *device = json_array_get(devices, i);
        char name[32];
        snprintf(name, sizeof name, "device %zu", i);
        print_head(name, device, "no");
        if (is_ok(device))
            printf("%s, %s, %lld SMs, %.1f GiB, %lld KiB of shared memory a block\n", text_of(device, "name"),
                   text_of(device, "arch"), number_of(device, "multiprocessors"),
                   (double)number_of(device, "memory_bytes") / (1 << 30),
                   number_of(device, "shared_bytes_per_block") >> 10);
    }
    print_head("nvrtc", nvrtc, "no");
    if (is_ok(nvrtc)) printf("%s, %s\n", text_of(nvrtc, "version"), text_of(nvrtc, "path"));
    print_head("nccl", nccl, "-"); /* nothing needs it yet */
    if (is_ok(nccl)) printf("%lld, %s\n", number_of(nccl, "version"), text_of(nccl, "path"));
    print_head("cache", cache, "no");
    if (is_ok(cache))
        printf("%s, %lld entries, %lld bytes\n", text_of(cache, "folder"), number_of(cache, "entries"),
               number_of(cache, "bytes"));
    printf("cpu       ok   %lld cores for the reference executor\n", number_of(all, "cores"));
    printf("\nModels run %s.\n", json_is_true(json_object_get(all, "gpu_ready"))
                                     ? "on the GPU"
                                     : "in the reference executor only; see above for what the GPU lacks");
    print_self_test(json_object_get(all, "selftest"));
}

int perk_cli_doctor(const perk_cli_command *self, int argc, char **argv) {
    int json = 0, require_gpu = 0, self_test = 0;
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_FLAG("json", &json, "the result as one JSON object"),
        PERK_CLI_OPTION_FLAG("require-gpu", &require_gpu, "fail (exit code 1) when no GPU can run a model"),
        PERK_CLI_OPTION_FLAG("selftest", &self_test,
                             "run every op on every GPU: fail where one is wrong, or none is there"),
    };
    perk_cli_options options = {0};
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(self, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;

    int driver_version = 0;
    json_t *devices = json_array();
    json_t *driver = look_at_driver(devices, &driver_version);
    json_t *nvrtc = look_at_nvrtc(devices, driver_version);
    bool device_ok = false;
    for (size_t i = 0; i < json_array_size(devices); i++) device_ok |= is_ok(json_array_get(devices, i));
    bool gpu_ready = is_ok(driver) && device_ok && is_ok(nvrtc);
    json_t *all = json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:I, s:b}", "version", perk_version(), "driver", driver,
                            "devices", devices, "nvrtc", nvrtc, "nccl", look_at_nccl(), "cache", look_at_cache(),
                            "cores", (json_int_t)sysconf(_SC_NPROCESSORS_ONLN), "gpu_ready", gpu_ready);
    bool passed = true;
    if (self_test) {
        json_t *test = run_self_test(devices, !json);
        passed = is_ok(test);
        json_object_set_new(all, "selftest", test);
    }
    if (!json) print_text(all);
    bool printed = !json || perk_cli_print_json(json_incref(all));
    json_decref(all);
    return printed && passed && (gpu_ready || !require_gpu) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}
