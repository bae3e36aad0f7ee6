"""P4's recipe: every number against the paper's words, every network by name, every command by kd itself."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lab import p4
from lab.__main__ import main
from lab.places import places_of
from lab.settings import RECIPES, Settings, read_settings
from lab.steps import Lab, Step
from lab.tables import read_printed
from recipe_tools import run_tiny
from torch.utils.flop_counter import FlopCounterMode

from kdcli.models.fused import FusionSpec, JointTeacher, Parent
from kdcli.reading_yaml import read_yaml

FOLDER = RECIPES / "p4"
SETS = ("cifar100", "tinyimagenet", "sketch")

EQUATION = (
    "\\mathcal{L}_{\\text{KD}} = \\mathcal{L}_{\\text{CE}}(y_j^i, s_j) + \\alpha \\cdot "
    "\\mathcal{L}_{\\text{CE}}^{\\mathbf{T}_*}(t_j, s_j) + \\sum_{c=1}^k \\beta_c \\cdot "
    "\\mathcal{L}_{\\text{MSE}}^{\\mathbf{T}_*}"
)
TUPLES = (
    "contains three models, namely a ResNet-18 [12] trained on CIFAR-100, an EfficientNet-B0 [33] trained on "
    "TinyImageNet, and a SEResNeXt-26D [14] trained on ImageNet-Sketch.  $\\mathcal{T}_2$  contains a different lineup "
    "of models, namely a ConvNeXt-V2 Tiny [39] trained on CIFAR-100, a SwinTransformer-V2 Tiny [25] trained on "
    "TinyImageNet, and a FastViT SA24 [35] trained on ImageNet-Sketch"
)
EPOCHS = "All models are trained for 200 epochs on images with a resolution of  $224 \\times 224$  pixels"

# Setting, value, and the paper's words as its text has them; Table 1's numbers are below.
PAPER: list[tuple[str, Any, str]] = [
    ("tuples",
     {"t1": {"cifar100": "resnet18", "tinyimagenet": "efficientnet_b0", "sketch": "seresnext26d_32x4d"},
      "t2": {"cifar100": "convnextv2_tiny", "tinyimagenet": "swinv2_tiny_window8_256", "sketch": "fastvit_sa24"}},
     TUPLES),
    ("levels", {"t1": ["L1", "L2", "L3", "L4"], "t2": ["L1", "L2"]},
     "using models in the set  $\\mathcal{T}_1$ . We evaluate the performance of the joint teachers considering "
     "representation levels"),
    ("student_levels", ["L1", "L2"],
     "our student models yield an average improvement of 3.4% when the distillation uses a single "
     "representation level ( $\\mathbf{L}_1$ ), and 6.1% when the distillation is performed at two representation "
     "levels ( $\\mathbf{L}_2$ )"),
    ("baselines", {"multi-head": "separate", "joint-head": "joint"},
     "we propose an architecture composed of a shared backbone and an independent prediction head for each dataset"),
    ("train.epochs", 200, EPOCHS),
    ("train.init", "xavier", "initialize weights of teacher  $\\mathbf{T}_i$  using Xavier [11]"),
    ("train.recipe", "autoaugment", "AutoAugment [6] with ImageNet policy for augmentation"),
    ("train.schedule", "constant",
     "we either maintain the learning rate constant or employ a one-cycle learning rate procedure with the final "
     "learning rate having the same value as the constant one"),
    ("t1.image_size", 224, EPOCHS),
    ("t1.optimizer", "adam", "using the Adam optimizer [16] with weight decay for regularization"),
    ("t2.image_size", 256, "we use  $256 \\times 256$  input images for all models in  $\\mathcal{T}_2$"),
    ("t2.optimizer", "adamw", "The models in  $\\mathcal{T}_2$  are trained with AdamW [27] and weight decay"),
    ("t2.label_smoothing", 0.1, "adding stochastic depth, label smoothing, and dropout in the final layers"),
    ("cache.views", "eval",
     "we cache the embeddings from the layers at index  $l_1$  of the individual teachers, before training the joint "
     "teacher model"),
    ("joint.heads", "shared", "The joint teacher is trained on all datasets  $D_1, D_2, \\dots, D_m$"),
    ("joint.dropout", 0.8, "dropout with a probability ranging between 0.8 and 0.9"),
    ("student.loss_convention", "paper", EQUATION),
    ("student.teacher_view", "eval", "gradient accumulation, mixed precision, and offline distillation"),
]  # fmt: skip
DATA = {  # images of both parts, classes, and the words
    "cifar100": (50_000, 10_000, 100,
                 "We use the official split with 500 training images and 100 testing images per class, for a total of "
                 "50,000 training images and 10,000 test images"),
    "tinyimagenet": (100_000, 10_000, 200, "containing 100,000 training images from 200 object classes"),
    "sketch": (41_088, 10_752, 1000, "The dataset comprises 41,088 training images and 10,752 test images"),
}  # fmt: skip

TABLE1 = """
ResNet-18	1e-4	768	0	-	0.001	2	0.6, 0.2, 0.2
EfficientNet-B0	1e-4	240	0.2	0.2	0.001	2	0.6, 0.2, 0.2
SEResNeXt-26D	1e-4	192	0	-	0.001	2	0.6, 0.2, 0.2
ConvNeXt-V2 Tiny	1e-5	96	0.6	-	0.5	5	0.6, 0.2, 0.2
SwinTransformer-V2 Tiny	4e-4	176	0.6	-	0.5	2	0.6, 0.2, 0.2
FastViT SA24	1e-4	102	0.3	0.2	0.5	2	0.4, 0.4, 0.2
"""
ROWS = ("dataset-specific", "multi-head", "joint-head", "student/L1", "student/L2", "joint/L1", "joint/L2")
TABLE2 = """
Dataset-specific models	-	55.07	81.62	45.09	70.52	49.67	71.39
Multi-head model	-	36.61	65.00	35.26	63.64	21.19	43.47
Joint-head model	-	59.46	85.98	45.13	73.09	41.59	66.79
Students (our)	$L_1$	58.65	83.97	50.86	76.07	51.64	72.81
	$L_2$	62.25	84.64	51.61	76.46	61.31	78.36
