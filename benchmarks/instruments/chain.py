"""The chain that is measured: norm [+ dropout] [+ residual] + activation, stock and fused."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistnorm.errors import UserError
from mnistnorm.kernels.activations import Activation
from mnistnorm.kernels.contract import Epilogue, Gradients, Saved
from mnistnorm.kernels.norms import BatchNorm, Buffers, GroupNorm, LayerNorm, Norm
from mnistnorm.kernels.triton_impl.operation import TritonOperation
from mnistnorm.kernels.triton_impl.plans import Kind

from .cases import NUM_GROUPS, Shape

# As in Wu & He (2018) for ImageNet networks.
WIDE_GROUPS = 32
# The default eps of torch's modules, and an arbitrary seed.
EPS = 1e-5
SEED = 1


def default_groups(channels: int) -> int:
    """32 groups if each has several channels, else 2 as in the MNIST network, else 1."""
    return next((n for n in (WIDE_GROUPS, NUM_GROUPS) if channels % n == 0 and channels > n), 1)


class Tensors(NamedTuple):
    """Inputs of the forward (all except `grad`) and the backward; None if the chain has no such tensor."""

    input: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    residual: Tensor | None
    grad: Tensor


@dataclass(frozen=True)
class Chain:
    """One chain at one shape.

    Attributes:
        norm: "batch" (training mode), "group" or "layer".
        shape: (N, C, H, W).
        groups: of group norm.
        activation: a name in mnistnorm.kernels.activations.
        channels_last: the memory format; layer norm then runs over (C, H, W), otherwise over the last dimension.
    """

    norm: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    residual: bool = False
    channels_last: bool = False
    groups: int = 1
    activation: str = "relu"

    @property
    def activation_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def slab_bytes(self) -> int:
        """Bytes of the elements that share one mean."""
        samples, channels, height, width = self.shape
        sizes = {
            "batch": samples * height * width,
            "group": channels // self.groups * height * width,
            "layer": prod(self.normalized_shape),
        }
        return sizes[self.norm] * self.dtype.itemsize

    @property
    def operations(self) -> str:
        parts = [f"{self.norm} norm" + (f" ({self.groups} groups)" if self.norm == "group" else "")]
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += ["residual"] if self.residual else []
        return " + ".join((*parts, "ReLU" if self.activation == "relu" else self.activation))

    @property
    def format(self) -> str:
        return f"{str(self.dtype)[6:]}, {'channels_last' if self.channels_last else 'contiguous'}"

    @property
    def title(self) -> str:
        return f"{self.operations} of {list(self.shape)}, {self.format}"

    def check(self) -> None:
        """Checks that the shape can be normalized.

        Raises:
            UserError: the groups do not divide the channels, or a channel or group has a single value.
        """
        if self.norm == "group" and self.shape[1] % self.groups:
            message = f"--groups {self.groups} does not divide the {self.shape[1]} channels of {self.shape}"
            raise UserError(message, exit_code=2)
        for norm, slabs, what in (("batch", self.shape[1], "channel"), ("group", self.groups, "group")):
            if self.norm == norm and prod(self.shape) == slabs:
                message = f"{norm} norm of {self.shape} has one value for each {what}: use a larger shape"
                raise UserError(message, exit_code=2)

    @property
    def normalized_shape(self) -> Shape:
        return self.shape[1:] if self.channels_last else self.shape[-1:]

    def minimum(self) -> dict[str, tuple[int, int]]:
        """Bytes (read, written) that any implementation needs: each input and output activation once.

        Without a residual the backward recomputes the pre-activation from the input; with one it needs a third tensor.
        """
        more = int(self.residual)
        units = {"forward": (1 + more, 1), "backward": (2 + more, 1 + more)}
        return {
            phase: (reads * self.activation_bytes, writes * self.activation_bytes)
            for phase, (reads, writes) in units.items()
        }

    def tensors(self, device: str) -> Tensors:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        parameters = self.normalized_shape if self.norm == "layer" else self.shape[1:2]

        def activation(requires_grad: bool = True) -> Tensor:
            values = torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=layout)
            return (values if values.is_meta else values.normal_()).requires_grad_(requires_grad)

        def parameter(fill: float) -> Tensor:
            return torch.full(parameters, fill, dtype=self.dtype, device=device)

        is_batch = self.norm == "batch"
        return Tensors(
            input=activation(),
            weight=parameter(1).requires_grad_(),
            bias=parameter(0).requires_grad_(),
            running_mean=parameter(0) if is_batch else None,
            running_var=parameter(1) if is_batch else None,
            residual=activation() if self.residual else None,
            grad=activation(requires_grad=False),
        )

    def normalized(self, tensors: Tensors) -> Tensor:
        """The norm alone, as torch.nn's modules run it in training mode, without num_batches_tracked."""
        input, weight, bias, running_mean, running_var, *_ = tensors
        if self.norm == "batch":
            return F.batch_norm(input, running_mean, running_var, weight, bias, training=True)
        if self.norm == "group":
            return F.group_norm(input, self.groups, weight, bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias)

    def stock(self, tensors: Tensors) -> Tensor:
        """The forward as torch.nn's modules run it."""
        y = self.normalized(tensors)
        if self.dropout:
            y = F.dropout(y, self.dropout)
        if tensors.residual is not None:
            y = y + tensors.residual
        return Activation.of(self.activation).forward(y)

    def operation(self, tensors: Tensors, plan: Kind | None = None) -> TritonOperation:
        """The fused chain in Triton."""
        epilogue = Epilogue(self.dropout, Activation.of(self.activation))
        inputs = tensors.input, tensors.weight, tensors.bias, tensors.residual
        return TritonOperation(self.fused_norm, epilogue, inputs, self.buffers(tensors), plan)

    @property
    def fused_norm(self) -> Norm:
        match self.norm:
            case "batch":
                return BatchNorm(EPS)
            case "group":
                return GroupNorm(self.groups, EPS)
            case _:
                return LayerNorm(self.normalized_shape, EPS)

    def buffers(self, tensors: Tensors) -> Buffers:
        return Buffers(tensors.running_mean, tensors.running_var, 0.1)

    def fused_forward(self, tensors: Tensors, operation: TritonOperation) -> Saved:
        """Launches the forward; returns the tensors saved for the backward."""
        inputs = tensors.input, tensors.weight, tensors.bias, tensors.residual
        output, statistics = operation.forward(inputs, self.buffers(tensors), SEED)
        kept = {None: (), "output": (output,), "residual": (tensors.residual,)}[operation.keeps]
        return (*inputs[:3], *statistics, *kept)

    def fused_backward(self, tensors: Tensors, operation: TritonOperation, saved: Saved) -> Gradients:
        """Launches the backward, for all gradients."""
        needs = (True, True, True, self.residual and not operation.epilogue.passes_gradient)
        return operation.backward(needs, SEED, tensors.grad, saved)
