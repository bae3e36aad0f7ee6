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
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_tools import payload
from conftest import make_folder
from crash_tools import Server

MODULES = (
    "h5py", "sklearn.linear_model", "matplotlib.pyplot", "kdcli.extract.extract", "kdcli.extract.pipeline",
    "kdcli.extract.repair", "kdcli.extract.extend", "kdcli.models.spec", "kdcli.data.sources", "kdcli.training.train",
    "kdcli.training.soup", "kdcli.fusing.fuse", "kdcli.comparing.compare", "kdcli.reporting", "kdcli.ranking",
    "kdcli.probing", "kdcli.auditing.audit", "zarr", "kdcli.cli.app",
    "kdcli.training.config", "busy_checkpoints",
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
    "cache-teachers": f"cache-teachers images --cache new.kd {_TEACHERS} --block-rows 32 --batch-size 8 {_CPU}",
    "extend": "cache extend again.kd more",
    "repair": f"cache repair damaged.kd {_CPU}",
    "merge": "cache merge c.kd again.kd --to merged.kd",
    "pack": "cache pack c.kd --to old.zarr --overwrite",
    "unpack": "cache unpack old.zarr --to new.kd",
    "rm": "cache rm again.kd --yes",
    "rm-teacher": "cache rm again.kd --teacher exp --yes",
    "train-student": f"{_TRAIN} {_SMALL} --cache c.kd --method distill-equal --out o --test held-out",
    "sequential": f"{_TRAIN} {_SMALL} --cache c.kd --method xe-kl --sequential ascending --out o",
    "lr-grid": f"{_TRAIN} {_ONLY} --lr-grid 0.001,0.01 --validation 0.25 --out o",
    "sweep": f"{_TRAIN} {_SMALL} --sweep sweep.yaml --out o",
    "fine-tune": "eval-probe images --test held-out --model local-dir:gen/export --protocol fine-tune --shots 2 "
    f"--draws 1 --lr-grid 0.01 --epochs 2 --out o {_CPU}",
    "soup": f"soup tuned other --out o --recalibrate-bn images --test held-out {_CPU}",
    "fuse-teachers": "fuse-teachers --cache c.kd --teacher gen --teacher exp --levels L1 --out o --epochs 2 "
    "--batch-size 8 --projection 8 --write-back joint --device cpu",
    "compare": f"compare gen tuned --cache test.kd --data held-out --out o {_CPU}",
    "report": "report gen tuned --out o",
    "report-csv": "report gen tuned --format csv --out o",
    "audit": "audit images held-out --write-exclude x.txt --workers 1",
}
ONCE = ("rm", "rm-teacher", "audit")
"""What refuses to be run again once it came to its end."""
_WRITTEN = re.compile(rb"Written [-0-9]+ [0-9:]+ UTC")
_TIMES = ("seconds", "images_per_second", "created", "written", "time", "started")


