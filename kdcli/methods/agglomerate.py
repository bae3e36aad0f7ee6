"""One student of several teachers' features, without labels and whatever their classes are.

P1 (a generalist and experts, a head each, unlabelled proxy data) carried from logits to features: what AM-RADIO
(Ranzinger et al., CVPR 2024), UNIC (Sariyildiz et al., ECCV 2024) and Theia (Shang et al., CoRL 2024) do.
For image i and teacher k, with an adaptor a of each teacher and level:

    l_ik = mean over levels of [ mean over cells of d(a(student), standardised target) ]
    L = mean_i ( sum_k w_k c_ik l_ik / sum_k w_k c_ik )

* Levels: ``features`` (one cell), and one map of each teacher beside the student's (``maps``); the larger grid is
  averaged to the smaller one. Targets: :mod:`kdcli.methods.standardising`, PHI-S unless told otherwise.
* d by ``--feature-loss``: ``unic``: (1 - cos)/2 + smoothL1/2; ``radio``: 1 - cos of features, 0.9 (1 - cos) +
  0.1 smoothL1 of cells; ``mse``: the squared difference. smoothL1 (beta 1) and squares are means over channels.
* c_ik is 0 for a teacher that is dropped from an image, with probability ``--teacher-drop`` (UNIC, 0.5); but the one of
  the largest w_k l_ik, which always counts; of equal ones the first by name. UNIC divides by the teachers that are
  left in the whole batch; here each image weighs the same (ours), which needs to know no other image. The draw is
  keyed by seed, step and image: the same for any number of processes and pieces, and after any stop.
* w_k: equal, ``--teacher-weight NAME=W``, or P1's pair lambda_0 : sum of lambda_i. Only their proportions count.
* Adaptors: LayerNorm, Linear, GELU, Linear [two layers as in RADIO and UNIC], or LayerNorm, Linear (Proteus).
* AdamW, 3e-4 for 256 images, weight decay 0.03, 5 % warm-up, cosine [UNIC]; beta_2 is torch's 0.999, there 0.99.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kdcli.cache.classifier import Classifier
from kdcli.console import console, counted
from kdcli.errors import UsageError
from kdcli.methods.agglomerate_options import AgglomerateOptions, teacher_weights
from kdcli.methods.base import Choice, Method, Needs, Objective, Settings, Setup
from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.methods.feature_rows import FEATURE_ROWS, cosine_rows, squared_rows
from kdcli.methods.keyed import uniform
from kdcli.methods.levels import Level, choose_levels
from kdcli.methods.matching import LevelMethod
from kdcli.methods.standardising import Seen, Standard, Standardisation
from kdcli.models.adaptors import AdaptorRecord, CellRows, FeatureAdaptor, Grid, KeptAdaptor
from kdcli.models.student import StudentOutput

PAPER = "AM-RADIO (Ranzinger et al.), UNIC (Sariyildiz et al.), Theia (Shang et al.), 2024"
ENOUGH_VIEWS = 4
"""Cached views below which many passes only repeat them."""


# --- the objective ----------------------------------------------------------------------------


@final
class LevelPath(nn.Module):
    """From the student's features or map to a teacher's.

    Args:
        level: with both shapes.
        standard: how targets are standardised.
        hidden: width between an adaptor's two layers; 0: one layer.
    """

    def __init__(self, level: Level, standard: Standard, hidden: int) -> None:
        super().__init__()
        self.level = level
        self.own_rows = CellRows(level.student_shape, level.grid)
        self.their_rows = CellRows(level.teacher_shape, level.grid)
        self.adaptor = FeatureAdaptor(level.student_shape[0], level.teacher_shape[0], hidden)
        self.standard = Standardisation(level.teacher_shape[0], standard)

    def forward(
        self, student: StudentOutput, outputs: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
        """Predictions, and the standardised targets."""
        own = student.features if self.level.tap is None else student.maps[self.level.tap]
        target = self.their_rows(outputs[self.level.array].detach())
        return self.adaptor(self.own_rows(own)), self.standard(target)


@final
class Agglomeration(Objective):
    """See the module.

    Args:
        paths: of each teacher, one a level.
        weights: of each teacher, > 0.
        options: the loss, and the probability of dropping.
        pieces: calls of :meth:`forward` that a step is made of.
    """

    def __init__(
        self,
        paths: Mapping[str, Sequence[LevelPath]],
        weights: Mapping[str, float],
        options: AgglomerateOptions,
        pieces: int = 1,
    ) -> None:
        super().__init__()
        self._names = tuple(paths)
        # Lists, not dicts: names of teachers may hold dots, which module names may not.
        self.paths = nn.ModuleList(nn.ModuleList(own) for own in paths.values())
        self._rows, self._drop = FEATURE_ROWS[options.feature_loss], options.teacher_drop
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor([weights[name] for name in paths]), persistent=False)
        self._pieces, self._calls, self._seed = pieces, 0, int(torch.randint(2**62, ()))
        self._seen: Seen | None = None
        self._kept_of: Sequence[tuple[AdaptorRecord, Classifier | None]] = ()

    def bind(self, seen: Seen, kept: Sequence[tuple[AdaptorRecord, Classifier | None]]) -> "Agglomeration":
        """Say what statistics are computed of, and what is kept beside each adaptor: level by level of each teacher."""
        self._seen, self._kept_of = seen, tuple(kept)
        return self

    def get_extra_state(self) -> Tensor:
        """Where the draws of dropped teachers are."""
        return torch.tensor([self._seed, self._calls])

    def set_extra_state(self, state: Tensor) -> None:
        """Undo :meth:`get_extra_state`."""
        self._seed, self._calls = state.tolist()

    def active(self) -> tuple[str, ...]:
        """No head: classes are not learnt."""
        return ()

    def reads(self) -> dict[str, tuple[str, ...]]:
        """What is predicted."""
        return {name: tuple(path.level.array for path in own) for name, own in self._each()}

    def taps(self) -> tuple[str, ...]:
        """What maps are predicted from."""
        return tuple(dict.fromkeys(p.level.tap for _, own in self._each() for p in own if p.level.tap))

    def pooled(self) -> bool:
        """Whether any features are predicted."""
        return any(path.level.tap is None for _, own in self._each() for path in own)

    def notes(self) -> tuple[str, ...]:
        """A line a level: shapes of both sides, and the adaptor."""
        lines = []
        for name, own in self._each():
            for path in own:
                level, size = path.level, sum(each.numel() for each in path.adaptor.parameters())
                grid = (
                    ""
                    if level.grid is None
                    else _averaged(level.grid, level.student_shape, level.teacher_shape)
                )
                lines.append(
                    f"{level.array} of '{name}' {_shape(level.teacher_shape)} from {level.tap or 'features'} "
                    f"{_shape(level.student_shape)}{grid}: an adaptor of {size} parameters"
                )
        return tuple(lines)

    def settle(self) -> None:
        """Compute the statistics of all targets, which training does not change."""
        if self._seen is None:
            raise ValueError("nothing is bound to compute statistics of")
        for name, own in self._each():
            for path in own:
                array = path.level.array
                found = self._seen.moments(name, array, path.level.grid)
                flat = path.standard.set(found, f"the {array} of '{name}'")
                if flat:
                    console.note(
                        f"{flat} of {len(found.mean)} channels of the {array} of '{name}' are constant: they are "
                        "divided by the mean deviation, not by their own"
                    )

    def constants(self) -> tuple[Tensor, ...]:
        """Of all targets."""
        return tuple(
            each
            for _, own in self._each()
            for path in own
            for each in path.standard.buffers()
            if each.numel()
        )

    def forward(self, student: StudentOutput, teacher: TeacherOutputs, batch: Batch) -> dict[str, Tensor]:
        """The loss; parts ``distill/TEACHER`` (l of all images, dropped or not), ``cos`` and ``r2`` of each level.

        cos is that of outputs less their mean, r2 = 1 - squared error / variance of the teacher's training outputs.
        """
        count = batch.count("images") or len(batch.index)
        losses, parts = [], dict[str, Tensor]()
        with torch.autocast(batch.index.device.type, enabled=False):
            for name, own in self._each():
                rows = []
                for path in own:
                    predicted, target = path(student, teacher[name])
                    rows.append(self._rows(predicted, target, path.level.is_map).mean(dim=1))
                    parts |= _fidelity(path, f"{name}/{path.level.array}", predicted.detach(), target, count)
                losses.append(torch.stack(rows).mean(dim=0))
            table = torch.stack(losses, dim=1)
            shares = self.weights * self._kept(table.detach(), batch.index)
            images = (shares * table).sum(dim=1) / shares.sum(dim=1)
        self._calls += 1
        own_parts = {
            f"distill/{name}": loss.detach().sum() / count
            for name, loss in zip(self._names, losses, strict=True)
        }
        return {"loss": images.sum() / count, **own_parts, **parts}

    def _kept(self, losses: Float[Tensor, "b k"], index: Int64[Tensor, " b"]) -> Bool[Tensor, "b k"]:
        """Which teachers count for which image."""
        teachers = torch.arange(losses.shape[1], device=index.device)
        drawn = uniform(index[:, None] * len(self._names) + teachers, self._seed, self._calls // self._pieces)
        weighed = losses * self.weights
        largest = weighed == weighed.amax(dim=1, keepdim=True)
        # Torch leaves open which of equal values argmax names; the first is meant.
        first = torch.where(largest, teachers, len(self._names)).amin(dim=1, keepdim=True)
        return (drawn >= self._drop) | (teachers == first)

    def compare(
        self, student: StudentOutput, teacher: TeacherOutputs
    ) -> dict[str, tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]]:
        """Of each level ``TEACHER/ARRAY``: predictions and the teacher's outputs, both less the training mean."""
        found = {}
        for name, own in self._each():
            for path in own:
                predicted, target = path(student, teacher[name])
                found[f"{name}/{path.level.array}"] = (
                    path.standard.turned(predicted),
                    path.standard.turned(target),
                )
        return found

    def kept_adaptors(self) -> tuple[KeptAdaptor, ...]:
        """The adaptors with the standardisation undone in their last layers."""
        paths = (path for _, own in self._each() for path in own)
        return tuple(kept_adaptor(path, *kept) for path, kept in zip(paths, self._kept_of, strict=True))

    def _each(self) -> list[tuple[str, list[LevelPath]]]:
        return [(name, list(own)) for name, own in zip(self._names, self.paths, strict=True)]  # type: ignore[call-overload]


