"""Every verb that writes, killed at random instants or short of disk, run again, and compared with a quiet run.

python tests/verb_schedules.py VERB...     what two quiet runs differ in: nothing may be printed
"""

import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_tools import payload
from conftest import make_folder
from crash_tools import Server, records

from kdcli.cache.garbage import collect_garbage
from kdcli.cache.reader import CacheReader
from kdcli.errors import KdError

MODULES = (
    "h5py", "sklearn.linear_model", "matplotlib.pyplot", "kdcli.extract.extract", "kdcli.extract.pipeline",
    "kdcli.extract.repair", "kdcli.extract.extend", "kdcli.models.spec", "kdcli.data.sources", "kdcli.training.train",
    "kdcli.training.soup", "kdcli.fusing.fuse", "kdcli.comparing.compare", "kdcli.reporting", "kdcli.ranking",
    "kdcli.probing", "kdcli.auditing.audit", "zarr", "kdcli.cli.app",
    "kdcli.training.config", "kdcli.comparing.figures", "kdcli.checking.check", "kdcli.cache.hdf5_index",
    "busy_checkpoints",
)  # fmt: skip
"""What the server imports once; the last one lets every epoch be saved."""

_CPU = "--workers 1 --device cpu"
_SMALL = "--student test_efficientnet"
_ONLY = f"{_SMALL} --method labels-only"
_TRAIN = f"train-student images --image-size 32 --batch-size 8 --epochs 2 {_CPU} --seed 1"
_TEACHERS = (
    "--teacher gen=local-dir:gen/export --teacher exp=local-dir:exp/export --views eval+train:2 --recipe mild"
)
SETUP = (
    f"{_TRAIN} {_ONLY} --out gen --test held-out",
    f"{_TRAIN} --student test_resnet --method labels-only --out exp",
    f"{_TRAIN} --student local-dir:gen/export --init pretrained --method labels-only --out tuned --lr 0.01",
    f"{_TRAIN} --student local-dir:gen/export --init pretrained --method labels-only --out other --lr 0.001",
    f"cache-teachers images --cache c.kd {_TEACHERS} --keep logits,features --block-rows 32 {_CPU}",
    f"cache-teachers held-out --cache test.kd {_TEACHERS} --keep logits,features {_CPU}",
    "cache pack c.kd --to old.zarr",
    "cache unpack old.zarr --to again.kd",
    "cache unpack old.zarr --to damaged.kd",
)
VERBS = {
    "distill": f"distill images --test held-out {_TEACHERS.partition(' --views')[0]} {_SMALL} --image-size 32 "
    f"--epochs 1 --views 1 --batch-size 8 --out o {_CPU}",
    "cache-teachers": f"cache-teachers images --cache new.kd {_TEACHERS} --block-rows 32 --batch-size 8 {_CPU}",
    "hdf5": f"cache-teachers images --cache new.kd {_TEACHERS} --backend hdf5 --block-rows 32 --batch-size 8 {_CPU}",
    "extend": "cache extend again.kd more",
    "repair": f"cache repair damaged.kd {_CPU}",
    "gc": "cache gc again.kd",
    "merge": "cache merge c.kd again.kd --to merged.kd",
    "pack": "cache pack c.kd --to new.h5",
    "pack-over": "cache pack c.kd --to old.zarr --overwrite",
    "unpack": "cache unpack old.zarr --to new.kd",
    "rm": "cache rm again.kd --yes",
    "rm-teacher": "cache rm again.kd --teacher exp --yes",
    "train-student": f"{_TRAIN} {_SMALL} --cache c.kd --method distill-equal --stage s --out o --test held-out",
    "sequential": f"{_TRAIN} {_SMALL} --cache c.kd --method xe-kl --sequential ascending --out o",
    "lr-grid": f"{_TRAIN} {_ONLY} --lr-grid 0.001,0.01 --validation 0.25 --out o",
    "sweep": f"{_TRAIN} {_SMALL} --sweep sweep.yaml --out o",
    "overwrite": f"{_TRAIN} {_ONLY} --lr 0.002 --out other --overwrite",
    "fine-tune": "eval-probe images --test held-out --model local-dir:gen/export --protocol fine-tune --shots 2 "
    f"--draws 1 --lr-grid 0.01 --epochs 2 --out o {_CPU}",
    "soup": f"soup tuned other --out o --recalibrate-bn images --test held-out {_CPU}",
    "fuse-teachers": "fuse-teachers --cache c.kd --teacher gen --teacher exp --levels L1 --out o --epochs 2 "
    "--batch-size 8 --projection 8 --write-back joint --device cpu",
    "compare": f"compare gen tuned --cache test.kd --test held-out --out o --figures f {_CPU}",
    "report": "report gen tuned --out o",
    "report-csv": "report gen tuned --format csv --out o",
    "audit": "audit images held-out --write-exclude x.txt --workers 1",
    "data-check": "data check images --test held-out --write-exclude x.txt --workers 1",
}
ANEW = ("overwrite",)
"""What removes the old before it makes the new."""
GROWN = ("metrics.jsonl", "soup.json")
"""What says how far a verb has come."""
ONCE = {"rm": 20, "rm-teacher": 11, "audit": 24, "data-check": 24}
"""What refuses to be run again once it came to its end, and how."""
_WRITTEN = re.compile(rb"Written [-0-9]+ [0-9:]+ UTC")
_OF_THE_CALL = (
    "seconds",
    "images_per_second",
    "created",
    "written",
    "time",
    "started",
    "source",
    "cache_id",
    "caches",
)
"""What documents say of the call that wrote them: its times, and what it found done already."""


