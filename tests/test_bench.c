/* perk bench, on the fake driver, which computes nothing: what every measurement prints, that a program that computes
 * wrong is never timed, that nothing is left behind, and what happens where there is no GPU. The measuring of syncs by
 * itself: every call of the driver that fails, a hang, and that its kernel compiles. */
#include "fake_cuda/open_fake.h"
#include "jit/emit.h"
#include "src/device.h"
#include "src/gpu.h"
#include "src/random_weights.h"
#include "temp.h"

#include <jansson.h>
#include <math.h>
#include <sys/wait.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"

static perk_error err;
static temp_folder temp;

/* ---- the command ---- */

static int run_with(const char *driver, const char *arguments) {
    char command[4096];
    snprintf(command, sizeof command,
             "cd '%s' && TMPDIR=. PERK_LIBCUDA='%s' PERK_LIBNVRTC='%s' PERK_CACHE_DIR=cache '%s/bin/perk' bench %s "
             "> out 2> errors",
             temp.path, driver, FAKE_CUDA, PERK_BINARY_DIR, arguments);
    int code = system(command);
    CHECK(WIFEXITED(code), "%s: died", arguments);
    return WEXITSTATUS(code);
}

static void expect_failure(const char *driver, int code, const char *says, const char *arguments) {
    size_t size, out_size;
    int got = run_with(driver, arguments);
    char *errors = temp_read(&temp, "errors", &size), *out = temp_read(&temp, "out", &out_size);
    CHECK(got == code && strstr(errors, says), "%s: %d: %s", arguments, got, errors);
    CHECK(out_size == 0, "%s: %s", arguments, out);
    free(errors);
    free(out);
}

static char *run_text(const char *arguments) {
    size_t size;
    int code = run_with(FAKE_CUDA, arguments);
    char *errors = temp_read(&temp, "errors", &size);
    CHECK(code == 0 && size == 0, "%s: %d: %s", arguments, code, errors);
    free(errors);
    return temp_read(&temp, "out", &size);
}

/* The objects, one a line, as a list. */
static json_t *run_json(const char *arguments) {
    char *out = run_text(arguments);
    json_t *list = json_array();
    for (char *line = strtok(out, "\n"); line; line = strtok(NULL, "\n")) {
        json_error_t malformed;
        json_t *object = json_loads(line, 0, &malformed);
        CHECK(object, "%s: %s: %s", arguments, malformed.text, line);
        json_array_append_new(list, object);
    }
    free(out);
    return list;
}

static double number(const json_t *json, const char *key) {
    const json_t *value = json_object_get(json, key);
    CHECK(json_is_number(value), "%s", key);
    return json_number_value(value);
}

static bool says(const json_t *json, const char *key, const char *text) {
    const char *value = json_string_value(json_object_get(json, key));
    return value && strcmp(value, text) == 0;
}

static void check_spread(const json_t *json, const char *name) {
    char low[64], high[64];
    snprintf(low, sizeof low, "%s_p10", name);
    snprintf(high, sizeof high, "%s_p90", name);
    CHECK(number(json, low) >= 0 && number(json, low) <= number(json, name) && number(json, name) <= number(json, high),
          "%s: %g, %g, %g", name, number(json, low), number(json, name), number(json, high));
}

static void check_head(const json_t *json, const char *what) {
    CHECK(says(json, "what", what) && says(json, "device", "Fake GPU"));
    CHECK(json_is_string(json_object_get(json, "date")) && json_is_string(json_object_get(json, "perk")));
}

/* ---- decode ---- */

