"""Images of several labels: the loss is torch's, the scores are scikit-learn's, whoever learns from them."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, average_precision_score, hamming_loss
from torch.nn import functional
from training_place import Place, make_place

from kdcli.console import console
from kdcli.data.sources import open_data
from kdcli.errors import BadDataError, ConfigError, UsageError
from kdcli.methods.base import find_method, method_names
from kdcli.methods.batch import Batch, Mixed
from kdcli.methods.consolidation import BesideLabels, Consolidation
from kdcli.methods.losses import label_loss
from kdcli.models.spec import open_model
from kdcli.models.student import Student, StudentOutput
from kdcli.registry import METHODS
from kdcli.reporting.document import Chart, Table
from kdcli.reporting.material import Run
from kdcli.reporting.protocols import by_test
from kdcli.reporting.students import curves_section, students_section
from kdcli.training.config import StudentConfig
from kdcli.training.evaluate import heads_to_test, labels_for
from kdcli.training.lr_grid import train_grid
from kdcli.training.resolve import make_plan
from kdcli.training.scores import LabelScores
from kdcli.training.train import train_student

TAGS = {"class0": "", "class1": "warm|big", "class2": "big"}


def write_labels(folder: Path, unlabelled: int = 0) -> None:
    """A labels.csv with a column of joined labels: those of the class, and one that changes from image to image."""
    keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    with (folder / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("key", "tags"))
        for number, key in enumerate(keys[unlabelled:]):
            odd = "odd" if number % 2 else ""
            tags = [tag for tag in (*TAGS[key.partition("/")[0]].split("|"), odd) if tag]
            writer.writerow((key, "|".join(tags) or "|"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = make_place(tmp_path_factory.mktemp("several"), views="eval+train:1")
    write_labels(found.root / "images")
    write_labels(found.root / "held-out")
    return found


def config(place: Place, out: str, method: str = "labels-only", **changes: Any) -> StudentConfig:
    fields = {
        "data": f"{place.data}@labels=tags", "test": f"{place.test}@labels=tags", "multi_label": "|",
        "epochs": 1, **changes,
    }  # fmt: skip
    return place.config(out, method, **fields)


# --- the loss ---------------------------------------------------------------------------------


def test_the_loss_is_torchs_mean_over_labels_and_labelled_images() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 4), torch.randint(0, 2, (5, 4)).float()
    labels = torch.tensor([3, -1, 0, 2, -1])
    found = label_loss(logits, Batch(labels, torch.arange(5), targets=targets))
    wanted = functional.binary_cross_entropy_with_logits(logits[labels >= 0], targets[labels >= 0])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        found, torch.nn.MultiLabelSoftMarginLoss()(logits[labels >= 0], targets[labels >= 0])
    )
    smoothed = label_loss(logits, Batch(labels, torch.arange(5), targets=targets), 0.2)
    wanted = functional.binary_cross_entropy_with_logits(
        logits[labels >= 0], 0.8 * targets[labels >= 0] + 0.1
    )
    torch.testing.assert_close(smoothed, wanted)


def test_a_mixed_image_counts_for_the_labels_of_both() -> None:
    torch.manual_seed(1)
    logits, own, theirs = (
        torch.randn(3, 4),
        torch.randint(0, 2, (3, 4)).float(),
        torch.randint(0, 2, (3, 4)).float(),
    )
    share = torch.tensor([0.7, 1.0, 0.4])
    mixed = Mixed(torch.tensor([1, -1, 2]), share, theirs)
    found = label_loss(logits, Batch(torch.tensor([0, 1, 2]), torch.arange(3), targets=own, mixed=mixed))
    both = share[:, None] * own + (1 - share[:, None]) * theirs  # the loss is linear in its targets
    torch.testing.assert_close(found, functional.binary_cross_entropy_with_logits(logits, both))


def test_pieces_of_a_batch_keep_their_targets() -> None:
    targets, every = torch.eye(6), torch.arange(6)
    pixels, mixed = torch.zeros((6, 1, 1, 3), dtype=torch.uint8), Mixed(every, torch.ones(6), 1 - targets)
    piece = Batch(every, every, pixels=pixels, targets=targets, mixed=mixed).piece(1, 2)
    assert piece.targets is not None
    assert piece.mixed is not None
    assert piece.mixed.targets is not None
    assert torch.equal(piece.targets, targets[piece.index])
    assert torch.equal(piece.mixed.targets, 1 - targets[piece.index])


def test_labels_beside_consolidation_are_added_with_their_weight() -> None:
    torch.manual_seed(2)
    student = StudentOutput(torch.zeros(4, 1), {"label": torch.randn(4, 3), "proxy": torch.randn(4, 5)})
    said, labels = torch.randn(4, 3), torch.tensor([4, 0, -1, 2])
    objective = BesideLabels(Consolidation("gen", {"gen": 3}, {"gen": 1.0}), 5, 0.25, 0.1)
    assert objective.heads() == {"proxy": 5}
    assert objective.active() == ("label", "proxy")
    found = objective(student, {"gen": {"logits": said}}, Batch(labels, torch.arange(4)))
    soft = functional.cross_entropy(student.logits["label"] / 2, (said / 2).softmax(1))
    hard = functional.cross_entropy(student.logits["proxy"], labels, ignore_index=-1, label_smoothing=0.1)
    torch.testing.assert_close(found["loss"], soft + 0.25 * hard)
    torch.testing.assert_close(found["label"], hard)


# --- whole runs -------------------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn_on_the_exported_network(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config(
        place, "plain", epochs=3, validation=0.3, select="best", accumulate=2, recipe="mixup", batch_size=12
    )
    shown: list[torch.Tensor] = []
    forward = Student.forward

    def recorded(self: Student, images: torch.Tensor, *further: Any, **named: Any) -> StudentOutput:
        if torch.is_inference_mode_enabled():
            shown.append(images.clone())
        return forward(self, images, *further, **named)

    monkeypatch.setattr(Student, "forward", recorded)
    result = train_student(chosen)
    network = timm.create_model(f"local-dir:{chosen.out / 'export'}", pretrained=True).eval()
    names = open_model(f"local-dir:{chosen.out / 'export'}").class_names or ()
    assert sorted(names) == ["big", "odd", "warm"]
    data = open_data(f"{place.test}@labels=tags")
    with (Path(place.test) / "labels.csv").open() as file:
        tags = {row["key"]: row["tags"].split("|") for row in csv.DictReader(file)}
    labels = np.array([[name in tags[key] for name in names] for key in data.keys])
    with torch.inference_mode():
        logits = network(torch.cat(shown)[-len(data) :]).numpy()  # the test comes last
    assert result.test == pytest.approx(
        {
            "mAP": average_precision_score(labels, logits, average="macro"),
            "label_accuracy": 1 - hamming_loss(labels, logits > 0),
            "exact_match": accuracy_score(labels, logits > 0),
        }
    )
    assert {"val_mAP", "val_label_accuracy", "val_exact_match"} <= set(result.history[-1])
    assert result.details["validation"]["mAP"] == max(epoch["val_mAP"] for epoch in result.history)
    assert result.details["multi_label"] == "|"
    assert train_student(chosen) == result


def test_scores_of_logits() -> None:
    rng = np.random.default_rng(0)
    labels, logits = rng.random((50, 6)) < 0.3, rng.normal(size=(50, 6)).astype(np.float32)
    labels[:, 5] = False  # nothing to rank
    found = LabelScores(labels).of(logits)
    assert found["mAP"] == pytest.approx(
        average_precision_score(labels[:, :5], logits[:, :5], average="macro")
    )
    assert found["exact_match"] == pytest.approx(accuracy_score(labels, logits > 0))
    assert found["label_accuracy"] == pytest.approx(1 - hamming_loss(labels, logits > 0))


@pytest.mark.parametrize("method", ["distill-equal", "cd", "crd", "consolidation"])
def test_methods_that_may_learn_from_several_labels(place: Place, method: str) -> None:
    changes: dict[str, Any] = {"label_weight": 0.5} if method == "consolidation" else {}
    result = train_student(config(place, method, method, **changes))
    assert result.test is not None
    assert 0 <= result.test["mAP"] <= 1
    assert result.history[0]["label"] > 0
    if method == "consolidation":  # head 0 stays the generalist's, and is exported
        heads = load_file(place.root / method / "heads.safetensors")
        assert {name: len(heads[f"{name}.weight"]) for name in ("gen", "exp", "proxy")} == {
            "gen": 3, "exp": 5, "proxy": 3,
        }  # fmt: skip


def test_the_proxys_classes_get_a_head_that_is_tested_where_no_teacher_knows_them(place: Place) -> None:
    one = {"multi_label": None, "label_weight": 1.0, "generalist": "gen"}
    other = config(place, "x", "consolidation", **one, label_smoothing=0.1)
    plan = make_plan(other)
    assert plan.settings.label_smoothing == 0.1
    assert plan.identity()["label_weight"] == 1.0
    assert plan.classes.count == 3  # the generalist's
    assert plan.labels.count == len(open_data(f"{place.data}@labels=tags").class_names or ())
    ((_, head, data, labels),) = heads_to_test(plan)
    assert head == "proxy"
    np.testing.assert_array_equal(labels, labels_for(data, plan.labels))
    known = make_plan(place.config("y", "consolidation", test=place.test, label_weight=1.0))
    assert heads_to_test(known)[0][1] == "label"
    with pytest.raises(BadDataError, match="no labels"):
        make_plan(place.config("y", "consolidation", data=f"{place.data}@labels=none", label_weight=1.0))


def test_without_a_weight_no_label_is_looked_at(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(config(place, "x", "consolidation", generalist="gen"))
    assert plan.config.multi_label is None
    assert "consolidation does not use --multi-label" in capsys.readouterr().err
    assert find_method("consolidation").label_head(plan.setup.options) is None


def test_a_grid_chooses_by_map(place: Place) -> None:
    result = train_grid(config(place, "grid", lr_grid="0.001,0.003", validation=0.3, test=None))
    assert all(0 < one["mAP"] <= 1 for one in result.details["grid"])


def test_a_report_shows_map_and_keeps_it_apart_from_accuracy() -> None:
    def run(name: str, score: float, several: str | None) -> Run:
        test = (
            {"mAP": score, "label_accuracy": 0.75, "exact_match": 0.25}
            if several
            else {"top1": score, "top5": 1.0}
        )
        epoch = {
            "epoch": 1,
            "loss": 1.0,
            "label": 1.0,
            **{f"val_{key}": value for key, value in test.items()},
        }
        identity = {"test": {"keys": "k", "labels": "l", "location": "photos"}, "multi_label": several}
        return Run(name, None, {"method": "labels-only", "test": test}, identity, {}, (epoch,))

    runs = [run("worse", 0.5, "|"), run("better", 0.625, "|")]
    section = students_section(runs, "Students", "students")
    table = next(part for part in section.parts if isinstance(part, Table))
    shown = [[cell.text for cell in row] for row in table.rows]
    titles = [column.title for column in table.columns]
    assert [row[titles.index("Student")] for row in shown] == ["better", "worse"]
    assert [row[titles.index("Test mAP, %")] for row in shown] == ["62.5", "50.0"]
    assert shown[0][titles.index("All labels right, %")] == "25.0"
    assert "Test top-1, %" not in titles
    curves = curves_section({"photos": runs})
    assert curves is not None
    charts = {part.name: part for part in curves.parts if isinstance(part, Chart)}
    assert charts["validation-mAP-curves"].caption == "Mean average precision (validation) over the epochs."
    assert [mark.text for mark in charts["curves-1"].legend] == ["loss", "label"]
    with pytest.raises(BadDataError, match="different test sets"):
        by_test([*runs, run("one class", 0.9, None)], separate=False)


# --- refusals ---------------------------------------------------------------------------------


def test_methods_of_one_class_an_image_refuse_several_labels(place: Place) -> None:
    with pytest.raises(UsageError, match="xe-kl learns one class an image") as caught:
        make_plan(config(place, "x", "xe-kl", teacher=("gen",)))
    assert "labels-only" in caught.value.hint
    with pytest.raises(UsageError, match="mlfd learns one class"):
        make_plan(config(place, "x", "mlfd", teacher=("gen",), levels="none"))
    with pytest.raises(UsageError, match="kl learns one class"):  # teachers of combinations are no reason
        make_plan(config(place, "x", "kl", teacher=("gen",)))
    softmaxed = {"xe-kl", "kl-ls", "mcl", "dp", "mlfd", "fixmatch", "multi-task", "replay-oracle"}
    assert softmaxed <= set(METHODS)
    assert not softmaxed & set(method_names("several_labels"))


def test_what_has_no_labels_to_separate_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadDataError, match="no training image"):
        make_plan_and_heads(
            config(place, "x", data=f"{place.data}@labels=tags,classes=except:warm|big|odd+warm|big")
        )
    with pytest.raises(ConfigError, match="--sequential compares classes"):
        config(place, "x", "xe-kl", sequential="given")
    console._warned.clear()
    make_plan(config(place, "x", data=place.data, test=None))
    assert "each image has one label" in capsys.readouterr().err


def make_plan_and_heads(chosen: StudentConfig) -> None:
    heads_to_test(make_plan(chosen))
