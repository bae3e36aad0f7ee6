"""What the modifiers choose."""

import hashlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jaxtyping import Int64

from kdcli.data.philox import below, permutation, words
from kdcli.data.spec import ClassSubset, DataSpec, Split
from kdcli.data.subset import choose, chosen_classes, draw, in_share, proportional
from kdcli.errors import BadDataError, UsageError

Labels = Int64[np.ndarray, " n"]
seeds = st.integers(0, 100)


def names_of(count: int) -> tuple[str, ...]:
    return tuple(f"c{index:04d}" for index in range(count))


def classes_of(text: str, count: int, seed: int) -> set[int]:
    return set(chosen_classes(ClassSubset.parse(text), names_of(count), seed).tolist())


def pick(modifiers: str, labels: Labels) -> tuple[Labels, Labels, tuple[str, ...] | None]:
    return choose(DataSpec.parse(f"x@{modifiers}"), labels, names_of(int(labels.max()) + 1))


@st.composite
def label_arrays(draw: st.DrawFn) -> Labels:
    classes = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(-1, classes - 1), min_size=1, max_size=200))
    return np.array([*labels, *range(classes)], np.int64)  # each class at least once


@given(st.integers(2, 300), seeds)
def test_t_and_d_splits_are_disjoint_halves_that_cover_all_classes(count: int, seed: int) -> None:
    t, d = classes_of("t-split", count, seed), classes_of("d-split", count, seed)
    assert not t & d
    assert t | d == set(range(count))
    assert abs(len(t) - len(d)) <= 1


@given(st.integers(10, 300), seeds)
def test_five_tenths_are_disjoint_and_together_the_t_split(count: int, seed: int) -> None:
    tenths = [classes_of(f"t-split/5:{index}", count, seed) for index in range(5)]
    assert set.union(*tenths) == classes_of("t-split", count, seed)
    assert sum(map(len, tenths)) == len(set.union(*tenths))
    assert all(abs(len(tenth) - count / 10) < 1 for tenth in tenths)


def test_class_splits_depend_on_the_seed_and_look_random() -> None:
    counts = np.zeros(20)
    for seed in range(400):
        counts[list(classes_of("t-split", 20, seed))] += 1
    assert ((counts > 140) & (counts < 260)).all()  # 200 expected, 6 standard deviations


def test_the_random_choices_never_change() -> None:
    """Written down: a new version, platform or numpy that draws others would invalidate caches."""
    assert words(2, "a", "b").tolist() == WORDS
    assert permutation(8, "classes", "0").tolist() == ORDER
    assert below((1 << 64) - 1, 10) == 9
    assert below(0, 10) == 0


WORDS = [12874382655418273638, 3243026742830284529]
ORDER = [3, 1, 2, 5, 4, 0, 6, 7]


