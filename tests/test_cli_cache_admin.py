"""``kd cache ls``, ``info``, ``diff``, ``gc`` and ``rm`` as a stranger uses them from the shell."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cache_tools as tools
import pytest
from conftest import Shell

from kdcli.runtime import machine

Kd = Callable[..., Shell]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three caches: whole, begun, damaged; and a folder that is none."""
    folder = tmp_path_factory.mktemp("made")
    tools.fill(folder / "whole.kd", ("t", "u"))
    tools.new_cache(folder / "more/begun.kd")
    tools.new_cache(folder / "bad.kd")
    (folder / "bad.kd/manifest.json").write_text("{}")
    (folder / "photos").mkdir()
    return folder


@pytest.fixture
def caches(made: Path, tmp_path: Path) -> Path:
    """A copy of them where ``kd`` runs."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def writing(root: Path, rows: int = 200) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PAUSE": "0.03", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, tools.__file__, root, "t", str(rows)], env=environment)


# --- ls --------------------------------------------------------------------------------------------


def test_ls_is_a_table_of_what_is_there(kd: Kd, caches: Path) -> None:
    done = kd("cache", "ls")
    assert done.code == 0
    assert done.err.endswith("\nnext: kd cache info more/begun.kd\n")
    head, *lines = done.out.splitlines()
    assert head.split() == [
        "path",
        "id",
        "data",
        "samples",
        "views",
        "teachers",
        "complete",
        "size",
        "age",
        "problem",
    ]
    assert [line.split()[0] for line in lines] == ["bad.kd", "more/begun.kd", "whole.kd"]
    assert lines[0].endswith("bad.kd/manifest.json is not a record that kd wrote")
    assert lines[2].split()[2:7] == ["x", "100", "2", "t,u", "100.0%"]
    assert lines[1].split()[6] == "0.0%"


def test_ls_prints_one_document(kd: Kd, caches: Path) -> None:
    listed = kd("cache", "ls", "more", "whole.kd", "bad.kd", "--json").json["caches"]
    assert [entry["path"] for entry in listed] == ["more/begun.kd", "whole.kd", "bad.kd"]
    assert listed[1]["units"] == {"total": 40, "done": 40}
    assert listed[1]["teachers"] == ["t", "u"]
    assert listed[2]["error"]["code"] == 22


def test_ls_of_an_empty_folder_says_so_and_of_a_mistyped_one_too(kd: Kd, caches: Path) -> None:
    done = kd("cache", "ls", "photos")
    assert (done.code, done.err) == (0, "no caches in photos\n")
    assert done.out.startswith("path ")
    kd("cache", "ls", "photo").refused(20, "photo does not exist", "Did you mean 'photos'?")
    wrong = kd("cache", "ls", "whole.kd/manifest.json", "--json")
    wrong.refused(32, "is a file")
    assert wrong.json["error"]["code"] == 32
    kd("cache", "inof").refused(2, "inof", "info")


def test_a_pipe_that_closes_is_141_or_nothing(kd: Kd, caches: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -1; exit "${PIPESTATUS[0]}"', "bash", sys.executable, "-m", "kdcli", "cache", "ls"],
        cwd=caches, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 141)
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


# --- info ------------------------------------------------------------------------------------------


def test_info_prints_facts_and_kinds(kd: Kd, caches: Path) -> None:
    done = kd("cache", "info", "whole.kd")
    assert done.code == 0
    assert done.err.startswith("units: ")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "complete 100.0% (40 of 40 units)" in lines
    assert "data x, 100 samples, from x" in lines
    assert "blocks 4 of 32 rows" in lines
    assert any(
        line.startswith("t logits 8/8 2.6 kB") and line.endswith("logits 2x5 float16") for line in lines
    )
    document = kd("cache", "info", "whole.kd", "--json").json
    assert list(document["teachers"]["u"]["kinds"]) == ["logits", "stats"]
    assert kd("cache", "info", "more/begun.kd").code == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["info", "whole"], 20, "Did you mean 'whole.kd'?"),
        (["info", "photos"], 20, "photos is not a kd cache"),
        (["info", "bad.kd"], 22, "manifest.json"),
        (["info", "whole.kd/manifest.json"], 32, "is a file"),
        (["info"], 2, "CACHE"),
        (["info", "whole.kd", "--every", "3"], 2, "--watch"),
        (["info", "whole.kd", "--watch", "--every", "0"], 2, "0.1"),
        (["diff", "whole.kd", "hole.kd"], 20, "Did you mean 'whole.kd'?"),
        (["diff", "whole.kd"], 2, "B"),
        (["gc", "whole.kd", "nothing.kd"], 20, "nothing.kd does not exist"),
        (["rm", "photos", "--yes"], 20, "photos is not a kd cache"),
        (["rm", "whole.kd", "--teacher", "v", "--yes"], 11, "Cached teachers: t, u."),
        (["rm", "whole.kd", "--teacher", "t/logit", "--yes"], 11, "Did you mean 'logits'?"),
        (["rm", "whole.kd"], 2, "--yes"),
    ],
)  # fmt: skip
def test_mistakes_are_named(kd: Kd, caches: Path, words: list[str], code: int, said: str) -> None:
    done = kd("cache", *words, "--json")
    done.refused(code, said)
    assert done.json["error"]["code"] == code
    assert (caches / "whole.kd/manifest.json").is_file()


def test_watching_prints_a_line_a_look_until_the_cache_is_complete(kd: Kd, tmp_path: Path) -> None:
    tools.new_cache(tmp_path / "w.kd", 200)
    with writing(tmp_path / "w.kd") as writer:
        done = kd("cache", "info", "w.kd", "--watch", "--every", "0.2", env={"FORCE_COLOR": "1"})
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert len(lines) > 2
    assert all(line.startswith("w.kd: ") for line in lines)
    assert "\x1b" not in done.out
    assert lines[-1] == "w.kd: 42/42 units (100.0%), complete"
    assert any(f"pid {writer.pid} (1)" in line for line in lines)
    document = kd("cache", "info", "w.kd", "--watch", "--json")
    assert document.json["complete"] is True
    assert document.err == "w.kd: 42/42 units (100.0%), complete\n"


def test_watching_ends_with_130_on_an_interrupt(tmp_path: Path) -> None:
    tools.new_cache(tmp_path / "w.kd")
    words = [sys.executable, "-m", "kdcli", "cache", "info", "w.kd", "--watch", "--every", "60"]
    with subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "w.kd: 0/8 units (0.0%); nobody is writing\n"
        watcher.send_signal(signal.SIGINT)
        _, err = watcher.communicate(timeout=20)
    assert watcher.returncode == 130
    assert "Traceback" not in err


def on_a_terminal(arguments: list[str], folder: Path, typed: str = "") -> tuple[int, str]:
    """Run ``kd`` with a terminal on all streams; its exit code and what it showed."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "kdcli", *arguments]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    with subprocess.Popen(
        words, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as child:
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = b""
        while True:
            try:
                shown += (piece := os.read(ours, 4096))
            except OSError:  # the other end is closed
                break
            if not piece:
                break
    os.close(ours)
    return child.returncode, shown.decode()


