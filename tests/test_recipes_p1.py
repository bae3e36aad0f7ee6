"""P1's recipe: every number against the paper's words, every network by name, every command by kd itself."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from lab import p1
from lab.__main__ import main
from lab.p1.experts import Sources, experts
from lab.p1.judging import Judging
from lab.p1.students import Students
from lab.p1.tables import TALLIES, tallies
from lab.places import places_of
from lab.settings import RECIPES, Settings, read_settings
from lab.steps import Lab, Step
from lab.tables import read_printed

from kdcli.reading_yaml import read_yaml

FOLDER = RECIPES / "p1"
TARGETS = (
    "cars",
    "resisc",
    "ifood",
    "food101",
    "ifashion",
    "dtd",
    "flowers",
    "caltech",
    "birds",
    "aircrafts",
)
PLACES = ("§2", "§3", "§4, Exp. 0", "§4, Exp. 2", "§4, Exp. 3", "§4, Exp. 4", "Fig. 2", "appendix A",
          "Table 3", "Table 4", "Table 5", "Table 6", "Table 7")  # fmt: skip

# What the paper prints, as its text has it, and the settings that are made of it.
SGD = "we use SGD with momentum of 0.9, weight decay of $10^{-4}$, a batch size of 32"
DECAY = "Unless noted, we use a learning rate decay of 0.1 at 50% and 80% of total training"
EXPERTS = ("by fine-tuning 120 epochs (learning rate decay at 70th and 100th epoch) while doing a log-scale grid search on "
           "the learning rate")  # fmt: skip
RATES = "We use a fixed learning rate of 0.01 for each $h_s^i$ and 0.001 for $\\phi_s$, and a schedule of 40 epochs"
FROZEN = "we freeze batchnorm statistics during distill/consolidation/MTL"
FIFTY = "we run a log-scale grid search of learning rate with a 50 epoch schedule"
PAPER = {
    "train.optimizer": ("momentum", SGD),
    "train.weight_decay": (1e-4, SGD),
    "train.batch_size": (32, SGD),
    "train.schedule": ("step", DECAY),
    "distill.milestones": ("0.5,0.8", DECAY),
    "expert.epochs": (120, EXPERTS),
    "expert.milestones": ("0.58333,0.83333", EXPERTS),
    "expert.lr_grid": ("0.0001,0.001,0.01,0.1", EXPERTS),
    "expert.bn": ("train", FROZEN),
    "distill.lr": (0.01, RATES),
    "distill.backbone_lr_scale": (0.1, RATES),
    "distill.epochs": (40, RATES),
    "distill.bn": ("frozen", FROZEN),
    "loss.temperature": (2, "cross-entropy with temperature T = 2"),
    "loss.generalist_weight": (
        1, "we simply set the loss weights $\\lambda_0 = 1$ and $\\lambda_i = \\frac{1}{N}$ for $1 \\le i \\le N$"),
    "probe.shots": (5, "where we randomly sample 5 training images from each available class"),
    "probe.draws": (50, "few-shot performance averaged over 50 random subsampling trials"),
    "probe.folds": (5, "search $h_d^j$'s SVM hyperparameters using a 5-fold cross-validation in scikit-learn"),
    "probe.protocol": ("svm", "train a 5-shot linear SVM as $h_d^j$ over fixed $\\phi$"),
    "finetune.epochs": (50, FIFTY),
    "finetune.lr_grid": ("0.0001,0.001,0.01,0.1", FIFTY),
    "ifashion_shots": (143, "we randomly subsample 1000 images for downstream training"),
    "diverse_epochs": (10, "(Places+iNat+logo2k+ImNet proxy 10 epochs)"),
    "diverse": (["places", "inat", "logo2k", "imagenet"], "(Places+iNat+logo2k+ImNet proxy 10 epochs)"),
    "generalist": ("resnet50", "merge these models with a ResNet50 generalist teacher"),
    "fives": (
        {"of": ["cars", "ifood"], "parts": [0, 1, 2, 3, 4], "architectures": ["resnet18", "resnet50"]},
        'we split the "t-split" of Cars196 and iFood into five random splits containing 10% of the original classes. '
        "We train a ResNet18 teacher on each of the five splits"),
    "old_task": (
        ["ifood", "resisc"],
        "we use either iFood or Resisc45 (t-split) as $D_t^1$ to train teachers, and run distillation/consolidation with N = 1"),
    "related": (
        {name: [name] for name in TARGETS if name != "food101"}
        | {"ifood": ["ifood", "food101"], "inat": ["flowers", "birds"]},
        "iFood and Food101 are the same domain, and Birds and Flowers are subdomains of iNaturalist"),
    "whole": (
        ["food101", "ifashion_category", "ifashion_sleeve"],
        "Except for Food101 and iFashion, we split each dataset at random into two disjoint sets which each contain only 50% "
        "of the classes"),
    "targets": (list(TARGETS), "Comparing different representations on ten downstream tasks"),
    "experts": (["cars", "resisc", "ifood", "ifashion", "dtd", "flowers", "caltech", "birds", "aircrafts", "inat"],
                "All 10 $\\mathcal{D}_t^i$ cases"),
}  # fmt: skip

# Tables 4 to 7, line by line as the text has them, which was read from a picture of the paper.
LINES = (Path(__file__).parent / "p1_tables.tsv").read_text(encoding="utf-8").splitlines()
TASKS = {"Cars196": "cars", "Resisc45": "resisc", "iFood": "ifood", "iFashion": "ifashion", "DTD": "dtd",
         "Flowers": "flowers", "Caltech256": "caltech", "Birds": "birds", "Aircrafts": "aircrafts",
         "iNaturalist": "inat"}  # fmt: skip
KINDS = {"KD": "kd", "CRD": "crd", "repr. consolid. KD": "ours-kd", "repr. consolid. CRD": "ours-crd",
         "MTL oracle": "mtl", "repr. consolid.": "ours-kd", "trad. distill": "kd", "teacher": "teacher",
         "repr. consolid. KD old:new = 1:1": "ours-kd", "repr. consolid. KD old:new = 1:3": "ours-kd-1to3",
         "repr. consolid. KD old:new = 3:1": "ours-kd-3to1"}  # fmt: skip
PROXIES = {"ImNet proxy": ("", ""), "Places proxy": ("places/", ""), "Places proxy + label": ("places/", "-labels"),
           "iNaturalist proxy": ("inat/", "")}  # fmt: skip
THREE = "Cars196 + Resisc45 + iFood (t-split) "
UNREADABLE = {("dtd/kd", "dtd"), ("dtd/kd", "caltech")}
"""Of these rows the text has one cell twice, as 46.80 and 40.80: the other may be as wrong."""


def _row(text: str, table: int) -> str | None:
    """The recipe's row of a name in the text; None of one that was not read well, or is two names."""
    text = text.replace("consolid,", "consolid.")
    if text.startswith("ImageNet-pretrained") and text.partition("-pretrained")[2] in (
        " model",
        ", soft-label",
    ):
        return "imagenet" if text.endswith("model") else "soft-label"
    if text.startswith(THREE):  # Table 4 has them again, of the many proxies that are named behind the second
        kind = text.removeprefix(THREE).removesuffix(" (Places+iNat+logo2k+ImNet proxy 10 epochs)")
        return f"{'diverse/' if table == 4 else ''}multi/{KINDS[kind]}" if kind in KINDS else None
    if found := re.fullmatch(r"(Cars196|iFood) 10% classes( x 5)?( \(Res18\))? (.+)", text):
        task, five, small, kind = found.groups()
        name = f"{TASKS[task]}-fives-resnet{18 if small else 50}/{'' if five else 'one-'}"
        return name + KINDS[kind] if kind in KINDS else None
    found = re.fullmatch(
        r"(\w+) (?:\(t-split\)|\(?category task\)?) (.+?)(?: \(([^()]+ proxy[^()]*)\))?", text
    )
    if not found or found[1] not in TASKS or found[2] not in KINDS:
        return None
    before, behind = PROXIES[found[3] or "ImNet proxy"]
    return f"{before}{TASKS[found[1]]}/{KINDS[found[2]]}{behind}"


