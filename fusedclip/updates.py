"""How optimizers move a parameter: of each rule all there is to say, and how masters are kept. Elementwise.

    gradient -> times the coefficient -> rule(value, gradient, states) -> value and states, rounded to where they live

The value is the parameter, or its fp32 master where it has one. Arithmetic is fp64 for fp64 parameters and fp32 for all
others: each operand is widened to that, and each operation below is rounded by itself to the nearest even (nothing is
fused into a multiply-add; quotients and roots are exact but for that one rounding). Numbers that are the same for all
elements are found in fp64 and rounded to the arithmetic's dtype once. An engine that keeps to this gives the same bits
as any other, but for what `pow` of the step makes of the last place. `csrc/updates.h` is the same page in C++.
"""

from typing import NamedTuple

import torch
from torch import Tensor

Moved = tuple[Tensor, tuple[Tensor, ...]]


class AdamWRule(NamedTuple):
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2; amsgrad: Reddi et al. (2018).

    torch's order of operations: the decay first, and sqrt(v) / sqrt(1 - beta2^t) + eps below the fraction.
    """

    lr: float | Tensor  # 0-d, fp64 and on the parameters' device, if it is a tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool = False
    maximize: bool = False

    @property
    def kind(self) -> str:
        """What kernels are made for: a name of FUSEDCLIP_UPDATES in csrc/updates.h."""
        return "adamw_amsgrad" if self.amsgrad else "adamw"

    @property
    def states(self) -> tuple[str, ...]:
        """The streams beside value and gradient, by the names that torch's state has for them."""
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    @property
    def counts_steps(self) -> bool:
        return True

    def move(self, x: Tensor, g: Tensor, states: tuple[Tensor, ...], step: Tensor) -> Moved:
        """The next value and states, all in the arithmetic's dtype; `step` (fp64, 0-d) counts from 1."""

        def constant(number: float | Tensor) -> Tensor:
            return torch.as_tensor(number, dtype=torch.float64, device=x.device).to(x.dtype)

        m, v, *largest = states
        x = x * constant(1 - self.lr * self.weight_decay)
        if 1 - self.beta1 < 0.5:
            m = m + (g - m) * constant(1 - self.beta1)
        else:
            m = g - (g - m) * constant(self.beta1)
        v = v * constant(self.beta2) + (g * constant(1 - self.beta2)) * g
        if self.amsgrad:
            largest = [torch.maximum(largest[0], v)]  # NaN stays
        # m / (1 - beta1^t) over sqrt(v) / root + eps, both times root: a division less. Of torch's own square roots on
        # the CPU (MKL's) a fifth is off by the last place: those of fp64 here, then, too.
        root = (1 - self.beta2**step).sqrt()
        below = (largest[0] if self.amsgrad else v).double().sqrt().to(x.dtype) + constant(self.eps * root)
        x = x - (m * constant(self.lr / (1 - self.beta1**step) * root)) / below
        return x, (m, v, *largest)


class SGDRule(NamedTuple):
    """Sutskever et al., On the importance of initialization and momentum (2013), in torch's form of it."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool = False
    maximize: bool = False

    @property
    def kind(self) -> str:
        if not self.momentum:
            return "sgd"
        return "sgd_nesterov" if self.nesterov else "sgd_momentum"

    @property
    def states(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def counts_steps(self) -> bool:
        """The first step takes the gradient as the momentum, undampened; which one that is the device knows."""
        return bool(self.momentum)

    def move(self, x: Tensor, g: Tensor, states: tuple[Tensor, ...], step: Tensor) -> Moved:
        def constant(number: float | Tensor) -> Tensor:
            return torch.as_tensor(number, dtype=torch.float64, device=x.device).to(x.dtype)

        if self.weight_decay:
            g = g + x * constant(self.weight_decay)
        if self.momentum:
            later = (step > 1).double()
            states = (states[0] * constant(self.momentum * later) + g * constant(1 - self.dampening * later),)
            g = g + states[0] * constant(self.momentum) if self.nesterov else states[0]
        return x - g * constant(self.lr), states


UpdateRule = AdamWRule | SGDRule


def float_factors(coef: Tensor) -> tuple[Tensor, Tensor]:
    """A coefficient (fp64, 0-d) as fp32 arithmetic applies it: g * rest * power; csrc/norm_ops.h has the reasons."""
    power = torch.where(coef < 2.0**-64, 2.0**-64, torch.where(coef > 2.0**100, 2.0**100, 1.0)).double()
    power = torch.where(coef < 2.0**-190, 2.0**-149, power)
    power = torch.where(coef > 0, power, 1.0)
    rest = torch.where((coef > 0) & (coef < 2.0**-298), 2.0**-149, coef / power)
    return rest.float(), power.float()


# A master is fp32, beside the parameter ("fp32"), or made of the parameter's 16 bits and as many more ("split"). Either
# way a bf16 parameter is its master rounded to the nearest, halves away from zero: that is an addition to the
# magnitude, of whose carry the remainder's highest bit tells, so that reading can undo it. Nearest even it could not.


def round_away(master: Tensor) -> Tensor:
    """fp32 to bf16, halves away from zero; a NaN is quiet."""
    bits = master.view(torch.int32)
    rounded = torch.where(master.isnan(), (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
    return rounded.to(torch.int16).view(torch.bfloat16)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to the parameter (bf16) and the remainder, which together are exactly it; of a NaN, a NaN.

    The remainder's 16 bits go by the name of float16, of which NCCL and gloo have collectives; they are no number.
    """
    low = torch.where(master.isnan(), 0, master.view(torch.int32) & 0xFFFF)
    return round_away(master), low.to(torch.int16).view(torch.float16)


def join(parameter: Tensor, remainder: Tensor) -> Tensor:
    """What `split` was given.

    A zero never had a carry: one that somebody else has written meets the remainder of another number, which must not
    make a NaN of it.
    """
    high, low = parameter.view(torch.int16).int(), remainder.view(torch.int16).int() & 0xFFFF
    carry = (low >> 15) & ((high & 0x7FFF) != 0).int()
    return (((high - carry) << 16) | low).view(torch.float32)
