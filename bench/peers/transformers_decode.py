#!/usr/bin/env python3
"""Measures how fast transformers decodes on this GPU, for comparison with `perk bench decode`.

    bench/peers/transformers_decode.py --config bench/configs/qwen3-8b --out bench/results/peers-8b.json

Random bf16 weights, a static KV cache, `--batch` requests with `--context` tokens each. The ways:

    eager    every operation is a launch
    graph    one CUDA graph that holds a whole step, embedding to argmax
    compile  torch.compile over the whole step (--compile-mode); what it makes is held by a CUDA graph as well, unless
             the mode makes graphs of its own (reduce-overhead)

A step is timed as perk's is: step_ms by the host's clock from its beginning until the tokens are on the host,
device_ms by events around it. Before it is timed, each way makes the same step over the same cache, and its logits are
compared with those of the first way that worked (check_relative_error; null for that one).

Prints, and writes to --out, an object a line for every way, with the keys of `perk bench decode --json` and "peer"; a
way that fails has "error" instead of times, and takes nothing from the others. Exit codes: 0 at least one way was
measured, 1 none was. Needs torch and transformers.
"""
import argparse
import datetime
import json
import pathlib
import sys
import tempfile
import time
import traceback

import torch
import transformers
from transformers import StaticCache

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import models  # noqa: E402  (in tests/gpu)

WAYS = ("eager", "graph", "compile")
WARM_UP = 10


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "bench" / "configs" / "qwen3-0.6b"),
                        help="a folder with config.json")
    parser.add_argument("--layers", type=int, help="instead of the config's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache before the first timed step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--ways", help=f"of {','.join(WAYS)}; all of them on a GPU, elsewhere eager")
    parser.add_argument("--compile-mode", default="max-autotune-no-cudagraphs",
                        choices=["default", "max-autotune-no-cudagraphs", "reduce-overhead"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="a file for the JSON")
    args = parser.parse_args()
    args.on_gpu = args.device != "cpu"
    args.ways = args.ways.split(",") if args.ways else list(WAYS if args.on_gpu else WAYS[:1])
    unknown = [way for way in args.ways if way not in WAYS]
    if unknown or (not args.on_gpu and "graph" in args.ways):
        parser.error(f"--ways: {', '.join(unknown) or 'graph'} cannot be measured here")
    return args


class Decoder:
    """The requests' next step over buffers that stay where they are, so that a graph can hold it."""

    def __init__(self, model, args):
        self.model, self.length = model, args.context + args.steps + 2 * WARM_UP
        self.cache = StaticCache(config=model.config, max_cache_len=self.length)
        self.logits = None
        self.token = torch.zeros((args.batch, 1), dtype=torch.long, device=args.device)
        self.position = torch.zeros((1, 1), dtype=torch.long, device=args.device)
        self.places = torch.arange(self.length, device=args.device)

    def forward(self, ids, positions):
        """The last token's successor, and its logits. The masks are made here: making them in the library reads the
        GPU's answers."""
        mask = (self.places[None, :] <= positions[0][:, None])[None, None]
        if getattr(self.model.config, "layer_types", None):
            mask = {"full_attention": mask}
        hidden = self.model.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                  past_key_values=self.cache, use_cache=True).last_hidden_state
        logits = self.model.lm_head(hidden[:, -1:])
        return logits.argmax(-1), logits

    def prefill(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self.token.copy_(self.forward(ids, positions)[0])
        self.position.fill_(ids.shape[1])

    def step(self):
        token, self.logits = self.forward(self.token, self.position)
        self.token.copy_(token)
        self.position.add_(1)


def capture(decoder):
    """The step as a graph. Capturing runs nothing, so the cache and the position stay as they are."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph.replay


def prepare(decoder, way, args):
    """What runs a step, warmed up."""
    if way == "compile":
        torch._dynamo.reset()
        decoder.forward = torch.compile(decoder.forward, mode=args.compile_mode, dynamic=False)
    for _ in range(WARM_UP):
        decoder.step()
    makes_graphs = way == "compile" and args.compile_mode == "reduce-overhead"
    return capture(decoder) if args.on_gpu and way != "eager" and not makes_graphs else decoder.step


def check(decoder, step, args):
    """Logits of the same step in every way: the cache's `context` tokens, then token 7."""
    decoder.token.fill_(7)
    decoder.position.fill_(args.context)
    step()
    return decoder.logits.float().cpu()


def timed(call, decoder, on_gpu):
    """Milliseconds by the host's clock and by events."""
    if on_gpu:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
    start = time.perf_counter()
    if on_gpu:
        begin.record()
    call()
    if on_gpu:
        end.record()
    decoder.token.tolist()
    wall = (time.perf_counter() - start) * 1e3
    return wall, begin.elapsed_time(end) if on_gpu else wall


def quantile(values, part):
    """As perk's: of few values, the outer parts are the least and the greatest."""
    return sorted(values)[min(int(len(values) * part), len(values) - 1)]


def spread(name, values):
    return {name: quantile(values, 0.5), f"{name}_p10": quantile(values, 0.1), f"{name}_p90": quantile(values, 0.9)}


def measure(model, way, args):
    decoder = Decoder(model, args)
    generator = torch.Generator(args.device).manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (args.batch, args.context), device=args.device, generator=generator)
    decoder.prefill(ids)
    step = prepare(decoder, way, args)
    logits = check(decoder, step, args)
    walls, devices = zip(*[timed(step, decoder, args.on_gpu) for _ in range(args.steps)])
    expected = args.context + 1 + args.steps
    if decoder.position.item() != expected:
        raise RuntimeError(f"at position {decoder.position.item()} after the last step, expected {expected}")
    return dict(spread("step_ms", walls), **spread("device_ms", devices)), logits


