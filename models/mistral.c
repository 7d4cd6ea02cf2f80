/* Mistral (Jiang et al. 2023, "Mistral 7B"): the first release slides in every layer, later ones in none. */
#include "decoder.h"
#include "models.h"

void perk_mistral_build(perk_graph *graph, const json_t *config) {
    static const perk_decoder_family family = {
        .name = "Mistral",
        .kv_heads = 8,
        .biases = PERK_BIAS_NEVER,
        .windows = PERK_WINDOW_ALL_LAYERS,
    };
    perk_decoder_build(graph, config, &family);
}
