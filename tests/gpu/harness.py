"""What the GPU checks share: rows of results, running perk, and reading what it says."""
import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


class Failure(Exception):
    """A check that did not hold; its text is the row's detail."""


class Skip(Exception):
    """A part that cannot be run here; its text says why."""


def require(condition, message):
    if not condition:
        raise Failure(message)


def storable(value):
    """JSON knows no NaN and no infinity: they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Part:
    """One row in the making. `detail` is a line for the table, `numbers` go into the record."""

    def __init__(self, name):
        self.name, self.detail, self.numbers = name, "", {}


class Rows:
    """Results, one JSON object a line in a file, so that what was shown before a crash or a timeout stays shown."""

    def __init__(self, path=None):
        self.path, self.rows = path, []

    def add(self, name, status, detail="", numbers=None, seconds=0.0):
        numbers = {key: storable(value) for key, value in (numbers or {}).items()}
        row = dict(name=name, status=status, detail=detail, numbers=numbers, seconds=round(seconds, 2))
        self.rows.append(row)
        if self.path:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        print(f"{status:8}{name}: {detail}  ({seconds:.1f} s)", flush=True)

    @contextlib.contextmanager
    def part(self, name):
        """A row that passes unless the block raises; whatever it raises is reported and goes no further."""
        part, start = Part(name), time.monotonic()
        status, detail = PASSED, None
        try:
            yield part
        except Skip as reason:
            status, detail = SKIPPED, str(reason)
        except Exception as error:
            status = FAILED
            detail = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        self.add(name, status, detail or part.detail, part.numbers, time.monotonic() - start)

    def fail_missing(self, names, reason):
        """Rows that were to be there and are not: what did not run is never silently absent."""
        there = {row["name"] for row in self.rows}
        for name in names:
            if name not in there:
                self.add(name, FAILED, reason)

    def failed(self):
        return sum(row["status"] == FAILED for row in self.rows)


def parser(description):
    """What all parts take: the perk binary, and where results go."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--perk", default=str(ROOT / "build" / "bin" / "perk"), help="the perk binary")
    made.add_argument("--rows", help="a file that gets a line of JSON for each result")
    return made


def last_lines(text, count=4):
    return " | ".join(line for line in text.strip().splitlines()[-count:] if line.strip())


class Perk:
    """The command line under test."""

    def __init__(self, binary, backend):
        self.binary, self.backend = str(binary), backend
        self.programs = []  # what calls with --verbose said of each program that a start made or found

    def call(self, *args, timeout=120, **environment):
        """Runs it; a timeout or a signal is a Failure, an exit code is the caller's to judge."""
        command = [self.binary, *map(str, args)]
        shown = " ".join(command if len(" ".join(command)) < 400 else command[:8] + ["..."])
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout,
                                  stdin=subprocess.DEVNULL, env={**os.environ, **environment})
        except subprocess.TimeoutExpired as late:
            said = (late.stderr or b"").decode(errors="replace")
            raise Failure(f"still running after {timeout} s: {shown}; it said: {last_lines(said)}") from None
        print(f"  $ {shown} -> {done.returncode}", flush=True)
        if done.stderr.strip():
            print("    " + done.stderr.strip().replace("\n", "\n    "), flush=True)
        self.programs += re.findall(r"program for \d+ tokens a step, [^:]*", done.stderr)
        require(done.returncode >= 0, f"died of signal {-done.returncode}: {shown}; {last_lines(done.stderr)}")
        return done

    def succeed(self, *args, **options):
        done = self.call(*args, **options)
        require(done.returncode == 0, f"perk {args[0]} failed: {last_lines(done.stderr)}")
        return done

    def json(self, *args, **options):
        return json.loads(self.succeed(*args, "--json", **options).stdout)

    def generate(self, model, ids, max_tokens, *args, **options):
        """The JSON of a greedy run over raw token ids that no end token cuts short."""
        tokens = ",".join(map(str, ids))
        return self.json("run", "--model", model, "--tokens", tokens, "--max-tokens", max_tokens, "--ignore-eos",
                         "--backend", self.backend, *args, **options)

    def refuse(self, *args, words, **options):
        """It must fail with exit code 1 and a message that has every one of the regular expressions `words`."""
        done = self.call(*args, **options)
        require(done.returncode == 1, f"exit code {done.returncode}, expected 1: {last_lines(done.stderr)}")
        missing = [word for word in words if not re.search(word, done.stderr, re.IGNORECASE)]
        require(not missing, f"the message lacks {missing}: {last_lines(done.stderr)}")
        return last_lines(done.stderr, 6)
