#!/usr/bin/env python3
"""Checks how perk starts and how it refuses on a GPU, with the model in examples/tiny.

    tests/gpu/starts.py --perk build/bin/perk

The doctor's verdict; a cold start, then warm ones: in the same folder, without NVRTC, from a read-only folder, after an
entry was damaged; a cold start without NVRTC; prompts that are too long; more KV pages than the GPU has memory for.
Each part is a row. Exit codes: 0 everything passed, 1 something failed. Needs nothing but Python.
"""
import json
import pathlib
import sys
import tempfile

import harness
from harness import ROOT, Perk, Rows, require

MODEL = ROOT / "examples" / "tiny"
PROMPT = [11, 258, 475, 284, 727, 524, 410]
NO_NVRTC = "/nonexistent/libnvrtc.so"
TIMES = ("open_ms", "driver_ms", "plan_ms", "check_ms", "emit_ms", "compile_ms", "module_ms", "weights_ms", "total_ms")


class Starts:
    """The parts; `reference` are the tokens that every good start must make."""

    def __init__(self, perk, rows, work):
        self.perk, self.rows, self.work = perk, rows, work
        self.cache, self.reference = work / "cache", None

    def start(self, part, hit, cache=None, **environment):
        """Starts and generates; the program must come from the cache exactly where `hit` says so."""
        environment.setdefault("PERK_CACHE_READONLY", "")
        done = self.perk.generate(MODEL, PROMPT, 16, PERK_CACHE_DIR=str(cache or self.cache), **environment)
        report = done["start"]
        part.numbers.update({key: report[key] for key in TIMES})
        part.numbers["start_without_weights_ms"] = report["total_ms"] - report["weights_ms"]
        part.detail = (f"{part.numbers['start_without_weights_ms']:.1f} ms without the weights, of them compiling "
                       f"{report['compile_ms']:.1f} ms")
        require(report["backend"] == "gpu", f"ran on {report['backend']}")
        require(report["cache_hit"] == hit, f"cache_hit is {report['cache_hit']}, expected {hit}")
        require((report["compile_ms"] == 0) == hit, f"compile_ms is {report['compile_ms']}")
        require(self.reference in (None, done["tokens"]), f"other tokens: {done['tokens']}, before: {self.reference}")
        self.reference = done["tokens"]
        return report

    # ---- the machine ----

    def doctor(self, part):
        found = self.perk.json("doctor", "--require-gpu", PERK_CACHE_DIR=str(self.cache))
        require(found["gpu_ready"], "gpu_ready is false")
        part.numbers.update({key: found[key] for key in ("driver", "devices", "nvrtc", "nccl")})
        device, cuda, nvrtc = found["devices"][0]["name"], found["driver"]["cuda"], found["nvrtc"]["version"]
        part.detail = f"{device}, CUDA {cuda}, NVRTC {nvrtc}"

    # ---- starts ----

    def cold(self, part):
        report = self.start(part, hit=False)
        part.numbers.update({key: report[key] for key in ("registers", "spill_bytes", "shared_bytes", "cubin_bytes")})
        require(report["spill_bytes"] == 0, f"{report['spill_bytes']} bytes spilled")

    def warm(self, part):
        self.start(part, hit=True)

    def warm_without_nvrtc(self, part):
        self.start(part, hit=True, PERK_LIBNVRTC=NO_NVRTC)

    def cold_without_nvrtc(self, part):
        part.detail = self.perk.refuse(
            "run", "--model", MODEL, "--tokens", "1,2,3", "--backend", self.perk.backend, "--json",
            words=["nvrtc", NO_NVRTC], PERK_CACHE_DIR=str(self.work / "empty"), PERK_CACHE_READONLY="",
            PERK_LIBNVRTC=NO_NVRTC)

    def shipped(self, part):
        self.start(part, hit=True, cache=self.work / "own", PERK_CACHE_READONLY=str(self.cache), PERK_LIBNVRTC=NO_NVRTC)

    def verify(self, part):
        found = self.perk.json("cache", "verify", "--cache-dir", self.cache)
        part.numbers.update(found)
        part.detail = f"{found['entries']} entries, {found['bytes']} bytes"
        require(found["entries"] > 0, "no entries after a start")
        require(found["bad"] == 0, f"{found['bad']} bad entries")

    def damaged(self, part):
        """Every entry loses a byte of its middle: verify says so, a start compiles anew, and all is well again."""
        entries = [path for path in self.cache.rglob("*") if path.is_file() and path.stat().st_size > 4096]
        require(entries, f"no entry to damage in {self.cache}")
        for path in entries:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 0xFF
            path.write_bytes(content)
        done = self.perk.call("cache", "verify", "--json", "--cache-dir", self.cache)
        require(done.returncode == 1 and json.loads(done.stdout)["bad"] == len(entries),
                f"verify missed the damage: exit code {done.returncode}, {done.stdout.strip()}")
        self.start(part, hit=False)
        self.start(part, hit=True)

    # ---- refusals ----

    def refuse(self, part, command, *args, words):
        part.detail = self.perk.refuse(command, "--model", MODEL, "--backend", self.perk.backend, *args, words=words,
                                       PERK_CACHE_DIR=str(self.cache))

    def long_prompt(self, part):
        tokens = ",".join("1" for _ in range(33))
        self.refuse(part, "run", "--tokens", tokens, "--max-seq-length", "32", "--json",
                    words=["max_seq_length", r"\b32\b", r"\b33\b"])

    def long_list(self, part):
        ids = self.work / "ids.json"
        ids.write_text(json.dumps([[1] * 33]))
        self.refuse(part, "logits", "--ids", ids, "--out", self.work / "long.npy", "--max-seq-length", "32",
                    words=["max_seq_length", r"\b32\b", r"\b33\b"])
        require(not (self.work / "long.npy").exists(), "left a file of logits behind")

    def bad_token(self, part):
        self.refuse(part, "run", "--tokens", "1,2048", "--json", words=["2048", "vocabulary"])

    def too_much_memory(self, part):
        pages = (2**31 - 1) // 64
        self.refuse(part, "run", "--tokens", "1,2,3", "--page-size", "64", "--max-pages", str(pages), "--json",
                    words=["memory", r"\d(\.\d+)? ?([KMGT]i?B|bytes)", r"\b(KV|page)"])

    def after_refusals(self, part):
        self.start(part, hit=True)


PARTS = [
    ("doctor", Starts.doctor), ("start, cold", Starts.cold), ("start, warm", Starts.warm),
    ("start, warm without NVRTC", Starts.warm_without_nvrtc), ("start, cold without NVRTC", Starts.cold_without_nvrtc),
    ("start from a read-only folder", Starts.shipped), ("cache verify", Starts.verify),
    ("start over a damaged entry", Starts.damaged), ("refuses a long prompt", Starts.long_prompt),
    ("refuses a long list of ids", Starts.long_list), ("refuses an id outside the vocabulary", Starts.bad_token),
    ("refuses pages beyond the memory", Starts.too_much_memory), ("start after refusals", Starts.after_refusals),
]

NAMES = [name for name, _ in PARTS]


def main():
    args = harness.parser(__doc__).parse_args()
    rows = Rows(args.rows)
    with tempfile.TemporaryDirectory(prefix="perk-starts-") as folder:
        starts = Starts(Perk(args.perk, "gpu"), rows, pathlib.Path(folder))
        for name, check in PARTS:
            with rows.part(name) as part:
                check(starts, part)
    return 1 if rows.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
