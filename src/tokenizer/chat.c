/* Chat formats, a function a family. Each says what the family's published template says for messages that have a role
 * and a text. */
#include "parts.h"
#include "utf8.h"

#define DEEPSEEK_BOS "<｜begin▁of▁sentence｜>"
#define DEEPSEEK_EOS "<｜end▁of▁sentence｜>"
#define DEEPSEEK_USER "<｜User｜>"
#define DEEPSEEK_ASSISTANT "<｜Assistant｜>"
#define DEEPSEEK_OUTPUTS_BEGIN "<｜tool▁outputs▁begin｜>"
#define DEEPSEEK_OUTPUTS_END "<｜tool▁outputs▁end｜>"
#define DEEPSEEK_OUTPUT_BEGIN "<｜tool▁output▁begin｜>"
#define DEEPSEEK_OUTPUT_END "<｜tool▁output▁end｜>"

typedef struct conversation {
    const perk_chat_message *messages;
    size_t count;
    bool prompt; /* end where the answer begins */
    perk_buffer out;
    perk_error *err;
} conversation;

static bool is_role(const perk_chat_message *message, const char *role) { return strcmp(message->role, role) == 0; }

static void put(conversation *chat, const char *text) { perk_buffer_append(&chat->out, text, strlen(text)); }

static perk_status refuse_role(const conversation *chat, size_t i, const char *family, const char *roles) {
    return perk_fail(chat->err, PERK_UNSUPPORTED, "message %zu has the role \"%.60s\"; the %s format knows %s", i,
                     chat->messages[i].role, family, roles);
}

/* ---- Qwen3
 * -------------------------------------------------------------------------------------------------------------- */

typedef struct slice {
    const char *begin, *end;
} slice;

static slice slice_of(const char *text) { return (slice){text, text + strlen(text)}; }

static slice trim_left(slice s, char c) {
    while (s.begin < s.end && *s.begin == c) s.begin++;
    return s;
}

static slice trim_right(slice s, char c) {
    while (s.begin < s.end && s.end[-1] == c) s.end--;
    return s;
}

static void put_slice(conversation *chat, slice s) {
    perk_buffer_append(&chat->out, s.begin, (size_t)(s.end - s.begin));
}

/* The first or last place of `mark` in the slice, NULL for none. */
static const char *find_mark(slice s, const char *mark, bool last) {
    size_t size = strlen(mark);
    const char *found = NULL;
    for (const char *p = s.begin; (size_t)(s.end - p) >= size; p++) {
        if (memcmp(p, mark, size) != 0) continue;
        found = p;
        if (!last) break;
    }
    return found;
}

/* An assistant's text may begin with its thoughts: <think> thoughts </think> answer. */
static void split_thoughts(const char *content, slice *thoughts, slice *answer) {
    static const char open_mark[] = "<think>", close_mark[] = "</think>";
    *answer = slice_of(content);
    *thoughts = (slice){content, content};
    const char *first = find_mark(*answer, close_mark, false), *last = find_mark(*answer, close_mark, true);
    if (!first) return;
    *thoughts = trim_right((slice){content, first}, '\n');
    const char *open = find_mark(*thoughts, open_mark, true);
    if (open) thoughts->begin = open + strlen(open_mark);
    *thoughts = trim_left(*thoughts, '\n');
    answer->begin = last + strlen(close_mark);
    *answer = trim_left(*answer, '\n');
}

static bool is_tool_response(const char *content) {
    static const char begin[] = "<tool_response>", end[] = "</tool_response>";
    size_t size = strlen(content);
    return strncmp(content, begin, strlen(begin)) == 0 && size >= strlen(end) &&
           strcmp(content + size - strlen(end), end) == 0;
}

/* Thoughts are shown again only in what follows the last question. */
static size_t last_question(const conversation *chat) {
    for (size_t i = chat->count; i-- > 0;)
        if (is_role(&chat->messages[i], "user") && !is_tool_response(chat->messages[i].content)) return i;
    return chat->count ? chat->count - 1 : 0;
}

static void qwen3_assistant(conversation *chat, size_t i, size_t question) {
    slice thoughts, answer;
    split_thoughts(chat->messages[i].content, &thoughts, &answer);
    put(chat, "<|im_start|>assistant\n");
    if (i > question && (i + 1 == chat->count || thoughts.begin < thoughts.end)) {
        put(chat, "<think>\n");
        put_slice(chat, trim_right(trim_left(thoughts, '\n'), '\n'));
        put(chat, "\n</think>\n\n");
        answer = trim_left(answer, '\n');
    }
    put_slice(chat, answer);
    put(chat, "<|im_end|>\n");
}

