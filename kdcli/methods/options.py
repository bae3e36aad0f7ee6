"""Options of methods: the base of them all, and those that several methods share. No torch."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from kdcli.options.fields import Options, mark, option, values_of
from kdcli.options.problems import OptionError, typed

Direction = Literal["forward", "reverse"]
"""Order of the arguments of a KL divergence."""
Combine = Literal["terms", "probs", "logits", "confidence"]
"""What becomes of several teachers of the same classes, see :mod:`kdcli.methods.comparison`."""


class MethodOptions(Options):
    """Base of a method's options. A default is the method's own."""

    def taught(self) -> Mapping[str, bool]:
        """Whether something is learnt beside labels, by the option that weighs it, as it is typed.

        By default the options with a ``silent`` value: of a method that has some, one must have another value.
        """
        found = {}
        for name in type(self).model_fields:
            if (silent := mark(type(self), name, "silent")) is not None:
                weights = values_of(getattr(self, name))
                shown = " ".join(map(typed, weights))
                found[f"--{name.replace('_', '-')} {shown}"] = any(each != silent for each in weights)
        return found

    @model_validator(mode="after")
    def _something_is_learnt(self) -> Self:
        taught = self.taught()
        if taught and not any(taught.values()):
            raise OptionError(
                f"{' and '.join(taught)}: nothing but labels is left to learn from",
                f"Change {'this weight' if len(taught) == 1 else 'one of them'}, or use --method labels-only.",
            )
        return self


def method_option(default: Any, help: str, **marks: Any) -> Any:
    """:func:`~kdcli.options.fields.option` in the panel of methods."""
    return option(default, help, panel="Method", **marks)


def temperature_option(default: float) -> Any:
    """Softmax temperature, with the method's own default."""
    return method_option(
        default, "Softmax temperature T of teacher and student in the distillation term.", ge=0.001, le=1000
    )


def kl_weight_option(default: float) -> Any:
    """P3's lambda, with the method's own default."""
    return method_option(
        default, "Weight of the distillation term (P3's lambda); labels have the rest.", ge=0, le=1, silent=0
    )


def label_weight_option(default: float = 1.0, spares: bool = True) -> Any:
    """Of the labels' cross-entropy beside terms with weights of their own; ``spares``: nothing else needs labels."""
    spared = "; 0: no labels are needed" if spares else ""
    return method_option(default, f"Weight of the labels' cross-entropy{spared}.", ge=0, le=1e4)


def kl_direction_option() -> Any:
    """The order of the KL's arguments."""
    return method_option("forward", "forward: KL(teacher || student). reverse: KL(student || teacher).")


def generalist_weight_option() -> Any:
    """P1's lambda_0."""
    return method_option(1.0, "Weight of the generalist (P1's lambda_0); all weights sum to 2.", ge=0, le=2)


def unlabelled_ratio_option(default: float | None) -> Any:
    """Proportion of a step's two batches, with the method's own default."""
    return method_option(
        default,
        "Unlabelled images per labelled one in a step, in a batch of their own.",
        gt=0,
        le=1000,
        shared=True,
    )


def unlabelled_includes_labelled_option(default: bool | None) -> Any:
    """What the second batch is drawn from, with the method's own default."""
    return method_option(default, "Whether labelled images are among the unlabelled ones, too.", shared=True)


class GeneralistOptions(MethodOptions):
    """Of methods whose student starts from one of the teachers."""

    generalist: str | None = method_option(
        None, "Cached teacher that the student starts from; its head is the classifier.", complete="teacher"
    )


class StreamOptions(MethodOptions):
    """Of methods that may take labelled and unlabelled images in batches of their own."""

    unlabelled_ratio: float | None = unlabelled_ratio_option(None)
    unlabelled_includes_labelled: bool | None = unlabelled_includes_labelled_option(None)


class StandardiseOptions(MethodOptions):
    """Of methods that compare logits of teacher and student class by class."""

    standardise_logits: bool = method_option(
        False, "Compare logits of mean 0 and standard deviation 1 in each image (Sun 2024), on both sides."
    )


class LogitOptions(StandardiseOptions):
    """Of methods that learn from logits of several teachers of the same classes."""

    combine: Combine = method_option(
        "terms",
        "Several teachers: the mean of their loss terms, or one term against the mean of their probs or logits, or "
        "of their probs weighted by what each gives the label (confidence).",
    )


class KlOptions(StandardiseOptions):
    """Of P3's methods that compare logits by a KL divergence."""

    temperature: float = temperature_option(1.0)
    kl_direction: Direction = kl_direction_option()


class LogitKlOptions(KlOptions, LogitOptions):
    """The same, of several teachers of the student's classes."""
