/* perk run: a prompt, a chat, or token ids; text as it is made. */
#include "activations.h"
#include "cli.h"

#include <unistd.h>

typedef struct run_options {
    perk_cli_engine engine;
    perk_sampling sampling;
    const char *prompt, *system, *tokens, *prompts, *stop;
    int chat, ignore_eos, logprobs, mode;
    perk_cli_dump dump;
} run_options;

/* What one answer leaves behind. */
typedef struct run_answer {
    perk_buffer text;
    perk_cli_ids ids; /* only `items` and `count` */
    perk_generation generation;
    uint64_t found; /* positions of the prompt, in pages of earlier turns */
    bool failed;
} run_answer;

static int parse(const perk_cli_command *command, run_options *run, int argc, char **argv) {
    const perk_cli_option items[] = {
        PERK_CLI_OPTION_TEXT("prompt", &run->prompt, "TEXT", "the text to go on from; with --chat, one turn"),
        PERK_CLI_OPTION_FLAG("chat", &run->chat, "in the model's chat format"),
        PERK_CLI_OPTION_TEXT("system", &run->system, "TEXT", "system message of the chat"),
        PERK_CLI_OPTION_TEXT("tokens", &run->tokens, "1,2,3", "a prompt of raw token ids"),
        PERK_CLI_OPTION_TEXT("prompts", &run->prompts, "FILE", "a request a line in JSON; -: stdin"),
        PERK_CLI_OPTION_CHOICE("mode", &run->mode, PERK_CLI_MODES, "steps on a GPU: a launch each, or many"),
        PERK_CLI_OPTION_INT("max-tokens", &run->sampling.max_tokens, "N", "of the answer; 0: as many as fit", 0,
                            INT32_MAX),
        PERK_CLI_OPTION_FLOAT("temperature", &run->sampling.temperature, "T", "0: greedy (the default)", 0, 1e6),
        PERK_CLI_OPTION_INT("top-k", &run->sampling.top_k, "K", "the K likeliest tokens; 0: all", 0, INT32_MAX),
        PERK_CLI_OPTION_FLOAT("top-p", &run->sampling.top_p, "P", "the likeliest with this share; 0 or 1: all", 0, 1),
        PERK_CLI_OPTION_FLOAT("min-p", &run->sampling.min_p, "P", "at least this fraction of the likeliest", 0, 1),
        PERK_CLI_OPTION_FLOAT("repetition-penalty", &run->sampling.repetition_penalty, "R",
                              "of tokens seen before; 0 or 1: none", 0, 100),
        PERK_CLI_OPTION_FLOAT("presence-penalty", &run->sampling.presence_penalty, "A", "of tokens of the answer", -2,
                              2),
        PERK_CLI_OPTION_FLOAT("frequency-penalty", &run->sampling.frequency_penalty, "A",
                              "of tokens of the answer, each time", -2, 2),
        PERK_CLI_OPTION_SEED("seed", &run->sampling.seed, "of sampling: same seed, same tokens"),
        PERK_CLI_OPTION_FLAG("ignore-eos", &run->ignore_eos, "go on after the model's end tokens"),
        PERK_CLI_OPTION_TEXT("stop", &run->stop, "TEXT", "ends the answer, which is printed up to it"),
        PERK_CLI_OPTION_FLAG("logprobs", &run->logprobs, "with --json or --prompts: the tokens' log probabilities"),
        PERK_CLI_OPTION_INT("top-logprobs", &run->sampling.top_logprobs, "N", "and those of the N likeliest", 0,
                            PERK_MAX_TOP_LOGPROBS),
    };
    perk_cli_options options = {0};
    perk_cli_add(&options, items, (int)PERK_COUNT(items));
    perk_cli_add_dump(&options, &run->dump);
    perk_cli_add_engine(&options, &run->engine);
    int code = perk_cli_parse(command, &options, argc, argv, 0, NULL);
    if (code != PERK_EXIT_GO_ON) return code;
    run->sampling.ignore_eos = run->ignore_eos;
    run->sampling.logprobs = run->logprobs;
    run->sampling.stop_strings = &run->stop;
    run->sampling.stop_string_count = run->stop != NULL;
    run->engine.options.mode = (perk_mode)run->mode;
    if (run->tokens && (run->prompt || run->chat))
        return perk_cli_usage(command, "--tokens goes with neither --prompt nor --chat");
    if (run->prompts && (run->tokens || run->prompt || run->chat))
        return perk_cli_usage(command, "--prompts goes with none of --prompt, --chat and --tokens");
    if (!run->tokens && !run->prompt && !run->chat && !run->prompts)
        return perk_cli_usage(command, "nothing to run: give --prompt, --chat, --tokens or --prompts");
    if (run->system && !run->chat) return perk_cli_usage(command, "--system needs --chat");
    if (run->engine.json && run->chat && !run->prompt)
        return perk_cli_usage(command, "--json with --chat needs --prompt");
    if (run->logprobs && !run->engine.json && !run->prompts)
        return perk_cli_usage(command, "--logprobs needs --json or --prompts");
    if (run->sampling.top_logprobs && !run->logprobs) return perk_cli_usage(command, "--top-logprobs needs --logprobs");
    return PERK_EXIT_GO_ON;
}

