#!/usr/bin/env python3
"""Compares perk with transformers on the same device, over the shapes of shapes.py.

    tests/gpu/parity.py --perk build/bin/perk                             every shape, on the GPU
    tests/gpu/parity.py --perk build/bin/perk --shapes qwen3-0.6b tiny
    tests/gpu/parity.py --perk build/bin/perk --device cpu --backend reference --shapes gqa5-odd

For each shape a random model (or the folder that the shape names) is run by transformers in fp32 (without TF32), which
is the yardstick, and in bf16, which measures the noise that the number format brings.
  same bits  the first variant of some large shapes, run twice.
  logits   teacher-forced over several prompts. Relative L2 error of perk against the yardstick: at most 1.2 times that
           of transformers in bf16; no row's error above twice the worst row's in bf16; and another step size or feature
           set differs from the first by no more than two results within the noise may.
  greedy   64 tokens after each prompt, the yardstick teacher-forced on perk's own. Each token's logit in the yardstick
           is at most twice the largest error of transformers in bf16 below the best one: so the tokens are equal
           wherever the two best are further apart than the noise.

Exit codes: 0 everything passed, 1 something failed. Needs torch, transformers, safetensors and numpy.
"""
import contextlib
import gc
import json
import pathlib
import signal
import sys
import tempfile
import time

import numpy
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import harness
import models
import shapes
from harness import ROOT, Failure, Perk, Rows, require

NOISE_FACTOR, ROW_FACTOR, MAX_TOKENS = 1.2, 2.0, 64


def parse():
    parser = harness.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=shapes.ALL, choices=list(shapes.SHAPES),
                        metavar="SHAPE", help=f"of {', '.join(shapes.SHAPES)}")
    parser.add_argument("--backend", default="gpu", choices=["gpu", "reference"])
    parser.add_argument("--device", default="cuda", help="where transformers runs")
    parser.add_argument("--ahead", metavar="LABEL", help="of what ahead.py compiled: every start must find it")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


