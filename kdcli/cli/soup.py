"""``kd soup``."""

from typing import TYPE_CHECKING

from kdcli.cli.cells import fraction
from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.options.common import Common
    from kdcli.training.soup_config import SoupConfig


def soup(config: "SoupConfig", common: "Common") -> None:
    """Average the weights of students that share a start.

    BatchNorm's running statistics are averaged, too. The result opens as local-dir:DIR; DIR/soup.json says what it
    is made of. P3 averages one student a teacher.

    \b
    Examples:
      kd soup runs/from-a runs/from-b runs/from-c --out runs/soup --test photos/@split=test
      kd soup runs/from-a runs/from-b --weights 2,1 --recalibrate-bn photos/@split=train --out runs/soup-bn
    """
    from kdcli.training.soup import make_soup

    document = make_soup(config)
    console.note(f"the soup opens as {document['spec']}")
    if common.as_json:
        console.document(document)
        return
    scores = document["test"] or {}
    tested = [fraction(scores.get(name)) for name in ("top1", "top5")]
    console.table(
        ["student", "share", "weights", "top1", "top5"],
        [
            *(
                [each["spec"], f"{each['share']:.4g}", each["weights"][:12], "-", "-"]
                for each in document["parents"]
            ),
            [document["spec"], "soup", document["sha256"][:12], *tested],
        ],
    )
