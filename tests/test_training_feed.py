from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Dataset
from training_place import Place, make_place

from kdcli.cache.cacheset import CacheSet
from kdcli.data.drawing import render
from kdcli.data.sources import open_data
from kdcli.data.views import ViewSet
from kdcli.errors import BadDataError, IdentityError
from kdcli.geometry import Render
from kdcli.methods.batch import Batch
from kdcli.training.batches import Feed, make_loader
from kdcli.training.replay import Recording, ViewRule
from kdcli.training.samplers import EpochOrder, Ticket, plain_order
from kdcli.types import Preprocess

SMALL = Preprocess((16, 16), "bilinear", (0.5,) * 3, (0.5,) * 3, 0.9, "center")
VIEWS = ViewSet(2, "mild")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("feed"))


def make_feed(place: Place, **reads: tuple[str, ...]) -> Feed:
    data, cache = open_data(place.data), CacheSet.open([place.cache])
    rule = ViewRule(ViewSet.from_document(cache.view_set), cache.view_set["train_views"])
    return Feed(data, rule, [Render.of(SMALL)], Recording(cache, cache.rows_of(data), reads))


def batch_of(feed: Feed, epoch: int, *positions: int) -> Batch:
    batch = feed[Ticket(epoch, np.array(positions))]
    assert isinstance(batch, Batch)
    return batch


# --- which view -------------------------------------------------------------------------------


def test_epochs_cycle_through_the_cached_views() -> None:
    rule = ViewRule(VIEWS, 3)
    assert [rule.student(epoch) for epoch in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert [rule.teacher(epoch) for epoch in range(7)] == [1, 2, 3, 1, 2, 3, 1]


def test_a_cache_with_the_eval_view_only_shows_it_in_every_epoch() -> None:
    rule = ViewRule(VIEWS, 0)
    assert {(rule.student(epoch), rule.teacher(epoch)) for epoch in range(5)} == {(0, 0)}


def test_live_views_never_repeat() -> None:
    rule = ViewRule(VIEWS)
    assert [rule.student(epoch) for epoch in range(4)] == [1, 2, 3, 4]


def test_teacher_view_eval_pairs_clean_outputs_with_views_that_never_repeat() -> None:
    rule = ViewRule(VIEWS, 2, "eval")
    assert [(rule.student(epoch), rule.teacher(epoch)) for epoch in range(4)] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 0),
    ]


# --- order ------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=80), st.integers(1, 20), st.integers(0, 5))
def test_every_image_comes_in_every_epoch_in_batches_of_almost_equal_size(
    labels: list[int], size: int, epoch: int
) -> None:
    order = EpochOrder(np.array(labels), size, seed=3)
    order.seek(epoch)
    batches = [ticket.positions for ticket in order]
    times = np.bincount(np.concatenate(batches), minlength=len(labels))
    labelled = np.array(labels) >= 0
    assert (times[~labelled] == 1).all()
    assert (times[labelled] >= 1).all()
    if 0 < labelled.sum() < (~labelled).sum():
        assert times[labelled].sum() == (~labelled).sum()
        assert np.ptp(times[labelled]) <= 1
    else:
        assert (times == 1).all()
    assert len(batches) == order.batches == len(order)
    assert max(map(len, batches)) <= size
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


@given(st.integers(1, 60), st.integers(0, 60), st.integers(2, 16))
def test_labelled_images_are_spread_evenly_over_the_batches(
    labelled: int, unlabelled: int, size: int
) -> None:
    labels = np.r_[np.zeros(labelled, np.int64), np.full(unlabelled, -1)]
    counts = [int((labels[ticket.positions] >= 0).sum()) for ticket in EpochOrder(labels, size, seed=0)]
    assert max(counts) - min(counts) <= 2


