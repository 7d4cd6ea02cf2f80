#include "jit/compile.h"

#include <ctype.h>
#include <pthread.h>
#include <stdio.h>

enum { COMPILE_STACK_BYTES = 64 << 20, MAX_OPTIONS = 32, MAX_EXCERPT = 1500 };

static const char *const OPTIONS[] = {
    "--std=c++17", "-default-device", "--ptxas-options=-v", "--ptxas-options=--warn-on-spills", NULL,
};

const char *const *perk_compile_options(void) { return OPTIONS; }

void perk_arch_of_capability(int major, int minor, char arch[16]) {
    snprintf(arch, 16, "sm_%d%d%s", major % 1000, minor % 10, major >= 9 ? "a" : "");
}

void perk_compile_result_free(perk_compile_result *result) {
    free(result->cubin);
    free(result->log);
    *result = (perk_compile_result){0};
}

/* ---- the log ------------------------------------------------------------------------------------ */

typedef enum line_kind { LINE_MORE, LINE_ERROR, LINE_OTHER } line_kind; /* MORE: goes on with what was before */

static bool line_has(const char *line, size_t length, const char *word) {
    return memmem(line, length, word, strlen(word)) != NULL;
}

static line_kind kind_of(const char *line, size_t length) {
    static const char *const errors[] = {": error", "; error",     ": catastrophic error", "; fatal",
                                         ": fatal", "ptxas error", "ptxas fatal"};
    static const char *const others[] = {": warning",
                                         ": remark",
                                         "; warning",
                                         "; info",
                                         "ptxas ",
                                         "Remark:",
                                         "detected in the compilation of",
                                         "Compilation terminated"};
    for (size_t i = 0; i < PERK_COUNT(errors); i++)
        if (line_has(line, length, errors[i])) return LINE_ERROR;
    for (size_t i = 0; i < PERK_COUNT(others); i++)
        if (line_has(line, length, others[i])) return LINE_OTHER;
    return LINE_MORE;
}

/* The errors of a log with the lines that explain them, or the whole log where none is recognised, cut to fit. */
static void excerpt_errors(const char *log, perk_buffer *out) {
    bool keep = false;
    size_t left_out = 0;
    for (const char *line = log; *line;) {
        size_t length = strcspn(line, "\n");
        line_kind kind = kind_of(line, length);
        if (kind != LINE_MORE) keep = kind == LINE_ERROR;
        bool blank = strspn(line, " \t") >= length;
        if (keep && !blank && out->size + length + 1 <= MAX_EXCERPT)
            perk_buffer_printf(out, "\n%.*s", (int)length, line);
        else if (kind == LINE_ERROR)
            left_out++;
        line += length + (line[length] == '\n');
    }
    if (left_out) perk_buffer_printf(out, "\n(and %zu more errors)", left_out);
    if (out->size == 0) perk_buffer_printf(out, "\n%.*s", MAX_EXCERPT, log);
}

/* The number before `unit` in "400 bytes stack frame, 492 bytes spill stores, 480 bytes spill loads". */
static size_t number_before(const char *line, size_t length, const char *unit) {
    const char *at = memmem(line, length, unit, strlen(unit));
    size_t value = 0, scale = 1;
    while (at && at > line && isdigit((unsigned char)at[-1]) && scale <= 1000000000) {
        value += (size_t)(*--at - '0') * scale;
        scale *= 10;
    }
    return value;
}

static void read_log(const perk_compile_request *request, perk_compile_result *result) {
    for (const char *line = result->log; *line;) {
        size_t length = strcspn(line, "\n");
        bool slow = line_has(line, length, "(C75");
        bool warning = slow || line_has(line, length, "warning");
        result->performance_warnings += slow;
        if (line_has(line, length, "bytes stack frame"))
            result->spill_bytes +=
                number_before(line, length, " bytes spill stores") + number_before(line, length, " bytes spill loads");
        if (length)
            perk_log_write(request->log, warning ? PERK_LOG_WARNING : PERK_LOG_DEBUG, "%.*s", (int)length, line);
        line += length + (line[length] == '\n');
    }
}

/* ---- one compile -------------------------------------------------------------------------------- */

typedef struct compile_job {
    const perk_nvrtc *nvrtc;
    const perk_compile_request *request;
    perk_compile_result result;
    nvrtcProgram program;
    perk_error *err;
    perk_status status;
} compile_job;

