"""Which of timm's classifiers kd opens as teachers and trains as students.

    python benchmarks/coverage.py [--quick] [--json] [--sample N] [--seed S] [--parameters MILLIONS]

Of N architectures drawn from ``timm.list_models()`` those with a classifier are opened one at a time, with random
weights, at their own input size. Counted are those whose logits are bit for bit what the network itself gives; whose
features are what its ``forward_head(pre_logits=True)`` gives, [b, d]; and those that make a student: its own
classifier and one more head, exported, reopened by kd and by ``timm.create_model("local-dir:")`` with equal logits.

Architectures of more parameters than ``--parameters`` are left out, and their number is told: they differ in width
and depth from those that are opened, seldom in kind. ``--quick`` opens twelve of at most 8 million.
"""

import argparse
import gc
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from measuring import Figures, benchmark, figure, parser_of, say

from kdcli.errors import KdError
from kdcli.models.export import export_model
from kdcli.models.network import nearly_equal, synthetic_image
from kdcli.models.spec import Model, open_model
from kdcli.models.student import LABEL_HEAD, Student

GOALS = {"logits": 99.0, "features": 97.0, "student": 97.0}


def size_of(name: str) -> tuple[int, int]:
    """Classes and parameters of an architecture; it is built without memory."""
    with torch.device("meta"):
        network: Any = timm.create_model(name)
    return int(getattr(network, "num_classes", 0) or 0), sum(each.numel() for each in network.parameters())


@torch.inference_mode()
def as_teacher(model: Model, images: torch.Tensor) -> set[str]:
    """Which of its outputs are the network's own."""
    plain: Any = model.network.plain.eval()
    right = set()
    if torch.equal(model.network.outputs(images, ("logits",))["logits"], plain(images)):
        right.add("logits")
    if model.num_features:
        features = model.network.outputs(images, ("features",))["features"]
        both = model.network.outputs(images, ("features", "logits"))
        own = plain.forward_head(plain.forward_features(images), pre_logits=True)
        same = torch.equal(features, own) and torch.equal(both["features"], own)
        if same and features.shape == (1, model.num_features) and nearly_equal(both["logits"], plain(images)):
            right.add("features")
    return right


def as_student(model: Model, images: torch.Tensor) -> bool:
    """Whether it trains with a further head, and its export is the same network in kd and in timm."""
    student = Student(model, {"more": 2} if model.num_features else {}).eval()
    with torch.inference_mode():
        found, wanted = student(images), model.network.plain(images)
    if not nearly_equal(found.logits[LABEL_HEAD], wanted) or not model.num_features:
        return False
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, Path(folder), None)
        for network in (
            lambda: open_model(f"local-dir:{folder}").network,
            lambda: timm.create_model(f"local-dir:{folder}", pretrained=True).eval(),
        ):
            with torch.inference_mode():
                if not torch.equal(network()(images), wanted):
                    return False
            gc.collect()
    return True


def judge(name: str) -> tuple[set[str], str]:
    """What an architecture serves as, and what kept it from the rest."""
    torch.manual_seed(0)
    try:
        model = open_model(name, weights="random")
        images = synthetic_image(model.preprocess.size)
        right = as_teacher(model, images)
        if as_student(model, images):
            right.add("student")
    except KdError as error:
        return set(), error.message
    except Exception as error:  # a library's code, which may raise anything: it counts as not served
        return set(), f"{type(error).__name__}: {error}".splitlines()[0]
    return right, model.network.without


def figures(options: argparse.Namespace) -> Figures:
    """Shares of what was opened, in percent."""
    warnings.filterwarnings("ignore")
    sample, limit = (12, 8.0) if options.quick else (options.sample, options.parameters)
    names = timm.list_models()
    random.Random(options.seed).shuffle(names)
    counts = dict.fromkeys(GOALS, 0)
    opened = headless = large = 0
    for name in names:
        if opened == sample or (not options.quick and opened + headless + large == sample):
            break
        classes, parameters = size_of(name)
        if not classes or parameters > limit * 1e6:
            headless, large = headless + (not classes), large + bool(classes)
            continue
        start = time.perf_counter()
        right, why = judge(name)
        opened += 1
        for kind in right:
            counts[kind] += 1
        lacks = f": no {', '.join(sorted(set(GOALS) - right))} ({why})" if right != set(GOALS) else ""
        say(f"{opened:4d} {name} {parameters / 1e6:.1f} M, {time.perf_counter() - start:.1f} s{lacks}")
        gc.collect()
    say(f"left out: {headless} without a classifier, {large} above {limit:g} M parameters")
    what = f"of {opened} architectures that were opened, {large} above {limit:g} M parameters left out"
    return {
        f"opens_{kind}": figure(100 * counts[kind] / max(opened, 1), goal, "%", what)
        for kind, goal in GOALS.items()
    }


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parameters", type=float, default=400.0, metavar="MILLIONS")
    benchmark(__doc__, figures, ("torch", "timm"), parser)
