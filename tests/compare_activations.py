#!/usr/bin/env python3
"""Names the first op whose output differs from what transformers computes, for any model folder.

    tests/compare_activations.py --model FOLDER                     the reference executor in fp32, within 1e-4
    tests/compare_activations.py --model FOLDER --precision bf16    within --noise times transformers' own bf16 error

Both read one list of ids in one step: --ids (1,2,3), or seeded random ones. `perk logits --dump-activations` writes what
every op made; hooks on the modules of transformers see the same values there. An op's error is the relative L2 error
over all rows against transformers in fp32. Expert ids are compared as sets, row by row; what only perk's ops or only
transformers' modules show is left out.

Exit codes: 0 no op differs, 1 one does, 2 something could not be run. Needs torch and transformers.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch
from transformers import AutoModelForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--perk", default=str(ROOT / "build" / "bin" / "perk"), help="the perk binary")
    parser.add_argument("--precision", default="fp32", choices=["bf16", "fp32"], help="of the reference executor")
    parser.add_argument("--ids", help="comma-separated; else random ones")
    parser.add_argument("--length", type=int, default=48, help="of random ids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=1e-4, help="in fp32")
    parser.add_argument("--noise", type=float, default=1.5, help="in bf16: this many times transformers' own error")
    parser.add_argument("--dump", help="a folder that perk wrote before, for its own ids; perk is not run then")
    parser.add_argument("--all", action="store_true", help="print every op, not only up to the first that differs")
    return parser.parse_args()


# ---- transformers: values by the names that perk gives them ----


def tensors(value):
    """The tensors that a module took or gave, in order."""
    return [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, torch.Tensor)]


class Watch:
    """Keeps inputs and outputs of modules, as [tokens, width] in fp32."""

    def __init__(self):
        self.values = {}

    def keep(self, name, value):
        self.values[name] = value.detach().float().reshape(-1, value.shape[-1]).cpu().numpy()

    def before(self, module, name):
        module.register_forward_pre_hook(lambda _, args, kwargs: self.keep(
            name, tensors(args)[0] if args else kwargs["hidden_states"]), with_kwargs=True)

    def after(self, module, *names):
        module.register_forward_hook(lambda _, __, output: [
            self.keep(name, value) for name, value in zip(names, tensors(output))] and None)

    def layer(self, prefix, layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.after(layer.input_layernorm, prefix + "input_norm")
        for part in "qkv":
            self.after(getattr(attention, part + "_proj"), prefix + "qkv/" + part)
        self.before(attention.o_proj, prefix + "attention")
        self.before(layer.post_attention_layernorm, prefix + "attention_residual")
        self.after(layer.post_attention_layernorm, prefix + "mlp_norm")
        if hasattr(mlp, "gate_proj"):
            self.after(mlp.gate_proj, prefix + "gate_up/gate")
            self.after(mlp.up_proj, prefix + "gate_up/up")
            self.before(mlp.down_proj, prefix + "silu_mul")
        else:
            self.after(mlp.gate, prefix + "router", prefix + "route.shares", prefix + "route.experts")
        self.after(layer, prefix + "mlp_residual")

    def model(self, model):
        self.after(model.model.embed_tokens, "embedding")
        for number, layer in enumerate(model.model.layers):
            self.layer(f"layers.{number}.", layer)
        self.before(model.model.norm, "last_hidden")
        self.after(model.model.norm, "final_norm")
        self.after(model.lm_head, "logits")

    def joined(self):
        """Parts that perk computes as one, side by side."""
        made = {}
        for name, value in self.values.items():
            made.setdefault(name.split("/")[0], []).append(value)
        return {name: numpy.concatenate(parts, axis=1) for name, parts in made.items()}


@torch.no_grad()
def run_transformers(folder, ids, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    watch = Watch()
    watch.model(model)
    model(torch.tensor([ids]))
    return watch.joined()


# ---- perk ----


def choose_ids(args):
    if args.ids:
        return [int(word) for word in args.ids.split(",")]
    config = json.loads((pathlib.Path(args.model) / "config.json").read_text())
    return numpy.random.default_rng(args.seed).integers(config["vocab_size"], size=args.length).tolist()


def run_perk(args, folder):
    given = pathlib.Path(folder) / "ids.json"
    given.write_text(json.dumps([choose_ids(args)]))
    subprocess.run([args.perk, "logits", "--model", args.model, "--ids", str(given), "--backend", "reference",
                    "--precision", args.precision, "--dump-activations", folder], check=True)


def error(found, expected):
    found, expected = found.astype(numpy.float64), expected.astype(numpy.float64)
    return numpy.linalg.norm(found - expected) / max(numpy.linalg.norm(expected), 1e-30)


def share_of_other_sets(found, expected):
    return (numpy.sort(found, axis=1) != numpy.sort(expected, axis=1)).any(axis=1).mean()


def compare(args, folder):
    index = json.loads((folder / "index.json").read_text())
    expected = run_transformers(args.model, index["tokens"], torch.float32)
    noise = run_transformers(args.model, index["tokens"], torch.bfloat16) if args.precision == "bf16" else None
    compared = 0
    for line in index["activations"]:
        name = line["name"]
        if name not in expected:
            continue
        found = numpy.load(folder / line["file"])
        measure = share_of_other_sets if line["dtype"] == "i32" else error
        if found.shape != expected[name].shape:
            print(f"{name}: shape {found.shape}, transformers has {expected[name].shape}")
            return 1
        by, limit = measure(found, expected[name]), args.threshold
        if noise:
            limit = max(args.noise * measure(noise[name], expected[name]), 2.0**-8)
        compared += 1
        if args.all or by > limit:
            print(f"{name:34} {line['op']:12} error {by:.2e}, limit {limit:.2e}{': DIFFERS' if by > limit else ''}")
        if by > limit and not args.all:
            where = "outside the layers" if line["layer"] is None else f"in layer {line['layer']}"
            print(f"the first op that differs is {name} ({line['op']}), {where}; {compared - 1} before it agree")
            return 1
    print(f"{compared} of {len(index['activations'])} activations compared"
          f"{'' if args.all else ', none differs'}")
    return 0


def main():
    args = parse()
    try:
        if args.dump:
            return compare(args, pathlib.Path(args.dump))
        with tempfile.TemporaryDirectory() as folder:
            run_perk(args, folder)
            return compare(args, pathlib.Path(folder))
    except (OSError, subprocess.CalledProcessError, ValueError) as failure:
        print(f"compare_activations: {failure}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