/* ---- one answer, as it is made ---- */

static int take_token(void *user, int32_t token, const char *text, size_t size) {
    run_answer *answer = user;
    perk_buffer_append(&answer->text, text, size);
    if (answer->ids.count == answer->ids.capacity) {
        size_t capacity = PERK_MAX(answer->ids.capacity * 2, (size_t)64);
        int32_t *items = perk_realloc_array(answer->ids.items, capacity, sizeof *items);
        if (!items) return answer->failed = true;
        answer->ids.items = items;
        answer->ids.capacity = capacity;
    }
    answer->ids.items[answer->ids.count++] = token;
    if (size) {
        fwrite(text, 1, size, stdout);
        fflush(stdout);
    }
    return answer->text.failed || ferror(stdout);
}

static void answer_free(run_answer *answer) {
    perk_buffer_free(&answer->text);
    perk_cli_ids_free(&answer->ids);
}

static perk_status generate(perk_engine *engine, const run_options *run, const int32_t *ids, size_t count,
                            run_answer *answer, perk_error *err) {
    perk_engine_stats before, after;
    perk_engine_statistics(engine, &before);
    perk_status status =
        perk_engine_generate(engine, ids, count, &run->sampling, take_token, answer, &answer->generation, err);
    perk_engine_statistics(engine, &after);
    answer->found = after.found_tokens - before.found_tokens;
    if (!status && (answer->failed || answer->text.failed)) status = perk_fail_memory(err, "the answer");
    return status;
}

/* Without a tokenizer there is no text: the ids are the result. */
static void print_ids(const run_answer *answer) {
    for (size_t i = 0; i < answer->ids.count; i++) printf("%s%d", i ? " " : "", answer->ids.items[i]);
}

static void print_answer(const perk_engine *engine, const run_options *run, const run_answer *answer) {
    if (!perk_engine_tokenizer(engine)) print_ids(answer);
    putchar('\n');
    const perk_generation *generation = &answer->generation;
    if (run->engine.verbose)
        perk_cli_error("prompt %d tokens, %llu of them known, in %.1f ms; then %d tokens in %.1f ms",
                       generation->prompt_tokens, (unsigned long long)answer->found, generation->prefill_ms,
                       generation->tokens, generation->decode_ms);
}

static perk_status run_to_text(perk_engine *engine, const run_options *run, const perk_cli_ids *ids, perk_error *err) {
    run_answer answer = {0};
    perk_status status = generate(engine, run, ids->items, ids->count, &answer, err);
    if (!status)
        print_answer(engine, run, &answer);
    else if (answer.text.size)
        putchar('\n');
    answer_free(&answer);
    return status;
}

/* ---- one answer as JSON ---- */

static perk_status run_to_json(perk_engine *engine, const run_options *run, const perk_cli_ids *ids, json_t **out,
                               perk_error *err) {
    perk_request *request;
    perk_status status = perk_engine_submit(engine, ids->items, ids->count, &run->sampling, &request, err);
    while (!status && perk_request_finish(request) == PERK_FINISH_NONE) status = perk_engine_step(engine, NULL, err);
    if (!status) status = perk_cli_answer_json(engine, request, out, err);
    perk_request_free(request);
    if (status) return status;
    json_object_set_new(*out, "start", perk_cli_report_json(perk_engine_report(engine)));
    json_object_set_new(*out, "program_steps", perk_cli_program_steps_json(engine));
    return PERK_OK;
}

/* ---- prompts ---- */

static perk_status encode(const perk_engine *engine, const char *text, int add_special_tokens, perk_cli_ids *ids,
                          perk_error *err) {
    const perk_tokenizer *tokenizer = perk_engine_tokenizer(engine);
    if (!tokenizer)
        return perk_fail(err, PERK_NOT_FOUND, "the model has no usable tokenizer.json: use --tokens with token ids");
    perk_encode_options options = {.add_special_tokens = add_special_tokens, .parse_special = 1};
    return perk_tokenizer_encode(tokenizer, text, strlen(text), &options, &ids->items, &ids->count, err);
}

static perk_status encode_chat(const perk_engine *engine, const perk_chat_message *messages, size_t count,
                               perk_cli_ids *ids, perk_error *err) {
    const perk_tokenizer *tokenizer = perk_engine_tokenizer(engine);
    if (!tokenizer) return perk_fail(err, PERK_NOT_FOUND, "the model has no usable tokenizer.json: --chat needs one");
    char *text;
    perk_status status = perk_chat_format(tokenizer, messages, count, 1, &text, err);
    if (status) return status;
    status = encode(engine, text, 0, ids, err); /* the text brings its special tokens */
    free(text);
    return status;
}

