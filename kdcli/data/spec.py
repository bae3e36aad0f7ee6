"""The data grammar: ``SOURCE[@key=value,...]``.

    flowers@split=train,classes=t-split/5:2,labelled=0.2
    folder//data/flowers    torch/cifar10@split=test    hfds/org/name    sklearn/digits    glyphs/greek

SOURCE is a folder, or ``SCHEME/NAME`` with a scheme of :data:`~kdcli.registry.SOURCES`, or with a kind of source of
one's own, ``pkg.mod:OBJECT[/NAME]``. What follows the last ``@`` is modifiers only if it looks like ``key=value``, so
paths may contain ``@``. In values, ``%2C``, ``%40``,
``%2B`` and ``%25`` stand for ``,``, ``@``, ``+`` and ``%``. Modifiers apply in this order, however written:

    split=NAME        the part of that name (train, val, test and their long forms)
    split=A/B:PART    a share of each class, see :class:`Split`; ``split=NAME/A/B:PART`` a share of that part
    without=FILE      not the samples whose keys are the lines of FILE (``kd audit --write-exclude`` writes one)
    labels=TASK       which labels; ``labels=none`` forgets the labels, after all the others used them
    classes=CHOICE    see :class:`ClassSubset`
    n=N               at most N samples at random, classes in proportion
    shots=K           K samples of each class at random, all where a class has fewer
    labelled=F        only a fraction F in (0, 1] of each class, at least one sample, keeps its label
    seed=S            seed of all of these, default 0
    exif=ignore       images as they are stored; ``apply``, the default, turns them as EXIF's orientation says

A kind of source may have modifiers of its own.
``A++B`` is one data set of the images of both, each with modifiers of its own; a folder after ``++`` is written
``folder/PATH``, so that a path may contain ``++``. Labels stay where all members with labels name the same classes.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, cast, final, get_args
from urllib.parse import unquote

from kdcli.errors import UsageError, nearest
from kdcli.registry import SOURCES, is_object_path

Exif = Literal["apply", "ignore"]
KEYS = ("split", "without", "classes", "shots", "labelled", "n", "labels", "seed", "exif")
NO_LABELS = "none"
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing")
"""What splits are usually called."""

_SHARES = re.compile(r"(?:(.*[^/0-9][^/]*)/)?([0-9]+(?:/[0-9]+)+)(?::(.*))?", re.DOTALL)
_MODIFIERS = re.compile(r"[A-Za-z_-]+=")
JOIN = "++"
_JOINT = re.compile(rf"{re.escape(JOIN)}(?=([\w.:-]+/?))")
_ESCAPES = str.maketrans({character: f"%{ord(character):02X}" for character in "%,@+:"})
_EXAMPLE = "For example flowers@split=train,shots=5."
_TENTHS = 5


@final
@dataclass(frozen=True, slots=True)
class ClassSubset:
    """Which classes of a data set.

    ``t-split`` and ``d-split`` are two disjoint random halves of the classes (P1's teacher and downstream
    classes); ``t-split/5:i``, i in 0..4, are five disjoint tenths of the original classes that together are
    the t-split; ``a+b`` are the classes named; ``except:a+b`` all the others.
    """

    kind: Literal["t-split", "d-split", "t-tenth", "only", "except"]
    tenth: int = 0
    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "ClassSubset":
        """Read the value of ``classes=``.

        Raises:
            UsageError: it is none of the forms above.
        """
        if text == "t-split":
            return cls("t-split")
        if text == "d-split":
            return cls("d-split")
        if text.startswith(("t-split/", "d-split/")):
            match = re.fullmatch(r"t-split/5:([0-4])", text)
            if not match:
                raise UsageError(
                    f"classes={text} is no class choice", "Tenths are t-split/5:0 to t-split/5:4."
                )
            return cls("t-tenth", tenth=int(match[1]))
        kind: Literal["only", "except"] = "except" if text.startswith("except:") else "only"
        names = tuple(unquote(name) for name in text.removeprefix("except:").split("+"))
        if "" in names or len(set(names)) < len(names):
            raise UsageError(
                f"classes={text} has an empty or repeated name",
                "Join different class names with +, as in classes=cat+dog; write %2B for a + in a name.",
            )
        return cls(kind, names=names)

    def __str__(self) -> str:
        if self.kind == "t-tenth":
            return f"t-split/{_TENTHS}:{self.tenth}"
        if self.kind in ("t-split", "d-split"):
            return self.kind
        text = "+".join(name.translate(_ESCAPES) for name in self.names)
        if self.kind == "except":
            return f"except:{text}"
        # A class may be called like a keyword of this grammar.
        return text.replace("-", "%2D", 1) if text.startswith(("t-split", "d-split")) else text


@final
@dataclass(frozen=True, slots=True)
class Split:
    """A part of a source, by name or by chance, or a share of what a name stands for.

    ``80/20:first`` and ``80/20:rest``, or ``70/10/20:1``, ``:2`` and ``:3``, are drawn by the seed, disjoint, and
    together everything, of every class; samples without a label count as a class. Where a class has
    enough samples, each part has at least one of them.

    Attributes:
        name: of the part, None for all; :func:`canonical_split` unites its spellings.
        shares: percentages that make 100, or none for all that the name stands for.
        part: which of the shares, from 0.
    """

    name: str | None
    shares: tuple[int, ...] = ()
    part: int = 0

    @classmethod
    def parse(cls, text: str) -> "Split":
        """Read the value of ``split=``.

        Raises:
            UsageError: the shares do not make 100, or there is no such part.
        """
        match = _SHARES.fullmatch(text)
        if match is None:
            return cls(unquote(text))
        shares, parts = tuple(map(int, match[2].split("/"))), _parts(match[2])
        if sum(shares) != 100 or 0 in shares or len(shares) > 3:
            raise UsageError(
                f"split={text}: {match[2]} does not divide 100 % into two or three parts",
                "For example split=80/20:first and split=80/20:rest, or split=70/10/20:1.",
            )
        if match[3] not in parts:
            what = f"there is no part '{match[3]}'" if match[3] else "it does not say which part"
            ways = ", ".join(f"split={text.partition(':')[0]}:{part}" for part in parts)
            raise UsageError(f"split={text}: {what}", f"There are {ways}.")
        return cls(match[1] and unquote(match[1]), shares, parts.index(match[3]))

    def __str__(self) -> str:
        name = (self.name or "").translate(_ESCAPES)
        if not self.shares:  # a part may be called like a share
            return name.replace("/", "%2F") if _SHARES.fullmatch(name) else name
        shares = "/".join(map(str, self.shares))
        share = f"{shares}:{_parts(shares)[self.part]}"
        return share if self.name is None else f"{name.replace('/', '%2F')}/{share}"


def _parts(shares: str) -> tuple[str, ...]:
    return ("1", "2", "3") if shares.count("/") > 1 else ("first", "rest")


@final
@dataclass(frozen=True, slots=True)
class DataSpec:
    """A data set as its user wrote it; the fields are described in this module's docstring.

    Attributes:
        source: canonical source, always with its scheme (a bare path gets ``folder/``).
        own: modifiers that only this kind of source has.
    """

    source: str
    split: Split | None = None
    classes: ClassSubset | None = None
    shots: int | None = None
    labelled: float | None = None
    n: int | None = None
    labels: str | None = None
    seed: int = 0
    without: str | None = None
    exif: Exif | None = None
    own: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "DataSpec":
        """Read a spec. Whether the source exists is only seen when it is opened.

        Raises:
            UsageError: it does not follow the grammar.
        """
        parts = _joined(text)
        if len(parts) > 1:
            return cls(JOIN.join(_different([str(cls.parse(part)) for part in parts])))
        head, tail = split_modifiers(text)
        if not head or "\0" in head:
            raise UsageError(f"'{text}' names no data set", _EXAMPLE)
        source = canonical_source(head)
        fields = _parse_modifiers(tail, source, text) if tail else {}
        if fields.get("labels") == NO_LABELS and "labelled" in fields:
            raise UsageError(
                "labels=none leaves no label for labelled= to keep", "Leave out labels=none or labelled=."
            )
        return cls(source, **fields)

    @property
    def members(self) -> "tuple[DataSpec, ...]":
        """What is joined by ``++``; nothing for a data set that is one."""
        parts = _joined(self.source)
        return tuple(map(DataSpec.parse, parts)) if len(parts) > 1 else ()

    def __str__(self) -> str:
        if len(_joined(self.source)) > 1:
            return self.source
        given = [(key, getattr(self, key)) for key in KEYS if key != "seed" or self.seed]
        items = [
            f"{key}={value.translate(_ESCAPES) if isinstance(value, str) else value}"
            for key, value in (*given, *self.own)
            if value is not None
        ]
        if not items and _MODIFIERS.match(self.source.rpartition("@")[2]) and "@" in self.source:
            items = ["seed=0"]  # keeps a path like a@b=c from being read as modifiers
        return f"{self.source}@{','.join(items)}" if items else self.source


def split_modifiers(text: str) -> tuple[str, str]:
    """What stands before the last ``@``, and the modifiers behind it; all and nothing where they are none."""
    head, separator, tail = text.rpartition("@")
    return (head, tail) if separator and _MODIFIERS.match(tail) else (text, "")


def with_modifier(data: str, modifier: str) -> str:
    """A data spec with one modifier more, else as it was typed."""
    return f"{data}{',' if str(DataSpec.parse(data)) != DataSpec.parse(data).source else '@'}{modifier}"


def _different(parts: list[str]) -> list[str]:
    for number, part in enumerate(parts):
        if part in parts[:number]:
            raise UsageError(f"'{part}' is joined with itself", f"Give every data set of A{JOIN}B once.")
    return parts


def _joined(text: str) -> list[str]:
    """The members of ``A++B``: a member after ``++`` begins with a scheme."""
    parts, start = [], 0
    for match in _JOINT.finditer(text):
        if _has_scheme(match[1]):
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _has_scheme(text: str) -> bool:
    scheme, slash, _ = text.partition("/")
    return is_object_path(scheme) or (bool(slash) and scheme in SOURCES)


def canonical_source(text: str) -> str:
    """``folder/`` before everything that does not start with a scheme."""
    return text if _has_scheme(text) else f"folder/{text}"


def canonical_split(name: str) -> str:
    """train, val or test for the usual long forms; other names stay as they are."""
    lowered = name.lower()
    return {"training": "train", "valid": "val", "validation": "val", "testing": "test"}.get(lowered, lowered)


def _parse_modifiers(modifiers: str, source: str, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    own: dict[str, str] = {}
    scheme = source.partition("/")[0]
    for item in modifiers.split(","):
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UsageError(f"'{item}' in '{text}' is not key=value", _EXAMPLE)
        if key in fields or key in own:
            raise UsageError(f"'{key}' is given twice in '{text}'", f"Give {key}= once.")
        if key in _PARSERS:
            fields[key] = _PARSERS[key](value)
            continue
        if not is_object_path(scheme):  # of which nothing is loaded before it is opened
            require_option(key, SOURCES.find(scheme).options, text)
        own[key] = unquote(value)
    return {**fields, **({"own": tuple(own.items())} if own else {})}


def require_option(key: str, options: Collection[str], text: str) -> None:
    """Refuse a modifier that neither all data sets nor this kind of source have.

    Raises:
        UsageError: naming the nearest.
    """
    if key not in options:
        known = (*KEYS, *options)
        raise UsageError(
            f"unknown data modifier '{key}' in '{text}'.{nearest(key, known)}",
            f"Modifiers are {', '.join(known)}; a path that contains '@{key}=' is written PATH@seed=0.",
        )


def _whole(key: str, least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,19}", text) or int(text) < least:
            raise UsageError(f"{key}={text} is not a whole number of at least {least}", _EXAMPLE)
        return int(text)

    return parse


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UsageError(
            f"labelled={text} is not a fraction in (0, 1]",
            "Use labelled=0.2 for a fifth, labels=none for no labels.",
        )
    return value


def _exif(text: str) -> Exif:
    for known in get_args(Exif):
        if text == known:
            return cast("Exif", known)
    raise UsageError(
        f"exif={text} is neither apply nor ignore",
        "exif=ignore shows images as they are stored, as timm does.",
    )


_PARSERS: dict[str, Callable[[str], Any]] = {
    "split": Split.parse,
    "without": unquote,
    "classes": ClassSubset.parse,
    "shots": _whole("shots", 1),
    "labelled": _fraction,
    "n": _whole("n", 1),
    "labels": unquote,
    "seed": _whole("seed", 0),
    "exif": _exif,
}
