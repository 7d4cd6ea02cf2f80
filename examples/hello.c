/* Generates text from a model folder: cc hello.c $(pkg-config --cflags --libs perk) && ./a.out FOLDER [PROMPT] */
#include <perk/engine.h>

#include <stdio.h>

static int print_piece(void *user, int32_t token, const char *text, size_t size) {
    (void)user;
    (void)token;
    fwrite(text, 1, size, stdout);
    fflush(stdout);
    return 0; /* go on */
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL_FOLDER [PROMPT]\n", argv[0]);
        return 2;
    }
    const char *prompt = argc > 2 ? argv[2] : "Once upon a time";
    perk_error err = {0};
    perk_engine *engine;
    if (perk_engine_open(&engine, argv[1], NULL, &err) != PERK_OK) {
        fprintf(stderr, "%s\n", err.message);
        return 1;
    }
    perk_sampling sampling = {.temperature = 0.7f, .top_p = 0.95f, .seed = 1, .max_tokens = 100};
    perk_generation generation;
    printf("%s", prompt);
    perk_status status = perk_engine_generate_text(engine, prompt, &sampling, print_piece, NULL, &generation, &err);
    if (status == PERK_OK)
        printf("\n\n%d tokens, %.1f ms to the first, %.2f ms each after it\n", generation.tokens, generation.prefill_ms,
               generation.decode_ms / (generation.tokens > 1 ? generation.tokens - 1 : 1));
    else
        fprintf(stderr, "%s\n", err.message);
    perk_engine_free(engine);
    return status == PERK_OK ? 0 : 1;
}
