/* The printers: totals that agree with the plan, JSON that parses and is complete, layers folded only when they agree.
 */
#include "src/device.h"
#include "src/model.h"
#include "src/plan_print.h"
#include "test.h"

#include <jansson.h>

static perk_error err;

static perk_plan *make_plan(const perk_graph *graph, int workers, int tokens) {
    perk_device_desc device;
    perk_config config = {.max_num_batched_tokens = tokens, .max_num_batched_requests = 2, .max_seq_length = 128};
    perk_plan *plan;
    CHECK_OK(perk_device_describe_arch("sm_90a", &device, &err));
    device.worker_count = workers;
    CHECK_OK(perk_config_resolve(&config, 0, &err));
    CHECK_OK(perk_plan_create(&plan, graph, &device, &config, &err));
    return plan;
}

static uint64_t packed_bytes(const perk_plan *plan) {
    uint64_t bytes = 0;
    for (int i = 0; i < plan->tensor_count; i++)
        if (plan->tensors[i].space == PERK_SPACE_WEIGHTS) bytes += plan->tensors[i].bytes;
    return bytes;
}

static perk_buffer print(const perk_plan *plan, perk_plan_format format) {
    perk_buffer text = {0};
    CHECK_OK(perk_plan_print(plan, format, &text, &err));
    CHECK(text.size > 0 && text.data[text.size - 1] == '\n');
    return text;
}

static json_t *print_json(const perk_plan *plan, perk_plan_format format) {
    perk_buffer text = print(plan, format);
    json_error_t json_err;
    json_t *json = json_loadb(text.data, text.size, JSON_REJECT_DUPLICATES, &json_err);
    CHECK(json, "%s", json_err.text);
    perk_buffer_free(&text);
    return json;
}

static json_int_t number(const json_t *json, const char *object, const char *name) {
    if (object) json = json_object_get(json, object);
    CHECK(json_is_integer(json_object_get(json, name)), "%s", name);
    return json_integer_value(json_object_get(json, name));
}

static void expect_text(const perk_buffer *text, const char *part) {
    CHECK(strstr(text->data, part), "'%s' is not in\n%s", part, text->data);
}

static int count_of(const perk_buffer *text, const char *part) {
    int count = 0;
    for (const char *at = text->data; (at = strstr(at, part)); at++) count++;
    return count;
}

/* ---- the tiny model ---- */

static void check_stages(const perk_plan *plan, const json_t *stages) {
    json_int_t tasks = 0, streamed = 0;
    CHECK((int)json_array_size(stages) == plan->stage_count);
    for (int i = 0; i < plan->stage_count; i++) {
        const json_t *stage = json_array_get(stages, (size_t)i);
        CHECK(strcmp(json_string_value(json_object_get(stage, "name")), plan->stages[i].name) == 0);
        CHECK(json_array_size(json_object_get(stage, "waits")) > 0 || i == 0, "%s", plan->stages[i].name);
        CHECK(number(stage, NULL, "kind") < plan->kind_count);
        tasks += number(stage, NULL, "tasks");
        streamed += number(stage, NULL, "stream_bytes");
    }
    CHECK(tasks == plan->task_count && streamed == (json_int_t)packed_bytes(plan));
}

static void check_workers(const perk_plan *plan, const json_t *workers) {
    const json_t *tasks = json_object_get(workers, "tasks"), *bytes = json_object_get(workers, "stream_bytes");
    json_int_t mean = (json_int_t)packed_bytes(plan) / plan->device.worker_count;
    CHECK(number(tasks, NULL, "min") <= number(tasks, NULL, "median"));
    CHECK(number(tasks, NULL, "median") <= number(tasks, NULL, "max"));
    CHECK(number(bytes, NULL, "min") <= mean && mean <= number(bytes, NULL, "max"));
    double expected =
        ((double)number(bytes, NULL, "max") / ((double)packed_bytes(plan) / plan->device.worker_count) - 1);
    double printed = json_real_value(json_object_get(bytes, "imbalance_percent"));
    CHECK(printed > expected * 100 - 1e-6 && printed < expected * 100 + 1e-6, "%f", printed);
}