@dataclass
class Counts:
    """What went wrong so far; every figure but the first should be 0."""

    kills: int = 0
    rows_lost: int = 0
    bytes_lost: int = 0
    bytes_differing: int = 0
    files_outside: int = 0
    litter: int = 0
    failed: list[str] = field(default_factory=list)


def make_place(root: Path) -> None:
    """What commands find before the models and caches are made."""
    make_folder(root / "images", per_class=16, size=28)
    make_folder(root / "new", per_class=2, size=28, seed=2)
    shutil.copytree(root / "images", root / "more")
    shutil.copytree(root / "new" / "class0", root / "more" / "class0" / "new")
    make_folder(root / "held-out", per_class=3, size=28, seed=1)
    (root / "sweep.yaml").write_text("{common: {method: labels-only}, grid: {lr: [0.01, 0.001]}}")


class Site:
    """A folder in which a verb runs, put back to its beginning before each schedule.

    Args:
        server: forks the commands.
        root: an empty folder.
    """

    def __init__(self, server: Server, root: Path) -> None:
        self._server, self._root = server, root
        self.place, self._kept = root / "place", root / "kept"
        make_place(self.place)
        (root / "tmp").mkdir()
        for command in SETUP:
            code, said = self.run(command)
            assert code == 0, said
        damage(self.place / "damaged.kd")
        left = self.place / "again.kd" / "tmp" / "left"
        left.write_text("by a writer that died long ago")
        os.utime(left, (0, 0))
        shutil.copytree(self.place, self._kept)
        self._before, self._around = look_at(self._kept), self._outside()
        self._whole: dict[str, Look] = {}
        self.steps: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def restore(self) -> None:
        """As it was after the set-up."""
        shutil.rmtree(self.place)
        subprocess.run(["cp", "-a", self._kept, self.place], check=True)

    def start(self, command: str, **steps: Any) -> int:
        (self._root / "err").write_text("")
        return self._server.kd(
            *shlex.split(command), cwd=self.place, err=self._root / "err",
            env={"XDG_CACHE_HOME": str(self._root / ".cache"), "TMPDIR": str(self._root / "tmp")},
            log=self._root / "steps", **steps,
        )  # fmt: skip

    def wait(self, pid: int) -> tuple[int, str]:
        """Exit code and what was said."""
        code = self._server.wait(pid, 120)
        return code, (self._root / "err").read_text()

    def run(self, command: str, **steps: Any) -> tuple[int, str]:
        return self.wait(self.start(command, **steps))

    def whole(self, verb: str) -> "Look":
        """What a quiet run leaves."""
        if verb not in self._whole:
            self.restore()
            begun = time.monotonic()
            code, said = self.run(VERBS[verb])
            assert code == 0, said
            self.seconds[verb] = time.monotonic() - begun
            self.steps[verb] = int((self._root / "steps").read_text())
            self._whole[verb] = look_at(self.place)
        return self._whole[verb]

    def killed(self, verb: str, draw: random.Random, counts: Counts) -> None:
        """Kill a verb's whole process group once or twice, run it to its end, and look."""
        before = self._begin(verb)
        for _ in range(draw.randrange(1, 3)):
            if draw.random() < 0.6:
                code, said = self.run(VERBS[verb], kill_at=draw.randrange(1, self.steps[verb] + 1))
            else:
                pid = self.start(VERBS[verb])
                time.sleep(draw.uniform(0, self.seconds[verb]))
                try:
                    os.killpg(pid, signal.SIGKILL)
                except ProcessLookupError:
                    os.kill(pid, signal.SIGKILL)  # it has no group yet
                code, said = self.wait(pid)
            counts.kills += code == -signal.SIGKILL
            if code != -signal.SIGKILL:
                break
            before = self._between(verb, before, counts)
        else:
            code, said = self.run(VERBS[verb])
        self._end(verb, code, said, before, counts)

    def short_of_disk(self, verb: str, step: int, counts: Counts, error: int = errno.ENOSPC) -> None:
        """Let every step on disk from ``step`` on fail; the verb says so, and goes on when there is space again."""
        before = self._begin(verb)
        code, said = self.run(VERBS[verb], fail_at=step, error=error)
        if code not in (0, 31 if error == errno.ENOSPC else 32) or "Traceback" in said:
            counts.failed.append(f"{verb}: step {step} of {self.steps[verb]} fails: {code}: {last(said)}")
        before = self._between(verb, before, counts)
        if code:
            code, said = self.run(VERBS[verb])
        self._end(verb, code, said, before, counts)

    def _begin(self, verb: str) -> "Look":
        self.whole(verb)
        self.restore()
        return self._before

    def _between(self, verb: str, before: "Look", counts: Counts) -> "Look":
        """Whatever is there before and after a verb is there all the time, as it was or as it will be."""
        whole, now = self._whole[verb], look_at(self.place)
        counts.rows_lost += sum(
            rows for unit, rows in before.rows.items() if whole.has(unit) and not now.has(unit)
        )
        for name in () if verb in ANEW else before.files.keys() & whole.files.keys():
            if name.endswith(GROWN) and _begins(now.files.get(name), whole.files[name]):
                continue  # cut back to what is sure, then written on
            if now.files.get(name) not in (before.files[name], whole.files[name]):
                counts.bytes_lost += len(before.files[name])
                counts.failed.append(f"{verb}: {name} is not there or half there")
        return now

    def _end(self, verb: str, code: int, said: str, before: "Look", counts: Counts) -> None:
        if code and code != ONCE.get(verb):
            counts.failed.append(f"{verb}: the same command again: {code}: {last(said)}")
            return
        self._between(verb, before, counts)
        self.compare(verb, counts)

    def compare(self, verb: str, counts: Counts) -> None:
        """What is there against what a quiet run left."""
        whole, now = self._whole[verb], look_at(self.place)
        lost = whole.files.keys() - now.files.keys()
        wrong = {
            name for name in whole.files.keys() & now.files.keys() if whole.files[name] != now.files[name]
        }
        extra, litter = now.files.keys() - whole.files.keys(), now.litter - whole.litter
        outside = self._outside() - self._around
        counts.bytes_lost += sum(len(whole.files[name]) for name in lost)
        counts.bytes_differing += sum(len(now.files[name]) for name in wrong | extra)
        counts.litter += len(litter)
        counts.files_outside += len(outside)
        for what, names in (
            ("lost", lost),
            ("wrong", wrong),
            ("extra", extra),
            ("litter", litter),
            ("outside", outside),
        ):
            if names:
                counts.failed.append(f"{verb}: {what}: {sorted(names)[:5]}")

    def _outside(self) -> set[str]:
        """What is beside the place, and not ours."""
        own = ("place", "kept", "err", "steps", ".cache", "tmp")
        return {path.name for path in self._root.iterdir() if path.name not in own}


