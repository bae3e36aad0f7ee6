"""Run steps in their order, each once: what is finished is left alone."""

import contextlib
import hashlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, final

from kdcli.cache.admin.remove import plan_output_removal, remove
from kdcli.console import console
from kdcli.errors import CacheMissingError, DivergedError, NotFoundError, StoppedEarly, UsageError
from kdcli.files import atomic_write_bytes, atomic_write_text, storage_errors
from lab.calls import kd_here
from lab.lanes import PASSED, Lane
from lab.steps import Lab, Step, words

_DATA = ("data_root", "download")
_MODELS = (*_DATA, "device", "workers", "amp")
_ENGINE = ("engine", "num_workers", "cpus_per_worker", "gpus_per_worker", "address", "slurm")
TAKES: Mapping[str, tuple[str, ...]] = {
    "cache-teachers": (*_MODELS, *_ENGINE),
    "train-student": (*_MODELS, *_ENGINE, "overwrite"),
    "rank-sources": ("data_root",),
    "eval-probe": _MODELS,
    "compare": _MODELS,
    "fuse-teachers": ("device", "amp", "overwrite"),
    "soup": (*_DATA, "device", "workers"),
    "audit": (*_DATA, "workers"),
    "report": (),
    "demo": (),
}
"""What of the user's options each command takes."""


@final
class Runner:
    """Runs the steps of a recipe.

    Args:
        lab: where they leave what they make.
        passed: the user's options of kd, by name (``engine``, ``device``, ``data_root``, ...).
        jobs: how many steps run at a time, once what they need is there.
    """

    def __init__(self, lab: Lab, passed: Mapping[str, Any], jobs: int = 1) -> None:
        self._lab, self._passed, self._jobs = lab, passed, jobs
        self._commands = _Commands(jobs)

    def words(self, step: Step) -> tuple[str, ...]:
        """The whole command of a step; an engine needs a sweep, or a cache."""
        taken = {
            name: self._passed[name] for name in TAKES[step.words[0]] if self._passed.get(name) is not None
        }
        if step.words[0] == "train-student" and "--sweep" not in step.words:
            taken = {name: value for name, value in taken.items() if name not in _ENGINE}
        return (*step.words, *words(**taken), "--json")

    def finished(self, step: Step) -> bool:
        """Whether it has left its document: by this command and files, and of what its needs say now."""
        record = self._record(step)
        return self._lab.has(step.name) and record.exists() and record.read_text() == self._identity(step)

    def stale(self, steps: Sequence[Step]) -> list[str]:
        """Names of those that have a document, but of other settings or data."""
        return [step.name for step in steps if self._lab.has(step.name) and not self.finished(step)]

    def run(self, steps: Sequence[Step]) -> int:
        """Run what is not finished, in order; gives kd's exit code.

        A sweep of which some students diverged is finished, for the others are: all is run, and the code is 40.
        """
        if code := self._run_all(steps):
            return code
        lost = {step.name: self._diverged(step) for step in steps}
        for name, students in lost.items():
            if students:
                print(f"{name}: without {', '.join(students)}, whose loss was not finite", file=sys.stderr)
        return DivergedError.exit_code if any(lost.values()) else 0

    def _run_all(self, steps: Sequence[Step]) -> int:
        """In order, each when what it needs is there; after one that fails no other is begun."""
        names = {step.name for step in steps}
        waiting, done, failed = dict(enumerate(steps, 1)), set[str](), 0
        running: dict[Future[int], str] = {}
        with self._commands.listening(), ThreadPoolExecutor(self._jobs) as pool:
            while running or (waiting and not failed):
                for number, step in list(waiting.items()):
                    if failed or len(running) == self._jobs:
                        break
                    if names.intersection(step.needs) <= done:
                        told = f"[{number}/{len(steps)}] {step.name}"
                        running[pool.submit(self._run_one, waiting.pop(number), told)] = step.name
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for each in ended:
                    done.add(running.pop(each))
                    failed = failed or each.result()
        return failed

    def _run_one(self, step: Step, told: str) -> int:
        if self.finished(step):
            print(f"{told}: finished", file=sys.stderr, flush=True)
            return 0
        print(f"{told}: {step.line}", file=sys.stderr, flush=True)
        if code := self._do(step):
            print(f"{told}: ended with {code}; the same call goes on here", file=sys.stderr, flush=True)
        return code

    def check(self, steps: Sequence[Step], as_json: bool = False) -> int:
        """Print every command, and let kd check it without doing it: by ``--dry-run`` where it has one.

        The others, those that read what is not there yet, and caches of networks that the recipe does not make (they
        would be downloaded) are checked by ``--print-config``: all options and their values, and each student of a
        sweep. Nothing but the small files of the steps is written.
        """
        for number, step in enumerate(steps, 1):
            if not as_json:
                print(f"[{number}/{len(steps)}] {step.name}: {step.line}", flush=True)
            self._prepare(step)
            ready = step.words[0] == "cache-teachers" and step.needs and all(map(self._lab.has, step.needs))
            code, _ = kd_here((*self.words(step), "--dry-run" if ready else "--print-config"))
            if code:
                print(f"step {step.name} would be refused", file=sys.stderr)
                return code
        if as_json:
            console.document({"steps": [{"name": step.name, "command": step.line} for step in steps]})
        return 0

    def _do(self, step: Step) -> int:
        self._prepare(step)
        if step.words[0] == "cache-teachers" and self._passed.get("overwrite"):
            self._forget(step)
        with NamedTemporaryFile() as output:  # of two runs in one folder each has its own
            code = self._commands.call(self.words(step), Path(output.name))
            told = output.read()
        if code == DivergedError.exit_code and json.loads(told).get("students"):
            code = 0
        if not code:  # in this order: who is killed in between does the step again
            atomic_write_bytes(self._lab.document_path(step.name), told)
            atomic_write_text(self._record(step), self._identity(step))
        return code

    def _forget(self, step: Step) -> None:
        """Take out of a cache what networks said that other ones have taken the place of."""
        if not self._record(step).exists():
            return
        named = dict(zip(step.words, step.words[1:], strict=False))
        for flag, word in zip(step.words, step.words[1:], strict=False):
            if flag == "--teacher":
                with contextlib.suppress(NotFoundError, CacheMissingError):  # removed before
                    remove(plan_output_removal(Path(named["--cache"]), word.partition("=")[0]))

    def _diverged(self, step: Step) -> list[str]:
        """Students of a finished sweep that were given up."""
        document = self._lab.document(step.name)
        return [each["name"] for each in document.get("diverged", [])]

    def _prepare(self, step: Step) -> None:
        """Write the small files that it reads, and make the folder of its document."""
        folder = self._lab.document_path(step.name).parent
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in step.files.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)

    def _record(self, step: Step) -> Path:
        return self._lab.document_path(step.name).with_suffix(".command")

    def _identity(self, step: Step) -> str:
        """The command, and digests of what it reads: only these may change what it would do."""
        read = {str(path): text.encode() for path, text in step.files.items()}
        read |= {
            need: self._lab.document_path(need).read_bytes() for need in step.needs if self._lab.has(need)
        }
        told = [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in sorted(read.items())]
        return "\n".join([step.line, *told]) + "\n"


