/* What draws plans: expected times that a machine could have, a page that holds the whole plan and nothing from
 * outside, a trace whose events fit on their threads. */
#include "src/device.h"
#include "src/model.h"
#include "src/plan_page.h"
#include "src/plan_trace.h"
#include "test.h"

#include <jansson.h>

#define TINY PERK_SOURCE_DIR "/examples/tiny"
#define CONFIGS PERK_SOURCE_DIR "/bench/configs/"

static perk_error err;

static perk_plan *make_plan(const perk_graph *graph, int workers, int tokens) {
    perk_device_desc device;
    perk_config config = {
        .max_num_batched_tokens = tokens, .max_num_batched_requests = tokens, .max_seq_length = 552, .page_size = 64};
    perk_plan *plan;
    CHECK_OK(perk_device_describe_arch("sm_90a", &device, &err));
    if (workers) device.worker_count = workers;
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    CHECK_OK(perk_plan_create(&plan, graph, &device, &config, &err));
    return plan;
}

static perk_plan *plan_of(perk_model **model, const char *path, int workers, int tokens) {
    CHECK_OK(perk_model_describe(model, path, &err));
    return make_plan((*model)->graph, workers, tokens);
}

static perk_task_time *expect(const perk_plan *plan, const perk_plan_load *load) {
    perk_task_time *times = perk_calloc((size_t)plan->task_count, sizeof *times);
    CHECK(times);
    CHECK_OK(perk_plan_expect(plan, load, times, &err));
    return times;
}

/* ---- expected times ---- */

/* No task begins before what it waits for has signalled, and a worker does one thing at a time. */
static void check_order(const perk_plan *plan, const perk_task_time *times) {
    for (int i = 0; i < plan->task_count; i++) {
        const uint64_t *ns = times[i].ns;
        const perk_task *task = &plan->tasks[i];
        CHECK(ns[PERK_STAMP_REACHED] <= ns[PERK_STAMP_READY] && ns[PERK_STAMP_READY] < ns[PERK_STAMP_DONE], "%d", i);
        if (i > plan->worker_begin[task->worker])
            CHECK(ns[PERK_STAMP_REACHED] >= times[i - 1].ns[PERK_STAMP_DONE], "%d", i);
    }
    for (int i = 0; i < plan->task_count; i += 7)
        for (int w = plan->tasks[i].wait_begin; w < plan->tasks[i].wait_end; w++) {
            int signalled = 0;
            for (int t = 0; t < plan->task_count; t++)
                for (int s = plan->tasks[t].signal_begin; s < plan->tasks[t].signal_end; s++)
                    if (plan->signals[s].counter == plan->waits[w].counter &&
                        times[t].ns[PERK_STAMP_DONE] < times[i].ns[PERK_STAMP_READY])
                        signalled += plan->signals[s].amount;
            CHECK(signalled >= plan->waits[w].needed, "task %d, counter %d", i, plan->waits[w].counter);
        }
}

static void test_expected(void) {
    perk_model *model;
    perk_plan *plan = plan_of(&model, TINY, 8, 4);
    perk_task_time *times = expect(plan, &(perk_plan_load){.context = 64});
    perk_task_time *slow = expect(plan, &(perk_plan_load){.context = 64, .bandwidth = 1e10});
    perk_stage_time stages[64];
    double sum = 0;
    check_order(plan, times);
    CHECK(plan->stage_count <= (int)PERK_COUNT(stages));
    CHECK_OK(perk_plan_stage_times(plan, times, stages, &err));
    for (int s = 0; s < plan->stage_count; s++) {
        CHECK(stages[s].chain >= 0 && stages[s].run > 0 && stages[s].worst >= stages[s].run - 1e-9);
        sum += stages[s].chain;
    }
    double step = (double)perk_plan_step_ns(plan, times) * 1e-3;
    CHECK(sum > step - 1e-3 && sum < step + 1e-3, "chains %f, step %f", sum, step);
    uint64_t bytes = 0;
    for (int i = 0; i < plan->task_count; i++) bytes += plan->tasks[i].stream_bytes;
    CHECK((double)perk_plan_step_ns(plan, slow) > (double)bytes / 1e10 * 1e9 && slow[0].ns[0] == times[0].ns[0]);
    CHECK(perk_plan_step_ns(plan, slow) > perk_plan_step_ns(plan, times));

    plan->waits[plan->tasks[plan->task_count - 1].wait_begin].needed += 1000000;
    CHECK_FAILS(perk_plan_expect(plan, &(perk_plan_load){.context = 64}, times, &err), PERK_UNSAFE_PLAN,
                "wait for what never comes");
    free(times);
    free(slow);
    perk_plan_free(plan);
    perk_model_free(model);
}

