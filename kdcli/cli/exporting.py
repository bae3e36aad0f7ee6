"""``kd export``."""

from typing import TYPE_CHECKING

from kdcli.cli.showing import show
from kdcli.console import console, size

if TYPE_CHECKING:
    from kdcli.exporting.config import ExportPushConfig
    from kdcli.options.common import Common


def push(config: "ExportPushConfig", common: "Common") -> None:
    """Put a student on the Hugging Face hub, as timm opens it.

    timm.create_model("hf-hub:ORG/NAME", pretrained=True) gives its logits. Its weights and config.json are those of
    OUT/export, with names of classes and the geometry that its accuracy was measured with; a card (README.md) says what
    it learnt from, how well it does and which command made it. Needs the extra 'hub', and a token: hf auth login.

    \b
    Examples:
      kd export push runs/a hf://team/food-student --licence apache-2.0
      kd export push runs/a hf://team/food-student --licence other:Team-Terms-1.0 --private
    """
    from kdcli.exporting.push import push_student

    done = push_student(config)
    show(done, common)
    if not common.as_json:
        use = f"kd cache-teachers DATA --cache CACHE --teacher {done.model}"
        console.finished(f"{done.to}: {size(done.bytes)}", use)