static perk_status nvrtc_fail(const compile_job *job, nvrtcResult result, const char *doing) {
    perk_status status = result == NVRTC_ERROR_OUT_OF_MEMORY ? PERK_OUT_OF_MEMORY : PERK_COMPILE;
    return perk_fail(job->err, status, "%s: NVRTC %d.%d failed while %s: %s", job->request->name, job->nvrtc->major,
                     job->nvrtc->minor, doing, job->nvrtc->nvrtcGetErrorString(result));
}

static perk_status create_program(compile_job *job) {
    const perk_compile_request *request = job->request;
    size_t count = request->header_count;
    const char **texts = perk_calloc(count, sizeof *texts), **names = perk_calloc(count, sizeof *names);
    perk_status status = PERK_OK;
    if (!texts || !names) {
        status = perk_fail_memory(job->err, "the compiler's headers");
        goto out;
    }
    for (size_t i = 0; i < count; i++) {
        names[i] = request->headers[i].name;
        texts[i] = request->headers[i].text;
    }
    nvrtcResult result =
        job->nvrtc->nvrtcCreateProgram(&job->program, request->source, request->name, (int)count, texts, names);
    if (result != NVRTC_SUCCESS) status = nvrtc_fail(job, result, "taking the source");
out:
    free(texts);
    free(names);
    return status;
}

static perk_status fetch_log(compile_job *job) {
    size_t size = 0;
    nvrtcResult result = job->nvrtc->nvrtcGetProgramLogSize(job->program, &size);
    if (result != NVRTC_SUCCESS) return nvrtc_fail(job, result, "giving its log");
    job->result.log = perk_calloc(size + 1, 1);
    if (!job->result.log) return perk_fail_memory(job->err, "the compiler's log");
    result = size ? job->nvrtc->nvrtcGetProgramLog(job->program, job->result.log) : NVRTC_SUCCESS;
    return result == NVRTC_SUCCESS ? PERK_OK : nvrtc_fail(job, result, "giving its log");
}

static perk_status fetch_cubin(compile_job *job) {
    nvrtcResult result = job->nvrtc->nvrtcGetCUBINSize(job->program, &job->result.cubin_size);
    if (result == NVRTC_SUCCESS && job->result.cubin_size == 0) result = NVRTC_ERROR_INTERNAL_ERROR;
    if (result != NVRTC_SUCCESS) return nvrtc_fail(job, result, "giving the cubin");
    job->result.cubin = perk_calloc(job->result.cubin_size, 1);
    if (!job->result.cubin) return perk_fail_memory(job->err, "the cubin");
    result = job->nvrtc->nvrtcGetCUBIN(job->program, (char *)job->result.cubin);
    return result == NVRTC_SUCCESS ? PERK_OK : nvrtc_fail(job, result, "giving the cubin");
}

/* ptxas names lines of the PTX alone, which NVRTC still has: the first such line tells which instruction it was. */
static void quote_ptx(const compile_job *job, perk_buffer *out) {
    static const char marker[] = "ptx input, line ";
    const char *at = strstr(job->result.log, marker);
    size_t size = 0;
    if (!at || job->nvrtc->nvrtcGetPTXSize(job->program, &size) != NVRTC_SUCCESS || size == 0) return;
    char *ptx = perk_calloc(size + 1, 1);
    if (ptx && job->nvrtc->nvrtcGetPTX(job->program, ptx) == NVRTC_SUCCESS) {
        unsigned long number = strtoul(at + strlen(marker), NULL, 10);
        const char *line = ptx;
        for (unsigned long i = 1; line && i < number; i++)
            if ((line = strchr(line, '\n'))) line++;
        if (line) line += strspn(line, " \t");
        if (line) perk_buffer_printf(out, "\nline %lu of the PTX: %.*s", number, (int)strcspn(line, "\n"), line);
    }
    free(ptx);
}

static perk_status compile_fail(const compile_job *job, nvrtcResult result) {
    const perk_compile_request *request = job->request;
    if (result == NVRTC_ERROR_OUT_OF_MEMORY) return perk_fail_memory(job->err, "the compiler");
    perk_buffer errors = {0};
    excerpt_errors(job->result.log, &errors);
    quote_ptx(job, &errors);
    const char *hint = "";
    if (result == NVRTC_ERROR_BUILTIN_OPERATION_FAILURE)
        hint = "\nlibnvrtc-builtins of the same version must lie beside libnvrtc or on LD_LIBRARY_PATH";
    perk_fail(job->err, PERK_COMPILE, "%s does not compile for %s with NVRTC %d.%d: %s%s%s", request->name,
              request->arch, job->nvrtc->major, job->nvrtc->minor, job->nvrtc->nvrtcGetErrorString(result),
              errors.data && !errors.failed ? errors.data : "", hint);
    perk_buffer_free(&errors);
    return PERK_COMPILE;
}

