"""P4's joint teacher: what sits on top of several frozen teachers and fuses their outputs.

Iordache et al., Multi-Level Feature Distillation of Joint Teachers Trained on Distinct Image Datasets,
Eq. (1), Eq. (2) and section 4.5; widths, order of layers and dropout as in the authors' released code.

    L1      [embeddings] -> concat -> dropout -> linear
    L2      [map -> BN -> 1x1] -> concat -> BN -> GELU -> 1x1 -> BN -> GELU = maps/fused
    L3      as L2 on earlier maps = maps/fused2 -> 3x3 of stride 2 -> BN -> GELU -> 1x1 -> BN -> GELU = maps/fused
    L4      as L3 with one more step of stride 2 in front: maps/fused3, maps/fused2, maps/fused

From L2 on, maps/fused -> average pool = features -> dropout -> linear. The teachers meet at their earliest
level only; what comes later is the joint teacher's own. ``fused`` is always the last map.

Beyond the released code: there one joint teacher has one head, here one head a data set. Its teachers of L3 and L4
(``S14Teacher`` and ``S28Teacher``) bring the joined maps down by 3x3 convolutions of stride 2 at once, so that their
first map is a level later than what they fuse; here a 1x1 convolution comes first, and every level has its map. All
released teachers can give their maps; its student learns from one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.documents import declared
from kdcli.errors import UsageError

LevelsName = Literal["L1", "L2", "L3", "L4"]
_Width = Annotated[int, Field(ge=1, le=2**20)]
_Side = Annotated[int, Field(ge=1, le=2**14)]
_Size = tuple[_Side, _Side] | tuple[_Side, _Side, _Side]
LEVELS: tuple[LevelsName, ...] = ("L1", "L2", "L3", "L4")


@final
@dataclass(frozen=True, slots=True)
class Parent:
    """What the joint teacher takes of one frozen teacher.

    Attributes:
        name: of the teacher.
        channels: of its map; at L1 the width of its embedding.
        size: height and width of its map, of clips the frames before them; None at L1.
    """

    name: str
    channels: _Width
    size: _Size | None = None


@final
@dataclass(frozen=True, slots=True)
class FusionSpec:
    """All that defines a joint teacher's layers.

    Attributes:
        levels: L1 to L4, see the module.
        parents: at least two, in the order in which they are concatenated.
        heads: classes of each data set's head, by name of the data set.
        dropout: before every head; the paper's is 0.8 to 0.9.
        projection: at L1, width to which each embedding is brought first; None leaves them.
        space: from L2 on, channels to which each teacher's map is brought.
        map_channels: from L2 on, channels of ``fused``, ``fused2``, ...: those of the student there.
        size: at which maps of unequal size meet; None refuses them.
    """

    levels: LevelsName
    parents: tuple[Parent, ...]
    heads: Mapping[str, _Width]
    dropout: float = 0.8
    projection: _Width | None = None
    space: _Width = 4096
    map_channels: tuple[_Width, ...] = ()
    size: _Size | None = None

    @property
    def map_names(self) -> tuple[str, ...]:
        """Names of the fused maps, the last of the network first."""
        return tuple("fused" if n == 1 else f"fused{n}" for n in range(1, LEVELS.index(self.levels) + 1))

    def require_valid(self) -> None:
        """Make sure that such a joint teacher can be built.

        Raises:
            UsageError: fewer than two teachers, no head, maps of unequal size, or options that do not fit the
                level.
        """
        names = ", ".join(parent.name for parent in self.parents) or "none"
        if len({parent.name for parent in self.parents}) < 2:
            raise UsageError(
                f"a joint teacher fuses at least two teachers, given: {names}",
                "Give more: --teacher A --teacher B",
            )
        if not self.heads:
            raise UsageError(
                "a joint teacher needs a data set with labels to learn from", "Give --cache CACHE."
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"--dropout {self.dropout:g} is not in [0, 1)", "The paper's is 0.8 to 0.9.")
        if self.levels != "L1":
            self._require_maps()
        elif self.map_channels or self.size:
            raise UsageError(
                "--levels L1 fuses embeddings, which have no map channels and no size",
                "Leave --map-channels and --map-size out, or use --levels L2.",
            )

    def _require_maps(self) -> None:
        if self.projection is not None:
            raise UsageError(
                f"--levels {self.levels} fuses maps, and a projection is for L1's embeddings", "Leave it out."
            )
        if len(self.map_channels) != len(self.map_names):
            raise UsageError(
                f"--levels {self.levels} has {len(self.map_names)} fused maps ({', '.join(self.map_names)}), but"
                f" {len(self.map_channels)} widths are given",
                "Give --map-channels for each, in that order: the student's channels there.",
            )
        sizes = {parent.name: parent.size for parent in self.parents}
        if None in sizes.values():
            missing = ", ".join(name for name, size in sizes.items() if size is None)
            raise UsageError(
                f"--levels {self.levels} fuses maps, and none is given of {missing}", "Give --tap."
            )
        if self.size is None and len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {'x'.join(map(str, size))}" for name, size in sizes.items() if size)
            raise UsageError(
                f"the teachers' maps differ in size: {listed}",
                "Choose taps of equal size by --tap, or interpolate all to one: --map-size N",
            )

    def document(self) -> dict[str, Any]:
        """The spec as a JSON document."""
        document: dict[str, Any] = declared(self)
        return document


@final
@dataclass(frozen=True, slots=True)
class JointOutput:
    """Outputs of a joint teacher for a batch.

    Attributes:
        logits: of the head that was asked for.
        features: at L1 the concatenated embeddings, else the pooled last map.
        maps: by name, ``fused`` the last; empty at L1.
    """

    logits: Float[Tensor, "b c"]
    features: Float[Tensor, "b d"]
    maps: dict[str, Float[Tensor, "b _ *_ _ _"]]


@final
class JointTeacher(nn.Module):
    """The trainable part of a joint teacher; its frozen parents are not in it.

    Args:
        spec: what to build; the layers are initialised by torch's generator.

    Raises:
        UsageError: see :meth:`FusionSpec.require_valid`.
    """

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__()
        spec.require_valid()
        self.spec = spec
        self.adaptors = nn.ModuleList(_adaptor(parent, spec) for parent in spec.parents)
        self.blocks = nn.ModuleList(_blocks(spec))
        self.dropout = nn.Dropout(spec.dropout)
        # A list, as names of data sets may hold what names of modules may not.
        self.heads = nn.ModuleList(nn.Linear(self.num_features, classes) for classes in spec.heads.values())

    @property
    def num_features(self) -> int:
        """Width of the features."""
        if self.spec.levels != "L1":
            return self.spec.map_channels[0]
        return sum(self.spec.projection or parent.channels for parent in self.spec.parents)

    def forward(self, inputs: Sequence[Float[Tensor, "b ..."]], head: str) -> JointOutput:
        """Fuse the outputs of the parents.

        Args:
            inputs: of each parent, in the order of the spec: embeddings [b, d] at L1, else maps [b, c, h, w], of
                clips [b, c, t, h, w].
            head: name of the data set whose classes are wanted.

        Raises:
            UsageError: there is no such head.
        """
        features, maps = self.embed(inputs)
        return JointOutput(self.classify(features, head), features, maps)

    def embed(
        self, inputs: Sequence[Float[Tensor, "b ..."]]
    ) -> tuple[Float[Tensor, "b d"], dict[str, Float[Tensor, "b _ *_ _ _"]]]:
        """Features and maps of the parents' outputs: all that comes before a head, see :meth:`forward`."""
        pairs = zip(self.adaptors, inputs, strict=True)
        together = torch.cat([adaptor(self._resized(values)) for adaptor, values in pairs], dim=1)
        maps: dict[str, Tensor] = {}
        for name, block in zip(reversed(self.spec.map_names), self.blocks, strict=True):
            together = maps[name] = block(together)
        return together.mean(dim=tuple(range(2, together.ndim))) if maps else together, maps

    def classify(self, features: Float[Tensor, "b d"], head: str) -> Float[Tensor, "b c"]:
        """Logits of features over the classes of one data set, see :meth:`forward`."""
        if head not in self.spec.heads:
            raise UsageError(
                f"the joint teacher has no head '{head}'", f"Its heads: {', '.join(self.spec.heads)}."
            )
        logits: Tensor = self.heads[list(self.spec.heads).index(head)](self.dropout(features))
        return logits

    def _resized(self, values: Tensor) -> Tensor:
        size = self.spec.size
        if size is None or tuple(values.shape[2:]) == size:
            return values
        if values.ndim == 5:
            flat = F.interpolate(
                values.flatten(1, 2), size[1:], mode="bilinear", align_corners=False, antialias=True
            )
            return F.adaptive_avg_pool3d(
                flat.reshape(*values.shape[:3], *size[1:]), (size[0], size[-2], size[-1])
            )
        return F.interpolate(values, size, mode="bilinear", align_corners=False, antialias=True)


