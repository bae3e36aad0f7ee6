"""A study of everything a report shows that is more than a student: really made, of tiny networks, by the commands."""

import contextlib
import io
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from training_place import Place, make_place

from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.training.sequential import train_sequence


@dataclass(frozen=True)
class Study:
    """Where everything is.

    Attributes:
        place: images, teachers, their cache.
        root: of the results.
        typed: the command of each document, by the name under which a report lists it.
    """

    place: Place
    root: Path
    typed: dict[str, str]


def kd(line: str) -> str:
    """What a command prints, run in this process."""
    from kdcli.cli.app import app

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(shlex.split(line)[1:], standalone_mode=False)
    return printed.getvalue()


def make_study(root: Path) -> Study:
    """Build it: a sequence of two stages, a joint teacher, probes, a ranking, a comparison."""
    place = make_place(root)
    held = root / "held-out.kd"
    teachers = tuple(f"{name}={spec}" for name, spec in place.specs.items())
    cache_teachers(
        CacheConfig(data=place.test, cache=held, teacher=teachers, recipe="mild", workers=0, device="cpu")
    )
    results = root / "results"
    train_sequence(
        place.config(
            "results/sequence", "distill-equal", sequential="given", teacher=("gen", "exp"), epochs=2,
            cache=(place.cache, held), init=place.specs["gen"], test=place.test,
        )
    )  # fmt: skip
    some = "@classes=class0+class1"
    typed = {
        "joint": f"kd fuse-teachers --cache {place.cache} --teacher gen --teacher exp --levels L1 --out "
        f"{results / 'joint'} --projection 6 --dropout 0.5 --test {held} --epochs 3 --batch-size 8 --device cpu",
        "probe": f"kd eval-probe all={place.data} two={place.data}{some} --test all={place.test} --test "
        f"two={place.test}{some} --cache {place.cache} --cache {held} --teacher gen --teacher exp --shots 2 "
        "--draws 3 --related two",
        "ranking": f"kd rank-sources --cache {place.cache} --seed 1",
        "compared": f"kd compare gen={place.specs['gen']} seq=local-dir:{results / 'sequence/export'} "
        f"--test {place.test} --out {results / 'compared'} --device cpu --workers 0",
    }  # fmt: skip
    for name, line in typed.items():
        printed = kd(f"{line} --json --quiet")
        if name in ("probe", "ranking"):
            (results / f"{name}.json").write_text(printed)
    assert json.loads((results / "compared/compare.json").read_text())["created"]["command"]
    return Study(place, results, typed)