/* bench/results/decode-*.json: what one H100 took, on the device. */
static void test_against_measured(void) {
    static const struct {
        const char *config;
        int batch;
        double ms;
    } steps[] = {{CONFIGS "qwen3-0.6b", 1, 0.767}, {CONFIGS "qwen3-8b", 1, 5.103}, {CONFIGS "qwen3-8b", 8, 5.938}};
    for (size_t i = 0; i < PERK_COUNT(steps); i++) {
        perk_model *model;
        perk_plan *plan = plan_of(&model, steps[i].config, 0, steps[i].batch);
        perk_task_time *times = expect(plan, &(perk_plan_load){.context = 512});
        double ms = (double)perk_plan_step_ns(plan, times) * 1e-6, off = ms / steps[i].ms - 1;
        fprintf(stderr, "%s, batch %d: expected %.3f ms, measured %.3f: %+.1f %%\n", steps[i].config, steps[i].batch,
                ms, steps[i].ms, off * 100);
        CHECK(off > -0.1 && off < 0.1);
        free(times);
        perk_plan_free(plan);
        perk_model_free(model);
    }
}

/* ---- the page ---- */

static int count_of(const char *text, const char *part) {
    int count = 0;
    for (; (text = strstr(text, part)); text++) count++;
    return count;
}

static perk_buffer make_page(const perk_plan *plan, const char *title, const perk_page_step *steps, int count) {
    perk_buffer page = {0};
    CHECK_OK(perk_plan_page(plan, title, steps, count, &page, &err));
    CHECK(strlen(page.data) == page.size);
    CHECK(strncmp(page.data, "<!doctype html>", 15) == 0 && strstr(page.data, "</html>"));
    CHECK(count_of(page.data, "<script") == 2 && count_of(page.data, "</script") == 2);
    CHECK(!strstr(page.data, "{{plan"), "a mark was not replaced");
    static const char *const outside[] = {
        "http:", "https:", " src=", " href=", "@import", "url(h", "fetch(", "import("};
    for (size_t i = 0; i < PERK_COUNT(outside); i++) CHECK(!strstr(page.data, outside[i]), "%s", outside[i]);
    return page;
}

static json_t *data_of(const perk_buffer *page) {
    static const char begin[] = "<script type=\"application/json\" id=\"data\">";
    const char *data = strstr(page->data, begin);
    CHECK(data);
    data += sizeof begin - 1;
    json_error_t json_err;
    json_t *json = json_loadb(data, (size_t)(strstr(data, "</script>") - data), JSON_REJECT_DUPLICATES, &json_err);
    CHECK(json, "%s", json_err.text);
    return json;
}

static const json_t *column(const json_t *tasks, const char *name) {
    const json_t *found = json_object_get(tasks, name);
    CHECK(json_is_array(found), "%s", name);
    return found;
}

static json_int_t at(const json_t *list, int index) {
    const json_t *value = json_array_get(list, (size_t)index);
    CHECK(json_is_integer(value), "%d of %zu", index, json_array_size(list));
    return json_integer_value(value);
}

/* The list that a task's column refers to. */
static const json_t *list_of(const json_t *tasks, const char *name, const char *lists, int task) {
    return json_array_get(column(tasks, lists), (size_t)at(column(tasks, name), task));
}

static void check_regions(const perk_plan *plan, const json_t *tensors, const json_t *regions, int begin, int end) {
    CHECK((int)json_array_size(tensors) == end - begin && (int)json_array_size(regions) == 6 * (end - begin));
    for (int i = 0; i < end - begin; i++) {
        const perk_region *r = &plan->regions[begin + i];
        const json_int_t values[] = {r->row_begin, r->row_end, r->col_begin, r->col_count, r->col_stride, r->repeat};
        CHECK(at(tensors, i) == r->tensor);
        for (int k = 0; k < 6; k++) CHECK(at(regions, 6 * i + k) == values[k]);
    }
}