static void test_decode(void) {
    json_t *list = run_json("decode --model " TINY " --no-check --batch 1,3 --context 16,40 --steps 5 --json");
    CHECK(json_array_size(list) == 4);
    for (size_t i = 0; i < 4; i++) {
        const json_t *one = json_array_get(list, i);
        check_head(one, "decode");
        check_spread(one, "step_ms");
        check_spread(one, "device_ms");
        CHECK(number(one, "batch") == (i < 2 ? 1 : 3) && number(one, "context") == (i % 2 ? 40 : 16));
        CHECK(number(one, "max_batched_tokens") == number(one, "batch"));
        CHECK(json_is_false(json_object_get(one, "many_steps_a_launch")) && number(one, "step_ms_mean") > 0);
        CHECK(json_is_null(json_object_get(one, "check_relative_error")));
        double floor =
            (number(one, "weight_bytes") + number(one, "kv_bytes")) / number(one, "read_ceiling_bytes_per_s");
        CHECK(fabs(floor * 1e3 / number(one, "floor_ms") - 1) < 1e-6);
        CHECK(json_is_object(json_object_get(one, "start")));
    }
    json_decref(list);
    char *text = run_text("decode --model " TINY " --no-check --batch 2 --context 16 --steps 2");
    CHECK(strstr(text, "Fake GPU") && strstr(text, "not made"), "%s", text);
    free(text);
    expect_failure(FAKE_CUDA, 1, "the launch ended", /* a launch that makes no tokens has no time */
                   "decode --model " TINY " --no-check --many-steps --batch 2 --context 16 --steps 2");
}

/* ---- prefill ---- */

/* Of the linear layers of examples/tiny, by its config. */
static double linear_flops(double tokens) {
    json_error_t malformed;
    json_t *config = json_load_file(TINY "/config.json", 0, &malformed);
    CHECK(config, "%s", malformed.text);
    double hidden = number(config, "hidden_size"), wide = number(config, "intermediate_size");
    double heads = number(config, "num_attention_heads"), kv_heads = number(config, "num_key_value_heads");
    double head = number(config, "head_dim"), layers = number(config, "num_hidden_layers");
    double weights = layers * (hidden * (heads + 2 * kv_heads) * head + heads * head * hidden + 3 * hidden * wide);
    double once = hidden * number(config, "vocab_size");
    json_decref(config);
    return 2 * (weights * tokens + once);
}

static void test_prefill(void) {
    json_t *list =
        run_json("prefill --model " TINY " --no-check --prompt-tokens 100 --max-batched-tokens 24 --runs 3 --json");
    const json_t *one = json_array_get(list, 0);
    check_head(one, "prefill");
    check_spread(one, "prompt_ms");
    check_spread(one, "device_ms");
    CHECK(number(one, "steps") == 5 && number(one, "prompts") == 3 && number(one, "prompt_tokens") == 100);
    CHECK(number(one, "device_ms") == 5, "a launch takes the fake 1 ms: %g", number(one, "device_ms"));
    CHECK(number(one, "linear_flops") == linear_flops(100), "%.0f", number(one, "linear_flops"));
    double seconds = number(one, "prompt_ms") * 1e-3;
    CHECK(fabs(number(one, "tokens_per_s") * seconds / 100 - 1) < 1e-6);
    CHECK(fabs(number(one, "linear_tflops_per_s") * seconds * 1e12 / number(one, "linear_flops") - 1) < 1e-6);
    json_decref(list);
    char *text = run_text("prefill --model " TINY " --no-check --prompt-tokens 70");
    CHECK(strstr(text, "70 tokens in 2 steps of up to 64") && strstr(text, "TFLOP/s"), "%s", text);
    free(text);
}

/* ---- a model of zeros: its logits are zeros, and the fake driver computes nothing else ---- */

static void make_zero_model(void) {
    char *data;
    size_t size;
    uint64_t header;
    CHECK_OK(perk_read_file(TINY "/config.json", 1 << 20, &data, &size, &err));
    temp_write(&temp, "config.json", data, size);
    free(data);
    CHECK_OK(perk_read_file(TINY "/model.safetensors", 1 << 28, &data, &size, &err));
    memcpy(&header, data, sizeof header);
    memset(data + sizeof header + header, 0, size - sizeof header - header);
    temp_write(&temp, "model.safetensors", data, size);
    free(data);
}

