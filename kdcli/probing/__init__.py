"""How good is a representation? Probes on frozen features, fine-tuning and kept heads (P1 §4)."""

from kdcli.probing.result import ProbeResult, ProbeTable
from kdcli.probing.step import eval_probe, eval_probes

__all__ = ["ProbeResult", "ProbeTable", "eval_probe", "eval_probes"]