def test_watching_redraws_on_a_terminal(tmp_path: Path) -> None:
    tools.new_cache(tmp_path / "w.kd", 200)
    with writing(tmp_path / "w.kd"):
        code, shown = on_a_terminal(["cache", "info", "w.kd", "--watch", "--every", "0.2"], tmp_path)
    assert code == 0
    assert "\x1b[J" in shown
    frames = [frame.splitlines() for frame in shown.split("\x1b[J")]
    assert max(len(line) for frame in frames for line in frame if "\x1b" not in line) < 60
    assert any("t/logits" in line for line in frames[-1])
    assert frames[-1][-1].startswith("w.kd: 42/42 units (100.0%), complete")


# --- diff ------------------------------------------------------------------------------------------


def test_diff_exits_0_for_the_same_and_21_for_another(kd: Kd, caches: Path) -> None:
    tools.fill(caches / "other.kd", ("t", "u"), backend="hdf5")
    same = kd("cache", "diff", "whole.kd", "other.kd")
    assert (same.code, same.err) == (0, "whole.kd and other.kd hold the same values\n")
    assert [line.split("  ")[0] for line in same.out.splitlines()] == [
        "what", "stored: cache_id", "stored: backend",
    ]  # fmt: skip
    other = kd("cache", "diff", "whole.kd", "more/begun.kd")
    assert (other.code, other.err) == (21, "whole.kd and more/begun.kd differ\n")
    assert "teachers only in" in other.out
    document = kd("cache", "diff", "whole.kd", "more/begun.kd", "--json")
    assert document.code == 21
    assert document.json["equal"] is False
    assert document.json["teachers"]["only_a"] == ["t", "u"]


