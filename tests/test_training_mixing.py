"""Mixed views in training: the recorded mixture is what the student sees, and labels are mixed with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from training_place import Place, make_place

from kdcli.data.sources import ImageData, open_data
from kdcli.data.views import Drawer, ViewSet
from kdcli.errors import BadDataError, IdentityError, UsageError
from kdcli.geometry import Render
from kdcli.methods.batch import Batch, Mixed
from kdcli.methods.losses import label_cross_entropy
from kdcli.training.batches import Feed, make_loader
from kdcli.training.replay import Recording, ViewRule, require_partners
from kdcli.training.resolve import make_plan
from kdcli.training.samplers import Ticket, plain_order
from kdcli.training.train import train_student
from kdcli.types import Preprocess

SMALL = Preprocess((16, 16), "bilinear", (0.5,) * 3, (0.5,) * 3, 0.9, "center")
RENDER = Render((16, 16), "bilinear")


@dataclass
class TwoCaches:
    """What a feed asks of a CacheSet: the recorded parameters of two caches of parts of a data set."""

    data: ImageData
    views: ViewSet
    split: int

    def __post_init__(self) -> None:
        import google_crc32c

        self.offsets = np.array([0, self.split, len(self.data)])
        self.keys = self.data.keys
        encoded = [self.data.encoded(row) for row in range(len(self.data))]
        self.bytes = np.array([[len(e), google_crc32c.value(e)] for e in encoded])
        self.recorded = np.stack([self._draw(view) for view in range(3)], 1)

    def _draw(self, view: int) -> np.ndarray:
        rows = []
        for start, stop in ((0, self.split), (self.split, len(self.data))):
            part = self.data.select(np.arange(start, stop))
            drawer = Drawer(part, self.views, [RENDER], range(len(part)))
            rows += [drawer.draw(row, part.image(row), view)[0] for row in range(len(part))]
        return np.stack(rows)

    def gather(self, part: str, array: str, rows: np.ndarray, view: int = 0) -> np.ndarray:
        assert (part, array) == ("samples", "params")
        return self.recorded[rows, view]

    def content(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.bytes[rows, 0], self.bytes[rows, 1]


def mixed_feed(images: Path, recipe: str, rows: np.ndarray) -> tuple[Feed, TwoCaches, Recording, ImageData]:
    everything, views = open_data(str(images)), ViewSet(2, recipe)
    cache: Any = TwoCaches(everything, views, 10)
    data, recording = everything.select(rows), Recording(cache, rows, {})
    return Feed(data, ViewRule(views, 2), [RENDER], recording), cache, recording, data


def batch_of(feed: Feed, epoch: int, *positions: int) -> Batch:
    batch = feed[Ticket(epoch, np.array(positions))]
    assert isinstance(batch, Batch), batch
    return batch


# --- the feed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["mixup", "cutmix"])
def test_a_student_sees_the_mixture_that_was_recorded(images: Path, recipe: str) -> None:
    rows = np.random.default_rng(0).permutation(24)
    feed, cache, _, data = mixed_feed(images, recipe, rows)
    batch = batch_of(feed, 1, 5, 0, 17)
    assert batch.mixed is not None
    for place, position in enumerate((5, 0, 17)):
        row = rows[position]
        params = cache.recorded[row, 2]
        offset = 0 if row < 10 else 10
        partner = int(cache.views.partners(params)) + offset
        assert (row < 10) == (partner < 10)  # partners come from the same cache
        images_ = (cache.data.image(int(row)), cache.data.image(partner))
        expected = cache.views.draw(
            images_[0], params, Render((16, 16), "bilinear"), (images_[1], cache.recorded[partner, 2])
        )
        np.testing.assert_array_equal(batch.pixels[place].numpy(), expected)
        assert batch.mixed.labels[place] == cache.data.labels[partner]
        assert batch.mixed.own[place] == cache.views.own_share(params)
        assert batch.labels[place] == data.labels[position]


def test_recorded_parameters_are_used_as_they_are(images: Path) -> None:
    """Whatever the random code says by now: the cache holds what the teachers saw."""
    feed, cache, _, _ = mixed_feed(images, "mixup", np.arange(24))
    cache.recorded[4, 1, 7:9] = [9, 16384]
    batch = batch_of(feed, 0, 4)
    assert batch.mixed is not None
    assert batch.mixed.labels.tolist() == [cache.data.labels[9]]
    assert batch.mixed.own.tolist() == [0.25]


def test_view_zero_is_not_mixed(images: Path) -> None:
    feed, cache, recording, data = mixed_feed(images, "mixup", np.arange(24))
    eval_only = Feed(data, ViewRule(cache.views, 0), [RENDER], recording)
    assert batch_of(eval_only, 0, 1, 2).mixed is None
    assert batch_of(feed, 0, 1, 2).mixed is not None


def test_a_partner_that_is_not_in_the_training_data_is_refused_before_and_while_training(
    images: Path,
) -> None:
    rows = np.arange(0, 24, 2)
    feed, cache, recording, data = mixed_feed(images, "mixup", rows)
    with pytest.raises(BadDataError, match="not in the training data") as raised:
        require_partners(recording, data, cache.views, [1, 2])
    assert raised.value.hint
    errors = [feed[Ticket(0, np.array([position]))] for position in range(len(rows))]
    partners = cache.views.partners(cache.recorded[rows, 1]) + np.where(rows < 10, 0, 10)
    assert [isinstance(error, BadDataError) for error in errors] == [row not in rows for row in partners]
    _, cache, recording, data = mixed_feed(images, "mixup", np.arange(24)[::-1])
    require_partners(recording, data, cache.views, [1, 2])


def test_a_partner_that_changed_since_the_teachers_saw_it_is_named(images: Path) -> None:
    feed, cache, _, data = mixed_feed(images, "mixup", np.arange(24))
    cache.recorded[4, 1, 7] = 9
    file = Path(data.path(9))
    file.write_bytes(file.read_bytes() + b"x")
    error = feed[Ticket(0, np.array([4]))]
    assert isinstance(error, IdentityError)
    assert file.name in error.message


@pytest.mark.parametrize("workers", [0, 2])
def test_live_mixtures_are_of_the_training_data_and_the_same_in_workers(images: Path, workers: int) -> None:
    data, views = open_data(str(images)), ViewSet(0, "cutmix")
    loader = make_loader(
        Feed(data, ViewRule(views), [RENDER]), plain_order(24, 7), workers, torch.device("cpu")
    )
    for batch in loader:
        assert isinstance(batch, Batch)
        assert batch.mixed is not None
        for place, position in enumerate(batch.index.tolist()):
            image = data.image(position)
            params, drawn = Drawer(data, views, [RENDER], range(24)).draw(position, image, 1)
            np.testing.assert_array_equal(batch.pixels[place].numpy(), drawn[RENDER])
            assert batch.mixed.labels[place] == data.labels[int(views.partners(params))]
        moved = batch.to(torch.device("cpu"))
        assert moved.mixed is not None
        assert torch.equal(moved.mixed.own, batch.mixed.own)


# --- the loss ---------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_the_label_loss_is_the_mean_of_both_labels_weighted_by_their_shares(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(6, 4)))
    labels, theirs = (torch.from_numpy(random.integers(-1, 4, 6)) for _ in range(2))
    own = torch.from_numpy(random.random(6).astype(np.float32))
    logs, total = functional.log_softmax(logits.float(), 1), 0.0
    for row in range(6):
        for label, share in ((labels[row], own[row]), (theirs[row], 1 - own[row])):
            total -= float(share * logs[row, label]) if label >= 0 else 0.0
    rows = max(1, int(((labels >= 0) | (theirs >= 0)).sum()))
    assert label_cross_entropy(logits, labels, Mixed(theirs, own)).item() == pytest.approx(
        total / rows, abs=1e-5
    )


def test_without_a_mixture_the_label_loss_is_the_plain_one_to_the_bit() -> None:
    logits, labels = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 5
    plain = functional.cross_entropy(logits, labels, reduction="sum") / 8
    assert torch.equal(label_cross_entropy(logits, labels), plain)
    alone = Mixed(torch.full((8,), -1), torch.ones(8))
    assert torch.allclose(label_cross_entropy(logits, labels, alone), plain)
    assert Batch(labels, torch.arange(8)).mixed is None


# --- the step ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("mixing"))


def test_labels_alone_can_be_learnt_from_live_mixtures_of_a_recipe_file(place: Place, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("scale: [0.5, 1]\njitter: {brightness: 0.2}\nmixup: {alpha: 0.4}\n")
    result = train_student(place.config("mixed", recipe=str(recipe), epochs=2))
    assert all(np.isfinite(epoch["loss"]) for epoch in result.history)
    recipe.unlink()
    again = train_student(place.config("again", recipe=str(_recorded(place, "mixed")), epochs=2))
    assert [epoch["loss"] for epoch in again.history] == [epoch["loss"] for epoch in result.history]


def _recorded(place: Place, out: str) -> str:
    import yaml

    return str(yaml.safe_load((place.root / out / "config.yaml").read_text())["recipe"])


def test_mixtures_that_the_teachers_did_not_see_are_refused(place: Place) -> None:
    config = place.config("refused", "distill-equal", recipe="mixup", teacher_view="eval")
    with pytest.raises(UsageError, match="teachers saw them unmixed") as raised:
        make_plan(config)
    assert "--teacher-view same" in raised.value.hint
    with pytest.raises(UsageError, match="the cached views are of recipe mild"):
        make_plan(place.config("refused", "distill-equal", recipe="mixup"))
    make_plan(place.config("fine", "distill-equal", recipe="randaugment", teacher_view="eval"))
