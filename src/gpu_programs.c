/* The programs of a GPU executor: one for each size of a step, planned, checked, emitted and compiled side by side. */
#include "gpu_state.h"

#include <pthread.h>

#include "ops/op.h"
#include "plan_shared.h"
#include "plan_steps.h"

/* ---- one program, on a thread ---- */

typedef struct program_make {
    const perk_gpu *gpu;
    const perk_graph *graph;
    const perk_gpu_options *options;
    perk_cache *cache;
    perk_gpu_program *program;
    perk_program_report *report;
    pthread_t thread;
    bool started;
    perk_status status;
    perk_error err;
} program_make;

static perk_status make_plan(const program_make *m, perk_error *err) {
    const perk_gpu_options *options = m->options;
    perk_device_desc device;
    perk_config config = perk_config_for_steps(&m->gpu->config, m->report->tokens);
    /* The schedule is of one size, with rows for all requests that hold pages, in a small step or not. */
    if (options->many_steps) config.max_num_batched_requests = m->gpu->config.max_num_batched_requests;
    double begin = perk_now();
    perk_status status = perk_device_describe(&m->gpu->info, &device, err);
    if (status != PERK_OK) return status;
    if (options->portable) perk_device_make_portable(&device);
    status = perk_plan_create(&m->program->plan, m->graph, &device, &config, err);
    m->report->plan_ms = (perk_now() - begin) * 1e3;
    if (status != PERK_OK) return status;
    perk_plan *plan = m->program->plan;
    plan->profiled = options->profile;
    plan->unlimited_waits = options->unlimited_waits;
    plan->for_racecheck = options->for_racecheck;
    plan->many_steps = options->many_steps;
    if (plan->many_steps && (status = perk_plan_check_many_steps(plan, err))) return status;
    begin = perk_now();
    if (!options->unchecked) status = perk_plan_check(plan, err);
    m->report->check_ms = (perk_now() - begin) * 1e3;
    if (status == PERK_OK && options->alter) options->alter(plan, options->alter_user);
    return status;
}

static perk_status build(const perk_gpu *gpu, perk_gpu_program *p, const perk_gpu_options *options, perk_cache *cache,
                         bool made_anew, perk_program_report *report, perk_error *err) {
    const perk_program_options settings = {
        .cache = cache, .driver_version = gpu->driver->version, .made_anew = made_anew, .log = &options->log};
    perk_status status = perk_program_build(p->plan, &settings, &p->program, err);
    if (status != PERK_OK) return status;
    report->emit_ms = p->program.emit_ms + p->program.lookup_ms;
    report->compile_ms = p->program.compile_ms;
    report->cache_hit = p->program.cache_hit;
    report->registers = (int32_t)p->program.kernel.registers;
    report->spill_bytes = (int32_t)p->program.spill_bytes;
    report->shared_bytes = p->plan->shared_bytes;
    report->cubin_bytes = (int32_t)p->program.cubin_size;
    return status;
}

int perk_gpu_tensor(const perk_plan *plan, const perk_tensor *tensor) {
    for (int i = 0; i < plan->tensor_count && tensor; i++)
        if (plan->tensors[i].graph_tensor == tensor->index && plan->tensors[i].space == PERK_SPACE_ACTIVATIONS)
            return i;
    return -1;
}

/* The results that a step brings back: the last argmax, and its logits; or the last fp32 output. */
static void find_results(perk_gpu_program *p) {
    const perk_graph *graph = p->plan->graph;
    p->argmax_tensor = p->logits_tensor = -1;
    for (int i = 0; i < graph->op_count; i++) {
        const perk_tensor *out = graph->ops[i]->output;
        if (graph->ops[i]->type == &perk_op_argmax) p->argmax_tensor = perk_gpu_tensor(p->plan, out);
        if (out->dtype == PERK_F32) p->logits_tensor = perk_gpu_tensor(p->plan, out);
    }
}

