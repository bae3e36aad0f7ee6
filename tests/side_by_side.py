"""Does the present tree compute what another commit did? Weights, metrics and cache payloads, bit for bit.

    python tests/side_by_side.py REV                       all cases, at REV and here
    python tests/side_by_side.py REV --only dp,fuse        these cases only
    python tests/side_by_side.py REV --keep ~/kd-sides     REV's results are kept by commit, and not run again
    python tests/side_by_side.py REV --jobs 2              both sides at the same time

Both sides run the same ``kd`` commands (side_by_side_cases.py) in one environment, on the CPU, with one thread.
REV is checked out into a git worktree that is removed at the end (with --keep: stays, as DIR/COMMIT/tree). A line
a case says ``equal`` or what differs; the exit code is 1 if anything does.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kd_driver import Driver, environment
from PIL import Image
from side_by_side_cases import CASES, PLACE, Case
from side_by_side_compare import differences

HERE = Path(__file__).resolve().parents[1]
SWEEP = """
students:
  plain: {method: labels-only}
  equal: {method: distill-equal, seed: 3}
  large: {method: distill-equal, student: test_resnet, image_size: 48}
"""
CLASSES = {
    "images": ("c0", "c1", "c2"), "held-out": ("c0", "c1", "c2"), "digits": ("d0", "d1"), "digits-test": ("d0", "d1"),
    "more": ("c0", "c1", "c2"), "many": ("m0", "m1", "m2", "m3"), "several": ("a", "b", "a+b", "b+c", "c"),
    "several-test": ("a", "b", "a+b", "b+c", "c"),
}  # fmt: skip
COUNTS = {"images": 8, "many": 10, "held-out": 3}


@dataclass(frozen=True)
class Side:
    """A tree, and the folder in which its commands run; a case is done if it left its ``.done``."""

    name: str
    tree: Path
    work: Path

    def done(self, case: Case) -> Path:
        return self.work / case.name / ".done"

    def is_done(self, case: Case) -> bool:
        """Whether these very commands ran before, and ended as they should."""
        if not self.done(case).is_file():
            return False
        found = json.loads(self.done(case).read_text())
        return found.get("commands") == commands_of(case) and not found["problem"]

    def problem(self, case: Case) -> str:
        """Why the case did not end as it should; empty if it did."""
        return str(json.loads(self.done(case).read_text())["problem"])


def commands_of(case: Case) -> list[str]:
    return [*PLACE.commands, *case.commands]


# --- what commands stand on ---------------------------------------------------------------------


def make_images(root: Path) -> None:
    """Small noisy PNGs; each class has its own brightness and stripes."""
    for seed, (folder, classes) in enumerate(CLASSES.items()):
        random = np.random.default_rng(seed)
        for label, name in enumerate(classes):
            (root / folder / name).mkdir(parents=True)
            for number in range(COUNTS.get(folder, 6)):
                pixels = random.integers(0, 200, (28, 28 + number % 3, 3))
                pixels[label :: len(classes) + 1] += 15 + 40 * label // len(classes)
                path = root / folder / name / f"{folder}-{number:03d}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(path)


def damage(side: Side, *caches: str) -> None:
    """Change a byte of one chunk, and take away the last of another."""
    for cache in caches:
        chunks = sorted((side.work / cache).glob("data.*/teachers/gen/features/c.*"))
        logits = sorted((side.work / cache).glob("data.*/teachers/gen/logits/c.*"))
        data = bytearray(chunks[0].read_bytes())
        data[-40] ^= 1
        chunks[0].write_bytes(data)
        logits[0].write_bytes(logits[0].read_bytes()[:-1])


def interrupted(number: int) -> Callable[..., None]:
    """Run a command, send it a signal after its third epoch, and run it again to its end."""

    def run(side: Side, out: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "kdcli", *arguments]
        place = {"cwd": side.work, "env": environment(side.work, side.tree), "stderr": subprocess.PIPE}
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, **place)  # type: ignore[call-overload]
        metrics = side.work / out / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
            if job.poll() is not None:
                raise RuntimeError(
                    f"ended before the signal, with {job.returncode}: {job.stderr.read()[-500:]}"
                )
            time.sleep(0.005)
        os.kill(job.pid, number)
        job.communicate()
        wanted = 75 if number == signal.SIGTERM else -number
        if job.returncode != wanted:
            raise RuntimeError(f"exit code {job.returncode} after the signal, not {wanted}")
        again = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, **place)  # type: ignore[call-overload]
        if again.returncode:
            raise RuntimeError(f"exit code {again.returncode} when resumed: {again.stderr[-500:]}")

    return run


ACTIONS: dict[str, Callable[..., None]] = {
    "!damage": damage,
    "!stop": interrupted(signal.SIGTERM),
    "!kill": interrupted(signal.SIGKILL),
}


# --- running ------------------------------------------------------------------------------------


def run_side(side: Side, cases: list[Case]) -> float:
    """Run what is not done yet; the seconds it took."""
    start = time.monotonic()
    if not (side.work / "sweep.yaml").is_file():
        shutil.rmtree(side.work, ignore_errors=True)
        make_images(side.work)
        (side.work / "sweep.yaml").write_text(SWEEP)
    waiting = [case for case in cases if not side.is_done(case)]
    if waiting:
        with Driver(side.work, side.work / ".streams", side.tree) as driver:
            if Path(driver.package).resolve().parent != side.tree.resolve():
                raise SystemExit(f"{side.name} ran {driver.package}, not {side.tree}/kdcli")
            for case in waiting:
                run_case(side, case, driver)
    return time.monotonic() - start


def run_case(side: Side, case: Case, driver: Driver) -> None:
    folder = side.work / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start, problem = time.monotonic(), ""
    for command in case.commands:
        try:
            problem = run_command(side, command, driver)
        except RuntimeError as error:
            problem = f"kd {command}: {error}"
        if problem:
            break
    took = round(time.monotonic() - start, 2)
    side.done(case).write_text(json.dumps({"problem": problem, "took": took, "commands": commands_of(case)}))


def run_command(side: Side, command: str, driver: Driver) -> str:
    """Run one line of a case; what is wrong with how it ended."""
    words = shlex.split(command)
    if words[0] in ACTIONS:
        ACTIONS[words[0]](side, *words[1:])
        return ""
    code = int(words.pop(0)[1:]) if words[0].startswith("?") else 0
    target = words.pop(words.index(">") + 1) if ">" in words else None
    answer = driver.run(*(word for word in words if word != ">"))
    if target:
        (side.work / target).write_text(answer.out)
    if answer.code == code:
        return ""
    last = " | ".join(answer.err.strip().splitlines()[-3:])
    return f"exit code {answer.code}, not {code}, of kd {command}: {last}"


# --- comparing ----------------------------------------------------------------------------------


def judge(case: Case, old: Side, new: Side) -> list[str]:
    """What is not as it should be."""
    found = [f"{side.name}: {problem}" for side in (old, new) if (problem := side.problem(case))]
    for side in (old, new):
        for one, other in case.alike:
            unlike = differences(side.work / one, side.work / other)
            found += [f"{side.name}: {one} and {other} differ: {line}" for line in unlike]
    return found + differences(old.work / case.name, new.work / case.name)


def report(cases: list[Case], old: Side, new: Side) -> int:
    """A line a case; how many are not equal."""
    wrong = 0
    for case in cases:
        found = judge(case, old, new)
        wrong += bool(found)
        print(f"{case.name:20} {'DIFFERS' if found else 'equal'}")
        for line in found[:8]:
            print(f"    {line}")
        if len(found) > 8:
            print(f"    and {len(found) - 8} more")
    return wrong


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(HERE), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {shlex.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def check_out(commit: str, folder: Path) -> Path:
    """A worktree of the commit below ``folder``."""
    tree = folder / "tree"
    if not (tree / "kdcli").is_dir():
        git("worktree", "prune")
        git("worktree", "add", "--detach", "--force", str(tree), commit)
    return tree


def chosen(only: str | None) -> list[Case]:
    """The named cases, after the one that all stand on."""
    names = [case.name for case in CASES] if only is None else only.split(",")
    if unknown := set(names) - {case.name for case in CASES}:
        known = ", ".join(case.name for case in CASES)
        raise SystemExit(f"no case {', '.join(sorted(unknown))}; there are {known}")
    return [case for case in CASES if case is PLACE or case.name in names]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rev", metavar="REV", help="commit to compare the present tree with")
    parser.add_argument("--only", metavar="NAME,...", help="run these cases only")
    parser.add_argument(
        "--keep", metavar="DIR", type=Path, help="keep REV's results there, and use them again"
    )
    parser.add_argument("--jobs", type=int, default=1, help="2: run both sides at once (default 1)")
    options = parser.parse_args()
    cases, commit = chosen(options.only), git("rev-parse", "--verify", f"{options.rev}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="kd-sides-") as scratch:
        kept = (options.keep.resolve() if options.keep else Path(scratch)) / commit
        kept.mkdir(parents=True, exist_ok=True)
        try:
            old = Side(f"{commit[:10]}", check_out(commit, kept), kept / "work")
            new = Side("here", HERE, Path(scratch) / "here" / "work")
            with ThreadPoolExecutor(max(1, options.jobs)) as pool:
                took = list(pool.map(lambda side: run_side(side, cases), (old, new)))
            wrong = report(cases, old, new)
        finally:
            if not options.keep:
                git("worktree", "remove", "--force", str(kept / "tree"))
    print(
        f"{len(cases) - wrong} of {len(cases)} equal; {old.name} took {took[0]:.0f} s, here {took[1]:.0f} s"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
