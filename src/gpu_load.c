/* Device memory and weights: rows of the checkpoint go through pinned staging to the device and are packed there in the
 * order of the stream. Reading from the files, copying to the device and packing overlap; the host never holds a second
 * copy of the weights. */
#include "gpu_state.h"
#include "stored_weight.h"
#include "threads.h"

#include <stdio.h>

/* ---- memory ---- */

typedef struct reservation {
    const char *what;
    perk_gpu_memory *memory;
    uint64_t bytes;
} reservation;

/* What all programs share, and what each has of its own. */
enum { SHARED_RESERVATIONS = 4, OWN_RESERVATIONS = 5 };

typedef struct reservations {
    reservation items[SHARED_RESERVATIONS + PERK_MAX_PROGRAMS * OWN_RESERVATIONS];
    int count;
} reservations;

static void add_reservations(reservations *list, const reservation *items, size_t count) {
    for (size_t i = 0; i < count; i++) list->items[list->count++] = items[i];
}

static void list_shared(perk_gpu *gpu, reservations *list) {
    const perk_plan *plan = gpu->largest->plan;
    const reservation all[SHARED_RESERVATIONS] = {
        {"weights", &gpu->spaces[PERK_SPACE_WEIGHTS], plan->space_bytes[PERK_SPACE_WEIGHTS]},
        {"tables and norms", &gpu->spaces[PERK_SPACE_CONSTANTS], plan->space_bytes[PERK_SPACE_CONSTANTS]},
        {"KV pages", &gpu->spaces[PERK_SPACE_KV], plan->kv_layer_bytes * (uint64_t)plan->graph->kv_layer_count},
        {"hang claim", &gpu->hang_claim, 4},
    };
    add_reservations(list, all, PERK_COUNT(all));
}

static void list_own(perk_gpu_program *p, reservations *list) {
    const perk_plan *plan = p->plan;
    for (int w = 0; w < plan->device.worker_count; w++) /* every list is as long as the longest, and closed */
        p->tasks_per_worker = PERK_MAX(p->tasks_per_worker, plan->worker_begin[w + 1] - plan->worker_begin[w] + 1);
    uint64_t records = (uint64_t)p->tasks_per_worker * (uint64_t)plan->device.worker_count;
    const reservation all[OWN_RESERVATIONS] = {
        {"activations", &p->activations, plan->space_bytes[PERK_SPACE_ACTIVATIONS]},
        {"task lists", &p->tasks, records * sizeof(perk_task_record)},
        {"batch", &p->batch, (uint64_t)p->layout.words * 4},
        {"counters", &p->counters, (uint64_t)plan->counter_count * 4},
        {"time stamps", &p->stamps, plan->profiled ? records * PERK_STAMPS * sizeof(uint64_t) : 0},
    };
    add_reservations(list, all, PERK_COUNT(all));
}

/* All bytes for what item `first` is for; 0 where an earlier item was for that, too. */
static uint64_t sum_of_kind(const reservations *list, int first) {
    uint64_t bytes = 0;
    for (int i = 0; i < list->count; i++) {
        if (strcmp(list->items[i].what, list->items[first].what) != 0) continue;
        if (i < first) return 0;
        bytes += list->items[i].bytes;
    }
    return bytes;
}

static perk_status fail_reservations(perk_gpu *gpu, const reservations *list, perk_error *err) {
    perk_buffer text = {0};
    uint64_t total = 0;
    size_t free_bytes = 0, all_bytes = 0;
    for (int i = 0; i < list->count; i++) {
        uint64_t bytes = sum_of_kind(list, i);
        total += bytes;
        if (bytes >= 1 << 20)
            perk_buffer_printf(&text, "%s%.3f GB for %s", text.size ? ", " : "", (double)bytes * 1e-9,
                               list->items[i].what);
    }
    gpu->driver->cuMemGetInfo(&free_bytes, &all_bytes);
    perk_status status = perk_fail(err, PERK_DEVICE_MEMORY,
                                   "%s: the model needs %.3f GB of device memory (%s), and %.3f GB of %.3f GB are "
                                   "free; a smaller max_num_pages or "
                                   "max_seq_length needs less for KV pages",
                                   gpu->info.name, (double)total * 1e-9, text.data ? text.data : "",
                                   (double)free_bytes * 1e-9, (double)all_bytes * 1e-9);
    perk_buffer_free(&text);
    return status;
}