@contextmanager
def site(root: Path) -> Iterator[Site]:
    """A site with its server."""
    with Server(*MODULES) as server:
        yield Site(server, root)


def damage(cache: Path) -> None:
    """Flip one bit of a chunk."""
    name, content = next(iter(payload(cache).items()))
    path = next(cache.glob("data.*")) / name
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def last(said: str) -> str:
    """The last lines that say what happened."""
    lines = [line for line in said.splitlines() if line.strip()]
    return " | ".join(lines[-3:])


@dataclass(frozen=True)
class Look:
    """What is in a place.

    Attributes:
        files: bytes by path; of documents what is in them but of which call they are, of caches chunks and records.
        rows: of the caches' committed units.
        litter: what dead processes left.
    """

    files: dict[str, bytes]
    rows: dict[str, int]
    litter: set[str]

    def has(self, unit: str) -> bool:
        """Whether a unit is committed."""
        return unit in self.rows


def look_at(root: Path) -> Look:
    """See :class:`Look`."""
    caches = [path for path in root.rglob("*.kd") if (path / "manifest.json").is_file()]
    found = Look({}, {}, {str(path.relative_to(root)) for path in root.rglob("*.tmp")})
    for cache in caches:
        _look_at_cache(cache, root, found)
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if (
            path.is_file()
            and not any(path.is_relative_to(cache) for cache in caches)
            and name not in found.litter
        ):
            found.files[name] = _plain(path)
    return found


