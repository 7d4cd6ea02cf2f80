/* From source to cubin: the key, the cache, the compiler, and a second try where the first one spills. */
#include "program.h"

#include "jit/emit.h"

/* Goes up when the same source, options and NVRTC would give another cubin than before, as by a change of the second
 * try below. */
static const char FORMAT[] = "perk program 1";

/* ptxas's scheduler hides latencies with registers; told to do less, it sometimes gets by without spilling. */
static const char *const SPILL_OPTIONS[] = {"--ptxas-options=-O1"};

typedef struct build {
    const perk_program_source *source;
    const perk_program_options *options;
    perk_nvrtc_identity nvrtc;
    perk_error nvrtc_absent; /* why none was identified */
    double compile_ms;
} build;

/* ---- keys ---- */

static void add_text(perk_cache_key_builder *key, const char *name, const char *text) {
    perk_cache_key_add(key, name, text, strlen(text));
}

static perk_status make_key(const perk_program_source *source, const char *nvrtc, perk_cache_key *out,
                            perk_error *err) {
    perk_cache_key_builder *key = perk_cache_key_begin();
    add_text(key, "format", FORMAT);
    add_text(key, "nvrtc", nvrtc);
    add_text(key, "arch", source->arch);
    for (const char *const *option = perk_compile_options(); *option; option++) add_text(key, "option", *option);
    for (size_t i = 0; i < PERK_COUNT(SPILL_OPTIONS); i++) add_text(key, "spill option", SPILL_OPTIONS[i]);
    add_text(key, "kernel", source->kernel);
    add_text(key, "name", source->name);
    add_text(key, "source", source->text);
    for (size_t i = 0; i < source->header_count; i++) {
        add_text(key, "header", source->headers[i].name);
        add_text(key, "text", source->headers[i].text);
    }
    return perk_cache_key_finish(key, out, err);
}

/* ---- compiling ---- */

typedef struct attempt {
    perk_compile_result result;
    perk_cubin_kernel_info info;
} attempt;

static perk_status compile_once(const build *b, const perk_nvrtc *nvrtc, const char *const *options, size_t count,
                                attempt *out, perk_error *err) {
    *out = (attempt){0};
    perk_compile_request request = {.source = b->source->text,
                                    .name = b->source->name,
                                    .headers = b->source->headers,
                                    .header_count = b->source->header_count,
                                    .arch = b->source->arch,
                                    .options = options,
                                    .option_count = count,
                                    .log = b->options->log};
    perk_status status = perk_compile(nvrtc, &request, &out->result, err);
    if (status) return status;
    status = perk_cubin_info(out->result.cubin, out->result.cubin_size, b->source->kernel, &out->info, err);
    if (status) perk_compile_result_free(&out->result);
    return status;
}

static bool is_spilling(const attempt *a) { return a->result.spill_bytes > 0 || a->info.frame_bytes > 0; }

static bool is_better(const attempt *a, const attempt *than) {
    if (a->result.spill_bytes != than->result.spill_bytes) return a->result.spill_bytes < than->result.spill_bytes;
    return a->info.frame_bytes < than->info.frame_bytes;
}

static perk_status compile_best(const build *b, const perk_nvrtc *nvrtc, attempt *best, perk_error *err) {
    attempt second;
    perk_status status = compile_once(b, nvrtc, NULL, 0, best, err);
    if (status || !is_spilling(best)) return status;
    if (compile_once(b, nvrtc, SPILL_OPTIONS, PERK_COUNT(SPILL_OPTIONS), &second, NULL) != PERK_OK) return PERK_OK;
    bool better = is_better(&second, best);
    perk_log_write(b->options->log, PERK_LOG_INFO,
                   "%s for %s: %zu bytes spilled and a frame of %u bytes; with %s %zu and %u: the %s is kept",
                   b->source->name, b->source->arch, best->result.spill_bytes, best->info.frame_bytes, SPILL_OPTIONS[0],
                   second.result.spill_bytes, second.info.frame_bytes, better ? "second" : "first");
    attempt *worse = better ? best : &second;
    perk_compile_result_free(&worse->result);
    if (better) *best = second;
    return PERK_OK;
}

static perk_status check_permission(const build *b, perk_error *err) {
    if (b->options->compile_forbidden)
        return perk_fail(
            err, PERK_NOT_FOUND,
            "%s for %s is not in the cubin cache, and compiling is forbidden; compile it ahead of time with "
            "the same perk, model, configuration and NVRTC",
            b->source->name, b->source->arch);
    if (b->nvrtc.found) return PERK_OK;
    if (err) *err = b->nvrtc_absent;
    return perk_fail_prefix(err, PERK_NO_COMPILER, "%s for %s is not in the cubin cache", b->source->name,
                            b->source->arch);
}

