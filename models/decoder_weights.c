/* The weights of the decoders, under their names in Hugging Face checkpoints. */
#include "decoder.h"

#define MATRIX PERK_WEIGHT_MATRIX
#define VECTOR PERK_WEIGHT_VECTOR
#define LAYER "model.layers.#."

/* clang-format off */
static const perk_weight_row rows[] = {
    MATRIX("embedding_table", "model.embed_tokens.weight", VOCAB, HIDDEN, NONE, 0),

    VECTOR("layers.#.input_norm_weight", LAYER "input_layernorm.weight", HIDDEN, NONE, 0),
    MATRIX("layers.#.qkv_weight", LAYER "self_attn.q_proj.weight", QUERIES, HIDDEN, COLUMN, 0),
    MATRIX("layers.#.qkv_weight", LAYER "self_attn.k_proj.weight", KEYS, HIDDEN, COLUMN, 0),
    MATRIX("layers.#.qkv_weight", LAYER "self_attn.v_proj.weight", KEYS, HIDDEN, COLUMN, 0),
    VECTOR("layers.#.qkv_bias", LAYER "self_attn.q_proj.bias", QUERIES, COLUMN, PERK_HAS_QKV_BIAS),
    VECTOR("layers.#.qkv_bias", LAYER "self_attn.k_proj.bias", KEYS, COLUMN, PERK_HAS_QKV_BIAS),
    VECTOR("layers.#.qkv_bias", LAYER "self_attn.v_proj.bias", KEYS, COLUMN, PERK_HAS_QKV_BIAS),
    VECTOR("layers.#.q_norm_weight", LAYER "self_attn.q_norm.weight", HEAD, NONE, PERK_HAS_HEAD_NORMS),
    VECTOR("layers.#.k_norm_weight", LAYER "self_attn.k_norm.weight", HEAD, NONE, PERK_HAS_HEAD_NORMS),
    MATRIX("layers.#.out_weight", LAYER "self_attn.o_proj.weight", HIDDEN, QUERIES, ROW, 0),
    VECTOR("layers.#.out_bias", LAYER "self_attn.o_proj.bias", HIDDEN, NONE, PERK_HAS_OUT_BIAS),

    VECTOR("layers.#.mlp_norm_weight", LAYER "post_attention_layernorm.weight", HIDDEN, NONE, 0),
    MATRIX("layers.#.gate_up_weight", LAYER "mlp.gate_proj.weight", INTERMEDIATE, HIDDEN, COLUMN, 0),
    MATRIX("layers.#.gate_up_weight", LAYER "mlp.up_proj.weight", INTERMEDIATE, HIDDEN, COLUMN, 0),
    VECTOR("layers.#.gate_up_bias", LAYER "mlp.gate_proj.bias", INTERMEDIATE, COLUMN, PERK_HAS_MLP_BIAS),
    VECTOR("layers.#.gate_up_bias", LAYER "mlp.up_proj.bias", INTERMEDIATE, COLUMN, PERK_HAS_MLP_BIAS),
    MATRIX("layers.#.down_weight", LAYER "mlp.down_proj.weight", HIDDEN, INTERMEDIATE, ROW, 0),
    VECTOR("layers.#.down_bias", LAYER "mlp.down_proj.bias", HIDDEN, NONE, PERK_HAS_MLP_BIAS),

    MATRIX("layers.#.router_weight", LAYER "mlp.gate.weight", EXPERTS, HIDDEN, NONE, 0),
    MATRIX("layers.#.experts_gate_up_weight", LAYER "mlp.experts.*.gate_proj.weight", EXPERT_WIDTH, HIDDEN, COLUMN, 0),
    MATRIX("layers.#.experts_gate_up_weight", LAYER "mlp.experts.*.up_proj.weight", EXPERT_WIDTH, HIDDEN, COLUMN, 0),
    MATRIX("layers.#.experts_down_weight", LAYER "mlp.experts.*.down_proj.weight", HIDDEN, EXPERT_WIDTH, ROW, 0),

    VECTOR("final_norm_weight", "model.norm.weight", HIDDEN, NONE, 0),
    /* Tied models may store a copy of the table under this name. */
    {"head_weight", "lm_head.weight", PERK_SIZE_VOCAB, PERK_SIZE_HIDDEN, PERK_SPLIT_COLUMN, PERK_HAS_OWN_HEAD, true},
    /* Buffers that old checkpoints hold: the config says it all. */
    PERK_WEIGHT_LEFT(LAYER "self_attn.rotary_emb.inv_freq"),
    PERK_WEIGHT_LEFT("model.rotary_emb.inv_freq"),
};
/* clang-format on */

const perk_weight_table perk_decoder_weights = {rows, PERK_COUNT(rows)};
