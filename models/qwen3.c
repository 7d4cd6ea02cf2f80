/* Qwen3 (Qwen Team 2025, "Qwen3 Technical Report"), dense: query and key heads are RMS-normalised. */
#include "decoder.h"
#include "models.h"

void perk_qwen3_build(perk_graph *graph, const json_t *config) {
    static const perk_decoder_family family = {
        .name = "Qwen3",
        .kv_heads = 32,
        .head_dim = 128,
        .norms_heads = true,
        .biases = PERK_BIAS_CONFIGURED,
        .windows = PERK_WINDOW_SOME_LAYERS,
    };
    perk_decoder_build(graph, config, &family);
}
