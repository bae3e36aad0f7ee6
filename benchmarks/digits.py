"""Whether a student of kd is as good as one of other loops: digits, one teacher, three seeds, and no geometry option.

    python benchmarks/digits.py [--quick] [--json]

scikit-learn's 1,797 digits at 32 px, a fifth of them held out. A resnet10t learns from the labels; its logits are
cached once, for view 0; a resnet10t learns by xe-kl from the cache. Beside it the same student, teacher, optimiser,
rate and number of epochs in two loops: ``timm.task.LogitDistillationTask`` with the teacher live, and plain torch.
Both rivals train and test on the whole 32 px; kd tests by timm's own pipeline on its export. Accuracies are means over
the seeds. ``--quick`` takes one seed and two epochs, and then means little.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from measuring import Figures, benchmark, figure, say
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # timm does not declare it
from timm.task.distillation import LogitDistillationTask
from torch import nn
from torch.nn import functional as F

from kdcli.extract import cache_teachers
from kdcli.extract.config import CacheConfig
from kdcli.training.config import StudentConfig
from kdcli.training.train import train_student

SIZE, LR, BATCH, WEIGHT_DECAY = 32, 1e-3, 64, 0.01
TEMPERATURE, SHARE = 4.0, 0.5
STUDENT = "resnet10t"


def save_digits(root: Path) -> dict[str, list[tuple[Path, int]]]:
    """The digits as PNG files in folders by class, train and test."""
    digits = load_digits()
    rows = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
    )
    saved: dict[str, list[tuple[Path, int]]] = {}
    for part, chosen in zip(("train", "test"), rows, strict=True):
        for row in sorted(chosen.tolist()):
            folder = root / part / str(digits.target[row])
            folder.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[row] * 255 / 16).round().astype(np.uint8)
            image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
            image.save(folder / f"{row:04}.png")
            saved.setdefault(part, []).append((folder / f"{row:04}.png", int(digits.target[row])))
    return saved


def by_timm(export: Path, images: list[tuple[Path, int]]) -> float:
    """Accuracy of an export as timm would validate it, with the geometry that its config.json declares."""
    network = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(pretrained_cfg=network.pretrained_cfg))
    return accuracy(network, torch.stack([transform(Image.open(path)) for path, _ in images]), images)


@torch.inference_mode()
def accuracy(network: nn.Module, pixels: torch.Tensor, images: list[tuple[Path, int]]) -> float:
    found = torch.cat([network(part) for part in pixels.split(128)]).argmax(1)
    return float((found == torch.tensor([label for _, label in images])).double().mean())


def whole(images: list[tuple[Path, int]], network: nn.Module) -> torch.Tensor:
    config = network.pretrained_cfg
    mean, std = (torch.tensor(config[word]).view(3, 1, 1) for word in ("mean", "std"))
    pixels = [
        torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255 for path, _ in images
    ]
    return torch.stack([(image - mean) / std for image in pixels])


def other_loop(
    teacher: nn.Module, saved: dict[str, list[tuple[Path, int]]], seed: int, epochs: int, task: bool
) -> float:
    """A student of timm's task, or of a plain loop, from the same teacher."""
    torch.manual_seed(seed)
    student = timm.create_model(STUDENT, num_classes=10)
    pixels = whole(saved["train"], student)
    labels = torch.tensor([label for _, label in saved["train"]])
    optimizer = create_optimizer_v2(student, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    with torch.inference_mode():
        logits = torch.cat([teacher(part) for part in pixels.split(128)]).clone()
    distil = LogitDistillationTask(
        student, teacher, criterion=nn.CrossEntropyLoss(), task_loss_weight=1 - SHARE,
        distill_loss_weight=SHARE, temperature=TEMPERATURE, verbose=False,
    )  # fmt: skip
    for _ in range(epochs):
        distil.train()
        for rows in torch.randperm(len(labels)).split(BATCH):
            if task:
                loss = distil(pixels[rows], labels[rows])["loss"]
            else:
                given = student(pixels[rows])
                soft = F.kl_div(
                    F.log_softmax(given / TEMPERATURE, 1),
                    F.log_softmax(logits[rows] / TEMPERATURE, 1),
                    reduction="batchmean",
                    log_target=True,
                )
                loss = (1 - SHARE) * F.cross_entropy(given, labels[rows]) + SHARE * TEMPERATURE**2 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return accuracy(student.eval(), whole(saved["test"], student), saved["test"])


def by_kd(
    root: Path, saved: dict[str, list[tuple[Path, int]]], seed: int, epochs: int
) -> tuple[float, float]:
    """Accuracy of kd's student: what kd says, and what timm says of the export."""
    result = train_student(
        StudentConfig.model_validate(
            {
                "data": str(root / "train"),
                "test": str(root / "test"),
                "cache": (root / "cache.kd",),
                "method": "xe-kl",
                "student": STUDENT,
                "image_size": SIZE,
                "epochs": epochs,
                "batch_size": BATCH,
                "optimizer": "adamw",
                "lr": LR,
                "weight_decay": WEIGHT_DECAY,
                "temperature": TEMPERATURE,
                "seed": seed,
                "workers": 0,
                "device": "cpu",
                "out": root / f"student-{seed}",
            }
        )
    )
    return float(result.test["top1"]), by_timm(root / f"student-{seed}" / "export", saved["test"])


def make_teacher(root: Path, epochs: int) -> nn.Module:
    train_student(
        StudentConfig.model_validate(
            {
                "data": str(root / "train"),
                "test": str(root / "test"),
                "method": "labels-only",
                "student": "resnet10t",
                "image_size": SIZE,
                "epochs": epochs,
                "batch_size": BATCH,
                "optimizer": "adamw",
                "lr": LR,
                "workers": 0,
                "device": "cpu",
                "out": root / "teacher",
            }
        )
    )
    export = root / "teacher" / "export"
    cache_teachers(
        CacheConfig(
            data=str(root / "train"),
            cache=root / "cache.kd",
            teacher=(f"t=local-dir:{export}",),
            device="cpu",
        )
    )
    return timm.create_model(f"local-dir:{export}", pretrained=True).eval()


def figures(options: argparse.Namespace) -> Figures:
    """Test accuracies of the same training, done by kd and otherwise."""
    seeds, epochs = ((0,), 2) if options.quick else ((0, 1, 2), 6)
    found: dict[str, list[float]] = {"kd": [], "kd by timm": [], "timm.task": [], "plain loop": []}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        saved = save_digits(root)
        teacher = make_teacher(root, epochs)
        say(f"teacher: {by_timm(root / 'teacher' / 'export', saved['test']):.3f}")
        for seed in seeds:
            own, timms = by_kd(root, saved, seed, epochs)
            found["kd"].append(own)
            found["kd by timm"].append(timms)
            found["timm.task"].append(other_loop(teacher, saved, seed, epochs, task=True))
            found["plain loop"].append(other_loop(teacher, saved, seed, epochs, task=False))
            say(", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()))
    means = {name: statistics.fmean(values) for name, values in found.items()}
    noise = max(0.01, 2 * max(float(np.std(values)) for values in found.values()))
    apart = max(abs(a - b) for a, b in zip(found["kd"], found["kd by timm"], strict=True))
    return {
        "kd_minus_timm_task": figure(
            means["kd"] - means["timm.task"],
            -noise,
            "accuracy",
            f"mean of {len(seeds)} seeds; goal: within noise",
        ),
        "kd_minus_plain_loop": figure(
            means["kd"] - means["plain loop"],
            -noise,
            "accuracy",
            f"mean of {len(seeds)} seeds; goal: within noise",
        ),
        "kd_against_timm_validation": figure(
            apart, 0.0, "accuracy", "largest difference of one student's two tests", higher=False
        ),
        "kd_accuracy": figure(means["kd"], 0.9, "accuracy", f"mean of {len(seeds)} seeds"),
    }


if __name__ == "__main__":
    benchmark(__doc__, figures, ("torch", "timm"))
