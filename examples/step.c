/* A loop of one's own around perk: who is in a step, and which pages of the KV cache are whose, is decided here; perk
 * runs the forward pass. Two greedy requests, the second over the page that the first has written, if they begin
 * alike. cc step.c $(pkg-config --cflags --libs perk) && ./a.out FOLDER */
#include <perk/step.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REQUESTS = 2, CHUNK = 8, PAGE = 16, LENGTH = 64, PAGES = LENGTH / PAGE };

typedef struct text {
    int32_t ids[LENGTH], pages[PAGES];
    int32_t length, cached; /* tokens that there are, and those of them in the cache */
} text;

static perk_status begin(text *t, int number, const perk_tokenizer *tokenizer, const char *prompt, perk_error *err) {
    int32_t *ids;
    size_t count;
    for (int page = 0; page < PAGES; page++) t->pages[page] = page * REQUESTS + number; /* any order will do */
    perk_status status = perk_tokenizer_encode(tokenizer, prompt, strlen(prompt), NULL, &ids, &count, err);
    t->length = count < LENGTH ? (int32_t)count : LENGTH;
    if (status == PERK_OK) memcpy(t->ids, ids, (size_t)t->length * sizeof *ids);
    free(ids);
    return status;
}

/* A step over all that are not at their end: a piece of a prompt, or the token that came last. */
static perk_status step(perk_engine *engine, text *texts, int *count, perk_error *err) {
    perk_step_request requests[REQUESTS];
    perk_step_output output;
    text *who[REQUESTS];
    *count = 0;
    for (text *t = texts; t < texts + REQUESTS; t++) {
        int too_early = t->cached > 0 && texts->cached < PAGE && t != texts; /* for a page that the first one writes */
        if (t->length == LENGTH || too_early) continue;
        int32_t rest = t->length - t->cached;
        perk_step_request *r = &requests[*count];
        who[(*count)++] = t;
        *r = (perk_step_request){.token_ids = t->ids + t->cached, .position = t->cached};
        r->token_count = rest < CHUNK ? rest : CHUNK;
        r->pages = t->pages;
        r->page_count = PAGES;
        if (rest <= CHUNK) r->want_logits = PERK_LOGITS_LAST;
    }
    if (*count == 0) return PERK_OK;
    perk_status status = perk_step_run(engine, requests, *count, 0, &output, err);
    for (int i = 0, row = 0; i < *count && status == PERK_OK; i++) {
        who[i]->cached += requests[i].token_count;
        if (requests[i].want_logits) who[i]->ids[who[i]->length++] = output.argmax[row++];
    }
    return status;
}

int main(int argc, char **argv) {
    static const char *prompts[] = {"Once upon a time there was a little dog who lived in a big house by the sea. One",
                                    "Once upon a time there was a little dog who lived in a big house by the sea. He"};
    perk_engine_options options = {.mode = PERK_MODE_CALLER, .config = {.page_size = PAGE, .max_seq_length = LENGTH}};
    perk_error err = {0};
    perk_engine *engine;
    text texts[REQUESTS] = {{.length = 0}};
    perk_status status = perk_engine_open(&engine, argc > 1 ? argv[1] : "examples/tiny", &options, &err);
    const perk_tokenizer *tokenizer = status == PERK_OK ? perk_engine_tokenizer(engine) : NULL;
    for (int i = 0; i < REQUESTS && tokenizer && !status; i++)
        status = begin(&texts[i], i, tokenizer, prompts[i], &err);
    if (texts[1].length > PAGE && memcmp(texts[0].ids, texts[1].ids, PAGE * sizeof(int32_t)) == 0)
        texts[1].cached = PAGE, texts[1].pages[0] = texts[0].pages[0];
    for (int running = 1; running && tokenizer && !status;) status = step(engine, texts, &running, &err);
    for (int i = 0; i < REQUESTS && tokenizer && !status; i++) {
        char *words = NULL;
        size_t size;
        status = perk_tokenizer_decode(tokenizer, texts[i].ids, LENGTH, 1, &words, &size, &err);
        printf("%s%s\n\n", texts[i].pages[0] == i ? "" : "(over a shared page) ", words ? words : "");
        free(words);
    }
    if (status) fprintf(stderr, "%s\n", err.message);
    perk_engine_free(engine);
    return !status && tokenizer ? 0 : 1;
}
