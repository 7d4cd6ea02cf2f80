/* perk plan --html; perk profile, on the fake driver, which makes the stamps up: its table, trace, page. And a program
 * that is not profiled has no trace of profiling. */
#include "jit/compile.h"
#include "jit/emit.h"
#include "src/device.h"
#include "src/model.h"
#include "temp.h"

#include <jansson.h>
#include <math.h>
#include <sys/wait.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"

static perk_error err;
static temp_folder temp;

/* ---- the command ---- */

/* Runs perk with driver and compiler of the fake library; gives the exit code, output in "out" and "errors". */
static int run_perk(const char *arguments) {
    char command[4096];
    snprintf(command, sizeof command,
             "cd '%s' && PERK_LIBCUDA='%s' PERK_LIBNVRTC='%s' '%s/bin/perk' %s > out 2> errors", temp.path, FAKE_CUDA,
             FAKE_CUDA, PERK_BINARY_DIR, arguments);
    int code = system(command);
    CHECK(WIFEXITED(code), "%s: died", arguments);
    return WEXITSTATUS(code);
}

static json_t *parse(const char *text, size_t size) {
    json_error_t json_err;
    json_t *json = json_loadb(text, size, 0, &json_err);
    CHECK(json, "%s", json_err.text);
    return json;
}

static int count_events(const json_t *events, const char *category, const char *name) {
    int count = 0;
    size_t index;
    const json_t *event;
    json_array_foreach((json_t *)(uintptr_t)events, index, event) {
        const char *is = json_string_value(json_object_get(event, "cat"));
        const char *named = json_string_value(json_object_get(event, "name"));
        count += is && strcmp(is, category) == 0 && (!name || strcmp(named, name) == 0);
    }
    return count;
}

static json_t *read_page(const char *name) {
    static const char begin[] = "<script type=\"application/json\" id=\"data\">";
    size_t size;
    char *page = temp_read(&temp, name, &size), *data = strstr(page, begin);
    CHECK(data);
    data += sizeof begin - 1;
    json_t *json = parse(data, (size_t)(strstr(data, "</script>") - data));
    free(page);
    return json;
}

static void check_page(int tasks) {
    json_t *json = read_page("page.html");
    const json_t *steps = json_object_get(json, "steps");
    CHECK(json_array_size(steps) == 2);
    for (size_t i = 0; i < 2; i++) {
        const json_t *measured = json_object_get(json_array_get(steps, i), "measured");
        CHECK((int)json_array_size(measured) == 3 * tasks, "%zu", json_array_size(measured));
    }
    json_decref(json);
}

static void test_plan_html(void) {
    size_t size;
    int code = run_perk("plan --model " TINY " --context 99 --bandwidth 2000 --html plan.html");
    char *errors = temp_read(&temp, "errors", &size);
    CHECK(code == 0, "exit code %d: %s", code, errors);
    json_t *json = read_page("plan.html");
    const json_t *step = json_array_get(json_object_get(json, "steps"), 0);
    CHECK(json_real_value(json_object_get(step, "bandwidth")) == 2e12);
    CHECK(json_integer_value(json_object_get(step, "context")) == 99 && !json_object_get(step, "measured"));
    json_decref(json);
    free(errors);
}

/* The parts of a linear add up to its tasks' run. */
static void check_parts(const char *table) {
    const char *row = strstr(table, "layers.*.gate_up ");
    double run, read, multiply, share, finish;
    CHECK(row && sscanf(row, "%*s %*d %*f %*f %*f %lf %*f %*f %lf %lf %lf %lf", &run, &read, &multiply, &share,
                        &finish) == 5,
          "%s", table);
    CHECK(read > 0 && fabs(read + multiply + share + finish - run) < 0.03, "%s", table);
}

static void test_command(void) {
    size_t size;
    int code = run_perk("profile --no-cache --model " TINY " --batch 2 --max-batched-tokens 8 --context 40 --steps 5 "
                        "--json trace.json --html page.html");
    char *errors = temp_read(&temp, "errors", &size), *out = temp_read(&temp, "out", &size);
    CHECK(code == 0, "exit code %d: %s", code, errors);
    CHECK(strstr(out, "profiling costs") && strstr(out, "layers.*.gate_up") && strstr(out, "next_token"), "%s", out);
    check_parts(out);
    char *text = temp_read(&temp, "trace.json", &size);
    json_t *trace = parse(text, size);
    const json_t *events = json_object_get(trace, "traceEvents");
    int tasks = count_events(events, "task", NULL);
    CHECK(count_events(events, "step", NULL) == 2 && count_events(events, "step", "decode") == 1);
    CHECK(tasks > 2 * 132 && tasks % 2 == 0);
    CHECK(count_events(events, "task", "layers.3.gate_up") == count_events(events, "task", "layers.4.gate_up"));
    check_page(tasks / 2);
    json_decref(trace);
    free(text);
    free(errors);
    free(out);
}

