/* perk, the command line: what its commands share.
 *
 * A command is a row in main.c's table and a function in a file of its own. It declares its options in an array, has
 * them parsed by perk_cli_parse, and returns an exit code. Results go to stdout, everything else to stderr. */
#ifndef PERK_SRC_CLI_CLI_H
#define PERK_SRC_CLI_CLI_H

#include "src/base.h"

#include "perk/engine.h"

#include <jansson.h>
#include <stdio.h>

/* Exit codes; perk --help documents them. PERK_EXIT_GO_ON never leaves the program: parsing is done, run the command.
 */
enum { PERK_EXIT_OK = 0, PERK_EXIT_FAILURE = 1, PERK_EXIT_USAGE = 2, PERK_EXIT_GO_ON = -1 };

typedef struct perk_cli_command {
    const char *name;
    const char *summary; /* one line */
    const char *usage;   /* after "perk NAME ", several forms in lines */
    const char *details; /* paragraphs of the help, or NULL */
    const char *examples;
    int (*run)(const struct perk_cli_command *self, int argc, char **argv); /* argv: after the command's name */
} perk_cli_command;

typedef enum perk_cli_kind {
    PERK_CLI_FLAG,   /* int: set to 1 */
    PERK_CLI_INT,    /* int32_t within [min, max] */
    PERK_CLI_SEED,   /* uint64_t */
    PERK_CLI_BYTES,  /* uint64_t: 1000, 64K, 16M, 2G */
    PERK_CLI_FLOAT,  /* float within [min, max] */
    PERK_CLI_TEXT,   /* const char *, borrowed from argv */
    PERK_CLI_CHOICE, /* int: index in `choices` */
} perk_cli_kind;

typedef struct perk_cli_option {
    const char *name; /* without the dashes: "max-tokens" */
    perk_cli_kind kind;
    void *target;        /* of the kind's type; left alone when the option is absent */
    const char *value;   /* what help calls the value: "N" */
    const char *help;    /* one line */
    double min, max;     /* numbers; both 0: any */
    const char *choices; /* "auto|bf16|fp32" */
} perk_cli_option;

typedef struct perk_cli_arguments {
    char **items; /* what is no option, in order; borrowed from argv */
    int count;
} perk_cli_arguments;

/* Rows of an options array; the compiler checks the target's type. */
#define PERK_CLI_TARGET(type, target) (1 ? (target) : (type *)0)
#define PERK_CLI_OPTION_FLAG(name, target, help)                                                                       \
    { name, PERK_CLI_FLAG, PERK_CLI_TARGET(int, target), NULL, help, 0, 0, NULL }
#define PERK_CLI_OPTION_INT(name, target, value, help, min, max)                                                       \
    { name, PERK_CLI_INT, PERK_CLI_TARGET(int32_t, target), value, help, min, max, NULL }
#define PERK_CLI_OPTION_SEED(name, target, help)                                                                       \
    { name, PERK_CLI_SEED, PERK_CLI_TARGET(uint64_t, target), "N", help, 0, 0, NULL }
#define PERK_CLI_OPTION_BYTES(name, target, help)                                                                      \
    { name, PERK_CLI_BYTES, PERK_CLI_TARGET(uint64_t, target), "SIZE", help, 0, 0, NULL }
#define PERK_CLI_OPTION_FLOAT(name, target, value, help, min, max)                                                     \
    { name, PERK_CLI_FLOAT, PERK_CLI_TARGET(float, target), value, help, min, max, NULL }
#define PERK_CLI_OPTION_TEXT(name, target, value, help)                                                                \
    { name, PERK_CLI_TEXT, PERK_CLI_TARGET(const char *, target), value, help, 0, 0, NULL }
#define PERK_CLI_OPTION_CHOICE(name, target, choices, help)                                                            \
    { name, PERK_CLI_CHOICE, PERK_CLI_TARGET(int, target), NULL, help, 0, 0, choices }

enum { PERK_CLI_MAX_OPTIONS = 48 };

/* A list that commands put together from shared and own groups. */
typedef struct perk_cli_options {
    perk_cli_option items[PERK_CLI_MAX_OPTIONS];
    int count;
} perk_cli_options;
void perk_cli_add(perk_cli_options *options, const perk_cli_option *items, int count);

/* Fills the targets. --help prints the command's help and gives PERK_EXIT_OK; a mistake prints what is wrong and gives
 * PERK_EXIT_USAGE; else PERK_EXIT_GO_ON. More than `max_arguments` arguments are a mistake. */
int perk_cli_parse(const perk_cli_command *command, const perk_cli_options *options, int argc, char **argv,
                   int max_arguments, perk_cli_arguments *arguments);

