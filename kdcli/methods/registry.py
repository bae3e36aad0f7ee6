"""The one registry: every ``--method`` by name, in the order in which ``kd methods`` lists them."""

from kdcli.methods import consolidation, fixmatch, mlfd, oracles, transfer, weighted
from kdcli.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *weighted.METHODS,
        *fixmatch.METHODS,
        *consolidation.METHODS,
        *oracles.METHODS,
        *transfer.METHODS,
        *mlfd.METHODS,
    )
}