def _look_at_cache(cache: Path, root: Path, found: Look) -> None:
    name = str(cache.relative_to(root))
    found.files.update((f"{name}/{chunk}", content) for chunk, content in payload(cache).items())
    try:
        reader = CacheReader(cache)
        for unit, commit in records(reader).items():
            found.files[f"{name}/{unit}"] = repr((commit.arrays, commit.absent, commit.content)).encode()
            found.rows[f"{name}/{unit}"] = len(reader.manifest.rows_of(commit.block))
        found.litter.update(
            str(Path(path).relative_to(root)) for path in collect_garbage(cache, dry_run=True).paths
        )
    except KdError as error:
        found.files[f"{name}/unreadable"] = str(error).encode()


def _plain(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".jsonl":  # the last line may be torn: it is written anew
        return json.dumps(list(map(_of_any_call, _whole_lines(content))), sort_keys=True).encode()
    if path.suffix == ".json":
        try:
            return json.dumps(_of_any_call(json.loads(content)), sort_keys=True).encode()
        except ValueError:
            return content
    if path.name == "report.html":  # shows how long the trainings took
        return b""
    # Which process has it; what is known of a stage's copies, and their bytes: known anew where it is torn.
    if path.name in ("lock", "stamps", "used"):
        return b""
    return _WRITTEN.sub(b"", content)


def _whole_lines(content: bytes) -> Iterator[Any]:
    """The documents of a log, up to a line that is none."""
    for line in content.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _begins(now: bytes | None, whole: bytes) -> bool:
    """Whether a log of lines is the beginning of another, or a document the other with some of it not yet known."""
    try:
        known = None if now is None else json.loads(now)
    except ValueError:
        return False
    last = json.loads(whole)
    if isinstance(known, dict):
        return all(value in (last.get(name), None) for name, value in known.items())
    return known is not None and known == last[: len(known)]


def _of_any_call(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _of_any_call(item) for key, item in value.items() if key not in _OF_THE_CALL}
    return [_of_any_call(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, site(Path(folder)) as here:
        for verb in sys.argv[1:] or VERBS:
            counts = Counts()
            here.short_of_disk(verb, 2**31, counts)
            print(
                f"{verb}: {here.steps[verb]} steps, {here.seconds[verb]:.1f} s",
                *counts.failed,
                sep="\n  ",
                flush=True,
            )


if __name__ == "__main__":
    main()
