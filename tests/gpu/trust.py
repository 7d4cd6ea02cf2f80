#!/usr/bin/env python3
"""Checks on a GPU what lets one rely on perk: the self-test, the sanitizers of CUDA, and what watching costs.

    tests/gpu/trust.py --perk build/bin/perk

The doctor's self-test; every op and the model in examples/tiny under compute-sanitizer's memcheck, racecheck and
synccheck; what the waits' limit and the time stamps of perk profile add to a step. Each part is a row. Exit codes: 0
everything passed, 1 something failed. Needs nothing but Python.
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

from harness import ROOT, Perk, Rows, Skip, last_lines, require

TINY = ROOT / "examples" / "tiny"
SMALL = ROOT / "bench" / "configs" / "qwen3-0.6b"  # the shape whose steps have the most waits for their length
WAIT_LIMIT_PERCENT, STAMPS_PERCENT = 1.0, 3.0
ROUNDS = 3  # of measuring with and without, in turn: the median of the ratios is what counts


class Trust:
    def __init__(self, perk, cache):
        self.perk, self.cache = perk, cache

    def selftest(self):
        found = self.perk.json("doctor", "--selftest", PERK_CACHE_DIR=self.cache)
        require(found["gpu_ready"], "perk doctor says that the GPU is not ready")
        return "every op computes right"

    # ---- sanitizers ----

    def sanitize(self, tool, *command):
        """The command must succeed, with no finding. Its programs come from the cache, as far as it has them."""
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not pathlib.Path(sanitizer).exists():
            raise Skip("there is no compute-sanitizer")
        line = [sanitizer, "--tool", tool, "--error-exitcode", "99", self.perk.binary, *map(str, command)]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", timeout=150,
                              env={**os.environ, "PERK_CACHE_DIR": self.cache})
        summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout + done.stderr)
        require(done.returncode == 0, f"exit code {done.returncode}: {last_lines(done.stdout + done.stderr, 6)}")
        require(summary and all(re.match(r"0 (errors|hazards)", text) for text in summary), f"found: {summary}")
        return f"{command[0]}: {summary[-1]}"

    def start_checks(self, pool):
        """{name of the row: what will be its detail}. They run side by side: most of their time is the CPU's. memcheck
        sees the whole grid of ops; the others take far longer, and get the self-test's shapes."""
        model = ("run", "--model", TINY, "--prompt", "Once upon a time", "--max-tokens", "8", "--backend", "gpu")
        found = {"self-test": pool.submit(self.selftest)}
        for tool in ("memcheck", "racecheck", "synccheck"):
            ops = ("test-op", "--all", "--backend", "gpu") if tool == "memcheck" else ("doctor", "--selftest")
            found[f"{tool}, every op"] = pool.submit(self.sanitize, tool, *ops)
            found[f"{tool}, a model"] = pool.submit(self.sanitize, tool, *model)
        return found

    # ---- costs ----

    def step_ms(self, *flags):
        found = self.perk.json("bench", "decode", "--model", SMALL, "--random-weights", "--no-check", "--steps", "400",
                               *flags, PERK_CACHE_DIR=self.cache)
        return found["device_ms"]

    def wait_limit(self, part):
        """The same program with and without the limit; that it computes right is what all other rows are about."""
        pairs = [(self.step_ms(), self.step_ms("--unlimited-waits")) for _ in range(ROUNDS)]
        cost = statistics.median(100 * (limited / unlimited - 1) for limited, unlimited in pairs)
        part.numbers.update(cost_percent=cost, step_ms=[a for a, _ in pairs], unlimited_step_ms=[b for _, b in pairs])
        part.detail = f"{cost:.2f} % of a step of 0.6B"
        require(cost < WAIT_LIMIT_PERCENT, f"{cost:.2f} %, above {WAIT_LIMIT_PERCENT} %")

    def stamps(self, part):
        said = self.perk.succeed("profile", "--model", SMALL, "--random-weights", "--steps", "400",
                                 PERK_CACHE_DIR=self.cache).stdout
        found = re.findall(r"step, (?:profiled|plain) .* on the device ([0-9.]+) ms", said)
        require(len(found) == 2, f"no cost in: {last_lines(said)}")
        profiled, plain = map(float, found)
        cost = 100 * (profiled / plain - 1)
        part.numbers.update(cost_percent=cost, profiled_ms=profiled, plain_ms=plain)
        part.detail = f"{cost:.2f} % of a step of 0.6B"
        require(cost < STAMPS_PERCENT, f"{cost:.2f} %, above {STAMPS_PERCENT} %")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perk", default=str(ROOT / "build" / "bin" / "perk"), help="the perk binary")
    parser.add_argument("--rows", help="a file that gets a line of JSON for each result")
    args = parser.parse_args()
    rows = Rows(args.rows)
    with tempfile.TemporaryDirectory(prefix="perk-trust-") as cache:
        trust = Trust(Perk(args.perk, "gpu"), cache)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for name, detail in trust.start_checks(pool).items():
                with rows.part(name) as part:
                    part.detail = detail.result()
        for name, check in (("cost of the waits' limit", trust.wait_limit), ("cost of time stamps", trust.stamps)):
            with rows.part(name) as part:
                check(part)
    return 1 if rows.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