/* Each stage of the path waits for the one before it, and the path ends where nothing is longer. */
static void check_path(const json_t *json) {
    const json_t *path = json_object_get(json, "critical_path"), *stages = json_object_get(json, "stages"), *stage;
    size_t at = 0, index;
    CHECK(json_array_size(path) > 6 * 5);
    json_array_foreach((json_t *)(uintptr_t)stages, index, stage) {
        const char *name = json_string_value(json_array_get(path, at)), *before;
        bool waits = at == 0;
        const json_t *wait;
        size_t w;
        if (!name || strcmp(name, json_string_value(json_object_get(stage, "name"))) != 0) continue;
        before = at ? json_string_value(json_array_get(path, at - 1)) : "";
        json_array_foreach(json_object_get(stage, "waits"), w, wait) waits =
            waits || !strcmp(json_string_value(json_object_get(wait, "stage")), before);
        CHECK(waits, "%s does not wait for %s", name, before);
        at++;
    }
    CHECK(at == json_array_size(path));
    CHECK(strcmp(json_string_value(json_array_get(path, at - 1)), "next_token") == 0);
}

static void test_json(const perk_plan *plan) {
    json_t *json = print_json(plan, PERK_PLAN_JSON);
    CHECK(number(json, NULL, "stream_bytes") == (json_int_t)packed_bytes(plan));
    CHECK(number(json, NULL, "task_count") == plan->task_count);
    CHECK(number(json, "device", "workers") == plan->device.worker_count);
    CHECK(number(json, "config", "max_num_batched_tokens") == 4);
    const json_t *shared = json_object_get(json, "shared_memory");
    CHECK(number(shared, NULL, "ring_slots") * number(shared, NULL, "slot_bytes") +
              number(shared, NULL, "slices_bytes") + number(shared, NULL, "staging_bytes") +
              number(shared, NULL, "reduction_bytes") + number(shared, NULL, "batch_bytes") +
              number(shared, NULL, "barrier_bytes") ==
          plan->shared_bytes);
    CHECK(number(json, "spaces", "weights") >= (json_int_t)packed_bytes(plan));
    CHECK(number(json, "spaces", "kv") == (json_int_t)plan->kv_layer_bytes * 6);
    const json_t *graph = json_object_get(json, "graph");
    CHECK((int)json_array_size(json_object_get(graph, "ops")) == plan->graph->op_count);
    CHECK((int)json_array_size(json_object_get(json, "tensors")) == plan->tensor_count);
    CHECK((int)json_array_size(json_object_get(json, "kinds")) == plan->kind_count);
    CHECK(!json_object_get(json, "tasks"));
    check_stages(plan, json_object_get(json, "stages"));
    check_workers(plan, json_object_get(json, "workers"));
    check_path(json);
    json_decref(json);

    json = print_json(plan, PERK_PLAN_JSON_AND_TASKS);
    json_int_t streamed = 0;
    size_t index;
    json_t *task;
    CHECK((int)json_array_size(json_object_get(json, "tasks")) == plan->task_count);
    json_array_foreach(json_object_get(json, "tasks"), index, task) streamed += number(task, NULL, "stream_bytes");
    CHECK(streamed == (json_int_t)packed_bytes(plan));
    json_decref(json);
}

static void test_text(const perk_plan *plan) {
    perk_buffer text = print(plan, PERK_PLAN_TEXT);
    char total[64];
    snprintf(total, sizeof total, "%llu bytes streamed a step", (unsigned long long)packed_bytes(plan));
    expect_text(&text, total);
    expect_text(&text, "layers.0 ... layers.5: the same ops x 6");
    expect_text(&text, "layers.0 ... layers.5: the same stages x 6");
    expect_text(&text, "6 x layers (");
    expect_text(&text, "Qwen3ForCausalLM for sm_90a: 8 workers");
    for (int i = 0; i < plan->kind_count; i++) expect_text(&text, plan->kinds[i]);
    int lines = count_of(&text, "\n");
    CHECK(lines < 80, "%d lines", lines);
    CHECK(count_of(&text, ".gate_up ") == 3, "once among the ops, the stages and the path");
    perk_buffer_free(&text);
}

