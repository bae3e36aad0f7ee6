"""What the demo found, as a value, as JSON and as tables."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli.console import console, duration
from kdcli.demo.live import Live
from kdcli.ranking import ranking_document
from kdcli.results import Result
from kdcli.types import Ranking


@final
@dataclass(frozen=True, slots=True)
class DemoRow:
    """One student.

    Attributes:
        method: that it learnt by.
        test_top1: share of the test images that are right; None of a student without a classifier for them.
        probe: few-shot accuracy of its features: mean and half-width of the 95 % interval, fractions.
        seconds: that training took.
        live_seconds: that training would have taken with live teachers; None of a student without teachers.
    """

    method: str
    test_top1: float | None
    probe: tuple[float, float]
    seconds: float
    live_seconds: float | None


@final
@dataclass(frozen=True, slots=True)
class DemoResult(Result):
    """What the demo found."""

    report: Path
    ranking: Ranking
    rows: tuple[DemoRow, ...]
    live: Live
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON document of ``--json``."""
        return {
            "report": str(self.report),
            "ranking": ranking_document(self.ranking),
            "students": [
                {
                    "method": row.method,
                    "test_top1": row.test_top1,
                    "probe": {"mean": row.probe[0], "ci95": row.probe[1]},
                    "seconds": row.seconds,
                    "live_seconds": row.live_seconds,
                }
                for row in self.rows
            ],
            "live_epoch_ratio": self.live.ratio,
            "seconds": self.seconds,
        }


def say(result: DemoResult) -> None:
    """The ranking and the table on stdout, the report's path and what to try next."""
    console.table(
        ["source", result.ranking.metric, "weight"],
        [[s.name, f"{s.score:.4f}", f"{s.weight:.4f}"] for s in result.ranking.sources],
    )
    print()
    console.table(
        ["student", "test accuracy", "5-shot probe", "seconds", "with live teachers"],
        [
            [
                row.method,
                "-" if row.test_top1 is None else f"{row.test_top1:.3f}",
                f"{row.probe[0]:.3f} +- {row.probe[1]:.3f}",
                f"{row.seconds:.1f}",
                "-" if row.live_seconds is None else f"{row.live_seconds:.1f}",
            ]
            for row in result.rows
        ],
    )
    folder = result.report.parent
    print(
        f"\nwith live teachers: their forward was measured in one epoch of distill-weighted, which took "
        f"{result.live.ratio:.1f} times as long\n"
        f"report: {result.report} (all in {duration(result.seconds)})\n\n"
        "On your own images (one folder per class), with the generalist's full 224 pixels; the demo's has 64:\n"
        f"  kd demo --export-weights {folder}/weights/lite0-224\n"
        f"  kd cache-teachers IMAGES --cache mine.kd --teacher generalist=local-dir:{folder}/weights/lite0-224\n"
        "  kd rank-sources --cache mine.kd\n"
        f"  kd train-student IMAGES --cache mine.kd --student resnet10t --method distill-equal --out runs/mine",
        flush=True,
    )
