"""What ``kd rank-sources`` can be told."""

from pathlib import Path
from typing import Any, ClassVar, Literal, final

from pydantic import field_validator, model_validator

from kdcli.errors import nearest
from kdcli.options.common import CachesOption, DataRootOption, PartialOption, SeedOption, VerifyOption
from kdcli.options.fields import option
from kdcli.registry import METRICS, is_object_path

_MOST_POWER = 1000


@final
class RankConfig(CachesOption, DataRootOption, PartialOption, SeedOption, VerifyOption):
    """``kd rank-sources``. One of ``cache``, ``features`` + ``labels``, and ``ranking`` + ``against``."""

    command: ClassVar[str] = "rank-sources"

    results: tuple[str, ...] = option(
        (), "More of --against, as the shell writes --against runs/*.json.",
        panel="Data", positional=True, metavar="RESULT", exclude=True,
    )  # fmt: skip
    features: Path | None = option(
        None, "Instead of a cache: folder of .npy files [n, d], one a source.", panel="Data", metavar="DIR"
    )
    labels: Path | None = option(
        None, "With --features: .npy file of the labels, [n], or 0/1 rows [n, l] of images with several.",
        panel="Data", metavar="FILE",
    )  # fmt: skip
    ranking: tuple[Path, ...] = option(
        (), "Rank nothing: compare rankings made before, one a target, with --against. Repeatable.",
        panel="Data", metavar="FILE",
    )  # fmt: skip
    data: str | None = option(
        None, "Rank on this part of the cached data, with its labels; default: all of it.",
        panel="Data", there="data",
    )  # fmt: skip
    teacher: tuple[str, ...] = option(
        (), "Cached teacher to rank; default: all. Repeatable.",
        panel="Teachers", metavar="NAME", complete="teacher",
    )  # fmt: skip
    exclude: tuple[str, ...] = option(
        (), "Cached teacher to leave out. Repeatable.", panel="Teachers", metavar="NAME", complete="teacher"
    )
    metric: str = option(
        "parc", "Task-similarity metric, or your own as pkg.mod:OBJECT. all: scores of every metric, ranked by parc.",
        panel="Method", metavar="NAME", complete="metric",
    )  # fmt: skip
    variant: str | None = option(
        None, "Of the metric, such as bolya of parc: the same as --metric parc-bolya.", panel="Method"
    )
    on: Literal["features", "pseudo"] | None = option(
        None, "Features, or softmax outputs (pseudo); default: the metric's.", panel="Method"
    )
    logme_steps: int | None = option(
        None, "Steps of logme's iteration at most; default: 11, as its authors. 100 where images are few.",
        panel="Method", ge=1, le=10**6, metavar="N",
    )  # fmt: skip
    probe_size: int = option(500, "Images of the probe set.", panel="Method", ge=4, le=10**9)
    repeats: int = option(
        1, "Probe sets, of consecutive seeds; scores are their means.", panel="Method", ge=1, le=10**4
    )
    scheme: Literal["weighted", "nearest", "equal", "random-weights", "inverse"] = option(
        "weighted", "How scores become weights: weighted (P2 Eq. 5), nearest, equal, random-weights or inverse.",
        panel="Method", metavar="NAME",
    )  # fmt: skip
    power: float = option(
        12.0,
        "Power p of the weights (P2 Eq. 5). 0: all equal; inf: the nearest only.",
        panel="Method",
        ge=0,
        allow_inf_nan=True,
    )
    sources: int | None = option(
        None, "Give weight to this many of the best only.", panel="Method", ge=1, le=10**6
    )
    against: tuple[str, ...] = option(
        (), "Results of single-source students, or their folder: do the scores predict them? Repeatable.",
        panel="Output", metavar="RESULT",
    )  # fmt: skip
    top: int = option(3, "k of the top-k relative accuracies of --against.", panel="Output", ge=1, le=10**6)
    plot: Path | None = option(
        None, "Folder for P2's figures of --against.", panel="Output", metavar="DIR", mechanical=True
    )

    @field_validator("power")
    @classmethod
    def _known_power(cls, power: float) -> float:
        """Beyond this every score but the best is nothing; infinity says so."""
        if _MOST_POWER < power < float("inf"):
            raise ValueError(f"must be from 0 to {_MOST_POWER}, or inf: the nearest only")
        return power

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str) -> str:
        if name not in ("all", *METRICS) and not is_object_path(name):
            near = nearest(name, (*METRICS, "all"))
            raise ValueError(f"must be one of {', '.join(METRICS)}, all, or pkg.mod:OBJECT.{near}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _results_are_against(cls, values: Any) -> Any:
        """``--against runs/*.json``: the shell leaves the first file to the option and the others as arguments."""
        results = values.pop("results", ()) if isinstance(values, dict) else ()
        if results and not values.get("against"):
            raise ValueError(
                f"unexpected argument {results[0]}: a cache is given as --cache PATH, results as --against RESULT"
            )
        return {**values, "against": (*values["against"], *results)} if results else values
