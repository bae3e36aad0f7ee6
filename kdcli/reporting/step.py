"""``kd report``: results of kd as one page, or as tables and charts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli.config.reporting import ReportConfig
from kdcli.plotting import require_matplotlib
from kdcli.reporting.comparisons import comparison_sections
from kdcli.reporting.document import Command, Commands, Document, Facts, Fold, Notes, Part, Section
from kdcli.reporting.embedding import require_tsne, tsne_section
from kdcli.reporting.formats import default_out, require_place, write
from kdcli.reporting.inputs import Material, Run, read_inputs
from kdcli.reporting.protocols import by_protocol, by_test
from kdcli.reporting.students import curves_section, run_commands, students_section, top1_of
from kdcli.reporting.studies import (
    cache_commands,
    cache_section,
    probe_section,
    ranking_section,
    read_caches,
    scores_section,
)
from kdcli.runtime import versions

_FEW_COMMANDS = 6


@final
@dataclass(frozen=True, slots=True)
class ReportResult:
    """What ``kd report`` wrote.

    Attributes:
        out: the file or folder.
        format: of it.
        files: all of them.
        inputs: how many there were of each kind.
        sections: titles.
    """

    out: Path
    format: str
    files: tuple[Path, ...]
    inputs: Mapping[str, int]
    sections: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "out": str(self.out.absolute()),
            "format": self.format,
            "files": [str(file.absolute()) for file in self.files],
            "inputs": dict(self.inputs),
            "sections": list(self.sections),
        }


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
        probe_section(probes, material.contrasts),
        *comparison_sections(material.comparisons),
        curves_section(material.runs),
        tsne_section(config, material.caches, material.runs),
        cache_section(caches),
        _commands([*cache_commands(caches), *run_commands(material.runs)]),
        _versions(material.runs),
    ]
    known = tuple(section for section in sections if section is not None)
    return Document(config.title, _lead(material, tests, len(caches)), "", known)


# --- sentences --------------------------------------------------------------------------------


def _lead(material: Material, tests: Mapping[str, Sequence[Run]], caches: int) -> str:
    sentences = [_best(name, runs, len(tests) > 1) for name, runs in tests.items()]
    if len(material.rankings) == 1:
        first, *others = material.rankings[0].ranking.sources
        sentences.append(f"The ranking puts {first.name} first of {len(others) + 1} sources.")
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


def _best(name: str, runs: Sequence[Run], several: bool) -> str:
    tested = [(accuracy, run) for run in runs if (accuracy := top1_of(run)) is not None]
    if not tested:
        return ""
    best, run = max(tested, key=lambda pair: pair[0])
    where = f" on {name}" if several else " on the test set"
    if len(tested) == 1:
        return f"{run.name} reaches {100 * best:.1f} %{where}."
    sentence = (
        f"The best of {len(tested)} students{where} is {run.name} ({run.method}) with {100 * best:.1f} %"
    )
    plain = [accuracy for accuracy, each in tested if each.method == "labels-only"]
    if plain and run.method != "labels-only":
        sentence += f"; labels alone reach at most {100 * max(plain):.1f} %"
    return f"{sentence}."


# --- commands and versions --------------------------------------------------------------------


def _commands(commands: Sequence[Command]) -> Section | None:
    if not commands:
        return None
    parts: list[Part] = [Commands(tuple(commands[:_FEW_COMMANDS]))]
    if len(commands) > _FEW_COMMANDS:
        left = tuple(commands[_FEW_COMMANDS:])
        parts.append(Fold(f"{len(left)} more commands", (Commands(left),)))
    return Section("Commands", tuple(parts))


def _versions(runs: Sequence[Run]) -> Section:
    """Versions that the runs recorded, where they differ with how many runs; of this report without runs."""
    recorded: dict[str, dict[str, int]] = {}
    for run in runs:
        for name, version in (run.result.get("versions") or {}).items():
            counts = recorded.setdefault(name, {})
            counts[version] = counts.get(version, 0) + 1
    if not recorded:
        return Section("Versions", (Facts(tuple(versions().items())),))
    pairs = tuple(
        (name, next(iter(c)) if len(c) == 1 else ", ".join(f"{v} ({n} runs)" for v, n in c.items()))
        for name, c in recorded.items()
    )
    return Section("Versions", (Facts(pairs),))
