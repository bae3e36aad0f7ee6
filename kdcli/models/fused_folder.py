"""A joint teacher on disk: its layers, its weights, and who its parents are.

fused.json           layers, parents with their ids, names of the classes
fused.safetensors    weights of the trainable part; the parents' are theirs
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import save

from kdcli.documents import from_document
from kdcli.errors import BadDataError, NotFoundError, UsageError
from kdcli.files import atomic_write_bytes, write_json
from kdcli.models.fused import FusionSpec, JointTeacher
from kdcli.models.network import weights_sha256
from kdcli.models.weights import load_strictly, read_shapes, require_no_larger
from kdcli.reading import read_json
from kdcli.types import Preprocess

DESCRIPTION = "fused.json"
WEIGHTS = "fused.safetensors"


@final
@dataclass(frozen=True, slots=True)
class Ancestor:
    """A frozen teacher that a joint teacher listens to.

    Attributes:
        name: as the caches call it.
        id: its id there.
        spec: what opens it.
        architecture, weights, preprocess: what it must be when it is opened again.
        array: what is taken of it: ``features`` or ``maps/TAP``.
    """

    name: str
    id: str
    spec: str
    architecture: str
    weights: str
    preprocess: Mapping[str, Any]
    array: str


@final
@dataclass(frozen=True, slots=True)
class _Description:
    spec: FusionSpec
    parents: tuple[Ancestor, ...]
    classes: Mapping[str, tuple[str, ...]]


@final
@dataclass(frozen=True, slots=True)
class FusedFolder:
    """What ``fused.json`` says.

    Attributes:
        spec: the layers.
        ancestors: the parents, in the order of the spec's.
        classes: names of each head's classes.
    """

    spec: FusionSpec
    ancestors: tuple[Ancestor, ...]
    classes: Mapping[str, tuple[str, ...]]

    def write(self, folder: Path, joint: JointTeacher) -> None:
        """Write weights and description, the description last."""
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in joint.state_dict().items()}
        atomic_write_bytes(folder / WEIGHTS, save(tensors))
        write_json(
            folder / DESCRIPTION,
            {
                "spec": self.spec.document(),
                "parents": [asdict(ancestor) for ancestor in self.ancestors],
                "classes": {name: list(names) for name, names in self.classes.items()},
            },
        )

    @classmethod
    def read(cls, folder: Path) -> "FusedFolder":
        """Undo :meth:`write`.

        Raises:
            NotFoundError: there is no joint teacher.
            BadDataError: the description is none, naming the field.
        """
        path = folder / DESCRIPTION
        if not path.is_file():
            raise NotFoundError(
                f"{folder} holds no joint teacher ({DESCRIPTION} is not there)",
                "kd fuse-teachers --out DIR makes one; with --heads per-data-set, DIR/NAME is one.",
            )
        again = "Run kd fuse-teachers anew."
        found = from_document(_Description, read_json(path, hint=again), path, hint=again)
        for number, parent in enumerate(found.parents):
            from_document(Preprocess, parent.preprocess, f"{path}: parents.{number}.preprocess", hint=again)
        try:
            found.spec.require_valid()
        except UsageError as error:
            raise BadDataError(f"{path}: spec: {error.message}", again) from error
        if [parent.name for parent in found.spec.parents] != [parent.name for parent in found.parents]:
            raise BadDataError(f"{path}: parents: they are not those of its spec", again)
        return cls(found.spec, found.parents, found.classes)

    def joint(self, folder: Path) -> JointTeacher:
        """The trainable part with its weights, in eval mode.

        Raises:
            BadDataError: the weights do not fit.
        """
        with torch.device("meta"):
            require_no_larger(JointTeacher(self.spec), read_shapes(folder / WEIGHTS), folder / WEIGHTS)
        joint = JointTeacher(self.spec)
        load_strictly(joint, folder / WEIGHTS)
        return joint.eval()

    def digest(self, joint: JointTeacher, head: str) -> str:
        """Digest of one head: of the joint teacher's weights, the head's name, and the parents' ids in order."""
        lines = [weights_sha256(joint), head, *(ancestor.id for ancestor in self.ancestors)]
        return sha256("\n".join(lines).encode()).hexdigest()