@dataclass
class Counts:
    """What went wrong so far; every figure but the first should be 0."""

    kills: int = 0
    bytes_differing: int = 0
    files_lost: int = 0
    files_outside: int = 0
    litter: int = 0
    failed: list[str] = field(default_factory=list)
    by_verb: Counter[str] = field(default_factory=Counter)


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
        for command in SETUP:
            code, said = self.run(command)
            assert code == 0, said
        damage(self.place / "damaged.kd")
        (root / "outside").mkdir()
        (root / "outside" / "precious").write_text("nobody touches it")
        shutil.copytree(self.place, self._kept)
        self._whole: dict[str, dict[str, bytes]] = {}
        self.steps: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def restore(self) -> None:
        """As it was after the set-up."""
        shutil.rmtree(self.place)
        shutil.copytree(self._kept, self.place)

    def start(self, command: str, **steps: Any) -> int:
        (self._root / "err").write_text("")
        return self._server.kd(
            *shlex.split(command), cwd=self.place, err=self._root / "err",
            env={"XDG_CACHE_HOME": str(self._root / ".cache")}, log=self._root / "steps", **steps,
        )  # fmt: skip

    def wait(self, pid: int) -> tuple[int, str]:
        """Exit code and what was said."""
        code = self._server.wait(pid, 120)
        return code, (self._root / "err").read_text()

    def run(self, command: str, **steps: Any) -> tuple[int, str]:
        return self.wait(self.start(command, **steps))

    def whole(self, verb: str) -> dict[str, bytes]:
        """What a quiet run leaves."""
        if verb not in self._whole:
            self.restore()
            begun = time.monotonic()
            code, said = self.run(VERBS[verb])
            assert code == 0, said
            self.seconds[verb] = time.monotonic() - begun
            self.steps[verb] = int((self._root / "steps").read_text())
            self._whole[verb] = tree(self.place)
        return self._whole[verb]

    def look(self, verb: str, counts: Counts) -> None:
        """Compare what is there with what a quiet run left."""
        expected, found = self.whole(verb), tree(self.place)
        litter = [name for name in found.keys() - expected.keys() if name.endswith(".tmp")]
        counts.litter += len(litter)
        lost = expected.keys() - found.keys()
        counts.files_lost += len(lost)
        wrong = [name for name in expected.keys() & found.keys() if expected[name] != found[name]]
        extra = found.keys() - expected.keys() - set(litter)
        counts.bytes_differing += sum(len(expected[name]) for name in wrong) + sum(
            len(found[name]) for name in extra
        )
        if litter or lost or wrong or extra:
            counts.failed.append(
                f"{verb}: litter {litter}, lost {sorted(lost)}, wrong {wrong}, extra {sorted(extra)}"
            )
            counts.by_verb[verb] += 1
        outside = self._root / "outside"
        if [path.name for path in outside.iterdir()] != ["precious"]:
            counts.files_outside += 1

    def killed(self, verb: str, draw: random.Random, counts: Counts) -> None:
        """Kill a verb's whole process group once or twice, run it to its end, and look."""
        self.whole(verb)
        self.restore()
        for _ in range(draw.randrange(1, 3)):
            if draw.random() < 0.6 and self.steps[verb]:
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
            if code == 0:
                break
            if code not in (0, -signal.SIGKILL):
                counts.failed.append(f"{verb}: {code} after a kill: {last(said)}")
                counts.by_verb[verb] += 1
        self._end(verb, counts, code)

    def short_of_disk(self, verb: str, step: int, counts: Counts, error: int = errno.ENOSPC) -> None:
        """Let every step on disk from ``step`` on fail; the verb says so, and goes on when there is space again."""
        self.whole(verb)
        self.restore()
        code, said = self.run(VERBS[verb], fail_at=step, error=error)
        expected = 31 if error == errno.ENOSPC else 32
        if code not in (0, expected) or "Traceback" in said:
            counts.failed.append(f"{verb}: step {step} of {self.steps[verb]} fails: {code}: {last(said)}")
            counts.by_verb[verb] += 1
        self._end(verb, counts, code)

    def _end(self, verb: str, counts: Counts, before: int) -> None:
        if before == 0 and verb in ONCE:
            self.look(verb, counts)
            return
        code, said = self.run(VERBS[verb])
        if code:
            counts.failed.append(f"{verb}: the same command again: {code}: {last(said)}")
            counts.by_verb[verb] += 1
        else:
            self.look(verb, counts)


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


def tree(root: Path) -> dict[str, bytes]:
    """Every file by its path: bytes, of documents what is in them but times, of caches their chunks."""
    found: dict[str, bytes] = {}
    caches = [
        path for path in root.iterdir() if path.name.endswith(".kd") and (path / "manifest.json").is_file()
    ]
    for cache in caches:
        found |= {f"{cache.name}/{name}": content for name, content in payload(cache).items()}
        found |= {str(path.relative_to(root)): b"" for path in cache.rglob("*.tmp")}
    for path in root.rglob("*"):
        if path.is_file() and not any(path.is_relative_to(cache) for cache in caches):
            found[str(path.relative_to(root))] = _plain(path)
    return found


def _plain(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(content)), sort_keys=True).encode()
    if path.suffix == ".jsonl":
        return json.dumps(
            [_timeless(json.loads(line)) for line in content.splitlines()], sort_keys=True
        ).encode()
    if path.suffix == ".zarr":
        return b""  # names of files and times of writing are in it
    return _WRITTEN.sub(b"", content)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, site(Path(folder)) as here:
        for verb in sys.argv[1:] or VERBS:
            counts = Counts()
            try:
                here.whole(verb)
            except AssertionError as error:
                print(verb, error)
                continue
            here.restore()
            here._end(verb, counts, 1)
            print(
                f"{verb}: {here.steps[verb]} steps, {here.seconds[verb]:.1f} s",
                *counts.failed,
                sep="\n  ",
                flush=True,
            )


if __name__ == "__main__":
    main()
