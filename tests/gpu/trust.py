#!/usr/bin/env python3
"""Checks on a GPU what lets one rely on perk: the self-test, the sanitizers of CUDA, and what watching costs.

    tests/gpu/trust.py --perk build/bin/perk [--part checks|costs]

checks: the doctor's self-test; every op and the model in examples/tiny under compute-sanitizer's memcheck, racecheck
and synccheck, several side by side. costs: what the waits' limit and the time stamps of perk profile add to a step;
nothing else may run beside that. Each is a row. A sanitizer's findings are in the row and, whole, in what this prints.
Exit codes: 0 everything passed, 1 something failed. Needs nothing but Python.
"""
import concurrent.futures
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import harness
from harness import ROOT, Failure, Perk, Rows, Skip, last_lines, require

TINY = ROOT / "examples" / "tiny"
SMALL = ROOT / "bench" / "configs" / "qwen3-0.6b"  # the shape whose steps have the most waits for their length
WAIT_LIMIT_PERCENT, STAMPS_PERCENT = 1.0, 3.0
ROUNDS = 3   # of measuring with and without, in turn: the median of the ratios is what counts
AT_ONCE = 4  # sanitizers: most of their time is the CPU's
SECONDS = 180  # for one of them
TOOLS = ("memcheck", "racecheck", "synccheck")
SHOWN = 6    # lines of a sanitizer's findings in a row
CHECKS = ["self-test", *(f"{tool}, {what}" for tool in TOOLS for what in ("every op", "a model"))]
COSTS = ["cost of the waits' limit", "cost of time stamps"]


# ---- sanitizers ----


def findings(text):
    """What a sanitizer said, without its frame. Races come as hazards, byte by byte, and analysed, by pairs of
    instructions: these say most, so they are first."""
    said = [line.strip("= ").strip() for line in text.splitlines() if line.startswith("=========")]
    noise = re.compile(r"$|COMPUTE-SANITIZER|.*SUMMARY:|Target application|(Saved )?host backtrace|Host Frame", re.I)
    said = [line for line in said if not noise.match(line)]
    analysed, is_analysis = [], False
    for line in said:
        is_analysis = "Race reported" in line or (is_analysis and line.startswith("and "))
        if is_analysis:
            analysed.append(line)
    return analysed + [line for line in said if line not in analysed]


def ops_that_ran(text):
    """The rows of perk test-op that follow findings: of the ops that these are about."""
    found, pending = [], False
    for line in text.splitlines():
        if line.startswith("=========") and re.search("error|warning|invalid|race|hazard", line, re.I):
            pending = "SUMMARY" not in line
        elif pending and re.match(r"(ok|MISMATCH|not run)\s", line):
            found.append(" ".join(line.split()))
            pending = False
    return found


