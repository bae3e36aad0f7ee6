"""Learning-rate schedules: timm's, and one that timm does not have."""

import math
from typing import final

from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from kdcli.methods.base import Settings

ONE_CYCLE_WARMUP = 0.3
"""Share of the training in which a one-cycle schedule rises, unless told otherwise (torch's default)."""
FINAL_SHARE = 4e-6
"""Share of its peak at which a one-cycle schedule ends, unless told otherwise (torch's 1 / 25 / 10 000)."""
_START = 25.0


@final
class OneCycle(Scheduler):
    """Smith & Topin, "Super-Convergence" (2019), as ``torch.optim.lr_scheduler.OneCycleLR`` computes it.

    Each group rises along a cosine from peak / 25 to its peak, then falls to a share of it. Unlike torch's it can be
    asked for any step, so a resumed run needs no state of it. The momentum stays as it is.

    Args:
        optimizer: whose groups hold the peak rates.
        steps: of the whole training.
        warmup: share of them in which the rate rises, in (0, 1).
        final: share of the peak at the last step; torch's 1 / (div_factor * final_div_factor).
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup: float, final: float = FINAL_SHARE) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self._top = warmup * steps - 1
        self._last, self._final = steps - 1, final

    def _get_lr(self, t: int) -> list[float]:
        return [self._rate(peak, t - 1) for peak in self.base_values]

    def _rate(self, peak: float, step: int) -> float:
        start, end = peak / _START, peak * self._final
        if step <= self._top:
            return _cosine(start, peak, step / self._top if self._top > 0 else 1.0)
        return _cosine(peak, end, min(1.0, (step - self._top) / (self._last - self._top)))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def make_schedule(optimizer: Optimizer, settings: Settings, steps: int) -> Scheduler:
    """A schedule, to be told before every step which one it is, from 1: at time 0 a warm-up's rate is 0.

    Args:
        optimizer: whose groups hold the peak rates.
        settings: schedule, milestones and warm-up as shares of the training, and the final rate's share.
        steps: of the whole training.
    """
    warmup = round(settings.warmup * steps)
    if settings.schedule == "one-cycle":
        final = FINAL_SHARE if settings.final_lr_share is None else settings.final_lr_share
        return OneCycle(optimizer, steps, settings.warmup or ONE_CYCLE_WARMUP, final)
    if settings.schedule == "cosine":
        return CosineLRScheduler(
            optimizer,
            t_initial=max(1, steps + 1 - warmup),
            warmup_t=warmup,
            warmup_prefix=True,
            t_in_epochs=False,
        )
    shares = settings.milestones if settings.schedule == "step" else ()
    # timm applies milestone m at time m - 1, and step k runs at time k + 1.
    return MultiStepLRScheduler(
        optimizer,
        decay_t=[round(share * steps) + 2 for share in shares],
        decay_rate=0.1,
        warmup_t=warmup,
        warmup_prefix=False,
        t_in_epochs=False,
    )
