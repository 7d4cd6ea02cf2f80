/* The decoder that many families share: pre-norm transformer layers with grouped-query attention (Ainslie et al.
 * 2023), rotary positions and SwiGLU, in one MLP or in experts, under the weight names of Hugging Face checkpoints.
 * Where families differ is data.
 */
#ifndef PERK_MODELS_DECODER_H
#define PERK_MODELS_DECODER_H

#include "graph.h"
#include "rope.h"
#include "weights.h"

typedef enum perk_bias_rule {
    PERK_BIAS_NEVER,
    PERK_BIAS_QKV,        /* queries, keys and values always have one, the output projection never */
    PERK_BIAS_CONFIGURED, /* all four, if "attention_bias" is true */
} perk_bias_rule;

typedef enum perk_window_rule {
    PERK_WINDOW_NEVER,
    PERK_WINDOW_ALL_LAYERS,  /* unless "sliding_window" is null */
    PERK_WINDOW_ALL_IF_USED, /* if "use_sliding_window", and "sliding_window" is not null; layer_types do not count */
    PERK_WINDOW_SOME_LAYERS, /* if "use_sliding_window": those that "layer_types" names, else from "max_window_layers"
                              */
} perk_window_rule;

typedef struct perk_decoder_family {
    const char *name;      /* for messages */
    int64_t kv_heads;      /* where the config has no "num_key_value_heads"; 0: num_attention_heads */
    int64_t head_dim;      /* where the config has no "head_dim"; 0: hidden_size / num_attention_heads */
    bool norms_heads;      /* each query and key head has an RMS norm */
    bool reads_mlp_bias;   /* "mlp_bias" decides; else the MLP has no bias */
    bool has_experts;      /* in the layers that "decoder_sparse_step" and "mlp_only_layers" say */
    perk_bias_rule biases; /* of attention */
    perk_window_rule windows;
} perk_decoder_family;

/* One model, as its config says. */
typedef struct perk_decoder {
    int64_t vocab, hidden, intermediate, layers, heads, kv_heads, head_dim;
    double norm_eps;
    bool norms_heads, is_tied;
    bool qkv_bias, out_bias, mlp_bias;
    int64_t window;            /* of the layers that slide; 0: none does */
    int64_t first_window;      /* layers from here on slide, where layer_types does not say */
    const json_t *layer_types; /* borrowed from the config; checked; NULL: absent */
    int64_t experts;           /* of a sparse layer; 0: all layers are dense */
    int64_t top_experts, expert_width;
    bool normalises_experts;
    int64_t sparse_step;        /* layers step - 1, 2 step - 1, ... are sparse, */
    const json_t *dense_layers; /* but for these: integers, borrowed from the config; NULL: none */
    perk_rope rope;
} perk_decoder;

/* Reads a config; what it asks for and perk does not do fails with PERK_UNSUPPORTED, by the name of the field. After
 * success the caller frees out->rope.inv_freq, and `config` must outlive *out. */
perk_status perk_decoder_read(perk_decoder *out, const perk_decoder_family *family, const json_t *config,
                              perk_error *err);

extern const perk_weight_table perk_decoder_weights;

/* Adds the whole model to `graph`; failures go into the graph. */
void perk_decoder_build(perk_graph *graph, const json_t *config, const perk_decoder_family *family);

#endif