def run_to_end(line, limit):
    """Exit code and output of a command; a file takes the output, because what the command leaves behind may hold a
    pipe open. At the limit, a Failure."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            limit = None
        output.seek(0)
        said = output.read().decode(errors="replace")
    print(f"  $ {' '.join(line)} -> {code}\n    " + said.strip().replace("\n", "\n    "), flush=True)
    require(limit, f"ended at its limit; {last_lines(said, 2)}")
    return code, said


class Trust:
    def __init__(self, perk):
        self.perk = perk

    def sanitize(self, tool, *command, shows=""):
        """The command must succeed, with no finding, and its output have `shows`. Returns the tool's summary."""
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not pathlib.Path(sanitizer).exists():
            raise Skip("there is no compute-sanitizer")
        options = ["--error-exitcode", "99", "--show-backtrace", "no", "--print-limit", "1000"]
        if tool == "racecheck":
            options += ["--racecheck-report", "all"]
        command = [str(word) for word in command]
        name = " ".join(command[:2] if command[0] == "test-op" else command[:1])
        name += " --portable" if "--portable" in command else ""
        try:
            code, said = run_to_end([sanitizer, "--tool", tool, *options, self.perk.binary, *command], SECONDS)
        except Failure as failure:
            raise Failure(f"{name}: {failure}") from None
        summaries = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", said)
        clean = summaries and all(re.match(r"0 (errors|hazards)", text) for text in summaries)
        if code != 0 or not clean:
            found = findings(said)
            more = [f"and {len(found) - SHOWN} lines more"] if len(found) > SHOWN else []
            near = [f"in or before: {row}" for row in ops_that_ran(said)[:2]]
            told = [*summaries, *near, *found[:SHOWN], *more] if found else [*summaries, last_lines(said, 4)]
            raise Failure(f"{name}: exit code {code}: {' | '.join(told)}")
        require(shows in said, f"{name}: did not run {shows}; {last_lines(said, 2)}")
        return summaries[-1]

    def selftest(self):
        """What the doctor found; also where some op is wrong."""
        done = self.perk.call("doctor", "--selftest", "--json", timeout=SECONDS)
        try:
            return json.loads(done.stdout)["selftest"]
        except (ValueError, KeyError):
            raise Failure(f"perk doctor failed: {last_lines(done.stderr or done.stdout)}") from None

    def sanitize_ops(self, pool, tool, selftest):
        """The self-test's cases, each in a process of its own, so that a finding names its op."""
        for case in selftest["cases"]:
            shape = case["shape"]
            flags = [f"--{flag}" for flag in ("bias", "residual", "norms") if f", {flag}" in shape]
            portable = ["--portable"] if case["portable"] else []
            followed = ["--for-racecheck"] if tool == "racecheck" else []
            yield pool.submit(self.sanitize, tool, "test-op", case["op"], *flags, *portable, *followed, "--backend", "gpu",
                              "--seed", case.get("seed", 1), shows=f"  {shape}\n")

    # ---- costs ----

    def step_ms(self, *flags, steps=400):
        found = self.perk.json("bench", "decode", "--model", SMALL, "--random-weights", "--no-check", "--steps", steps,
                               *flags)
        return found["device_ms"]

    def profile(self, steps=400):
        said = self.perk.succeed("profile", "--model", SMALL, "--random-weights", "--steps", steps).stdout
        found = re.findall(r"step, (?:profiled|plain) .* on the device ([0-9.]+) ms", said)
        require(len(found) == 2, f"no cost in: {last_lines(said)}")
        return map(float, found)

    def warm_up(self, pool):
        """Brings the programs that costs will be measured with into the cache."""
        return [pool.submit(self.step_ms, steps=2), pool.submit(self.step_ms, "--unlimited-waits", steps=2),
                pool.submit(self.profile, steps=2)]

    def wait_limit(self, part):
        """The same program with and without the limit; that it computes right is what all other rows are about."""
        pairs = [(self.step_ms(), self.step_ms("--unlimited-waits")) for _ in range(ROUNDS)]
        cost = statistics.median(100 * (limited / unlimited - 1) for limited, unlimited in pairs)
        part.numbers.update(cost_percent=cost, step_ms=[a for a, _ in pairs], unlimited_step_ms=[b for _, b in pairs])
        part.detail = f"{cost:.2f} % of a step of 0.6B"
        require(cost < WAIT_LIMIT_PERCENT, f"{cost:.2f} %, above {WAIT_LIMIT_PERCENT} %")

    def stamps(self, part):
        profiled, plain = self.profile()
        cost = 100 * (profiled / plain - 1)
        part.numbers.update(cost_percent=cost, profiled_ms=profiled, plain_ms=plain)
        part.detail = f"{cost:.2f} % of a step of 0.6B"
        require(cost < STAMPS_PERCENT, f"{cost:.2f} %, above {STAMPS_PERCENT} %")


# ---- the rows ----


def judge_selftest(part, selftest):
    wrong = [f"{case['op']} {case['shape']}{', portable' if case['portable'] else ''}: {case['verdict']}"
             for case in selftest["cases"] if case["verdict"] != "ok"]
    part.numbers.update(cases=len(selftest["cases"]), test_seconds=selftest["seconds"])
    part.detail = "every op computes right"
    require(selftest["ok"] and not wrong, f"{selftest.get('problem')}: {'; '.join(wrong[:6])}")


def judge_ops(part, running):
    """`running`: {row of perk test-op: its run under a sanitizer}."""
    troubles = []
    for run in running:
        try:
            run.result()
        except Failure as failure:
            troubles.append(str(failure))
    require(running, "not run: the self-test, whose cases these are, did not tell them")
    part.detail = f"{len(running)} runs of an op each, no finding"
    require(not troubles, f"{len(troubles)} of {len(running)} runs: {' || '.join(troubles[:4])}")


def checks(trust, rows):
    """memcheck sees the whole grid of ops; the others take far longer, and get the self-test's shapes."""
    model = ("run", "--model", TINY, "--prompt", "Once upon a time", "--max-tokens", "8", "--backend", "gpu")
    cases = {"cases": []}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        running = pool.submit(trust.selftest)
        grid = pool.submit(trust.sanitize, "memcheck", "test-op", "--all", "--backend", "gpu")
        models = {tool: pool.submit(trust.sanitize, tool, *model) for tool in TOOLS}
        trust.warm_up(pool)
        with rows.part("self-test") as part:
            cases = running.result()
            judge_selftest(part, cases)
        ops = {tool: list(trust.sanitize_ops(pool, tool, cases)) for tool in TOOLS[1:]}
        for tool in TOOLS:
            with rows.part(f"{tool}, every op") as part:
                if tool == "memcheck":
                    part.detail = grid.result()
                else:
                    judge_ops(part, ops[tool])
            with rows.part(f"{tool}, a model") as part:
                part.detail = models[tool].result()


def costs(trust, rows):
    for name, check in zip(COSTS, (trust.wait_limit, trust.stamps)):
        with rows.part(name) as part:
            check(part)


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--part", choices=["checks", "costs"], help="one alone; default: both, one after the other")
    args = parser.parse_args()
    rows = Rows(args.rows)
    with tempfile.TemporaryDirectory(prefix="perk-trust-") as cache:
        os.environ.setdefault("PERK_CACHE_DIR", cache)
        for name, part in (("checks", checks), ("costs", costs)):
            if args.part in (None, name):
                part(Trust(Perk(args.perk, "gpu")), rows)
    return 1 if rows.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
