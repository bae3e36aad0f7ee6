"""A student: one backbone, its own classifier as it is, and one more linear head per teacher it learns from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.models.classifiers import TimmClassifier, TorchvisionClassifier
from kdcli.models.cut import Cut
from kdcli.models.frames import FramesClassifier
from kdcli.models.grammar import ModelSpec, is_teacher_only, only_a_teacher
from kdcli.models.spec import Model
from kdcli.models.teacher import mean_of_clips
from kdcli.outputs import MAPS

LABEL_HEAD = "label"
"""Name of the network's own classifier, the only head that is exported."""


@final
@dataclass(frozen=True, slots=True)
class StudentOutput:
    """Pooled features, the logits of the heads that were asked for, and the maps at the taps that were.

    The features of a network that gives none are empty: [b, 0].
    """

    features: Float[Tensor, "b d"]
    logits: dict[str, Float[Tensor, "b _"]]
    maps: dict[str, Float[Tensor, "b _ _ _"]] = field(default_factory=dict)

    def of_samples(self, samples: int) -> "StudentOutput":
        """The mean of all clips of each of so many samples."""
        return StudentOutput(
            mean_of_clips(self.features, samples),
            {name: mean_of_clips(values, samples) for name, values in self.logits.items()},
            {name: mean_of_clips(values, samples) for name, values in self.maps.items()},
        )


@final
class Student(nn.Module):
    """One backbone with several linear heads (P1 section 3.1; P2 section 3.2: one extra head per source).

    Args:
        model: an open model of timm or torchvision; its own classifier, whatever it is, is the head ``"label"``.
            Where that has several parts (distilled networks), its logits are their mean, in training as in tests.
        heads: width of each further head by name, drawn from torch's generator in this order.

    Raises:
        UsageError: the model cannot be exported, has no features for further heads, or a head is called label.
    """

    def __init__(self, model: Model, heads: Mapping[str, int]) -> None:
        super().__init__()
        require_trainable(model)
        if LABEL_HEAD in heads:
            raise UsageError(f"no head may be called '{LABEL_HEAD}': that is the network's own", "Rename it.")
        if heads:
            require_features(model, "a further head")
        self.model = model
        self.network = model.network
        # A list, not a dict: names of teachers may hold dots, which module names may not.
        self._extra = nn.ModuleList(nn.Linear(model.num_features, width) for width in heads.values())
        self._extra_names = tuple(heads)
        self._frozen_batchnorm = False
        self._frozen_backbone = False
        self._cut: Cut | None = None

    @property
    def heads(self) -> dict[str, nn.Module]:
        """All heads by name; the network's own classifier, if it has one, first."""
        own = {LABEL_HEAD: self.network.head} if self.network.num_classes else {}
        return {**own, **dict(zip(self._extra_names, self._extra, strict=True))}

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"] | None,
        heads: Sequence[str] | None = None,
        feature_map: Float[Tensor, "b c h w"] | None = None,
        taps: Sequence[str] = (),
    ) -> StudentOutput:
        """Features, logits of the heads asked for, and feature maps at the taps asked for.

        Args:
            images: normalised images; not looked at where their feature map is given.
            heads: names of heads; default: all.
            feature_map: what the layers up to the cut gave of the images; see :meth:`freeze_up_to`.
            taps: names of layers; of a student that is cut, of layers after the cut.
        """
        known = self.heads
        names = known if heads is None else heads
        asked = ["features"] if self.model.num_features else []
        asked += ["logits"] if LABEL_HEAD in names else []
        found = self._outputs(images, feature_map, [*asked, *(MAPS + tap for tap in taps)])
        features = found.get("features")
        if features is None:
            features = found["logits"].new_empty(len(found["logits"]), 0)
        logits = {name: found["logits"] if name == LABEL_HEAD else known[name](features) for name in names}
        return StudentOutput(features, logits, {tap: found[MAPS + tap] for tap in taps})

    def _outputs(
        self, images: Tensor | None, feature_map: Tensor | None, names: Sequence[str]
    ) -> dict[str, Tensor]:
        if feature_map is None:
            if images is None:
                raise ValueError("neither images nor their feature map")
            return self.network.outputs(images, names)
        if self._cut is None:
            raise ValueError("a feature map for a student that is not cut")
        return self._cut.outputs(self.network, feature_map, names)

    def train(self, mode: bool = True) -> "Student":
        """As in torch, but what is frozen stays in eval mode."""
        super().train(mode)
        if self._frozen_batchnorm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if self._frozen_backbone:
            self.network.eval()
        for layer in self._cut.lower if self._cut is not None else ():
            layer.eval()
        return self

    def freeze_backbone(self) -> None:
        """Train the heads only: the backbone gives the features of eval mode and gets no gradient."""
        self._frozen_backbone = True
        in_heads = {id(parameter) for head in self.heads.values() for parameter in head.parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in in_heads)
        self.train(self.training)

    def freeze_up_to(self, cut: Cut) -> None:
        """Train what comes after a cut only: the layers before it stay in eval mode and get no gradient.

        Args:
            cut: of this student's network.
        """
        self._cut = cut
        for layer in cut.lower:
            layer.requires_grad_(False)
        self.train(self.training)

    def set_batchnorm(self, frozen: bool, affine: bool = True) -> None:
        """Freeze the running statistics of batch norms (P1) or update them.

        Args:
            frozen: whether they are used as they are, also after ``train()``.
            affine: whether scale and shift train; False also takes their gradients away.
        """
        self._frozen_batchnorm = frozen
        if not affine:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.requires_grad_(False)
        self.train(self.training)

    def parameter_groups(
        self, backbone_lr: float, head_lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Optimiser groups: backbone and heads, each with and without weight decay.

        Args:
            backbone_lr: learning rate of all but the heads.
            head_lr: learning rate of all heads, the network's own included (P1: of every head).
            weight_decay: of weights; biases, norms and what timm names are not decayed.
        """
        in_heads = {id(parameter) for head in self.heads.values() for parameter in head.parameters()}
        plain: Any = self.network.plain
        exempt = (
            {f"network.plain.{name}" for name in plain.no_weight_decay()}
            if _declares_exempt(plain)
            else set()
        )
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        order = [(rate, decay) for rate in (backbone_lr, head_lr) for decay in (weight_decay, 0.0)]
        groups = {key: [] for key in order}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decay = 0.0 if parameter.ndim <= 1 or name in exempt else weight_decay
                groups[head_lr if id(parameter) in in_heads else backbone_lr, decay].append(parameter)
        return [
            {"params": parameters, "lr": rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
            if parameters
        ]


def require_trainable(model: Model) -> None:
    """Students are timm's or torchvision's, so that what they export opens in kd and in their library.

    Raises:
        UsageError: the model is neither.
    """
    if is_teacher_only(ModelSpec.parse(model.spec)) or not isinstance(
        model.network, TimmClassifier | TorchvisionClassifier | FramesClassifier
    ):
        raise only_a_teacher(model.spec)


def require_features(model: Model, what: str) -> None:
    """Refuse a student that gives logits alone where features are needed.

    Args:
        model: the student.
        what: needs them, for the message.

    Raises:
        UsageError: saying why it has none.
    """
    if not model.num_features:
        raise UsageError(
            f"{what} needs the features of '{model.spec}', which has none: {model.network.without}",
            "Choose a student that pools its features before its classifier, or a method of logits such as xe-kl.",
        )


def _declares_exempt(plain: nn.Module) -> bool:
    return callable(getattr(plain, "no_weight_decay", None))
