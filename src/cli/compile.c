/* perk compile: a model's program for any architecture, ahead of time. */
#include "planning.h"

#include "src/driver.h"
#include "src/plan_shared.h"
#include "src/program.h"

typedef struct compile_command {
    perk_cli_planning planning;
    const char *out, *cache_folder, *programs;
    int32_t program_tokens[PERK_MAX_PROGRAMS]; /* 0: none */
    int no_cache, cache_only, verbose;

    perk_program program;
    double check_ms, total_ms;
} compile_command;

static void add_options(perk_cli_options *options, compile_command *command) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("out", &command->out, "FILE.cubin", "where the cubin goes, besides the cache"),
        PERK_CLI_OPTION_TEXT("cache-dir", &command->cache_folder, "DIR", "the cache to fill"),
        PERK_CLI_OPTION_TEXT("programs", &command->programs, "N,N...",
                             "into the cache, those for smaller steps as well: a start's are 1,8"),
        PERK_CLI_OPTION_FLAG("no-cache", &command->no_cache, "compile anew, keep nothing"),
        PERK_CLI_OPTION_FLAG("cache-only", &command->cache_only, "compile nothing: fail where the cache lacks it"),
        PERK_CLI_OPTION_FLAG("verbose", &command->verbose, "the compiler's log on stderr"),
    };
    perk_cli_add_planning(options, &command->planning);
    perk_cli_add(options, items, (int)PERK_COUNT(items));
}

/* A start on this machine picks its NVRTC by its driver's version: so does this, for a key that such a start finds. */
static int driver_version(void) {
    perk_driver *driver;
    if (perk_driver_open(&driver, NULL) != PERK_OK) return 0;
    int version = driver->version;
    perk_driver_free(driver);
    return version;
}

/* The program of the same model for steps of `tokens`, for the cache alone. */
static perk_status build_smaller(const compile_command *command, int32_t tokens, const perk_program_options *options,
                                 perk_error *err) {
    const perk_plan *plan = command->planning.plan;
    perk_config config = perk_config_for_steps(&plan->config, tokens);
    perk_plan *smaller;
    perk_program program = {0};
    perk_status status = perk_plan_create(&smaller, plan->graph, &plan->device, &config, err);
    if (status) return status;
    status = perk_plan_check(smaller, err);
    if (!status) status = perk_plan_check_shared(smaller, plan, err);
    if (!status) status = perk_program_build(smaller, options, &program, err);
    perk_program_free(&program);
    perk_plan_free(smaller);
    return status;
}

static perk_status build(compile_command *command, perk_error *err) {
    const perk_plan *plan = command->planning.plan;
    perk_log log = perk_cli_log(command->verbose);
    perk_cache_options cache_options = {.folder = command->cache_folder, .disabled = command->no_cache, .log = log};
    perk_program_options options = {.compile_forbidden = command->cache_only, .log = &log};
    double start = perk_now();
    perk_status status = perk_plan_check(plan, err);
    command->check_ms = (perk_now() - start) * 1e3;
    if (!status) status = perk_cache_open(&options.cache, &cache_options, err);
    if (status) return status;
    if (!command->no_cache) options.driver_version = driver_version();
    status = perk_program_build(plan, &options, &command->program, err);
    for (int i = 0; i < PERK_MAX_PROGRAMS && !status; i++)
        if (command->program_tokens[i]) status = build_smaller(command, command->program_tokens[i], &options, err);
    perk_cache_free(options.cache);
    return status;
}

static int print_json(const compile_command *command) {
    const perk_cli_planning *planning = &command->planning;
    const perk_program *program = &command->program;
    const perk_cubin_kernel_info *kernel = &program->kernel;
    char key[PERK_CACHE_KEY_HEX_SIZE];
    perk_cache_key_hex(&program->key, key);
    json_t *ms = json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "graph", planning->graph_ms, "plan",
                           planning->plan_ms, "check", command->check_ms, "emit", program->emit_ms, "lookup",
                           program->lookup_ms, "compile", program->compile_ms, "total", command->total_ms);
    json_t *json = json_pack(
        "{s:s, s:i, s:s, s:s, s:b, s:o, s:i, s:i, s:i, s:i, s:I, s:i, s:I, s:I, s:I}", "arch",
        planning->plan->device.arch, "workers", planning->plan->device.worker_count, "nvrtc", program->nvrtc, "key",
        key, "cache_hit", program->cache_hit, "ms", ms, "registers", (int)kernel->registers, "stack_bytes",
        (int)kernel->stack_bytes, "shared_bytes", planning->plan->shared_bytes, "static_shared_bytes",
        (int)kernel->shared_bytes, "spill_bytes", (json_int_t)program->spill_bytes, "spill_instructions",
        (int)kernel->spill_instructions, "source_bytes", (json_int_t)program->source_bytes, "code_bytes",
        (json_int_t)kernel->code_bytes, "cubin_bytes", (json_int_t)program->cubin_size);
    return perk_cli_print_json(json) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

static int print_report(const compile_command *command) {
    const perk_cli_planning *planning = &command->planning;
    const perk_program *program = &command->program;
    const perk_plan *plan = planning->plan;
    char key[PERK_CACHE_KEY_HEX_SIZE];
    perk_cache_key_hex(&program->key, key);
    printf("%s, %d workers: %u registers, %zu bytes spilled, %d bytes of shared memory, code %llu bytes, cubin %zu "
           "bytes\n",
           plan->device.arch, plan->device.worker_count, program->kernel.registers, program->spill_bytes,
           plan->shared_bytes, (unsigned long long)program->kernel.code_bytes, program->cubin_size);
    printf("%s, key %s\n", program->cache_hit ? "from the cache" : "compiled", key);
    printf("graph %.1f ms, plan %.1f, check %.1f, emit %.1f, lookup %.1f, compile %.1f, total %.1f\n",
           planning->graph_ms, planning->plan_ms, command->check_ms, program->emit_ms, program->lookup_ms,
           program->compile_ms, command->total_ms);
    return PERK_EXIT_OK;
}

int perk_cli_compile(const perk_cli_command *self, int argc, char **argv) {
    double start = perk_now();
    compile_command command = {0};
    perk_cli_options options = {0};
    add_options(&options, &command);
    int code = perk_cli_parse(self, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    if (!command.planning.path) return perk_cli_usage(self, "--model is missing");
    if (command.no_cache && command.cache_only) return perk_cli_usage(self, "--cache-only goes without --no-cache");
    perk_error err = {0};
    if (command.programs && perk_cli_programs_parse(command.programs, command.program_tokens, &err))
        return perk_cli_usage(self, "--programs: %s", err.message);
    perk_status status = perk_cli_make_plan(&command.planning, &err);
    if (!status) status = build(&command, &err);
    if (!status && command.out)
        status = perk_cli_write_file(command.out, command.program.cubin, command.program.cubin_size, &err);
    command.total_ms = (perk_now() - start) * 1e3;
    if (status)
        code = perk_cli_fail(&err);
    else
        code = command.planning.json ? print_json(&command) : print_report(&command);
    perk_program_free(&command.program);
    perk_cli_planning_free(&command.planning);
    return code;
}
