"""How good is a representation? Probes on frozen features, fine-tuning and kept heads (P1 §4)."""

from kdcli.probing.probe import eval_probe, eval_probes
from kdcli.probing.result import ProbeResult, ProbeTable

__all__ = ["ProbeResult", "ProbeTable", "eval_probe", "eval_probes"]
