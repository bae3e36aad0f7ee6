"""``kd data``: data sets before they are used."""

from shlex import quote
from typing import TYPE_CHECKING

from kdcli.console import console, counted
from kdcli.errors import BadDataError
from kdcli.results import say

if TYPE_CHECKING:
    from kdcli.checking.config import CheckConfig
    from kdcli.checking.result import CheckResult, Side
    from kdcli.options.common import Common


def check(config: "CheckConfig", common: "Common") -> int | None:
    """Look for what is wrong with a data set.

    Decodes every image: unreadable files, duplicates (by bytes and by pixels), images and classes that DATA and --test
    do not share or should not, small classes, sizes, colours, EXIF, animations, names. Prints a table of what it found;
    exits with 12 if something makes results wrong, with 0 if all is well or only worth knowing.

    \b
    Examples:
      kd data check photos/
      kd data check photos@split=train --test photos@split=test --write-exclude bad.txt
      kd data check photos@split=train,without=bad.txt --test photos@split=test --json
    """
    from kdcli.checking.check import check as step

    result = step(config, None if common.as_json else lambda found: say(found.tables()))
    if common.as_json:
        console.document(result.document())
    _summarise(result, config, common.as_json)
    return BadDataError.exit_code if result.problems else None


def _summarise(result: "CheckResult", config: "CheckConfig", as_json: bool) -> None:
    """Sizes, the verdict and the next command, on stderr."""
    from kdcli.data.spec import with_modifier

    for side in (result.data, result.test):
        if side is not None:
            console.note(_described(side))
    notes = len(result.findings) - result.problems
    verdict = "nothing wrong was found" if not result.problems else f"{result.problems} kinds of problems"
    console.note(f"{verdict}{f'; {notes} things worth knowing' if notes else ''}")
    if not result.excluded:
        if not result.problems and not as_json:
            cache = f"kd cache-teachers {quote(config.data)} --cache NEW.kd --teacher SPEC"
            console.finished(f"{config.data} was looked at", cache)
        return
    test = f" --test {quote(config.test)}" if config.test is not None else ""
    if config.write_exclude is None:
        then = f"kd data check {quote(config.data)}{test} --write-exclude FILE"
        console.note(f"next: {then} lists the {len(result.excluded)} images that should go")
    else:
        spec = quote(with_modifier(config.data, f"without={config.write_exclude}"))
        console.note(f"next: kd data check {spec}{test}")


def _described(side: "Side") -> str:
    counts = sorted(side.classes.values())
    classes = (
        f", {counted(len(counts), 'classes')} of {counts[0]} to {counts[-1]}" if counts else ", no labels"
    )
    if side.width is None or side.height is None:
        return f"{side.spec}: {counted(side.images, 'images')}{classes}"
    sides = zip(("least", "median", "largest"), side.width, side.height, strict=True)
    sizes = ", ".join(f"{name} {width:g} x {height:g}" for name, width, height in sides)
    modes = ", ".join(f"{mode} {count}" for mode, count in side.modes.items())
    return f"{side.spec}: {counted(side.images, 'images')}{classes}; width x height: {sizes}; {modes}"
