"""What a line names and is not there is refused before torch is loaded, as the step itself would refuse it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kdcli.files import beside

_STUDENT = ("--student", "resnet10t", "--method", "labels-only", "--out", "run")

_CASES = [
    (("train-student", "data/myse", *_STUDENT), 11, "Did you mean 'data/myset'?"),
    (("train-student", "data/myse@split=train", *_STUDENT), 11, "Did you mean 'data/myset'?"),
    (("train-student", "a=data/myse", "b=data/myset", *_STUDENT), 11, "Did you mean 'data/myset'?"),
    (("train-student", "data/myset", *_STUDENT, "--test", "data/myset/c00"), 11, "Did you mean 'data/myset/c0'?"),
    (("train-student", "data/myset", *_STUDENT, "--test=data/nothing-like-it"), 11, "there is no folder"),
    (("train-student", "data/myset", *_STUDENT, "--cache", "c.kd"), 20, "c.kd does not exist"),
    (("train-student", "data/myset", *_STUDENT, "--ranking", "rankin.json"), 11, "Did you mean 'ranking.json'?"),
    (("train-student", "data/myset", *_STUDENT[:-1], "data"), 24, "holds no kd run"),
    (("cache-teachers", "data/myset.zip", "--cache", "c.kd", "--teacher", "resnet10t"), 12, "unzip"),
    (("eval-probe", "data/myset", "--test", "data/myse", "--model", "x"), 11, "Did you mean 'data/myset'?"),
    (("distill", "data/myse", "--teacher", "resnet10t", "--student", "resnet10t"), 11, "Did you mean 'data/myset'?"),
    (("distill", "data/myset", "--teacher", "local-dir:expor", "--student", "resnet10t"), 11, "Did you mean 'export'?"),
    (("cache-teachers", "data/myset", "--cache", "n.kd", "--teacher", "a=local-dir:expor"), 11, "mean 'export'?"),
    (("train-student", "data/myset", "--student", "local-dir:data", *_STUDENT[2:]), 11, "it has no config.json"),
    (("rank-sources", "--cache", "c.kd"), 20, "c.kd does not exist"),
    (("compare", "--cache", "c.kd", "--test", "data/myset"), 20, "c.kd does not exist"),
    (("fuse-teachers", "--cache", "c.kd", "--teacher", "a", "--teacher", "b", "--out", "o"), 20, "does not exist"),
    (("data", "check", "data/myse"), 11, "Did you mean 'data/myset'?"),
    (("audit", "data/myse"), 11, "Did you mean 'data/myset'?"),
    (("report", "ranking.jso"), 11, "Did you mean 'ranking.json'?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("early")
    for name in ("c0", "c1"):
        (root / "data/myset" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "data/myset" / name / "a.png")
    (root / "data/myset.zip").write_bytes(b"PK")
    (root / "ranking.json").write_text("{}")
    (root / "export").mkdir()
    return root


def run(place: Path, *arguments: str) -> tuple[int, str, set[str]]:
    """Exit code, stderr, and which heavy packages were loaded, of a process of its own."""
    script = (
        "import json, sys\nfrom kdcli.cli.app import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    print('LOADED', json.dumps([n for n in ('torch', 'timm', 'zarr', 'sklearn') if n in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=place, capture_output=True, text=True, timeout=120
    )
    loaded = done.stdout.rpartition("LOADED")[2]
    return done.returncode, done.stderr, set(json.loads(loaded))


@pytest.mark.parametrize(("line", "code", "said"), _CASES, ids=[" ".join(case[0][:3]) for case in _CASES])
def test_what_is_not_there_is_refused_without_torch(
    place: Path, line: tuple[str, ...], code: int, said: str
) -> None:
    found, err, loaded = run(place, *line)
    assert (found, loaded) == (code, set()), err
    assert said in err
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "hint"]


@pytest.mark.parametrize("line", [("kd",), ("kd", "cache"), ("kd", "data")])
def test_a_group_alone_is_answered_with_its_help(place: Path, line: tuple[str, ...]) -> None:
    script = "import sys\nfrom kdcli.cli.app import main\nmain(sys.argv[1:])"
    alone, asked = (
        subprocess.run(
            [sys.executable, "-c", script, *line[1:], *more], cwd=place, capture_output=True, text=True
        )
        for more in ((), ("--help",))
    )
    assert (alone.returncode, alone.stderr) == (0, "")
    assert alone.stdout == asked.stdout
    start = alone.stdout.partition("\nStart:\n")[2].splitlines()
    assert len(start) == 3
    assert all(text.startswith("  kd ") and len(text) <= 60 for text in start)


def test_the_nearest_is_looked_for_where_a_path_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/myset").mkdir(parents=True)
    (tmp_path / "data/myses").write_text("")
    assert beside(Path("data/myse"), folders=True) == " Did you mean 'data/myset'?"
    assert beside(Path("dat/myset")) == " Did you mean 'data'?"
    assert beside(Path("data/myset/x")) == ""
    assert beside(tmp_path / "daat") == f" Did you mean '{tmp_path}/data'?"
    assert beside(Path("data/myses/x")) == ""
