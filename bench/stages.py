#!/usr/bin/env python3
"""Turns the tables of `perk profile` into one JSON of stage times, which bench/plot.py draws.

    perk profile --model bench/configs/qwen3-8b --random-weights | bench/stages.py > bench/results/stages-8b.json

Several tables may follow each other. Times are microseconds; chain: from the end of the stages before to the end of the
stage; run, longest, wait: of a task; of a linear also the parts of run. Exit codes: 0 a table was found, 1 none was.
"""
import datetime
import json
import pathlib
import re
import sys

COLUMNS = ["stage", "count", "in_all", "chain", "expected", "run", "longest", "wait"]
COLUMNS += ["read", "multiply", "share", "finish"]  # of linears alone
HEAD = re.compile(r"^(\S+)  batch (\d+)  context (\d+)  (.+?)(  portable)?$")
STEP = re.compile(r"^  step, profiled +([\d.]+) ms")
ROW = re.compile(r"^  (\S.*?) +(\d+)((?: +-?[\d.]+){6}(?:(?: +-?[\d.]+){4})?)$")


def read(lines):
    result, shape, rows = {"what": "stages", "columns": COLUMNS}, None, None
    for line in map(str.rstrip, lines):
        head, step, row = HEAD.match(line), STEP.match(line), ROW.match(line)
        if head:
            shape = f"{pathlib.PurePath(head[1]).name}, batch {head[2]}, context {head[3]}"
            shape += ", portable" if head[5] else ""
            result["device"] = head[4]
        elif step and shape:
            rows = result[f"{shape}, step {step[1]} ms"] = []
        elif row and rows is not None:
            rows.append([row[1], int(row[2]), *map(float, row[3].split())])
    return result if rows else None


def main():
    result = read(sys.stdin)
    if result:
        result["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        print(json.dumps(result, indent=1))
    return 0 if result else 1


if __name__ == "__main__":
    sys.exit(main())