class Subject:
    """A model folder, the transformers model over it, and the prompts."""

    def __init__(self, name, work, fitted, device, seed):
        self.begin = time.monotonic()
        self.name, self.device, self.shape = name, device, shapes.SHAPES[name]
        self.config, self.layers, self.full_layers = fitted.config, fitted.layers(), fitted.full_layers
        if self.shape.folder:
            self.folder = ROOT / self.shape.folder
            self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16).to(device).eval()
        else:
            self.folder = work
            (self.folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
            self.model = models.empty_model(self.folder, device)
            models.draw(self.model, seed)
            models.save(self.model, self.folder)
        random = numpy.random.default_rng(seed)
        self.prompts = {length: random.integers(self.config["vocab_size"], size=length).tolist()
                        for length in self.shape.lengths}

    @torch.no_grad()
    def logits(self, ids):
        return self.model(torch.tensor([ids], device=self.device)).logits[0].float()

    def all_logits(self):
        return torch.cat([self.logits(ids) for ids in self.prompts.values()])

    @contextlib.contextmanager
    def row(self, rows, name):
        """A row that says how much of the model it is about."""
        with rows.part(name) as part:
            part.numbers["layers"] = self.layers
            yield part
            if self.layers < self.full_layers:
                part.detail += f"; {self.layers} of {self.full_layers} layers (little disk)"

    def widen(self):
        """The same weights in fp32; bf16 values are fp32 values."""
        self.model.float()


class Yardstick:
    """fp32 logits of all prompts, and how far bf16 strays from them."""

    def __init__(self, subject, rounded):
        self.exact = subject.all_logits()
        self.places = [f"position {i} of the prompt of {length}" for length in subject.prompts for i in range(length)]
        self.noise, self.noise_row, self.noise_max = self.errors(rounded)

    def errors(self, found):
        """(relative L2 over everything, of the worst row, largest difference of a logit)"""
        difference = found - self.exact
        rows = difference.norm(dim=1) / self.exact.norm(dim=1)
        return ((difference.norm() / self.exact.norm()).item(), rows.max().item(), difference.abs().max().item())

    def strays(self, found):
        """Where the rows are that no rounding explains, for whoever looks for the reason."""
        rows = (found - self.exact).norm(dim=1) / self.exact.norm(dim=1)
        bad = (~(rows <= ROW_FACTOR * self.noise_row)).nonzero().flatten().tolist()
        if not bad:
            return "no row stands out"
        shown = ", ".join(self.places[row] for row in bad[:3])
        return f"{len(bad)} of {len(rows)} rows stand out: {shown}{', ...' if len(bad) > 3 else ''}"

    def numbers(self):
        return dict(bf16_l2=self.noise, bf16_worst_row=self.noise_row, bf16_max_abs=self.noise_max)


def perk_logits(perk, subject, options, work):
    given, made = work / "ids.json", work / "logits.npy"
    given.write_text(json.dumps(list(subject.prompts.values())))
    try:
        perk.succeed("logits", "--model", subject.folder, "--ids", given, "--out", made, "--backend", perk.backend,
                     "--verbose", *options, timeout=subject.shape.seconds)
        return torch.from_numpy(numpy.load(made))
    finally:
        made.unlink(missing_ok=True)


def attempt(function, *args, **options):
    """What the function returns, or the Failure to report in its place."""
    try:
        return function(*args, **options)
    except Failure as failure:
        return failure
    except (OSError, ValueError, KeyError) as error:  # a result that cannot be read
        return Failure(f"{type(error).__name__}: {error}")


def run_perk(perk, subject, work):
    """Everything that perk makes of the subject: {variant: logits}, {prompt length: the run's JSON}; a Failure in the
    place of what could not be made. It runs while the model is still in bf16, when there is most room beside it."""
    logits = {variant: attempt(perk_logits, perk, subject, options, work)
              for variant, options in subject.shape.variants.items()}
    runs = {length: attempt(perk.generate, subject.folder, subject.prompts[length], MAX_TOKENS,
                            "--verbose", timeout=subject.shape.seconds) for length in subject.shape.greedy}
    return logits, runs


def check_repeats(part, perk, subject, work, base):
    """The base variant once more: every bit must be the same. Only large shapes keep all of the GPU busy enough to show
    that something is read while it is overwritten."""
    if isinstance(base, Failure):
        raise base
    again = perk_logits(perk, subject, next(iter(subject.shape.variants.values())), work)
    differing = (again != base).any(dim=1).sum().item() if again.shape == base.shape else "the shapes"
    part.detail = f"{len(base)} rows of logits, the same bits twice"
    require(differing == 0, f"{differing} of {len(base)} rows of logits differ from one run to the next")


def check_logits(part, yardstick, found, base):
    if isinstance(found, Failure):
        raise found
    exact = yardstick.exact
    require(found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    found = found.to(exact.device)
    error, row, largest = yardstick.errors(found)
    part.numbers.update(l2=error, worst_row=row, max_abs=largest, **yardstick.numbers())
    ratio, row_ratio = error / yardstick.noise, row / yardstick.noise_row
    part.detail = f"error {error:.2e}, {ratio:.2f} of bf16's; worst row {row_ratio:.2f}"
    require(ratio <= NOISE_FACTOR and row_ratio <= ROW_FACTOR,  # NaN never passes
            f"error {error:.2e} is {ratio:.2f} of bf16's, the worst row {row_ratio:.2f}; {yardstick.strays(found)}")
    if isinstance(base, Failure) or base.shape != exact.shape:
        return
    apart = ((found - base.to(exact.device)).norm() / exact.norm()).item()
    part.numbers["apart_from_base"] = apart
    require(apart <= 2**0.5 * NOISE_FACTOR * yardstick.noise, f"{apart:.3e} apart from the first variant")


def check_greedy(part, yardstick, subject, made):
    """`made`: {prompt length: the JSON of perk run}."""
    noise = 2 * yardstick.noise_max
    total, equal, clear, worst = 0, 0, 0, 0.0
    for length, run in made.items():
        if isinstance(run, Failure):
            raise run
        tokens = run["tokens"]
        require(len(tokens) == MAX_TOKENS, f"{len(tokens)} tokens after a prompt of {length}, expected {MAX_TOKENS}")
        logits = subject.logits(subject.prompts[length] + tokens[:-1])[length - 1:]
        chosen = torch.tensor(tokens, device=logits.device)
        best = logits.topk(2, dim=1).values
        behind = best[:, 0] - logits.gather(1, chosen[:, None])[:, 0]
        total += len(tokens)
        equal += int((behind == 0).sum())
        clear += int((best[:, 0] - best[:, 1] > noise).sum())
        worst = max(worst, behind.max().item())
        at = int(behind.argmax())
        require(behind[at] <= noise, f"token {at} after a prompt of {length} is {tokens[at]}, {behind[at]:.3g} behind "
                                     f"the best, {int(logits[at].argmax())}; the noise is {noise:.3g}")
    pace = min(run["times"]["decode_ms"] for run in made.values()) / (MAX_TOKENS - 1)
    part.numbers.update(tokens=total, equal=equal, clear=clear, furthest_behind=worst, noise=noise,
                        ms_a_token=pace, compile_ms=max(run["start"]["compile_ms"] for run in made.values()),
                        weights_ms=min(run["start"]["weights_ms"] for run in made.values()))
    part.detail = f"{equal} of {total} tokens equal, none differs beyond the noise; {clear} steps are clear of it"


def check_shape(rows, perk, subject, work):
    rounded = subject.all_logits()
    if subject.device != "cpu":
        torch.cuda.empty_cache()
    logits, runs = run_perk(perk, subject, work)
    base = next(iter(logits.values()))
    if subject.shape.repeats:
        with rows.part(f"same bits {subject.name}") as part:
            check_repeats(part, perk, subject, work, base)
    subject.widen()
    yardstick = Yardstick(subject, rounded)
    del rounded
    for variant, found in logits.items():
        with subject.row(rows, f"logits {subject.name}, {variant}") as part:
            check_logits(part, yardstick, found, base)
    with subject.row(rows, f"greedy {subject.name}") as part:
        check_greedy(part, yardstick, subject, runs)
        part.numbers["shape_s"] = round(time.monotonic() - subject.begin, 1)  # from the drawing of its weights on


def run_shape(rows, perk, name, args):
    try:
        fitted = shapes.fit(shapes.SHAPES[name])
        with tempfile.TemporaryDirectory(prefix="perk-parity-", dir=fitted.place) as folder:
            work = pathlib.Path(folder)
            check_shape(rows, perk, Subject(name, work, fitted, args.device, args.seed), work)
    except Exception as error:  # of torch or the disk: perk's own failures are rows already
        rows.fail_missing(shapes.row_names(name), f"{type(error).__name__}: {error}")
    gc.collect()
    if args.device != "cpu":
        torch.cuda.empty_cache()


def check_found(part, perk):
    """Every program that the starts told of was made by perk compile, under the key that a start looks for."""
    compiled = [line for line in perk.programs if "from the cache" not in line]
    part.detail = f"{len(perk.programs)} programs in all starts, {len(compiled)} of them compiled by a start"
    require(perk.programs, "no start told of its programs")
    require(not compiled, f"{part.detail}, such as: {compiled[:2]}")


def main():
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves through the folders' clean-up
    logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    rows = Rows(args.rows)
    perk = Perk(args.perk, args.backend)
    for name in args.shapes:
        run_shape(rows, perk, name, args)
    if args.ahead:
        with rows.part(shapes.found_row(args.ahead)) as part:
            check_found(part, perk)
    return 1 if rows.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