def _adaptor(parent: Parent, spec: FusionSpec) -> nn.Module:
    """A_i of Eq. (2): brings one teacher's values to the width in which all are concatenated."""
    if spec.levels != "L1":
        norm, convolution = _layers(spec)
        return nn.Sequential(norm(parent.channels), convolution(parent.channels, spec.space, 1))
    if spec.projection in (None, parent.channels):  # the released code skips it where the width is right
        return nn.Identity()
    return nn.Linear(parent.channels, spec.projection)


def _blocks(spec: FusionSpec) -> list[nn.Module]:
    """NN^{l_1} to NN^{l_k} of Eq. (1) as far as they give maps, the earliest first."""
    if spec.levels == "L1":
        return []
    norm, convolution = _layers(spec)
    widths = spec.map_channels[::-1]
    fused = spec.space * len(spec.parents)
    first = nn.Sequential(
        norm(fused), nn.GELU(), convolution(fused, widths[0], 1), norm(widths[0]), nn.GELU()
    )
    later = [
        nn.Sequential(convolution(old, new, 3, 2, 1, bias=False), norm(new), nn.GELU())
        for old, new in pairwise(widths)
    ]
    if later:
        later[-1].extend([convolution(widths[-1], widths[-1], 1), norm(widths[-1]), nn.GELU()])
    return [first, *later]


def _layers(spec: FusionSpec) -> tuple[type[nn.Module], type[nn.Module]]:
    """BatchNorm and convolution of maps; of clips over frames, too."""
    size = spec.parents[0].size
    return (nn.BatchNorm3d, nn.Conv3d) if size is not None and len(size) == 3 else (nn.BatchNorm2d, nn.Conv2d)
