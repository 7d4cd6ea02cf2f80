/* perk plan: the graph and the plan as text or JSON, or the source made from them. */
#include "planning.h"

#include "jit/emit.h"
#include "src/plan_print.h"

int perk_cli_plan(const perk_cli_command *self, int argc, char **argv) {
    perk_cli_planning planning = {0};
    int source = 0, tasks = 0;
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_FLAG("source", &source, "print the CUDA source of the kernel instead"),
        PERK_CLI_OPTION_FLAG("tasks", &tasks, "with --json: an entry a task, too"),
    };
    perk_cli_options options = {0};
    perk_cli_add_planning(&options, &planning);
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    int code = perk_cli_parse(self, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    if (!planning.path) return perk_cli_usage(self, "--model is missing");
    if (source && planning.json) return perk_cli_usage(self, "--source goes without --json");
    if (tasks && !planning.json) return perk_cli_usage(self, "--tasks needs --json");
    perk_plan_format format = tasks ? PERK_PLAN_JSON_AND_TASKS : planning.json ? PERK_PLAN_JSON : PERK_PLAN_TEXT;
    perk_error err = {0};
    perk_buffer text = {0};
    perk_status status = perk_cli_make_plan(&planning, &err);
    if (!status && source) status = perk_emit_source(planning.plan, &text, &err);
    if (!status && !source) status = perk_plan_print(planning.plan, format, &text, &err);
    if (!status) fwrite(text.data, 1, text.size, stdout);
    code = status ? perk_cli_fail(&err) : PERK_EXIT_OK;
    perk_buffer_free(&text);
    perk_cli_planning_free(&planning);
    return code;
}