static void *make_program(void *argument) {
    program_make *m = argument;
    m->status = make_plan(m, &m->err);
    if (m->status == PERK_OK) m->status = build(m->gpu, m->program, m->options, m->cache, false, m->report, &m->err);
    if (m->status != PERK_OK) return NULL;
    m->program->layout = perk_plan_batch_layout(m->program->plan);
    find_results(m->program);
    return NULL;
}

void perk_gpu_program_free(perk_gpu_program *program) {
    perk_program_free(&program->program);
    perk_plan_free(program->plan);
    *program = (perk_gpu_program){0};
}

/* ---- all of them ---- */

/* Whether the executor goes on without the program: a default that was not compiled ahead of time is no reason to
 * fail. */
static bool may_lack(const program_make *m) {
    bool smaller = m->program != m->gpu->largest;
    return smaller && m->options->smaller_are_optional &&
           (m->status == PERK_NO_COMPILER || m->status == PERK_UNSUPPORTED);
}

/* The largest is made on this thread, beside the others. */
static void make_all(program_make *makes, int count) {
    for (int i = 0; i + 1 < count; i++)
        makes[i].started = pthread_create(&makes[i].thread, NULL, make_program, &makes[i]) == 0;
    make_program(&makes[count - 1]);
    for (int i = 0; i + 1 < count; i++) {
        if (makes[i].started)
            pthread_join(makes[i].thread, NULL);
        else
            make_program(&makes[i]);
    }
}

/* Leaves out what may lack; of other failures, that of the largest program counts first. */
static perk_status keep_made(perk_gpu *gpu, program_make *makes, perk_start_report *report, perk_error *err) {
    int kept = 0, count = gpu->program_count;
    for (int i = count - 1; i >= 0; i--) {
        program_make *m = &makes[i];
        if (m->status == PERK_OK && i < count - 1)
            m->status = perk_plan_check_shared(m->program->plan, gpu->largest->plan, &m->err);
        if (m->status == PERK_OK || may_lack(m)) continue;
        if (err) *err = m->err;
        return count > 1 ? perk_fail_prefix(err, m->status, "the program for %d tokens a step", m->report->tokens)
                         : m->status;
    }
    for (int i = 0; i < count; i++) {
        if (makes[i].status != PERK_OK) {
            perk_log_write(&makes[i].options->log, PERK_LOG_INFO, "no program for %d tokens a step: %s",
                           makes[i].report->tokens, makes[i].err.message);
            perk_gpu_program_free(&gpu->programs[i]);
            continue;
        }
        gpu->programs[kept] = gpu->programs[i];
        report->programs[kept++] = report->programs[i];
    }
    for (int i = kept; i < count; i++) {
        gpu->programs[i] = (perk_gpu_program){0}; /* moved down, or freed */
        report->programs[i] = (perk_program_report){0};
    }
    gpu->program_count = report->program_count = kept;
    gpu->largest = &gpu->programs[kept - 1];
    return PERK_OK;
}

/* What the report says of all programs together. */
static void sum_up(perk_start_report *report) {
    const perk_program_report *largest = &report->programs[report->program_count - 1];
    report->plan_ms = report->check_ms = report->emit_ms = report->compile_ms = report->module_ms = 0;
    report->cache_hit = 1;
    for (int i = 0; i < report->program_count; i++) {
        const perk_program_report *p = &report->programs[i];
        report->plan_ms = PERK_MAX(report->plan_ms, p->plan_ms);
        report->check_ms = PERK_MAX(report->check_ms, p->check_ms);
        report->emit_ms = PERK_MAX(report->emit_ms, p->emit_ms);
        report->compile_ms = PERK_MAX(report->compile_ms, p->compile_ms);
        report->module_ms += p->module_ms;
        report->cache_hit = report->cache_hit && p->cache_hit;
    }
    report->registers = largest->registers;
    report->spill_bytes = largest->spill_bytes;
    report->shared_bytes = largest->shared_bytes;
    report->cubin_bytes = largest->cubin_bytes;
}