/* Fills `list` with every option and returns their number. Those added here leave the cubin as it is, or, as for
 * --no-source-include, follow from the request: in-memory headers alone. */
static int list_options(const compile_job *job, const char *arch_option, const char **list) {
    const perk_nvrtc *nvrtc = job->nvrtc;
    bool has_no_cache = nvrtc->major > 12 || nvrtc->minor >= 9; /* 12.4 rejects it */
    int count = 0;
    list[count++] = arch_option;
    list[count++] = "--modify-stack-limit=false";
    list[count++] = "--no-source-include";          /* else a file beside the program could slip in */
    if (has_no_cache) list[count++] = "--no-cache"; /* else it would open the driver */
    for (size_t i = 0; OPTIONS[i]; i++) list[count++] = OPTIONS[i];
    for (size_t i = 0; i < job->request->option_count; i++) list[count++] = job->request->options[i];
    return count;
}

static perk_status compile_program(compile_job *job) {
    const char *options[MAX_OPTIONS + PERK_COUNT(OPTIONS) + 4];
    char arch_option[48];
    snprintf(arch_option, sizeof arch_option, "--gpu-architecture=%s", job->request->arch);
    int count = list_options(job, arch_option, options);
    nvrtcResult result = job->nvrtc->nvrtcCompileProgram(job->program, count, options);
    perk_status status = fetch_log(job);
    if (status != PERK_OK) return status;
    read_log(job->request, &job->result);
    return result == NVRTC_SUCCESS ? fetch_cubin(job) : compile_fail(job, result);
}

static void *run_job(void *user) {
    compile_job *job = user;
    job->status = create_program(job);
    if (job->status == PERK_OK) job->status = compile_program(job);
    if (job->program) job->nvrtc->nvrtcDestroyProgram(&job->program);
    return NULL;
}

static perk_status run_on_own_thread(compile_job *job) {
    pthread_attr_t attributes;
    pthread_t thread;
    if (pthread_attr_init(&attributes) != 0) return perk_fail_memory(job->err, "the compiler's thread");
    int failed = pthread_attr_setstacksize(&attributes, COMPILE_STACK_BYTES);
    if (!failed) failed = pthread_create(&thread, &attributes, run_job, job);
    pthread_attr_destroy(&attributes);
    if (failed)
        return perk_fail(job->err, PERK_OUT_OF_MEMORY, "cannot start the compiler's thread with a stack of %d MiB: %s",
                         COMPILE_STACK_BYTES >> 20, strerror(failed));
    pthread_join(thread, NULL);
    return job->status;
}

static perk_status check_request(const perk_nvrtc *nvrtc, const perk_compile_request *request, perk_error *err) {
    if (!request->source) return perk_fail(err, PERK_INVALID_ARGUMENT, "a compile without source text");
    if (request->header_count > 4096 || request->option_count > MAX_OPTIONS)
        return perk_fail(err, PERK_LIMIT, "%zu headers and %zu options; a compile takes at most 4096 and %d",
                         request->header_count, request->option_count, MAX_OPTIONS);
    for (size_t i = 0; i < request->header_count; i++)
        if (!request->headers[i].name || !request->headers[i].text)
            return perk_fail(err, PERK_INVALID_ARGUMENT, "header %zu of the compile lacks its name or text", i);
    return perk_nvrtc_check_arch(nvrtc, request->arch, err);
}

perk_status perk_compile(const perk_nvrtc *nvrtc, const perk_compile_request *request, perk_compile_result *result,
                         perk_error *err) {
    *result = (perk_compile_result){0};
    perk_status status = check_request(nvrtc, request, err);
    if (status != PERK_OK) return status;
    perk_compile_request named = *request;
    if (!named.name) named.name = "perk.cu";
    compile_job job = {.nvrtc = nvrtc, .request = &named, .err = err};
    double start = perk_now();
    status = run_on_own_thread(&job);
    job.result.milliseconds = (perk_now() - start) * 1e3;
    if (status == PERK_OK)
        *result = job.result;
    else
        perk_compile_result_free(&job.result);
    return status;
}
