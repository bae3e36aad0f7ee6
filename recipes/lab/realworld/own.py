"""What the cache costs in accuracy, and what it saves in time: kd's own claims.

A teacher of letters, and small students of its logits alone. Rows: how many views of an image were cached (``live``: a
new one for every epoch, as training without a cache has it), full-precision logits, the 32 largest logits.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lab.realworld.claims import Values
from lab.realworld.shared import Room
from lab.steps import Lab, Step, words

LIVE, FULL, TOP = "live", "float32", "top-32"
_ACCURACY, _PRICE = "top-1", "seconds saved, %"


def steps(room: Room) -> Iterator[Step]:
    """A teacher, its caches, the students of each."""
    settings = room.settings
    yield _trunk(room)
    yield _teacher(room)
    for row in caches(settings):
        yield _cache(room, row)
        for seed in settings["kd.seeds"]:
            yield _student(room, row, seed)


def caches(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What each row's cache holds, as options of ``kd cache-teachers``."""
    live = {"views": f"eval+train:{settings['kd.epochs']}", "keep": "logits"}
    return {
        **{_views(count): {**live, "views": f"eval+train:{count}"} for count in settings["kd.views"]},
        LIVE: live,
        FULL: {**live, "dtype": "float32"},
        TOP: {**live, "keep": f"topk:{settings['kd.top']}"},
    }


def _views(count: int) -> str:
    return f"{count} view" + "s" * (count > 1)


def _slug(row: str) -> str:
    return row.replace(" ", "-")


def _letters(room: Room, split: str, *more: str) -> str:
    return room.union("own", room.settings["kd.scripts"], split, *more)


def _trunk(room: Room) -> Step:
    settings = room.settings
    return Step(
        "kd/trunk",
        words("cache-teachers", _letters(room, "train"), cache=room.cache("kd/trunk"), teacher=f"lite0={room.start()}",
              keep=f"maps:{settings['trunk']}", views=f"eval+train:{settings['kd.teacher_views']}",
              recipe=settings["recipe"]),
        needs=("weights/lite0",), data=("glyphs",),
    )  # fmt: skip


def _teacher(room: Room) -> Step:
    settings = room.settings
    return Step(
        "kd/teacher",
        words("train-student", _letters(room, "train"), cache=room.cache("kd/trunk"), method="labels-only",
              student=room.architecture("lite0"), init=room.start(), image_size=settings["image_size"],
              train_from=settings["trunk"], bn="frozen", optimizer="adamw", lr=settings["kd.teacher_lr"],
              backbone_lr_scale=settings["kd.teacher_backbone_lr_scale"], weight_decay=0.05,
              schedule="cosine", batch_size=32, epochs=settings["kd.teacher_epochs"],
              test=_letters(room, "test"), out=room.run("kd/teacher")),
        needs=("kd/trunk",), data=("glyphs",),
    )  # fmt: skip


def _cache(room: Room, row: str) -> Step:
    return Step(
        f"kd/cache/{_slug(row)}",
        words("cache-teachers", _letters(room, "train", f"n={room.settings['kd.images']}"),
              cache=room.cache(f"kd/{_slug(row)}"), teacher=f"teacher={room.export('kd/teacher')}",
              recipe=room.settings["recipe"], **caches(room.settings)[row]),
        needs=("kd/teacher",), data=("glyphs",),
    )  # fmt: skip


def _student(room: Room, row: str, seed: int) -> Step:
    settings, name = room.settings, f"kd/{_slug(row)}/{seed}"
    top = {"method": "topk-kl", "top_classes": settings["kd.top"], "rest": "spread"}
    return Step(
        name,
        words("train-student", _letters(room, "train", f"n={settings['kd.images']}"),
              cache=room.cache(f"kd/{_slug(row)}"), student=settings["kd.student"], init="random",
              image_size=settings["kd.student_size"], optimizer="adamw", lr=settings["kd.lr"], schedule="cosine",
              batch_size=32, epochs=settings["kd.epochs"], seed=seed, data_seed=seed, test=_letters(room, "test"),
              out=room.run(name), **(top if row == TOP else {"method": "kl"})),
        needs=(f"kd/cache/{_slug(row)}",), data=("glyphs",),
    )  # fmt: skip


def values(room: Room) -> Values:
    """Accuracies by seed, and the time that a cache saves one, five, twenty students."""
    lab, settings = room.lab, room.settings
    found = {
        (row, _ACCURACY): {
            seed: 100 * lab.document(name)["test"]["top1"]
            for seed in settings["kd.seeds"]
            if lab.has(name := f"kd/{_slug(row)}/{seed}")
        }
        for row in caches(settings)
    }
    if lab.has("kd/teacher"):
        found["teacher", _ACCURACY] = {0: 100 * lab.document("kd/teacher")["test"]["top1"]}
    for students in settings["kd.students"]:
        found[f"{students} student" + "s" * (students > 1), _PRICE] = prices(lab, settings, students)
    return {cell: by_seed for cell, by_seed in found.items() if by_seed}


def prices(lab: Lab, settings: Mapping[str, Any], students: int) -> dict[int, float]:
    """Percent of the seconds of students whose teacher runs in every step, saved by caching first."""
    if not lab.has(f"kd/cache/{LIVE}"):
        return {}
    cache = lab.document(f"kd/cache/{LIVE}")
    teacher = cache["rows"] / cache["images_per_second"]  # one view of all images
    found = {}
    for seed in settings["kd.seeds"]:
        if lab.has(f"kd/{LIVE}/{seed}"):
            own = sum(epoch["seconds"] for epoch in lab.document(f"kd/{LIVE}/{seed}")["history"])
            live = own + settings["kd.epochs"] * teacher
            found[seed] = 100 - 100 * (cache["views"] * teacher + students * own) / (students * live)
    return found
