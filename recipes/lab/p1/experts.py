"""P1's networks that others learn from: generalists, and experts of half the classes of their data, or a tenth."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from kdcli.training.config import learning_rates
from lab.settings import Settings
from lab.steps import Lab, Step, words

IMAGENET, GENERALIST = "imagenet", "generalist"


@final
@dataclass(frozen=True, slots=True)
class Expert:
    """A network that learns a task, or a part of it.

    Attributes:
        name: also of its cached outputs.
        task: whose data it learns.
        architecture: one of the setting's.
        part: which tenth of the classes; None: half of them, or all where they are not split.
    """

    name: str
    task: str
    architecture: str
    part: int | None = None


def experts(settings: Settings) -> list[Expert]:
    """Of all tasks, and of the tenths."""
    parts = settings["fives"]
    return [
        *(Expert(task, task, settings[GENERALIST]) for task in settings["experts"]),
        *(
            Expert(f"{task}-{part}-{arch}", task, arch, part)
            for task in parts["of"] for arch in parts["architectures"] for part in parts["parts"]
        ),
    ]  # fmt: skip


@final
@dataclass(frozen=True, slots=True)
class Sources:
    """Data, generalists and experts of the recipe."""

    lab: Lab

    def part(self, task: str, role: str, split: str, part: int | None = None) -> str:
        """Data string of a task: what its expert learns, or what is downstream of it."""
        settings = self.lab.settings
        name = self.data_set(task, role)
        half = {"expert": "t-split", "target": "d-split"}[role]
        if name in settings["whole"] or task.endswith("-all"):
            return self.lab.places[name].part(split)
        classes = half if part is None else f"{half}/5:{part}"
        return self.lab.places[name].part(split, f"classes={classes}", f"seed={settings['split_seed']}")

    def data_set(self, task: str, role: str) -> str:
        """The data set of a task; ``TASK-all`` is a target of all classes."""
        named: str = self.lab.settings["relabelled"][role].get(task, task.removesuffix("-all"))
        return named

    def classes(self, expert: Expert) -> int:
        """How many classes an expert tells apart."""
        name = self.data_set(expert.task, "expert")
        count = self.lab.places[name].classes
        if name in self.lab.settings["whole"]:
            return count
        first, last = (0, 5) if expert.part is None else (expert.part, expert.part + 1)
        return count * last // 10 - count * first // 10

    def images(self, task: str, role: str, split: str, share: float = 0.5) -> float:
        """How many images a task has there, if the classes of its share have as many as others."""
        name = self.data_set(task, role)
        whole = name in self.lab.settings["whole"] or task.endswith("-all")
        return self.lab.places[name].images.get(split, 0) * (1 if whole else share)

    def gmacs(self, architecture: str) -> float:
        """10^9 multiply-adds of a forward pass."""
        return float(self.lab.settings["gmacs"][architecture])

    def start(self, architecture: str) -> str | None:
        """Model string of what everything begins with; None: ImageNet's weights of the architecture."""
        if self.lab.settings["pretrain.epochs"] is None:
            return self.lab.places.models.get(architecture)
        trained = f"local-dir:{self.lab.out}/runs/starts/{architecture}/export"
        return self.lab.places.models.get(architecture, trained)

    def trained(self, architecture: str) -> list[str]:
        """The step that trains it, if one does."""
        trained = self.lab.settings["pretrain.epochs"] is not None
        return [f"starts/{architecture}"] if trained and architecture not in self.lab.places.models else []

    def generalist(self) -> str:
        """Model string of the generalist."""
        arch: str = self.lab.settings[GENERALIST]
        spec: str = self.lab.settings["architectures"][arch]
        return self.start(arch) or spec

    def spec(self, expert: Expert) -> str:
        """Model string of an expert: what the user said, or what the recipe trains."""
        made = f"local-dir:{self.lab.out}/runs/experts/{expert.name}/export"
        return self.lab.places.models.get(expert.name, made)

    def made(self, found: Sequence[Expert]) -> list[str]:
        """The steps that train experts."""
        models = self.lab.places.models
        return [f"experts/{expert.name}" for expert in found if expert.name not in models]

    def starts(self) -> Iterator[Step]:
        """The generalists, where ImageNet's weights are not taken."""
        settings, data = self.lab.settings, self.lab.places[IMAGENET]
        for arch, spec in settings["architectures"].items():
            for name in self.trained(arch):
                images = settings["pretrain.epochs"] * data.images.get("train", 0)
                options = settings.options("train") | settings.options("pretrain")
                yield Step(
                    name,
                    words("train-student", data.part("train"), method="labels-only", student=spec, init="random",
                          out=self.lab.out / "runs" / name, **options),
                    data=(IMAGENET,), kind="starts", images=images, gmacs=3 * images * self.gmacs(arch),
                )  # fmt: skip

    def expert(self, expert: Expert) -> Step:
        """An expert, from a generalist, at the best rate of a grid."""
        settings, name = self.lab.settings, f"experts/{expert.name}"
        options = settings.options("train") | settings.options("expert")
        data = self.data_set(expert.task, "expert")
        runs = 1 + len(learning_rates(options["lr_grid"]))
        share = 0.5 if expert.part is None else 0.1
        images = runs * options["epochs"] * self.images(expert.task, "expert", "train", share)
        arch = expert.architecture
        return Step(
            name,
            words("train-student", self.part(expert.task, "expert", "train", expert.part),
                  test=self.part(expert.task, "expert", "test", expert.part), method="labels-only",
                  student=settings["architectures"][arch], init=self.start(arch) or "pretrained",
                  multi_label=settings["multi_label"].get(data), out=self.lab.out / "runs" / name, **options),
            needs=tuple(self.trained(arch)), data=(data,), kind="experts",
            images=images, gmacs=3 * images * self.gmacs(arch),
        )  # fmt: skip
