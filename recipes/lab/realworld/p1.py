"""P1's study: experts of three domains, each consolidated with the generalist on a proxy, and all three at once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lab.realworld.p1_data import ALL, GENERALIST, IMAGENET, Sets, Student, domains, students_of, tasks
from lab.realworld.p1_values import values
from lab.realworld.shared import Room
from lab.steps import Step, words

__all__ = ["steps", "values"]
METHODS = {
    "KD": "multi-head-kd",
    "ours": "consolidation",
    "CRD": "multi-head-crd",
    "ours CRD": "consolidation-crd",
}


def steps(room: Room) -> Iterator[Step]:
    """Experts, what all teachers say of the proxy, students, and what judges them."""
    yield from _generalist(room)
    for domain in domains(room):
        yield from _expert(room, domain)
    yield _proxy(room)
    for seed in room.settings["p1.seeds"]:
        streams: dict[str, list[Student]] = {}
        for student in students_of(room, seed):
            streams.setdefault(student.stream, []).append(student)
        for students in streams.values():
            yield _students(room, students, seed)
        yield _probe(room, seed)


# --- teachers -----------------------------------------------------------------------------------


def _trained(room: Room, start: str) -> dict[str, Any]:
    """Options that all networks have in common."""
    settings = room.settings
    return {
        "student": room.architecture("lite0"), "init": start, "train_from": settings["p1.trunk"],
        "image_size": settings["image_size"], **settings.options("p1.train"),
    }  # fmt: skip


def _cache(
    room: Room, name: str, images: str, teachers: Mapping[str, str], needs: Sequence[str], data: Sequence[str]
) -> Step:
    """What teachers say of images, and their trunk, which all share."""
    settings = room.settings
    return Step(
        f"p1/cache/{name}",
        words("cache-teachers", images, cache=room.cache(f"p1-{name}"), recipe=settings["recipe"],
              teacher=[f"{each}={spec}" for each, spec in teachers.items()],
              keep=f"logits,features,maps:{settings['p1.trunk']}", views=settings["p1.views"]),
        needs=tuple(needs), data=tuple(data),
    )  # fmt: skip


def generalist(room: Room) -> str:
    """Model string of the generalist."""
    return room.export("p1/generalist")


def _generalist(room: Room) -> Iterator[Step]:
    """ImageNet's network, which learns what the proxy's images show: P1's generalist has learned its proxy, too."""
    settings, data, name = room.settings, Sets(room).data("broad", "train"), "p1/generalist"
    kinds = ("glyphs", "emoji")
    yield _cache(room, "broad", data, {"imagenet": room.start()}, ["weights/lite0"], data=kinds)
    yield Step(
        name,
        words("train-student", data, cache=room.cache("p1-broad"), method="labels-only", out=room.run(name),
              epochs=settings["p1.generalist_epochs"], lr=settings["p1.lr"], **_trained(room, room.start())),
        needs=("p1/cache/broad",), data=kinds,
    )  # fmt: skip


def _expert(room: Room, domain: str) -> Iterator[Step]:
    """An expert, which starts as the generalist, by images of its domain alone."""
    settings, sets, name = room.settings, Sets(room), f"{domain}-expert"
    own = sets.data(name, "train", settings["p1.domains"][domain]["images"])
    yield _cache(room, domain, own, {GENERALIST: generalist(room)}, ["p1/generalist"], data=(domain,))
    yield Step(
        f"p1/experts/{domain}",
        words("train-student", own, cache=room.cache(f"p1-{domain}"), method="labels-only",
              out=room.run(f"p1/{name}"), test=sets.data(name, "test", settings["p1.old_images"]),
              epochs=settings["p1.domains"][domain]["epochs"], lr=settings["p1.lr"],
              **_trained(room, generalist(room))),
        needs=(f"p1/cache/{domain}",), data=(domain,),
    )  # fmt: skip


def _proxy(room: Room) -> Step:
    """All teachers over the proxy."""
    teachers = {GENERALIST: generalist(room)} | {
        each: room.export(f"p1/{each}-expert") for each in domains(room)
    }
    needs = ["p1/generalist", *(f"p1/experts/{each}" for each in domains(room))]
    return _cache(
        room, "proxy", Sets(room).data("proxy", "train"), teachers, needs, data=("glyphs", "emoji", "icons")
    )


# --- students, and what judges them --------------------------------------------------------------


def _students(room: Room, students: list[Student], seed: int) -> Step:
    """Those of one stream; tested by an expert's head on the expert's own task, where there is one expert."""
    settings, sets, first = room.settings, Sets(room), students[0]
    path, files = room.lab.sweep(f"p1/{first.stream}", {each.name: _options(room, each) for each in students})
    experts = domains(room) if first.taught == ALL else [first.taught]
    tested = [
        sets.data(f"{each}-expert", "test", settings["p1.old_images"])
        for each in experts
        if first.taught != ALL
    ]
    curve = first.curve
    return Step(
        f"p1/students/{first.stream}",
        words("train-student", sets.data("proxy", "train", curve.get("images")),
              cache=room.cache("p1-proxy"), teacher=[GENERALIST, *experts], generalist=GENERALIST, sweep=path,
              out=room.run(f"p1/{first.stream}"), test=tested, seed=seed, data_seed=seed,
              epochs=curve.get("epochs", settings["p1.epochs"]), lr=settings["p1.lr"],
              **_trained(room, generalist(room))),
        needs=("p1/cache/proxy",), files=files, data=("glyphs", "emoji", *experts),
    )  # fmt: skip


def _options(room: Room, student: Student) -> dict[str, Any]:
    """A student's own in its sweep."""
    settings, found = room.settings, {"method": METHODS[student.row], **room.settings.options("p1.loss")}
    if student.row.startswith("ours"):
        found["old_new"] = student.curve.get("old_new", settings["p1.old_new"])
    return found | (settings.options("p1.crd") if student.row.endswith("CRD") else {})


def models(room: Room, seed: int) -> Mapping[str, str]:
    """Model strings of what a seed's probe judges."""
    experts = {f"{domain}.expert": room.export(f"p1/{domain}-expert") for domain in domains(room)}
    students = {each.judged: room.export(f"p1/{each.stream}/{each.name}") for each in students_of(room, seed)}
    return {IMAGENET: room.start(), GENERALIST: generalist(room), **experts, **students}


def _probe(room: Room, seed: int) -> Step:
    """Few shots of all tasks; a seed has its own draws of them."""
    sets, found = Sets(room), tasks(room)
    return Step(
        f"p1/probe/seed{seed}",
        words("eval-probe", *(f"{task}={sets.data(task, 'train', each['train'])}" for task, each in found.items()),
              test=[f"{task}={sets.data(task, 'test', each['test'])}" for task, each in found.items()],
              model=[f"{name}={spec}" for name, spec in models(room, seed).items()],
              seed=seed, **room.settings.options("p1.probe")),
        needs=tuple(dict.fromkeys(f"p1/students/{each.stream}" for each in students_of(room, seed))),
        data=("glyphs", "emoji", "icons", "fashion"),
    )  # fmt: skip
