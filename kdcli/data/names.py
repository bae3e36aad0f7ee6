"""Names that people take for one: they differ only by case, by how Unicode spells them, or by what nobody sees."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from kdcli.errors import BadDataError

_FORMS: Final = {"NFC": "composed, NFC", "NFD": "decomposed, NFD"}


def folded(name: str) -> str:
    """What two names that look alike have in common: composed, without case, without what is not seen."""
    if name.isascii() and name.isprintable():
        return name.casefold()
    return unicodedata.normalize("NFC", "".join(filter(_is_seen, name)).casefold())


def _is_seen(character: str) -> bool:
    """Neither a control nor a format character (zero-width, joiners, marks of direction), nor a variation selector."""
    return unicodedata.category(character) not in ("Cc", "Cf") and not "\ufe00" <= character <= "\ufe0f"


def alike(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of different names that :func:`folded` makes one; sorted. Of single letters, case tells them apart."""
    different = set(names)
    if len(set(map(_letter_or_folded, different))) == len(different):
        return []
    groups: dict[str, list[str]] = {}
    for name in sorted(different):
        groups.setdefault(_letter_or_folded(name), []).append(name)
    return [(group[0], other) for group in groups.values() for other in group[1:]]


def _letter_or_folded(name: str) -> str:
    return name if len(name) == 1 else folded(name)


def told_apart(*names: str) -> list[str]:
    """Names in quotes; of those that look the same, how Unicode spells each: ``'café' (composed, NFC)``."""
    shown = [unicodedata.normalize("NFC", name) for name in names]
    return [
        f"'{name}'" if shown.count(seen) < 2 else f"'{name}' ({_form(name)})"
        for name, seen in zip(names, shown, strict=True)
    ]


def _form(name: str) -> str:
    for form, words in _FORMS.items():
        if unicodedata.is_normalized(form, name):  # type: ignore[arg-type]
            return words
    return f"neither NFC nor NFD: {ascii(name)[1:-1]}"


def same_but_for_form(name: str, among: Iterable[str]) -> str | None:
    """The one of ``among`` that is spelled otherwise in Unicode but looks the same, if there is one."""
    wanted = unicodedata.normalize("NFC", name)
    return next((one for one in among if one != name and unicodedata.normalize("NFC", one) == wanted), None)


def require_distinct(classes: Sequence[str], where: str) -> None:
    """Refuse class names that differ only by case, Unicode form or invisible characters: one class would become two.

    Raises:
        BadDataError: naming the first two, or one with a NUL, which is no text.
    """
    if nul := next((name for name in classes if "\0" in name), None):
        raise BadDataError(f"{where}: the class {nul!r} holds a NUL character", "Write it without.")
    if pairs := alike(classes):
        one, other = told_apart(*pairs[0])
        more = f", and {len(pairs) - 1} more such pairs" if len(pairs) > 1 else ""
        raise BadDataError(
            f"{where}: the classes {one} and {other} differ only by case, Unicode form or invisible characters{more}",
            "If they are one class, write it alike everywhere; if not, rename one of them.",
        )


def listed(counts: Mapping[str, int]) -> str:
    """Counts as ``.apng 2, .ico 1``, the most first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in ordered[:8]) + (", ..." if len(ordered) > 8 else "")
