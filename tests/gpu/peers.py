#!/usr/bin/env python3
"""Measures how fast transformers decodes one request on this GPU, for comparison with perk bench.

    tests/gpu/peers.py --config bench/configs/qwen3-8b --out peers.json

Random bf16 weights, a static KV cache, batch 1, `--context` tokens in the cache. Two ways: eager, where every operation
is a launch, and one CUDA graph that holds a whole step, embedding to argmax. Each of `--steps` steps is timed with
events; the result is their median. The clock of a step is the GPU's: sampling on the host is not in it.

Prints and writes {"device", "config", "context", "eager": {...} or "graph": {...} with "ms_a_token", "min_ms",
"weights_gb_s"}. Exit codes: 0 at least one way was measured, 1 none was. Needs torch and transformers.
"""
import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

import torch
import transformers
from transformers import StaticCache

import models
from harness import ROOT


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "bench" / "configs" / "qwen3-0.6b"),
                        help="a folder with config.json")
    parser.add_argument("--layers", type=int, help="instead of the config's")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache before the first timed step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="a file for the JSON")
    return parser.parse_args()


class Decoder:
    """One request's next step over buffers that stay where they are, so that a graph can hold it."""

    def __init__(self, model, device, length):
        self.model, self.length = model, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros((1, 1), dtype=torch.long, device=device)
        self.position = torch.zeros((1, 1), dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)

    def forward(self, ids, positions):
        """Logits of the last token. The masks are made here: making them in the library reads the GPU's answers."""
        mask = (self.places[None, :] <= positions[0][:, None])[None, None]
        hidden = self.model.model(input_ids=ids, attention_mask={"full_attention": mask}, position_ids=positions,
                                  past_key_values=self.cache, use_cache=True).last_hidden_state
        return self.model.lm_head(hidden[:, -1:])

    def prefill(self, ids):
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self.token.copy_(self.forward(ids, positions).argmax(-1))
        self.position.fill_(ids.shape[1])

    def step(self):
        self.token.copy_(self.forward(self.token, self.position).argmax(-1))
        self.position.add_(1)


class Clock:
    """Milliseconds of a call: by events on a GPU, by the wall clock elsewhere."""

    def __init__(self, device):
        self.on_gpu = device != "cpu"

    def time(self, call):
        if not self.on_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def capture(decoder):
    """The step as a graph. Capturing runs nothing, so the cache and the position stay as they are."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph.replay


def measure(model, args, as_graph):
    warm_up = 10
    decoder = Decoder(model, args.device, args.context + args.steps + warm_up)
    ids = torch.randint(model.config.vocab_size, (1, args.context), device=args.device)
    decoder.prefill(ids)
    for _ in range(warm_up):
        decoder.step()
    step = capture(decoder) if as_graph else decoder.step
    clock = Clock(args.device)
    times = [clock.time(step) for _ in range(args.steps)]
    expected = args.context + warm_up + args.steps
    if decoder.position.item() != expected:
        raise RuntimeError(f"at position {decoder.position.item()} after the last step, expected {expected}")
    weights = sum(weight.nbytes for weight in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes  # of the table one row is read
    best = statistics.median(times)
    return dict(ms_a_token=best, min_ms=min(times), steps=args.steps, weights_bytes=weights,
                weights_gb_s=weights / best * 1e-6)


def build(args):
    config = json.loads((pathlib.Path(args.config) / "config.json").read_text())
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    config["_attn_implementation"] = args.attention
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        model = models.empty_model(folder, args.device)
    models.draw(model, 1)
    return model


@torch.no_grad()
def main():
    args = parse()
    model = build(args)
    on_gpu = args.device != "cpu"
    result = dict(device=torch.cuda.get_device_name() if on_gpu else "CPU", config=pathlib.Path(args.config).name,
                  layers=model.config.num_hidden_layers, context=args.context, batch=1, attention=args.attention,
                  torch=torch.__version__, transformers=transformers.__version__)
    measured = 0
    for way, as_graph in (("eager", False), ("graph", True))[: 2 if on_gpu else 1]:
        try:
            result[way] = measure(model, args, as_graph)
            measured += 1
        except Exception as error:  # whatever a version of torch or transformers cannot do: the other way still counts
            result[way] = dict(error=f"{type(error).__name__}: {error}"[:400])
    text = json.dumps(result)
    print(text)
    if args.out:
        pathlib.Path(args.out).write_text(text + "\n")
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