/* Consecutive answers of tools share one turn of the user. */
static void qwen3_tool(conversation *chat, size_t i) {
    if (i == 0 || !is_role(&chat->messages[i - 1], "tool")) put(chat, "<|im_start|>user");
    put(chat, "\n<tool_response>\n");
    put(chat, chat->messages[i].content);
    put(chat, "\n</tool_response>");
    if (i + 1 == chat->count || !is_role(&chat->messages[i + 1], "tool")) put(chat, "<|im_end|>\n");
}

static perk_status format_qwen3(conversation *chat) {
    size_t question = last_question(chat);
    for (size_t i = 0; i < chat->count; i++) {
        const perk_chat_message *message = &chat->messages[i];
        if (is_role(message, "assistant")) {
            qwen3_assistant(chat, i, question);
        } else if (is_role(message, "tool")) {
            qwen3_tool(chat, i);
        } else if (is_role(message, "user") || is_role(message, "system")) {
            perk_buffer_printf(&chat->out, "<|im_start|>%s\n", message->role);
            put(chat, message->content);
            put(chat, "<|im_end|>\n");
        } else {
            return refuse_role(chat, i, "Qwen3", "system, user, assistant and tool");
        }
    }
    if (chat->prompt) put(chat, "<|im_start|>assistant\n");
    return PERK_OK;
}

/* ---- Llama 3
 * --------------------------------------------------------------------------------------------------------------- */