/* The name of `names` nearest to `wrong`, or NULL when none is near. */
const char *perk_cli_nearest(const char *wrong, const char *const *names, int count);

/* ---- messages (common.c) ---- */

void perk_cli_error(const char *format, ...) PERK_PRINTF(1, 2); /* "perk: ..." on stderr */
/* A mistake in the use of `command`, with a hint at its help; returns PERK_EXIT_USAGE. */
int perk_cli_usage(const perk_cli_command *command, const char *format, ...) PERK_PRINTF(2, 3);
/* Prints the error of a failed call; returns PERK_EXIT_FAILURE. */
int perk_cli_fail(const perk_error *err);
/* Flushes stdout; an error there (a full disk, a closed pipe) becomes PERK_EXIT_FAILURE. */
int perk_cli_finish(int exit_code);
/* One JSON value in one line on stdout; frees `value`. False, with a message, when it is NULL (out of memory). */
bool perk_cli_print_json(json_t *value);

/* Warnings, with `verbose` all of the log, on stderr. */
perk_log perk_cli_log(int verbose);
/* A bar on stderr when that is a terminal, else nothing. */
perk_progress perk_cli_progress(void);

/* ---- the engine's options (common.c) ---- */

typedef struct perk_cli_engine {
    const char *model, *programs;
    int backend, precision; /* as in perk_engine_options */
    int random_weights, portable, unchecked, no_cache, verbose, json;
    perk_engine_options options;
} perk_cli_engine;

/* In the order of perk_mode. */
#define PERK_CLI_MODES "single|completion|online"

void perk_cli_add_engine(perk_cli_options *options, perk_cli_engine *engine);
/* Opens what the options say, and prints the start report with --verbose. `command` is for messages. Returns
 * PERK_EXIT_GO_ON, else the exit code after a message. */
int perk_cli_open(const perk_cli_command *command, perk_cli_engine *engine, perk_engine **out);
json_t *perk_cli_report_json(const perk_start_report *report);
/* Sizes of steps, as "1,8". */
perk_status perk_cli_programs_parse(const char *text, int32_t tokens[PERK_MAX_PROGRAMS], perk_error *err);
/* The steps that each program of the report has run. */
json_t *perk_cli_program_steps_json(const perk_engine *engine);

/* ---- ids and lines (common.c) ---- */

typedef struct perk_cli_ids {
    int32_t *items;
    size_t count, capacity;
} perk_cli_ids;
void perk_cli_ids_free(perk_cli_ids *ids);
/* Appends numbers that are separated by commas and white space. */
perk_status perk_cli_ids_parse(perk_cli_ids *ids, const char *text, perk_error *err);
/* Appends a JSON list of numbers. */
perk_status perk_cli_ids_from_json(perk_cli_ids *ids, const json_t *list, perk_error *err);
/* Reads a stream to its end. */
perk_status perk_cli_read_all(FILE *file, perk_buffer *text, perk_error *err);
/* The same of a file, or of stdin where `path` is "-". */
perk_status perk_cli_read_file(const char *path, perk_buffer *text, perk_error *err);
/* Makes the file, or replaces what is in it. */
perk_status perk_cli_write_file(const char *path, const void *data, size_t size, perk_error *err);

/* ---- requests and answers (common.c, prompts.c) ---- */

const char *perk_cli_finish_name(perk_finish finish); /* "stop", ... */
/* A list of {"role", "content"} in the model's chat format, ending where the answer begins; free() releases `*text`. */
perk_status perk_cli_chat_text(const perk_tokenizer *tokenizer, const json_t *list, char **text, perk_error *err);
/* What became of a finished request. */
perk_status perk_cli_answer_json(const perk_engine *engine, const perk_request *request, json_t **out, perk_error *err);
/* Answers a request a line of the file, which is text as perk run --help describes it, with a line each on stdout.
 * Returns the exit code. */
int perk_cli_run_prompts(perk_engine *engine, const perk_buffer *file, const perk_sampling *defaults);

/* ---- the commands, one file each ---- */

int perk_cli_run(const perk_cli_command *self, int argc, char **argv);
int perk_cli_tokenize(const perk_cli_command *self, int argc, char **argv);
int perk_cli_logits(const perk_cli_command *self, int argc, char **argv);
int perk_cli_compile(const perk_cli_command *self, int argc, char **argv);
int perk_cli_plan(const perk_cli_command *self, int argc, char **argv);
int perk_cli_cache(const perk_cli_command *self, int argc, char **argv);
int perk_cli_doctor(const perk_cli_command *self, int argc, char **argv);
int perk_cli_bench(const perk_cli_command *self, int argc, char **argv);
int perk_cli_profile(const perk_cli_command *self, int argc, char **argv);
int perk_cli_test_op(const perk_cli_command *self, int argc, char **argv);

#endif
