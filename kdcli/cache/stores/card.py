"""The card of a cache on the hub: what it is of, what it costs, how to use it, and what is not in it."""

from collections.abc import Callable
from dataclasses import dataclass
from shlex import quote
from typing import Any, Final, final

import numpy as np

from kdcli._version import __version__
from kdcli.cache.admin.inventory import CacheInfo, inspect_cache
from kdcli.cache.provenance import TeacherRecord
from kdcli.cache.reader import CacheReader
from kdcli.cache.stores.places import Place
from kdcli.cards import CARD, Licence, block, card, is_own, listed, plain, shortened
from kdcli.console import console, size
from kdcli.errors import UsageError

_SHOWN: Final = 3
"""Names of images that are shown of those that become public."""


@final
@dataclass(frozen=True, slots=True)
class Sharing:
    """On which terms a cache goes to the hub.

    Attributes:
        licence: of the data set.
        private: whether only its owners see it, where it has to be made.
        licence_of: of a teacher's weights, by its spec; None where it is not known.
    """

    licence: Licence
    private: bool
    licence_of: Callable[[str], str | None]


def require_terms(url: str, sharing: Sharing | None) -> None:
    """Refuse terms where nobody reads them, and a public place without.

    Raises:
        UsageError: so it is.
    """
    hub = url.startswith("hf://")
    if hub and sharing is None:
        raise UsageError(
            "a data set of the hub says what others may do with it",
            "Add --licence ID, by the hub's identifiers (such as cc-by-4.0), or --licence other:NAME.",
        )
    if not hub and sharing is not None:
        raise UsageError("--licence and --private are of hf:// places", "Leave them out.")


def write_card(place: Place, reader: CacheReader, sharing: Sharing) -> None:
    """Write or renew the card, unless somebody changed the one that is there; say which names become public."""
    keys = [reader.keys[row] for row in reader.manifest.sample_rows()[:_SHOWN]]
    to_whom = "who may read this private data set" if sharing.private else "everybody"
    console.warn(
        "names of images are keys of the cache; with names of classes and the path of the data they can be read by "
        f"{to_whom}: {', '.join(keys)}{', ...' if reader.manifest.samples > len(keys) else ''}"
    )
    try:
        known = place.read(CARD)
    except FileNotFoundError:
        known = None
    if known is None or is_own(known):
        new = card_of(inspect_cache(reader.layout.root), place.name, sharing)
        if new != known:
            place.write(CARD, new)
    else:
        console.note(f"{place.name}/{CARD} is not as kd wrote it, and is left as it is")


def card_of(info: CacheInfo, place: str, sharing: Sharing) -> bytes:
    """The card of a cache.

    Args:
        info: of it.
        place: its URL on the hub.
        sharing: on which terms.
    """
    manifest = info.manifest
    front: dict[str, Any] = {
        **sharing.licence.front(),
        "pretty_name": place.removeprefix("hf://datasets/"),
        "task_categories": ["image-classification", "image-feature-extraction"],
        "tags": ["knowledge-distillation", "kd", "teacher-outputs"],
        "viewer": False,
    }
    classes = manifest.data.class_names
    facts = [
        ("Images", f"{manifest.samples:,}, none of which is in here; labels: {'yes' if classes else 'no'}"),
        ("Data", "; ".join(plain(shortened(segment.spec)) for segment in manifest.segments)),
        ("Digest of their keys", f"`{manifest.data.keys}`"),
        ("Classes", _few(classes) if classes else "none"),
        ("Views an image", _views(manifest.view_set)),
        ("Size", f"{size(sum(state.bytes for state in info.states.values()))}, {_complete(info)}"),
        ("Licence of this data set", plain(sharing.licence)),
        ("Made by", f"kd {__version__}"),
    ]
    body = [
        f"# {plain(place.removeprefix('hf://datasets/'))}\n",
        "What teacher networks answered to images, row by row, for distilling students without running the teachers: "
        "a cache of kd.\n",
        listed(["what", "is"], [list(fact) for fact in facts]),
        "## Use it\n",
        block(
            f"pip install 'kdcli[hub]'\n"
            f"kd cache pull {quote(place)} --to cache.kd\n"
            f"kd train-student DATA --cache cache.kd --student ARCH --method METHOD --out run"
        ),
        "`kd cache pull` takes `--teacher`, `--keep` and `--views` for a part; every byte is checked.\n",
        "## The images\n",
        "**They are not included**, and neither is a right to use them. Get the data named above from where they are "
        "published, and give them as DATA. kd finds an image by its key (its name below the data's folder) and refuses "
        "images, keys or labels that are not those of this cache. A ranking of teachers needs no images.\n",
        "## Teachers\n",
        listed(["teacher", "model", "licence of its weights", "sha256 of its weights"], [
            _teacher(record, sharing) for record in info.teachers.values()
        ]),
        "A licence that is not known to kd is to be asked for where the model comes from; outputs of a model may be "
        "bound by its licence.\n",
        "## What is kept\n",
        listed(["teacher", "kind", "types", "views", "bytes", "done", "KL that storing costs, nats"], _kinds(info)),
        "KL: from the softmax of the logits as the teacher gave them to that of what is stored, at a temperature; the "
        "largest mean over a first batch that its writers measured.\n",
    ]  # fmt: skip
    return card(front, "\n".join(body))


def _few(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)}: {', '.join(map(plain, names[:5]))}{more}"


def _views(view_set: dict[str, Any]) -> str:
    count = int(view_set["train_views"])
    if not count:
        return "the evaluation's"
    return f"the evaluation's, and {count} for training by the recipe {plain(view_set['recipe']['name'])}"


def _complete(info: CacheInfo) -> str:
    return "complete" if info.done == info.total else f"{info.done} of {info.total} units done"


def _teacher(record: TeacherRecord, sharing: Sharing) -> list[str]:
    licence = sharing.licence_of(record.spec)
    return [
        plain(record.name),
        plain(shortened(record.spec)),
        plain(licence) if licence else "not known to kd",
        f"`{plain(record.weights)}`",
    ]


def _kinds(info: CacheInfo) -> list[list[str]]:
    rows = []
    for name, record in info.teachers.items():
        for kind, output in record.outputs.items():
            state = info.states[f"{name}/{kind}"]
            cost = ", ".join(f"{nats:.2g} at {plain(t)}" for t, nats in state.compression.items())
            measured = output.kind in ("logits", "topk")
            types = dict.fromkeys(np.dtype(spec.dtype).name for spec in output.array_specs().values())
            rows.append(
                [
                    plain(name),
                    plain(output.output),
                    ", ".join(types),
                    f"{output.views(info.manifest.views)}",
                    size(state.bytes),
                    f"{state.done} of {state.total}",
                    cost or ("not measured" if measured else "-"),
                ]
            )
    return rows
