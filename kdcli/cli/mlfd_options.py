"""Options of ``--method mlfd`` (P4) on the command line."""

from typing import Annotated

import typer

LossConvention = Annotated[
    str | None,
    typer.Option(
        "--loss-convention",
        help="mlfd's weights: paper (default: CE 1, KD 0.6, MSE 0.2), or code (CE 0.2, the rest alike).",
    ),
]
MlfdLevels = Annotated[
    str | None,
    typer.Option(
        "--mlfd-levels",
        help="all (paper: embedding and maps), maps (code), features, or none; default: the convention's.",
    ),
]
DistillWeight = Annotated[
    float | None, typer.Option("--distill-weight", help="mlfd's alpha, of the softened outputs (0.6).")
]
LevelWeight = Annotated[
    list[float] | None,
    typer.Option("--level-weight", help="mlfd's beta (0.2); once, or once a level, the embedding first."),
]
StudentTap = Annotated[
    list[str] | None,
    typer.Option(
        "--student-tap", metavar="TAP", help="Student's layer to match; default: its last. Repeatable."
    ),
]
TeacherTap = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher-tap", metavar="TAP", help="Teacher's cached map; default: the only one. Repeatable."
    ),
]
AdaptorSide = Annotated[
    str | None,
    typer.Option(
        "--adaptor", help="Side of the layer between unequal channels: student (default), teacher, none."
    ),
]
MapResize = Annotated[
    str | None,
    typer.Option("--map-resize", help="pool or bilinear: make maps of unequal height and width equal."),
]