# --- gc --------------------------------------------------------------------------------------------


def test_gc_removes_what_a_dead_writer_left_and_nothing_else(kd: Kd, tmp_path: Path) -> None:
    root = tmp_path / "k.kd"
    tools.new_cache(root, 400)
    with writing(root, 400) as writer:
        while not list((root / "claims").rglob("*.json")):
            time.sleep(0.01)
        writer.kill()
    left = root / f"tmp/{machine()}-{writer.pid}-0123456789abcdef"
    left.write_bytes(b"x" * 1000)  # a chunk that was being written
    committed = sorted((root / "commits").rglob("*"))
    planned = kd("cache", "gc", "k.kd", "--dry-run", "--json")
    assert planned.code == 0, planned.err
    (found,) = planned.json["caches"]
    assert found["files"] >= 1
    assert found["bytes"] >= 1000
    assert left.exists()
    done = kd("cache", "gc", "k.kd")
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split() == ["path", "removed", "freed"]
    assert not left.exists()
    assert sorted((root / "commits").rglob("*")) == committed
    (again,) = kd("cache", "gc", "k.kd", "--json").json["caches"]
    assert (again["files"], again["bytes"]) == (0, 0)


# --- rm --------------------------------------------------------------------------------------------


def test_rm_needs_a_yes_and_says_what_it_freed(kd: Kd, caches: Path) -> None:
    refused = kd("cache", "rm", "whole.kd", "--teacher", "u", stdin="yes\n")
    refused.refused(2, "u/logits, u/stats of whole.kd", "Add --yes")
    code, shown = on_a_terminal(["cache", "rm", "whole.kd"], caches, "no\n")
    assert code == 2
    assert "Type yes:" in shown
    assert kd("cache", "info", "whole.kd", "--json").json["complete"] is True
    code, shown = on_a_terminal(["cache", "rm", "whole.kd", "--teacher", "u/stats"], caches, "yes\n")
    assert code == 0, shown
    removed = kd("cache", "rm", "whole.kd", "--teacher", "u", "--yes", "--json").json
    assert removed["parts"] == ["u/logits"]
    assert removed["bytes"] > 8 * 32 * 5 * 2
    assert list(kd("cache", "info", "whole.kd", "--json").json["teachers"]) == ["t"]
    done = kd("cache", "rm", "whole.kd", "--yes")
    assert done.code == 0, done.err
    assert done.out.splitlines()[1].split()[:2] == ["whole.kd", "all"]
    assert not (caches / "whole.kd").exists()


def test_rm_leaves_a_cache_that_is_being_written(kd: Kd, tmp_path: Path) -> None:
    root = tmp_path / "w.kd"
    tools.new_cache(root, 1000)
    with writing(root, 1000) as writer:
        while not list((root / "claims").rglob("*.json")):
            time.sleep(0.01)
        # The claim of a moment may be given back just then; a far writer's stays.
        far = root / "claims/t/logits/000031-0000.json"
        far.parent.mkdir(parents=True, exist_ok=True)
        far.write_text(json.dumps({"host": "far", "pid": 7, "job": "12", "token": "x"}))
        kd("cache", "rm", "w.kd", "--yes").refused(23, "is being written by", "--force")
        kd("cache", "rm", "w.kd", "--teacher", "t", "--yes").refused(23, "is being written by")
        writer.kill()
    assert kd("cache", "rm", "w.kd", "--yes", "--force").code == 0
    assert not root.exists()
