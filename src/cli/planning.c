#include "planning.h"

#include "src/device.h"

void perk_cli_add_planning(perk_cli_options *options, perk_cli_planning *planning) {
    perk_config *config = &planning->config;
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("model", &planning->path, "DIR", "a model folder, or a config.json alone"),
        PERK_CLI_OPTION_TEXT("arch", &planning->arch, "ARCH", "sm_80, sm_90a (the default), sm_120a, ..."),
        PERK_CLI_OPTION_INT("workers", &planning->workers, "N", "multiprocessors; 0: the usual device's", 0, 65536),
        PERK_CLI_OPTION_BYTES("shared-memory", &planning->shared_memory, "that a block may have"),
        PERK_CLI_OPTION_FLAG("portable", &planning->portable, "nothing newer than sm_80 instructions"),
        PERK_CLI_OPTION_INT("max-seq-length", &config->max_seq_length, "N", "prompt and answer together", 1, INT32_MAX),
        PERK_CLI_OPTION_INT("max-batched-tokens", &config->max_num_batched_tokens, "N", "tokens a step", 1, INT32_MAX),
        PERK_CLI_OPTION_INT("max-batched-requests", &config->max_num_batched_requests, "N", "requests a step", 1,
                            INT32_MAX),
        PERK_CLI_OPTION_INT("max-logit-rows", &config->max_num_logit_rows, "N", "rows of logits a step", 1, INT32_MAX),
        PERK_CLI_OPTION_INT("page-size", &config->page_size, "N", "positions in a KV page, a power of two", 1,
                            INT32_MAX),
        PERK_CLI_OPTION_INT("max-pages", &config->max_num_pages, "N", "KV pages in the pool", 1, INT32_MAX),
        PERK_CLI_OPTION_FLAG("json", &planning->json, "the result as one JSON object"),
    };
    perk_cli_add(options, items, (int)PERK_COUNT(items));
}

static perk_status describe_device(const perk_cli_planning *planning, perk_device_desc *device, perk_error *err) {
    perk_status status = perk_device_describe_arch(planning->arch ? planning->arch : "sm_90a", device, err);
    if (status) return status;
    if (planning->workers) device->worker_count = planning->workers;
    if (planning->shared_memory) device->shared_memory = (int)PERK_MIN(planning->shared_memory, (uint64_t)1 << 20);
    if (planning->portable) perk_device_make_portable(device);
    return PERK_OK;
}

perk_status perk_cli_make_plan(perk_cli_planning *planning, perk_error *err) {
    double start = perk_now();
    perk_device_desc device = {0};
    perk_status status = describe_device(planning, &device, err);
    if (!status) status = perk_model_describe(&planning->model, planning->path, err);
    if (!status) status = perk_config_resolve(&planning->config, planning->model->max_positions, err);
    if (status) return status;
    double graph_done = perk_now();
    planning->graph_ms = (graph_done - start) * 1e3;
    status = perk_plan_create(&planning->plan, planning->model->graph, &device, &planning->config, err);
    planning->plan_ms = (perk_now() - graph_done) * 1e3;
    return status;
}

void perk_cli_planning_free(perk_cli_planning *planning) {
    perk_plan_free(planning->plan);
    perk_model_free(planning->model);
    planning->plan = NULL;
    planning->model = NULL;
}
