/* Sixteen bytes that choose a device and a configuration, then a config.json: through the graph, the plan, its proof
 * and the emitted source. Whatever the config says, a plan that is made must be a safe one. */
#include "fuzz_json.h"

#include "jit/emit.h"
#include "src/device.h"
#include "src/model.h"

#include <ctype.h>

enum {
    CHOICES = 16,
    MOST_LAYERS = 3, /* the checker's time grows with tasks; more layers bring nothing new */
    MOST_WIDTH = 1 << 14,
    MOST_WORKERS = 12,
};

static fuzz_file file;

static perk_device_desc choose_device(const uint8_t *choices) {
    static const char *const archs[] = {"sm_80", "sm_86", "sm_90a", "sm_100a", "sm_120a"};
    perk_error err = {0};
    perk_device_desc device;
    FUZZ_CHECK(perk_device_describe_arch(archs[choices[0] % PERK_COUNT(archs)], &device, &err) == PERK_OK);
    device.worker_count = 1 + choices[1] % MOST_WORKERS;
    if (choices[2]) device.shared_memory = choices[2] * 1024;
    if (choices[3] & 1) perk_device_make_portable(&device);
    return device;
}

static perk_config choose_config(const uint8_t *choices) {
    return (perk_config){
        .max_num_batched_tokens = choices[4] % 65,
        .max_num_batched_requests = choices[5] % 17,
        .max_num_logit_rows = choices[6] % 65,
        .page_size = choices[7] & 0x80 ? choices[7] & 0x7f : 16 << (choices[7] % 4) * (choices[7] != 0),
        .max_seq_length = choices[8] | choices[9] << 8,
        .max_num_pages = choices[10] | choices[11] << 8,
    };
}

/* Valid numbers of layers above MOST_LAYERS cost time only; out of range, they are wanted. */
static bool has_many_layers(const uint8_t *data, size_t size) {
    json_t *config = json_loadb((const char *)data, size, 0, NULL);
    double layers = json_number_value(json_object_get(config, "num_hidden_layers"));
    json_decref(config);
    return layers > MOST_LAYERS && layers <= 1024;
}

static bool small_enough(const perk_graph *graph) {
    for (int i = 0; i < graph->tensor_count; i++)
        if (graph->tensors[i]->cols > MOST_WIDTH || graph->tensors[i]->rows > MOST_WIDTH) return false;
    return true;
}

static void check_emission(const perk_plan *plan) {
    perk_error err = {0};
    perk_buffer source = {0};
    perk_task_record *records = NULL;
    int per_worker = 0;
    perk_status status = perk_emit_source(plan, &source, &err);
    FUZZ_CHECK(status == PERK_OK && source.size, "%s", err.message);
    status = perk_emit_records(plan, &records, &per_worker, &err);
    fuzz_check_result(status, &err, records != NULL);
    perk_buffer_free(&source);
    free(records);
}

static void check_plan(const perk_model *model, const uint8_t *choices) {
    perk_error err = {0};
    perk_device_desc device = choose_device(choices);
    perk_config config = choose_config(choices);
    if (perk_config_resolve(&config, model->max_positions, &err) != PERK_OK) return;
    perk_plan *plan = NULL;
    perk_status status = perk_plan_create(&plan, model->graph, &device, &config, &err);
    fuzz_check_result(status, &err, plan != NULL);
    if (!plan) return;
    status = perk_plan_check(plan, &err);
    FUZZ_CHECK(status == PERK_OK, "%s", err.message);
    check_emission(plan);
    perk_plan_free(plan);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (size < CHOICES || has_many_layers(data + CHOICES, size - CHOICES)) return 0;
    perk_error err = {0};
    perk_model *model = NULL;
    perk_status status = perk_model_describe(&model, fuzz_file_fill(&file, data + CHOICES, size - CHOICES), &err);
    fuzz_check_result(status, &err, model != NULL);
    if (model && small_enough(model->graph)) check_plan(model, data);
    perk_model_free(model);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    return fuzz_mutate_json(data, size, max_size, seed, CHOICES);
}
