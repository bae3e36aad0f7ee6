"""``kd methods``: what a student can learn from its teachers, and how."""

from typing import TYPE_CHECKING, Any

from kdcli.console import console

if TYPE_CHECKING:
    from kdcli.methods.config import MethodsConfig
    from kdcli.options.common import Common


def methods(config: "MethodsConfig", common: "Common") -> None:
    """List the methods, or explain one.

    A name gives its paper, equation, options with their defaults, what it needs, and an example.

    \b
    Examples:
      kd methods
      kd methods consolidation
      kd methods --json
    """
    from kdcli.methods.registry import METHODS

    listed = list(METHODS.values())
    if common.as_json:
        console.document({"methods": [_document(method) for method in listed]})
        return
    rows = []
    for method in listed:
        needs = [
            *(f"cached {kind}" for kind in sorted(method.needs.kinds)),
            *(("or topk:K",) if method.needs.largest else ()),
            *(("labels",) if method.needs.labels else ()),
            *(("--ranking",) if method.needs.ranking else ()),
            *(("--generalist",) if method.needs.generalist else ()),
        ]
        rows.append([method.name, method.paper, method.equation, ", ".join(needs), method.description])
    console.table(["method", "paper", "equation", "needs", "what it does"], rows)


def _document(method: Any) -> dict[str, Any]:
    needs = method.needs
    return {
        "name": method.name,
        "paper": method.paper,
        "equation": method.equation,
        "needs": {
            "cached": sorted(needs.kinds),
            "labels": needs.labels,
            "ranking": needs.ranking,
            "generalist": needs.generalist,
        },
        "description": method.description,
    }
