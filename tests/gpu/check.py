#!/usr/bin/env python3
"""Runs every GPU check and writes the record; scripts/gpu_check.sh is the way in.

Parts run one after the other, each in processes of its own with a time limit, so that one that fails, crashes or hangs
costs its own rows alone. Exit codes: 0 nothing failed, 1 something failed, 77 there is no GPU.
"""
import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import shapes
from harness import FAILED, PASSED, ROOT, SKIPPED, Failure, Perk, Rows, Skip, last_lines, require

NO_GPU = 77
HERE = pathlib.Path(__file__).resolve().parent


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, default=ROOT / "build", help="a folder with bin/perk, bin/test_*")
    parser.add_argument("--out", type=pathlib.Path, help="where record.json and gpu_check.log go; default: tests/gpu "
                                                         "and the build folder")
    parser.add_argument("--quick", action="store_true", help="no shape beyond 0.6B; a record goes to --out only")
    parser.add_argument("--budget", type=float, default=480, help="seconds; what has not run by then fails")
    parser.add_argument("--cpu", action="store_true",
                        help="try this script where there is no GPU: the reference executor on the small shapes")
    args = parser.parse_args()
    args.build = args.build.resolve()  # the parts run in the root of the repository
    args.out = args.out and args.out.resolve()
    return args


def end(process):
    """Ends what still runs of a process and its children: first politely, so that folders are cleaned up."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                pass


class Check:
    def __init__(self, args, log):
        self.args, self.log, self.rows = args, log, Rows()
        self.deadline = time.monotonic() + args.budget
        self.rows_file = pathlib.Path(f"{log.name}.rows")
        self.perk = args.build / "bin" / "perk"

    def run(self, command, limit, **environment):
        """The exit code and output of a command; it is ended at its limit or at the deadline, whichever is first."""
        limit = min(limit, self.deadline - time.monotonic())
        require(limit > 1, f"not run: the budget of {self.args.budget:.0f} s was used up")
        self.log.write(f"\n$ {' '.join(map(str, command))}\n")
        self.log.flush()
        begin = self.log.tell()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT,
                                   cwd=ROOT, env=os.environ | environment, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also on Ctrl-C
            end(process)
        said = pathlib.Path(self.log.name).read_bytes()[begin:].decode(errors="replace")
        self.log.seek(0, 2)
        if code is None:
            raise Failure(f"ended after {limit:.0f} s; {last_lines(said, 2)}")
        return code, said

    def program(self, name, limit, **environment):
        """A test program of the build: one row."""
        with self.rows.part(name) as part:
            path = self.args.build / "bin" / name
            if not path.exists():
                raise Skip("not in this build")
            code, said = self.run([path, ROOT], limit, **environment)  # it may have been built elsewhere
            part.detail = last_lines(said, 1)
            if code == NO_GPU:
                raise Skip(last_lines(said, 1))
            require(code == 0, f"exit code {code}: {last_lines(said, 3)}")

    def script(self, name, limit, *args):
        """A script of this folder: its own rows, and one more if it does not end well."""
        self.rows_file.unlink(missing_ok=True)
        start, trouble, code = time.monotonic(), None, None
        command = [sys.executable, "-u", HERE / name, "--perk", self.perk, "--rows", self.rows_file, *args]
        try:
            code, said = self.run(command, limit)
            trouble = None if code == 0 else f"exit code {code}: {last_lines(said, 2)}"
        except Failure as failure:
            trouble = str(failure)
        found = []
        if self.rows_file.exists():
            found = [json.loads(line) for line in self.rows_file.read_text().splitlines()]
            self.rows_file.unlink()
        for row in found:
            self.rows.add(row["name"], row["status"], row["detail"], row["numbers"], row["seconds"])
        explained = code == 1 and any(row["status"] == FAILED for row in found)
        if trouble and not explained:
            self.rows.add(" ".join([name, *args[1:2]]), FAILED, trouble, seconds=time.monotonic() - start)

    def parity(self, names, limit):
        place = ["--device", "cpu", "--backend", "reference"] if self.args.cpu else []
        self.script("parity.py", limit, "--shapes", *names, *place)

    def everything(self):
        if self.args.cpu:
            self.parity(shapes.ON_CPU, 300)
            return
        self.program("test_gpu_ops", 120)
        self.program("test_gpu_model", 120)
        self.program("test_gpu_determinism", 120)
        self.program("test_gpu_hang", 60)
        self.program("test_sample", 60, PERK_TEST_GPU="1")
        self.program("test_many_steps", 60, PERK_TEST_GPU="1")
        self.program("test_online", 60, PERK_TEST_GPU="1")
        self.script("starts.py", 150)
        self.script("trust.py", 240)
        self.parity(shapes.QUICK, 240)
        if not self.args.quick:
            self.parity(shapes.LARGE, 300)


# ---- the record ----


def hash_of_sources():
    done = subprocess.run([ROOT / "scripts" / "source_hash.sh"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def driver_version():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def versions():
    """Of what perk was compared with."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_record(path, doctor, check, started, scope):
    devices = doctor["devices"]
    record = dict(
        date=started.isoformat(timespec="seconds"), scope=scope, seconds=round(time.time() - started.timestamp(), 1),
        device=devices[0].get("name") if devices else None, arch=devices[0].get("arch") if devices else None,
        driver=driver_version(), cuda=doctor["driver"].get("cuda"), nvrtc=doctor["nvrtc"].get("version"),
        perk=doctor["version"], source_hash=hash_of_sources(), compared_with=versions(), results=check.rows.rows)
    path.write_text(json.dumps(record, indent=1) + "\n")


def print_table(rows):
    width = max((len(row["name"]) for row in rows), default=0)
    print()
    for row in rows:
        detail = row["detail"] if len(row["detail"]) <= 160 else row["detail"][:157] + "..."
        print(f"{row['name']:{width}}  {row['status']:7}  {row['seconds']:6.1f} s  {detail}")


def count(rows, status):
    return sum(row["status"] == status for row in rows)


def main():
    args = parse()
    started = datetime.datetime.now(datetime.timezone.utc)
    record_folder, log_folder = args.out or HERE, args.out or args.build
    log_folder.mkdir(parents=True, exist_ok=True)
    try:
        doctor = Perk(args.build / "bin" / "perk", "gpu").json("doctor")
    except (Failure, OSError, ValueError) as error:
        print(f"gpu_check: perk doctor: {error}", file=sys.stderr)
        return 1
    if not args.cpu and not any(device["ok"] for device in doctor["devices"]):
        print("gpu_check: skipped, no usable GPU here; perk doctor says more", file=sys.stderr)
        return NO_GPU
    with open(log_folder / "gpu_check.log", "w+") as log:
        check = Check(args, log)
        check.everything()
    rows = check.rows.rows
    scope = "cpu" if args.cpu else "quick" if args.quick else "full"
    if scope == "full" or args.out:
        write_record(record_folder / "record.json", doctor, check, started, scope)
        print(f"\nrecord: {record_folder / 'record.json'}", end="")
    print(f"\nlog: {log_folder / 'gpu_check.log'}")
    print_table(rows)
    print(f"\n{count(rows, SKIPPED)} skipped")
    print(f"{count(rows, PASSED)} passed, {count(rows, FAILED)} failed")
    return 1 if check.rows.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
