"""What to type: the hints of the storage layer, which knows what is missing but no command line."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any, Final

from kdcli.cache.provenance import TeacherRecord
from kdcli.errors import Advice, KdError
from kdcli.extract.config import CacheConfig
from kdcli.geometry import EvalGeometry
from kdcli.options.resolving import command_line
from kdcli.outputs import STATS

_NEW = Path("NEW.kd")


def words(advice: Advice) -> str:
    """The sentence, or the command, for some facts."""
    sentence = HINTS[advice.topic]
    if callable(sentence):
        return sentence(**advice.facts)
    facts = {k: quote(str(v)) if isinstance(v, Path) else v for k, v in advice.facts.items()}
    return sentence.format(**facts)


def _fill(
    teachers: Sequence[TeacherRecord],
    view_set: dict[str, Any],
    location: str | None,
    cache: Path,
    add: Sequence[str] = (),
    reads: Mapping[str, Collection[str]] | None = None,
) -> str:
    """The shell command that runs recorded teachers again, exactly as they ran and on the same views.

    Args:
        teachers: their records.
        view_set: of the cache they are in.
        location: data set to run them over; None: what the cache recorded.
        cache: where to; it may be new.
        add: outputs to keep besides, as ``--keep`` writes them.
        reads: teacher -> arrays: keep no more than these are part of.
    """
    count = view_set["train_views"]
    views: dict[str, Any] = {}
    if count:
        views = {"views": f"eval+train:{count}", "recipe": _recipe(view_set)}
    if "decode" in view_set:
        views["decode"] = view_set["decode"]
    groups: dict[str, CacheConfig] = {}
    for record in teachers:
        fields = {name: getattr(record, name) for name in ("dtype", "amp", "temperatures")}
        kept = [
            str(output.output)
            for output in record.outputs.values()
            if output.kind != STATS and (reads is None or output.arrays.keys() & set(reads[record.name]))
        ]
        fields["eval_geometry"] = EvalGeometry.of(record.preprocess).asked
        fields["keep"] = tuple(dict.fromkeys((*kept, *add)))
        known = groups.get(str(fields))
        named = (*(known.teacher if known else ()), f"{record.name}={record.spec}")
        groups[str(fields)] = CacheConfig(data=location, cache=cache, teacher=named, **views, **fields)
    nobody = CacheConfig(data=location, cache=cache, teacher=("SPEC",), **views)
    return " && ".join(map(command_line, groups.values() or [nobody]))


def _recipe(view_set: dict[str, Any]) -> str:
    """What ``--recipe`` calls the recipe of a view set: its name, or its definition if it has none."""
    recipe = dict(view_set["recipe"])
    name = str(recipe.pop("name"))
    return json.dumps(recipe) if name == "custom" else name


def _all(runs: Sequence[Advice]) -> str:
    """Commands one after the other."""
    return " && ".join(map(str, runs))


HINTS: Final[dict[str, str | Callable[..., str]]] = {
    "all": _all,
    "fill": _fill,
    "anew": lambda **run: f"Restore the images, or cache them anew: {_fill(cache=_NEW, **run)}",
    "fill-new": lambda **run: f"Cache them: {_fill(cache=_NEW, **run)}, then add --cache {_NEW}",
    "fill-or-partial": lambda **run: f"{_fill(**run)} (or --allow-partial to go on without them)",
    "name-a-cache": "Give --cache PATH.",
    "cache-twice": "Give each --cache once.",
    "other-views": lambda **run: (
        "Caches whose images are trained on together need the same --recipe, all caches the same --decode: "
        f"{_fill(cache=_NEW, **run)}, then --cache {_NEW} instead"
    ),
    "other-exif": "Give --exif {exif}, or write DATA@exif={exif}.",
    "file-for-cache": "Give the folder that cache-teachers made; kd cache unpack makes one of a packed cache.",
    "folder-for-cache": "Give the folder that kd cache-teachers made.",
    "file-in-place": "Give --cache another path.",
    "place-taken": "Give --cache a new or empty folder.",
    "make": "kd cache-teachers DATA --cache {cache} --teacher SPEC",
    "make-part": "Make this part again: kd cache-teachers",
    "keep-more": "Run the kd cache-teachers command that made the cache again with --keep {array}.",
    "fill-gaps": "Run the kd cache-teachers command that made the cache again; it fills what is missing.",
    "fill-first": "Compute it again first: run the kd cache-teachers command that made the cache.",
    "another-teacher": "Give it another name (--teacher OTHER=SPEC), or all as it is recorded, its spec {spec}",
    "other-pixels": "Install the library versions that kd cache info shows, or make a new cache.",
    "new-format": "Make it anew with kd cache-teachers; --eval-geometry shared:CROP comes nearest to what it holds.",
    "update": "Update kd: pip install --upgrade kdcli",
    "list": "kd cache ls {folder} lists the caches there.",
    "repair": lambda cache: (
        f"Remove these objects there, then push them again from a sound copy: kd cache push CACHE {url}"
        if (url := KdError.names.get(str(cache)))
        else f"Repair it: kd cache repair {quote(str(cache)) if isinstance(cache, Path) else cache}"
    ),
    "foreign-record": "Take it out: kd cache repair {cache}",
    "restore-manifest": "Restore it from a copy; kd never guesses what a cache is.",
    "restore-teacher": "Restore it from a copy; or remove its folder in teachers/ and run the kd cache-teachers "
    "command that made it again: what is computed is found again if the teacher is the same.",
    "restore-classifier": "Take it out: kd cache repair; the kd cache-teachers command that made the cache adds it "
    "again.",
    "restore-output": "Restore it from a copy; or remove it and run the kd cache-teachers command that made it again: "
    "what is computed is found again if the output is the same.",
    "not-resident": "Leave --resident out, or use --prewarm: rows are then read from the cache as they are needed.",
    "small-stage": "Set --stage, or KD_STAGE, to a larger disk; or give --stage-limit.",
    "holder": "Let it finish, or stop it, then run the same command again; kd cache info {cache} shows who holds what.",
    "busy": "Let them finish or stop them first; --force removes it under their hands.",
    "merge": "kd cache merge A B --to ALL",
    "merge-alike": "Merge caches made with the same data, views and --block-rows; kd cache pack and unpack --backend "
    "change the backend.",
    "merge-other-bytes": "Leave one of them out. Equal --batch-size, device and versions give equal bytes.",
    "not-packed": "Give what kd cache pack wrote.",
    "pack-again": "Copy the file again from where it came from, or pack the cache again: kd cache pack",
    "pack-exists": "Give another name, or --overwrite.",
    "pack-ending": "For example --to packed.h5",
    "push-first": "Check the path. A push that was killed is completed by the same kd cache push.",
    "push-again": "Remove it there if it is there, then push it again from a sound copy: kd cache push; what was "
    "pulled stays.",
    "push-changed": "Remove this object, then push it again from a sound copy: kd cache push; what was pulled stays.",
    "pull-first": "Pull it first: kd cache pull; or give another path.",
    "no-conditions": "Use a store that honours it, or copy what kd cache pack makes.",
    "no-writers": "Give --cache a folder that the writers share; or cache locally, then kd cache push, or copy what kd "
    "cache pack makes.",
    "push-unfinished": "Let kd cache push finish first, or give another path.",
    "needs-licence": "Add --licence ID, by the hub's identifiers (such as cc-by-4.0), or --licence other:NAME.",
    "images-kept": lambda cache, teacher, kinds: (
        f"Remove them (kd cache rm {quote(str(cache))} --teacher {teacher}/pixels --yes), or push a part without them: "
        f"kd cache pull {quote(f'file://{cache.absolute()}')} --keep {kinds} --to PART.kd"
    ),
    "stage-limit": "Give a higher --stage-limit, or leave it out.",
    "no-terms": "Leave --licence and --private out.",
    "fewer-views": "Leave --views out to pull all.",
    "pack-zstd": "Use --compress gzip, or a name that ends in .zarr or .zarr.zip.",
}
