#!/usr/bin/env python3
"""Compiles ahead of time what parity.py will run: the programs of some shapes, into the cubin cache, side by side.

    PERK_CACHE_DIR=DIR tests/gpu/ahead.py --perk build/bin/perk --shapes qwen3-0.6b tiny --label "some shapes"

A start compiles one or a few programs and waits for them; here all cores are at it. One row for all of them. Exit
codes: 0 everything compiled, 1 something did not. Needs nothing but Python, and a GPU only to ask what it is.
"""
import concurrent.futures
import json
import os
import pathlib
import sys
import tempfile
import time

import harness
import shapes
from harness import ROOT, Failure, Perk, Rows, require

SECONDS = 150  # that one program may take, beside all that else is under way


def parse():
    parser = harness.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=shapes.ALL, choices=list(shapes.SHAPES), metavar="SHAPE")
    parser.add_argument("--label", default="all shapes", help="what the row calls them")
    parser.add_argument("--jobs", type=int, default=max(2, len(os.sched_getaffinity(0)) // 2),
                        help="programs at a time")
    return parser.parse_args()


def device_options(perk):
    """What perk compile must be told of the GPU that a start would find by itself."""
    device = perk.json("doctor", "--require-gpu")["devices"][0]
    return ("--arch", device["arch"], "--workers", device["multiprocessors"],
            "--shared-memory", device["shared_bytes_per_block"])


def jobs_of(name, work):
    """The model and the options of each of a shape's programs."""
    shape = shapes.SHAPES[name]
    folder = ROOT / shape.folder
    if not shape.folder:
        folder = work / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shapes.fit(shape).config))
    return [("--model", folder, *options) for options in shapes.programs(shape)]


def compile_all(part, perk, jobs, at_once):
    device = device_options(perk)
    start, made, troubles = time.monotonic(), [], []
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for running in [pool.submit(perk.json, "compile", *job, *device, timeout=SECONDS) for job in jobs]:
            try:
                made.append(running.result())
            except Failure as failure:
                troubles.append(str(failure))
    took = time.monotonic() - start
    compiling = [program["ms"]["compile"] / 1e3 for program in made]
    part.numbers.update(programs=len(jobs), at_once=at_once, compile_s=sum(compiling),
                        slowest_s=max(compiling, default=0))
    part.detail = f"{len(jobs)} programs, {sum(compiling):.0f} s of compiling in {took:.0f} s, {at_once} at a time"
    require(not troubles, f"{len(troubles)} of {len(jobs)} programs: {'; '.join(troubles[:3])}")


def main():
    args = parse()
    rows = Rows(args.rows)
    with tempfile.TemporaryDirectory(prefix="perk-ahead-") as folder, rows.part(shapes.ahead_row(args.label)) as part:
        jobs = [job for name in args.shapes for job in jobs_of(name, pathlib.Path(folder))]
        compile_all(part, Perk(args.perk, "gpu"), jobs, args.jobs)
    return 1 if rows.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
