"""``kd rank-sources``, ``train-student`` and ``eval-probe`` as a stranger uses them from the shell.

A start of ``kd`` that loads torch takes seconds, so most commands here are forks of one process that has its
imports behind it: each has its own streams, working folder and exit code, and runs what the shell would run.
Pipes and signals are tried with ``kd`` as the shell starts it.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from conftest import Shell, make_folder
from training_place import STUDENT, Place, make_place

Kd = Callable[..., Shell]

WARM = """
import json, os, sys
import torch._dynamo, sklearn.svm, timm
import kdcli.extract, kdcli.probing.features, kdcli.probing.probe, kdcli.ranking, kdcli.training.train
from kdcli.cli.app import main

for line in sys.stdin:
    job = json.loads(line)
    if not (child := os.fork()):
        os.chdir(job["cwd"])
        for number, path in enumerate(job["streams"]):
            os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
        sys.stdin = open(0)
        try:
            main(job["arguments"])
        except SystemExit as leaving:
            sys.stdout.flush()
            os._exit(leaving.code)  # taking down what is imported would cost more than the command
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

TRAIN = ("--student", STUDENT, "--image-size", 32, "--batch-size", 8, "--workers", 0, "--epochs", 1)
"""A run of a second: three steps."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """``images`` (3 x 8) and ``held-out`` with keys of the same names, cached teachers gen and exp."""
    return make_place(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def environment(place: Place) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(place.root / ".cache")}


@pytest.fixture(scope="module")
def kd(place: Place, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kd]:
    """Run ``kd`` in the place's folder."""
    streams = [tmp_path_factory.mktemp("streams") / name for name in ("in", "out", "err")]
    server = subprocess.Popen(
        [sys.executable, "-c", WARM],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip

    def run(*arguments: object, stdin: str = "", cwd: Path = place.root) -> Shell:
        for path, text in zip(streams, (stdin, "", ""), strict=True):
            path.write_text(text)
        job = {"arguments": list(map(str, arguments)), "cwd": str(cwd), "streams": list(map(str, streams))}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Shell(code, streams[1].read_text(), streams[2].read_text())

    with server:
        yield run
        server.terminate()


@pytest.fixture(scope="module")
def shell(place: Place, environment: dict[str, str]) -> Callable[[str], Shell]:
    """Run a line of shell in the place's folder, with ``kd`` as a function of it."""

    def run(line: str) -> Shell:
        script = f'kd() {{ {shlex.quote(sys.executable)} -m kdcli "$@"; }}\n{line}'
        done = subprocess.run(
            ["sh", "-c", script], cwd=place.root, env=environment, capture_output=True, text=True, check=False
        )
        return Shell(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="module")
def ranking(kd: Kd) -> str:
    """What ``kd rank-sources --json`` prints."""
    done = kd("rank-sources", "--cache", "c.kd", "--json")
    assert (done.code, done.err) == (0, "")
    return done.out


PIPED = (
    "images", "--cache", "c.kd", "--ranking", "-", "--method", "distill-weighted", *TRAIN, "--test", "held-out",
    "--out", "piped",
)  # fmt: skip


@pytest.fixture(scope="module")
def piped(place: Place, shell: Callable[[str], Shell]) -> Shell:
    """The documented pipe, told to be talkative and then hushed by the shell."""
    train = shlex.join(map(str, PIPED))
    return shell(f"(kd rank-sources -v --cache c.kd --json | kd train-student -v {train} --json) 2>/dev/null")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# --- what the commands print ------------------------------------------------------------------


def test_the_pipe_leaves_one_document_and_nothing_else(place: Place, piped: Shell, ranking: str) -> None:
    assert (piped.code, piped.err) == (0, "")
    assert piped.out.count("\n") == 1
    result = piped.json
    promised = ["method", "out", "epochs", "test", "history", "cache_id", "seconds"]
    assert list(result)[: len(promised)] == promised
    assert (result["method"], result["epochs"]) == ("distill-weighted", 1)
    assert result["out"] == str(place.root / "piped")
    assert result["cache_id"] == json.loads(ranking)["cache_id"]
    assert list(result["test"]) == ["top1", "top5"]
    assert 0 <= result["test"]["top1"] <= result["test"]["top5"] <= 1
    assert result["seconds"] > 0
    assert {"epoch", "loss", "label", "distill", "lr", "view"} <= set(result["history"][0])
    assert result["weights"] == {s["name"]: s["weight"] for s in json.loads(ranking)["sources"]}
    assert json.loads((place.root / "piped/result.json").read_text()) == result
    lines = (place.root / "piped/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["history"]


def test_a_ranking_by_other_labels_names_the_command_that_makes_the_right_one(
    kd: Kd, place: Place, shell: Callable[[str], Shell], ranking: str
) -> None:
    (place.root / "all.json").write_text(ranking)
    train = (
        "train-student", "images@labelled=0.5", "--cache", "c.kd", "--ranking", "all.json", "--method",
        "distill-weighted", *TRAIN, "--out", "budget",
    )  # fmt: skip
    refusal = kd(*train)
    refusal.refused(21, "12 of the 24 images", "kd rank-sources --cache c.kd --data images@labelled=0.5")
    assert not (place.root / "budget").exists()
    assert shell(refusal.err.partition("hint: ")[2]).code == 0
    assert kd(*train).code == 0


@pytest.mark.parametrize(
    "options", [(), ("--metric", "cka", "--on", "pseudo", "--probe-size", 6, "--seed", 3)]
)
def test_rank_sources_prints_the_promised_document(kd: Kd, options: tuple[object, ...]) -> None:
    done = kd("rank-sources", "--cache", "c.kd", "--json", "-v", *options)
    assert done.code == 0, done.err
    document = done.json
    assert list(document) == ["cache_id", "metric", "on", "probe", "sources", "created"]
    assert document["created"]["command"].startswith("kd rank-sources --cache c.kd")
    assert (document["metric"], document["on"]) == (("cka", "pseudo") if options else ("parc", "features"))
    assert document["probe"].pop("images")
    assert document["probe"] == ({"size": 6, "seed": 3} if options else {"size": 24, "seed": 0})
    sources = document["sources"]
    assert {source["name"] for source in sources} == {"gen", "exp"}
    assert all(list(source) == ["name", "id", "score", "weight"] for source in sources)
    assert all(-1 <= source["score"] <= 1 and len(source["id"]) == 64 for source in sources)
    assert sources[0]["score"] >= sources[1]["score"]
    assert sum(source["weight"] for source in sources) == pytest.approx(1)


def test_eval_probe_prints_the_promised_document_also_with_warnings(
    kd: Kd, place: Place, piped: Shell
) -> None:
    model = "local-dir:piped/export"
    from_cache = kd(
        "eval-probe", "images", "--test", "images", "--cache", "c.kd", "--teacher", "gen", "--draws", 3, "--shots",
        50, "--json", "-v",
    )  # fmt: skip
    from_model = kd(
        "eval-probe", "images", "--test", "held-out", "--model", model, "--draws", 3, "--workers", 0, "--json"
    )
    assert "DATA and --test are the same set" in from_cache.err
    assert from_cache.err.count("fewer than 50 images") == 1
    for done, name, shots in (
        (from_cache, "gen", 50),
        (from_model, f"local-dir:{place.root}/piped/export", 5),
    ):
        assert done.code == 0, done.err
        document = done.json
        assert list(document)[:5] == ["representation", "accuracy", "draws", "shots", "classes"]
        assert list(document["accuracy"]) == ["mean", "std", "ci95"]
        assert 0 <= document["accuracy"]["mean"] <= 1
        assert (document["representation"], document["draws"]) == (name, 3)
        assert (document["shots"], document["classes"]) == (shots, 3)


def test_without_json_stdout_is_a_table(kd: Kd, piped: Shell, ranking: str) -> None:
    for command in (
        ("rank-sources", "--cache", "c.kd"),
        ("train-student", *PIPED),
        ("eval-probe", "images", "--test", "images", "--cache", "c.kd", "--teacher", "exp", "--draws", 2),
    ):
        done = kd(*command, stdin=ranking)
        assert done.code == 0, done.err
        header, *rows = done.out.splitlines()
        assert header.split()[0] in ("source", "method", "representation")
        assert len(rows) == (2 if command[0] == "rank-sources" else 1)


def test_an_error_before_the_pipe_is_the_error_behind_it(
    kd: Kd, shell: Callable[[str], Shell], place: Place
) -> None:
    train = "train-student images --cache c.kd --ranking - --method distill-weighted --student x --out never"
    done = shell(f"kd rank-sources --cache nowhere.kd --json 2>/dev/null | kd {train} --json")
    done.refused(20, "nowhere.kd")
    assert done.json["error"]["code"] == 20
    document = {"error": {"code": 143, "message": "it broke", "hint": "mend it"}}
    again = kd(*train.split(), "--json", stdin=json.dumps(document))
    again.refused(143, "it broke", "mend it")
    assert again.json == document
    kd(*train.split(), stdin="").refused(12, "the ranking on standard input is empty")
    kd(*train.split(), stdin="source  parc\n").refused(12, "not JSON", "--json")
    assert not (place.root / "never").exists()


# --- methods ----------------------------------------------------------------------------------


def test_methods_that_need_no_ranking_need_none(kd: Kd, place: Place) -> None:
    equal = kd(
        "train-student",
        "images",
        "--cache",
        "c.kd",
        "--method",
        "distill-equal",
        *TRAIN,
        "--out",
        "equal",
        "--json",
    )
    assert equal.code == 0, equal.err
    assert equal.json["weights"] == {"exp": 0.5, "gen": 0.5}
    assert equal.json["test"] is None
    plain = kd("train-student", "images", "--method", "labels-only", *TRAIN, "--out", "plain", "--json", "-q")
    assert (plain.code, plain.err, plain.json["cache_id"]) == (0, "", None)


def test_distill_nearest_learns_from_the_first_source(kd: Kd, ranking: str) -> None:
    done = kd(
        "train-student", "images", "--cache", "c.kd", "--ranking", "-", "--method", "distill-nearest", *TRAIN, "--out",
        "nearest", "--json", stdin=ranking,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["weights"] == {json.loads(ranking)["sources"][0]["name"]: 1.0}


def test_consolidation_freezes_batchnorm_only_where_there_is_something_to_keep(kd: Kd, place: Place) -> None:
    base = (
        "train-student", "images@labels=none", "--cache", "c.kd", "--method", "consolidation", "--generalist", "gen",
        *TRAIN,
    )  # fmt: skip
    for out, options, bn in (
        ("p1", (), "frozen"),
        ("p1-other", ("--student", "test_resnet"), "train"),
        ("p1-kept", ("--student", "test_resnet", "--bn", "frozen"), "frozen"),
        ("p1-exp", ("--student", place.specs["exp"]), "frozen"),
    ):
        done = kd(*base, *options, "--out", out)
        assert done.code == 0, done.err
        assert f"BatchNorm {bn}" in done.err
        assert ("the student starts from random weights: kd's rates" in done.err) == (
            "test_resnet" in options
        )
        assert yaml.safe_load((place.root / out / "config.yaml").read_text())["bn"] == bn
        assert json.loads((place.root / out / "run.json").read_text())["identity"]["bn"] == bn


def test_a_cache_with_the_eval_view_only_warns_and_trains(kd: Kd, place: Place) -> None:
    cached = kd(
        "cache-teachers",
        "images",
        "--cache",
        "eval.kd",
        "--teacher",
        f"gen={place.specs['gen']}",
        "--workers",
        0,
    )
    assert cached.code == 0, cached.err
    train = ("train-student", "images", "--cache", "eval.kd", "--method", "distill-equal", *TRAIN, "--json")
    done = kd(*train, "--teacher-view", "same", "--out", "eval-view", "-v")
    assert done.code == 0, done.err
    assert "warning: the cache has only the eval view" in done.err
    assert "--views eval+train:K" in done.err
    assert done.json["history"][0]["view"] == 0


def test_the_export_is_the_student_in_timm(place: Place, piped: Shell) -> None:
    import timm
    import torch
    from safetensors.torch import load_file

    from kdcli.data.sources import open_data

    out = place.root / "piped"
    network = timm.create_model(f"local-dir:{out}/export", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(network)
    transform, data = timm.data.create_transform(**config, is_training=False), open_data(place.test)
    pixels = [transform(data.image(row)) for row in range(len(data))]
    with torch.inference_mode():
        logits = network(torch.stack(pixels))
        features = network.forward_head(network.forward_features(torch.stack(pixels)), pre_logits=True)
    heads = load_file(out / "heads.safetensors")
    torch.testing.assert_close(logits, features @ heads["label.weight"].T + heads["label.bias"])
    right = (logits.argmax(1).numpy() == data.labels).mean()
    assert right == pytest.approx(piped.json["test"]["top1"])


# --- running again ----------------------------------------------------------------------------


def test_a_finished_run_is_returned_and_another_configuration_refused(
    kd: Kd, place: Place, piped: Shell, ranking: str
) -> None:
    before = contents(place.root / "piped")
    again = kd("train-student", *PIPED, "--json", stdin=ranking)
    assert again.code == 0, again.err
    assert again.json == piped.json
    assert "nothing to do" in again.err
    assert kd("train-student", "--config", "piped/config.yaml", "--json").json == piped.json
    other = kd("train-student", *PIPED, "--json", "--lr", 0.5, "--epochs", 2, stdin=ranking)
    other.refused(24, "lr was 0.001, is 0.5", "epochs was 1, is 2", "--overwrite")
    assert contents(place.root / "piped") == before


def test_overwrite_starts_anew(kd: Kd, place: Place) -> None:
    base = ("train-student", "images", "--method", "labels-only", *TRAIN, "--out", "again", "--json")
    assert kd(*base).json["seed"] == 0
    kd(*base, "--seed", 1).refused(24, "seed was 0, is 1")
    assert kd(*base, "--seed", 1, "--overwrite").json["seed"] == 1
    assert kd(*base, "--seed", 1).json["seed"] == 1
    kd(*base).refused(24, "seed was 1, is 0")


def test_sigterm_saves_and_the_same_command_ends_with_the_same_weights(
    kd: Kd, place: Place, environment: dict[str, str]
) -> None:
    base = [
        "train-student", "images", "--cache", "c.kd", "--method", "distill-equal", *TRAIN[:-1], 40,
    ]  # fmt: skip
    cut = [*map(str, base), "--workers", "1", "--out", "cut", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "kdcli", *cut], cwd=place.root, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        metrics = place.root / "cut/metrics.jsonl"
        while not metrics.is_file() or metrics.read_text().count("\n") < 2:
            assert job.poll() is None
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGTERM)
        out, err = job.communicate(timeout=60)
    stopped = Shell(job.returncode, out, err)
    stopped.refused(75, "everything is saved", "Run the same command again")
    assert stopped.json["error"]["code"] == 75
    assert not (place.root / "cut/result.json").exists()
    again = kd(*cut)
    assert again.code == 0, again.err
    assert "going on from step" in again.err
    whole = kd(*base, "--out", "whole", "--json")
    assert whole.code == 0, whole.err
    for file in ("export/model.safetensors", "heads.safetensors"):
        assert (place.root / "cut" / file).read_bytes() == (place.root / "whole" / file).read_bytes()
    assert len(again.json["history"]) == 40
    assert again.json["history"][-1]["loss"] == whole.json["history"][-1]["loss"]


# --- hints that work --------------------------------------------------------------------------


def follow(kd: Kd, refusal: Shell) -> None:
    """Run the commands of a hint as a user would copy them."""
    found = re.search(r"hint: .*?(kd cache-teachers .*?)(, then .*| \(or .*)?$", refusal.err, re.MULTILINE)
    assert found, refusal.err
    for command in found[1].split(" && "):
        done = kd(*shlex.split(command)[1:], "--workers", 0)
        assert done.code == 0, done.err


@pytest.fixture(scope="module")
def many(place: Place) -> str:
    """40 images: two blocks of a cache."""
    return str(make_folder(place.root / "many images", classes=4, per_class=10))


def half_a_cache(kd: Kd, place: Place, data: str, name: str, *options: object) -> None:
    done = kd(
        "cache-teachers", data, "--cache", name, "--teacher", f"gen={place.specs['gen']}", "--teacher",
        f"exp={place.specs['exp']}", "--block-rows", 32, "--shard", "0/2", "--workers", 0, *options,
    )  # fmt: skip
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    "command",
    [
        ("rank-sources", "--cache", "half.kd"),
        (
            "train-student",
            "many images",
            "--cache",
            "half.kd",
            "--method",
            "distill-equal",
            *TRAIN,
            "--out",
            "half",
        ),
        (
            "train-student",
            "many images",
            "--cache",
            "half.kd",
            "--method",
            "labels-only",
            *TRAIN,
            "--out",
            "half",
        ),
        (
            "eval-probe",
            "many images",
            "--test",
            "many images",
            "--cache",
            "half.kd",
            "--teacher",
            "exp",
            "--draws",
            2,
        ),
    ],
    ids=["rank", "distil", "labels", "probe"],
)
def test_an_incomplete_cache_names_the_command_that_fills_it(
    kd: Kd, place: Place, many: str, command: tuple[object, ...]
) -> None:
    here = place.root / "-".join(map(str, command[:6]))
    here.mkdir()
    (here / "many images").symlink_to(many)
    options = ("--views", "eval+train:1", "--recipe", "glyph", "--dtype", "float32", "--temperatures", "1,3")
    half_a_cache(lambda *words: kd(*words, cwd=here), place, "many images", "half.kd", *options)
    refusal = kd(*command, "--json", cwd=here)
    refusal.refused(20, "8 of 40 rows", "half.kd")
    assert refusal.json["error"]["code"] == 20
    assert not (here / "half").exists()
    follow(lambda *words: kd(*words, cwd=here), refusal)
    done = kd(*command, "--json", cwd=here)
    assert done.code == 0, done.err


def test_an_incomplete_cache_may_be_used_in_part(kd: Kd, place: Place, many: str) -> None:
    half_a_cache(kd, place, many, "part.kd", "--views", "eval+train:1")
    ranked = kd("rank-sources", "--cache", "part.kd", "--allow-partial", "--json")
    assert ranked.json["probe"]["size"] == 32
    assert "warning: 8 of 40" in ranked.err
    train = (
        "train-student",
        many,
        "--cache",
        "part.kd",
        "--method",
        "distill-equal",
        *TRAIN,
        "--out",
        "part",
    )
    assert kd(*train, "--allow-partial", "--json").json["images"] == 32


def test_images_that_are_not_cached_name_the_command_that_caches_them(kd: Kd, place: Place) -> None:
    new = make_folder(place.root / "new", per_class=4)
    for number, path in enumerate(sorted(new.rglob("*.png"))):
        path.rename(path.with_name(f"new {number}.png"))
    some = kd(
        "cache-teachers", "images", "--cache", "odd.kd", "--teacher", f"gen={place.specs['gen']}", "--keep", "features",
        "--dtype", "float32", "--eval-geometry", "shared:0.6", "--views", "eval+train:2", "--recipe", "mild",
        "--workers", 0,
    )  # fmt: skip
    assert some.code == 0, some.err
    probe = (
        "eval-probe",
        "images",
        "--test",
        "new",
        "--cache",
        "odd.kd",
        "--teacher",
        "gen",
        "--draws",
        2,
        "--json",
    )
    refusal = kd(*probe)
    refusal.refused(20, "12 of 12 samples are not in odd.kd", "new 0.png", "then add --cache NEW.kd")
    follow(kd, refusal)
    done = kd(*probe, "--cache", "NEW.kd")
    assert done.code == 0, done.err
    train = kd(
        "train-student", "new", "--cache", "c.kd", "--method", "distill-equal", *TRAIN, "--out", "never"
    )
    train.refused(
        20, "12 of 12 samples are not in c.kd", "--views eval+train:2 --recipe mild", "gen=", "exp="
    )
    ranked = kd("rank-sources", "--data", "new", "--cache", "c.kd")
    ranked.refused(20, "12 of 12 samples are not in c.kd")


def test_outputs_that_were_not_kept_name_the_command_that_adds_them(kd: Kd, place: Place) -> None:
    for kind in ("logits", "features"):
        done = kd(
            "cache-teachers", "images", "--cache", f"{kind}.kd", "--teacher", f"gen={place.specs['gen']}",
            "--keep", kind, "--views", "eval+train:2", "--recipe", "mild", "--eval-geometry", "shared:0.7",
            "--workers", 0,
        )  # fmt: skip
        assert done.code == 0, done.err
    rank = ("rank-sources", "--cache", "logits.kd")
    probe = ("eval-probe", "images", "--test", "images", "--cache", "logits.kd", "--draws", 2)
    probing = kd(*probe, "--teacher", "gen")
    probing.refused(20, "the features of 'gen' are needed", "keeps only its logits", "kd cache-teachers")
    refusal = kd(*rank)
    refusal.refused(20, "the features of 'gen' are needed", "kd cache-teachers")
    follow(kd, refusal)
    assert kd(*rank).code == 0
    assert kd(*probe, "--teacher", "gen").code == 0

    train = ("train-student", "images", "--cache", "features.kd", *TRAIN, "--out", "logits")
    refusal = kd(*train, "--method", "distill-equal")
    refusal.refused(20, "the logits of 'gen' are needed")
    kd(*train, "--method", "consolidation", "--generalist", "gen").refused(20, "the logits of 'gen'")
    follow(kd, refusal)
    done = kd(*train, "--method", "distill-equal", "--json")
    assert done.code == 0, done.err
    assert done.json["weights"] == {"gen": 1.0}


def test_a_method_without_its_ranking_names_the_pipe_that_gives_one(
    kd: Kd, shell: Callable[[str], Shell], place: Place
) -> None:
    refusal = kd(
        "train-student",
        "images",
        "--cache",
        "c.kd",
        "--method",
        "distill-weighted",
        *TRAIN,
        "--out",
        "hinted",
    )
    refusal.refused(2, "distill-weighted needs --ranking")
    done = shell(refusal.err.partition("hint: ")[2])
    assert done.code == 0, done.err
    assert (place.root / "hinted/result.json").is_file()


# --- mistakes ---------------------------------------------------------------------------------

COMMANDS: dict[str, dict[str, str]] = {
    "rank-sources": {"--cache": "c.kd"},
    "train-student": {
        "DATA": "images", "--student": STUDENT, "--method": "labels-only", "--cache": "c.kd", "--out": "never",
    },
    "eval-probe": {"DATA": "images", "--test": "images", "--cache": "c.kd", "--teacher": "gen"},
}  # fmt: skip
"""Of each command a call that works."""

MISTAKES: list[tuple[str, dict[str, str | None], int, tuple[str, ...]]] = [
    # unknown values, with the nearest known one
    ("rank-sources", {"--metric": "park"}, 2, ("--metric park", "Did you mean 'parc'?")),
    ("rank-sources", {"--on": "pseud"}, 2, ("Did you mean 'pseudo'?",)),
    ("rank-sources", {"--metrc": "parc"}, 2, ("--metrc", "--metric")),
    ("rank-sources", {"--teacher": "genn"}, 11, ("Did you mean 'gen'?", "exp, gen")),
    ("rank-sources", {"--exclude": "genn"}, 11, ("Did you mean 'gen'?",)),
    ("train-student", {"--method": "consolidaton"}, 2, ("Did you mean 'consolidation'?",)),
    ("train-student", {"--student": "test_efficientnt"}, 11, ("Did you mean 'test_efficientnet'?",)),
    ("train-student", {"--student": "local-dir:nowhere"}, 11, ("nowhere",)),
    ("train-student", {"--model-arg": "drop_path_rat=0.2"}, 2, ("no such argument", "Did you mean 'drop_path_rate'?")),
    ("train-student", {"--model-arg": "num_classes=2"}, 2, ("num_classes is for kd to decide", "those of the data")),
    ("train-student", {"--model-arg": "pretrained_cfg=x"}, 2, ("is for kd to decide",)),
    ("train-student", {"--model-arg": "drop_path_rate=7"}, 2, ("drop_path_rate=7", "share")),
    ("train-student", {"--eval-geometry": "shared"}, 2, ("shared:CROP",)),
    ("train-student", {"--init": "randm"}, 2, ("--init randm", "Did you mean 'random'?")),
    ("train-student", {"--init": "test_resnet"}, 2, ("--init test_resnet", "architecture")),
    ("train-student", {"--optimizer": "adamv"}, 2, ("unknown optimizer 'adamv'", "Did you mean 'adam")),
    ("train-student", {"--schedule": "cosin"}, 2, ("Did you mean 'cosine'?",)),
    ("train-student", {"--bn": "frozn"}, 2, ("Did you mean 'frozen'?",)),
    ("train-student", {"--recipe": "imagenet", "--teacher-view": "same"}, 2, ("the cached views are of recipe mild",)),
    ("train-student", {"--recipe": "midl", "--cache": None}, 2, ("Did you mean 'mild'?",)),
    ("train-student", {"--device": "cuda:9"}, 30, ("cuda:9", "--device")),
    ("train-student", {"--test": "sklearn/digts"}, 11, ("Did you mean 'sklearn/digits'?",)),
    ("train-student", {"DATA": "images@clases=a"}, 2, ("Did you mean 'classes'?",)),
    ("train-student", {"--method": "distill-equal", "--teacher": "expp"}, 11, ("Did you mean 'exp'?",)),
    ("train-student", {"--method": "consolidation", "--generalist": "genn"}, 11, ("Did you mean 'gen'?",)),
    ("eval-probe", {"--teacher": "genn"}, 11, ("Did you mean 'gen'?",)),
    ("eval-probe", {"--cache": None, "--teacher": None, "--model": "resnet51"}, 11, ("Did you mean 'resnet5",)),
    # numbers out of range
    ("rank-sources", {"--probe-size": "1"}, 2, ("--probe-size 1",)),
    ("rank-sources", {"--power": "-1"}, 2, ("--power -1",)),
    ("rank-sources", {"--seed": "1.5"}, 2, ("--seed",)),
    ("train-student", {"--batch-size": "0", "--epochs": "0"}, 2, ("--batch-size 0", "--epochs 0")),
    ("train-student", {"--batch-size": "1"}, 2, ("a step has 1", "--bn frozen")),
    ("train-student", {"--lr": "fast"}, 2, ("--lr",)),
    ("eval-probe", {"--batch-size": "0"}, 2, ("--batch-size 0",)),
    ("eval-probe", {"--shots": "0", "--draws": "0"}, 2, ("--shots 0", "--draws 0", "or all")),
    # what is missing, and what does not go together
    ("rank-sources", {"--cache": None}, 2, ("--cache is missing",)),
    ("train-student", {"--out": None, "--student": None}, 2, ("--out is missing", "--student is missing")),
    ("train-student", {"--method": "distill-weighted"}, 2, ("needs --ranking", "kd rank-sources --cache c.kd")),
    ("train-student", {"--method": "distill-nearest"}, 2, ("needs --ranking", "--method distill-nearest")),
    ("train-student", {"--method": "distill-equal", "--cache": None}, 2, ("--cache", "kd cache-teachers images")),
    ("train-student", {"--method": "consolidation"}, 2, ("--generalist NAME", "exp, gen")),
    ("train-student", {"--ranking": "ranking.jsn"}, 11, ("ranking.jsn", "--cache c.kd --data images --json >")),
    ("train-student", {"--ranking": "images"}, 11, ("--ranking images is a folder",)),
    ("eval-probe", {"--cache": None, "--teacher": None}, 2, ("either --model or --cache",)),
    ("eval-probe", {"--teacher": None, "--model": STUDENT}, 2, ("--teacher NAME",)),
    ("eval-probe", {"--folds": "6"}, 2, ("--folds 6", "more than 5 images", "--folds 5 or fewer")),
    ("eval-probe", {"--baseline": "gem"}, 11, ("--baseline gem", "Did you mean 'gen'?")),
    ("eval-probe", {"--related": "imags"}, 2, ("--related imags", "Did you mean 'images'?")),
    ("eval-probe", {"--protocol": "svn"}, 2, ("--protocol svn", "Did you mean 'svm'?")),
    ("eval-probe", {"--protocol": "fine-tune"}, 2, ("no folder", "--out DIR")),
    ("eval-probe", {"DATA": None, "--head": "gen"}, 11, ("kept no head 'gen'", "--head label")),
    ("eval-probe", {"--head": "label"}, 2, ("trains nothing", "Leave DATA out")),
    ("eval-probe", {"DATA": None}, 2, ("DATA is missing",)),
    ("eval-probe", {"--c-grid": "0.1,-1"}, 2, ("--c-grid 0.1,-1", "must be values of C")),
    ("eval-probe", {"DATA": "a=images"}, 2, ("--test 'images' has no name",)),
    ("eval-probe", {"--teacher": None}, 2, ("--teacher NAME",)),
    ("eval-probe", {"--cache": None}, 2, ("--cache PATH",)),
    # caches and data that do not fit
    ("rank-sources", {"--cache": "nowhere.kd"}, 20, ("nowhere.kd does not exist", "kd cache-teachers")),
    ("train-student", {"--cache": "nowhere.kd"}, 20, ("nowhere.kd does not exist",)),
    ("eval-probe", {"--cache": "nowhere.kd"}, 20, ("nowhere.kd does not exist",)),
    ("rank-sources", {"--cache": "images"}, 20, ("not a kd cache",)),
    ("rank-sources", {"--cache": "a-file"}, 32, ("a-file is a file",)),
    ("rank-sources", {"--data": "held-out"}, 21, ("images changed since they were cached",)),
    ("train-student", {"DATA": "held-out"}, 21, ("images changed since they were cached", "bytes was")),
    ("eval-probe", {"--test": "held-out"}, 21, ("images changed since they were cached",)),
    ("train-student", {"DATA": "sklearn/digits@n=30"}, 20, ("30 of 30 samples are not in c.kd",)),
    ("eval-probe", {"--test": "sklearn/digits@n=30"}, 12, ("class '0' (and 9 more) of --test",)),
    ("eval-probe", {"DATA": "sklearn/digits@n=30", "--test": "sklearn/digits@n=30"}, 20, ("30 of 30 samples are not",)),
    ("train-student", {"DATA": "nowhere"}, 11, ("nowhere",)),
    ("train-student", {"DATA": "empty", "--cache": None}, 12, ("no images in",)),
    ("train-student", {"DATA": "broken", "--cache": None, "--workers": "0"}, 12, ("class0/000.png",)),
    ("train-student", {"DATA": "images@labels=none"}, 12, ("no labels", "kd methods")),
    ("train-student", {"--test": "images@labels=none"}, 12, ("--test images@labels=none has no labels",)),
    ("rank-sources", {"--data": "images@labels=none"}, 12, ("no labels",)),
    ("eval-probe", {"DATA": "images@labels=none"}, 12, ("images@labels=none has no labels",)),
    ("rank-sources", {"--data": "images@classes=class1"}, 12, ("one class, 'class1'",)),
    ("train-student", {"DATA": "images@classes=class1"}, 12, ("one class only ('class1')",)),
    ("eval-probe", {"DATA": "images@classes=class1", "--test": "images@classes=class1"}, 12, ("one class",)),
    ("rank-sources", {"--data": "images@shots=1"}, 12, ("class 'class0' has 1 image",)),
    ("eval-probe", {"DATA": "images@shots=1"}, 12, ("class 'class0' has 1 image",)),
    ("train-student", {"DATA": "images@classes=except:class2", "--test": "images"}, 12, ("class 'class2' of --test",)),
    ("eval-probe", {"DATA": "images@classes=except:class2"}, 12, ("class 'class2' of --test",)),
    # places to write
    ("train-student", {"--out": "a-file"}, 32, ("--out a-file is a file",)),
    ("train-student", {"--out": "a-file/below"}, 32, ("a-file is a file",)),
    ("train-student", {"--out": "images"}, 24, ("not empty and holds no kd run",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def obstacles(place: Place) -> None:
    (place.root / "a-file").write_text("x")
    (place.root / "empty").mkdir()
    broken = make_folder(place.root / "broken", classes=2, per_class=2)
    (broken / "class0/000.png").write_bytes((broken / "class0/001.png").read_bytes()[:60])


@pytest.mark.usefixtures("obstacles")
@pytest.mark.parametrize(("command", "change", "code", "words"), MISTAKES)
def test_a_mistake_gets_one_line_what_and_one_line_what_to_do(
    kd: Kd, place: Place, command: str, change: dict[str, str | None], code: int, words: tuple[str, ...]
) -> None:
    options = {**COMMANDS[command], **change}
    data = options.pop("DATA", None)
    flags = [word for name, value in options.items() if value is not None for word in (name, value)]
    done = kd(command, *([data] if data else []), *flags, "--json", "-v")
    done.refused(code, *words)
    assert done.json["error"]["code"] == code
    assert not (place.root / "never/result.json").exists()
    assert not (place.root / "never/export").exists()
    if (place.root / "never").exists():  # begun, and refused when the broken image was met
        assert "broken" in done.err
        shutil.rmtree(place.root / "never")


def test_a_ranking_of_other_teachers_is_refused(kd: Kd, place: Place, ranking: str) -> None:
    document = json.loads(ranking)
    base = (
        "train-student",
        "images",
        "--cache",
        "c.kd",
        "--ranking",
        "-",
        *TRAIN,
        "--out",
        "never",
        "--json",
    )
    document["sources"][0]["id"] = "0" * 64
    for method in ("distill-weighted", "distill-nearest", "distill-equal"):
        done = kd(*base, "--method", method, stdin=json.dumps(document))
        done.refused(
            21,
            "the ranking is of other teachers",
            "0" * 64,
            "kd rank-sources --cache c.kd --data images --json",
        )
        (difference,) = done.json["error"]["differences"]
        assert difference["old"] == "0" * 64
    document["sources"][0] |= {"name": "stranger"}
    done = kd(*base, "--method", "distill-weighted", stdin=json.dumps(document))
    done.refused(21, "source 'stranger'", "not in this cache")
    document["sources"][0]["weight"] = 5
    kd(*base, "--method", "distill-weighted", stdin=json.dumps(document)).refused(
        12, "weight", "less than or equal to 1"
    )
    assert not (place.root / "never").exists()


def test_a_folder_of_other_things_stays_as_it_is(kd: Kd, place: Place) -> None:
    out = place.root / "mine"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for more in ((), ("--overwrite",)):
        done = kd("train-student", "images", "--method", "labels-only", *TRAIN, "--out", "mine", *more)
        done.refused(24, "holds no kd run")
    assert list(contents(out)) == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(kd: Kd, place: Place) -> None:
    (place.root / "locked").mkdir(mode=0o500)
    base = ("train-student", "images", "--method", "labels-only", *TRAIN)
    kd(*base, "--out", "locked/run").refused(32, "no permission")


# --- configuration files ----------------------------------------------------------------------


def test_flags_win_over_set_over_file(kd: Kd, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train-student:\n  lr: 0.1\n  epochs: 7\n  seed: 3\nrank-sources:\n  metric: cka\n")
    base = ("--config", file, "images", "--student", STUDENT, "--method", "labels-only", "--out", "o")
    printed = kd(
        "train-student", *base, "--set", "epochs=8", "--set", "lr=0.2", "--lr", 0.3, "--print-config", "--all"
    )
    assert printed.code == 0, printed.err
    resolved = yaml.safe_load(printed.out)
    assert (resolved["lr"], resolved["epochs"], resolved["seed"], resolved["data_seed"]) == (0.3, 8, 3, 0)
    assert kd("rank-sources", "--config", file, "--cache", "c.kd", "--json").json["metric"] == "cka"


@pytest.mark.parametrize(
    "command",
    [
        (
            "rank-sources",
            "--cache",
            "c.kd",
            "--power",
            "inf",
            "--exclude",
            "exp",
            "--data",
            "images@n=9,seed=2",
        ),
        (
            "train-student",
            "images",
            "--method",
            "labels-only",
            "--student",
            "ä",
            "--out",
            "o",
            "--amp",
            "off",
        ),
        ("eval-probe", "images", "--test", "no", "--cache", "c.kd", "--teacher", "null", "--seed", 4),
    ],
)
def test_a_printed_configuration_gives_itself(kd: Kd, tmp_path: Path, command: tuple[object, ...]) -> None:
    printed = kd(*command, "--print-config")
    assert printed.code == 0, printed.err
    (tmp_path / "again.yaml").write_text(printed.out)
    again = kd(command[0], "--config", tmp_path / "again.yaml", "--print-config")
    assert (again.code, again.out) == (0, printed.out)


def test_everything_wrong_in_a_configuration_is_said_at_once(kd: Kd, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("studnt: x\nepochs: zero\n")
    done = kd("train-student", "images", "--config", file, "--set", "batch_size=0", "--amp", "fp61", "--json")
    done.refused(
        10, "studnt: unknown key. Did you mean 'student'?", "epochs zero", "--set batch_size 0", "--amp fp61",
        "--method is missing", "--out is missing",
    )  # fmt: skip
    assert done.json["error"]["code"] == 10
    kd("rank-sources", "--cache", "c.kd", "--set", "powr=2").refused(10, "Did you mean 'power'?")
    kd("rank-sources", "--cache", "c.kd", "--set", "power").refused(10, "--set power is not KEY=VALUE")
    kd("rank-sources", "--cache", "c.kd", "--config", "nowhere.yaml").refused(11, "nowhere.yaml")
    file.write_text("a: [\n")
    kd("rank-sources", "--cache", "c.kd", "--config", file).refused(10, "not YAML")


# --- sweeps -----------------------------------------------------------------------------------

SWEEP = """
students:
  plain: {method: labels-only}
  ranked: {method: distill-weighted, ranking: '-', seed: 3}
  large: {method: distill-equal, student: test_resnet, image_size: 48}
"""


def test_a_sweep_prints_its_leaderboard_and_each_student_is_a_run(kd: Kd, place: Place, ranking: str) -> None:
    (place.root / "sweep.yaml").write_text(SWEEP)
    common = ("train-student", "images", "--cache", "c.kd", *TRAIN, "--test", "held-out")
    swept = kd(*common, "--sweep", "sweep.yaml", "--out", "swept", stdin=ranking)
    assert swept.code == 0, swept.err
    header, *rows = [line.split() for line in swept.out.splitlines()]
    assert header == ["name", "method", "student", "top1", "top5", "time", "out"]
    assert {row[0] for row in rows} == {"plain", "ranked", "large"}
    assert [row[3] for row in rows] == sorted((row[3] for row in rows), reverse=True)
    own = ("--student", "test_resnet", "--image-size", 48, "--method", "distill-equal", "--json")
    alone = kd(*common, *own, "--out", "swept-alone")
    found = kd(*common, *own, "--out", "swept/large")
    assert "nothing to do" in found.err
    assert found.json["test"] == alone.json["test"]
    for file in ("export/model.safetensors", "heads.safetensors"):
        assert (place.root / "swept/large" / file).read_bytes() == (
            place.root / "swept-alone" / file
        ).read_bytes()
    document = kd(*common, "--sweep", "sweep.yaml", "--out", "swept", "--json", stdin=ranking).json
    assert document == json.loads((place.root / "swept/sweep.json").read_text())
    assert [student["name"] for student in document["students"]] == [row[0] for row in rows]


def test_a_sweep_with_a_diverging_student_prints_the_others_and_exits_40(kd: Kd, place: Place) -> None:
    (place.root / "hot.yaml").write_text("grid: {method: [labels-only], lr: [1e-3, 1e20]}")
    line = (
        "train-student",
        "images",
        *TRAIN,
        "--epochs",
        2,
        "--optimizer",
        "sgd",
        "--sweep",
        "hot.yaml",
        "--out",
        "hot",
    )
    done = kd(*line)
    done.refused(40, "1 of 2 students diverged: 'labels-only-lr1e+20'", "smaller lr")
    rows = [row.split() for row in done.out.splitlines()[1:]]
    assert [(row[0], "diverged" in row) for row in rows] == [
        ("labels-only-lr0.001", False),
        ("labels-only-lr1e+20", True),
    ]
    again = kd(*line, "--json")
    assert again.code == 40
    assert again.out.count("\n") == 1
    assert [student["name"] for student in again.json["students"]] == ["labels-only-lr0.001"]
    assert again.json["error"]["code"] == 40


def test_a_sweep_prints_what_it_resolves_to(kd: Kd, place: Place) -> None:
    (place.root / "printed.yaml").write_text(
        "{common: {method: labels-only, epochs: 2}, grid: {seed: [4, 5]}}"
    )
    done = kd("train-student", "images", *TRAIN, "--sweep", "printed.yaml", "--out", "o", "--print-config")
    assert done.code == 0, done.err
    found = yaml.safe_load(done.out)
    assert {name: (own["seed"], own["epochs"], own["out"]) for name, own in found.items()} == {
        "seed4": (4, 1, "o/seed4"),
        "seed5": (5, 1, "o/seed5"),
    }
    assert not (place.root / "o").exists()