def _averaged(grid: Grid, student: Sequence[int], teacher: Sequence[int]) -> str:
    """Which of two maps is averaged to the other's grid, or both to a coarser one; none where they are of it."""
    sides = {"the student's": tuple(student[1:]), "the teacher's": tuple(teacher[1:])}
    larger = [side for side, cells in sides.items() if cells != grid]
    word = "both" if len(larger) == 2 else "".join(larger)
    return f", {word} averaged to {_shape(grid)} cells" if larger else ""


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _fidelity(
    path: LevelPath,
    name: str,
    predicted: Float[Tensor, "b n c"],
    target: Float[Tensor, "b n c"],
    count: float,
) -> dict[str, Tensor]:
    own, theirs = path.standard.turned(predicted), path.standard.turned(target)
    error = squared_rows(own, theirs).mean(dim=1).sum() / path.standard.phi.square()
    cosines = cosine_rows(own, theirs).mean(dim=1).sum()
    return {f"cos/{name}": cosines / count, f"r2/{name}": len(own) / count - error / count}


def kept_adaptor(path: LevelPath, record: AdaptorRecord, classifier: Classifier | None) -> KeptAdaptor:
    """A path's adaptor as a run keeps it: apart from what trains, for features with the teacher's classifier."""
    layers = FeatureAdaptor(record.student_shape[0], record.teacher_shape[0], record.hidden)
    layers.load_state_dict({name: value.detach().cpu() for name, value in path.adaptor.state_dict().items()})
    layers.out = path.standard.folded(path.adaptor.out)
    layers.requires_grad_(False)
    found = replace(record, phi=float(path.standard.phi), statistics=path.standard.digest())
    if classifier is None or path.level.is_map:
        return KeptAdaptor(found, layers)
    return KeptAdaptor(found, layers, (torch.tensor(classifier.weight), torch.tensor(classifier.bias)))


