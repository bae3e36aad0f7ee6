"""``kd methods``: what a student can learn from its teachers, and how."""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from shutil import get_terminal_size
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from kdcli.console import console
from kdcli.options.command import option_fields

if TYPE_CHECKING:
    from kdcli.methods.base import Method
    from kdcli.methods.config import MethodsConfig
    from kdcli.options.common import Common

_WIDTH = 80


def methods(config: "MethodsConfig", common: "Common") -> None:
    """List the methods, or explain one.

    A name gives its paper, equation, options with their defaults, what it needs, and an example.

    \b
    Examples:
      kd methods
      kd methods consolidation
      kd methods --json
    """
    from kdcli.methods.base import find_method
    from kdcli.registry import METHODS

    listed = [find_method(name) for name in (METHODS if config.name is None else [config.name])]
    if common.as_json:
        more = {} if config.name is None else _more(listed[0])
        console.document({"methods": [{**_document(method), **more} for method in listed]})
    elif config.name is None:
        _print_table(listed)
    else:
        _print_one(listed[0])


def _document(method: "Method") -> dict[str, Any]:
    needs = method.needs
    return {
        "name": method.name,
        "paper": method.paper,
        "equation": method.equation,
        "needs": {
            "cached": sorted(needs.kinds),
            "labels": needs.labels,
            "ranking": needs.ranking,
            "generalist": needs.generalist,
        },
        "description": method.summary,
    }


def _more(method: "Method") -> dict[str, Any]:
    """What is said of a method that was asked for by name."""
    own = method.Options()
    options = {
        field.name: {"default": getattr(own, field.name), "help": field.info.description}
        for field in option_fields(method.Options)
    }
    return {"example": method.example, "options": options}


def _print_table(listed: "list[Method]") -> None:
    papers = [method.paper.partition(",")[0].partition("'")[0] for method in listed]
    widest = max(len(method.name) for method in listed) + max(map(len, papers)) + 4
    rows: list[list[str]] = []
    for method, paper in zip(listed, papers, strict=True):
        rows += [
            [*((method.name, paper) if not number else ("", "")), line]
            for number, line in enumerate(wrap(method.summary, _WIDTH - widest))
        ]
    console.table(["method", "paper", "what it learns from"], rows)
    console.note("kd methods NAME says more: equation, options, needs, an example")


def _print_one(method: "Method") -> None:
    from kdcli.training.presets import PAPERS

    facts = {
        "method": f"{method.name}: {method.summary}",
        "paper": f"{method.paper}, {method.equation}",
        "needs": ", ".join(_needs(method)) or "nothing but images",
        "defaults": ", ".join(_defaults(method)),
    }
    if method.spares:
        facts["less"] = "; ".join(f"no {what} with {option}" for what, option in method.spares.items())
    if method.tunes:
        facts["random"] = "a student of random weights takes instead: " + ", ".join(_differing(method))
    if presets := [name for name, known in PAPERS.items() if known == method.name]:
        facts["preset"] = (
            f"--preset {presets[0]} is this method with these defaults, whatever the student starts from"
        )
    for name, text in facts.items():
        _print_wrapped(f"{name:<10}", text)
    own = option_fields(method.Options)
    if own:
        console.say("", "options")
        heads = [f"  {field.words[0]} {field.metavar or ''}".rstrip() + "  " for field in own]
        widest = max(map(len, heads))
        for head, field in zip(heads, own, strict=True):
            _print_wrapped(head.ljust(widest), field.help)
    console.say("", "example", f"  {method.example}")


def _print_wrapped(head: str, text: str) -> None:
    width = min(get_terminal_size().columns, _WIDTH)
    console.say(*wrap(head + text, width, subsequent_indent=" " * len(head)))


def _needs(method: "Method") -> Iterator[str]:
    needs = method.needs
    yield from (f"cached {kind}" for kind in sorted(needs.kinds))
    wanted = {
        "or topk:K": needs.largest,
        "labels": needs.labels,
        "unlabelled images": needs.unlabelled,
        "--ranking": needs.ranking,
        "--generalist": needs.generalist,
        "several data sets": needs.sets,
        "teachers of the same classes": needs.classes or needs.same,
        "the student as it was": needs.frozen,
    }
    yield from (text for text, needed in wanted.items() if needed)


def _differing(method: "Method") -> Iterator[str]:
    """The numbers that a student from random weights takes instead."""
    from kdcli.training.settings import numbers_of

    random = numbers_of(method, trained=False)
    for field in fields(random):
        value = getattr(random, field.name)
        if value != getattr(method.defaults, field.name):
            yield f"{field.name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"


def _defaults(method: "Method") -> Iterator[str]:
    """The engine's numbers: those that every method has to give, and others where they are its own."""
    for field in fields(method.defaults):
        value = getattr(method.defaults, field.name)
        if field.default is MISSING or value != field.default:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            yield f"{field.name.replace('_', ' ')} {text}"
    yield f"recipe {method.recipe or 'of the cache, or imagenet'}"
    yield f"teacher view {method.teacher_view}"
