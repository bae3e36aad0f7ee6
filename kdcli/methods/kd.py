"""Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (2015): the recipe that is called KD.

    L = 0.9 T^2 KL(teacher || student) + 0.1 CE, T = 4

The loss of ``xe-kl`` with other numbers: weights, T and those of the engine are what CRD's authors compare methods
with on CIFAR-100 (Tian et al., ICLR 2020; their released code), where students start from random weights: SGD,
momentum 0.9, weight decay 5e-4, learning rate 0.05, times 0.1 after 150, 180 and 210 of 240 epochs, batches of 64.
The student's classifier is a new one, where it has none of as many classes (ours: so that any weights will do to
start from). A teacher that was itself trained on smoothed labels teaches worse (Mueller et al., NeurIPS 2019).
"""

from typing import final

from kdcli.methods.base import Needs, Settings
from kdcli.methods.logits import LogitMethod
from kdcli.methods.options import LogitKlOptions, kl_weight_option, temperature_option

CIFAR = Settings(
    optimizer="momentum",
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    decay_all=True,
    schedule="step",
    milestones=(0.625, 0.75, 0.875),
    epochs=240,
    batch_size=64,
)
"""What the authors of CRD train every student with, whatever the loss."""

SAME_CLASSES = Needs(frozenset({"logits"}), labels=True, classes=True, same=True)
"""Logits of teachers of the labels' classes, which a classifier of the student learns, a new one if need be."""


class KdOptions(LogitKlOptions):
    """KL and labels."""

    temperature: float = temperature_option(4.0)
    kl_weight: float = kl_weight_option(0.9)


@final
class Kd(LogitMethod):
    """KL and labels."""


KD = Kd(
    name="kd", paper="Hinton et al., Distilling the Knowledge in a Neural Network, 2015", equation="0.9 KD + 0.1 CE",
    summary="The classic recipe: softened probabilities (T = 4) and labels.", Options=KdOptions, needs=SAME_CLASSES,
    defaults=CIFAR, spares={"labels": "--kl-weight 1"},
)  # fmt: skip