static void test_check(void) {
    static const char wrong[] = "differ from the reference's by";
    expect_failure(FAKE_CUDA, 1, wrong, "decode --model " TINY " --context 16 --steps 2");
    expect_failure(FAKE_CUDA, 1, wrong, "prefill --model " TINY " --prompt-tokens 20 --json");
    expect_failure(FAKE_CUDA, 1, wrong, "startup --model " TINY " --runs 1");
    json_t *list = run_json("decode --model . --batch 4 --context 16 --steps 2 --check-tokens 7 --json");
    CHECK(number(json_array_get(list, 0), "check_relative_error") == 0);
    json_decref(list);
    list = run_json("prefill --model . --prompt-tokens 70 --max-batched-tokens 16 --runs 1 --check-tokens 69 --json");
    CHECK(number(json_array_get(list, 0), "check_relative_error") == 0);
    json_decref(list);
}

/* ---- startup ---- */

static void test_startup(void) {
    json_t *list = run_json("startup --json --runs 2 --model .");
    const json_t *one = json_array_get(list, 0), *cold = json_object_get(one, "cold"),
                 *warm = json_object_get(one, "warm");
    check_head(one, "startup");
    CHECK(number(one, "check_relative_error") == 0 && number(one, "starts") == 2);
    CHECK(strlen(json_string_value(json_object_get(one, "logits_hash"))) == 16);
    CHECK(number(cold, "compile_ms_p10") > 0 && number(warm, "compile_ms_p90") == 0);
    static const char *const parts[] = {"to_first_launch_ms", "process_ms", "open_ms",      "driver_ms",
                                        "context_ms",         "plan_ms",    "check_ms",     "emit_ms",
                                        "module_ms",          "weights_ms", "first_step_ms"};
    for (size_t i = 0; i < PERK_COUNT(parts); i++) {
        check_spread(cold, parts[i]);
        check_spread(warm, parts[i]);
    }
    CHECK(number(warm, "to_first_launch_ms") > number(warm, "process_ms") + number(warm, "plan_ms"));
    CHECK(number(warm, "to_first_launch_ms") < 10e3 && number(warm, "process_ms") > 0);
    json_decref(list);
    char *text = run_text("startup --random-weights --no-check --runs 1 --model " TINY "/config.json");
    CHECK(strstr(text, "to_first_launch_ms") && strstr(text, "not made"), "%s", text);
    free(text);
    list = run_json("startup --one-start --no-check --json --model " TINY);
    check_head(json_array_get(list, 0), "start");
    json_decref(list);
}

/* ---- serve: on the reference executor, whose answers are the same in any batch ---- */

#define SERVE "serve --json --model " TINY " --backend reference --page-size 16 "

static void check_served(const json_t *one) {
    static const char *const times[] = {"first_token_ms", "next_token_ms", "queue_ms"};
    CHECK(says(one, "what", "serve") && says(one, "device", "CPU"));
    for (size_t i = 0; i < PERK_COUNT(times); i++) {
        char p50[64], p99[64];
        snprintf(p50, sizeof p50, "%s_p50", times[i]);
        snprintf(p99, sizeof p99, "%s_p99", times[i]);
        CHECK(number(one, p50) > 0 && number(one, p50) <= number(one, p99), "%s", times[i]);
    }
    CHECK(number(one, "queue_ms_p50") < number(one, "first_token_ms_p99"));
    CHECK(fabs(number(one, "tokens_per_s") * number(one, "seconds") / number(one, "tokens") - 1) < 1e-6);
    CHECK(number(one, "batch_fill") > 0 && number(one, "batch_fill") <= 1 && number(one, "cpu_percent") > 0);
    CHECK(number(one, "pages_in_use_at_end") == 0 && number(one, "near_ties") == 0);
    CHECK(number(one, "rss_begin_bytes") > 1e5 && number(one, "rss_end_bytes") > 1e5);
}

