"""SRRL: Yang et al., "Knowledge Distillation via Softmax Regression Representation Learning" (ICLR 2021).

    h = r(BN(W f_s))
    L = CE(labels) + sum_k w_k (beta MSE(h_k, f_k) + gamma MSE(V_k h_k + a_k, t_k))

* The student's features, brought to the teacher's, are to give the teacher's logits t through the teacher's own
  classifier V, a, which stays as it is. The cache keeps it beside the features where it is linear. beta, gamma 1.
* W is linear without bias (a 1x1 convolution of features), BN a batch norm over the rows of a piece of a process's
  step, both trained, in checkpoints, not in the export.
* r is ReLU where the teacher's cached features are never below 0, as after a network's last ReLU; else nothing, for
  no ReLU reaches negative features (ViTs). Decided once from the cached rows, said at the start, part of the
  run's identity.
* The teachers' classes need not be the student's: t is compared in the teacher's own order.
* The released code can add KL; xe-kl is that, alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from kdcli.cache.classifier import Classifier
from kdcli.errors import CacheMissingError
from kdcli.methods.adaptors import mean_squared_error
from kdcli.methods.base import Method, Needs, Objective, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.cached_rows import require_varying, some_rows
from kdcli.methods.losses import label_loss, weighted_sum
from kdcli.methods.options import MethodOptions, method_option
from kdcli.methods.weighted import OURS
from kdcli.models.student import LABEL_HEAD, StudentOutput


class SrrlOptions(MethodOptions):
    """What SRRL can be told."""

    feature_weight: float = method_option(
        1.0, "Weight beta of the squared error of the teacher's features.", ge=0, le=1e4, silent=0
    )
    logit_weight: float = method_option(
        1.0,
        "Weight gamma of the squared error of logits by the teacher's classifier.",
        ge=0,
        le=1e4,
        silent=0,
    )


@final
class ThroughClassifier(nn.Module):
    """The student's features as a teacher's, and what that teacher's classifier makes of them.

    Args:
        width: of the student's features.
        classifier: the teacher's, which is not trained.
        relu: whether its features are never below 0.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, classifier: Classifier, relu: bool) -> None:
        super().__init__()
        wanted = classifier.weight.shape[1]
        layers = [nn.Linear(width, wanted, bias=False), nn.BatchNorm1d(wanted)]
        self.connector = nn.Sequential(*layers, *([nn.ReLU()] if relu else []))
        # Not saved: they are the cache's.
        self.register_buffer("weight", torch.from_numpy(classifier.weight.copy()), persistent=False)
        self.register_buffer("bias", torch.from_numpy(classifier.bias.copy()), persistent=False)

    def forward(self, features: Float[Tensor, "b s"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b c"]]:
        """Features and logits in the teacher's spaces, in fp32."""
        found = self.connector(features.float()).float()
        return found, functional.linear(found, self.weight, self.bias)


@final
class SoftmaxRegression(Objective):
    """Labels, features, and logits through the teachers' classifiers.

    Args:
        parts: of each teacher.
        weights: of each teacher, > 0.
        feature_weight: beta >= 0.
        logit_weight: gamma >= 0.
        smoothing: of the labels, in [0, 1).
    """

    def __init__(
        self,
        parts: Mapping[str, ThroughClassifier],
        weights: Mapping[str, float],
        feature_weight: float = 1.0,
        logit_weight: float = 1.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self._weights, self._smoothing = dict(weights), smoothing
        self._feature_weight, self._logit_weight = feature_weight, logit_weight
        self.parts = nn.ModuleList(parts[name] for name in self._weights)

    def active(self) -> tuple[str, ...]:
        """The classifier."""
        return (LABEL_HEAD,)

    def reads(self) -> dict[str, tuple[str, ...]]:
        """Features and logits of the teachers."""
        return dict.fromkeys(self._weights, ("features", "logits"))

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The parts ``label``, and ``mse/features`` and ``mse/logits`` (of several: ``mse/TEACHER/...``)."""
        images, weights = batch.count("images"), {"label": 1.0}
        terms = {"label": label_loss(student.logits[LABEL_HEAD], batch, self._smoothing)}
        for part, (name, weight) in zip(self.parts, self._weights.items(), strict=True):
            features, logits = part(student.features)
            prefix = f"mse/{name}" if len(self._weights) > 1 else "mse"
            said = teacher[name]
            terms[f"{prefix}/features"] = mean_squared_error(features, said["features"].detach(), images)
            terms[f"{prefix}/logits"] = mean_squared_error(logits, said["logits"].detach(), images)
            weights[f"{prefix}/features"] = weight * self._feature_weight
            weights[f"{prefix}/logits"] = weight * self._logit_weight
        loss = weighted_sum(terms, weights, list(terms))
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


@final
class Srrl(Method):
    """``srrl``; :attr:`Setup.own` says of which teachers the features are never below 0."""

    def check(self, setup: Setup) -> Setup:
        """Looks at the teachers' features, and for their classifiers."""
        for name in setup.weights:
            _classifier(setup, name)
            require_varying(setup, name, "features")
        own = {name: bool((some_rows(setup, name, "features") >= 0).all()) for name in setup.weights}
        return replace(setup, own=own)

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With whose features end in ReLU."""
        return {**Method.identity(self, setup), "relu": dict(sorted(setup.own.items()))}

    def describe(self, setup: Setup) -> list[str]:
        """With the weights, and where the ReLU is."""
        options: SrrlOptions = setup.options
        ends = (
            f"'{name}' {'with ReLU: its features are never' if relu else 'without ReLU: its features are also'} below 0"
            for name, relu in setup.own.items()
        )
        return [
            f"CE + {options.feature_weight:g} MSE of features + {options.logit_weight:g} MSE of logits by the "
            f"teacher's classifier; teachers: {setup.shares}",
            *ends,
        ]

    def build(self, setup: Setup) -> Objective:
        """See :class:`SoftmaxRegression`."""
        options: SrrlOptions = setup.options
        width = setup.opened().num_features
        parts = {
            name: ThroughClassifier(width, _classifier(setup, name), setup.own[name])
            for name in setup.weights
        }
        return SoftmaxRegression(
            parts, setup.weights, options.feature_weight, options.logit_weight, setup.settings.label_smoothing
        )


def _classifier(setup: Setup, teacher: str) -> Classifier:
    """The teacher's.

    Raises:
        CacheMissingError: the cache keeps none, or not what it is applied to.
    """
    if setup.cache is None:
        raise ValueError("this method reads a cache")
    setup.cache.require_kept({teacher: ["features", "logits"]})
    found = setup.cache.classifier(teacher)
    if found is None:
        raise CacheMissingError(
            f"srrl goes through the classifier of '{teacher}', and the cache keeps none of it",
            f"{setup.cache.adding([teacher], ['features', 'logits'])} adds it, unless its logits are no linear "
            "function of its features: then use --method feature.",
        )
    return found


SRRL = Srrl(
    name="srrl", paper="SRRL, Yang et al. 2021", equation="softmax regression and feature matching",
    summary="Labels, and features that give a teacher's logits through its own classifier.", Options=SrrlOptions,
    needs=Needs(frozenset({"features", "logits"}), labels=True, several_labels=True), defaults=OURS,
)  # fmt: skip
