"""The model shapes that the GPU checks run: a config.json with changes, and what to do with it."""
import dataclasses
import json
import pathlib
import shutil

from harness import ROOT

SPARE_BYTES = 1 << 30  # of the disk: for logits
LENGTHS = (1, 15, 16, 17, 64, 65, 200)  # around the steps (1, 8, 16, 64 tokens) and the pages (16, 64 positions)

COMMON = dict(
    vocab_size=331, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, hidden_act="silu", max_position_embeddings=1024, rms_norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=None, tie_word_embeddings=True, torch_dtype="bfloat16",
)
SMALL = {
    "qwen3": dict(COMMON, architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=64, attention_bias=False,
                  use_sliding_window=False, sliding_window=None),
    "qwen2": dict(COMMON, architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False,
                  sliding_window=None),
    "llama": dict(COMMON, architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, mlp_bias=False),
    "qwen3-moe": dict(COMMON, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", head_dim=64,
                      attention_bias=False, use_sliding_window=False, sliding_window=None, num_experts=16,
                      num_experts_per_tok=4, moe_intermediate_size=96, norm_topk_prob=True, decoder_sparse_step=1,
                      mlp_only_layers=[]),
    "mistral": dict(COMMON, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None),
}
LLAMA3 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)


def step(tokens, *more):
    return ("--max-batched-tokens", str(tokens), *more)


BASE = {"step 16": step(16)}
STEPS = {"step 16": step(16), "step 1": step(1), "step 8": step(8), "step 64": step(64)}


@dataclasses.dataclass
class Shape:
    config: str = "qwen3"  # a folder under bench/configs, or a key of SMALL
    changes: dict = dataclasses.field(default_factory=dict)
    folder: str = ""  # a folder with weights: nothing is drawn
    variants: dict = dataclasses.field(default_factory=lambda: BASE)  # name: options of perk logits; the first is base
    lengths: tuple = LENGTHS
    greedy: tuple = (17, 65)  # lengths of the prompts to go on from
    seconds: int = 120        # that one call of perk may take
    repeats: bool = False     # run the base variant twice: the same bits


SHAPES = {
    "tiny": Shape(folder="examples/tiny", variants=STEPS),
    "gqa5-odd": Shape(changes=dict(hidden_size=72, intermediate_size=100, num_attention_heads=5, num_key_value_heads=1),
                      variants={**BASE, "step 64, page 16": step(64, "--page-size", "16")}, repeats=True),
    "gqa8-head32-untied": Shape(changes=dict(hidden_size=96, num_attention_heads=8, num_key_value_heads=1, head_dim=32,
                                             vocab_size=1021, tie_word_embeddings=False)),
    "gqa3-head96-bias": Shape(changes=dict(hidden_size=200, intermediate_size=264, num_attention_heads=6, head_dim=96,
                                           attention_bias=True)),
    "gqa1-head128-window": Shape(changes=dict(num_key_value_heads=4, head_dim=128, rope_theta=1000000.0,
                                              use_sliding_window=True, sliding_window=24, max_window_layers=1)),
    "llama-gqa2-llama3": Shape("llama", dict(rope_theta=500.0, rope_scaling=LLAMA3, rms_norm_eps=1e-5)),
    "llama-gqa4-biases": Shape("llama", dict(hidden_size=120, intermediate_size=200, num_key_value_heads=1, head_dim=64,
                                             vocab_size=1021, attention_bias=True, mlp_bias=True,
                                             tie_word_embeddings=False)),
    "mistral-gqa2-window": Shape("mistral", dict(hidden_size=256, sliding_window=24, tie_word_embeddings=False)),
    "mistral-gqa4-head128": Shape("mistral", dict(num_key_value_heads=1, head_dim=128, vocab_size=257)),
    "qwen2-gqa7-window": Shape("qwen2", dict(hidden_size=224, num_attention_heads=7, num_key_value_heads=1,
                                             rope_theta=1000000.0, use_sliding_window=True, sliding_window=24,
                                             max_window_layers=2)),
    "moe-top4": Shape("qwen3-moe", variants={**STEPS, "portable": step(16, "--portable")}, repeats=True),
    "moe-some-layers": Shape("qwen3-moe", dict(num_experts=8, num_experts_per_tok=2, norm_topk_prob=False,
                                               decoder_sparse_step=2, num_hidden_layers=4, mlp_only_layers=[1])),
    "qwen3-0.6b": Shape("qwen3-0.6b", variants={**STEPS, "portable": step(16, "--portable")},
                        greedy=(1, 17, 65, 200)),
    "qwen3-4b-2-layers": Shape("qwen3-4b", dict(num_hidden_layers=2), greedy=(17,)),
    "qwen3-14b-2-layers": Shape("qwen3-14b", dict(num_hidden_layers=2), greedy=(17,), repeats=True),
    "qwen3-32b-2-layers": Shape("qwen3-32b", dict(num_hidden_layers=2), greedy=(17,),
                                variants={**BASE, "step 64": step(64)}),
    "llama-3.2-1b": Shape("llama-3.2-1b", greedy=(17, 200)),
    "llama-3.1-8b-2-layers": Shape("llama-3.1-8b", dict(num_hidden_layers=2), greedy=(17,)),
    "qwen2.5-7b-2-layers": Shape("qwen2.5-7b", dict(num_hidden_layers=2), greedy=(17,),
                                 variants={**BASE, "step 1": step(1), "step 64": step(64)}),
    "mistral-7b-2-layers": Shape("mistral-7b-v0.3", dict(num_hidden_layers=2), greedy=(17,)),
    "qwen3-30b-a3b-2-layers": Shape("qwen3-30b-a3b", dict(num_hidden_layers=2), greedy=(17,), repeats=True,
                                    variants={**STEPS, "portable": step(16, "--portable")}),
    "qwen3-8b": Shape("qwen3-8b", variants={**BASE, "step 1": step(1)}, greedy=(17,), seconds=180),
}
ON_CPU = ["tiny", "gqa5-odd", "gqa8-head32-untied", "gqa3-head96-bias", "gqa1-head128-window", "llama-gqa2-llama3",
          "llama-gqa4-biases", "mistral-gqa2-window", "mistral-gqa4-head128", "qwen2-gqa7-window", "moe-top4",
          "moe-some-layers"]