static void check_tasks(const perk_plan *plan, const json_t *tasks) {
    const json_t *begin = column(tasks, "workerBegin");
    CHECK((int)json_array_size(begin) == plan->device.worker_count + 1);
    CHECK(at(begin, plan->device.worker_count) == plan->task_count);
    for (int i = 0; i < plan->task_count; i++) {
        const perk_task *task = &plan->tasks[i];
        CHECK(at(column(tasks, "stage"), i) == task->stage && at(column(tasks, "first"), i) == task->first);
        CHECK(at(column(tasks, "stride"), i) == task->stride && at(column(tasks, "count"), i) == task->count);
        CHECK(at(column(tasks, "bytes"), i) == (json_int_t)task->stream_bytes);
        const json_t *waits = list_of(tasks, "waits", "pairs", i), *signals = list_of(tasks, "signals", "pairs", i);
        CHECK((int)json_array_size(waits) == 2 * (task->wait_end - task->wait_begin));
        for (int w = 0; w < task->wait_end - task->wait_begin; w++) {
            CHECK(at(waits, 2 * w) == plan->waits[task->wait_begin + w].counter);
            CHECK(at(waits, 2 * w + 1) == plan->waits[task->wait_begin + w].needed);
        }
        CHECK(at(signals, 0) == plan->signals[task->signal_begin].counter);
        check_regions(plan, list_of(tasks, "readTensors", "tensors", i), list_of(tasks, "reads", "regions", i),
                      task->read_begin, task->read_end);
        check_regions(plan, list_of(tasks, "writeTensors", "tensors", i), list_of(tasks, "writes", "regions", i),
                      task->write_begin, task->write_end);
    }
}

/* The differences add up to the times, in whole nanoseconds since the step's first moment. */
static void check_stamps(const perk_plan *plan, const json_t *ns, const perk_task_time *times) {
    static const int drawn[] = {PERK_STAMP_REACHED, PERK_STAMP_READY, PERK_STAMP_DONE};
    uint64_t first = perk_plan_first_ns(plan, times);
    CHECK((int)json_array_size(ns) == 3 * plan->task_count);
    for (int w = 0; w < plan->device.worker_count; w++) {
        json_int_t now = 0;
        for (int i = plan->worker_begin[w]; i < plan->worker_begin[w + 1]; i++)
            for (int k = 0; k < 3; k++)
                CHECK((now += at(ns, 3 * i + k)) == (json_int_t)(times[i].ns[drawn[k]] - first), "task %d", i);
    }
}

static void test_page(void) {
    perk_model *model;
    perk_plan *plan = plan_of(&model, TINY, 8, 4);
    const perk_plan_load load = {.context = 64, .requests = 2, .tokens = 1};
    perk_task_time *expected = expect(plan, &load), *measured = expect(plan, &load);
    for (int i = 0; i < plan->task_count; i++)
        for (int k = 0; k < PERK_STAMPS; k++) measured[i].ns[k] += 1700000000000000123u + (uint64_t)(i % 3);
    const perk_page_step steps[] = {{.name = "decode", .load = load, .measured = measured},
                                    {.name = "prompt", .load = {.context = 0, .requests = 1, .tokens = 4}}};
    perk_buffer page = make_page(plan, "examples/tiny", steps, 2);
    json_t *data = data_of(&page);
    CHECK(strcmp(json_string_value(json_object_get(data, "title")), "examples/tiny") == 0);
    check_tasks(plan, json_object_get(data, "tasks"));
    const json_t *list = json_object_get(data, "steps"), *decode = json_array_get(list, 0);
    CHECK(json_array_size(list) == 2 && !json_object_get(json_array_get(list, 1), "measured"));
    CHECK(json_real_value(json_object_get(decode, "bandwidth")) > 3e12);
    CHECK(json_integer_value(json_object_get(decode, "context")) == 64);
    check_stamps(plan, json_object_get(decode, "expected"), expected);
    check_stamps(plan, json_object_get(decode, "measured"), measured);
    CHECK((int)json_array_size(json_object_get(json_object_get(data, "plan"), "stages")) == plan->stage_count);
    json_decref(data);
    perk_buffer_free(&page);
    free(expected);
    free(measured);
    perk_plan_free(plan);
    perk_model_free(model);
}

static void test_hostile_names(void) {
    static const char name[] = "</script><script>alert(\"1\")</script><!-- \\ & 'x' {{data}} \xe2\x80\xa8";
    const perk_page_step step = {.name = name};
    perk_graph *graph;
    CHECK_OK(perk_graph_create(&graph, name, &err));
    perk_tensor *x = perk_embed(graph, "</script>.0.<b>", perk_attach_matrix(graph, "<img src=x onerror=y>", 32, 64));
    perk_linear(graph, "<!--<script>", x, perk_attach_matrix(graph, "w\"}]", 64, 64), NULL);
    CHECK_OK(perk_graph_check(graph, &err));
    perk_plan *plan = make_plan(graph, 3, 2);
    perk_buffer page = {0};
    CHECK_OK(perk_plan_page(plan, name, &step, 1, &page, &err));
    CHECK(count_of(page.data, "<script") == 2 && count_of(page.data, "</script") == 2);
    CHECK(!strstr(page.data, "<!--") && !strstr(page.data, "<img") && !strstr(page.data, "<b>"));
    json_t *data = data_of(&page);
    const json_t *drawn = json_object_get(json_object_get(data, "plan"), "graph");
    CHECK(strcmp(json_string_value(json_object_get(data, "title")), name) == 0);
    CHECK(strcmp(json_string_value(json_object_get(drawn, "name")), name) == 0);
    json_decref(data);
    perk_buffer_free(&page);

    perk_buffer none = {0};
    CHECK_FAILS(perk_plan_page(plan, "broken \xff", &step, 1, &none, &err), PERK_OUT_OF_MEMORY, "not valid UTF-8");
    perk_buffer_free(&none);
    perk_plan_free(plan);
    perk_graph_free(graph);
}

