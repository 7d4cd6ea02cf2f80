/* perk bench load: how fast a model folder's weights reach the device, next to what the disk and the bus give. */
#include "bench.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

enum { READ_BYTES = 16 << 20 };

typedef struct load_result {
    uint64_t bytes;
    double disk, bus, load; /* bytes a second */
    perk_start_report report;
} load_result;

/* Drops the file's clean pages, so that the disk is measured and not the page cache. */
static void drop_pages(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    fdatasync(fd);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
}

static perk_status read_file(const char *path, char *buffer, uint64_t *bytes, perk_error *err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return perk_fail(err, PERK_IO, "%s: cannot open: %s", path, strerror(errno));
    ssize_t got;
    while ((got = read(fd, buffer, READ_BYTES)) > 0) *bytes += (uint64_t)got;
    int error = errno;
    close(fd);
    return got < 0 ? perk_fail(err, PERK_IO, "%s: cannot read: %s", path, strerror(error)) : PERK_OK;
}

static void drop_all(const perk_checkpoint *checkpoint) {
    for (size_t i = 0; i < perk_checkpoint_file_count(checkpoint); i++)
        drop_pages(perk_checkpoint_file_path(checkpoint, i));
}

/* One thread, large reads, in the order of the files. */
static perk_status measure_disk(const perk_checkpoint *checkpoint, double *bytes_per_second, perk_error *err) {
    char *buffer = perk_calloc(1, READ_BYTES);
    if (!buffer) return perk_fail_memory(err, "a read buffer");
    uint64_t bytes = 0;
    perk_status status = PERK_OK;
    drop_all(checkpoint);
    double begin = perk_now();
    for (size_t i = 0; i < perk_checkpoint_file_count(checkpoint) && status == PERK_OK; i++)
        status = read_file(perk_checkpoint_file_path(checkpoint, i), buffer, &bytes, err);
    *bytes_per_second = (double)bytes / (perk_now() - begin);
    free(buffer);
    return status;
}

static perk_status measure(const perk_bench_command *c, load_result *result, perk_error *err) {
    perk_model *model = NULL;
    perk_executor *gpu = NULL;
    perk_config config = {.max_num_batched_tokens = 1, .max_seq_length = 256};
    const perk_gpu_options gpu_options = {.threads = c->bench.threads,
                                          .cache_folder = c->bench.cache_folder,
                                          .no_cache = c->bench.no_cache != 0,
                                          .log = perk_cli_log(c->bench.verbose)};
    perk_status status = perk_model_open(&model, c->bench.model, false, 0, err);
    if (status == PERK_OK) status = perk_config_resolve(&config, model->max_positions, err);
    if (status == PERK_OK) status = measure_disk(model->checkpoint, &result->disk, err);
    if (status == PERK_OK) {
        result->bytes = perk_checkpoint_bytes(model->checkpoint);
        if (!c->page_cache) drop_all(model->checkpoint);
        status = perk_gpu_create(&gpu, model->graph, model->checkpoint, &config, &gpu_options, &result->report, err);
    }
    if (status == PERK_OK) {
        result->load = (double)result->bytes / (result->report.weights_ms * 1e-3);
        status = perk_gpu_bus_speed(gpu, &result->bus, err);
    }
    if (gpu) gpu->type->free(gpu);
    perk_model_free(model);
    return status;
}

int perk_bench_measure_load(const perk_bench_command *c) {
    perk_error err = {0};
    load_result result = {0};
    if (measure(c, &result, &err) != PERK_OK) return perk_cli_fail(&err);
    double slower = PERK_MIN(result.disk, result.bus);
    if (!c->json) {
        printf("%s  %.3f GB  %s  %s\n", c->bench.model, (double)result.bytes * 1e-9, result.report.device,
               c->page_cache ? "page cache" : "from disk");
        printf("  disk %.2f GB/s, bus %.2f GB/s, load %.2f GB/s: %.0f %% of the slower\n", result.disk * 1e-9,
               result.bus * 1e-9, result.load * 1e-9, 100 * result.load / slower);
        return PERK_EXIT_OK;
    }
    json_t *json = perk_bench_result("load", c->bench.model, result.report.device);
    json_object_set_new(json, "page_cache", json_boolean(c->page_cache));
    json_object_set_new(json, "bytes", json_integer((json_int_t)result.bytes));
    json_object_set_new(json, "disk_bytes_per_s", json_real(result.disk));
    json_object_set_new(json, "bus_bytes_per_s", json_real(result.bus));
    json_object_set_new(json, "load_bytes_per_s", json_real(result.load));
    json_object_set_new(json, "percent_of_slower", json_real(100 * result.load / slower));
    json_object_set_new(json, "start", perk_cli_report_json(&result.report));
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}
