"""The card of a cache on the hub: what it is of, what it costs, how to use it, and what is not in it."""

from shlex import quote
from typing import Any

import numpy as np

from kdcli._version import __version__
from kdcli.cache.admin.inventory import CacheInfo
from kdcli.cache.provenance import TeacherRecord
from kdcli.cards import Licence, block, card, listed, plain, shortened
from kdcli.console import size
from kdcli.models.licences import licence_of


def data_card(info: CacheInfo, place: str, licence: Licence) -> bytes:
    """The card of a cache.

    Args:
        info: of it.
        place: its URL on the hub.
        licence: of the data set.
    """
    manifest = info.manifest
    front: dict[str, Any] = {
        **licence.front(),
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
        ("Licence of this data set", plain(licence)),
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
            _teacher(record) for record in info.teachers.values()
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
    how = (
        ", of photos that were decoded at a reduced scale (kd's --decode scaled)"
        if "decode" in view_set
        else ""
    )
    if not count:
        return f"the evaluation's{how}"
    return (
        f"the evaluation's, and {count} for training by the recipe {plain(view_set['recipe']['name'])}{how}"
    )


def _complete(info: CacheInfo) -> str:
    return "complete" if info.done == info.total else f"{info.done} of {info.total} units done"


def _teacher(record: TeacherRecord) -> list[str]:
    licence = licence_of(record.spec)
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
