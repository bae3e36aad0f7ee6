"""Paths on a command line that cannot be used, refused before anything heavy is loaded.

The steps refuse the same, by the same functions; this only saves the seconds that importing torch takes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from kdcli.errors import NotFoundError
from kdcli.files import beside
from kdcli.options.command import Command, OptionField
from kdcli.options.fields import is_possible, is_url

Given = Mapping[str, list[str]]
"""The words of a line, by field."""


def refuse_early(command: Command, arguments: Sequence[str]) -> None:
    """Look for what the options marked ``there`` name.

    Words are read without knowing a method's own options, which live beside its loss: what follows such an option is
    left alone, as are files of options.

    Raises:
        KdError: as the step would.
    """
    if not {"-h", "--help", "--print-config"}.isdisjoint(arguments):
        return
    fields = [field for field in command.fields().values() if field.visible]
    given = _given(fields, arguments)
    for field in fields:
        if (look := _LOOKS.get(field.mark("there"))) is not None:
            for word in filter(is_possible, given.get(field.name, ())):
                look(word, given)


def _given(fields: Sequence[OptionField], arguments: Sequence[str]) -> dict[str, list[str]]:
    by_word = {word: field.name for field in fields for word in field.words}
    given: dict[str, list[str]] = {}
    for word, after in pairwise([*arguments, ""]):
        option, equals, value = word.partition("=")
        if option.startswith("-") and option in by_word:
            given.setdefault(by_word[option], []).append(value if equals else after)
    places = [field for field in fields if field.mark("positional")]
    leading = list(arguments)
    if first := [number for number, word in enumerate(leading) if word.startswith("-")]:
        leading = leading[: first[0]]
    for field in places:
        given[field.name], leading = (leading, []) if field.several else (leading[:1], leading[1:])
    return given


_FILES = ("folder/", "csv/", "tar/", "parquet/")
"""Sources whose opening looks at files, and loads nothing that takes long."""

# --- what must be there -----------------------------------------------------------------------


def _look_for_data(text: str, given: Given) -> None:
    from kdcli.data.remote import Objects, is_remote
    from kdcli.data.sources import open_source
    from kdcli.data.spec import DataSpec

    root = Path(given["data_root"][-1]) if given.get("data_root") else None
    named, equals, spec = text.partition("=")
    if equals and named.replace("-", "_").isidentifier() and not Path(text.partition("@")[0]).exists():
        text = spec  # NAME=DATA
    whole = DataSpec.parse(text)
    for each in whole.members or (whole,):
        scheme, _, rest = each.source.partition("/")
        if scheme in ("tar", "parquet") and is_remote(rest):
            Objects.parse(rest)
        elif each.source.startswith(_FILES):
            open_source(each, root, download=False)


def _look_for_cache(text: str, given: Given) -> None:
    if is_url(text):
        from kdcli.cache.stores.opening import open_place

        open_place(text)
    elif not (Path(text) / "manifest.json").is_file():
        from kdcli.cache.layout import load_manifest

        load_manifest(Path(text))


def _look_for_anything(text: str, given: Given) -> None:
    path = Path(text)
    if not is_url(text) and not os.path.lexists(path):
        raise NotFoundError(
            f"{path} does not exist.{beside(path)}", "Check the path; --help says what is read."
        )


def _look_for_ranking(text: str, given: Given) -> None:
    from kdcli.ranking.documents import require_ranking

    cache, data = given.get("cache", ["CACHE"]), given.get("data") or ["DATA"]
    require_ranking(text, cache, data[0])


def _look_at_out(text: str, given: Given) -> None:
    from kdcli.training.out import require_folder

    if "sweep" not in given:
        require_folder(Path(text))


def _look_for_model(text: str, given: Given) -> None:
    from kdcli.models.folder import require_model_folder

    named, equals, spec = text.partition("=")
    folder = (spec if equals and named.replace("-", "_").isidentifier() else text).partition("local-dir:")
    if not folder[0] and folder[2] and not folder[2].endswith("]"):  # what is told in brackets is read later
        require_model_folder(Path(folder[2]))


_LOOKS: Mapping[Any, Callable[[str, Given], None]] = {
    "data": _look_for_data,
    "cache": _look_for_cache,
    "model": _look_for_model,
    "anything": _look_for_anything,
    "ranking": _look_for_ranking,
    "free": _look_at_out,
}
