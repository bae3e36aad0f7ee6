"""``kd fuse-teachers``."""

from typing import TYPE_CHECKING

from kdcli.cli.showing import show

if TYPE_CHECKING:
    from kdcli.fusing.config import FuseConfig
    from kdcli.options.common import Common


def fuse_teachers(config: "FuseConfig", common: "Common") -> None:
    """Train a joint teacher on cached teachers (P4).

    No image is read. The result is a teacher, kd-fused:OUT.

    \b
    Examples:
      kd fuse-teachers --cache a.kd --cache b.kd --teacher t1 --teacher t2 --levels L2 --out joint --write-back joint
      kd fuse-teachers --cache a.kd --teacher t1 --teacher t2 --levels L1 --out joint
    """
    from kdcli.verbs.steps import fuse_teachers as step

    show(step(config), common)
