"""The 25 points of how kd behaves towards people and scripts; here are those that have no other place.

==  ====================================================  ==========================================================
 #  point                                                 where
==  ====================================================  ==========================================================
 1  ``kd --help`` in half a second, without torch         here
 2  help and examples of everything                       test_docs
 3  README has every command; its help blocks are real    test_docs
 4  ``--json``: one document, also with -v and warnings   test_cli_pipeline, test_cli_cache, test_cli_admin
 5  ``--json`` on failure                                 test_cli_pipeline and test_cli_cache (each mistake)
 6  ``2>/dev/null`` leaves the result                     test_cli_pipeline (the pipe); ``>/dev/null``: here
 7  exit codes of README and classes                      test_docs
 8  the nearest name is suggested                         test_cli_pipeline, test_cli_cache; command: here
 9  hint for a bare ``org/name``                          test_cli_cache, test_models_grammar
10  all mistakes of a configuration at once               test_cli_pipeline, test_config
11  flag > --set > file > default; printed, fed back      test_cli_pipeline, test_config; cache-teachers: here
12  --dry-run                                             test_cli_cache
13  kill -9, rerun, equal bytes                           test_cli_cache, test_cache_store, test_training_run
14  SIGTERM, SIGUSR1: 75, and on                          test_cli_cache, test_cli_pipeline, test_examples
15  eight writers lose nothing                            test_cache_store, test_cli_cache; code 23: not yet
16  shards in any order; never implied                    test_cli_cache, test_runtime; from the shell: here
17  what changes an identity and what does not            test_cache_store, test_cli_cache, test_training_plan
18  a flipped byte is never read silently                 test_cache_conformance, test_cache_verify; here
19  ``cache ls``, ``gc``, ``rm``                          test_cli_cache_admin, test_cache_inventory
20  a log has no \\r, no ESC, and a progress line          here
21  without a network                                     all tests run so; a model that is missing: here
22  rerun: same, changed (24), --overwrite                test_cli_pipeline, test_training_run
23  the export is a timm model, safetensors               test_cli_pipeline, test_models_export
24  same seed, same result.json                           here
25  torchrun; doctor without a GPU                        test_cli_admin; cache-teachers by torchrun: here;
                                                          train-student refuses several ranks for now
==  ====================================================  ==========================================================
"""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import test_cli_pipeline as pipeline
import yaml
from conftest import Shell
from training_place import Place

from kdcli import console as console_module
from kdcli.console import Console

Kd = Callable[..., Shell]
TRAIN = pipeline.TRAIN
LABELS = ("train-student", "images", "--method", "labels-only", *TRAIN)

place, environment, kd = pipeline.place, pipeline.environment, pipeline.kd


def python(code: str, *arguments: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a line of Python in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, env={**os.environ, **variables},
    )  # fmt: skip


def module(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kdcli", *map(str, arguments)]


# --- 1: a start without weight ----------------------------------------------------------------

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "zarr",
    "h5py",
    "sklearn",
    "scipy",
    "rich",
    "PIL",
    "yaml",
)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train-student", "--help"], ["cache", "info", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = python(
        "import sys\nfrom kdcli.cli.app import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as leaving: assert not leaving.code\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])",
        *arguments,
    )
    assert done.stdout.splitlines()[-1] == "loaded: []", done.stdout + done.stderr