static void test_serve(void) {
    json_t *list = run_json(SERVE "--rate 60 --duration 0.5 --prompts 4-40 --answers 1-20 --checks 100 --seed 3");
    const json_t *one = json_array_get(list, 0);
    check_served(one);
    CHECK(number(one, "requests") > 10 && number(one, "requests") < 60 && number(one, "refused") == 0);
    CHECK(number(one, "compared_answers") == number(one, "requests") && number(one, "cancelled") == 0);
    CHECK(number(one, "compared_tokens") == number(one, "tokens"));
    CHECK(json_is_true(json_object_get(one, "soak")) == 0 && number(one, "rate") == 60);
    json_decref(list);
}

/* Cancelled in the line, while it answers, and never. */
static void test_trace(void) {
    static const char trace[] = "{\"arrival_s\": 0.1, \"prompt_tokens\": 10, \"answer_tokens\": 100}\n\n"
                                "{\"arrival_s\": 0.1, \"prompt_tokens\": 20, \"answer_tokens\": 9, "
                                "\"cancel_after\": 0}\n"
                                "{\"prompt_tokens\": 3, \"arrival_s\": 0.2, \"answer_tokens\": 250, "
                                "\"cancel_after\": 5}\n"
                                "{\"arrival_s\": 9, \"prompt_tokens\": 10, \"answer_tokens\": 100}";
    temp_write_text(&temp, "trace", trace);
    json_t *list = run_json(SERVE "--trace trace --duration 5");
    const json_t *one = json_array_get(list, 0);
    check_served(one);
    CHECK(number(one, "requests") == 3 && number(one, "cancelled") == 2 && says(one, "trace", "trace"));
    CHECK(number(one, "tokens") >= 105 && number(one, "tokens") < 350 && number(one, "max_seq_length") == 253);
    json_decref(list);
    static const char *const wrong[][2] = {
        {"{", "line 1: not JSON"},
        {"[]", "line 1: not a JSON object"},
        {"{\"prompt_tokens\": 1, \"answer_tokens\": 1}", "\"arrival_s\""},
        {"{\"arrival_s\": 1, \"prompt_tokens\": 0, \"answer_tokens\": 1}", "\"prompt_tokens\""},
        {"{\"arrival_s\": 1, \"prompt_tokens\": 1, \"answer_tokens\": 1.5}", "\"answer_tokens\""},
        {"{\"arrival_s\": 1, \"prompt_tokens\": 1, \"answer_tokens\": 4, \"cancel_after\": 4}", "\"cancel_after\""},
        {"{\"arrival_s\": 1, \"prompt_tokens\": 1, \"answer_tokens\": 1, \"size\": 1}", "field \"size\""},
        {"{\"arrival_s\": 1, \"prompt_tokens\": 1, \"answer_tokens\": 1}\n"
         "{\"arrival_s\": 0, \"prompt_tokens\": 1, \"answer_tokens\": 1}",
         "line 2: \"arrival_s\""},
    };
    for (size_t i = 0; i < PERK_COUNT(wrong); i++) {
        temp_write_text(&temp, "trace", wrong[i][0]);
        expect_failure(FAKE_CUDA, 1, wrong[i][1], SERVE "--trace trace");
    }
}

/* Few pages, many arrivals: requests are refused, cancelled and set back, and find each other's pages. */
static void test_soak(void) {
    json_t *list = run_json(SERVE "--soak --rate 1000 --duration 0.5 --prompts 10-60 --answers 5-60 --checks 40");
    const json_t *one = json_array_get(list, 0);
    check_served(one);
    CHECK(number(one, "max_pages") == 16 && number(one, "max_unfinished") == 32, "%g pages", number(one, "max_pages"));
    CHECK(number(one, "most_unfinished") >= 8 && number(one, "compared_tokens") > 0);
    static const char *const happened[] = {"refused", "cancelled", "set_backs", "found_tokens", "evictions"};
    for (size_t i = 0; i < PERK_COUNT(happened); i++) CHECK(number(one, happened[i]) > 0, "%s", happened[i]);
    json_decref(list);
    /* Behind the fake driver every token is the first one, so all answers are alike, too. */
    char *text = run_text("serve --soak --rate 50 --duration 0.3 --answers 2-9 --model " TINY);
    CHECK(strstr(text, "Fake GPU") && strstr(text, "no token lost or repeated") && strstr(text, "0 parted"), "%s",
          text);
    free(text);
}

