#!/usr/bin/env python3
"""Runs every GPU check and writes the record; scripts/gpu_check.sh is the way in.

Three phases: what measures no time runs side by side, since most of it is compiling, and the programs of the third
phase are compiled meanwhile; then what measures time, alone; then the true shapes, which need the GPU's memory. Every
part runs in processes of its own with a time limit, so that one that fails, crashes or hangs costs its own rows alone;
and these fail, rather than not be there. Exit codes: 0 nothing failed, 1 something failed, 77 there is no GPU.
"""
import argparse
import concurrent.futures
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import arrivals
import shapes
import starts
import trust
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
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)


class Check:
    """`work` is a folder for the run's cubin cache, which all parts share, and for their temporary files."""

    def __init__(self, args, log, work):
        self.args, self.log, self.work, self.phases = args, log, work, {}
        self.start = time.monotonic()
        self.deadline = self.start + args.budget
        self.perk = args.build / "bin" / "perk"
        self.environment = {**os.environ, "PERK_CACHE_DIR": str(work / "cache"), "TMPDIR": str(work)}
        self.lock, self.running = threading.Lock(), set()

    # ---- processes ----

    def run(self, command, limit, **environment):
        """The exit code and output of a command; it is ended at its limit or at the deadline, whichever is first."""
        limit = min(limit, self.deadline - time.monotonic())
        require(limit > 1, f"not run: the budget of {self.args.budget:.0f} s was used up")
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                       cwd=ROOT, env={**self.environment, **environment}, start_new_session=True)
            self.running.add(process)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # also on Ctrl-C
                end(process)
                self.running.discard(process)
            output.seek(0)
            said = output.read().decode(errors="replace")
        with self.lock:
            self.log.write(f"\n$ {' '.join(map(str, command))}\n{said}")
            self.log.flush()
        require(code is not None, f"ended after {limit:.0f} s; {last_lines(said, 2)}")
        return code, said

    def stop(self):
        """Ends everything that runs, for whoever interrupts; nothing starts any more."""
        self.deadline = 0
        for process in list(self.running):
            end(process)

    # ---- parts: each returns its rows ----

    def program(self, name, limit, **environment):
        """A test program of the build: one row."""
        rows = Rows()
        with rows.part(name) as part:
            path = self.args.build / "bin" / name
            if not path.exists():
                raise Skip("not in this build")
            code, said = self.run([path, ROOT], limit, **environment)  # it may have been built elsewhere
            part.detail = last_lines(said, 1)
            if code == NO_GPU:
                raise Skip(last_lines(said, 1))
            require(code == 0, f"exit code {code}: {last_lines(said, 3)}")
        return rows.rows

    def script(self, name, names, limit, *args):
        """A script of this folder: its own rows, which are to be `names`. One that it does not make, fails."""
        rows, start, trouble = Rows(), time.monotonic(), None
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            file = pathlib.Path(folder) / "rows"
            try:
                command = [sys.executable, "-u", HERE / name, "--perk", self.perk, "--rows", file, *args]
                code, said = self.run(command, limit)
                trouble = None if code == 0 else f"exit code {code}: {last_lines(said, 2)}"
            except Failure as failure:
                trouble = str(failure)
            for line in file.read_text().splitlines() if file.exists() else []:
                rows.add(**json.loads(line))
        rows.fail_missing(names, trouble or f"{name} ended without this row")
        if trouble and not rows.failed():
            rows.add(name, FAILED, trouble, seconds=time.monotonic() - start)
        return rows.rows

    def ahead(self, names, label, limit):
        return self.script("ahead.py", [shapes.ahead_row(label)], limit, "--label", label, "--shapes", *names)

    def parity(self, names, limit, label=None):
        """`label`: of what was compiled ahead, which every start must find."""
        rows = [row for name in names for row in shapes.row_names(name)]
        args = ["--device", "cpu", "--backend", "reference"] if self.args.cpu else []
        if label:
            rows.append(shapes.found_row(label))
            args += ["--ahead", label]
        return self.script("parity.py", rows, limit, "--shapes", *names, *args)

    # ---- phases ----

    def side_by_side(self, *parts):
        """Each part is a function that returns rows; theirs in this order."""
        with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
            running = [pool.submit(part) for part in parts]
            try:
                return [row for part in running for row in part.result()]
            except BaseException:
                self.stop()
                raise

    def phase(self, name, function):
        start = time.monotonic()
        print(f"---- {name}, from {start - self.start:.0f} s on", flush=True)
        rows = function()
        self.phases[name] = round(time.monotonic() - start, 1)
        return rows

    def untimed(self):
        """What measures no time: most of it is compiling, on all cores."""
        def whole_models():
            return self.program("test_gpu_model", 150) + self.program("test_gpu_determinism", 90)

        def small_shapes():
            label = "small shapes"
            return self.ahead(shapes.ON_CPU, label, 120) + self.side_by_side(
                lambda: self.parity(shapes.ON_CPU, 150, label),
                lambda: self.ahead(self.true_shapes(), "true shapes", 120))

        return self.side_by_side(
            lambda: self.program("test_gpu_ops", 180), whole_models,
            lambda: self.script("trust.py", trust.CHECKS, 220, "--part", "checks"),
            lambda: self.script("arrivals.py", [arrivals.ROW], 150), small_shapes)

    def timed(self):
        """What measures time, or waits for a limit to pass: one after the other, alone."""
        return [*self.program("test_gpu_hang", 60),
                *self.program("test_sample", 60, PERK_TEST_GPU="1"),
                *self.program("test_many_steps", 60, PERK_TEST_GPU="1"),
                *self.program("test_online", 60, PERK_TEST_GPU="1"),
                *self.script("starts.py", starts.NAMES, 120),
                *self.script("trust.py", trust.COSTS, 90, "--part", "costs")]

    def true_shapes(self):
        """Each may need most of the GPU's memory."""
        return [name for name in (shapes.QUICK if self.args.quick else shapes.ALL) if name not in shapes.ON_CPU]

    def everything(self):
        if self.args.cpu:
            return self.parity(shapes.ON_CPU, 300)
        return [*self.phase("side by side", self.untimed), *self.phase("timed, alone", self.timed),
                *self.phase("true shapes", lambda: self.parity(self.true_shapes(), 300, "true shapes"))]


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