static void test_failures(void) {
    static const struct {
        const char *arguments;
        int code;
        const char *says;
    } cases[] = {
        {"profile --json x", 2, "--model is missing"},
        {"profile --model /nonexistent", 1, "/nonexistent"},
        {"profile --no-cache --model " TINY " --context 40 --steps 1 --html nowhere/page.html", 1, "cannot create"},
        {"profile --model " TINY " --context 1000000", 1, "max_seq_length"},
        {"plan --model " TINY " --html nowhere/page.html", 1, "cannot create"},
        {"plan --model " TINY " --html page.html --json", 2, "--html goes without"},
    };
    for (size_t i = 0; i < PERK_COUNT(cases); i++) {
        size_t size;
        int code = run_perk(cases[i].arguments);
        char *errors = temp_read(&temp, "errors", &size);
        CHECK(code == cases[i].code && strstr(errors, cases[i].says), "%s: %d: %s", cases[i].arguments, code, errors);
        free(errors);
    }
}

/* ---- no trace where nothing is profiled ---- */

static perk_plan *make_plan(const perk_model *model, bool profiled) {
    perk_device_desc device;
    perk_config config = {.max_num_batched_tokens = 1, .max_seq_length = 64};
    perk_plan *plan;
    CHECK_OK(perk_device_describe_arch("sm_90a", &device, &err));
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    CHECK_OK(perk_plan_create(&plan, model->graph, &device, &config, &err));
    plan->profiled = profiled;
    return plan;
}

static perk_buffer emit(const perk_plan *plan) {
    perk_buffer source = {0};
    CHECK_OK(perk_emit_source(plan, &source, &err));
    return source;
}

/* The sources differ in the one line that says so. */
static void check_sources(const perk_buffer *plain, const perk_buffer *profiled) {
    const char *off = strstr(plain->data, "#define PERK_PROFILE 0\n"),
               *on = strstr(profiled->data, "#define PERK_PROFILE 1\n");
    CHECK(off && on && off - plain->data == on - profiled->data && plain->size == profiled->size);
    size_t line = strlen("#define PERK_PROFILE 0\n");
    CHECK(memcmp(plain->data, profiled->data, (size_t)(off - plain->data)) == 0 && strcmp(off + line, on + line) == 0);
}

/* Takes out everything from each `begin` to the next `end`, `end` included. */
static int cut_all(char *text, const char *begin, const char *end) {
    int count = 0;
    for (char *at = text; (at = strstr(at, begin)); count++) {
        char *rest = strstr(at, end);
        CHECK(rest, "%s", begin);
        memmove(at, rest + strlen(end), strlen(rest + strlen(end)) + 1);
    }
    return count;
}

static perk_compile_result compile(const perk_nvrtc *nvrtc, const perk_buffer *source, perk_compile_header *headers,
                                   size_t count) {
    const perk_compile_request request = {
        .source = source->data, .headers = headers, .header_count = count, .arch = "sm_90a"};
    perk_compile_result result;
    CHECK_OK(perk_compile(nvrtc, &request, &result, &err));
    return result;
}

/* Without profiling, the cubin is to the byte that of device code from which all of profiling was cut. */
static void check_cubins(const perk_nvrtc *nvrtc, const perk_buffer *plain, const perk_buffer *profiled) {
    perk_compile_header *headers;
    size_t count;
    CHECK_OK(perk_emit_headers(&headers, &count, &err));
    perk_compile_result as_is = compile(nvrtc, plain, headers, count);
    perk_compile_result stamping = compile(nvrtc, profiled, headers, count);
    int functions = 0, calls = 0;
    for (size_t i = 0; i < count; i++) {
        char *text = (char *)(uintptr_t)headers[i].text;
        functions += cut_all(text, "__device__ __forceinline__ void stamp(", "\n}\n");
        calls += cut_all(text, "stamp(w, ", "\n");
        CHECK(!strstr(text, "PERK_PROFILE"), "%s", headers[i].name);
    }
    /* Three of every task; of a linear its parts, in linear.cuh, moe.cuh (which has its own way of reading) and
     * batched.cuh. */
    CHECK(functions == 1 && calls == 3 + 3 + 1 + 3, "%d, %d", functions, calls);
    perk_compile_result without = compile(nvrtc, plain, headers, count);
    CHECK(as_is.cubin_size == without.cubin_size && memcmp(as_is.cubin, without.cubin, without.cubin_size) == 0);
    CHECK(stamping.cubin_size != as_is.cubin_size || memcmp(stamping.cubin, as_is.cubin, as_is.cubin_size) != 0);
    perk_compile_result_free(&as_is);
    perk_compile_result_free(&stamping);
    perk_compile_result_free(&without);
    perk_emit_headers_free(headers, count);
}

static void test_no_trace(void) {
    perk_model *model;
    perk_nvrtc *nvrtc;
    CHECK_OK(perk_model_describe(&model, TINY, &err));
    perk_plan *plan = make_plan(model, false), *profiled_plan = make_plan(model, true);
    perk_buffer plain = emit(plan), profiled = emit(profiled_plan);
    check_sources(&plain, &profiled);
    if (perk_nvrtc_open(&nvrtc, NULL, &err) == PERK_OK) {
        check_cubins(nvrtc, &plain, &profiled);
        perk_nvrtc_free(nvrtc);
    } else {
        fprintf(stderr, "skipped the comparison of cubins: %s\n", err.message);
    }
    perk_buffer_free(&plain);
    perk_buffer_free(&profiled);
    perk_plan_free(plan);
    perk_plan_free(profiled_plan);
    perk_model_free(model);
}

int main(void) {
    temp = temp_make();
    test_plan_html();
    test_command();
    test_failures();
    test_no_trace();
    temp_remove(&temp);
    return 0;
}
