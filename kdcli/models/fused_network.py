"""``kd-fused:DIR`` as a teacher: the joint teacher behind its frozen parents, from images."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import BadDataError, IdentityError, NotFoundError, UsageError, nearest
from kdcli.geometry import EvalGeometry, Render
from kdcli.models.architectures import Architecture
from kdcli.models.fused import JointOutput, JointTeacher
from kdcli.models.fused_folder import FusedFolder
from kdcli.models.grammar import ModelSpec, only_a_teacher, recorded_model
from kdcli.models.network import Classifier, weights_sha256
from kdcli.models.spec import open_model
from kdcli.outputs import MAPS
from kdcli.types import Preprocess, Size, differences

FUSED: Final = "kd-fused"
"""Both the form of the spec and what its architecture begins with."""


def joint_preprocess(folder: FusedFolder) -> Preprocess:
    """Pixels as plain numbers of [0, 1]: every parent applies its own mean and std.

    Size, filter and geometry are the first parent's, also in the record of a joint teacher whose parents differ in
    them, which can be written back but not run from images.
    """
    first = Preprocess.from_document(folder.ancestors[0].preprocess)
    return replace(first, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def joint_spec(folder: FusedFolder, place: Path, head: str) -> str:
    """The model string of one head; the name of an only head is left out."""
    return str(ModelSpec(FUSED, head if len(folder.spec.heads) > 1 else "", place))


@final
class FusedArchitecture(Architecture):
    """A joint teacher that ``kd fuse-teachers`` made, as the teacher of one of its heads.

    Args:
        spec: of kind kd-fused.

    Raises:
        NotFoundError: there is no joint teacher, or it has no such head.
        UsageError: it has several heads and none is named.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.file is None:
            raise UsageError(f"'{spec}' names no folder", "Write kd-fused:DIR.")
        self._spec, self._place = spec, spec.file
        self._folder = FusedFolder.read(spec.file)
        heads = list(self._folder.spec.heads)
        if not spec.name and len(heads) > 1:
            raise UsageError(
                f"'{spec}' has a head for each of {', '.join(heads)}", f"Name one: '{spec}#{heads[0]}'"
            )
        if spec.name and spec.name not in heads:
            raise NotFoundError(
                f"'{spec}': there is no head '{spec.name}'.{nearest(spec.name, heads)}",
                f"Its heads: {', '.join(heads)}.",
            )
        self._head = spec.name or heads[0]

    @property
    def name(self) -> str:
        """See the base."""
        return f"{FUSED}/{self._folder.spec.levels}"

    def random(self, num_classes: int | None, image_size: Size | None) -> Classifier:
        """See the base: it is trained by kd fuse-teachers only.

        Raises:
            UsageError: always.
        """
        raise only_a_teacher(self._spec)

    def pretrained(self, image_size: Size | None) -> Classifier:
        """See the base.

        Raises:
            IdentityError: a parent is not what it was when its outputs were fused.
        """
        own = self.preprocess(image_size)
        try:
            parents = nn.ModuleList(
                self._parent(number, own) for number in range(len(self._folder.ancestors))
            )
        except RecursionError as error:
            raise BadDataError(
                f"'{self._spec}': the parents that its fused.json names lead back to it",
                "Run kd fuse-teachers anew.",
            ) from error
        joint = self._folder.joint(self._place)
        return FusedClassifier(_Network(parents, joint, self._folder, self._head))

    def _parent(self, number: int, own: Preprocess) -> Classifier:
        ancestor = self._folder.ancestors[number]
        was = Preprocess.from_document(ancestor.preprocess)
        shown, first = Render.of(replace(was, mean=own.mean)), Render.of(own)
        if shown != first:
            raise UsageError(
                f"'{self._spec}': its parents are shown images in different ways, so they cannot share one "
                f"('{ancestor.name}' {shown}; the first {first})",
                "Use it from the caches: kd fuse-teachers ... --write-back NAME; or fuse teachers of one input size "
                "and filter that were cached with --eval-geometry shared or whole.",
            )
        if was.crop_mode == "border":
            raise UsageError(
                f"'{self._spec}': its parent '{ancestor.name}' pads images with its own mean colour, so it cannot "
                "share one with others",
                "Use it from the caches: kd fuse-teachers ... --write-back NAME; or cache the parents with "
                "--eval-geometry whole, and fuse those.",
            )
        model = open_model(recorded_model(ancestor.spec))
        now = EvalGeometry.of(was).applied(model.preprocess)
        found = differences(
            {
                "architecture": ancestor.architecture,
                "weights": ancestor.weights,
                "preprocess": was.document(),
            },
            {
                "architecture": model.architecture,
                "weights": weights_sha256(model.network),
                "preprocess": now.document(),
            },
        )
        if found:
            raise IdentityError(
                f"'{self._spec}': its parent '{ancestor.name}' ({ancestor.spec}) is not what was fused",
                "Restore the parent, or fuse the new one: kd fuse-teachers",
                found,
            )
        return model.network

    def preprocess(self, image_size: Size | None) -> Preprocess:
        """See the base.

        Raises:
            UsageError: another size than its own.
        """
        own = joint_preprocess(self._folder)
        if image_size is not None and own.size != image_size:
            raise UsageError(
                f"'{self._spec}' takes images of {' x '.join(map(str, own.size))} pixels",
                "Leave --image-size out.",
            )
        return own

    def class_names(self) -> tuple[str, ...]:
        """See the base."""
        return self._folder.classes[self._head]