static perk_status read_prompt(const perk_engine *engine, const run_options *run, perk_cli_ids *ids, perk_error *err) {
    if (run->tokens) return perk_cli_ids_parse(ids, run->tokens, err);
    if (!run->chat) return encode(engine, run->prompt, 1, ids, err);
    perk_chat_message messages[2] = {{"system", run->system}, {"user", run->prompt}};
    return encode_chat(engine, messages + !run->system, 1 + (run->system != NULL), ids, err);
}

static int run_once(perk_engine *engine, const run_options *run) {
    perk_error err = {0};
    perk_cli_ids ids = {0};
    json_t *answer = NULL;
    perk_status status = read_prompt(engine, run, &ids, &err);
    if (!status)
        status =
            run->engine.json ? run_to_json(engine, run, &ids, &answer, &err) : run_to_text(engine, run, &ids, &err);
    perk_cli_ids_free(&ids);
    if (status) return perk_cli_fail(&err);
    return !run->engine.json || perk_cli_print_json(answer) ? PERK_EXIT_OK : PERK_EXIT_FAILURE;
}

/* ---- a chat, turn by turn ---- */

typedef struct conversation {
    perk_chat_message *messages; /* contents are owned; roles are literals */
    size_t count;
} conversation;

/* Takes over `content`, also on failure. */
static perk_status say(conversation *chat, const char *role, char *content, perk_error *err) {
    perk_chat_message *messages = perk_realloc_array(chat->messages, chat->count + 1, sizeof *messages);
    if (messages) chat->messages = messages;
    if (!messages || !content) {
        free(content);
        return perk_fail_memory(err, "the conversation");
    }
    messages[chat->count++] = (perk_chat_message){.role = role, .content = content};
    return PERK_OK;
}

static perk_status answer_turn(perk_engine *engine, const run_options *run, conversation *chat, perk_error *err) {
    perk_cli_ids ids = {0};
    run_answer answer = {0};
    perk_status status = encode_chat(engine, chat->messages, chat->count, &ids, err);
    if (!status) status = generate(engine, run, ids.items, ids.count, &answer, err);
    if (!status) {
        print_answer(engine, run, &answer);
        status = say(chat, "assistant", perk_strdup(answer.text.data ? answer.text.data : ""), err);
    }
    answer_free(&answer);
    perk_cli_ids_free(&ids);
    return status;
}

static int run_chat(perk_engine *engine, const run_options *run) {
    perk_error err = {0};
    conversation chat = {0};
    char *line = NULL;
    size_t capacity = 0;
    bool terminal = isatty(STDIN_FILENO);
    perk_status status = PERK_OK;
    if (run->system) status = say(&chat, "system", perk_strdup(run->system), &err);
    while (!status) {
        if (terminal) fputs("> ", stderr);
        ssize_t length = getline(&line, &capacity, stdin);
        if (length < 0) break;
        line[strcspn(line, "\n")] = '\0';
        if (!*line) continue;
        status = say(&chat, "user", perk_strdup(line), &err);
        if (!status) status = answer_turn(engine, run, &chat, &err);
        if (ferror(stdout)) break;
    }
    if (terminal && !status) fputc('\n', stderr);
    for (size_t i = 0; i < chat.count; i++) free((void *)chat.messages[i].content);
    free(chat.messages);
    free(line);
    return status ? perk_cli_fail(&err) : PERK_EXIT_OK;
}

static int run_prompts(const perk_cli_command *self, run_options *run) {
    perk_error err = {0};
    perk_buffer file = {0};
    perk_engine *engine = NULL;
    int code = perk_cli_read_file(run->prompts, &file, &err) ? perk_cli_fail(&err) : PERK_EXIT_GO_ON;
    if (code == PERK_EXIT_GO_ON) code = perk_cli_open(self, &run->engine, &engine);
    if (code == PERK_EXIT_GO_ON) code = perk_cli_run_prompts(engine, &file, &run->sampling);
    perk_engine_free(engine);
    perk_buffer_free(&file);
    return code;
}

int perk_cli_run(const perk_cli_command *self, int argc, char **argv) {
    run_options run = {0};
    int code = parse(self, &run, argc, argv);
    if (code != PERK_EXIT_GO_ON) return code;
    if (run.prompts) return run_prompts(self, &run);
    perk_config *config = &run.engine.options.config;
    if (!config->max_num_batched_requests) config->max_num_batched_requests = 1;
    /* A prompt of usual length enters in one step where its activations are wanted. */
    if (run.dump.folder && !config->max_num_batched_tokens) config->max_num_batched_tokens = 256;
    perk_engine *engine;
    code = perk_cli_open(self, &run.engine, &engine);
    if (code != PERK_EXIT_GO_ON) return code;
    perk_error err = {0};
    if (perk_cli_dump_begin(&run.dump, engine, &err)) {
        code = perk_cli_fail(&err);
    } else {
        code = run.chat && !run.prompt ? run_chat(engine, &run) : run_once(engine, &run);
        if (code == PERK_EXIT_OK && perk_cli_dump_end(&run.dump, &err)) code = perk_cli_fail(&err);
    }
    perk_engine_free(engine);
    return code;
}