static void test_tiny(void) {
    perk_model *model;
    CHECK_OK(perk_model_describe(&model, PERK_SOURCE_DIR "/examples/tiny", &err));
    perk_plan *plan = make_plan(model->graph, 8, 4);
    test_text(plan);
    test_json(plan);
    perk_plan_free(plan);
    perk_model_free(model);
}

/* ---- graphs made here ---- */

/* Layers 0 and 1 agree, layer 2 is wider inside, layer 4 is no neighbour of it. */
static void test_folding(void) {
    static const struct { int layer, inner; } layers[] = {{0, 64}, {1, 64}, {2, 128}, {4, 128}};
    perk_graph *graph;
    CHECK_OK(perk_graph_create(&graph, "uneven", &err));
    perk_tensor *x = perk_embed(graph, "start", perk_attach_matrix(graph, "table", 32, 64));
    for (size_t i = 0; i < PERK_COUNT(layers); i++) {
        char names[4][64];
        static const char *const parts[] = {"up_weight", "up", "down_weight", "down"};
        for (size_t j = 0; j < 4; j++) snprintf(names[j], sizeof names[j], "net.%d.%s", layers[i].layer, parts[j]);
        perk_tensor *up =
            perk_linear(graph, names[1], x, perk_attach_matrix(graph, names[0], layers[i].inner, 64), NULL);
        x = perk_linear(graph, names[3], up, perk_attach_matrix(graph, names[2], 64, layers[i].inner), NULL);
    }
    CHECK_OK(perk_graph_check(graph, &err));
    perk_plan *plan = make_plan(graph, 3, 2);
    perk_buffer text = print(plan, PERK_PLAN_TEXT);
    expect_text(&text, "net.0 ... net.1: the same ops x 2");
    expect_text(&text, "\n  net.2:\n");
    expect_text(&text, "\n  net.4:\n");
    expect_text(&text, "<- net.2.down, .up_weight [128, 64]");
    CHECK(!strstr(text.data, "net.2 ..."));
    perk_buffer_free(&text);
    perk_plan_free(plan);
    perk_graph_free(graph);
}

/* No layers, no weights to stream, fewer units than workers, a name with all that JSON must escape. */
static void test_odd(void) {
    perk_graph *graph;
    CHECK_OK(perk_graph_create(&graph, "odd \"name\"\n", &err));
    perk_embed(graph, "a.7.b\\.8.",
               perk_attach_matrix(graph,
                                  "t\xc3\xa4"
                                  "ble",
                                  32, 64));
    CHECK_OK(perk_graph_check(graph, &err));
    perk_plan *plan = make_plan(graph, 200, 2);
    perk_buffer text = print(plan, PERK_PLAN_TEXT);
    expect_text(&text, "0 bytes streamed a step");
    perk_buffer_free(&text);
    json_t *json = print_json(plan, PERK_PLAN_JSON_AND_TASKS);
    CHECK(number(json, NULL, "stream_bytes") == 0);
    json_decref(json);
    perk_plan_free(plan);
    perk_graph_free(graph);

    CHECK_OK(perk_graph_create(&graph, "broken \xff name", &err));
    perk_embed(graph, "x", perk_attach_matrix(graph, "table", 32, 64));
    plan = make_plan(graph, 2, 2);
    text = (perk_buffer){0};
    CHECK_FAILS(perk_plan_print(plan, PERK_PLAN_JSON, &text, &err), PERK_OUT_OF_MEMORY, "not valid UTF-8");
    perk_buffer_free(&text);
    perk_plan_free(plan);
    perk_graph_free(graph);
}

int main(void) {
    test_tiny();
    test_folding();
    test_odd();
    return 0;
}
