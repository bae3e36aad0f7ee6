"""Networks of random weights as teachers: what guessing knows. ``lab.untrained:resnet50`` is a model string of kd."""

import timm
import torch
from torch import nn


def resnet50() -> nn.Module:
    """ResNet-50 for ImageNet's classes."""
    return _random("resnet50", 1000)


def tiny() -> nn.Module:
    """A small one for three classes."""
    return _random("test_resnet", 3)


def _random(architecture: str, classes: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # its weights are its identity
        return timm.create_model(architecture, num_classes=classes).eval()
