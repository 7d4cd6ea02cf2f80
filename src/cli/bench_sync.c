/* perk bench sync: what it takes until every worker knows that every worker is done: the price of a stage before it
 * does any work. */
#include "bench.h"

#include "src/random_weights.h"

enum { DEFAULT_LAUNCHES = 64, WIDTH = 64 };

/* An executor of the smallest graph there is: the device, ready to run something. */
typedef struct sync_bench {
    perk_graph *graph;
    perk_checkpoint *weights;
    perk_executor *gpu;
    perk_start_report report;
    double *microseconds; /* a launch */
} sync_bench;

static perk_status open_device(sync_bench *b, const perk_bench_options *o, perk_error *err) {
    const perk_gpu_options gpu = {.portable = o->portable != 0,
                                  .cache_folder = o->cache_folder,
                                  .no_cache = o->no_cache != 0,
                                  .threads = 1,
                                  .log = perk_cli_log(o->verbose)};
    perk_config config = {.max_num_batched_tokens = 1, .max_seq_length = 1};
    perk_status status = perk_graph_create(&b->graph, "sync", err);
    if (status != PERK_OK) return status;
    perk_linear(b->graph, "y", perk_input(b->graph, "x", WIDTH), perk_attach_matrix(b->graph, "w", WIDTH, WIDTH), NULL);
    status = perk_graph_check(b->graph, err);
    if (status == PERK_OK) status = perk_checkpoint_open_given(&b->weights, b->graph, o->seed, NULL, 0, err);
    if (status == PERK_OK) status = perk_config_resolve(&config, 0, err);
    if (status == PERK_OK) status = perk_gpu_create(&b->gpu, b->graph, b->weights, &config, &gpu, &b->report, err);
    return status;
}

static void close_device(sync_bench *b) {
    if (b->gpu) b->gpu->type->free(b->gpu);
    perk_checkpoint_free(b->weights);
    perk_graph_free(b->graph);
    free(b->microseconds);
}

static int print_result(const perk_bench_command *c, sync_bench *b, int32_t launches) {
    perk_bench_spread sync = perk_bench_spread_of(b->microseconds, launches);
    int workers = perk_gpu_plan(b->gpu)->device.worker_count;
    if (!c->json) {
        printf("%s  %d workers%s\n", b->report.device, workers, c->bench.portable ? "  portable" : "");
        printf(
            "  a sync  %.3f us (10th, 90th percentile %.3f, %.3f): %d launches of %d syncs; all counters ended where "
            "they must\n",
            sync.median, sync.p10, sync.p90, launches, (int)PERK_GPU_SYNCS);
        return PERK_EXIT_OK;
    }
    json_t *json = perk_bench_result("sync", NULL, b->report.device);
    perk_bench_put_spread(json, "sync_us", sync);
    json_object_set_new(json, "workers", json_integer(workers));
    json_object_set_new(json, "launches", json_integer(launches));
    json_object_set_new(json, "syncs_a_launch", json_integer(PERK_GPU_SYNCS));
    json_object_set_new(json, "portable", json_boolean(c->bench.portable));
    json_object_set_new(json, "counters_ok", json_true()); /* else there would be no result */
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

int perk_bench_measure_sync(const perk_bench_command *c) {
    int32_t launches = c->runs ? c->runs : DEFAULT_LAUNCHES;
    perk_error err = {0};
    sync_bench b = {.microseconds = perk_calloc((size_t)launches, sizeof(double))};
    perk_status status = b.microseconds ? PERK_OK : perk_fail_memory(&err, "times");
    if (status == PERK_OK) status = open_device(&b, &c->bench, &err);
    if (status == PERK_OK) status = perk_gpu_sync_times(b.gpu, launches, b.microseconds, &err);
    int code = status == PERK_OK ? print_result(c, &b, launches) : perk_cli_fail(&err);
    close_device(&b);
    return code;
}
