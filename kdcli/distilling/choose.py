"""What ``kd distill`` chooses where nothing is given: the split, the method, the sizes. Pure; each says why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from kdcli.data.spec import SPLIT_NAMES, DataSpec, canonical_split, with_modifier
from kdcli.distilling.config import DistillConfig
from kdcli.errors import BadDataError, UsageError
from kdcli.methods.base import Method
from kdcli.training.presets import options_of_preset

SHARE: Final = "80/20"
"""Training and test images of each class, in percent, where no test set is given."""
STEPS_IMAGES: Final = 30_000
"""Images that a student sees in all (OURS): 100 epochs of 300; fewer than 10 epochs are never trained."""
MOST_EPOCHS, LEAST_EPOCHS = 100, 10
FEW_IMAGES: Final = 1000
"""Below these, batches are of 32, so that an epoch has steps enough."""
MOST_VIEWS: Final = 32
"""Of methods whose teachers see the student's views: with 8, students of 220 images lose 10 points."""
LABEL_WEIGHT: Final = 0.3
"""Of distill-equal and distill-weighted, where P2 has 0.8 (OURS): measured in docs/distill.md."""
LEAST_TEST: Final = 30
"""Test images below which no difference that is to be expected can be seen."""
MOST_ANSWERED: Final = 2000
"""Test images that the teachers answer, too, so that the report can show it."""


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """Where a student learns and where it is tested.

    Attributes:
        train, test: data specs; ``test`` is None where nothing can be tested.
        why: what to say of the choice; empty where the user made it.
    """

    train: str
    test: str | None
    why: str


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """How the student learns.

    Attributes:
        method: name of the method.
        why: in one sentence.
        options: of the method, where not its own defaults are taken.
    """

    method: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class Sizes:
    """How long and in what portions.

    Attributes:
        epochs, batch_size: of training.
        views: training views of each image that are cached; 0: teachers see the clean image, students fresh views.
    """

    epochs: int
    batch_size: int
    views: int


def given_parts(config: DistillConfig, folders: Sequence[str]) -> Parts | None:
    """The training and the test images where the user, or a folder with splits, says them.

    Args:
        config: ``data`` and ``test`` as they were given.
        folders: names of the folders in the data's own, if it is one and no split was asked of it.
    """
    if config.test is not None:
        return Parts(config.data, config.test, "")
    named = {canonical_split(name): name for name in folders if name.lower() in SPLIT_NAMES}
    if "train" in named and (other := named.get("test") or named.get("val")):
        train = with_modifier(config.data, f"split={named['train']}")
        why = f"the folder has splits: learning from '{named['train']}', tested on '{other}'"
        return Parts(train, with_modifier(config.data, f"split={other}"), why)
    return None


def set_aside(config: DistillConfig, labelled: bool) -> Parts:
    """A part of the images to test on.

    Args:
        config: the data.
        labelled: whether the images have labels.

    Raises:
        UsageError: a fifth cannot be split off what is several data sets, or a split already.
    """
    spec = DataSpec.parse(config.data)
    if not labelled:
        why = "no labels, so nothing can be tested: give --test with class folders"
        return Parts(config.data, None, f"{why}{_beside(spec)}")
    if spec.members or spec.split is not None:
        raise UsageError(
            f"{config.data} is {'several data sets' if spec.members else 'a split already'}, and no test set is given",
            "Give --test.",
        )
    first, rest = (with_modifier(config.data, f"split={SHARE}:{part}") for part in ("first", "rest"))
    return Parts(
        first, rest, f"no --test: {SHARE.partition('/')[2]} % of each class are set aside to test on"
    )


def _beside(spec: DataSpec) -> str:
    """That a folder without classes is a class itself, as far as its neighbours say so."""
    folder = Path(spec.source.removeprefix("folder/"))
    if spec.members or not spec.source.startswith("folder/") or not folder.is_dir():
        return ""
    count = sum(each.is_dir() for each in folder.parent.iterdir())
    return f"; {folder.parent} has {count} folders: is each a class?" if count > 1 else ""


def one_class_too_few(data: str, name: str, folders: Sequence[str]) -> BadDataError:
    """The error for images of one class; it names the folder below, where that has the classes."""
    hint = "Give a folder with two class folders or more; or IMAGES@labels=none, to learn the teacher's own classes."
    if list(folders) == [name]:
        below = Path(DataSpec.parse(data).source.removeprefix("folder/")) / name
        inside = sum(each.is_dir() for each in below.iterdir())
        if inside > 1:
            hint = f"Did you mean {below}? It has {inside} folders."
    return BadDataError(f"{data} has one class only: '{name}'", hint)


def choose_method(class_names: Sequence[str] | None, teachers: Mapping[str, Sequence[str] | None]) -> Choice:
    """The method, by labels and teachers.

    Args:
        class_names: of the data; None without labels.
        teachers: class names of each teacher by its name; None where it does not know them.
    """
    count = len(teachers)
    several = f"{count} teachers" if count > 1 else "one teacher"
    named = [frozenset(names) for names in teachers.values() if names]
    alike = len(named) == count and len(set(named)) == 1
    if class_names is None:
        if alike or count == 1:
            return Choice(
                "kl", f"no labels, {several}: the student learns the teacher's own classes (P3 Eq. 1)"
            )
        return Choice("multi-head-kd", f"no labels, {several} of different classes: one head each (P1 Eq. 1)")
    if alike and named[0] == frozenset(class_names):
        return Choice("xe-kl", f"labels, {several} of the same classes: labels and KL (P3 Eq. 2)")
    if count == 1:
        why = "labels, one teacher of other classes: labels and its outputs (P2 Eq. 4)"
        return Choice("distill-equal", why, {"label_weight": LABEL_WEIGHT})
    why = f"labels, {several}: labels and all of them, by the ranking (P2 Eq. 4, 5)"
    return Choice("distill-weighted", why, {"label_weight": LABEL_WEIGHT})


def choose_sizes(config: DistillConfig, images: int, method: Method) -> Sizes:
    """Epochs, batch and views: those given, else the preset's, else by the images and the method."""
    preset = options_of_preset(config.preset) if config.preset else {}
    usual = min(MOST_EPOCHS, max(LEAST_EPOCHS, round(STEPS_IMAGES / images)))
    epochs = config.epochs or preset.get("epochs") or usual
    batch = config.batch_size or preset.get("batch_size") or (32 if images < FEW_IMAGES else 64)
    views = config.views or (min(MOST_VIEWS, epochs) if method.teacher_view == "same" else 0)
    return Sizes(epochs, min(batch, images), views)


def folders_of(spec: DataSpec) -> tuple[str, ...]:
    """Folders in the folder that a spec is of; nothing for other sources, joined ones and splits."""
    if spec.members or spec.split is not None or not spec.source.startswith("folder/"):
        return ()
    root = Path(spec.source.removeprefix("folder/"))
    return tuple(sorted(each.name for each in root.iterdir() if each.is_dir())) if root.is_dir() else ()
