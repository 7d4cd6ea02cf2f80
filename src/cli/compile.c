/* perk compile: a model's program for any architecture, ahead of time. */
#include "planning.h"

#include "jit/cubin_info.h"
#include "jit/emit.h"

#include <errno.h>

typedef struct compile_report {
    double check_ms, emit_ms, compile_ms, total_ms;
    size_t source_bytes;
    perk_compile_result result;
    perk_cubin_kernel_info kernel;
} compile_report;

static double lap_ms(double *since) {
    double now = perk_now(), lap = (now - *since) * 1e3;
    *since = now;
    return lap;
}

static perk_status compile_source(const perk_plan *plan, const char *source, const perk_compile_header *headers,
                                  size_t header_count, compile_report *report, perk_error *err) {
    perk_nvrtc *nvrtc;
    perk_log log = perk_cli_log(0);
    perk_compile_request request = {.source = source,
                                    .name = "program.cu",
                                    .headers = headers,
                                    .header_count = header_count,
                                    .arch = plan->device.arch,
                                    .log = &log};
    perk_status status = perk_nvrtc_open(&nvrtc, NULL, err);
    if (status) return status;
    status = perk_compile(nvrtc, &request, &report->result, err);
    perk_nvrtc_free(nvrtc);
    if (status) return status;
    return perk_cubin_info(report->result.cubin, report->result.cubin_size, PERK_KERNEL_NAME, &report->kernel, err);
}

/* Check, emit, compile. */
static perk_status build(const perk_plan *plan, compile_report *report, perk_error *err) {
    perk_buffer source = {0};
    perk_compile_header *headers = NULL;
    size_t header_count = 0;
    double start = perk_now();
    perk_status status = perk_plan_check(plan, err);
    report->check_ms = lap_ms(&start);
    if (!status) status = perk_emit_source(plan, &source, err);
    if (!status) status = perk_emit_headers(&headers, &header_count, err);
    report->emit_ms = lap_ms(&start);
    report->source_bytes = source.size;
    if (!status) status = compile_source(plan, source.data, headers, header_count, report, err);
    report->compile_ms = lap_ms(&start);
    if (headers) perk_emit_headers_free(headers, header_count);
    perk_buffer_free(&source);
    return status;
}

static perk_status write_file(const char *path, const void *data, size_t size, perk_error *err) {
    FILE *file = fopen(path, "wbe");
    if (!file) return perk_fail(err, PERK_IO, "%s: cannot create: %s", path, strerror(errno));
    bool written = fwrite(data, 1, size, file) == size;
    if (fclose(file) != 0 || !written) return perk_fail(err, PERK_IO, "%s: cannot write: %s", path, strerror(errno));
    return PERK_OK;
}

static int print_report(const perk_cli_planning *planning, const compile_report *report) {
    const perk_plan *plan = planning->plan;
    const perk_cubin_kernel_info *kernel = &report->kernel;
    if (planning->json) {
        json_t *json =
            json_pack("{s:s, s:i, s:{s:f, s:f, s:f, s:f, s:f, s:f}, s:i, s:i, s:i, s:i, s:I, s:I, s:I}", "arch",
                      plan->device.arch, "workers", plan->device.worker_count, "ms", "graph", planning->graph_ms,
                      "plan", planning->plan_ms, "check", report->check_ms, "emit", report->emit_ms, "compile",
                      report->compile_ms, "total", report->total_ms, "registers", (int)kernel->registers, "stack_bytes",
                      (int)kernel->stack_bytes, "shared_bytes", plan->shared_bytes, "static_shared_bytes",
                      (int)kernel->shared_bytes, "spill_bytes", (json_int_t)report->result.spill_bytes, "code_bytes",
                      (json_int_t)kernel->code_bytes, "cubin_bytes", (json_int_t)report->result.cubin_size);
        return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
    }
    printf("%s, %d workers: %u registers, %zu bytes spilled, %d bytes of shared memory, code %llu bytes, cubin %zu "
           "bytes\n",
           plan->device.arch, plan->device.worker_count, kernel->registers, report->result.spill_bytes,
           plan->shared_bytes, (unsigned long long)kernel->code_bytes, report->result.cubin_size);
    printf("graph %.1f ms, plan %.1f, check %.1f, emit %.1f, compile %.1f, total %.1f\n", planning->graph_ms,
           planning->plan_ms, report->check_ms, report->emit_ms, report->compile_ms, report->total_ms);
    return PERK_EXIT_OK;
}

int perk_cli_compile(const perk_cli_command *self, int argc, char **argv) {
    double start = perk_now();
    perk_cli_planning planning = {0};
    const char *out = NULL;
    const perk_cli_option items[] = {PERK_CLI_OPTION_TEXT("out", &out, "FILE.cubin", "where the cubin goes")};
    perk_cli_options options = {0};
    perk_cli_add_planning(&options, &planning);
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(self, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    if (!planning.model) return perk_cli_usage(self, "--model is missing");
    perk_error err = {0};
    compile_report report = {0};
    perk_status status = perk_cli_make_plan(&planning, &err);
    if (!status) status = build(planning.plan, &report, &err);
    if (!status && out) status = write_file(out, report.result.cubin, report.result.cubin_size, &err);
    report.total_ms = (perk_now() - start) * 1e3;
    code = status ? perk_cli_fail(&err) : print_report(&planning, &report);
    perk_compile_result_free(&report.result);
    perk_cli_planning_free(&planning);
    return code;
}