@final
class _Network(nn.Module):
    """Parents and joint teacher as one; the digest is that of the fused folder."""

    def __init__(self, parents: nn.ModuleList, joint: JointTeacher, folder: FusedFolder, head: str) -> None:
        super().__init__()
        self.parents, self.joint = parents, joint
        self.folder, self.head_name = folder, head
        for number, ancestor in enumerate(folder.ancestors):
            for word in ("mean", "std"):
                axes = len(ancestor.preprocess["size"])
                values = torch.tensor(ancestor.preprocess[word]).view(1, 3, *[1] * axes)
                self.register_buffer(f"{word}{number}", values, persistent=False)

    @property
    def linear(self) -> nn.Module:
        """The head's layer."""
        return self.joint.heads[list(self.joint.spec.heads).index(self.head_name)]

    def all_outputs(self, images: Float[Tensor, "b 3 h w"]) -> JointOutput:
        """Everything, of images in [0, 1]."""
        inputs = []
        for number, ancestor in enumerate(self.folder.ancestors):
            mean, std = self.get_buffer(f"mean{number}"), self.get_buffer(f"std{number}")
            parent = self.parents[number]
            assert isinstance(parent, Classifier)
            name = ancestor.array.replace("maps/", "maps.", 1)
            inputs.append(parent.outputs((images - mean) / std, [name])[name])
        output: JointOutput = self.joint(inputs, self.head_name)
        return output

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        """Logits of images in [0, 1]."""
        return self.all_outputs(images).logits


@final
class FusedClassifier(Classifier):
    """A joint teacher cut before its head."""

    def __init__(self, plain: _Network) -> None:
        super().__init__(plain)
        self._network = plain

    @property
    def head(self) -> nn.Module:
        """See the base."""
        return self._network.linear

    def outputs(self, images: Float[Tensor, "b 3 h w"], names: Collection[str]) -> dict[str, Tensor]:
        """See the base."""
        output = self._network.all_outputs(images)
        found = {"logits": output.logits, "features": output.features}
        found |= {MAPS + tap: each for tap, each in output.maps.items()}
        return {name: found[name] for name in names}

    @property
    def taps(self) -> tuple[str, ...]:
        """See the base: the fused maps, the earliest first."""
        return self._network.joint.spec.map_names[::-1]

    def digest(self) -> str:
        """See the base: of the joint teacher's weights, its head's name and its parents' ids."""
        return self._network.folder.digest(self._network.joint, self._network.head_name)