static perk_status reserve(perk_gpu *gpu, const reservations *list, const reservation *item, perk_error *err) {
    const perk_driver *driver = gpu->driver;
    perk_gpu_memory *memory = item->memory;
    memory->bytes = PERK_MAX(item->bytes, (uint64_t)256);
    CUresult result = driver->cuMemAlloc(&memory->address, memory->bytes);
    if (result == CUDA_ERROR_OUT_OF_MEMORY) return fail_reservations(gpu, list, err);
    perk_status status = perk_driver_check(driver, result, err, "reserving %llu bytes for %s",
                                           (unsigned long long)memory->bytes, item->what);
    if (status != PERK_OK) return status;
    /* Zeros: the padding of tiles and rows stays so, counters begin there, stale pages hold no NaN. */
    return perk_driver_check(driver, driver->cuMemsetD8Async(memory->address, 0, memory->bytes, gpu->stream), err,
                             "clearing %s", item->what);
}

/* What eager stages write, both copies, and all scratches of pieces: the first step finds them as any other does. */
static perk_status make_vacant(perk_gpu *gpu, const perk_gpu_program *p, perk_error *err) {
    const perk_plan *plan = p->plan;
    CUdeviceptr begin = p->activations.address;
    CUresult result = CUDA_SUCCESS;
    if (plan->eager_bytes > 0)
        result = gpu->driver->cuMemsetD8Async(begin + plan->eager_begin, PERK_VACANT % 256, 2 * plan->eager_bytes,
                                              gpu->stream);
    for (int t = 0; t < plan->tensor_count && result == CUDA_SUCCESS; t++)
        if (plan->tensors[t].of_pieces)
            result = gpu->driver->cuMemsetD8Async(begin + plan->tensors[t].offset, PERK_VACANT % 256,
                                                  plan->tensors[t].bytes, gpu->stream);
    return perk_driver_check(gpu->driver, result, err, "making room for eager values");
}

perk_status perk_gpu_allocate(perk_gpu *gpu, perk_error *err) {
    reservations list = {.count = 0};
    perk_status status = PERK_OK;
    list_shared(gpu, &list);
    for (int i = 0; i < gpu->program_count; i++) list_own(&gpu->programs[i], &list);
    for (int i = 0; i < list.count && status == PERK_OK; i++) status = reserve(gpu, &list, &list.items[i], err);
    for (int i = 0; i < gpu->program_count && status == PERK_OK; i++) status = make_vacant(gpu, &gpu->programs[i], err);
    return status;
}

perk_status perk_gpu_pin(const perk_gpu *gpu, void **out, size_t bytes, unsigned flags, const char *what,
                         perk_error *err) {
    CUresult result = gpu->driver->cuMemHostAlloc(out, bytes, flags);
    if (result == CUDA_ERROR_OUT_OF_MEMORY)
        return perk_fail(err, PERK_OUT_OF_MEMORY, "the driver cannot pin %zu bytes of host memory for %s", bytes, what);
    return perk_driver_check(gpu->driver, result, err, "pinning %zu bytes for %s", bytes, what);
}

/* ---- the packing program ---- */

/* As struct perk_pack_args and perk_rope_args in kernels_src/pack.cuh. */
typedef struct pack_args {
    CUdeviceptr source, target;
    uint32_t stored, rows, cols, first_row, paired_half, tiles, blocks, workers, target_stride;
} pack_args;

typedef struct rope_args {
    CUdeviceptr inv_freq, table;
    uint32_t positions, half;
    float scale;
} rope_args;