Joint teacher (ours)	$L_1$	61.00	85.44	46.97	72.53	56.35	75.60
	$L_2$	63.34	87.03	47.78	71.71	61.45	79.38
"""
TABLE3 = """
Dataset-specific models	-	65.50	87.00	62.91	83.66	67.36	81.59
Multi-head model	-	65.12	88.66	56.66	81.37	38.07	62.12
Joint-head model	-	64.43	88.48	55.52	79.94	63.40	78.78
Students (our)	$\\mathbf{L}_1$	68.81	90.79	66.78	87.10	69.31	84.79
	$\\mathbf{L}_2$	71.23	91.73	66.30	86.84	69.53	84.13
Joint teacher (ours)	$\\mathbf{L}_1$	67.64	89.81	64.08	85.44	68.30	82.90
	$\\mathbf{L}_2$	70.16	88.99	65.02	84.08	68.35	82.69
"""
TABLE4 = """
Dataset-specific models	-	55.07	81.62	45.09	70.52	49.67	71.39
Joint teacher	$\\mathbf{L}_1$	60.90	84.56	47.10	72.43	54.85	75.20
	$\\mathbf{L}_2$	62.28	85.75	47.52	73.24	61.81	78.94
	$\\mathbf{L}_3$	62.12	85.71	44.10	70.40	55.72	76.28
	$\\mathbf{L}_4$	48.65	78.78	29.93	58.01	30.69	47.50
