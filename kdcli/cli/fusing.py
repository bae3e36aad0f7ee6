"""``kd fuse-teachers``."""

from shlex import quote
from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, counted, size
from kdcli.files import bytes_in

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

    result = step(config)
    show(result, common)
    if common.as_json:
        return
    cache = quote(str(config.cache[0]))
    teach = f"kd train-student DATA --cache {cache} --teacher {config.write_back}"
    console.finished(
        f"{config.out}: {size(bytes_in(config.out))}, {counted(len(result.records()), 'joint teachers')}",
        *([f"{teach} --method distill-equal --student ARCH --out runs/joint"] if config.write_back else []),
        f"kd report {quote(str(config.out))}",
    )
