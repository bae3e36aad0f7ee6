"""Attacks on ``kd``: a place with everything in it, one thing in it or on the command line changed, and the verdict.

An attack is three numbers, so that hypothesis can look for it and anybody can repeat it. Used by test_fuzz.py and
``benchmarks/soak.py --fuzz``.
"""

import hashlib
import io
import os
import random
import re
import shlex
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fuzz_mutations import RAW, VALUES, mutate
from golden_place import SMALL, make_place, set_up
from kd_driver import HUNG, Driver

CLI = Path(__file__).parents[1] / "docs" / "cli.md"
CODES = frozenset({0, 2, 10, 11, 12, 13, 20, 21, 22, 23, 24, 30, 31, 32, 40})
"""What the documentation lists, without 75: nobody stops these commands."""
SECONDS, MEMORY = 60.0, 6 * 2**30
RUN = "--workers 0 --device cpu"
TRAIN = f"train-student images --student test_efficientnet {SMALL} --out fresh"
EXTRA = (
    "cache pack c.kd --to c.zarr",
    "cache pack c.kd --to c.h5",
    "compare --cache test.kd --out compared",
    f"eval-probe images --test held-out --model gen {RUN} --protocol fine-tune --epochs 1 --out probed",
    "fuse-teachers --cache c.kd --teacher gen --teacher exp --levels L1 --out joint --epochs 1 "
    "--batch-size 8 --device cpu --projection 8",
    f"train-student images {SMALL} --student test_efficientnet --sweep sweep.yaml --out swept",
    f"soup swept/seed4-lr0.1 swept/seed4-lr0.2 {RUN} --out mean",
)
CACHE = (
    "cache ls c.kd",
    "cache info c.kd",
    "cache verify c.kd",
    f"cache repair c.kd {RUN}",
    "cache gc c.kd",
    "cache rm c.kd --teacher exp/logits --yes",
    "cache rm c.kd --teacher gen --yes",
    "cache rm c.kd --yes",
    "cache pack c.kd --to packed.zarr",
    "cache pack c.kd --to packed.h5",
    "cache diff c.kd test.kd",
    "cache merge c.kd test.kd --to merged.kd",
    "cache extend c.kd more",
    "rank-sources --cache c.kd",
    "cache ls .",
    f"{TRAIN} --method dp --cache c.kd --teacher exp",
    f"{TRAIN} --method mlfd --cache c.kd --teacher exp",
    f"cache-teachers images --cache c.kd --teacher gen=local-dir:gen/export --views eval+train:2 --recipe mild {RUN}",
    f"cache-teachers images --cache c.kd --teacher new=local-dir:gen/export --views eval+train:2 --recipe mild {RUN}",
    f"cache plan images --cache c.kd --teacher gen=local-dir:gen/export {RUN}",
    "compare --cache c.kd",
    f"eval-probe images --test held-out --cache c.kd --cache test.kd --teacher gen {RUN}",
    "report c.kd --out page.html",
    "fuse-teachers --cache c.kd --teacher gen --teacher exp --levels L1 --out joined --epochs 1 --device cpu "
    "--projection 8",
)
MODEL = (
    f"cache-teachers few --cache n.kd --teacher a=local-dir:gen/export {RUN}",
    f"train-student images --student local-dir:gen/export {SMALL} --method labels-only --out fresh",
    f"eval-probe images --test held-out --model local-dir:gen/export {RUN}",
    f"soup gen/export swept/seed4-lr0.1/export {RUN} --out mixed",
    f"compare gen exp --cache test.kd --data held-out {RUN}",
    f"cache repair c.kd {RUN}",
    f"{TRAIN} --method labels-only --init local-dir:gen/export",
)
RUNS = (
    "report gen exp --out page.html",
    "report gen exp --out table.csv --format csv",
    f"compare gen exp --cache test.kd --data held-out {RUN}",
    f"train-student images --student test_efficientnet {SMALL} --method labels-only --seed 1 --out gen --test held-out",
    f"eval-probe images --test held-out --model gen {RUN}",
    f"eval-probe --test held-out --model gen --head label {RUN}",
    f"soup swept/seed4-lr0.1 gen {RUN} --out mixed",
    "rank-sources --cache c.kd --against gen exp",
)
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "manifest": (("c.kd/manifest.json",), CACHE),
    "records": (("c.kd/teachers/*/*.json", "c.kd/fingerprints*"), CACHE),
    "commits": (("c.kd/commits/**/*.json*", "c.kd/verified/*"), CACHE),
    "arrays": (("c.kd/data.zarr/**/*",), CACHE),
    "packed": (
        ("c.zarr", "c.h5"),
        ("cache unpack {} --to n.kd", "cache ls {}", "cache info {}", "cache verify {}"),
    ),
    "config": (("gen/export/config.json",), MODEL),
    "weights": (("gen/export/model.safetensors", "gen/heads.safetensors"), (*MODEL, *RUNS)),
    "run": (("gen/*.json", "gen/*.jsonl", "gen/*.yaml", "gen/last/*"), RUNS),
    "sweep": (
        ("swept/**/*.json*", "swept/**/*.yaml"),
        ("report swept --out page.html", EXTRA[5], f"compare swept --cache test.kd --data held-out {RUN}"),
    ),
    "probe": (("probed/**/*",), ("report probed --out page.html", EXTRA[3])),
    "fused": (
        ("joint/**/*",),
        (
            EXTRA[4],
            "report joint --out page.html",
            f"cache-teachers few --cache n.kd --teacher j=local-dir:joint/export {RUN}",
        ),
    ),
    "compared": (("compared/**/*",), (EXTRA[2], "report compared --out page.html")),
    "soup": (
        ("mean/**/*",),
        (EXTRA[6], "report mean --out page.html", f"soup mean swept/seed4-lr0.1 {RUN} --out mixed"),
    ),
    "ranking": (
        ("ranking.json",),
        (
            f"{TRAIN} --method distill-nearest --cache c.kd --ranking ranking.json",
            "report ranking.json --out page.html",
            f"{TRAIN} --method distill-weighted --cache c.kd --ranking ranking.json",
        ),
    ),
    "settings": (
        ("run.yaml", "mine.yaml", "sweep.yaml"),
        (
            f"{TRAIN} --method labels-only --config run.yaml",
            "rank-sources --cache c.kd --config run.yaml",
            f"{TRAIN} --sweep sweep.yaml",
            f"cache-teachers images --cache n.kd --teacher gen/export --views eval+train:1 --recipe mine.yaml {RUN}",
        ),
    ),
    "tables": (
        ("images/labels.csv", "keys.txt"),
        (
            f"cache-teachers images@labels=colour --cache n.kd --teacher a=local-dir:gen/export {RUN}",
            "audit images@without=keys.txt --workers 0",
            f"train-student images@without=keys.txt,labels=colour --student test_resnet {SMALL} --out fresh",
        ),
    ),
    "shards": (
        ("shards/*.tar",),
        (
            f"cache-teachers tar/shards --cache n.kd --teacher a=local-dir:gen/export {RUN}",
            "data check tar/shards@split=train,repeats=allowed",
            f"train-student tar/{{}} --student test_efficientnet {SMALL} --method labels-only --out fresh",
            "audit tar/shards@label=cls images --workers 0",
        ),
    ),
    "rows": (
        ("rows/*.parquet", "rows/*.csv"),
        (
            f"cache-teachers parquet/rows@image=image,label=label --cache n.kd --teacher a=local-dir:gen/export {RUN}",
            "data check parquet/rows@key=key,split-column=part,split=train",
            "data check csv/rows/table.csv@path=path,label=label,root=../images",
            f"train-student parquet/rows --student test_efficientnet {SMALL} --method labels-only --out fresh",
            f"train-student csv/rows/table.csv@root=../images --student test_efficientnet {SMALL} --method labels-only "
            "--out fresh",
        ),
    ),
    "images": (
        ("images/*/*",),
        (
            f"cache-teachers images --cache n.kd --teacher a=local-dir:gen/export {RUN}",
            "audit images --workers 0",
            f"{TRAIN} --method labels-only",
            f"cache-teachers images --cache n.kd --teacher a=local-dir:gen/export {RUN} --workers 2 --bad-images drop",
            f"eval-probe images --test held-out --model gen {RUN}",
            f"cache repair c.kd {RUN}",
        ),
    ),
}
"""What is changed, and the commands that read it; {} is the changed file."""
BASES: tuple[str, ...] = (
    f"{TRAIN} --method labels-only",
    f"{TRAIN} --method distill-equal --cache c.kd",
    f"{TRAIN} --method consolidation --cache c.kd --generalist gen",
    f"{TRAIN} --method mlfd --cache c.kd --teacher exp",
    f"cache-teachers images --cache n.kd --teacher a=local-dir:gen/export {RUN}",
    "rank-sources --cache c.kd",
    f"eval-probe images --test held-out --model gen {RUN}",
    "compare --cache test.kd",
    "audit images held-out --workers 0",
    "report gen exp --out page.html",
    f"soup swept/seed4-lr0.1 gen {RUN} --out mixed",
    *CACHE[:11:2],
    "cache merge c.kd again.kd --to merged.kd",
    "cache extend c.kd more",
    f"cache plan images --cache n.kd --teacher a=local-dir:gen/export {RUN}",
    "cache unpack c.zarr --to n.kd",
    EXTRA[4],
    f"{TRAIN} --method crd --cache c.kd --teacher exp",
    f"{TRAIN} --method rkd --cache c.kd --teacher exp --accumulate 2 --label-weight 0",
    f"distill images --test held-out --teacher a=local-dir:gen/export --student test_efficientnet --epochs 1 {RUN} "
    "--image-size 32 --views 1",
    f"eval-probe images --test held-out --model gen {RUN} --protocol fine-tune --epochs 1 --out tuned",
    f"cache-teachers tar/shards --cache n.kd --teacher a=local-dir:gen/export --keep pixels@eval {RUN}",
)
TEXTS = (
    *(str(value) for value in VALUES),
    "null",
    "-0",
    "1e400",
    "9" * 5000,
    "images",
    "a-file",
    "fifo",
    "empty",
    "c.kd",
    "nowhere",
    "a,b",
    "1,,2",
    ",",
    "1:2",
    "1:0:3log",
    "0.1:1:-5log",
    "0.1:1:1e9log",
    "a=b",
    "a=",
    "=b",
    "=",
    "@",
    "images@split=x",
    "images@n=0",
    "images@n=-1,seed=2",
    "images@labels=",
    "images@labelled=2",
    "images@",
    "tar/shards@label=json:x",
    "tar/wrong/*.tar",
    "tar/wrong/upwards.tar",
    "parquet/rows@image=nothing",
    "parquet/rows@split-column=nothing",
    "csv/rows/table.csv@path=nothing",
    "a=images",
    "eval+train:0",
    "eval+train:-1",
    "eval+train:1e9",
    "topk:0",
    "topk:99999",
    "maps:",
    "maps:nothing",
    "local-dir:",
    "local-dir:gen",
    "transformers/x",
    "torchvision/x",
    "torch/x",
    "hfds/x",
    "hf-hub:",
    "python:os:system",
    "onnx:a-file",
    "all",
    "none",
    "cuda",
    "cuda:99",
    "meta",
    "cudaa",
    "best",
    "1/0",
    "0/0",
    "5/4",
    "-1/2",
    "0.5,0.5",
    "nan,nan",
    "inf",
    "-inf",
    "50%",
    "1e-400",
    "True",
    "\udcff",
)
LASTING = frozenset(
    [
        "epochs",
        "steps",
        "draws",
        "repeats",
        "views",
        "trials",
        "probe-size",
        "tsne",
        "map-channels",
        "projection",
        "warmup",
        "workers",
        "logme-steps",
        "bootstrap",
        "shots",
        "iterations",
        "max-pairs",
    ]
)
"""Options of which a large value is a long run and no hang: it has to end when it is asked to."""
SHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Attack:
    """One wrong thing.

    Attributes:
        target: a key of :data:`TARGETS`, or "options".
        command: which of the commands that read it.
        seed: of everything else.
    """

    target: str
    command: int
    seed: int


