import json
from pathlib import Path

import pytest
import torch
from torch import nn

from kdcli.errors import StorageError
from kdcli.training.checkpoint import (
    Progress,
    Stateful,
    append_metrics,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    write_metrics,
)


def make(name: str, seed: int) -> Stateful:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2)
    )
    network(torch.zeros(2, 3, 8, 8))
    network.to(memory_format=torch.channels_last)
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    }
    return Stateful({"student": network, "objective": nn.Module()}, kinds[name](network.parameters()))


def train(stateful: Stateful, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        images = torch.rand(4, 8, 8, 3).permute(0, 3, 1, 2)
        loss = stateful.modules["student"](images).square().mean()
        stateful.optimizer.zero_grad()
        loss.backward()
        stateful.optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_goes_on_to_the_bit_where_a_checkpoint_was_made(optimizer: str, tmp_path: Path) -> None:
    first = make(optimizer, 0)
    train(first, 3)
    save_checkpoint(tmp_path / "state", first, Progress(epoch=1, step=2, steps=3, sums={"loss": 0.1}))
    expected = train(first, 4)
    second = make(optimizer, 1)
    place = latest_checkpoint(tmp_path / "state")
    assert place is not None
    assert load_checkpoint(place, second) == Progress(epoch=1, step=2, steps=3, sums={"loss": 0.1})
    assert train(second, 4) == expected
    for name, value in first.modules["student"].state_dict().items():
        assert torch.equal(value, second.modules["student"].state_dict()[name]), name


def test_only_the_newest_checkpoint_is_kept_and_half_written_ones_are_not_found(tmp_path: Path) -> None:
    stateful = make("sgd", 0)
    (tmp_path / ".step-00000009.1.tmp").mkdir()
    assert latest_checkpoint(tmp_path) is None
    for steps in (1, 2, 2):
        save_checkpoint(tmp_path, stateful, Progress(steps=steps))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    place = save_checkpoint(tmp_path, make("adamw", 0), Progress(steps=1))
    assert {path.suffix for path in place.iterdir()} == {".safetensors", ".json"}
    json.loads((place / "state.json").read_text())


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path) -> None:
    stateful = make("sgd", 0)
    save_checkpoint(tmp_path / "state", stateful, Progress(steps=1))
    (tmp_path / "state" / "step-00000002").write_text("in the way")
    with pytest.raises(StorageError):
        save_checkpoint(tmp_path / "state", stateful, Progress(steps=2))
    assert (tmp_path / "state" / "step-00000001" / "state.json").is_file()


def test_an_epochs_document_holds_the_means_over_its_steps() -> None:
    progress = Progress(epoch=2, steps=10)
    progress.add({"loss": 1.0, "label": 0.5}, images=8, seconds=0.5)
    progress.add({"loss": 3.0, "label": 1.5}, images=7, seconds=0.5)
    document = progress.close_epoch({"lr": 0.1})
    assert document == {
        "epoch": 3, "loss": 2.0, "label": 1.0, "lr": 0.1, "steps": 12, "images_per_second": 15.0, "seconds": 1.0
    }  # fmt: skip
    assert (progress.epoch, progress.step, progress.sums, progress.history) == (3, 0, {}, [document])


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for epoch in (1, 2, 3):
        append_metrics(path, {"epoch": epoch})
    write_metrics(path, [{"epoch": 1}])
    append_metrics(path, {"epoch": 2, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"epoch": 1}, {"epoch": 2, "again": True}]