/* Also stores what it makes under the alias, for a start where there is no NVRTC. */
static perk_status make_cubin(void *user, perk_cache_blob *out, perk_error *err) {
    build *b = user;
    perk_nvrtc *nvrtc = NULL;
    perk_cache_key alias;
    attempt best;
    double start = perk_now();
    perk_status status = check_permission(b, err);
    if (!status) status = perk_nvrtc_open(&nvrtc, &b->nvrtc, err);
    if (!status) status = compile_best(b, nvrtc, &best, err);
    b->compile_ms = (perk_now() - start) * 1e3;
    perk_nvrtc_free(nvrtc);
    if (status) return status;
    *out = (perk_cache_blob){best.result.cubin, best.result.cubin_size};
    best.result.cubin = NULL;
    perk_compile_result_free(&best.result);
    if (b->options->cache && make_key(b->source, PERK_NVRTC_ANY, &alias, NULL) == PERK_OK)
        perk_cache_store(b->options->cache, &alias, out->data, out->size);
    return PERK_OK;
}

/* ---- building ---- */

/* Compiles in spite of what the cache holds, and puts the result in its place. */
static perk_status make_anew(build *b, const perk_cache_key *key, perk_cache_blob *blob, perk_error *err) {
    perk_status status = make_cubin(b, blob, err);
    if (!status) perk_cache_store(b->options->cache, key, blob->data, blob->size);
    return status;
}

/* The cubin of `key`. An entry that is whole and yet no such cubin was put there by something else: it is replaced. */
static perk_status get_cubin(build *b, const perk_cache_key *key, perk_cache_blob *blob, perk_program *out,
                             perk_error *err) {
    int hit = 0;
    perk_error unreadable = {0};
    perk_status status = b->options->made_anew
                             ? make_anew(b, key, blob, err)
                             : perk_cache_get_or_make(b->options->cache, key, make_cubin, b, blob, &hit, err);
    if (status) return status;
    out->cache_hit = hit;
    status = perk_cubin_info(blob->data, blob->size, b->source->kernel, &out->kernel, &unreadable);
    if (status && hit) {
        perk_log_write(b->options->log, PERK_LOG_WARNING, "the cached program is made anew: %s", unreadable.message);
        perk_cache_blob_free(blob);
        out->cache_hit = false;
        status = make_anew(b, key, blob, err);
        if (status) return status;
        status = perk_cubin_info(blob->data, blob->size, b->source->kernel, &out->kernel, &unreadable);
    }
    if (status && err) *err = unreadable;
    return status;
}

perk_status perk_program_build_source(const perk_program_source *source, const perk_program_options *options,
                                      perk_program *out, perk_error *err) {
    *out = (perk_program){0};
    if (!source->text || !source->arch || !source->kernel)
        return perk_fail(err, PERK_INVALID_ARGUMENT,
                         "a program needs source text, an architecture and a kernel's name");
    perk_program_source named = *source;
    if (!named.name) named.name = "program.cu";
    double start = perk_now();
    build b = {.source = &named, .options = options};
    perk_cache_blob blob = {0};
    perk_nvrtc_identify(options->driver_version, &b.nvrtc, &b.nvrtc_absent);
    memcpy(out->nvrtc, b.nvrtc.path, sizeof out->nvrtc);
    perk_status status = make_key(&named, b.nvrtc.build_id, &out->key, err);
    if (!status) status = get_cubin(&b, &out->key, &blob, out, err);
    if (status) {
        perk_cache_blob_free(&blob);
        *out = (perk_program){0};
        return status;
    }
    out->cubin = blob.data;
    out->cubin_size = blob.size;
    out->source_bytes = strlen(named.text);
    out->spill_bytes = out->kernel.frame_bytes;
    out->compile_ms = b.compile_ms;
    out->lookup_ms = (perk_now() - start) * 1e3 - b.compile_ms;
    return PERK_OK;
}

perk_status perk_program_build(const perk_plan *plan, const perk_program_options *options, perk_program *out,
                               perk_error *err) {
    *out = (perk_program){0};
    perk_buffer text = {0};
    perk_compile_header *headers = NULL;
    size_t header_count = 0;
    double start = perk_now();
    perk_status status = perk_emit_source(plan, &text, err);
    if (!status) status = perk_emit_headers(&headers, &header_count, err);
    double emit_ms = (perk_now() - start) * 1e3;
    if (!status) {
        perk_program_source source = {.text = text.data,
                                      .headers = headers,
                                      .header_count = header_count,
                                      .arch = plan->device.arch,
                                      .kernel = PERK_KERNEL_NAME};
        status = perk_program_build_source(&source, options, out, err);
        out->emit_ms = status ? 0 : emit_ms;
    }
    if (headers) perk_emit_headers_free(headers, header_count);
    perk_buffer_free(&text);
    return status;
}

void perk_program_free(perk_program *program) {
    if (!program) return;
    free(program->cubin);
    *program = (perk_program){0};
}
