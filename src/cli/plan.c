/* perk plan: the graph and the plan as text, JSON or a page, or the source made from them. */
#include "planning.h"

#include "jit/emit.h"
#include "src/plan_page.h"
#include "src/plan_print.h"

typedef struct plan_command {
    perk_cli_planning planning;
    const char *html;
    int source, tasks;
    int32_t context, bandwidth; /* of the step whose times are expected; GB/s, 0: as of the architecture */
} plan_command;

static void add_options(perk_cli_options *options, plan_command *command) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_FLAG("source", &command->source, "print the CUDA source of the kernel instead"),
        PERK_CLI_OPTION_FLAG("tasks", &command->tasks, "with --json: an entry a task, too"),
        PERK_CLI_OPTION_TEXT("html", &command->html, "FILE", "draw it: a page with the tasks in their expected times"),
        PERK_CLI_OPTION_INT("context", &command->context, "N", "with --html: positions before the step", 1, 1 << 24),
        PERK_CLI_OPTION_INT("bandwidth", &command->bandwidth, "N", "with --html: GB/s to assume; else by --arch", 1,
                            1000000),
    };
    perk_cli_add_planning(options, &command->planning);
    perk_cli_add(options, items, (int)PERK_COUNT(items));
}

static perk_status write_page(const plan_command *command, perk_error *err) {
    const perk_page_step step = {.name = "decode",
                                 .load = {.context = command->context, .bandwidth = command->bandwidth * 1e9}};
    perk_buffer page = {0};
    perk_status status = perk_plan_page(command->planning.plan, command->planning.path, &step, 1, &page, err);
    if (status == PERK_OK) status = perk_cli_write_file(command->html, page.data, page.size, err);
    perk_buffer_free(&page);
    return status;
}

static perk_status print_plan(const plan_command *command, perk_error *err) {
    const perk_cli_planning *planning = &command->planning;
    perk_plan_format format = command->tasks   ? PERK_PLAN_JSON_AND_TASKS
                              : planning->json ? PERK_PLAN_JSON
                                               : PERK_PLAN_TEXT;
    perk_buffer text = {0};
    perk_status status = command->source ? perk_emit_source(planning->plan, &text, err)
                                         : perk_plan_print(planning->plan, format, &text, err);
    if (status == PERK_OK) fwrite(text.data, 1, text.size, stdout);
    perk_buffer_free(&text);
    return status;
}

int perk_cli_plan(const perk_cli_command *self, int argc, char **argv) {
    plan_command command = {.context = 512};
    perk_cli_options options = {0};
    add_options(&options, &command);
    int code = perk_cli_parse(self, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    if (!command.planning.path) return perk_cli_usage(self, "--model is missing");
    if (command.source && command.planning.json) return perk_cli_usage(self, "--source goes without --json");
    if (command.tasks && !command.planning.json) return perk_cli_usage(self, "--tasks needs --json");
    if (command.html && (command.source || command.planning.json))
        return perk_cli_usage(self, "--html goes without --source and --json");
    perk_error err = {0};
    perk_status status = perk_cli_make_plan(&command.planning, &err);
    if (!status) status = command.html ? write_page(&command, &err) : print_plan(&command, &err);
    code = status ? perk_cli_fail(&err) : PERK_EXIT_OK;
    perk_cli_planning_free(&command.planning);
    return code;
}
