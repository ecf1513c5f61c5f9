"""Loss scaling: a gradient in float16 is that of scale · loss, for what is below 2⁻²⁴ would be lost.

The optimizer divides by the scale again. Scales are powers of two, so neither changes a bit of what float16 holds.
Source: Micikevicius et al. 2018, "Mixed Precision Training", sections 3.2 and 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

#: As ``torch.amp.GradScaler`` has them: the first scale, and finite updates in a row after which it doubles.
FIRST, GROWTH_INTERVAL = 65536.0, 2000
#: Where an update is not finite at this scale, scaling is not to blame: Megatron-LM's ``--min-loss-scale``.
LEAST = 1.0
#: One by twice this is not a normal float32.
MOST = 2.0**126


@dataclass(frozen=True)
class LossScale:
    """The scale of an update, by the rules of ``torch.amp.GradScaler``: a gradient that overflows leaves its update out
    and halves the scale; 2000 finite ones in a row double it.

    Attributes:
        value: the scale.
        finite: finite updates in a row since it last changed.
        overflows: updates left out so far. Neither the optimizer nor the learning rate's schedule counts these; the
            steps of a run do, and their batches are over: all that as in ``transformers.Trainer``.
    """

    value: float = FIRST
    finite: int = 0
    overflows: int = 0

    @property
    def least(self) -> bool:
        """Whether it cannot be halved."""
        return self.value <= LEAST

    def behind(self, *, finite: bool) -> LossScale:
        """The scale behind an update whose gradient was finite, or was not."""
        if not finite:
            return LossScale(self.value / 2, 0, self.overflows + 1)
        if self.finite + 1 < GROWTH_INTERVAL:
            return LossScale(self.value, self.finite + 1, self.overflows)
        return LossScale(min(2 * self.value, MOST), 0, self.overflows)
