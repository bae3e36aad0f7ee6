"""The card of a student on the hub: what it learnt from, how well it does, and how to use it and make it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcli._version import __version__
from kdcli.cache.admin.inventory import open_store
from kdcli.cards import Licence, block, card, listed, plain, shortened
from kdcli.hub import Address
from kdcli.models.licences import licence_of
from kdcli.reporting.budgets import budget_of, interval_of, main_of, tested_on, top1_of
from kdcli.reporting.material import Run
from kdcli.reporting.students import line_of
from kdcli.training.config import StudentConfig


@final
@dataclass(frozen=True, slots=True)
class Student:
    """A finished student.

    Attributes:
        folder: its export.
        document: config.json of that.
        run: what trained it.
    """

    folder: Path
    document: Mapping[str, Any]
    run: Run


def card_of(student: Student, address: Address, licence: Licence) -> bytes:
    """The card of a student."""
    run, model = student.run, f"hf-hub:{address.name}"
    front: dict[str, Any] = {
        **licence.front(),
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "timm", "knowledge-distillation", "kd"],
    }
    body = [
        f"# {plain(address.name)}\n",
        f"A student that kd {__version__} trained by {plain(run.method)}.\n",
        listed(["what", "is"], [[what, said] for what, said in _facts(student, licence) if said]),
        *(f"{plain(warning)}.\n" for warning in [run.result.get("warning")] if warning),
        "## Use it\n",
        block(
            "import timm\n"
            f'model = timm.create_model("{model}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))\n"
            'model.pretrained_cfg["label_names"]  # where its classes have names'
        ),
        f"In kd it is `{model}`, as a teacher and as a student's start. Its `config.json` declares the geometry that "
        "its accuracy was measured with, so timm's own evaluation shows it the same pixels.\n",
        "## Teachers\n",
        *_teachers(run),
        *_command(run),
    ]
    return card(front, "\n".join(body))


def _facts(student: Student, licence: Licence) -> list[tuple[str, str]]:
    run, document = student.run, student.document
    names = document.get("label_names") or ()
    seeds = ", ".join(f"{what} {run.result[name]}" for what, name in _SEEDS.items() if name in run.result)
    size = document.get("pretrained_cfg", {}).get("input_size", [])
    return [
        ("Accuracy", _accuracy(run)),
        (
            "Architecture",
            f"{plain(document['architecture'])}, started from {plain(run.result.get('init', '?'))}",
        ),
        ("Input", plain(" x ".join(map(str, size)))),
        ("Classes", f"{document.get('num_classes')}{_few(names)}"),
        ("Data", _data(run.identity.get("data"))),
        ("Method", plain(run.method)),
        ("Training", ", ".join(filter(None, [budget_of(run).text(), seeds]))),
        ("Tested on", _data(run.identity.get("test"))),
        ("Licence", plain(licence)),
    ]


_SEEDS = {"seed": "seed", "seed of the data": "data_seed"}


def _accuracy(run: Run) -> str:
    """With its interval; of labels an image may have several of, mean average precision, which has none."""
    if (top1 := top1_of(run)) is None:
        main = main_of(run)
        return f"{main:.1%} mean average precision" if main is not None else "not tested"
    interval = interval_of(run)
    if interval is None:
        return f"{top1:.1%}"
    low, high = interval
    return (
        f"{top1:.1%} (95 % interval {low:.1%} to {high:.1%}, Wilson's, over {tested_on(run):,} test images)"
    )


def _few(names: Any) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f": {', '.join(map(plain, names[:5]))}{more}" if names else ""


def _data(found: Any) -> str:
    if not isinstance(found, Mapping):
        return ""
    return f"{plain(shortened(str(found.get('location', '?'))))}, {plain(found.get('images', '?'))} images"


def _teachers(run: Run) -> list[str]:
    """Who taught it, as far as the caches that it read are still there to say so."""
    ids, weights = run.result.get("teachers") or {}, run.result.get("weights") or {}
    if not ids:
        return ["None: it learnt from labels.\n"]
    caches = [Path(place) for place in run.config.get("cache") or ()]
    known = [
        store.teachers
        for place in caches
        if (place / "manifest.json").is_file() and (store := open_store(place))
    ]
    rows = []
    for name, digest in ids.items():
        record = next((each[name] for each in known if name in each and each[name].id == digest), None)
        licence = None if record is None else licence_of(record.spec)
        rows.append(
            [
                plain(name),
                "its cache is gone" if record is None else plain(shortened(record.spec)),
                plain(licence) if licence else "not known to kd",
                f"{weights[name]:.3g}" if name in weights else "-",
                f"`{plain(digest)}`",
            ]
        )
    header = ["teacher", "model", "licence of its weights", "weight", "sha256 of weights, types and pixels"]
    return [listed(header, rows)]


def _command(run: Run) -> list[str]:
    line = line_of(StudentConfig, run.config)
    return [] if line is None else ["## Make it again\n", block(shortened(line))]