def bytes_read(model, args):
    """Of a step, counted as perk counts: the weights once, the keys and values in the middle of the steps."""
    weights = sum(weight.nbytes for weight in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes  # of the table one row is read
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    position = 2 * config.num_key_value_heads * head * 2 * config.num_hidden_layers
    return dict(weight_bytes=weights, kv_bytes=position * args.batch * (args.context + args.steps // 2))


def build(args):
    config = json.loads((pathlib.Path(args.config) / "config.json").read_text())
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:config["num_hidden_layers"]]
    config["_attn_implementation"] = args.attention
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        model = models.empty_model(folder, args.device)
    models.draw(model, 1)
    return model


def head_of(model, way, args):
    name = f"transformers, {way}" + (f" ({args.compile_mode})" if way == "compile" else "")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return dict(what="decode", peer=name, model=args.config, device=torch.cuda.get_device_name() if args.on_gpu
                else "CPU", date=date, batch=args.batch, context=args.context, steps=args.steps,
                layers=model.config.num_hidden_layers, attention=args.attention, random_weights=True,
                torch=torch.__version__, transformers=transformers.__version__, **bytes_read(model, args))


def relative_error(logits, others):
    return None if others is None else ((logits - others).norm() / others.norm()).item()


@torch.no_grad()
def main():
    args = parse()
    model, first, lines = build(args), None, []
    for way in args.ways:
        result = head_of(model, way, args)
        try:
            times, logits = measure(model, way, args)
            result.update(times, check_relative_error=relative_error(logits, first))
            first = logits if first is None else first
        except Exception as error:  # whatever a version of torch or transformers cannot do: the other ways still count
            traceback.print_exc()
            result["error"] = f"{type(error).__name__}: {error}"[:400]
        lines.append(json.dumps(result))
        print(lines[-1], flush=True)
    if args.out:
        pathlib.Path(args.out).write_text("\n".join(lines) + "\n")
    return 0 if first is not None else 1


if __name__ == "__main__":
    sys.exit(main())