enum { PACK_THREADS = 256 };
/* Large enough for full bus speed; smaller for small models, because pinning memory takes about 0.3 ms a MB. */
enum { STAGING_BUFFERS = 3, STAGING_BYTES_MIN = 1 << 20, STAGING_BYTES_MAX = 32 << 20 };

typedef struct staging {
    void *host;
    CUdeviceptr device;
    CUevent packed; /* the buffer may be filled again */
} staging;

typedef struct loader {
    perk_gpu *gpu;
    perk_threads *threads;
    const perk_progress *progress;
    CUmodule module;
    CUfunction pack_tiles, pack_rows, fill_rope;
    staging buffers[STAGING_BUFFERS];
    uint64_t staging_bytes; /* of one buffer */
    uint64_t slices;        /* issued so far */
    uint64_t done_bytes, total_bytes;
} loader;

static perk_status open_packer(loader *l, const perk_gpu_options *options, perk_cache *cache, perk_error *err) {
    const perk_driver *driver = l->gpu->driver;
    perk_program program = {0};
    perk_compile_header *headers = NULL;
    size_t header_count = 0;
    perk_status status = perk_emit_headers(&headers, &header_count, err);
    if (status != PERK_OK) return status;
    const perk_program_source source = {
        .name = "pack.cu",
        .text = "#define PERK_PORTABLE 1\n#include \"abi.h\"\n#include \"ptx.cuh\"\n#include \"pack.cuh\"\n",
        .headers = headers,
        .header_count = header_count,
        .arch = l->gpu->largest->plan->device.arch,
        .kernel = "perk_pack_tiles"};
    perk_program_options build = {.cache = cache, .driver_version = driver->version, .log = &options->log};
    status = perk_program_build_source(&source, &build, &program, err);
    if (status == PERK_OK) {
        CUresult result = driver->cuModuleLoadData(&l->module, program.cubin);
        build.made_anew = perk_gpu_refuses(&program, result, &options->log);
        if (build.made_anew) perk_program_free(&program);
        if (build.made_anew && perk_program_build_source(&source, &build, &program, NULL) == PERK_OK)
            result = driver->cuModuleLoadData(&l->module, program.cubin);
        status = perk_driver_check(driver, result, err, "loading the packing program");
    }
    struct {
        CUfunction *function;
        const char *name;
    } functions[] = {
        {&l->pack_tiles, "perk_pack_tiles"}, {&l->pack_rows, "perk_pack_rows"}, {&l->fill_rope, "perk_fill_rope"}};
    for (size_t i = 0; i < PERK_COUNT(functions) && status == PERK_OK; i++)
        status =
            perk_driver_check(driver, driver->cuModuleGetFunction(functions[i].function, l->module, functions[i].name),
                              err, "finding %s", functions[i].name);
    perk_program_free(&program);
    perk_emit_headers_free(headers, header_count);
    return status;
}

static perk_status open_staging(loader *l, perk_error *err) {
    const perk_driver *driver = l->gpu->driver;
    size_t bytes = (size_t)l->staging_bytes;
    for (int i = 0; i < STAGING_BUFFERS; i++) {
        staging *b = &l->buffers[i];
        perk_status status = perk_gpu_pin(l->gpu, &b->host, bytes, 0, "loading", err);
        if (status == PERK_OK)
            status = perk_driver_check(driver, driver->cuMemAlloc(&b->device, bytes), err,
                                       "reserving %zu bytes for loading", bytes);
        if (status == PERK_OK)
            status = perk_driver_check(driver, driver->cuEventCreate(&b->packed, CU_EVENT_DISABLE_TIMING), err,
                                       "making an event for loading");
        if (status != PERK_OK) return status;
    }
    return PERK_OK;
}