def write_record(path, doctor, check, rows, started, scope):
    devices = doctor["devices"]
    record = dict(
        date=started.isoformat(timespec="seconds"), scope=scope, seconds=round(time.time() - started.timestamp(), 1),
        phases=check.phases,
        device=devices[0].get("name") if devices else None, arch=devices[0].get("arch") if devices else None,
        driver=driver_version(), cuda=doctor["driver"].get("cuda"), nvrtc=doctor["nvrtc"].get("version"),
        perk=doctor["version"], source_hash=hash_of_sources(), compared_with=versions(), results=rows)
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with (open(log_folder / "gpu_check.log", "w") as log,
          tempfile.TemporaryDirectory(prefix="perk-gpu-check-", ignore_cleanup_errors=True) as work):
        check = Check(args, log, pathlib.Path(work))
        rows = check.everything()
    scope = "cpu" if args.cpu else "quick" if args.quick else "full"
    if scope == "full" or args.out:
        write_record(record_folder / "record.json", doctor, check, rows, started, scope)
        print(f"\nrecord: {record_folder / 'record.json'}", end="")
    print(f"\nlog: {log_folder / 'gpu_check.log'}")
    print_table(rows)
    print(f"\n{count(rows, SKIPPED)} skipped")
    print(f"{count(rows, PASSED)} passed, {count(rows, FAILED)} failed")
    return 1 if count(rows, FAILED) else 0


if __name__ == "__main__":
    sys.exit(main())
