"""``kd compare``: models against each other, and students before and after they were distilled."""

from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING

from kdcli.cli.cells import points, signed_points
from kdcli.console import console, size
from kdcli.files import bytes_in

if TYPE_CHECKING:
    from kdcli.comparing.config import CompareConfig
    from kdcli.comparing.result import Change, CompareResult, MethodSummary
    from kdcli.metrics.transfer_summary import Mean
    from kdcli.options.common import Common


def compare(config: "CompareConfig", common: "Common") -> None:
    """Compare what models know: flips, gains and losses.

    Every ordered pair of models is a teacher and a student (P3). A run of kd train-student that
    started from one of them, or was taught by them, is that student after a transfer: its record says
    which. Cached teachers are read, all other models are run over the images once.

    \b
    Examples:
      kd compare --cache test.kd
      kd compare big small resnet=runs/resnet --cache test.kd --test photos@split=test
      kd compare runs/ --cache test.kd --out compared --figures figures
      kd compare big small --cache test.kd --after dp,big,small=local-dir:runs/dp/export --json
    """
    from kdcli.comparing.compare import compare as step
    from kdcli.comparing.figures import write_figures
    from kdcli.plotting import require_matplotlib

    if config.figures is not None:
        require_matplotlib("--figures needs")
    result = step(config)
    if config.figures is not None:
        for path in write_figures(result, config.figures):
            console.note(f"wrote {path}")
    if common.as_json:
        console.document(result.document())
        return
    _print(result)
    if config.out is not None:
        console.finished(f"{config.out}: {size(bytes_in(config.out))}", f"kd report {quote(str(config.out))}")


_PAIRS = {
    "d_acc": "accuracy of the teacher minus the student's, in points",
    "rho+": "images that only the teacher gets right, in percent",
    "rho-": "those that only the student gets right",
    "chance": "rho+ of a teacher that guesses",
    "indep.": "rho+ of a teacher as accurate as this one whose errors fall anywhere",
    "entropy": "of rho+ over the classes, in nats: 0 is one class",
    "top_10_%_in": "classes that hold the first tenth of rho+",
    "DP_+/-": "percent of rho+ and rho- that data partitioning by labels gives to the teacher",
    "unsup._+/-": "the same without labels",
}
_CHANGES = {
    "d_acc": "accuracy of the teacher minus the student's before, in points",
    "d_transf": "accuracy after minus before",
    "d_rho+,_d_rho-": "what that did to the images that only the teacher, or only the student, got right",
    "gain": "percent of what only the teacher got right that the student now gets right",
    "loss": "percent of what the student got right that it now gets wrong",
    "both_wrong": "percent of what both got wrong that the student now gets right",
}


# --- tables -----------------------------------------------------------------------------------


def _print(result: "CompareResult") -> None:
    """Shares of images in percent, differences in points."""
    about = result.data
    console.say(
        f"{about['images']} images of {len(about['classes'])} classes; all but entropy in percent or points",
        "",
    )
    console.table(
        ["model", "is", "family", "parameters", "accuracy"],
        [
            [m.name, m.architecture, m.family, _count(m.parameters), points(m.accuracy)]
            for m in result.models.values()
        ],
    )
    if result.pairs:
        _print_pairs(result)
    if result.changes:
        _print_changes(result.changes)
    if result.methods:
        _print_methods(result.methods)


def _print_pairs(result: "CompareResult") -> None:
    console.say("", "what a teacher knows that a student does not (P3 section 3)")
    rows = []
    for pair in result.pairs:
        given = (pair.given_to_teacher.supervised, pair.given_to_teacher.unsupervised)
        rows.append(
            [
                pair.teacher,
                pair.student,
                signed_points(pair.delta_acc),
                points(pair.rho_pos),
                points(pair.rho_neg),
                points(pair.chance_rho_pos),
                points(pair.independent_rho_pos),
                "-" if pair.entropy is None else f"{pair.entropy:.2f}",
                _most(pair.top[2].classes),
                *(
                    "-" if each is None else f"{points(each.positive, 0)}/{points(each.negative, 0)}"
                    for each in given
                ),
            ]
        )
    header = ["teacher", "student", "d acc", "rho+", "rho-", "chance", "indep.", "entropy", "top 10 % in"]
    console.table([*header, "DP +/-", "unsup. +/-"], rows)
    console.legend(**_PAIRS)
    if result.similarity is not None:
        kind = " (a substitute)" if result.similarity["substitute"] else ""
        console.say(f"similarity of classes: {result.similarity['source']}{kind}; see --json or --figures")


def _most(classes: Sequence[str]) -> str:
    return (
        "-" if not classes else classes[0] if len(classes) == 1 else f"{classes[0]}, {len(classes) - 1} more"
    )


def _print_changes(changes: "Sequence[Change]") -> None:
    console.say(
        "",
        "students after a transfer (P3 section 5.1); gain of what the teacher could give, loss of what was right",
    )
    staged = any(change.stage > 1 for change in changes)
    rows = []
    for change in changes:
        rows.append(
            [
                change.method,
                *([str(change.stage)] if staged else []),
                "+".join(change.teachers) or "-",
                change.student,
                change.after,
                signed_points(change.delta_acc),
                signed_points(change.delta_transf),
                *(
                    (signed_points(change.delta_rho_pos), signed_points(change.delta_rho_neg))
                    if change.teachers
                    else ("-", "-")
                ),
                points(change.gain, 1),
                points(change.loss, 1),
                points(change.both_wrong_now_right if change.teachers else None, 1),
            ]
        )
    header = ["method", *(["stage"] if staged else []), "teacher", "student", "after", "d acc", "d transf"]
    console.table([*header, "d rho+", "d rho-", "gain", "loss", "both wrong"], rows)
    console.legend(**_CHANGES)


def _print_methods(methods: "Sequence[MethodSummary]") -> None:
    console.say(
        "",
        "methods: mean of d transf ± population std; success = share of transfers above 0, median over students",
    )
    from kdcli.metrics.transfer_summary import STRENGTHS

    rows = []
    for method in methods:
        whole = method.whole
        split = [
            method.by_strength[name].delta_transf if name in method.by_strength else None
            for name in STRENGTHS
        ]
        rows.append(
            [
                method.method,
                str(whole.delta_transf.count),
                points(method.success_rate_median, 1),
                _mean(whole.delta_transf),
                *(_mean(each) for each in split),
                _mean(whole.gain, 1),
                _mean(whole.loss, 1),
            ]
        )
    console.table(["method", "pairs", "success", "all", *STRENGTHS, "gain", "loss"], rows)


def _mean(mean: "Mean | None", digits: int = 2) -> str:
    if mean is None or mean.mean is None or mean.std is None:
        return "-"
    sign = "+" if digits == 2 else ""
    return f"{100 * mean.mean:{sign}.{digits}f} ± {100 * mean.std:.{digits}f}"


def _count(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters:,}"
