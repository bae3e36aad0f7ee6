"""Reads the inputs of a report: runs, sweeps, caches, comparisons and JSON documents, recognised by their content."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, final

from kdcli.cache.owned import looks_like_cache
from kdcli.cache.stores.mirror import mirrored
from kdcli.console import console
from kdcli.errors import BadDataError, NotFoundError, nearest
from kdcli.files import real_path, storage_errors
from kdcli.ranking.documents import ranking_of
from kdcli.reading import parse_json, read_json, read_text
from kdcli.reading_yaml import read_yaml
from kdcli.reporting.material import Compared, Joint, Material, Origin, Ranked, Run
from kdcli.reporting.shapes import checked
from kdcli.training.rundir import stage_folder

RESULT, RUN, SWEEP, METRICS, CONFIG, COMPARE, FUSED = (
    "result.json", "run.json", "sweep.json", "metrics.jsonl", "config.yaml", "compare.json", "fused.json",
)  # fmt: skip
_KINDS = (
    "kd report reads runs and sweeps of kd train-student, joint teachers of kd fuse-teachers, caches, folders of "
    "kd compare --out, and what rank-sources, eval-probe, compare, train-student and fuse-teachers print with --json."
)
_SIGNS = {
    "error": {"error"},
    "ranking": {"metric", "on", "probe", "sources"},
    "compare": {"models", "pairs", "transfers"},
    "sweep": {"students", "diverged"},
    "run": {"method", "epochs", "history", "out"},
    "joint teacher": {"levels", "heads", "parents", "metrics"},
    "joint": {"joint"},
    "probe": {"representation", "accuracy"},
    "probes": {"results", "comparisons"},
    "evidence": {"evidence"},
}
"""Keys by which each kind of document is known, in the order in which they are looked for."""
_SEQUENTIAL = "sequential"
_WITH_ORIGIN = ("ranking", "evidence", "compare", "probe", "probes")
"""Documents that record what made them themselves; a run's folder has it in config.yaml."""


Named = TypeVar("Named", Run, Joint)


@final
class _Seen:
    """Places that were read; ``met`` counts those that were met again, too."""

    def __init__(self) -> None:
        self.met = 0
        self._places: set[Path] = set()

    def new(self, path: Path) -> bool:
        """Whether a place is met for the first time."""
        self.met += 1
        known = real_path(path) in self._places
        self._places.add(real_path(path))
        return not known


def read_inputs(places: Sequence[Path | str]) -> Material:
    """Read everything; folders that are nothing themselves are searched.

    Raises:
        NotFoundError: a place is not there, or nothing that a report reads is in it.
        BadDataError: a file is of no known kind, or damaged.
        StorageError: something cannot be read.
    """
    material = Material()
    seen = _Seen()
    for place in map(mirrored, places):
        if not os.path.lexists(place):
            names = [each.name for each in place.absolute().parent.glob("*")]
            raise NotFoundError(f"{place} does not exist.{nearest(place.name, names)}", _KINDS)
        before = seen.met
        if place.is_dir():
            _read_folder(place, material, seen)
        else:
            _read_file(place, material, seen)
        if seen.met == before:
            raise NotFoundError(f"{place} holds nothing that a report is made of", _KINDS)
    material.runs, material.joints = _named(material.runs), _named(material.joints)
    return material


# --- folders ----------------------------------------------------------------------------------


def _read_folder(folder: Path, material: Material, seen: _Seen) -> None:
    """What a folder is, or what is below it; links to folders are not followed below the folder given."""
    with storage_errors(folder):
        entries = sorted(folder.iterdir())
    names = {entry.name for entry in entries}
    if looks_like_cache(folder):
        if seen.new(folder):
            material.caches.append(folder)
    elif COMPARE in names:
        _read_file(folder / COMPARE, material, seen)
    elif names & {RESULT, RUN}:
        if seen.new(folder):
            _read_run(folder, material)
        for entry in entries:  # stages of a sequence, rates of a grid
            if entry.is_dir() and not entry.is_symlink() and (entry / RUN).is_file():
                console.detail(f"{entry} is a part of {folder}: left out")
    else:
        if SWEEP in names:
            _read_diverged(folder / SWEEP, material)
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                _read_folder(entry, material, seen)
            elif entry.suffix == ".json" and entry.name != SWEEP and entry.is_file():
                _read_if_known(entry, material, seen)


def _read_if_known(path: Path, material: Material, seen: _Seen) -> None:
    """A JSON file that was not named itself: one of another kind is none of the report's business."""
    try:
        document = read_json(path)
    except BadDataError:
        document = None
    if _kind_of(document) is None:
        console.detail(f"{path} is no document of kd: left out")
    else:
        _read_file(path, material, seen)


def _read_run(folder: Path, material: Material) -> None:
    result = read_json(folder / RESULT) if (folder / RESULT).exists() else {}
    if result and _kind_of(result) not in ("run", "joint teacher"):
        raise BadDataError(f"{folder / RESULT} is no result of kd train-student", f"Leave it out. {_KINDS}")
    record = checked("record", read_json(folder / RUN), folder / RUN) if (folder / RUN).exists() else {}
    identity = record.get("identity", {})
    if _kind_of(result) == "joint teacher" or identity.get("step") == "fuse-teachers":
        _read_joint(folder, result, record, material)
        return
    if (folder / RESULT).exists():
        checked("run", result, folder / RESULT)
    material.versions.append(result.get("versions") or record.get("versions") or {})
    material.runs.append(
        Run(
            name=str(folder),
            folder=folder,
            result=result,
            identity=identity,
            config=_config_of(folder / CONFIG),
            history=tuple(result.get("history") or _history_so_far(folder, identity)),
        )
    )


