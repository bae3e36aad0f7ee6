"""P2 sections 4.1 and 4.2: whose labels a ranking uses, and which views teachers and students see."""

import json
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.cache.fingerprints import fingerprints, pack, unpack
from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, IdentityError
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.ranking import parse_ranking, rank, rank_sources
from kdcli.ranking.config import RankConfig
from kdcli.training.replay import ViewRule
from kdcli.training.resolve import make_plan
from kdcli.training.sequential import train_sequence
from kdcli.training.summary import tell


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("protocol"))


def keys_of(place: Place, packed: str) -> set[str]:
    """The images that a document names, found among all that are cached."""
    cache = CacheSet.open([place.cache])
    rows = np.arange(len(cache.keys))
    every = dict(zip(fingerprints(cache, rows).tolist(), cache.keys, strict=True))
    return {every[value] for value in unpack(packed).tolist()}


def test_a_ranking_names_the_images_of_all_its_probe_sets(place: Place) -> None:
    config = RankConfig(cache=(place.cache,), data=f"{place.data}@labelled=0.5", probe_size=6, repeats=3)
    data = open_data(f"{place.data}@labelled=0.5")
    labelled = {data.keys[int(row)] for row in np.flatnonzero(data.labels >= 0)}
    named = keys_of(place, rank_sources(config).probe["images"])
    assert 6 < len(named) <= len(labelled)
    assert named <= labelled


def test_five_hundred_images_take_a_few_kilobytes() -> None:
    assert len(pack(np.arange(500) << 50)) < 6_000
    assert len(pack(np.arange(50_000) << 40)) < 600_000


@given(st.lists(st.integers(0, 2**63 - 1), unique=True, min_size=1))
def test_what_is_packed_is_unpacked(values: list[int]) -> None:
    assert unpack(pack(np.array(values, np.int64))).tolist() == sorted(values)


@pytest.mark.parametrize("images", ["%", "AAAA", "", 7, None])
def test_a_document_with_broken_images_is_refused(place: Place, images: object) -> None:
    document = rank(RankConfig(cache=(place.cache,))).document()
    document["probe"]["images"] = images
    with pytest.raises(BadDataError, match="probe"):
        parse_ranking(json.dumps(document))


@pytest.mark.parametrize("method", ["distill-weighted", "distill-nearest", "distill-equal"])
def test_a_ranking_by_labels_that_the_student_lacks_is_refused(place: Place, method: str) -> None:
    ranking = rank_sources(RankConfig(cache=(place.cache,)))
    data = f"{place.data}@labelled=0.5"
    config = place.config("never", method, data=data, ranking="my ranking.json")
    with pytest.raises(IdentityError, match=r"12 of the 24 images .* not among the 12 labelled") as raised:
        make_plan(config, ranking)
    words = shlex.split(raised.value.hint)
    assert words[:2] == ["kd", "rank-sources"]
    assert words[-2:] == [">", "my ranking.json"]
    assert words[words.index("--data") + 1] == data
    right = rank_sources(RankConfig(cache=(place.cache,), data=data))
    make_plan(config, right)
    make_plan(place.config("never", method), ranking)  # who has all labels may use them


def test_the_hint_keeps_how_the_ranking_was_made(place: Place) -> None:
    asked = {"metric": "cka", "on": "pseudo", "seed": 3, "probe_size": 20, "power": 2.0, "teacher": ("gen",)}
    ranking = rank_sources(RankConfig(cache=(place.cache,), **asked))
    config = place.config("never", "distill-weighted", data=f"{place.data}@labelled=0.5")
    with pytest.raises(IdentityError) as raised:
        make_plan(config, ranking)
    for flags in (
        "--metric cka",
        "--on pseudo",
        "--seed 3",
        "--probe-size 20",
        "--power 2.0",
        "--teacher gen",
    ):
        assert flags in raised.value.hint
    stepped = rank_sources(RankConfig(cache=(place.cache,), metric="logme", logme_steps=50, repeats=2))
    with pytest.raises(IdentityError) as raised:
        make_plan(config, stepped)
    assert {"--logme-steps 50", "--repeats 2"} <= set(pairs(raised.value.hint))


def pairs(command: str) -> list[str]:
    words = shlex.split(command)
    return [f"{flag} {value}" for flag, value in pairwise(words)]


