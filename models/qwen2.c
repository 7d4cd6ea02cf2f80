/* Qwen2 and Qwen2.5 (Qwen Team 2024, "Qwen2.5 Technical Report"), dense: queries, keys and values have biases. */
#include "decoder.h"
#include "models.h"

void perk_qwen2_build(perk_graph *graph, const json_t *config) {
    static const perk_decoder_family family = {
        .name = "Qwen2",
        .kv_heads = 32,
        .biases = PERK_BIAS_QKV,
        .windows = PERK_WINDOW_SOME_LAYERS,
    };
    perk_decoder_build(graph, config, &family);
}