def test_the_order_follows_from_data_seed_and_epoch_alone() -> None:
    labels = np.zeros(50, np.int64)

    def positions(seed: int, epoch: int) -> list[int]:
        order = EpochOrder(labels, 8, seed)
        order.seek(epoch)
        return np.concatenate([ticket.positions for ticket in order]).tolist()

    assert positions(0, 4) == positions(0, 4)
    assert len({tuple(positions(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_processes_share_each_batch_among_them() -> None:
    labels = np.zeros(21, np.int64)
    whole = [ticket.positions for ticket in EpochOrder(labels, 8, 0)]
    parts = [[ticket.positions for ticket in EpochOrder(labels, 8, 0, rank, 2)] for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(batch.tolist()) == sorted([*first.tolist(), *second.tolist()])


def test_an_epoch_can_be_entered_in_its_middle() -> None:
    order = EpochOrder(np.zeros(30, np.int64), 8, 0)
    order.seek(2)
    whole = [ticket.positions.tolist() for ticket in order]
    order.seek(2, 3)
    assert [ticket.positions.tolist() for ticket in order] == whole[3:]
    assert len(order) == len(whole) - 3


# --- batches ----------------------------------------------------------------------------------


def test_pixels_are_the_cached_view_of_the_epoch_at_the_students_size(place: Place) -> None:
    data, views = open_data(place.data), ViewSet(2, "mild")
    batch = batch_of(make_feed(place), 1, 5, 0)
    for row, position in enumerate((5, 0)):
        image = data.image(position)
        params = views.params(data.keys[position], 2, image.width, image.height)
        np.testing.assert_array_equal(batch.pixels[row].numpy(), render(image, params, (16, 16), "bilinear"))
    assert batch.labels.tolist() == data.labels[[5, 0]].tolist()
    assert batch.index.tolist() == [5, 0]


def test_teacher_outputs_are_those_of_the_same_images_and_view(place: Place) -> None:
    cache, data = CacheSet.open([place.cache]), open_data(place.data)
    batch = batch_of(make_feed(place, gen=("logits",), exp=("logits", "features")), 0, 7, 3)
    rows = cache.rows_of(data)[[7, 3]]
    assert set(batch.teacher["exp"]) == {"logits", "features"}
    np.testing.assert_array_equal(
        batch.teacher["gen"]["logits"].numpy(), cache.gather("gen", "logits", rows, 1)
    )


def test_workers_give_the_same_batches_as_the_process_itself(place: Place) -> None:
    feed, order = make_feed(place, gen=("logits",)), EpochOrder(np.zeros(24, np.int64), 8, 0)
    batches = [list(make_loader(feed, order, workers, torch.device("cpu"))) for workers in (0, 2)]
    for alone, worker in zip(*batches, strict=True):
        assert isinstance(alone, Batch)
        assert isinstance(worker, Batch)
        assert torch.equal(alone.pixels, worker.pixels)
        assert torch.equal(alone.index, worker.index)
        assert torch.equal(alone.teacher["gen"]["logits"], worker.teacher["gen"]["logits"])


@final
class _Parted(Dataset[Batch]):
    """Batches of which the host is to know parts, strong views and turns."""

    def __getitem__(self, ticket: Ticket) -> Batch:
        count = len(ticket.positions)
        part, turn = torch.arange(count) % 2, torch.full((count,), int(ticket.positions[0]))
        return Batch(part - 1, torch.arange(count), part=part, turn=turn, strong=torch.arange(count) % 3 == 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_host_knows_of_a_batch_is_what_its_tensors_say(workers: int) -> None:
    """A worker sends both: its tensors leave their memory for a shared one, and other batches are made in it."""
    batches = list(make_loader(_Parted(), plain_order(4000, 8), workers, torch.device("cpu")))
    assert len(batches) == 500
    for batch in batches:
        assert batch.host is not None and batch.part is not None  # noqa: PT018
        assert batch.strong is not None and batch.turn is not None  # noqa: PT018
        np.testing.assert_array_equal(batch.host.labelled, batch.labels.numpy() >= 0)
        np.testing.assert_array_equal(batch.host.part, batch.part.numpy())
        np.testing.assert_array_equal(batch.host.strong, batch.strong.numpy())
        np.testing.assert_array_equal(batch.host.turn, batch.turn.numpy())


def test_a_loader_does_not_move_the_runs_random_numbers(place: Place) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(make_feed(place), plain_order(24, 8), 1, torch.device("cpu")))
    assert torch.equal(before, torch.get_rng_state())


def test_an_image_that_changed_since_it_was_cached_is_named(tmp_path: Path) -> None:
    place = make_place(tmp_path, views="eval")
    feed, data = make_feed(place), open_data(place.data)
    file = Path(data.path(4))
    pixels = np.asarray(Image.open(file)).copy()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    error = feed[Ticket(0, np.array([2, 4]))]
    assert isinstance(error, IdentityError)
    assert file.name in error.message
    Image.fromarray(255 - pixels).save(file)
    assert isinstance(feed[Ticket(0, np.array([4]))], IdentityError)
    assert isinstance(feed[Ticket(0, np.array([2]))], Batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_an_error_with_its_name_also_from_a_worker(images: Path, workers: int) -> None:
    broken = images / "class1" / "003.png"
    broken.write_bytes(b"no image")
    feed = Feed(open_data(str(images)), ViewRule(VIEWS), [Render.of(SMALL)])
    items = list(make_loader(feed, plain_order(24, 8), workers, torch.device("cpu")))
    errors = [item for item in items if isinstance(item, BadDataError)]
    assert len(errors) == 1
    assert "class1/003.png" in errors[0].message
    assert errors[0].hint