def _rows(text: str, table: int) -> list[str]:
    """One row, or two whose names the text has in one cell; none where a name was not read well."""
    if row := _row(text, table):
        return [row]
    words = text.split(" ")
    cuts = [(" ".join(words[:at]), " ".join(words[at:])) for at in range(1, len(words))]
    return next(([a, b] for x, y in cuts if (a := _row(x, table)) and (b := _row(y, table))), [])


def _values(cell: str) -> list[float]:
    """Numbers of two decimals; a blank may stand for the point. None where anything else is there."""
    numbers = re.findall(r"\d\d?[. ]\d\d(?!\d)", cell)
    if " ".join(numbers) != cell or any(number.startswith("0") for number in numbers):
        return []
    return [float(number.replace(" ", ".")) for number in numbers]


def _lines() -> Iterator[tuple[int, str, list[str]]]:
    """Table, name, and cells of each line."""
    table = 0
    for line in LINES:
        name, *cells = line.split("\t")
        if not cells:
            table = int(name.removeprefix("Table "))
        elif name:
            yield table, name, cells


def legible() -> dict[int, dict[str, list[float | None]]]:
    """What can be read without a doubt, by table.

    Not where a cell has another count of numbers than the line has names: then nobody knows whose they are.
    """
    found: dict[int, dict[str, list[float | None]]] = {}
    columns = read_printed(FOLDER / "printed.yaml")["P1-4"].columns
    for table, name, cells in _lines():
        rows, values = _rows(name, table), [_values(cell) for cell in cells]
        if len(rows) == 1 and any(len(each) > 1 for each in values):
            continue  # another line, without a name, is in it
        for number, row in enumerate(rows):
            own = [each[number] if len(each) == len(rows) else None for each in values]
            if table == 4:
                own = [
                    None if (row, column) in UNREADABLE else value
                    for value, column in zip(own, columns, strict=True)
                ]
            found.setdefault(table, {})[row] = own
    return found