def chosen(steps: Sequence[Step], patterns: Sequence[str] | None) -> list[Step]:
    """Those whose names match a pattern, and all that they need; without patterns all.

    Raises:
        UsageError: a pattern that matches none.
    """
    if patterns is None:
        return list(steps)
    by_name = {step.name: step for step in steps}
    wanted: set[str] = set()
    for pattern in patterns:
        found = {name for name in by_name if fnmatchcase(name, pattern)}
        if not found:
            raise UsageError(f"no step is called '{pattern}'", "--dry-run lists the steps.")
        wanted |= found
    while more := {need for name in wanted for need in by_name[name].needs} - wanted:
        wanted |= more
    return [step for step in steps if step.name in wanted]


@final
class _Commands:
    """Commands that run, and the signals that ask this process for an end: these are theirs to answer."""

    def __init__(self, jobs: int = 1) -> None:
        self._lanes = [Lane() for _ in range(jobs)]
        self._free = list(self._lanes)
        self._asked = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Pass signals on for the time of the block; ^C reaches the commands anyway."""
        old = {number: signal.signal(number, self._end) for number in PASSED}
        try:
            yield
        finally:
            for lane in self._lanes:
                lane.close()
            for number, handler in old.items():
                signal.signal(number, handler)

    def call(self, words: Sequence[str], output: Path) -> int:
        """Run one; gives its exit code, as kd's own: no other is begun after a signal."""
        if self._asked:
            return 130 if self._asked == signal.SIGINT else StoppedEarly.exit_code
        lane = self._free.pop()
        try:
            return lane.call(words, output)
        finally:
            self._free.append(lane)

    def _end(self, number: int, _: object) -> None:
        self._asked = number
        for lane in self._lanes if number != signal.SIGINT else ():
            lane.send(number)