def test_images_set_aside_for_validation_are_labels_that_the_student_may_see(place: Place) -> None:
    ranking = rank_sources(RankConfig(cache=(place.cache,)))
    make_plan(place.config("never", "distill-weighted", validation=0.3), ranking)


def test_other_users_of_a_ranking_are_held_to_it_too(place: Place) -> None:
    ranking = rank_sources(RankConfig(cache=(place.cache,)))
    half = f"{place.data}@labelled=0.5"
    start = place.config("never", data=half, init="nearest-source", cache=(place.cache,))
    with pytest.raises(IdentityError, match="12 of the 24"):
        make_plan(start, ranking)
    stages = place.config("never", "distill-equal", data=half, sequential="ascending")
    with pytest.raises(IdentityError, match="12 of the 24"):
        train_sequence(stages, ranking=ranking)


def test_a_method_without_labels_may_take_a_ranking_by_any(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    ranking = rank_sources(RankConfig(cache=(place.cache,)))
    half = place.config(
        "never", "consolidation", data=f"{place.data}@labelled=0.5"
    )  # P1: the task is not the proxy
    make_plan(half, ranking)
    assert "made with 24 labels, and consolidation learns from none" in capsys.readouterr().err


def test_a_ranking_that_names_no_images_is_taken_with_a_note(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(place.config("never", "distill-weighted", data=f"{place.data}@labelled=0.5"), place.ranking())
    assert "does not say on which images" in capsys.readouterr().err


def test_test_images_under_the_same_names_are_told_apart(place: Place, tmp_path: Path) -> None:
    """``held-out`` names its files as ``images`` does: a ranking on it is one on labels of test images."""
    cache = tmp_path / "test.kd"
    teachers = tuple(f"{name}={spec}" for name, spec in place.specs.items())
    cache_teachers(
        CacheConfig(data=place.test, cache=cache, teacher=teachers, views="eval", workers=0, device="cpu")
    )
    assert set(CacheSet.open([cache]).keys) <= set(CacheSet.open([place.cache]).keys)
    ranking = rank_sources(RankConfig(cache=(cache,)))
    with pytest.raises(IdentityError, match="9 of the 9 images"):
        make_plan(place.config("never", "distill-weighted"), ranking)


# --- 4.2: a pseudo-label an image, views of the student's own -----------------------------------


def rule_of(place: Place, method: str, **changes: object) -> ViewRule:
    config = place.config("never", method, **{"teacher_view": None, "cache": (place.cache,), **changes})
    return make_plan(config, place.ranking()).rule


@pytest.mark.parametrize("method", ["distill-weighted", "distill-nearest", "distill-equal", "labels-only"])
def test_pseudo_labels_are_made_once_an_image_and_the_student_sees_live_views(
    place: Place, method: str
) -> None:
    rule = rule_of(place, method)
    assert [rule.teacher(epoch) for epoch in range(5)] == [0] * 5
    assert [rule.student(epoch) for epoch in range(5)] == [1, 2, 3, 4, 5]  # the cache has two
    assert rule.views.recipe == "mild"  # as the cache's: a recipe is chosen for the data
    assert rule_of(place, method, recipe="imagenet").views.recipe == "imagenet"
    same = rule_of(place, method, teacher_view="same")
    assert (
        [same.teacher(epoch) for epoch in range(4)]
        == [same.student(epoch) for epoch in range(4)]
        == [1, 2, 1, 2]
    )


def test_a_cache_of_the_eval_view_gives_the_student_another_crop_every_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = make_place(tmp_path, views="eval")
    plan = make_plan(place.config("never", "distill-weighted", teacher_view=None), place.ranking())
    assert [plan.rule.student(epoch) for epoch in range(3)] == [1, 2, 3]
    tell(plan)
    said = capsys.readouterr().err
    assert "every epoch shows the same pixels" not in said
    assert (
        said.count("one pseudo-label an image, of its clean view; the student's views are live (P2 4.2)") == 1
    )
    same = make_plan(place.config("never", "distill-weighted"), place.ranking())
    tell(same)
    said = capsys.readouterr().err
    assert "every epoch shows the same pixels" in said
    assert "not one an image as in P2 4.2" in said
