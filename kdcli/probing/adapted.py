"""Teachers' features as a student's adaptors predict them: representations beside the student's own."""

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, final

import numpy as np
from jaxtyping import Float, Int64

from kdcli.data.sources import ImageData
from kdcli.errors import NotFoundError, UsageError, nearest
from kdcli.probing.config import ProbeConfig
from kdcli.probing.head import adaptors_of, predicted
from kdcli.probing.representations import Representation

if TYPE_CHECKING:
    from kdcli.models.adaptors import KeptAdaptor
    from kdcli.probing.features import ArrayName


@final
class Adapted(Representation):
    """What an adaptor makes of a student's features; called ``MODEL/TEACHER``.

    Args:
        student: whose features it is given.
        adaptor: of a teacher.
    """

    def __init__(self, student: Representation, adaptor: "KeptAdaptor") -> None:
        super().__init__(f"{student.name}/{adaptor.record.teacher}", student.spec)
        self._student, self._adaptor = student, adaptor

    @property
    def weights(self) -> str:
        """See the base: of the student's and the adaptor's."""
        found = sha256(self._student.weights.encode())
        for name, value in sorted(self._adaptor.layers.state_dict().items()):
            found.update(name.encode() + value.numpy().tobytes())
        return found.hexdigest()

    def usable(self, data: ImageData, array: "ArrayName") -> Int64[np.ndarray, " m"]:
        """Of the student."""
        return self._student.usable(data, array)

    def outputs(self, data: ImageData, array: "ArrayName", title: str) -> Float[np.ndarray, "n _"]:
        """The teacher's features, predicted; there are no others."""
        return predicted(self._adaptor, self._student.outputs(data, "features", title))

    def class_names(self) -> tuple[str, ...] | None:
        """Unknown."""
        return None

    def start(self) -> str:
        """Nothing to fine-tune from.

        Raises:
            UsageError: always.
        """
        raise UsageError("adapted features are not fine-tuned", "Leave --adapted out.")

    def close(self) -> None:
        """Of the student."""
        self._student.close()


def with_adapted(representations: Sequence[Representation], config: ProbeConfig) -> list[Representation]:
    """The representations, and after each run its adapted ones.

    Raises:
        NotFoundError: no run has an adaptor of a teacher.
        BadDataError: the files of one are damaged.
    """
    known = {each.name: adaptors_of(each) for each in representations} if config.adapted else {}
    every = sorted({name for own in known.values() for name in own})
    for name in config.adapted:
        if name not in every:
            raise NotFoundError(
                f"--adapted {name}: no --model is a run that predicts features of '{name}'.{nearest(name, every)}",
                f"Features are predicted of {', '.join(every)}."
                if every
                else "Name a run of kd train-student --method agglomerate: --model RUN.",
            )
    found: list[Representation] = []
    for each in representations:
        own = known.get(each.name, {})
        found += [each, *(Adapted(each, own[name]) for name in dict.fromkeys(config.adapted) if name in own)]
    return found
