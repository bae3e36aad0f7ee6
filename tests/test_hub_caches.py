"""Caches on the hub, by its official client against a stand-in: the same bytes back, a card, no secret told."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cache_tools as tools
import pytest
from conftest import Shell
from hub_server import READER, WRITER, Hub, Repo, environment, hub
from random_cache import OUTPUTS, Form, make
from store_servers import Faulty
from test_cache_stores import files_of, same

from kdcli.cache.admin.audit import audit
from kdcli.cache.stores.push import push
from kdcli.cache.writer import CacheWriter
from kdcli.errors import MissingExtraError, UsageError
from kdcli.hub import Address

PUBLIC = tuple(kind for kind in OUTPUTS if kind != "pixels")
"""Images do not go to the hub."""

NAME, URL = "datasets/team/food", "hf://datasets/team/food"
CC = ("--licence", "cc-by-4.0")
_SMALL = """
import sys
import kdcli.hub as hub
hub._COMMIT_FILES, hub._HELD_BYTES = 9, 3000
from kdcli.cli.app import main
print("ready", file=sys.stderr, flush=True)
main(sys.argv[1:])
"""
"""kd that sends and commits a few files at a time."""


class Place:
    """kd in a folder, with the stand-in as its hub; the client reads its settings when it is imported."""

    def __init__(self, folder: Path, state: Hub, proxy: Faulty) -> None:
        self.folder, self.state, self.proxy = folder, state, proxy

    def start(
        self, *words: object, token: str | None = WRITER, small: bool = False
    ) -> "subprocess.Popen[str]":
        code = ["-c", _SMALL] if small else ["-m", "kdcli"]
        return subprocess.Popen(
            [sys.executable, *code, *map(str, words)],
            cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **environment(self.proxy.url, self.folder / "hf", token)},
        )  # fmt: skip

    def kd(self, *words: object, token: str | None = WRITER, small: bool = False) -> Shell:
        process = self.start(*words, token=token, small=small)
        out, err = process.communicate()
        return Shell(process.returncode, out, err)

    def push(self, *more: object, cache: object = "c.kd", **how: Any) -> Shell:
        return self.kd("cache", "push", cache, URL, *CC, *more, **how)

    @property
    def repo(self) -> Repo:
        return self.state.repos[NAME]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Hub, Faulty]]:
    pytest.importorskip("huggingface_hub", reason="extra hub is not installed")
    with hub() as found:
        yield found


@pytest.fixture
def place(served: tuple[Hub, Faulty], tmp_path: Path) -> Iterator[Place]:
    state, proxy = served
    state.repos.clear()
    state.blobs.clear()
    state.sent.clear()
    state.tokens_on_cdn = 0
    proxy.seen.clear()
    yield Place(tmp_path, state, proxy)
    proxy.fault = lambda *_: None


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    tools.fill(tmp_path / "c.kd", ("t", "u"), rows=40)
    return tmp_path / "c.kd"


def sound(done: Shell) -> Shell:
    assert done.code == 0, done.err
    return done


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_there_and_back_is_byte_equal(place: Place, backend: Any) -> None:
    form = Form((33, 20), (1, 2), (("t", PUBLIC), ("u.x-1", ("logits",))), backend, missing=0.3)
    make(place.folder / "c.kd", form)
    told = sound(place.push("--json")).json
    sound(place.kd("cache", "pull", URL, "--to", "d.kd", token=None))
    same(place.folder / "c.kd", place.folder / "d.kd")
    assert told["to"] == URL
    assert len(place.repo.commits) == 2  # the hub's first one, and everything at once
    sent, commits = list(place.state.sent), len(place.repo.commits)
    assert sound(place.push("--json")).json["bytes"] == 0
    assert (place.state.sent, len(place.repo.commits)) == (sent, commits)
    assert place.state.tokens_on_cdn == 0  # large files come from another host, which gets no token


def test_every_commit_is_a_smaller_cache_and_the_manifest_comes_last(place: Place, cache: Path) -> None:
    sound(place.push(small=True))
    trees = [set(tree) for _, tree in place.repo.commits]
    assert len(trees) > 6
    assert [("manifest.json" in tree) for tree in trees] == [False] * (len(trees) - 1) + [True]
    for tree in trees:
        for name in tree:
            if name.startswith("commits/t/logits/"):
                block, group = (int(each) for each in Path(name).stem.split("-"))
                assert f"data.zarr/teachers/t/logits/c.{block}.{group}.0" in tree
    assert trees[1] & {"pushed.json"}  # whose place it is, from the first moment on
    sound(place.kd("cache", "pull", URL, "--to", "d.kd"))
    same(cache, place.folder / "d.kd")


def test_a_folder_of_a_data_set_and_a_revision(place: Place, cache: Path) -> None:
    place.state.repos[NAME] = Repo()
    place.repo.commit({"other/file.txt": b"theirs"})
    sound(place.kd("cache", "push", cache, f"{URL}/deep/er", *CC))
    assert {"other/file.txt", "deep/er/manifest.json", "deep/er/README.md"} <= place.repo.files.keys()
    assert "README.md" not in place.repo.files
    place.repo.tags["v1"] = place.repo.commits[-1][0]
    lost = "deep/er/data.zarr/teachers/u/logits/c.1.0.0"
    place.repo.files.pop(lost)
    place.repo.commits.append(("e" * 40, {k: v for k, v in place.repo.files.items() if k != lost}))
    place.repo.commits[-2][1][lost] = (cache / lost.removeprefix("deep/er/")).read_bytes()
    place.kd("cache", "pull", f"{URL}/deep/er", "--to", "e.kd").refused(22, "recorded, but gone")
    sound(place.kd("cache", "pull", f"{URL}@v1/deep/er", "--to", "d.kd"))
    same(cache, place.folder / "d.kd")


def test_a_part_is_pulled_and_completed(place: Place) -> None:
    make(place.folder / "c.kd", Form((45,), (1, 2), (("t", PUBLIC), ("u", ("logits", "stats")))))
    sound(place.push())
    place.proxy.seen.clear()
    part = ("--teacher", "t", "--keep", "logits", "--views", "eval")
    told = sound(place.kd("cache", "pull", URL, "--to", "d.kd", *part, "--json")).json
    assert set(told["parts"]) == {"samples", "t/logits", "t/stats"}
    asked = [path for _, path in place.proxy.seen if "/data.zarr/" in path and "/samples/" not in path]
    assert asked
    assert all("/t/logits/" in path or "/t/l" in path or "/params/" in path for path in asked)
    assert audit(place.folder / "d.kd").ok
    sound(place.kd("cache", "pull", URL, "--to", "d.kd"))
    same(place.folder / "c.kd", place.folder / "d.kd")


# --- the card -------------------------------------------------------------------------------------


def test_the_card_is_kds_until_somebody_changes_it(place: Place, cache: Path) -> None:
    from huggingface_hub import DatasetCard

    done = sound(place.push())
    assert "k00000, k00001, k00002, ..." in done.err  # names that become public, three of them
    assert "everybody" in done.err
    written = place.repo.files["README.md"].decode()
    front = DatasetCard(
        written, ignore_metadata_errors=False
    ).data.to_dict()  # as the hub's own client reads it
    assert front["license"] == "cc-by-4.0"
    assert front["task_categories"][0] == "image-classification"
    assert f"kd cache pull {URL} --to cache.kd" in written
    assert json.loads((cache / "manifest.json").read_bytes())["data"]["keys"] in written
    sound(place.kd("cache", "push", cache, URL, "--licence", "other:Team-Terms-1.0"))
    again = DatasetCard(place.repo.files["README.md"].decode()).data.to_dict()
    assert (again["license"], again["license_name"]) == ("other", "Team-Terms-1.0")
    edited = place.repo.files["README.md"].replace(b"# team/food", b"# Ours")
    place.repo.commit({"README.md": edited})
    assert "left as it is" in sound(place.push()).err
    assert place.repo.files["README.md"] == edited


# --- kills, losses, others ------------------------------------------------------------------------


def test_killed_pushes_are_completed_and_send_nothing_twice(place: Place) -> None:
    tools.fill(place.folder / "c.kd", ("t", "u"), rows=200)
    rng, deaths = random.Random(0), 0
    place.proxy.fault = lambda *_: time.sleep(0.01)  # type: ignore[func-returns-value]  # else it is done at once
    for _ in range(4):
        process = place.start("cache", "push", "c.kd", URL, *CC, small=True)
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(rng.uniform(0.8, 2.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        deaths += process.returncode == -signal.SIGKILL
    assert deaths >= 2
    place.proxy.fault = lambda *_: None
    sound(place.push())
    assert len(place.state.sent) == len(set(place.state.sent))
    sound(place.kd("cache", "pull", URL, "--to", "d.kd"))
    same(place.folder / "c.kd", place.folder / "d.kd")


def test_lost_and_refused_requests_are_repeated(place: Place) -> None:
    tools.fill(place.folder / "c.kd", rows=40)

    def fault(method: str, path: str, number: int) -> Any:
        if number % 9 != 2 or "create" in path or "validate" in path:
            return None
        kind = ("drop", "cut", 500, "lost")[number // 9 % 4]
        return kind if kind != "cut" or method == "GET" else None

    place.proxy.fault = fault
    sound(place.push(small=True))
    place.proxy.seen.clear()
    sound(place.kd("cache", "pull", URL, "--to", "d.kd"))
    same(place.folder / "c.kd", place.folder / "d.kd")


def first_commit(what: Callable[[], Any]) -> Callable[..., Any]:
    """A fault at the first request that commits."""
    left = [what]
    return lambda method, path, _: left.pop()() if "/commit/" in path and left else None


def test_a_commit_whose_answer_is_lost_is_made_once(place: Place, cache: Path) -> None:
    place.proxy.fault = first_commit(lambda: "lost")
    sound(place.push())
    assert len(place.repo.commits) == 2


def test_a_commit_that_another_one_preceded_keeps_both(place: Place, cache: Path) -> None:
    place.proxy.fault = first_commit(lambda: place.repo.commit({"notes.txt": b"theirs"}) and None)
    sound(place.push())
    assert place.repo.files["notes.txt"] == b"theirs"
    sound(place.kd("cache", "pull", URL, "--to", "d.kd"))
    same(cache, place.folder / "d.kd")


def test_two_pushes_at_once_make_one_cache(place: Place) -> None:
    tools.fill(place.folder / "c.kd", ("t", "u"), rows=100)
    words = ("cache", "push", "c.kd", URL, *CC)
    started = [place.start(*words, small=True) for _ in range(2)]
    told = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], told
    sound(place.kd("cache", "pull", URL, "--to", "d.kd"))
    same(place.folder / "c.kd", place.folder / "d.kd")


def test_another_push_meanwhile_is_never_overwritten(place: Place, cache: Path) -> None:
    theirs = {"commits/t/logits/000000-0000.json": b"{}"}
    place.proxy.fault = first_commit(lambda: place.repo.commit(theirs) and None)
    place.push().refused(32, "changed by somebody else", "Run the same command again")
    assert place.repo.files["commits/t/logits/000000-0000.json"] == b"{}"
    assert "manifest.json" not in place.repo.files


# --- refusals -------------------------------------------------------------------------------------


def test_refusals_of_a_push_say_what_to_do(place: Place, cache: Path) -> None:
    place.kd("cache", "push", cache, URL).refused(2, "what others may do", "--licence")
    place.kd("cache", "push", cache, URL, "--licence", "cc-by-44").refused(2, "Did you mean 'cc-by-4.0'?")
    place.kd("cache", "push", cache, URL, "--licence", "other").refused(2, "other:NAME")
    place.kd("cache", "push", cache, "file:///tmp/x", *CC).refused(2, "hf:// alone", "--licence")
    place.kd("cache", "push", cache, f"{URL}@v1", *CC).refused(2, "main branch")
    place.kd("cache", "push", cache, "hf://team/food", *CC).refused(2, "hf://datasets/ORG/NAME")
    place.push(token=None).refused(32, "no token is set", "hf auth login")
    place.push(token="hf_unknown").refused(32, "does not know this token", "hf auth login")
    place.push(token=READER).refused(32, "does not permit it", "may write to team")
    assert not place.state.repos
    place.state.repos[NAME] = Repo()
    place.push(token=READER).refused(32, "does not permit it", "may write to team")
    place.repo.commit({"data.csv": b"1"})
    place.push().refused(24, "holds other things")
    assert "pushed.json" not in place.repo.files


def test_refusals_of_a_pull_say_what_to_do(place: Place, cache: Path) -> None:
    def pull(url: str = URL, token: str | None = None) -> Shell:
        return place.kd("cache", "pull", url, "--to", "d.kd", token=token)

    pull().refused(32, "no data set team/food that you may read", "hf auth login")
    pull(token=READER).refused(32, "no data set team/food that you may read")
    place.state.repos[NAME] = Repo()
    pull().refused(20, "no cache at hf://datasets/team/food")
    sound(place.push())
    pull(f"{URL}@nowhere").refused(32, "no such revision")
    place.repo.gated = True
    pull(token=READER).refused(32, "gated", "Ask for access")
    place.proxy.fault = lambda method, path, _: "drop"
    pull().refused(32, "no answer of the hub", "HF_ENDPOINT")
    assert not (place.folder / "d.kd").exists()


def test_a_private_data_set_is_for_its_owners(place: Place, cache: Path) -> None:
    assert "who may read this private data set" in sound(place.push("--private")).err
    assert place.repo.private
    place.kd("cache", "pull", URL, "--to", "d.kd", token=None).refused(
        32, "that you may read", "hf auth login"
    )
    sound(place.kd("cache", "pull", URL, "--to", "d.kd"))
    same(cache, place.folder / "d.kd")


def test_no_token_and_no_signed_address_is_told_or_kept(place: Place, cache: Path) -> None:
    told = []
    place.proxy.fault = lambda method, path, _: 400 if method == "PUT" else None
    told.append(place.push("--verbose"))
    place.proxy.fault = lambda *_: None
    told.append(place.push("--verbose", token=READER))  # the stand-in repeats the token in its answer
    assert [each.code for each in told] == [32, 32]
    told.append(sound(place.push("--verbose")))
    told.append(sound(place.kd("cache", "pull", URL, "--to", "d.kd", "--verbose")))
    words = "".join(each.out + each.err for each in told).encode()
    kept = b"".join([*place.repo.files.values(), *files_of(place.folder / "d.kd").values()])
    for secret in (WRITER, READER, "SIGNEDSECRET"):
        assert secret.encode() not in words + kept


def test_without_the_client_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcli.cache.stores.pull import Choice, pull

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError) as refusal:
        pull(URL, cache.with_name("d.kd"), Choice())
    assert (refusal.value.exit_code, refusal.value.hint) == (13, "pip install 'kdcli[hub]'")
    with pytest.raises(UsageError, match="what others may do"):
        push(cache, URL)


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/food", "hf://me:hunter2@datasets/a/b", "hf://datasets/a/b?token=hunter2", "hf://datasets/a/b/../c",
        "hf://datasets/a/b#hunter2", "hf://datasets/../b", "hf://datasets/a/b@", "hf://datasets/a//b", "hf://models/a/b/c",
    ],
)  # fmt: skip
def test_addresses_with_more_than_a_place_are_refused_unseen(url: str) -> None:
    with pytest.raises(UsageError) as refusal:
        Address.parse(url, "dataset")
    assert "hunter2" not in str(refusal.value) + refusal.value.hint


def test_an_address_is_read_as_it_is_written() -> None:
    told = Address.parse("hf://datasets/Or-g.1/na_me@refs%2Fpr%2F1/a/b/", "dataset")
    assert told == Address("dataset", "Or-g.1/na_me", "refs/pr/1", "a/b")
    assert str(told) == "hf://datasets/Or-g.1/na_me@refs%2Fpr%2F1/a/b"
    assert Address.parse("hf://a/b", "model") == Address("model", "a/b")


def test_a_cache_that_keeps_images_is_not_pushed_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdcli.cache.stores.sharing as sharing

    root = tmp_path / "c.kd"
    manifest = tools.new_cache(root)
    pixels = OUTPUTS["pixels"]
    with CacheWriter(root, manifest) as writer:
        writer.add_teacher(tools.record_of("t", outputs={**tools.outputs_of(), "pixels": pixels}))
    monkeypatch.setenv("HF_TOKEN", WRITER)
    terms = sharing.Sharing(private=True, card=lambda *_: b"")
    with pytest.raises(UsageError, match="images do not go to the hub") as refused:
        push(root, "hf://datasets/team/c", terms)
    assert "kd cache rm" in refused.value.hint