def _history_so_far(folder: Path, identity: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The epochs of a run that goes on; of a sequence those of its stages, one after the other."""
    if _SEQUENTIAL not in identity:
        yield from _history_of(folder / METRICS)
        return
    for stage, teacher in enumerate(identity[_SEQUENTIAL]["teachers"], 1):
        for epoch in _history_of(stage_folder(folder, stage, teacher) / METRICS):
            yield {**epoch, "stage": stage}


def _read_joint(
    folder: Path, result: Mapping[str, Any], record: Mapping[str, Any], material: Material
) -> None:
    if result:
        checked("joint teacher", result, folder / RESULT)
    place = folder / FUSED
    described = checked("fused", read_json(place), place) if place.exists() else {}
    joint = Joint(
        str(folder),
        result,
        record.get("identity", {}),
        tuple(described.get("parents", ())),
        tuple(_history_of(folder / METRICS)),
    )
    material.joints.append(joint)
    _note_origin(folder.absolute().name, result or record, material)


def _config_of(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    with storage_errors(path):
        document = read_yaml(path, error=BadDataError, hint="Restore the file or remove it.")
    return checked("options", document, path)


def _history_of(path: Path) -> Iterator[dict[str, Any]]:
    """The epochs of a run that goes on; a line that is just being written is no epoch yet."""
    if not path.exists():
        return
    with storage_errors(path):
        lines = read_text(path).splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        source = f"{path}, line {number},"
        try:
            document = parse_json(line, source, hint="Restore the file.")
        except BadDataError:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise
        yield checked("epoch", document, source)


def _read_diverged(path: Path, material: Material) -> None:
    for each in checked("sweep record", read_json(path), path).get("diverged", []):
        material.diverged.append((f"{path.parent.name}/{each['name']}", each["message"]))


# --- files ------------------------------------------------------------------------------------


def _kind_of(document: Any) -> str | None:
    """What a JSON document is, by the keys that only this kind has; None for an unknown one."""
    if not isinstance(document, dict):
        return None
    return next((kind for kind, keys in _SIGNS.items() if document.keys() >= keys), None)


def _read_file(path: Path, material: Material, seen: _Seen) -> None:
    if path.name in (RESULT, RUN, METRICS, CONFIG) and (path.parent / RUN).is_file():
        if seen.new(path.parent):
            _read_run(path.parent, material)
        return
    if path.name == SWEEP and path.parent.joinpath(SWEEP).is_file():
        _read_folder(path.parent, material, seen)
        return
    if not seen.new(path):
        return
    document = read_json(path)
    kind = _kind_of(document)
    if kind is not None and kind != "error":
        checked(kind, document, path)
    if kind in _WITH_ORIGIN:
        _note_origin(path.parent.name if path.name == COMPARE else path.stem, document, material)
    match kind:
        case "ranking":
            ranking = ranking_of(document, path)
            material.rankings.append(Ranked(path, ranking, document.get("evidence") or {}))
        case "evidence":
            material.evidence.append(document["evidence"])
        case "compare":
            kept = path.parent if (path.parent / "predictions.safetensors").is_file() else None
            material.comparisons.append(Compared(path, document, kept))
        case "sweep":
            for each in document["students"]:
                _read_printed(checked("run", each, path), material, seen)
            material.diverged += [(each["name"], each["message"]) for each in document["diverged"]]
        case "run" | "joint teacher":
            _read_printed(document, material, seen)
        case "probe":
            material.probes.append(_probe_of(document, path))
        case "probes":
            material.probes += [
                _probe_of(each, path, document.get("baseline")) for each in document["results"]
            ]
            material.contrasts += document["comparisons"]
            if document.get("tally"):
                material.tallies.append(document)
        case "joint":
            for each in document["joint"].values():
                _read_printed(checked("joint teacher", each, path), material, seen)
        case "error":
            message = document["error"].get("message") if isinstance(document["error"], dict) else "?"
            raise BadDataError(
                f"{path} holds an error, not a result: {message}", "Run the command that wrote it again."
            )
        case _:
            raise BadDataError(f"{path} is nothing that a report is made of", _KINDS)


def _read_printed(document: Mapping[str, Any], material: Material, seen: _Seen) -> None:
    """A result as a command printed it: its folder says more, if it is still there."""
    folder = Path(str(document["out"]))
    if (folder / RUN).is_file():
        if seen.new(folder):
            _read_run(folder, material)
    elif _kind_of(document) == "joint teacher":
        material.joints.append(Joint(str(folder), document, {}, (), ()))
        _note_origin(folder.name, document, material)
    else:
        material.versions.append(document.get("versions") or {})
        material.runs.append(Run(str(folder), None, document, {}, {}, tuple(document["history"])))


def _note_origin(title: str, document: Mapping[str, Any], material: Material) -> None:
    """Remember the command and the versions that a result recorded; one that is not finished has no command yet."""
    created = document.get("created") or {}
    if "command" in created:
        material.origins.append(Origin(title, str(created["command"])))
    material.versions.append(created.get("versions") or document.get("versions") or {})


def _probe_of(document: Mapping[str, Any], path: Path, baseline: str | None = None) -> Mapping[str, Any]:
    return {"from": str(path), "baseline": baseline, **document}


# --- names ------------------------------------------------------------------------------------


def _named(items: Sequence[Named]) -> list[Named]:
    """Items, each called by the end of its path that no other shares."""
    parts = [Path(item.name).absolute().parts for item in items]
    named = []
    for item, own in zip(items, parts, strict=True):
        length = 1
        while length < len(own) and sum(other[-length:] == own[-length:] for other in parts) > 1:
            length += 1
        named.append(replace(item, name="/".join(own[-length:])))
    return named