# --- the method -------------------------------------------------------------------------------


@final
class Agglomerate(LevelMethod):
    """See the module; maps are predicted from what the student's features are pooled from."""

    def needs_of(self, options: Any) -> Needs:
        """Features; which else, the cache decides."""
        return self.needs

    def weigh(self, choice: Choice) -> dict[str, float]:
        """See :func:`teacher_weights`."""
        return teacher_weights(choice)

    def generalist(self, options: Any) -> str | None:
        """None: the student starts as ``--init`` says, and has no classifier."""
        return None

    def predicts(self, options: Any) -> bool:
        """Features are all that is learnt."""
        return True

    def check(self, setup: Setup) -> Setup:
        """Decides what is learnt of whom."""
        options: AgglomerateOptions = setup.options
        if setup.settings.ema is not None:
            raise UsageError(
                f"--ema {setup.settings.ema:g} averages the student's weights, and its adaptors would not fit them",
                "Leave --ema out; --select best keeps the best epoch, adaptors included.",
            )
        own = {name: choose_levels(setup, self.name, name, options.levels) for name in setup.weights}
        views = len(setup.views)
        if setup.teacher_view == "same" and views < min(ENOUGH_VIEWS, setup.settings.epochs):
            console.warn(
                f"{setup.settings.epochs} epochs of {counted(views, 'cached views')}: images come again as they were; "
                f"cache {ENOUGH_VIEWS} or more (--views eval+train:{ENOUGH_VIEWS})"
            )
        return replace(setup, own=own)

    def identity(self, setup: Setup) -> dict[str, Any]:
        """With the levels; the weights are in a run's identity already, whatever their order."""
        options = {**Method.identity(self, setup), "teacher_tap": None, "teacher_weight": None}
        levels = {name: {each.array: each.tap for each in own} for name, own in sorted(setup.own.items())}
        return {**options, "levels_of": levels}

    def describe(self, setup: Setup) -> list[str]:
        """Loss, weights, levels."""
        options: AgglomerateOptions = setup.options
        learnt = "; ".join(
            f"{name} {weight:.4g} ({', '.join(each.array for each in setup.own[name])})"
            for name, weight in setup.weights.items()
        )
        return [
            f"{options.feature_loss} loss of targets standardised by {options.standardise}, teachers dropped with "
            f"probability {options.teacher_drop:g}; no labels",
            f"teachers: {learnt}",
        ]

    def build(self, setup: Setup) -> Objective:
        """See :class:`Agglomeration`; its statistics are not there yet."""
        options: AgglomerateOptions = setup.options
        if setup.cache is None or setup.data is None:
            raise ValueError("this method reads a cache")
        hidden = options.adaptor_width if options.adaptor_layers == 2 else 0
        levels = self.fitted(setup)
        paths = {
            name: [LevelPath(level, options.standardise, hidden) for level in levels[name]]
            for name in setup.weights
        }
        kept = [
            (AdaptorRecord(
                name, setup.teachers[name].id, level.array, level.tap, tuple(level.student_shape),
                tuple(level.teacher_shape), level.grid, hidden, options.standardise, 1.0, "",
                setup.teachers[name].class_names,
            ), setup.cache.classifier(name))
            for name in setup.weights
            for level in levels[name]
        ]  # fmt: skip
        seen = Seen(setup.cache, setup.cache.rows_of(setup.data, check_content=False), setup.views)
        found = Agglomeration(paths, setup.weights, options, setup.settings.accumulate)
        return found.bind(seen, kept)


AGGLOMERATE = Agglomerate(
    name="agglomerate",
    paper=PAPER,
    equation="Eq. of docs/methods.md",
    summary="Features and maps of several teachers, an adaptor each; no labels, whatever their classes.",
    Options=AgglomerateOptions,
    needs=Needs(frozenset({"features"})),
    tap="pooled",
    defaults=Settings(
        optimizer="adamw",
        lr=3e-4,
        weight_decay=0.03,
        schedule="cosine",
        warmup=0.05,
        epochs=100,
        batch_size=256,
    ),
)