"""
CLAIMS = (
    "an average improvement of 3.4% when the distillation uses a single representation level",
    "and 6.1% when the distillation is performed at two representation levels",
    "The improvements range between 2% and 12%",
    "with average improvements ranging between 5% and 27% in favor of our method",
    "with an average performance gain of 1%",
)
ALIKE = (
    "student", "model-arg", "init", "epochs", "batch-size", "lr", "weight-decay", "optimizer", "schedule", "warmup",
    "label-smoothing", "recipe", "image-size", "select", "seed", "test",
)  # fmt: skip
"""Options in which a student is its data-set-specific model."""


def _numbers(line: str) -> list[float]:
    return [float(word) for word in line.split("\t") if re.fullmatch(r"\d+\.\d\d", word)]


def _steps(settings: Settings) -> dict[str, Step]:
    steps = p4.steps(Lab(settings, places_of(settings).stand_ins(), Path("/out")))
    return {step.name: step for step in steps}


def _option(step: Step, name: str) -> list[str]:
    return [step.words[place + 1] for place, word in enumerate(step.words) if word == f"--{name}"]


def test_every_setting_is_the_papers_or_says_why_it_is_ours() -> None:
    settings = read_settings(FOLDER / "recipe.yaml")
    printed = {name: each for name, each in settings.settings.items() if each.paper}
    expected = {(name, json.dumps(value), quote) for name, value, quote in PAPER}
    apart = {"networks", *(f"data.{name}" for name in DATA)}
    own = {(n, json.dumps(each.value), each.quote) for n, each in printed.items() if n not in apart}
    assert own == expected
    assert apart < set(printed)
    assert all(each.ours for name, each in settings.settings.items() if name not in printed)
    for name, (train, test, classes, quote) in DATA.items():
        each = settings.settings[f"data.{name}"]
        assert each.value["images"] == {"train": train, "test": test}
        assert (each.value["classes"], each.quote) == (classes, quote)


def test_table_1_is_as_printed() -> None:
    settings = read_settings(FOLDER / "recipe.yaml")
    names = [name for networks in settings["tuples"].values() for name in networks.values()]
    for name, line in zip(names, TABLE1.strip().splitlines(), strict=True):
        _, *numbers, coefficients = line.split("\t")
        own = settings["networks"][name]
        fields = ("lr", "batch_size", "drop_path_rate", "drop_rate", "weight_decay", "temperature")
        assert [own[field] for field in fields] == [None if n == "-" else float(n) for n in numbers]
        assert own["coefficients"] == [float(number) for number in coefficients.split(", ")]


def test_the_quotes_are_in_the_papers_text() -> None:
    """Where the text is at hand: KD_PAPERS is a folder with it; else that quotes and tables agree is all."""
    settings = read_settings(FOLDER / "recipe.yaml").settings
    quotes = [*(each.quote for each in settings.values() if each.quote), *CLAIMS]
    tables = [line for table in (TABLE2, TABLE3, TABLE4) for line in table.strip().splitlines()]
    folder = os.environ.get("KD_PAPERS")
    text = Path(folder, "P4-mlfd.txt").read_text() if folder else "\n".join((*quotes, TABLE1, *tables))
    assert not [quote for quote in quotes if quote not in text]
    lines = [re.sub("</?b>", "", line) for line in text.splitlines()]
    plain = [_numbers(line) for line in lines]
    assert not [line for line in tables if _numbers(line) not in plain]
    assert not [line for line in TABLE1.strip().splitlines() if line not in lines]


@pytest.mark.parametrize(
    ("name", "rows", "text"),
    [
        ("P4-2", ROWS, TABLE2),
        ("P4-3", ROWS, TABLE3),
        ("P4-4", ("dataset-specific", "joint/L1", "joint/L2", "joint/L3", "joint/L4"), TABLE4),
    ],
)
def test_tables_are_as_printed(name: str, rows: tuple[str, ...], text: str) -> None:
    table = read_printed(FOLDER / "printed.yaml")[name]
    assert table.columns == tuple(f"{data}/{what}" for data in SETS for what in ("acc1", "acc5"))
    assert dict(table.rows) == dict(zip(rows, map(_numbers, text.strip("\n").splitlines()), strict=True))


def test_the_claims_of_the_text_follow_from_the_printed_tables() -> None:
    tables = read_printed(FOLDER / "printed.yaml")
    as_measured = {
        name: {
            (row, column): value
            for row, values in tables[name].rows.items()
            for column, value in zip(tables[name].columns, values, strict=True)
            if value is not None
        }
        for name in ("P4-2", "P4-3")
    }
    tuples = {"t1": SETS, "t2": SETS}
    found = p4.claims(as_measured, tuples)
    assert {row for row, _ in found} == set(tables["P4-T"].rows)
    for (row, column), value in found.items():
        printed = tables["P4-T"].value(row, column)
        assert printed is not None
        assert value == pytest.approx(printed, abs=0.05 if printed in (3.4, 6.1) else 0.5)
    del as_measured["P4-3"]["multi-head", "sketch/acc1"]
    assert p4.claims(as_measured, tuples) == {}


def test_each_level_has_its_coefficient() -> None:
    """Table 1: alpha of the outputs, then beta of the map where there is one, and of the embedding."""
    steps = _steps(read_settings(FOLDER / "recipe.yaml"))
    (text,) = steps["t2/seed0/students/sketch"].files.values()
    one, two = json.loads(text)["students"].values()
    assert (one["distill_weight"], one["level_weight"], one["levels"]) == (0.4, [0.4], "features")
    assert (two["distill_weight"], two["level_weight"], two["levels"]) == (0.4, [0.2, 0.4], "all")
    assert (two["teacher"], two["teacher_tap"], two["student_tap"]) == (["joint-L2"], ["fused"], ["stages.3"])


def test_a_student_is_trained_as_its_data_set_specific_model() -> None:
    """Architecture and numbers: the difference of their accuracies is to be of what is distilled."""
    steps = _steps(read_settings(FOLDER / "recipe.yaml"))
    for name in ("t1", "t2"):
        for data in SETS:
            expert, student = (steps[f"{name}/seed0/{kind}/{data}"] for kind in ("expert", "students"))
            for option in ALIKE:
                assert _option(expert, option) == _option(student, option), option
    assert _option(steps["t1/seed0/expert/tinyimagenet"], "model-arg") == [
        "drop_path_rate=0.2",
        "drop_rate=0.2",
    ]
    assert _option(steps["t1/seed0/expert/cifar100"], "model-arg") == []


def test_joint_teachers_fuse_what_is_cached_and_students_read_what_they_write() -> None:
    steps = _steps(read_settings(FOLDER / "recipe.yaml"))
    assert sorted(step.kind for step in steps.values()).count("cache") == 2 * 3 * 2 * 2
    for name, levels in (("t1", "L4"), ("t2", "L2")):
        joint = steps[f"{name}/seed0/joint/{levels}"]
        read = {*_option(joint, "cache"), *_option(joint, "test")}
        caches = [step for step in steps.values() if step.kind == "cache" and step.name.startswith(name)]
        assert {path for step in caches for path in _option(step, "cache")} == read
        assert set(joint.needs) == {step.name for step in caches}
        kept = {word.partition("=")[0] for step in caches for word in _option(step, "teacher")}
        assert kept == set(_option(joint, "teacher"))
    assert _option(steps["t1/seed0/joint/L4"], "map-channels") == ["512,512,512"]
    assert {name for name, step in steps.items() if _option(step, "write-back")} == {
        f"{name}/seed0/joint/{levels}" for name in ("t1", "t2") for levels in ("L1", "L2")
    }
    keeps = {word for step in steps.values() for word in _option(step, "keep")}
    assert "features,maps:layer4,layer3,layer2" in keeps
    assert "features,maps:layers.3" in keeps


def test_every_network_has_the_maps_of_its_levels_and_the_arithmetic_that_is_counted() -> None:
    settings = read_settings(FOLDER / "recipe.yaml")
    for name, networks in settings["tuples"].items():
        side, widths = settings[f"{name}.image_size"], []
        for network in networks.values():
            with torch.device("meta"):
                model = timm.create_model(network).eval()
                image = torch.zeros(1, 3, side, side)
            taps = {each["module"]: (each["num_chs"], each["reduction"]) for each in model.feature_info}
            own = [taps[tap] for tap in settings["taps"][network]]
            assert [stride for _, stride in own] == [32, 16, 8]
            widths.append([model.num_features, *(channels for channels, _ in own)])
            with FlopCounterMode(display=False) as count, torch.no_grad():
                model(image)
            assert count.get_total_flops() / 2e9 == pytest.approx(settings["gmacs"][network], abs=0.006)
        for depth, levels in enumerate(settings["levels"][name]):
            size = (side // (64 >> depth),) * 2 if depth else None
            parents = tuple(Parent(str(n), each[depth], size) for n, each in enumerate(widths))
            options = {
                "space": settings["joint.space"],
                "map_channels": (settings["joint.map_channels"],) * depth,
            }
            with torch.device("meta"):
                joint = JointTeacher(FusionSpec(levels, parents, {"sketch": 1000}, **options)).eval()
                inputs = [torch.zeros(1, each[depth], *(size or ())) for each in widths]
            with FlopCounterMode(display=False) as count, torch.no_grad():
                joint(inputs, "sketch")
            counted = settings["joint_gmacs"][name][levels]
            assert count.get_total_flops() / 2e9 == pytest.approx(counted, rel=0.01)


def test_the_tiny_form_has_the_steps_of_the_whole() -> None:
    settings = read_settings(FOLDER / "recipe.yaml", tiny=True)
    names = {network for own in settings["tuples"].values() for network in own.values()}
    assert names <= set(timm.list_models("test_*"))
    tiny, whole = _steps(settings), _steps(read_settings(FOLDER / "recipe.yaml"))
    assert [name for name in whole if "sketch" not in name and name not in tiny] == [
        f"t2/seed0/cache/{data}-{split}-1" for data in SETS[:2] for split in ("train", "test")
    ]
    assert set(tiny) <= set(whole)


def test_every_command_of_the_full_size_is_one_that_kd_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["p4", "--out", str(tmp_path), "--dry-run", "--stand-ins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (3 + 2 + 12 + 3 + 1) + 4 + 2
    assert all(" kd " in line for line in lines)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_the_tiny_form_runs_whole_and_goes_on(tmp_path: Path) -> None:
    values = run_tiny("p4", tmp_path / "p4")
    sets = tuple(read_yaml(FOLDER / "recipe.yaml")["tiny"]["tuples"]["t1"])
    for (table, row, column), cell in values.items():  # everything but the set that the tiny form leaves out
        here = any(name in f"{row} {column}" for name in sets)
        assert (cell["measured"] is not None) == (here and table != "P4-T"), (table, row, column)
    runs = tmp_path / "p4/runs/t1/seed0"
    student = json.loads((runs / "students/cifar100/L2/result.json").read_text())
    cell = values["P4-2", "student/L2", "cifar100/acc1"]
    assert cell["measured"] == 100 * student["test"]["top1"]
    assert cell["difference"] == cell["measured"] - 62.25
    epochs = [json.loads(line) for line in (runs / "joint/L3/metrics.jsonl").read_text().splitlines()]
    best = max(epochs, key=lambda epoch: epoch["test_top1"])
    assert values["P4-4", "joint/L3", "tinyimagenet/acc5"]["measured"] == 100 * best["test_top5/tinyimagenet"]
    last = values["P4-F4", "joint/L3 tinyimagenet", "100%"]
    assert last["measured"] == 100 * epochs[-1]["test_top1/tinyimagenet"]