/* ---- sync, and all of them without a GPU ---- */

static void test_sync(void) {
    json_t *list = run_json("sync --runs 3 --json");
    const json_t *one = json_array_get(list, 0);
    check_head(one, "sync");
    check_spread(one, "sync_us");
    CHECK(number(one, "sync_us") > 0.4 && number(one, "sync_us") < 10, "%g", number(one, "sync_us"));
    CHECK(number(one, "workers") == 132 && number(one, "launches") == 3);
    CHECK(json_is_true(json_object_get(one, "counters_ok")));
    json_decref(list);
    char *text = run_text("sync --portable --no-cache");
    CHECK(strstr(text, "132 workers  portable") && strstr(text, "64 launches of 256 syncs"), "%s", text);
    free(text);
}

static void test_failures(void) {
    static const char *const commands[] = {"decode --model " TINY " --context 16",
                                           "prefill --model " TINY " --prompt-tokens 20", "load --model " TINY,
                                           "startup --model " TINY, "sync"};
    for (size_t i = 0; i < PERK_COUNT(commands); i++) expect_failure("/nonexistent", 1, "libcuda", commands[i]);
    expect_failure(FAKE_CUDA, 2, "--model is missing", "serve");
    for (size_t i = 0; i < 4; i++) {
        char word[32];
        snprintf(word, sizeof word, "%.*s", (int)strcspn(commands[i], " "), commands[i]);
        expect_failure(FAKE_CUDA, 2, "--model is missing", word);
    }
    expect_failure(FAKE_CUDA, 2, "say what to measure", "");
    expect_failure(FAKE_CUDA, 2, "say what to measure", "decoding --model " TINY);
    expect_failure(FAKE_CUDA, 2, "--batch must be", "decode --model " TINY " --batch 1,,2");
    expect_failure(FAKE_CUDA, 2, "--context must be", "decode --model " TINY " --context 0");
    expect_failure(FAKE_CUDA, 2, "no warm starts", "startup --no-cache --model " TINY);
    expect_failure(FAKE_CUDA, 2, "--prompts must be", SERVE "--prompts 9-3");
    expect_failure(FAKE_CUDA, 2, "--answers must be", SERVE "--answers 0-3");
    expect_failure(FAKE_CUDA, 2, "--batch must be", SERVE "--batch 1,2");
    expect_failure(FAKE_CUDA, 2, "no request arrives", SERVE "--rate 1 --duration 0.001");
    expect_failure(FAKE_CUDA, 1, "512 positions", SERVE "--prompts 600");
    expect_failure(FAKE_CUDA, 1, "max_seq_length", "prefill --prompt-tokens 1000000 --model " TINY);
    expect_failure(FAKE_CUDA, 1, "/nonexistent", "startup --model /nonexistent");
}

/* ---- syncs by themselves ---- */

static opened_fake fake;

/* Measures with that fault, or a hang; everything must be given back. */
static perk_status sync_with(fake_fault fault, bool hang, double *microseconds) {
    const perk_gpu_options options = {.cache_folder = temp.path, .no_cache = true, .threads = 1};
    const fake_live none = {0};
    perk_config config = {.max_num_batched_tokens = 1, .max_seq_length = 1};
    perk_graph *graph;
    perk_checkpoint *weights;
    perk_executor *gpu;
    fake.reset_driver();
    fake.driver->device.sm_count = 8;
    CHECK_OK(perk_graph_create(&graph, "sync", &err));
    perk_linear(graph, "y", perk_input(graph, "x", 64), perk_attach_matrix(graph, "w", 64, 64), NULL);
    CHECK_OK(perk_checkpoint_open_given(&weights, graph, 1, NULL, 0, &err));
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    CHECK_OK(perk_gpu_create(&gpu, graph, weights, &config, &options, NULL, &err));
    fake.driver->fault = fault;
    fake.driver->calls = 0;
    fake.driver->hang = hang;
    perk_status status = perk_gpu_sync_times(gpu, 2, microseconds, &err);
    CHECK(status != PERK_OK || !fake.driver->failed, "%s failed and nobody noticed", fake.driver->failed);
    fake.driver->fault = (fake_fault){0};
    gpu->type->free(gpu);
    perk_checkpoint_free(weights);
    perk_graph_free(graph);
    CHECK(memcmp(&fake.driver->live, &none, sizeof none) == 0 && !fake.driver->misuse && fake.driver->swept == 0,
          "%s: %s, %s", fault.function ? fault.function : "-", fake.driver->misused_in, fake.driver->misuse);
    return status;
}