static void close_loader(loader *l) {
    const perk_driver *driver = l->gpu->driver;
    for (int i = 0; i < STAGING_BUFFERS; i++) {
        if (l->buffers[i].host) driver->cuMemFreeHost(l->buffers[i].host);
        if (l->buffers[i].device) driver->cuMemFree(l->buffers[i].device);
        if (l->buffers[i].packed) driver->cuEventDestroy(l->buffers[i].packed);
    }
    if (l->module) driver->cuModuleUnload(l->module);
    perk_threads_free(l->threads);
}

static perk_status launch_flat(loader *l, CUfunction function, uint64_t threads, void *args, perk_error *err) {
    const perk_driver *driver = l->gpu->driver;
    void *params[] = {args};
    CUresult result = driver->cuLaunchKernel(function, (unsigned)perk_ceil_div(threads, PACK_THREADS), 1, 1,
                                             PACK_THREADS, 1, 1, 0, l->gpu->stream, params, NULL);
    return perk_driver_check(driver, result, err, "launching the packing program");
}

/* ---- weights ---- */

typedef struct copy_job {
    char *to;
    const char *from;
    size_t bytes;
} copy_job;

static void copy_part(void *context, size_t begin, size_t end, int thread) {
    const copy_job *job = context;
    (void)thread;
    memcpy(job->to + begin, job->from + begin, PERK_MIN(end, job->bytes) - begin);
}

/* Where the rows of one stored tensor go. */
typedef struct destination {
    const perk_plan_tensor *tensor;
    uint32_t first_row;   /* of the stored tensor in the stack */
    uint32_t paired_half; /* rows of each half of a paired matrix */
    uint32_t tiles, blocks;
    uint32_t interleaved; /* workers whose tiles lie side by side: 1 for experts, whose tiles lie whole */
    uint64_t expert;      /* whose matrix it is, of the tensor's */
} destination;

static perk_status issue_slice(loader *l, const perk_checkpoint_tensor *stored, const destination *to, uint64_t row,
                               uint64_t rows, uint64_t cols, perk_error *err) {
    const perk_driver *driver = l->gpu->driver;
    staging *buffer = &l->buffers[l->slices % STAGING_BUFFERS];
    size_t row_bytes = (size_t)cols * perk_dtype_size(stored->dtype), bytes = (size_t)rows * row_bytes;
    perk_status status = PERK_OK;
    if (l->slices >= STAGING_BUFFERS)
        status =
            perk_driver_check(driver, driver->cuEventSynchronize(buffer->packed), err, "waiting for a load buffer");
    if (status != PERK_OK) return status;
    copy_job job = {buffer->host, (const char *)stored->data + row * row_bytes, bytes};
    perk_threads_run(l->threads, bytes, 1 << 20, copy_part, &job);
    status = perk_driver_check(driver, driver->cuMemcpyHtoDAsync(buffer->device, buffer->host, bytes, l->gpu->stream),
                               err, "copying %zu bytes of %s", bytes, stored->name);
    if (status != PERK_OK) return status;

    pack_args args = {.source = buffer->device,
                      .target = l->gpu->spaces[to->tensor->space].address + to->tensor->offset +
                                to->expert * to->tiles * to->blocks * PERK_WEIGHT_BLOCK_BYTES,
                      .stored = (uint32_t)stored->dtype,
                      .rows = (uint32_t)rows,
                      .cols = (uint32_t)cols,
                      .first_row = to->first_row + (uint32_t)row,
                      .paired_half = to->paired_half,
                      .tiles = to->tiles,
                      .blocks = to->blocks,
                      .workers = to->interleaved,
                      .target_stride = (uint32_t)to->tensor->row_stride};
    bool is_tiled = to->tensor->layout != PERK_LAYOUT_ROWS;
    uint64_t pieces = is_tiled ? (uint64_t)to->blocks * (PERK_BLOCK_COLS / 8) : perk_ceil_div(cols, 8);
    status = launch_flat(l, is_tiled ? l->pack_tiles : l->pack_rows, rows * pieces, &args, err);
    if (status == PERK_OK)
        status = perk_driver_check(driver, driver->cuEventRecord(buffer->packed, l->gpu->stream), err,
                                   "marking a load buffer");
    l->slices++;
    l->done_bytes += bytes;
    if (status == PERK_OK && l->progress->report &&
        l->progress->report(l->progress->user, "weights", l->done_bytes, l->total_bytes))
        status = perk_fail(err, PERK_CANCELLED, "loading was cancelled");
    return status;
}