/* White space as Python's str.strip sees it. */
static bool is_python_space(int32_t c) {
    return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

static slice strip(slice s) {
    size_t length;
    while (s.begin < s.end && is_python_space(perk_utf8_next(s.begin, &length))) s.begin += length;
    while (s.begin < s.end) {
        const char *previous = perk_utf8_previous(s.begin, s.end);
        if (!is_python_space(perk_utf8_next(previous, &length))) break;
        s.end = previous;
    }
    return s;
}

static perk_status format_llama3(conversation *chat) {
    if (chat->count) put(chat, "<|begin_of_text|>");
    for (size_t i = 0; i < chat->count; i++) {
        put(chat, "<|start_header_id|>");
        put(chat, chat->messages[i].role);
        put(chat, "<|end_header_id|>\n\n");
        put_slice(chat, strip(slice_of(chat->messages[i].content)));
        put(chat, "<|eot_id|>");
    }
    if (chat->prompt) put(chat, "<|start_header_id|>assistant<|end_header_id|>\n\n");
    return PERK_OK;
}

/* ---- DeepSeek V3
 * -------------------------------------------------------------------------------------------------------------- */

/* All system messages come first, wherever they stand in the conversation. */
static void deepseek_system(conversation *chat) {
    bool first = true;
    put(chat, DEEPSEEK_BOS);
    for (size_t i = 0; i < chat->count; i++) {
        if (!is_role(&chat->messages[i], "system")) continue;
        if (!first) put(chat, "\n\n");
        put(chat, chat->messages[i].content);
        first = false;
    }
}

static perk_status format_deepseek(conversation *chat) {
    bool after_tool = false, first_output = true;
    deepseek_system(chat);
    for (size_t i = 0; i < chat->count; i++) {
        const perk_chat_message *message = &chat->messages[i];
        if (is_role(message, "system")) continue;
        if (is_role(message, "user")) {
            put(chat, DEEPSEEK_USER);
            put(chat, message->content);
        } else if (is_role(message, "assistant")) {
            put(chat, after_tool ? DEEPSEEK_OUTPUTS_END : DEEPSEEK_ASSISTANT);
            put(chat, message->content);
            put(chat, DEEPSEEK_EOS);
        } else if (is_role(message, "tool")) {
            put(chat, first_output ? DEEPSEEK_OUTPUTS_BEGIN DEEPSEEK_OUTPUT_BEGIN : "\n" DEEPSEEK_OUTPUT_BEGIN);
            put(chat, message->content);
            put(chat, DEEPSEEK_OUTPUT_END);
            first_output = false;
        } else {
            return refuse_role(chat, i, "DeepSeek V3", "system, user, assistant and tool");
        }
        after_tool = is_role(message, "tool");
    }
    if (after_tool)
        put(chat, DEEPSEEK_OUTPUTS_END);
    else if (chat->prompt)
        put(chat, DEEPSEEK_ASSISTANT);
    return PERK_OK;
}

/* ---- Mistral, of the tokenizers v2 and v3
 * -------------------------------------------------------------------------------------------------------------- */

/* After a system message, if there is one, users and assistants take turns. */
static perk_status check_turns(const conversation *chat, size_t first) {
    for (size_t i = first; i < chat->count; i++) {
        const char *wanted = (i - first) % 2 == 0 ? "user" : "assistant";
        if (is_role(&chat->messages[i], wanted)) continue;
        return refuse_role(chat, i, "Mistral", "a system message first, then user and assistant in turns");
    }
    return PERK_OK;
}

/* The system message stands in the last turn of the user, where the conversation ends with it. */
static perk_status format_mistral(conversation *chat) {
    size_t first = chat->count && is_role(&chat->messages[0], "system");
    perk_status status = check_turns(chat, first);
    if (status != PERK_OK) return status;
    if (chat->count) put(chat, "<s>");
    for (size_t i = first; i < chat->count; i++) {
        bool user = is_role(&chat->messages[i], "user");
        put(chat, user ? "[INST] " : " ");
        if (user && first && i + 1 == chat->count) {
            put(chat, chat->messages[0].content);
            put(chat, "\n\n");
        }
        put_slice(chat, user ? slice_of(chat->messages[i].content) : strip(slice_of(chat->messages[i].content)));
        put(chat, user ? "[/INST]" : "</s>");
    }
    return PERK_OK;
}

/* ---- all families
 * ---------------------------------------------------------------------------------------------------------------- */

static const struct family {
    perk_chat_family family;
    const char *markers[3]; /* tokens that a tokenizer of the family has */
    const char *absent;     /* one that it has not */
    perk_status (*format)(conversation *chat);
} families[] = {
    {PERK_CHAT_QWEN3, {"<|im_start|>", "<|im_end|>"}, NULL, format_qwen3},
    {PERK_CHAT_LLAMA3, {"<|start_header_id|>", "<|eot_id|>"}, NULL, format_llama3},
    {PERK_CHAT_DEEPSEEK, {DEEPSEEK_USER, DEEPSEEK_ASSISTANT}, NULL, format_deepseek},
    /* The byte-level ones of the name, and those with a token for system messages, have other formats. */
    {PERK_CHAT_MISTRAL, {"[INST]", "[/INST]", "<0x0A>"}, "[SYSTEM_PROMPT]", format_mistral},
};

static bool fits_family(const perk_tokenizer *tokenizer, const struct family *family) {
    for (size_t i = 0; i < PERK_COUNT(family->markers) && family->markers[i]; i++)
        if (perk_tokenizer_token_id(tokenizer, family->markers[i]) < 0) return false;
    return perk_tokenizer_token_id(tokenizer, family->absent) < 0;
}

perk_chat_family perk_chat_detect(const perk_tokenizer *tokenizer) {
    for (size_t i = 0; i < PERK_COUNT(families); i++)
        if (fits_family(tokenizer, &families[i])) return families[i].family;
    return PERK_CHAT_NONE;
}

static perk_status check_messages(const perk_chat_message *messages, size_t count, perk_error *err) {
    for (size_t i = 0; i < count; i++) {
        const char *parts[] = {messages[i].role, messages[i].content};
        for (size_t k = 0; k < PERK_COUNT(parts); k++) {
            const char *name = k ? "content" : "role";
            if (!parts[k]) return perk_fail(err, PERK_INVALID_ARGUMENT, "message %zu has no %s", i, name);
            if (!perk_utf8_valid(parts[k], strlen(parts[k])))
                return perk_fail(err, PERK_INVALID_ARGUMENT, "the %s of message %zu is not UTF-8", name, i);
        }
    }
    return PERK_OK;
}

perk_status perk_chat_format_as(perk_chat_family family, const perk_chat_message *messages, size_t count,
                                int add_generation_prompt, char **text, perk_error *err) {
    *text = NULL;
    const struct family *chosen = NULL;
    for (size_t i = 0; i < PERK_COUNT(families); i++)
        if (families[i].family == family) chosen = &families[i];
    if (!chosen)
        return perk_fail(err, PERK_UNSUPPORTED,
                         "no known chat format: the tokenizer has the marker tokens of none of Qwen3 (<|im_start|>), "
                         "Llama 3 (<|start_header_id|>), DeepSeek V3 (<｜User｜>) and Mistral ([INST]); give a plain "
                         "prompt, or name the family");
    conversation chat = {messages, count, add_generation_prompt != 0, {0}, err};
    perk_status status = check_messages(messages, count, err);
    if (status == PERK_OK) status = chosen->format(&chat);
    put(&chat, ""); /* so that even an empty text is allocated */
    if (status == PERK_OK && chat.out.failed) status = perk_fail_memory(err, "a conversation");
    if (status == PERK_OK)
        *text = chat.out.data;
    else
        perk_buffer_free(&chat.out);
    return status;
}

perk_status perk_chat_format(const perk_tokenizer *tokenizer, const perk_chat_message *messages, size_t count,
                             int add_generation_prompt, char **text, perk_error *err) {
    return perk_chat_format_as(perk_chat_detect(tokenizer), messages, count, add_generation_prompt, text, err);
}
