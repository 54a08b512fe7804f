"""The contract between the public functions and the two implementations of the fused operation.

y = activation(dropout(norm(input) * weight + bias) + residual)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .activations import Activation
from .norms import Buffers, Norm, statistics_dtype

Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""Input, weight, bias and residual: the tensors that gradients are for."""
Kept = Literal["output", "residual"]
Needs = tuple[bool, bool, bool, bool]
"""Whether the gradients of input, weight, bias and residual are asked for."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Those of input, weight, bias and residual; None for each that is not asked for."""
Seed = int | Tensor
"""Decides what dropout drops; a tensor, 0-dim int64 on the input's device, in a CUDA graph and where torch traces."""
Saved = tuple[Tensor | None, ...]
"""What an operation keeps for its backward: input, weight, bias, then its statistics, then the kept tensor if any."""


@dataclass(frozen=True)
class Epilogue:
    """What follows the affine part of the norm.

    Attributes:
        dropout_p: probability to zero an element.
        activation: applied last.
    """

    dropout_p: float
    activation: Activation

    @property
    def scale(self) -> float:
        """What dropout multiplies the kept elements by."""
        return 0.0 if self.dropout_p == 1.0 else 1.0 / (1.0 - self.dropout_p)

    @property
    def passes_gradient(self) -> bool:
        """Whether the gradient of the residual is that of the output itself."""
        return self.activation.name == "identity"

    def keeps(self, has_residual: bool, reads_output: bool) -> Kept | None:
        """Which tensor is saved besides the input; it is alive anyway.

        Without a residual the pre-activation is recomputed from the input, except by an implementation that
        `reads_output` where the output tells the gradient, because reading costs less.
        """
        if self.passes_gradient or not (has_residual or reads_output):
            return None
        if self.activation.kind.gradient_from_output:
            return "output"
        return "residual" if has_residual else None


class Operation(ABC):
    """A norm and its epilogue in one implementation, for tensors of one kind: everything that calls with them share.

    Args:
        norm, epilogue: what is computed.
        inputs: tensors of that kind: shapes, strides, dtypes, device.
        reads_output: see `Epilogue.keeps`.

    Attributes:
        keeps: what the last of the saved tensors is, if it is not one of the statistics.
        input_strides: of the input.
        dtype: of the statistics.
    """

    def __init__(self, norm: Norm, epilogue: Epilogue, inputs: Inputs, *, reads_output: bool) -> None:
        input, _, _, residual = inputs
        self.norm, self.epilogue = norm, epilogue
        self.has_residual = residual is not None
        self.keeps = epilogue.keeps(self.has_residual, reads_output)
        self.input_strides, self.dtype = input.stride(), statistics_dtype(input)

    @abstractmethod
    def forward(self, inputs: Inputs, buffers: Buffers, seed: Seed) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Returns the output and the statistics for backward, None where it takes none; updates `buffers`.

        The seed decides what is dropped.
        """

    @abstractmethod
    def backward(self, needs: Needs, seed: Seed, grad_output: Tensor, saved: Saved) -> Gradients:
        """The gradients; that of a residual only where `epilogue.passes_gradient` is False."""

    @abstractmethod
    def mean_and_rstd(self, saved: Saved) -> tuple[Tensor, Tensor]:
        """The statistics among the saved tensors."""

    @abstractmethod
    def dropout_factor(self, input: Tensor, seed: Seed) -> Tensor:
        """0 where forward drops an element and 1 / (1 - dropout_p) elsewhere, of the input's shape and dtype."""

    def is_recorded_by_torch(self, inputs: Inputs) -> bool:
        """Whether autograd is to record the operations of `forward` instead of using `backward`."""
        return False


def gradients_of(
    epilogue: Epilogue, needs: Needs, grad_output: Tensor, compute: Callable[[Needs], Gradients]
) -> Gradients:
    """The gradients that are needed; the residual's is passed on where it is that of the output itself."""
    passed_on = None
    if needs[3] and epilogue.passes_gradient:
        needs, passed_on = (needs[0], needs[1], needs[2], False), grad_output
    if True not in needs:
        return None, None, None, passed_on
    gradients = compute(needs)
    return gradients if passed_on is None else (*gradients[:3], passed_on)