/* Moves one stored tensor, slice by slice. */
static perk_status load_matrix_part(loader *l, const perk_checkpoint_tensor *stored, const destination *to,
                                    uint64_t rows, uint64_t cols, perk_error *err) {
    uint64_t row_bytes = cols * perk_dtype_size(stored->dtype), slice = l->staging_bytes / row_bytes;
    if (slice == 0)
        return perk_fail(err, PERK_UNSUPPORTED, "%s: a row of %llu bytes is more than a load buffer holds",
                         stored->name, (unsigned long long)row_bytes);
    perk_checkpoint_will_read(stored);
    for (uint64_t row = 0; row < rows; row += slice) {
        perk_status status = issue_slice(l, stored, to, row, PERK_MIN(slice, rows - row), cols, err);
        if (status != PERK_OK) return status;
    }
    perk_checkpoint_done_reading(stored);
    return PERK_OK;
}

/* A weight, or that of one expert. */
static perk_status load_matrix(loader *l, const perk_checkpoint *checkpoint, const perk_plan_tensor *tensor,
                               uint64_t expert, perk_error *err) {
    const perk_tensor *weight = l->gpu->largest->plan->graph->tensors[tensor->graph_tensor];
    int parts = weight->kind == PERK_TENSOR_STACK ? weight->part_count : 1;
    destination to = {.tensor = tensor, .expert = expert};
    if (tensor->layout != PERK_LAYOUT_ROWS) {
        to.tiles = (uint32_t)(tensor->rows / PERK_TILE_ROWS / perk_weight_count(weight));
        to.blocks = (uint32_t)tensor->cols / PERK_BLOCK_COLS;
        to.paired_half = tensor->layout == PERK_LAYOUT_PAIRED_TILES ? (uint32_t)weight->rows / 2 : 0;
        to.interleaved = weight->experts ? 1 : (uint32_t)l->gpu->largest->plan->device.worker_count;
    }
    perk_plan_tensor shifted = *tensor; /* the parts of a stacked vector follow each other in its one row */
    for (int i = 0; i < parts; i++) {
        const perk_tensor *part = weight->kind == PERK_TENSOR_STACK ? weight->parts[i] : weight;
        const perk_checkpoint_tensor *stored;
        perk_status status = perk_weight_require(checkpoint, part, (int64_t)expert, &stored, err);
        if (status != PERK_OK) return status;
        if (weight->is_vector && parts > 1 && part->cols % 8 != 0)
            return perk_fail(err, PERK_UNSUPPORTED,
                             "%s: the parts of a stacked vector must be multiples of 8 on the GPU", part->name);
        if (weight->is_vector) to.tensor = &shifted;
        status =
            load_matrix_part(l, stored, &to, weight->is_vector ? 1 : (uint64_t)part->rows, (uint64_t)part->cols, err);
        if (status != PERK_OK) return status;
        if (weight->is_vector)
            shifted.offset += (uint64_t)part->cols * 2;
        else
            to.first_row += (uint32_t)part->rows;
    }
    return PERK_OK;
}

static perk_status load_tensor(loader *l, const perk_checkpoint *checkpoint, const perk_plan_tensor *tensor,
                               perk_error *err) {
    int64_t count = perk_weight_count(l->gpu->largest->plan->graph->tensors[tensor->graph_tensor]);
    perk_status status = PERK_OK;
    for (int64_t i = 0; i < count && status == PERK_OK; i++)
        status = load_matrix(l, checkpoint, tensor, (uint64_t)i, err);
    return status;
}