def philox_block(counter: int, key: int) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011), in plain Python."""
    mask = (1 << 64) - 1
    c = [counter >> 64 * index & mask for index in range(4)]
    k = [key & mask, key >> 64]
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [right >> 64 ^ c[1] ^ k[0], right & mask, left >> 64 ^ c[3] ^ k[1], left & mask]
        k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
    return c


def test_words_are_those_of_the_published_generator() -> None:
    assert philox_block(0, 0)[0] == 0x16554D9ECA36314C  # known answer of the authors' Random123
    hashed = hashlib.blake2b(digest_size=16)
    for text in (b"view", b"cat/1.jpg"):
        hashed.update(len(text).to_bytes(8, "little") + text)
    key = int.from_bytes(hashed.digest(), "little")
    expected = philox_block(1, key) + philox_block(2, key)
    assert words(8, "view", "cat/1.jpg").tolist() == expected


def test_streams_with_equal_concatenation_differ() -> None:
    assert words(4, "ab").tolist() != words(4, "a", "b").tolist()


def test_named_and_excluded_classes_are_reindexed_in_order() -> None:
    labels = np.array([0, 1, 2, 2, -1, 1])
    rows, found, names = pick("classes=c0002+c0000", labels)
    assert rows.tolist() == [0, 2, 3]
    assert found.tolist() == [0, 1, 1]
    assert names == ("c0000", "c0002")
    rows, found, names = pick("classes=except:c0001", labels)
    assert (rows.tolist(), found.tolist(), names) == ([0, 2, 3], [0, 1, 1], ("c0000", "c0002"))


def test_an_unknown_class_is_named_with_its_neighbour() -> None:
    with pytest.raises(UsageError, match="Did you mean 'c0001'"):
        pick("classes=c001", np.array([0, 1]))


def test_splits_of_too_few_classes_are_refused() -> None:
    with pytest.raises(BadDataError, match="is empty"):
        pick("classes=t-split", np.array([0, 0]))
    with pytest.raises(BadDataError, match="is empty"):
        pick("classes=t-split/5:0", np.array([0, 1, 2]))
    with pytest.raises(BadDataError, match="leaves no class"):
        pick("classes=except:c0000", np.array([0, 0]))


@given(label_arrays(), st.integers(1, 250), seeds)
def test_n_keeps_every_class_within_one_of_its_proportion(labels: Labels, total: int, seed: int) -> None:
    rows, kept, _ = pick(f"n={total},seed={seed}", labels)
    total = min(total, len(labels))
    assert len(rows) == total
    assert (np.diff(rows) > 0).all()
    exact = np.bincount(labels + 1) * total / len(labels)
    assert (np.abs(np.bincount(kept + 1, minlength=len(exact)) - exact) < 1).all()


@given(label_arrays(), st.integers(1, 20), seeds)
def test_shots_are_per_class_all_where_fewer_and_nested(labels: Labels, shots: int, seed: int) -> None:
    rows, kept, _ = pick(f"shots={shots},seed={seed}", labels)
    sizes = np.bincount(labels[labels >= 0])
    assert np.bincount(kept, minlength=len(sizes)).tolist() == np.minimum(sizes, shots).tolist()
    more, _, _ = pick(f"shots={shots + 1},seed={seed}", labels)
    assert set(rows) <= set(more)


@given(label_arrays(), st.floats(0.001, 1), seeds)
def test_labelled_keeps_all_samples_and_a_share_of_each_class(
    labels: Labels, share: float, seed: int
) -> None:
    rows, kept, names = pick(f"labelled={share!r},seed={seed}", labels)
    assert rows.tolist() == list(range(len(labels)))
    assert ((kept == labels) | (kept == -1)).all()
    sizes = np.bincount(labels[labels >= 0])
    assert names == names_of(len(sizes))
    found = np.bincount(kept[kept >= 0], minlength=len(sizes))
    assert (np.abs(found - sizes * share) <= np.where(found == 1, 1, 0.5)).all()
    assert (found >= 1).all()


@example(np.zeros(4, np.int64), 38, 1, 0)
@given(label_arrays(), st.integers(1, 99), st.integers(0, 99), seeds)
def test_shares_are_disjoint_and_complete_in_every_class(
    labels: Labels, first: int, second: int, seed: int
) -> None:
    two = (first, 100 - first)
    three = (first, second, 100 - first - second)
    for shares in (two, three) if min(three) > 0 else (two,):
        parts = [in_share(labels, Split(None, shares, part), seed) for part in range(len(shares))]
        assert (np.sum(parts, axis=0) == 1).all()
        for label in np.unique(labels):
            size = int((labels == label).sum())
            counts = [int(part[labels == label].sum()) for part in parts]
            assert size < len(shares) or min(counts) >= 1
            if size * min(shares) >= 100:  # where no part is so small that it gets its one sample
                exact = [size * share / 100 for share in shares]
                assert all(abs(found - share) <= 1 for found, share in zip(counts, exact, strict=True))


def test_a_smaller_share_is_part_of_a_larger_one_and_the_seed_draws() -> None:
    labels = np.repeat([-1, 0, 1], 50)
    large, small, other = (
        in_share(labels, Split(None, shares), seed)
        for shares, seed in (((80, 20), 0), ((50, 50), 0), ((80, 20), 1))
    )
    assert large[small].all()
    assert large.sum() == other.sum() == 120
    assert (large != other).any()


@given(label_arrays())
def test_labelled_one_keeps_every_label(labels: Labels) -> None:
    assert pick("labelled=1", labels)[1].tolist() == labels.tolist()


def test_labels_none_keeps_the_same_samples_without_labels() -> None:
    labels = np.repeat(np.arange(10), 7)
    rows, _, _ = pick("classes=t-split,shots=3", labels)
    unlabelled, none, names = pick("classes=t-split,shots=3,labels=none", labels)
    assert rows.tolist() == unlabelled.tolist()
    assert set(none.tolist()) == {-1}
    assert names is None


@given(seeds, seeds)
def test_equal_seeds_agree_and_other_seeds_differ(one: int, other: int) -> None:
    labels = np.repeat(np.arange(5), 40)
    for modifier in ("n=50", "shots=10", "labelled=0.25"):
        first, second = (pick(f"{modifier},seed={seed}", labels) for seed in (one, other))
        same = first[0].tolist() == second[0].tolist() and first[1].tolist() == second[1].tolist()
        assert same == (one == other)


def test_drawing_is_fair_to_every_row() -> None:
    labels = np.repeat(np.arange(2), 10)
    counts = np.sum([draw(labels, np.array([0, 5, 5]), "test", seed) for seed in range(400)], axis=0)
    assert ((counts > 140) & (counts < 260)).all()


def test_proportions_of_a_million_rows_do_not_overflow() -> None:
    labels = np.repeat(np.arange(2), [999_999, 1])
    assert proportional(labels, 500_000, 0).sum() == 500_000


@pytest.mark.parametrize("modifiers", ["classes=t-split", "shots=1", "labelled=0.5"])
def test_what_needs_labels_says_so(modifiers: str) -> None:
    with pytest.raises(BadDataError, match="no labels"):
        choose(DataSpec.parse(f"x@{modifiers}"), np.full(3, -1), None)


def test_data_without_labels_can_be_subsampled() -> None:
    rows, labels, names = choose(DataSpec.parse("x@n=2"), np.full(5, -1), None)
    assert (len(rows), labels.tolist(), names) == (2, [-1, -1], None)


def test_a_choice_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(BadDataError, match="no sample"):
        choose(DataSpec.parse("x@classes=b"), np.array([0, 0]), ("a", "b"))
