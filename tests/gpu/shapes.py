"""The model shapes that the GPU checks run: a config.json with changes, and what to do with it."""
import dataclasses
import json

from harness import ROOT

LENGTHS = (1, 15, 16, 17, 64, 65, 200)  # around the steps (1, 8, 16, 64 tokens) and the pages (16, 64 positions)

SMALL = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=331, hidden_size=128, intermediate_size=192,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_act="silu",
    max_position_embeddings=1024, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None, attention_bias=False,
    tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, torch_dtype="bfloat16",
)


def step(tokens, *more):
    return ("--max-batched-tokens", str(tokens), *more)


BASE = {"step 16": step(16)}
STEPS = {"step 16": step(16), "step 1": step(1), "step 8": step(8), "step 64": step(64)}


@dataclasses.dataclass
class Shape:
    config: str = ""  # a folder under bench/configs, or none: SMALL
    changes: dict = dataclasses.field(default_factory=dict)
    folder: str = ""  # a folder with weights: nothing is drawn
    variants: dict = dataclasses.field(default_factory=lambda: BASE)  # name: options of perk logits; the first is base
    lengths: tuple = LENGTHS
    greedy: tuple = (17, 65)  # lengths of the prompts to go on from
    seconds: int = 120        # that one call of perk may take


SHAPES = {
    "tiny": Shape(folder="examples/tiny", variants=STEPS),
    "gqa5-odd": Shape(changes=dict(hidden_size=72, intermediate_size=100, num_attention_heads=5, num_key_value_heads=1),
                      variants={**BASE, "step 64, page 16": step(64, "--page-size", "16")}),
    "gqa8-head32-untied": Shape(changes=dict(hidden_size=96, num_attention_heads=8, num_key_value_heads=1, head_dim=32,
                                             vocab_size=1021, tie_word_embeddings=False)),
    "gqa3-head96-bias": Shape(changes=dict(hidden_size=200, intermediate_size=264, num_attention_heads=6, head_dim=96,
                                           attention_bias=True)),
    "gqa1-head128-window": Shape(changes=dict(num_key_value_heads=4, head_dim=128, rope_theta=1000000.0,
                                              use_sliding_window=True, sliding_window=24, max_window_layers=1)),
    "qwen3-0.6b": Shape("qwen3-0.6b", variants={**STEPS, "portable": step(16, "--portable")}, greedy=LENGTHS),
    "qwen3-4b-2-layers": Shape("qwen3-4b", dict(num_hidden_layers=2), greedy=(17,)),
    "qwen3-14b-2-layers": Shape("qwen3-14b", dict(num_hidden_layers=2), greedy=(17,)),
    "qwen3-32b-2-layers": Shape("qwen3-32b", dict(num_hidden_layers=2), greedy=(17,),
                                variants={**BASE, "step 64": step(64)}),
    "qwen3-8b": Shape("qwen3-8b", variants={**BASE, "step 1": step(1)}, greedy=(17, 200), seconds=180),
}
ON_CPU = ["tiny", "gqa5-odd", "gqa8-head32-untied", "gqa3-head96-bias", "gqa1-head128-window"]
QUICK = [*ON_CPU, "qwen3-0.6b"]
LARGE = ["qwen3-8b", "qwen3-14b-2-layers", "qwen3-32b-2-layers", "qwen3-4b-2-layers"]


def read_config(shape):
    """The shape's config.json as a dictionary."""
    if shape.folder:
        return json.loads((ROOT / shape.folder / "config.json").read_text())
    path = ROOT / "bench" / "configs" / shape.config / "config.json"
    config = json.loads(path.read_text()) if shape.config else dict(SMALL)
    return {**config, **shape.changes}


def count_bytes(config):
    """What the weights take in bf16, without norms and biases."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"] + config["num_key_value_heads"]
    layer = 2 * hidden * heads * config["head_dim"] + 3 * hidden * config["intermediate_size"]
    tables = 1 if config["tie_word_embeddings"] else 2
    return 2 * (config["num_hidden_layers"] * layer + tables * config["vocab_size"] * hidden)


def fit_layers(config, free_bytes):
    """Lowers the number of layers until the weights fit; returns it."""
    while count_bytes(config) > free_bytes and config["num_hidden_layers"] > 1:
        config["num_hidden_layers"] -= 1
    return config["num_hidden_layers"]
