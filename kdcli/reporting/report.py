"""``kd report``: results of kd as one page, or as tables and charts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kdcli.reporting.comparisons import comparison_sections
from kdcli.reporting.config import ReportConfig
from kdcli.reporting.document import Document, Notes, Section
from kdcli.reporting.embedding import require_tsne, tsne_section
from kdcli.reporting.formats import default_out, require_place, write
from kdcli.reporting.inputs import read_inputs
from kdcli.reporting.joints import joints_section
from kdcli.reporting.looking import look_at_taught, look_at_test
from kdcli.reporting.looks import Look
from kdcli.reporting.material import Joint, Material, Run
from kdcli.reporting.origins import commands_section, versions_section
from kdcli.reporting.pictures import answers_section, classes_gallery
from kdcli.reporting.probes import probe_section
from kdcli.reporting.protocols import by_protocol, by_test
from kdcli.reporting.result import ReportResult
from kdcli.reporting.sequences import sequences_section
from kdcli.reporting.standing import standing
from kdcli.reporting.students import curves_section, students_section
from kdcli.reporting.studies import cache_section, ranking_section, read_caches, scores_section, trust

_MOST_PICTURED = 2
"""Test sets of which images are shown."""


def report(config: ReportConfig, intro: str = "") -> ReportResult:
    """Read the inputs and write the report.

    Args:
        config: inputs, format, place.
        intro: what was done, on what, for a caller that knows; below what was found.

    Raises:
        NotFoundError: an input is not there, or nothing is in it.
        BadDataError: an input is of no known kind, or several protocols are in one table.
        UsageError: ``--tsne`` without images.
        OutputExistsError: the place holds something else.
        StorageError, NoSpaceError: something cannot be read or written.
    """
    out = config.out or default_out(config.format)
    require_place(out, config.format)
    material = read_inputs(config.inputs)
    require_tsne(config, material.caches, material.runs)
    document = replace(build(config, material), intro=intro)
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
    looks = {name: look_at_test(config, runs, material.caches) for name, runs in tests.items()}
    sections: list[Section | None] = [
        *_student_sections(tests),
        *_picture_sections(config, material, looks),
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
    if material.diverged:
        lines = tuple(f"{name} diverged: {message}" for name, message in material.diverged)
        sections.insert(len(tests), Section("Students that diverged", (Notes(lines),)))
    lead, *points = _findings(material, tests, looks) or [_inventory(material)]
    known = tuple(section for section in sections if section is not None)
    return Document(config.title, lead, "", known, tuple(points))


def _student_sections(tests: Mapping[str, Sequence[Run]]) -> list[Section]:
    if len(tests) == 1:
        return [students_section(runs, "Students", "students") for runs in tests.values()]
    return [
        students_section(
            runs, f"Students tested on {name}" if name else "Students without a test", f"students-{place}"
        )
        for place, (name, runs) in enumerate(tests.items(), 1)
    ]


def _picture_sections(
    config: ReportConfig, material: Material, looks: Mapping[str, Look | str | None]
) -> list[Section | None]:
    """Images of each class, then right and wrong, for each test set; of the first two with thumbnails."""
    sections: list[Section | None] = []
    shown = [look for look in looks.values() if isinstance(look, Look)]
    told = any(not each.student for look in shown for each in look.answers.values())
    first = None if told or not config.images else look_at_taught(config, material.runs, material.caches)
    first = first or next(iter(shown), None)
    if first is not None and (gallery := classes_gallery(first)) is not None:
        sections.append(Section("Images", (gallery,)))
    for place, (name, look) in enumerate(looks.items(), 1):
        suffix, own = (f" on {name}", f"answers-{place}") if len(looks) > 1 else ("", "answers")
        if isinstance(look, str):
            sections.append(Section(f"Answers{suffix}", (Notes((look,)),)))
        elif look is not None:
            missing = bool(material.caches) and all(each.student for each in look.answers.values())
            thumbs = look.thumbs if place <= _MOST_PICTURED else ()
            sections.append(answers_section(replace(look, thumbs=thumbs), f"Answers{suffix}", own, missing))
    return sections


# --- sentences --------------------------------------------------------------------------------


def _findings(
    material: Material, tests: Mapping[str, Sequence[Run]], looks: Mapping[str, Look | str | None]
) -> list[str]:
    """What was found, the most important first."""
    sentences = []
    for name, runs in tests.items():
        look = looks.get(name)
        right = (
            {each: look.right(each) for each in look.answers} if isinstance(look, Look) and look.whole else {}
        )
        sentences += standing(runs, right, f"on {name}" if len(tests) > 1 else "on the test set")
    if len([name for name in tests if name]) > 1:
        sentences.append("Accuracies on different test images are not compared with each other.")
    if len(material.rankings) == 1:
        sentences.append(trust(material.rankings[0]))
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
    return [sentence for sentence in sentences if sentence]


def _inventory(material: Material) -> str:
    found = [f"{count} {kind}" for kind, count in material.count().items() if count]
    return f"{', '.join(found).capitalize()}."


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
