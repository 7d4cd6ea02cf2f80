#!/usr/bin/env python3
"""Compares the logits of `perk logits` with those of transformers, for any model folder.

    tests/compare_transformers.py --model FOLDER                      the reference executor, fp32, within 1e-4
    tests/compare_transformers.py --model FOLDER --backend gpu --device cuda --precision auto --noise 1.2

Both read the same ids, teacher-forced: those of --ids (a JSON list of lists), or seeded random ones. The yardstick is
transformers in --dtype (float32). A row's error is its largest difference over its largest logit; `l2` is the relative
L2 error of a list. With --noise X the limit is X times the error that transformers itself makes in bf16 instead of
--threshold. Greedy tokens must be equal wherever the yardstick's two best logits are further apart than twice the
limit.

Exit codes: 0 within the limit, 1 beyond it, 2 something could not be run. Needs torch and transformers.
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
    parser.add_argument("--backend", default="reference", choices=["reference", "gpu", "auto"])
    parser.add_argument("--precision", default="fp32", choices=["auto", "bf16", "fp32"],
                        help="of the reference executor")
    parser.add_argument("--ids", help="a JSON file with a list of id lists")
    parser.add_argument("--lists", type=int, default=3, help="random lists, where no --ids are given")
    parser.add_argument("--length", type=int, default=48, help="tokens of the longest random list")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where transformers runs")
    parser.add_argument("--dtype", default="float32", help="of the yardstick")
    parser.add_argument("--threshold", type=float, default=1e-4)
    parser.add_argument("--noise", type=float, help="limit as a multiple of transformers' own bf16 error")
    parser.add_argument("rest", nargs="*", help="after --: more arguments for perk logits")
    return parser.parse_args()


def choose_ids(args, vocab):
    if args.ids:
        return json.loads(pathlib.Path(args.ids).read_text())
    random = numpy.random.default_rng(args.seed)
    lengths = [max(1, args.length * (i + 1) // args.lists) for i in range(args.lists)]
    return [random.integers(vocab, size=length).tolist() for length in lengths]


@torch.no_grad()
def run_transformers(args, dtype, ids=None):
    """One array of logits [tokens, vocab] for each list, and the lists."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype), attn_implementation="eager")
    model = model.eval().to(args.device)
    ids = ids or choose_ids(args, model.config.vocab_size)
    return [model(torch.tensor([row], device=args.device)).logits[0].float().cpu().numpy() for row in ids], ids


def run_perk(args, ids):
    with tempfile.TemporaryDirectory() as folder:
        given, made = pathlib.Path(folder) / "ids.json", pathlib.Path(folder) / "logits.npy"
        given.write_text(json.dumps(ids))
        command = [args.perk, "logits", "--model", args.model, "--ids", str(given), "--out", str(made), "--backend",
                   args.backend, *args.rest]
        if args.backend == "reference":
            command += ["--precision", args.precision]
        subprocess.run(command, check=True)
        logits = numpy.load(made)
    return numpy.split(logits, numpy.cumsum([len(row) for row in ids])[:-1])


def errors(found, expected):
    """(worst row error, relative L2 error)"""
    found, expected = found.astype(numpy.float64), expected.astype(numpy.float64)
    worst = numpy.abs(found - expected).max(axis=1) / numpy.abs(expected).max(axis=1)
    return worst.max(), numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected)


def other_tokens(found, expected, limit):
    """How many greedy tokens differ, and how many of those although the gap is beyond the limit."""
    best_two = numpy.sort(expected, axis=1)[:, -2:]
    clear = best_two[:, 1] - best_two[:, 0] > 2 * limit * numpy.abs(expected).max(axis=1)
    differs = found.argmax(axis=1) != expected.argmax(axis=1)
    return differs.sum(), (differs & clear).sum()


def main():
    args = parse()
    try:
        expected, ids = run_transformers(args, args.dtype)
        found = run_perk(args, ids)
        noise = run_transformers(args, "bfloat16", ids)[0] if args.noise else None
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        print(f"compare_transformers: {error}", file=sys.stderr)
        return 2
    good = True
    for i, (mine, theirs) in enumerate(zip(found, expected)):
        if mine.shape != theirs.shape:
            print(f"list {i}: shape {mine.shape}, expected {theirs.shape}")
            return 1
        worst, l2 = errors(mine, theirs)
        limit, limit_l2 = args.threshold, args.threshold
        if noise:
            limit, limit_l2 = (args.noise * value for value in errors(noise[i], theirs))
        differ, wrong = other_tokens(mine, theirs, limit)
        fine = worst <= limit and l2 <= limit_l2 and wrong == 0
        good = good and fine
        print(f"list {i}: {len(mine)} tokens, worst row {worst:.2e} (limit {limit:.2e}), l2 {l2:.2e} "
              f"(limit {limit_l2:.2e}), tokens that differ {differ}, {wrong} of them beyond the limit: "
              f"{'ok' if fine else 'FAILED'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