QUICK = [*ON_CPU, "qwen3-0.6b"]
# Without qwen3-4b-2-layers and llama-3.1-8b-2-layers, which have nothing that these lack.
LARGE = ["qwen3-14b-2-layers", "llama-3.2-1b", "qwen2.5-7b-2-layers", "mistral-7b-2-layers", "qwen3-32b-2-layers",
         "qwen3-30b-a3b-2-layers", "qwen3-8b"]
ALL = [*QUICK, *LARGE]


# ---- what becomes of a shape ----


def programs(shape):
    """Of perk compile, the options for each program that the shape's runs start: perk logits makes one, with a row of
    logits for every token of a step; perk run, by default, those for 1, 8 and 16 tokens a step and one such row."""
    found = [(*options, "--max-logit-rows", options[options.index("--max-batched-tokens") + 1])
             for options in shape.variants.values()]
    if shape.greedy:
        found += [(*step(tokens), "--max-logit-rows", "1") for tokens in (1, 8, 16)]
    return [(*options, "--max-batched-requests", "1") for options in dict.fromkeys(found)]


def row_names(name):
    """The rows that parity.py makes of the shape."""
    shape = SHAPES[name]
    repeats = [f"same bits {name}"] if shape.repeats else []
    return [*repeats, *(f"logits {name}, {variant}" for variant in shape.variants), f"greedy {name}"]


def ahead_row(label):
    return f"compile ahead, {label}"


def found_row(label):
    return f"starts find what was compiled ahead, {label}"


# ---- configs and their weights ----


def read_config(shape):
    """The shape's config.json as a dictionary."""
    if shape.folder:
        return json.loads((ROOT / shape.folder / "config.json").read_text())
    config = SMALL.get(shape.config)
    if config is None:
        config = json.loads((ROOT / "bench" / "configs" / shape.config / "config.json").read_text())
    return {**config, **shape.changes}


def count_bytes(config):
    """What the weights take in bf16, without norms and biases."""
    hidden, query_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // query_heads
    layer = 2 * hidden * (query_heads + config["num_key_value_heads"]) * head_dim
    layer += 3 * hidden * (config["num_experts"] * config["moe_intermediate_size"] if config.get("num_experts")
                           else config["intermediate_size"])
    tables = 1 if config["tie_word_embeddings"] else 2
    return 2 * (config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden)


def fit_layers(config, free_bytes):
    """Lowers the number of layers until the weights fit."""
    while count_bytes(config) > free_bytes and config["num_hidden_layers"] > 1:
        config["num_hidden_layers"] -= 1


def best_place(wanted_bytes):
    """Where temporary models go: /tmp unless it lacks the room and memory has it. Returns (folder, free bytes)."""
    places = [(pathlib.Path(place), shutil.disk_usage(place).free) for place in ("/tmp", "/dev/shm")
              if pathlib.Path(place).is_dir()]
    enough = [place for place in places if place[1] * 0.9 > wanted_bytes]
    return enough[0] if enough else max(places, key=lambda place: place[1])


@dataclasses.dataclass
class Fitted:
    """What of a shape fits this machine's disk."""
    config: dict
    place: pathlib.Path  # for the folder of the weights
    full_layers: int     # before some were left out

    def layers(self):
        return self.config["num_hidden_layers"]


def fit(shape):
    config = read_config(shape)
    full = config["num_hidden_layers"]
    place, free = best_place(count_bytes(config) + SPARE_BYTES)
    fit_layers(config, int(free * 0.9) - SPARE_BYTES)
    return Fitted(config, place, full)
