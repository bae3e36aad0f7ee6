"""A tiny real place to train in: images, two exported teachers, and a cache of what they said."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import make_folder

from kdcli.cache.cacheset import CacheSet
from kdcli.extract.config import CacheConfig
from kdcli.extract.extract import cache_teachers
from kdcli.models.export import export_model
from kdcli.models.spec import open_model
from kdcli.training.config import StudentConfig
from kdcli.types import RankedSource, Ranking

STUDENT = "test_efficientnet"
"""The architecture of the teacher called gen."""


@dataclass(frozen=True)
class Place:
    """Paths and specs; ``gen`` knows the classes of the images, ``exp`` others."""

    root: Path
    data: str
    test: str
    cache: Path
    specs: dict[str, str]

    def config(self, out: str, method: str = "labels-only", **changes: Any) -> StudentConfig:
        """A run of a second: 26 images, batches of 8, three epochs."""
        fields: dict[str, Any] = {
            "data": self.data, "student": STUDENT, "method": method, "out": self.root / out, "image_size": 32,
            "epochs": 3, "batch_size": 8, "workers": 0, "device": "cpu", "recipe": None,
            "teacher_view": "same",
        }  # fmt: skip
        if method != "labels-only":
            fields["cache"] = (self.cache,)
        if method == "consolidation":
            fields["generalist"] = "gen"
        return StudentConfig(**{**fields, **changes})

    def ranking(self, gen: float = 0.75, exp: float = 0.25) -> Ranking:
        """Both teachers, gen first."""
        cache = CacheSet.open([self.cache])
        sources = (
            RankedSource("gen", cache.teacher("gen").id, 0.5, gen),
            RankedSource("exp", cache.teacher("exp").id, 0.1, exp),
        )
        return Ranking(cache.cache_ids[0], "parc", "features", {"size": 24, "seed": 0}, sources)


def make_place(root: Path, views: str = "eval+train:2", per_class: int = 8, maps: bool = False) -> Place:
    """Build it, in about a second; with ``maps``, a map of 48 x 2 x 2 of gen (its blocks.3) is cached, too."""
    make_folder(root / "images", per_class=per_class, size=28)
    make_folder(root / "held-out", per_class=3, size=28, seed=1)
    specs = {}
    names = ("class0", "class1", "class2")
    for name, architecture, classes in (("gen", STUDENT, names), ("exp", "test_resnet", None)):
        torch.manual_seed(len(specs))
        model = open_model(architecture, weights="random", num_classes=3 if classes else 5, image_size=32)
        export_model(model, root / name, classes)
        specs[name] = f"local-dir:{root / name}"
    cache = root / "c.kd"
    teachers = tuple(f"{name}={spec}" for name, spec in specs.items())
    cache_teachers(
        CacheConfig(
            data=str(root / "images"),
            cache=cache,
            teacher=teachers,
            views=views,
            recipe="mild",
            workers=0,
            device="cpu",
        )
    )
    if maps:
        cache_teachers(
            CacheConfig(
                data=str(root / "images"), cache=cache, teacher=teachers[:1], workers=0, device="cpu", views=views,
                recipe="mild", keep=("logits", "features", "maps:blocks.3"),
            )
        )  # fmt: skip
    return Place(root, str(root / "images"), str(root / "held-out"), cache, specs)
