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
"""Input, weight, bias and residual: the tensors that get gradients."""
Kept = Literal["output", "residual"]
Needs = tuple[bool, bool, bool, bool]
"""Whether the gradients of input, weight, bias and residual are needed."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Gradients of input, weight, bias and residual; None for those that are not needed."""
Seed = int | Tensor
"""Seed of the dropout mask; in CUDA graphs and traced calls a 0-dim int64 tensor on the input's device."""
Saved = tuple[Tensor | None, ...]
"""Tensors saved for backward: input, weight, bias, then the statistics, then the kept tensor if any."""


@dataclass(frozen=True)
class Epilogue:
    """The operations after the affine part of the norm.

    Attributes:
        dropout_p: probability to zero an element.
        activation: applied last.
    """

    dropout_p: float
    activation: Activation

    @property
    def scale(self) -> float:
        """The factor by which dropout scales the kept elements."""
        return 0.0 if self.dropout_p == 1.0 else 1.0 / (1.0 - self.dropout_p)

    @property
    def passes_gradient(self) -> bool:
        """Whether the gradient of the residual equals that of the output."""
        return self.activation.name == "identity"

    def keeps(self, has_residual: bool, reads_output: bool) -> Kept | None:
        """Which tensor is saved besides the input; either is alive anyway.

        Without a residual, backward recomputes the pre-activation from the input. If `reads_output`, and if the output
        determines the gradient, it reads the output instead, because that is cheaper.
        """
        if self.passes_gradient or not (has_residual or reads_output):
            return None
        if self.activation.kind.gradient_from_output:
            return "output"
        return "residual" if has_residual else None


class Operation(ABC):
    """A norm and its epilogue in one implementation, for tensors of one kind (shapes, strides, dtypes, device).

    Args:
        norm, epilogue: what is computed.
        inputs: tensors of that kind.
        reads_output: see `Epilogue.keeps`.

    Attributes:
        keeps: which tensor is saved last, after the statistics, if any.
        input_strides: strides of the input.
        dtype: dtype of the statistics.
    """

    def __init__(self, norm: Norm, epilogue: Epilogue, inputs: Inputs, *, reads_output: bool) -> None:
        input, _, _, residual = inputs
        self.norm, self.epilogue = norm, epilogue
        self.has_residual = residual is not None
        self.keeps = epilogue.keeps(self.has_residual, reads_output)
        self.input_strides, self.dtype = input.stride(), statistics_dtype(input)

    @abstractmethod
    def forward(self, inputs: Inputs, buffers: Buffers, seed: Seed) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Returns the output and the statistics for backward, None if it needs none; updates `buffers`.

        `seed` determines the dropout mask.
        """

    @abstractmethod
    def backward(self, needs: Needs, seed: Seed, grad_output: Tensor, saved: Saved) -> Gradients:
        """Returns the gradients; that of a residual only if `epilogue.passes_gradient` is False."""

    @abstractmethod
    def mean_and_rstd(self, saved: Saved) -> tuple[Tensor, Tensor]:
        """Returns mean and rstd from the saved tensors."""

    @abstractmethod
    def dropout_factor(self, input: Tensor, seed: Seed) -> Tensor:
        """0 for the elements that forward drops, 1 / (1 - dropout_p) for the others; of the input's shape and dtype."""

    def is_recorded_by_torch(self, inputs: Inputs) -> bool:
        """Whether autograd records the operations of `forward` instead of calling `backward`."""
        return False


def gradients_of(
    epilogue: Epilogue, needs: Needs, grad_output: Tensor, compute: Callable[[Needs], Gradients]
) -> Gradients:
    """Computes the needed gradients; passes `grad_output` on to the residual if `epilogue.passes_gradient`."""
    passed_on = None
    if needs[3] and epilogue.passes_gradient:
        needs, passed_on = (needs[0], needs[1], needs[2], False), grad_output
    if True not in needs:
        return None, None, None, passed_on
    gradients = compute(needs)
    return gradients if passed_on is None else (*gradients[:3], passed_on)
