"""``kd report``: results of kd as one page, or as tables and charts."""

from collections.abc import Mapping, Sequence

from kdcli.methods.base import method_names
from kdcli.plotting import require_matplotlib
from kdcli.reporting.comparisons import comparison_sections
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.document import Document, Notes, Section
from kdcli.reporting.embedding import require_tsne, tsne_section
from kdcli.reporting.formats import default_out, require_place, write
from kdcli.reporting.inputs import read_inputs
from kdcli.reporting.joints import joints_section
from kdcli.reporting.material import Joint, Material, Run
from kdcli.reporting.origins import commands_section, versions_section
from kdcli.reporting.probes import probe_section
from kdcli.reporting.protocols import by_protocol, by_test
from kdcli.reporting.result import ReportResult
from kdcli.reporting.sequences import sequences_section
from kdcli.reporting.students import curves_section, main_of, students_section, top1_of
from kdcli.reporting.studies import cache_section, ranking_section, read_caches, scores_section


def report(config: ReportConfig) -> ReportResult:
    """Read the inputs and write the report.

    Args:
        config: inputs, format, place.

    Raises:
        NotFoundError: an input is not there, or nothing is in it.
        BadDataError: an input is of no known kind, or several protocols are in one table.
        UsageError: ``--tsne`` without images.
        OutputExistsError: the place holds something else.
        MissingExtraError: matplotlib is not installed.
        StorageError, NoSpaceError: something cannot be read or written.
    """
    out = config.out or default_out(config.format)
    if config.format in ("html", "svg", "png"):
        require_matplotlib("the report's charts need")
    require_place(out, config.format)
    material = read_inputs(config.inputs)
    require_tsne(config, material.caches, material.runs)
    document = build(config, material)
    files = write(document, out, config.format)
    return ReportResult(
        out,
        config.format,
        tuple(files),
        material.count(),
        tuple(section.title for section in document.sections),
    )


def build(config: ReportConfig, material: Material) -> Document:
    """The report as a document.

    Raises:
        KdError: see :func:`report`.
    """
    tests = by_test(material.runs, config.separate)
    probes = by_protocol(material.probes, config.separate)
    caches = read_caches(material.caches)
    sections: list[Section | None] = []
    for place, (name, runs) in enumerate(tests.items(), 1):
        title = (
            "Students"
            if len(tests) == 1
            else f"Students tested on {name}"
            if name
            else "Students without a test"
        )
        sections.append(students_section(runs, title, "students" if len(tests) == 1 else f"students-{place}"))
    if material.diverged:
        lines = tuple(f"{name} diverged: {message}" for name, message in material.diverged)
        sections.append(Section("Students that diverged", (Notes(lines),)))
    sections += [
        ranking_section(material.rankings),
        scores_section(material.rankings, material.runs),
        sequences_section(material.runs),
        joints_section(material),
        probe_section(probes, material.contrasts, material.tallies),
        *comparison_sections(material.comparisons),
        curves_section(tests),
        tsne_section(config, material.caches, material.runs),
        cache_section(caches),
        commands_section(material, caches),
        versions_section(material, caches),
    ]
    known = tuple(section for section in sections if section is not None)
    return Document(config.title, _lead(material, tests, len(caches)), "", known)


# --- sentences --------------------------------------------------------------------------------


def _lead(material: Material, tests: Mapping[str, Sequence[Run]], caches: int) -> str:
    sentences = [_best(name, runs, len(tests) > 1) for name, runs in tests.items()]
    if len(material.rankings) == 1:
        first, *others = material.rankings[0].ranking.sources
        sentences.append(f"The ranking puts {first.name} first of {len(others) + 1} sources.")
    if material.joints:
        sentences.append(_joint(material.joints))
    for compared in material.comparisons:
        count = len(compared.document["models"])
        gains = [each["delta_transf"] for each in compared.document["transfers"]]
        won = sum(gain > 0 for gain in gains)
        sentences.append(
            f"{count} models were compared on {compared.document['data']['images']} images"
            + (f"; {won} of {len(gains)} transfers made the student better" if gains else "")
            + "."
        )
    if not any(sentences):
        found = [f"{count} {kind}" for kind, count in material.count().items() if count]
        return f"{', '.join(found).capitalize()}."
    return " ".join(sentence for sentence in sentences if sentence)


def _joint(joints: Sequence[Joint]) -> str:
    reached = {
        joint.name: joint.result["metrics"]["test_top1"]
        for joint in joints
        if "test_top1" in joint.result.get("metrics", {})
    }
    if not reached:
        return ""
    best = max(reached, key=lambda name: reached[name])
    among = f"best of {len(joints)} joint teachers is" if len(joints) > 1 else "joint teacher is"
    sets = len(next(joint for joint in joints if joint.name == best).result["heads"])
    over = f" on the mean of {sets} data sets" if sets > 1 else ""
    return f"The {among} {best} with {100 * reached[best]:.1f} %{over}."


def _best(name: str, runs: Sequence[Run], several: bool) -> str:
    tested = [(score, run) for run in runs if (score := main_of(run)) is not None]
    if not tested:
        return ""
    best, run = max(tested, key=lambda pair: pair[0])
    where = f" on {name}" if several else " on the test set"
    unit = "%" if top1_of(run) is not None else "% mAP"
    if len(tested) == 1:
        return f"{run.name} reaches {100 * best:.1f} {unit}{where}."
    sentence = (
        f"The best of {len(tested)} students{where} is {run.name} ({run.method}) with {100 * best:.1f} {unit}"
    )
    without_teachers = method_names("only_labels")
    plain = [accuracy for accuracy, each in tested if each.method in without_teachers]
    if plain and run.method not in without_teachers:
        sentence += f"; labels alone reach at most {100 * max(plain):.1f} {unit}"
    return f"{sentence}."
