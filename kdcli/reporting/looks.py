"""What models say of a few images: gathered by :mod:`kdcli.reporting.looking`; all that shows it is pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Bool, Float, Int64


@final
@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """A model's answers to the images of a :class:`Look`.

    Attributes:
        classes: names of its classes.
        top: number of the most probable one, for each image; of unknown ones anything.
        confidence: its probability.
        known: which images it has seen; of a cached teacher those that the cache holds.
        student: whether it is a student, and not a teacher.
    """

    classes: tuple[str, ...]
    top: Int64[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]
    known: Bool[np.ndarray, " n"]
    student: bool


@final
@dataclass(frozen=True, slots=True)
class Thumb:
    """A small JPEG of an image.

    Attributes:
        jpeg: its bytes.
        enlarged: whether the image has fewer pixels than it is shown with.
        wide: whether it is more than twice as wide as high.
    """

    jpeg: bytes
    enlarged: bool
    wide: bool = False


@final
@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """Some images of a data set, and what models say of them.

    Attributes:
        of: what the images are, such as "200 of 300 test images".
        classes: names, of the data set.
        labels: of each image, -1 for none.
        places: what a person calls each image.
        thumbs: a small picture of each; empty where none are wanted.
        answers: by model, students first.
        whole: whether these are all test images.
        notes: what is missing, and why, a line each.
    """

    of: str
    classes: tuple[str, ...]
    labels: Int64[np.ndarray, " n"]
    places: tuple[str, ...]
    thumbs: tuple[Thumb, ...]
    answers: Mapping[str, Answers]
    whole: bool
    notes: tuple[str, ...] = ()

    def right(self, name: str) -> Bool[np.ndarray, " n"]:
        """Which images a model gets right, by the names of the classes; unknown ones count as wrong."""
        own = self.answers[name]
        number = {each: place for place, each in enumerate(self.classes)}
        as_ours = np.array([number.get(each, -2) for each in own.classes], np.int64)
        right: Bool[np.ndarray, " n"] = own.known & (as_ours[own.top] == self.labels)
        return right

    def judges(self) -> dict[str, Answers]:
        """The models that saw all images and know all their classes: those whose accuracy means something."""
        return {
            name: own
            for name, own in self.answers.items()
            if own.known.all() and set(self.classes) <= set(own.classes)
        }
