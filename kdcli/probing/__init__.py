"""How good is a representation? Few-shot linear probes on frozen features (P1 §4)."""

from kdcli.probing.step import ProbeResult, eval_probe

__all__ = ["ProbeResult", "eval_probe"]