static perk_status load_rope(loader *l, const perk_plan_tensor *tensor, perk_error *err) {
    perk_gpu *gpu = l->gpu;
    const perk_attention_params *p = &gpu->largest->plan->graph->ops[tensor->rope_op]->attention;
    size_t bytes = (size_t)p->head_dim / 2 * sizeof(float);
    CUdeviceptr frequencies = 0;
    perk_status status = perk_driver_check(gpu->driver, gpu->driver->cuMemAlloc(&frequencies, bytes), err,
                                           "reserving %zu bytes for rotary frequencies", bytes);
    if (status != PERK_OK) return status;
    rope_args args = {.inv_freq = frequencies,
                      .table = gpu->spaces[tensor->space].address + tensor->offset,
                      .positions = (uint32_t)tensor->rows,
                      .half = (uint32_t)p->head_dim / 2,
                      .scale = p->rope_scale};
    status = perk_gpu_upload(gpu, frequencies, p->inv_freq, bytes, "rotary frequencies", err);
    if (status == PERK_OK) status = launch_flat(l, l->fill_rope, (uint64_t)args.positions * args.half, &args, err);
    if (status == PERK_OK)
        status =
            perk_driver_check(gpu->driver, gpu->driver->cuStreamSynchronize(gpu->stream), err, "filling a rope table");
    gpu->driver->cuMemFree(frequencies);
    return status;
}

static perk_status load_all(loader *l, const perk_checkpoint *checkpoint, perk_error *err) {
    const perk_plan *plan = l->gpu->largest->plan;
    for (int i = 0; i < plan->tensor_count; i++) {
        const perk_plan_tensor *tensor = &plan->tensors[i];
        bool is_weight = tensor->space == PERK_SPACE_CONSTANTS || tensor->space == PERK_SPACE_WEIGHTS;
        perk_status status = PERK_OK;
        if (!is_weight) continue;
        if (tensor->layout == PERK_LAYOUT_ROPE)
            status = load_rope(l, tensor, err);
        else if (tensor->graph_tensor >= 0)
            status = load_tensor(l, checkpoint, tensor, err);
        if (status != PERK_OK) return status;
    }
    return perk_driver_check(l->gpu->driver, l->gpu->driver->cuStreamSynchronize(l->gpu->stream), err,
                             "loading weights");
}

perk_status perk_gpu_load_weights(perk_gpu *gpu, const perk_checkpoint *checkpoint, const perk_gpu_options *options,
                                  perk_cache *cache, perk_error *err) {
    loader l = {.gpu = gpu, .progress = &options->progress};
    for (int i = 0; i < gpu->largest->plan->tensor_count; i++) {
        const perk_plan_tensor *tensor = &gpu->largest->plan->tensors[i];
        if (tensor->graph_tensor < 0 || tensor->space == PERK_SPACE_ACTIVATIONS) continue;
        const perk_tensor *weight = gpu->largest->plan->graph->tensors[tensor->graph_tensor];
        l.total_bytes += (uint64_t)(perk_weight_count(weight) * weight->rows) * (uint64_t)weight->cols * 2;
        l.staging_bytes = PERK_MAX(l.staging_bytes, (uint64_t)weight->cols * 4); /* a row of any dtype fits */
    }
    uint64_t wanted = PERK_MAX(l.total_bytes / 8, (uint64_t)STAGING_BYTES_MIN);
    l.staging_bytes = PERK_MAX(l.staging_bytes, PERK_MIN(wanted, (uint64_t)STAGING_BYTES_MAX));
    perk_status status = perk_threads_create(&l.threads, options->threads, err);
    if (status == PERK_OK) status = open_packer(&l, options, cache, err);
    if (status == PERK_OK) status = open_staging(&l, err);
    if (status == PERK_OK) status = load_all(&l, checkpoint, err);
    if (status != PERK_OK) gpu->driver->cuStreamSynchronize(gpu->stream); /* buffers may still be in use */
    close_loader(&l);
    return status;
}