def test_help_takes_less_than_half_a_second_of_processor() -> None:
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(module("--help"), check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 0.5


# --- 4, 6: streams ----------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_141_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            module("--help"), stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_reader_that_takes_one_line_gets_it_quietly() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -1; exit "${PIPESTATUS[0]}"', "bash", *module("methods", "--quiet")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 141)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_closed_streams_are_no_crash() -> None:
    for streams in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(
            ["bash", "-c", f'"$@" {streams}', "bash", *module("--help")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), streams


def test_stdout_to_nowhere_loses_no_data(kd: Kd, place: Place) -> None:
    done = kd(*LABELS, "--out", "unheard", "--test", "held-out")
    assert done.code == 0, done.err
    result = json.loads((place.root / "unheard/result.json").read_text())
    assert f"{result['test']['top1']:.4f}" in done.out
    assert "epoch" in done.err
    assert "epoch" not in done.out.splitlines()[-1]


# --- 8: suggestions ---------------------------------------------------------------------------


def test_a_mistyped_command_gets_the_nearest_one(kd: Kd) -> None:
    for typed, meant in (
        ("cache-teacher", "cache-teachers"),
        ("train-studnet", "train-student"),
        ("docter", "doctor"),
    ):
        kd(typed).refused(2, typed, meant)


# --- 11: configurations -----------------------------------------------------------------------


def test_a_printed_configuration_of_cache_teachers_gives_itself(kd: Kd, tmp_path: Path) -> None:
    printed = kd(
        "cache-teachers", "images@n=9", "--cache", "other.kd", "--teacher", "a=resnet50", "--teacher", "b=test_resnet",
        "--views", "eval+train:3", "--temperatures", "1,3", "--no-wait", "--keep", "logits", "--print-config",
    )  # fmt: skip
    assert printed.code == 0, printed.err
    assert yaml.safe_load(printed.out)["wait"] is False
    (tmp_path / "again.yaml").write_text(printed.out)
    again = kd("cache-teachers", "--config", tmp_path / "again.yaml", "--print-config")
    assert (again.code, again.out) == (0, printed.out)


@pytest.mark.parametrize("typed", ["", "rank"])
def test_the_shell_completes_commands(typed: str) -> None:
    done = subprocess.run(
        module(), capture_output=True, text=True, check=False,
        env={**os.environ, "_KD_COMPLETE": "complete_bash", "COMP_WORDS": f"kd {typed}", "COMP_CWORD": "1"},
    )  # fmt: skip
    offered = done.stdout.split()
    assert "rank-sources" in offered, done.stdout + done.stderr
    assert ("doctor" in offered) == (not typed)


# --- 16: shards -------------------------------------------------------------------------------


def test_slurms_variables_alone_do_not_shard(place: Place) -> None:
    command = module(
        "cache-teachers", "images", "--cache", "n.kd", "--teacher", f"a={place.specs['gen']}", "--dry-run"
    )
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    done = subprocess.run(
        [*command, "--json"], cwd=place.root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["teachers"]["a"]["tasks"]["total"] == 1


# --- 18: damage -------------------------------------------------------------------------------


def test_a_flipped_byte_is_met_before_anything_is_learnt_from_it(kd: Kd, place: Place) -> None:
    shutil.copytree(place.cache, place.root / "flipped.kd")
    for array in ("logits", "features"):
        chunk = next((place.root / f"flipped.kd/data.zarr/teachers/gen/{array}").glob("c*0"))
        data = bytearray(chunk.read_bytes())
        data[len(data) // 3] ^= 1
        chunk.write_bytes(data)
    options = ("--cache", "flipped.kd", "--json")
    for command in (
        ("rank-sources",),
        ("train-student", "images", "--method", "distill-equal", *TRAIN, "--out", "misled"),
        ("eval-probe", "images", "--test", "images", "--teacher", "gen", "--draws", 2),
    ):
        done = kd(*command, *options)
        done.refused(22, "flipped.kd", "gen")
        assert done.json["error"]["code"] == 22
    assert not (place.root / "misled").exists()


# --- 20: logs ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_log_has_progress_lines_and_no_control_characters(
    place: Place, environment: dict[str, str]
) -> None:
    code = (
        "import sys, kdcli.console as console\nfrom kdcli.cli.app import main\n"
        "console.PLAIN_SECONDS = 0.001\nmain(sys.argv[1:])"
    )
    forced = {**environment, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "TERM": "xterm-256color"}
    log = place.root / "job.log"
    for command in (
        ("cache-teachers", "images", "--cache", "log.kd", "--teacher", place.specs["gen"], "--batch-size", 4,
         "--workers", 0),
        (*LABELS, "--out", "logged"),
    ):  # fmt: skip
        with log.open("wb") as stream:
            done = subprocess.run(
                [sys.executable, "-c", code, *map(str, command)],
                cwd=place.root, env=forced, stderr=stream, stdout=subprocess.PIPE, check=False,
            )  # fmt: skip
        text = log.read_bytes()
        assert done.returncode == 0, text
        assert b"\r" not in text + done.stdout
        assert b"\x1b" not in text + done.stdout
        assert re.search(rb"^.+: \d+/\d+ \w+, [\d.]+ \w+/s, \S+ left", text, re.MULTILINE), text


def test_progress_lines_come_at_the_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert console_module.PLAIN_SECONDS <= 30
    with Console().progress(1000, "images", "gen") as bar:
        for _ in range(100):
            now += 1
            bar.advance(10, loss="0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "gen: 300/1000 images, 10.0 images/s, 1m10s left, loss 0.5"


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_respected_on_a_terminal(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().progress(10, "images", "gen") as bar:
        for _ in range(10):
            bar.advance(1)
    colours = re.findall(r"\x1b\[[\d;]*(?<!\d)[349]\d[;m\d]*", terminal.getvalue())
    assert bool(colours) == (not no_color)


# --- 21: no network ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"])
def test_a_model_that_is_not_here_is_said_at_once(kd: Kd, tmp_path: Path, spec: str) -> None:
    start = time.monotonic()
    for command in (
        ("cache-teachers", "images", "--cache", "offline.kd", "--teacher", f"far={spec}"),
        ("eval-probe", "images", "--test", "images", "--model", spec),
    ):
        done = kd(*command, "--json")
        done.refused(11, spec)
        assert "local-dir:" in done.json["error"]["hint"]
    assert time.monotonic() - start < 10


# --- 24: the same again -----------------------------------------------------------------------


def test_two_runs_of_one_seed_give_one_result(kd: Kd, place: Place) -> None:
    def timeless(value: object) -> object:
        if isinstance(value, dict):
            return {
                key: timeless(entry)
                for key, entry in value.items()
                if "seconds" not in key and "per_second" not in key and key != "out"
            }
        return [timeless(entry) for entry in value] if isinstance(value, list) else value

    results = []
    for out in ("first", "second"):
        done = kd(*LABELS, "--out", out, "--test", "held-out", "--seed", 5)
        assert done.code == 0, done.err
        results.append(json.loads((place.root / out / "result.json").read_text()))
    assert timeless(results[0]) == timeless(results[1])
    assert results[0]["history"][0]["loss"] > 0
    assert {"kd", "torch", "timm"} <= set(results[0]["versions"])
    weights = [(place.root / out / "export/model.safetensors").read_bytes() for out in ("first", "second")]
    assert weights[0] == weights[1]


# --- 25: several processes --------------------------------------------------------------------


def test_only_the_first_rank_prints_a_document() -> None:
    for rank, documents in (("0", 1), ("1", 0)):
        done = subprocess.run(
            module("docter", "--json"), capture_output=True, text=True, check=False,
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"},
        )  # fmt: skip
        assert done.stdout.count("\n") == documents


@pytest.mark.slow
def test_torchrun_shares_a_cache_and_prints_one_document(place: Place, environment: dict[str, str]) -> None:
    def torchrun(*arguments: object) -> "subprocess.CompletedProcess[str]":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdcli"]
        return subprocess.run(
            [sys.executable, *launch, *map(str, arguments)],
            cwd=place.root, env=environment, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip

    base = ("cache-teachers", "images", "--teacher", f"gen={place.specs['gen']}", "--workers", 0, "--json")
    done = torchrun(*base, "--cache", "ranks.kd")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["teachers"]["gen"]["tasks"]["done"] == 1
    failed = torchrun(*base, "--cache", "ranks.kd", "--dtype", "float32")
    assert failed.returncode != 0
    assert json.loads(failed.stdout)["error"]["code"] == 21


def test_training_by_several_ranks_is_refused_rather_than_written_over_each_other() -> None:
    done = subprocess.run(
        module(
            "train-student",
            "sklearn/digits",
            "--student",
            "resnet10t",
            "--method",
            "labels-only",
            "--out",
            "o",
        ),
        env={**os.environ, "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    Shell(done.returncode, done.stdout, done.stderr).refused(2, "WORLD_SIZE is 2")


def test_an_error_that_nobody_reads_keeps_its_code_and_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kdcli", "rank-sources", "--json"],
            stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