@dataclass(frozen=True)
class Verdict:
    """What came of an attack; ``problem`` is empty when kd did well."""

    attack: Attack
    line: str
    way: str
    code: int
    problem: str
    err: str


def options_of(line: str) -> list[str]:
    """Every option that the command of ``line`` has, as docs/cli.md lists them."""
    sections = re.split(r"^## kd ?", CLI.read_text(), flags=re.MULTILINE)[1:]
    helps = {text.split("\n", 1)[0]: text for text in sections}
    command = max((name for name in helps if f"{line} ".startswith(f"{name} ")), key=len)
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", helps[command])) - {"--help", "--version"})


def digest(folder: Path, without: Path | None = None) -> dict[str, str]:
    """What is in every file of a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if without is not None and path.is_relative_to(without):
            continue
        kind = "link" if path.is_symlink() else "file" if path.is_file() else "folder"
        name = str(path.relative_to(folder))
        if kind == "file" and path.stat().st_size > 2**27:  # a sparse one of a mutation
            kind = f"{path.stat().st_size} bytes"
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" else kind
    return found


def write_sources(origin: Path, keys: Sequence[str]) -> None:
    """The images as shards and as rows; and shards that are wrong: a path upwards, a copy, one that is cut off."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("shards", "wrong", "rows"):
        (origin / name).mkdir()

    def write(path: Path, members: Mapping[str, bytes]) -> None:
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    for number in range(2):
        members: dict[str, bytes] = {}
        for key in keys[number::2]:
            members[key] = (origin / "images" / key).read_bytes()
            members[f"{key.rpartition('.')[0]}.cls"] = key.partition("/")[0].encode()
        write(origin / f"shards/train-{number}.tar", members)
    write(origin / "wrong/upwards.tar", {"../a.png": b"x"})
    for name in ("one", "two"):
        shutil.copy(origin / "shards/train-0.tar", origin / f"wrong/{name}.tar")
    whole = (origin / "shards/train-1.tar").read_bytes()
    (origin / "wrong/cut.tar").write_bytes(whole[: len(whole) // 2])
    labels = [key.partition("/")[0] for key in keys]
    columns = {
        "image": [(origin / "images" / key).read_bytes() for key in keys], "label": labels, "key": list(keys),
        "part": ["train" if number % 3 else "val" for number in range(len(keys))],
    }  # fmt: skip
    pq.write_table(pa.table(columns), origin / "rows/rows.parquet", row_group_size=5)
    table = "".join(f"{key},{label}\n" for key, label in zip(keys, labels, strict=True))
    (origin / "rows/table.csv").write_text(f"path,label\n{table}")


def _copy(source: str, target: str) -> None:
    """Large files are shared: kd writes none of them in place, and a mutation is of a file of its own."""
    if os.stat(source).st_size > 4096:  # noqa: PTH116 - once a file of each copy
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


class Arena:
    """The place, made once, and a copy of it for each attack. Use as a context."""

    def __init__(self, root: Path, tree: Path | None = None) -> None:
        self.root, self.origin = root, root / "origin"
        self._driver = Driver(self.origin, root / "streams", tree)
        self._options: dict[str, list[str]] = {}

    def __enter__(self) -> Self:
        self.origin.mkdir(parents=True)
        make_place(self.origin)
        self._driver.__enter__()
        set_up(self._driver)
        for line in EXTRA:
            answer = self._driver.run(*line.split())
            assert answer.code == 0, (line, answer.err)
        keys = [
            path.relative_to(self.origin / "images").as_posix()
            for path in sorted((self.origin / "images").rglob("*.*"))
        ]
        rows = "".join(f"{key},{'red' if number % 2 else 'blue'}\n" for number, key in enumerate(keys))
        (self.origin / "images" / "labels.csv").write_text(f"key,colour\n{rows}")
        (self.origin / "keys.txt").write_text("".join(f"{key}\n" for key in keys[:3]))
        write_sources(self.origin, keys)
        return self

    def __exit__(self, *error: Any) -> None:
        self._driver.__exit__(*error)

    def run(self, attack: Attack) -> Verdict:
        """Make a copy, do the wrong thing to it, run the command, and judge."""
        work = self.root / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        place, victim = work / "place", work / "victim"
        shutil.copytree(self.origin, place, symlinks=True, copy_function=_copy)
        for folder in (victim, place / "victim"):
            folder.mkdir()
            shutil.copy(self.origin / "gen" / "export" / "model.safetensors", folder)
            (folder / "precious.txt").write_text("precious")
        draw = random.Random(f"{attack.target} {attack.seed}")
        words, way, lasting = self._wrong(attack, place, victim, draw)
        before = (digest(victim), digest(place / "victim"), digest(place / "images"))
        self._driver.place = place
        answer = self._driver.run(*words, seconds=SECONDS, memory=MEMORY)
        same = before == (digest(victim), digest(place / "victim"), digest(place / "images"))
        problem = judge(answer.code, answer.out, answer.err, lasting) or (
            "" if same else "files outside were touched"
        )
        return Verdict(attack, shlex.join(words), way, answer.code, problem, answer.err[-3000:])

    def _wrong(
        self, attack: Attack, place: Path, victim: Path, draw: random.Random
    ) -> tuple[list[str], str, bool]:
        if attack.target == "options":
            words = shlex.split(BASES[attack.command % len(BASES)])
            line = shlex.join(words)
            known = self._options.setdefault(line, options_of(line))
            names = [draw.choice(known) for _ in range(draw.choice((1, 1, 1, 2)))]
            for name in names:
                words += [
                    name,
                    draw.choice((*TEXTS, *RAW[:4])).replace("/VICTIM", str(victim)).replace("\0", ""),
                ]
            return words, "option", any(name.removeprefix("--") in LASTING for name in names)
        patterns, lines = TARGETS[attack.target]
        files = sorted(path for pattern in patterns for path in place.glob(pattern) if path.is_file())
        path = draw.choice(files)
        way = mutate(path, place, draw, victim)
        line = lines[attack.command % len(lines)].replace("{}", path.name)
        return line.split(), f"{way} of {path.relative_to(place)}", False


def judge(code: int, out: str, err: str, lasting: bool) -> str:
    """What is wrong with an answer; empty when nothing is."""
    checks: tuple[tuple[Callable[[], bool], str], ...] = (
        (lambda: code == HUNG, "it hung"),
        (lambda: "Traceback" in err, "traceback"),
        (lambda: code not in CODES and not (lasting and code in (75, 143)), f"exit {code}"),
        (lambda: code != 0 and not (out + err).strip(), "nothing said"),
        (lambda: SHOWN.search(out + err) is not None, "control characters"),
    )
    return next((reason for holds, reason in checks if holds()), "")


NAMES = (*TARGETS, "options", "options", "options")
"""Targets, options three times as often as any."""


@dataclass
class Campaign:
    """What many attacks gave."""

    codes: Counter[int] = field(default_factory=Counter)
    bad: list[Verdict] = field(default_factory=list)


def campaign(root: Path, count: int, seed: int, told: Callable[[Verdict], None]) -> Campaign:
    """``count`` attacks, the same for the same seed; ``told`` gets each that kd did not withstand, at once."""
    draw, found = random.Random(seed), Campaign()
    with Arena(root) as arena:
        origin = digest(arena.origin)
        for _ in range(count):
            verdict = arena.run(Attack(draw.choice(NAMES), draw.randrange(2**10), draw.randrange(2**31)))
            found.codes[verdict.code] += 1
            if verdict.problem:
                found.bad.append(verdict)
                told(verdict)
        assert digest(arena.origin) == origin, "a command wrote into a file in place, through a link"
    return found
