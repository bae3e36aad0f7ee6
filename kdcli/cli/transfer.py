"""Options of ``kd train-student`` for P3's transfer methods."""

from typing import Annotated

import typer

KlWeight = Annotated[
    float | None,
    typer.Option("--kl-weight", help="Weight of the distillation term (P3's lambda); labels have the rest."),
]
KlDirection = Annotated[
    str | None,
    typer.Option("--kl-direction", help="forward (default): KL(teacher || student); reverse: the other."),
]
TopClasses = Annotated[
    int | None, typer.Option("--top-classes", metavar="K", help="Classes that topk-kl compares (10).")
]
MclTau = Annotated[
    float | None, typer.Option("--mcl-tau", help="Share that MCL's slow copy keeps in an update (0.9999).")
]
MclShare = Annotated[
    float | None,
    typer.Option("--mcl-share", help="Instead of tau: share of the way it goes in the whole run."),
]
MclEvery = Annotated[
    int | None, typer.Option("--mcl-every", metavar="N", help="Steps between its updates (2).")
]
Frozen = Annotated[
    str | None,
    typer.Option(
        "--frozen", help="DP's frozen student: cache, live, or auto (default): cached if it is there."
    ),
]
FrozenTeacher = Annotated[
    str | None,
    typer.Option("--frozen-teacher", metavar="NAME", help="Cached teacher that the frozen student is."),
]
