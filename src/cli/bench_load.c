/* perk bench load: how fast a model folder's weights reach the device, next to what the disk and the bus give. */
#include "bench.h"

#include "src/gpu.h"
#include "src/model.h"

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

static perk_status measure(const perk_bench_load_options *options, load_result *result, perk_error *err) {
    perk_model *model = NULL;
    perk_executor *gpu = NULL;
    perk_config config = {.max_num_batched_tokens = 1, .max_seq_length = 256};
    const perk_gpu_options gpu_options = {.threads = options->threads, .log = perk_cli_log(options->verbose)};
    perk_status status = perk_model_open(&model, options->model, false, 0, err);
    if (status == PERK_OK) status = perk_config_resolve(&config, model->max_positions, err);
    if (status == PERK_OK) status = measure_disk(model->checkpoint, &result->disk, err);
    if (status == PERK_OK) {
        result->bytes = perk_checkpoint_bytes(model->checkpoint);
        if (!options->warm) drop_all(model->checkpoint);
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

int perk_bench_load(const perk_bench_load_options *options) {
    perk_error err = {0};
    load_result result = {0};
    if (measure(options, &result, &err) != PERK_OK) return perk_cli_fail(&err);
    double slower = PERK_MIN(result.disk, result.bus);
    if (!options->json) {
        printf("%s  %.3f GB  %s  %s\n", options->model, (double)result.bytes * 1e-9, result.report.device,
               options->warm ? "page cache" : "from disk");
        printf("  disk %.2f GB/s, bus %.2f GB/s, load %.2f GB/s: %.0f %% of the slower\n", result.disk * 1e-9,
               result.bus * 1e-9, result.load * 1e-9, 100 * result.load / slower);
        return PERK_EXIT_OK;
    }
    json_t *json =
        json_pack("{s:s, s:s, s:b, s:I, s:f, s:f, s:f, s:f, s:o}", "what", "load", "model", options->model,
                  "page_cache", options->warm, "bytes", (json_int_t)result.bytes, "disk_bytes_per_s", result.disk,
                  "bus_bytes_per_s", result.bus, "load_bytes_per_s", result.load, "percent_of_slower",
                  100 * result.load / slower, "start", perk_cli_report_json(&result.report));
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}
