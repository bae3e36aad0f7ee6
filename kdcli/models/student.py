"""A student: one backbone, its own classifier, and one more linear head per teacher it learns from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kdcli.errors import UsageError
from kdcli.models.cut import Cut
from kdcli.models.grammar import ModelSpec, is_teacher_only, only_a_teacher
from kdcli.models.network import TimmClassifier
from kdcli.models.spec import Model

LABEL_HEAD = "label"
"""Name of the network's own classifier, the only head that is exported."""


@final
@dataclass(frozen=True, slots=True)
class StudentOutput:
    """Pooled features, the logits of the heads that were asked for, and the maps at the taps that were."""

    features: Float[Tensor, "b d"]
    logits: dict[str, Float[Tensor, "b _"]]
    maps: dict[str, Float[Tensor, "b _ _ _"]] = field(default_factory=dict)


@final
class Student(nn.Module):
    """One backbone with several linear heads (P1 section 3.1; P2 section 3.2: one extra head per source).

    Args:
        model: an open timm model; its own classifier is the head ``"label"``.
        heads: width of each further head by name, drawn from torch's generator in this order.

    Raises:
        UsageError: the model is not timm's (no export could reopen it), or a head is called label.
    """

    def __init__(self, model: Model, heads: Mapping[str, int]) -> None:
        super().__init__()
        require_timm(model)
        if LABEL_HEAD in heads:
            raise UsageError(f"no head may be called '{LABEL_HEAD}': that is the network's own", "Rename it.")
        self.model = model
        self.network = model.network
        # A list, not a dict: names of teachers may hold dots, which module names may not.
        self._extra = nn.ModuleList(nn.Linear(model.num_features, width) for width in heads.values())
        self._extra_names = tuple(heads)
        self._frozen_batchnorm = False
        self._frozen_backbone = False
        self._cut: Cut | None = None

    @property
    def heads(self) -> dict[str, nn.Linear]:
        """All heads by name; the network's own classifier, if it has one, first."""
        own = {LABEL_HEAD: self.network.head} if self.network.num_classes else {}
        extra = zip(self._extra_names, self._extra, strict=True)
        return {name: head for name, head in [*own.items(), *extra] if isinstance(head, nn.Linear)}

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
            taps: names of layers; not of a student that is cut.
        """
        features, maps = self._features(images, feature_map, taps)
        known = self.heads
        names = known if heads is None else heads
        return StudentOutput(features, {name: known[name](features) for name in names}, maps)

    def _features(
        self, images: Tensor | None, feature_map: Tensor | None, taps: Sequence[str]
    ) -> tuple[Float[Tensor, "b d"], dict[str, Float[Tensor, "b _ _ _"]]]:
        if feature_map is not None:
            if self._cut is None or taps:
                raise ValueError("a feature map for a student that is not cut, or maps of one that is")
            return self._cut.features(self.network, feature_map), {}
        if images is None:
            raise ValueError("neither images nor their feature map")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen_backbone):
            if taps:
                return self.network.features_and_maps(images, taps)
            return self.network.features(images), {}

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


def require_timm(model: Model) -> None:
    """Students are timm's, so that what they export opens with ``timm.create_model``.

    Raises:
        UsageError: the model is not timm's.
    """
    if is_teacher_only(ModelSpec.parse(model.spec)):
        raise only_a_teacher(model.spec)
    if not isinstance(model.network, TimmClassifier):
        raise UsageError(
            f"'{model.spec}' cannot be a student: exports are in timm's layout",
            f"Use timm's architecture, e.g. --student {model.architecture.rpartition('/')[2]}.",
        )


def _declares_exempt(plain: nn.Module) -> bool:
    return callable(getattr(plain, "no_weight_decay", None))
