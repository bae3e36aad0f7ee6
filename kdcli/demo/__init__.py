"""``kd demo``: the main job on real images and real ImageNet weights that pip packages ship."""

from kdcli.demo.weights import export_pretrained_weights

__all__ = ["export_pretrained_weights"]
