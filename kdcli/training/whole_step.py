"""One loss of all images of a step in the memory of one piece: the gradient cache of Gao et al. 2021.

("Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup".) A loss that compares images with each other
is no mean over pieces. So the student goes through every piece twice: first for its outputs, of which the loss of the
whole step and its gradient are taken; then to carry each piece's share of that gradient on to the weights.
"""

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from kdcli.methods.batch import Batch, TeacherOutputs
from kdcli.models.student import StudentOutput


@final
class WholeStep:
    """Outputs of a step's pieces, without their graphs, and afterwards their gradients.

    Args:
        batch: all images of the step, of this process.
        pieces: how many it is taken in.
    """

    def __init__(self, batch: Batch, pieces: int) -> None:
        self.pieces = tuple(batch.piece(index, pieces) for index in range(pieces))
        order = np.argsort(np.concatenate([batch.known.piece(index, pieces) for index in range(pieces)]))
        self._order: Int64[Tensor, " b"] = torch.from_numpy(order).to(batch.labels.device, non_blocking=True)
        self._leaves = list[StudentOutput]()
        self._live = list[TeacherOutputs]()

    def add(self, output: StudentOutput, live: TeacherOutputs) -> None:
        """Keep what the next piece gave: the student's outputs, and those of networks that run beside it."""
        values = [each.detach().requires_grad_(each.requires_grad) for each in _tensors(output)]
        self._leaves.append(_filled(output, values))
        self._live.append(live)

    def output(self) -> StudentOutput:
        """The student's outputs of all pieces, in the order of the step's images; a gradient is kept for each."""
        parts = zip(*map(_tensors, self._leaves), strict=True)
        return _filled(self._leaves[0], [self._joined(each) for each in parts])

    def live(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Likewise of the networks beside it."""
        return {
            name: {key: self._joined([each[name][key] for each in self._live]) for key in arrays}
            for name, arrays in self._live[0].items()
        }

    def backward(self, piece: int, output: StudentOutput) -> None:
        """From the gradient of the loss at the outputs of a piece on to the weights.

        Args:
            piece: its number.
            output: the same outputs, computed again, with their graph.
        """
        both = zip(_tensors(output), _tensors(self._leaves[piece]), strict=True)
        reached = [(value, leaf.grad) for value, leaf in both if leaf.grad is not None]
        if reached:
            torch.autograd.backward([value for value, _ in reached], [gradient for _, gradient in reached])

    def _joined(self, parts: Sequence[Shaped[Tensor, "_ ..."]]) -> Shaped[Tensor, "b ..."]:
        return torch.cat(list(parts)).index_select(0, self._order)


def _tensors(output: StudentOutput) -> list[Tensor]:
    return [output.features, *output.logits.values(), *output.maps.values()]


def _filled(output: StudentOutput, values: Sequence[Tensor]) -> StudentOutput:
    """An output of the same names with other values, in the order of :func:`_tensors`."""
    features, *others = values
    logits = dict(zip(output.logits, others, strict=False))
    return StudentOutput(features, logits, dict(zip(output.maps, others[len(logits) :], strict=True)))
