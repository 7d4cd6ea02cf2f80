/* Qwen3-MoE (Qwen Team 2025, "Qwen3 Technical Report"): Qwen3 with a mixture of experts in most layers. */
#include "decoder.h"
#include "models.h"

void perk_qwen3_moe_build(perk_graph *graph, const json_t *config) {
    static const perk_decoder_family family = {
        .name = "Qwen3-MoE",
        .kv_heads = 4,
        .norms_heads = true,
        .has_experts = true,
        .biases = PERK_BIAS_CONFIGURED,
        .windows = PERK_WINDOW_ALL_IF_USED,
    };
    perk_decoder_build(graph, config, &family);
}