static void test_page_size(void) {
    perk_model *model;
    const perk_page_step step = {.name = "decode", .load = {.context = 512}};
    perk_plan *plan = plan_of(&model, CONFIGS "qwen3-8b", 0, 1);
    perk_buffer page = make_page(plan, "qwen3-8b", &step, 1);
    fprintf(stderr, "a page of %d tasks: %.2f MB\n", plan->task_count, (double)page.size * 1e-6);
    CHECK(page.size < 3000000);
    perk_buffer_free(&page);
    perk_plan_free(plan);
    perk_model_free(model);
}

/* ---- the trace ---- */

enum { MAX_THREADS = 16 };

typedef struct thread_state {
    double end; /* of the event before, microseconds */
    int tasks, waits, names;
} thread_state;

static void read_event(const json_t *event, thread_state threads[MAX_THREADS]) {
    const char *phase = json_string_value(json_object_get(event, "ph")), *category;
    json_int_t thread = json_integer_value(json_object_get(event, "tid"));
    CHECK(phase && thread >= 0 && thread < MAX_THREADS);
    thread_state *state = &threads[thread];
    if (strcmp(phase, "M") == 0) {
        state->names += strcmp(json_string_value(json_object_get(event, "name")), "thread_name") == 0;
        return;
    }
    CHECK(strcmp(phase, "X") == 0, "%s", phase);
    double begin = json_number_value(json_object_get(event, "ts"));
    double length = json_number_value(json_object_get(event, "dur"));
    CHECK(begin >= state->end - 1e-6 && length > 0, "thread %d: %f after %f", (int)thread, begin, state->end);
    state->end = begin + length;
    category = json_string_value(json_object_get(event, "cat"));
    state->tasks += strcmp(category, "task") == 0;
    state->waits += strcmp(category, "wait") == 0;
}

static void test_trace(void) {
    perk_model *model;
    perk_plan *plan = plan_of(&model, TINY, 8, 4);
    perk_task_time *times = expect(plan, &(perk_plan_load){.context = 64});
    for (int i = 0; i < plan->task_count; i++)
        for (int k = 0; k < PERK_STAMPS; k++) times[i].ns[k] += 1700000000000000123u;
    const perk_trace_step steps[] = {{"de\"code</script>", times}, {"prompt", times}};
    perk_buffer text = {0};
    thread_state threads[MAX_THREADS] = {0};
    json_error_t json_err;
    CHECK_OK(perk_plan_trace(plan, steps, 2, &text, &err));
    json_t *json = json_loadb(text.data, text.size, JSON_REJECT_DUPLICATES, &json_err), *event;
    CHECK(json, "%s", json_err.text);
    size_t index;
    int tasks = 0, waits = 0;
    json_array_foreach(json_object_get(json, "traceEvents"), index, event) read_event(event, threads);
    for (int t = 0; t <= 8; t++) {
        CHECK(threads[t].names == 1 && (t == 0 || threads[t].tasks > 0));
        tasks += threads[t].tasks;
        waits += threads[t].waits;
    }
    CHECK(tasks == 2 * plan->task_count && waits > plan->task_count / 2);
    double step = (double)perk_plan_step_ns(plan, times) * 1e-3;
    CHECK(threads[0].end > 2 * step && threads[0].end < 2 * step + 11, "%f, a step %f", threads[0].end, step);
    json_decref(json);
    perk_buffer_free(&text);

    perk_buffer none = {0};
    CHECK_FAILS(perk_plan_trace(plan, &(perk_trace_step){"\xff", times}, 1, &none, &err), PERK_OUT_OF_MEMORY,
                "not valid UTF-8");
    perk_buffer_free(&none);
    free(times);
    perk_plan_free(plan);
    perk_model_free(model);
}

int main(void) {
    test_expected();
    test_against_measured();
    test_page();
    test_hostile_names();
    test_page_size();
    test_trace();
    return 0;
}
