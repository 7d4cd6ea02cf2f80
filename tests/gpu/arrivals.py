#!/usr/bin/env python3
"""Looks in the machine code of programs whether a slot of shared memory is given back too early.

    tests/gpu/arrivals.py --perk build/bin/perk

A warp gives a slot back by an arrival at its barrier, which must not take effect before all loads from the slot are
there: so the arrival's address is made to depend on them (mbarrier_arrive_after, kernels_src/ptx.cuh). Whether the
compiler left it so can be seen in the order of instructions alone: every load between the last wait and an arrival must
be among what the address is made of. One row. Needs no GPU, but nvdisasm, which PyTorch brings along (triton). Exit
codes: 0 no arrival is early, 1 some are.
"""
import concurrent.futures
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import harness
from harness import ROOT, Perk, Rows, Skip, require

ROW = "arrivals wait for loads"
# Model, tokens a step: linears of all forms, experts, prompts.
PROGRAMS = (("qwen3-0.6b", 1), ("llama-3.2-1b", 8), ("qwen3-8b", 8), ("qwen2.5-7b", 16), ("qwen3-8b", 32),
            ("qwen3-8b", 64), ("qwen3-8b", 1024), ("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 16))
WORDS = {"64": 2, "128": 4, "4": 4, "2": 2}  # that a load brings, by the end of its name; else one


def nvdisasm():
    found = shutil.which("nvdisasm") or "/usr/local/cuda/bin/nvdisasm"
    triton = importlib.util.find_spec("triton")
    if not pathlib.Path(found).exists() and triton:
        found = pathlib.Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not pathlib.Path(found).exists():
        raise Skip("there is no nvdisasm")
    return found


def registers(text):
    return {int(number) for number in re.findall(r"\bR(\d+)", text)}


class Instruction:
    """Its name, the registers that it writes, those that it reads, and whether it always writes."""

    def __init__(self, line):
        match = re.match(r"(@\S+ )?([A-Z]\S*) ?(.*?) ?;", line)
        self.name, rest = (match[2], match[3]) if match else ("", "")
        self.is_certain = not (match and match[1])
        target, _, sources = rest.partition(", ")
        self.writes, self.reads = registers(target), registers(sources)
        if self.name.startswith("LD"):
            first, words = min(self.writes, default=None), WORDS.get(self.name.rpartition(".")[2].lstrip("M8"), 1)
            self.writes = set() if first is None else set(range(first, first + words))

    @property
    def is_load(self):
        return re.match(r"LDSM?\b", self.name) and self.writes

    @property
    def is_jump(self):
        """What stands behind it is reached from elsewhere alone."""
        return self.is_certain and re.match(r"(BRA|EXIT|RET|JMP)$", self.name)

    @property
    def is_wait(self):
        return self.name.startswith("SYNCS.PHASECHK")


def early_loads(before, address):
    """Of the instructions before an arrival at `address`, back to the last wait or jump: loads, and those not waited
    for."""
    needed, loads, early = set(address), 0, []
    for instruction in reversed(before):
        if instruction.is_wait or instruction.is_jump:
            break
        if instruction.is_load:
            loads += 1
            if not instruction.writes & needed:
                early.append(instruction.name)
        if instruction.writes & needed:
            if instruction.is_certain:
                needed -= instruction.writes
            if not instruction.is_load:
                needed |= instruction.reads
    return loads, early


def look_at(perk, disassembler, model, tokens, folder):
    """(arrivals after loads, what is wrong) in one program."""
    cubin = folder / f"{model}-{tokens}.cubin"
    perk.succeed("compile", "--model", ROOT / "bench" / "configs" / model, "--arch", "sm_90a", "--max-batched-tokens",
                 tokens, "--max-batched-requests", min(tokens, 64), "--max-logit-rows", min(tokens, 64), "--no-cache",
                 "--out", cubin, timeout=150)
    text = subprocess.run([disassembler, "-c", cubin], capture_output=True, text=True, check=True).stdout
    lines = [re.sub(r"/\*.*?\*/", "", line).strip() for line in text.splitlines()]
    code = [Instruction(line) for line in lines]
    arrivals, wrong = 0, []
    for i, line in enumerate(lines):
        match = re.search(r"SYNCS\.ARRIVE\.TRANS64\.A1T0 RZ, \[(R\d+)", line)
        if not match:
            continue
        loads, early = early_loads(code[max(0, i - 400):i], registers(match[1]))
        arrivals += loads > 0
        if early:
            wrong.append(f"{model}, {tokens} tokens: an arrival waits for {loads - len(early)} of {loads} loads")
    return arrivals, wrong


def check(part, perk):
    disassembler = nvdisasm()
    with tempfile.TemporaryDirectory(prefix="perk-arrivals-") as folder, \
            concurrent.futures.ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)) // 4)) as pool:
        found = list(pool.map(lambda p: look_at(perk, disassembler, *p, pathlib.Path(folder)), PROGRAMS))
    arrivals, wrong = sum(count for count, _ in found), [text for _, texts in found for text in texts]
    part.numbers.update(programs=len(PROGRAMS), arrivals=arrivals)
    part.detail = f"{len(PROGRAMS)} programs, {arrivals} arrivals that follow loads, none early"
    require(all(count > 0 for count, _ in found), "a program without an arrival after loads: nothing was looked at")
    require(not wrong, f"{len(wrong)} of {arrivals}: {'; '.join(wrong[:3])}")


def main():
    args = harness.parser(__doc__).parse_args()
    rows = Rows(args.rows)
    with rows.part(ROW) as part:
        check(part, Perk(args.perk, "reference"))
    return 1 if rows.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