perk_status perk_gpu_make_programs(perk_gpu *gpu, const perk_graph *graph, const perk_gpu_options *options,
                                   perk_cache *cache, perk_start_report *report, perk_error *err) {
    program_make makes[PERK_MAX_PROGRAMS];
    int count = options->smaller_program_count + 1;
    gpu->program_count = count;
    gpu->largest = &gpu->programs[count - 1];
    for (int i = 0; i < count; i++) {
        makes[i] = (program_make){.gpu = gpu,
                                  .graph = graph,
                                  .options = options,
                                  .cache = cache,
                                  .program = &gpu->programs[i],
                                  .report = &report->programs[i]};
        report->programs[i].tokens = i < count - 1 ? options->smaller_programs[i] : gpu->config.max_num_batched_tokens;
    }
    make_all(makes, count);
    perk_status status = keep_made(gpu, makes, report, err);
    if (status == PERK_OK) sum_up(report);
    return status;
}

/* ---- modules ---- */

bool perk_gpu_refuses(const perk_program *program, CUresult result, const perk_log *log) {
    bool refused =
        program->cache_hit && (result == CUDA_ERROR_INVALID_IMAGE || result == CUDA_ERROR_NO_BINARY_FOR_GPU ||
                               result == CUDA_ERROR_INVALID_SOURCE || result == CUDA_ERROR_SHARED_OBJECT_INIT_FAILED);
    if (refused)
        perk_log_write(log, PERK_LOG_WARNING, "the cached program is made anew: the driver refuses it (error %d)",
                       (int)result);
    return refused;
}

static CUresult load_image(perk_gpu *gpu, perk_gpu_program *p, const perk_gpu_options *options, perk_cache *cache,
                           perk_program_report *report) {
    CUresult result = gpu->driver->cuModuleLoadData(&p->module, p->program.cubin);
    if (!perk_gpu_refuses(&p->program, result, &options->log)) return result;
    perk_program_free(&p->program);
    if (build(gpu, p, options, cache, true, report, NULL) != PERK_OK) return result;
    return gpu->driver->cuModuleLoadData(&p->module, p->program.cubin);
}

static perk_status load_module(perk_gpu *gpu, perk_gpu_program *p, const perk_gpu_options *options, perk_cache *cache,
                               perk_program_report *report, perk_error *err) {
    const perk_driver *driver = gpu->driver;
    double begin = perk_now();
    CUresult result = load_image(gpu, p, options, cache, report);
    if (result == CUDA_SUCCESS) result = driver->cuModuleGetFunction(&p->kernel, p->module, PERK_KERNEL_NAME);
    if (result == CUDA_SUCCESS)
        result = driver->cuFuncSetAttribute(p->kernel, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                            p->plan->shared_bytes);
    perk_status status = perk_driver_check(driver, result, err, "loading the program");
    if (status != PERK_OK) return status;
    int blocks = 0;
    result = driver->cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, p->kernel, PERK_BLOCK_THREADS,
                                                                 (size_t)p->plan->shared_bytes);
    status = perk_driver_check(driver, result, err, "asking for the program's occupancy");
    if (status == PERK_OK && blocks < 1)
        status = perk_fail(err, PERK_INTERNAL,
                           "the program (%d registers, %d bytes of shared memory) does not fit an SM of %s",
                           (int)p->program.kernel.registers, p->plan->shared_bytes, gpu->info.name);
    report->module_ms = (perk_now() - begin) * 1e3;
    return status;
}

perk_status perk_gpu_load_programs(perk_gpu *gpu, const perk_gpu_options *options, perk_cache *cache,
                                   perk_start_report *report, perk_error *err) {
    perk_status status = PERK_OK;
    for (int i = 0; i < gpu->program_count && status == PERK_OK; i++)
        status = load_module(gpu, &gpu->programs[i], options, cache, &report->programs[i], err);
    if (status == PERK_OK) sum_up(report);
    return status;
}