static void test_sync_faults(void) {
    static const char *const functions[] = {
        "cuCtxPushCurrent",  "cuMemAlloc",          "cuMemsetD8Async",           "cuMemHostAlloc",
        "cuMemcpyHtoDAsync", "cuModuleLoadData",    "cuModuleGetFunction",       "cuFuncSetAttribute",
        "cuMemcpyDtoH",      "cuStreamSynchronize", "cuMemHostGetDevicePointer", "cuLaunchCooperativeKernel"};
    double microseconds[2];
    CHECK_OK(sync_with((fake_fault){0}, false, microseconds));
    CHECK(microseconds[0] > 0.4 && microseconds[1] == microseconds[0]);
    for (size_t i = 0; i < PERK_COUNT(functions); i++)
        for (long call = 1; call <= 3; call++) {
            const fake_fault fault = {.call = call, .function = functions[i], .result = CUDA_ERROR_UNKNOWN};
            perk_status status = sync_with(fault, false, microseconds);
            CHECK(call > 1 || status == PERK_DRIVER, "%s: %s", functions[i], perk_status_text(status));
        }
    CHECK(sync_with((fake_fault){0}, true, microseconds) == PERK_HANG);
    CHECK(strstr(err.message, "waited more than 10000 ms for counter 1 to reach 5"), "%s", err.message);
}

/* By the real compiler, where there is one: the kernel uses the worker's own loop, and must keep up with it. */
static void test_sync_compiles(void) {
    static const char *const archs[] = {"sm_80", "sm_90a", "sm_120a"};
    perk_nvrtc *nvrtc;
    perk_compile_header *headers;
    size_t count;
    unsetenv("PERK_LIBNVRTC");
    if (perk_nvrtc_open(&nvrtc, NULL, &err) != PERK_OK) {
        fprintf(stderr, "the kernel of perk bench sync was not compiled: %s\n", err.message);
        return;
    }
    CHECK_OK(perk_emit_headers(&headers, &count, &err));
    for (size_t i = 0; i < PERK_COUNT(archs); i++) {
        char source[256];
        snprintf(source, sizeof source,
                 "#define PERK_PORTABLE %d\n#define PERK_PROFILE 0\n#include \"abi.h\"\n#include \"ptx.cuh\"\n"
                 "#include \"sync.cuh\"\n",
                 i == 0);
        const perk_compile_request request = {
            .source = source, .headers = headers, .header_count = count, .arch = archs[i]};
        perk_compile_result result;
        CHECK_OK(perk_compile(nvrtc, &request, &result, &err));
        CHECK(result.spill_bytes == 0);
        perk_compile_result_free(&result);
    }
    perk_emit_headers_free(headers, count);
    perk_nvrtc_free(nvrtc);
}

int main(void) {
    char command[1024];
    temp = temp_make();
    make_zero_model();
    test_decode();
    test_prefill();
    test_check();
    test_startup();
    test_serve();
    test_trace();
    test_soak();
    test_sync();
    test_failures();
    fake = open_fake();
    test_sync_faults();
    test_sync_compiles();
    /* What measurements made on the way is gone. */
    snprintf(command, sizeof command, "cd '%s' && ! ls -d perk-startup-* 2>/dev/null && rm -r cache", temp.path);
    CHECK(system(command) == 0, "something was left behind");
    temp_remove(&temp);
    return 0;
}
