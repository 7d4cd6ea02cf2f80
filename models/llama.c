/* Llama 2 and 3 (Llama Team 2024, "The Llama 3 Herd of Models"), and the many models of that architecture. */
#include "decoder.h"
#include "models.h"

void perk_llama_build(perk_graph *graph, const json_t *config) {
    static const perk_decoder_family family = {
        .name = "Llama",
        .reads_mlp_bias = true,
        .biases = PERK_BIAS_CONFIGURED,
        .windows = PERK_WINDOW_NEVER,
    };
    perk_decoder_build(graph, config, &family);
}
