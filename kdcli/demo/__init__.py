"""``kd demo``: the main job on real images and real ImageNet weights that pip packages ship."""

from kdcli.demo.demo import run_demo
from kdcli.demo.result import DemoResult
from kdcli.demo.weights import export_pretrained_weights

__all__ = ["DemoResult", "export_pretrained_weights", "run_demo"]
