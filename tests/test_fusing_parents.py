"""Which cached arrays a joint teacher fuses, on real caches of two tiny networks."""

from pathlib import Path

import pytest
from small_cache import write_cache, write_images, write_teachers

from kdcli.cache.cacheset import CacheSet
from kdcli.errors import BadDataError, CacheMissingError, NotFoundError, UsageError
from kdcli.fusing.parents import choose_parents

BOTH = ("big", "small")
KEEP = ("features", "maps:layer3", "layer4")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fusing")
    write_images(folder / "images", {"one": 4, "two": 3})
    specs = write_teachers(folder)
    both = write_cache(folder / "both.kd", str(folder / "images"), {"big": specs["big"]}, keep=KEEP)
    write_cache(both, str(folder / "images"), {"small": specs["small"]}, keep=("features", "maps:blocks.5"))
    return folder


def test_embeddings_need_no_tap(place: Path) -> None:
    found = choose_parents(CacheSet.open([place / "both.kd"]), BOTH, "L1", {})
    assert [(each.array, each.parent.name, each.parent.size) for each in found] == [
        ("features", "big", None),
        ("features", "small", None),
    ]
    assert [each.parent.channels for each in found] == [each.record.num_features for each in found]


def test_a_map_is_told_by_its_size(place: Path) -> None:
    caches = CacheSet.open([place / "both.kd"])
    late, early = (choose_parents(caches, ("big",), levels, {})[0] for levels in ("L2", "L3"))
    assert (late.array, late.parent.channels, late.parent.size) == ("maps/layer4", 512, (1, 1))
    assert (early.array, early.parent.channels, early.parent.size) == ("maps/layer3", 256, (2, 2))
    with pytest.raises(UsageError, match="4x4 map of 'big', and none of its cached maps is one") as refused:
        choose_parents(caches, ("big",), "L4", {})
    assert "--tap big=layer4; or cache it" in refused.value.hint


def test_a_named_tap_wins_over_the_size(place: Path) -> None:
    caches = CacheSet.open([place / "both.kd"])
    assert choose_parents(caches, ("big",), "L2", {"big": "layer3"})[0].array == "maps/layer3"
    with pytest.raises(CacheMissingError, match="Did you mean 'layer4'") as refused:
        choose_parents(caches, ("big",), "L2", {"big": "layr4"})
    assert "maps:layr4" in refused.value.hint
    with pytest.raises(UsageError, match=r"'bgi' is not fused\. Did you mean 'big'"):
        choose_parents(caches, BOTH, "L2", {"bgi": "layer4"})
    with pytest.raises(UsageError, match="L1 fuses embeddings"):
        choose_parents(caches, BOTH, "L1", {"big": "layer4"})


def test_every_gap_is_listed_with_a_command_a_cache(place: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking.kd"
    write_cache(lacking, str(place / "images"), {"big": f"local-dir:{place / 'big'}"}, keep=("logits",))
    caches = CacheSet.open([place / "both.kd", lacking])
    with pytest.raises(CacheMissingError) as refused:
        choose_parents(caches, BOTH, "L1", {})
    assert f"big has no features in {lacking}" in refused.value.message
    assert f"small is not there in {lacking}" in refused.value.message
    assert refused.value.hint.count(f"--cache {lacking}") == 2
    write_cache(lacking, str(place / "images"), {"big": f"local-dir:{place / 'big'}"}, keep=("features",))
    write_cache(lacking, str(place / "images"), {"small": f"local-dir:{place / 'small'}"}, keep=("features",))
    assert len(choose_parents(CacheSet.open([place / "both.kd", lacking]), BOTH, "L1", {})) == 2


def test_rows_that_are_not_written_are_counted(place: Path, tmp_path: Path) -> None:
    cache = write_cache(
        tmp_path / "c.kd", str(place / "images"), {"big": f"local-dir:{place / 'big'}"}, keep=("features",)
    )
    (cache / "commits" / "big" / "features.jsonl").unlink()
    with pytest.raises(CacheMissingError, match="big lacks 7 of 7 rows of features"):
        choose_parents(CacheSet.open([cache]), ("big",), "L1", {})


def test_unlabelled_data_and_unknown_teachers_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'small'"):
        choose_parents(CacheSet.open([place / "both.kd"]), ("big", "smal"), "L1", {})
    cache = write_cache(
        tmp_path / "u.kd",
        f"{place / 'images'}@labels=none",
        {"big": f"local-dir:{place / 'big'}"},
        keep=("features",),
    )
    with pytest.raises(BadDataError, match="has no labels"):
        choose_parents(CacheSet.open([cache]), ("big",), "L1", {})
