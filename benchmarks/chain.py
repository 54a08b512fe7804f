"""The chain whose memory traffic is counted: norm [+ dropout] [+ residual] + ReLU, stock and fused."""

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnistnorm.errors import UserError
from mnistnorm.kernels import launchers
from mnistnorm.kernels.launch import Kind
from mnistnorm.kernels.reference import Gradients

from .cases import NUM_GROUPS, Shape

# What Wu & He (2018) take for the networks of ImageNet's size.
WIDE_GROUPS = 32


def default_groups(channels: int) -> int:
    """32 groups where that leaves several channels for each, else the MNIST network's 2, else 1."""
    return next((n for n in (WIDE_GROUPS, NUM_GROUPS) if channels % n == 0 and channels > n), 1)


class Tensors(NamedTuple):
    """What goes into the forward (all but `grad`) and the backward; None where the chain has no such tensor."""

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
        channels_last: the memory format; layer norm then runs over (C, H, W), otherwise over the last dimension.
    """

    norm: str
    shape: Shape
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    residual: bool = False
    channels_last: bool = False
    groups: int = 1

    @property
    def activation_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def operations(self) -> str:
        parts = [f"{self.norm} norm" + (f" ({self.groups} groups)" if self.norm == "group" else "")]
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        parts += ["residual"] if self.residual else []
        return " + ".join((*parts, "ReLU"))

    @property
    def format(self) -> str:
        return f"{str(self.dtype)[6:]}, {'channels_last' if self.channels_last else 'contiguous'}"

    @property
    def title(self) -> str:
        return f"{self.operations} of {list(self.shape)}, {self.format}"

    def check(self) -> None:
        """Refuses a shape that cannot be normalized.

        Raises:
            UserError: it does not divide into the groups, or has no statistics.
        """
        if self.norm == "group" and self.shape[1] % self.groups:
            message = f"--groups {self.groups} does not divide the {self.shape[1]} channels of {self.shape}"
            raise UserError(message, exit_code=2)
        for norm, slabs, what in (("batch", self.shape[1], "channel"), ("group", self.groups, "group")):
            if self.norm == norm and prod(self.shape) == slabs:
                message = f"{norm} norm of {self.shape} has one value for each {what}: take a larger shape"
                raise UserError(message, exit_code=2)

    @property
    def normalized_shape(self) -> Shape:
        return self.shape[1:] if self.channels_last else self.shape[-1:]

    def minimum(self) -> dict[str, tuple[int, int]]:
        """Bytes that any implementation reads and writes: each activation that goes in or comes out, once.

        Without a residual the backward finds the ReLU's mask in the input; with one it takes a third tensor to tell.
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

        def activation(wanted: bool = True) -> Tensor:
            values = torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=layout)
            return (values if values.is_meta else values.normal_()).requires_grad_(wanted)

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
            grad=activation(wanted=False),
        )

    def normalized(self, tensors: Tensors) -> Tensor:
        """The norm alone, as torch.nn's modules run it in training mode, without the count of batches."""
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
        return F.relu(y)

    def fused_forward(self, tensors: Tensors, plan: Kind | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The launches of the forward: output, mean, rstd."""
        more: dict[str, Any] = {}
        running: tuple[Tensor | None, ...] = ()
        if self.norm == "batch":
            more, running = {"momentum": 0.1}, (tensors.running_mean, tensors.running_var)
        forward = getattr(launchers, f"{self.norm}_norm_forward")
        leading = (tensors.input, tensors.weight, tensors.bias, tensors.residual, *running)
        return forward(*leading, eps=1e-5, **more, **self._options(plan))

    def fused_backward(
        self, tensors: Tensors, forward: tuple[Tensor, Tensor, Tensor], plan: Kind | None = None
    ) -> Gradients:
        """The launches of the backward, for all gradients that there are."""
        output, mean, rstd = forward
        backward = getattr(launchers, f"{self.norm}_norm_backward")
        return backward(
            *(tensors.grad, tensors.input, tensors.weight, tensors.bias),
            *(output if self.residual else None, mean, rstd),
            has_residual=self.residual,
            needs=(True, True, True, self.residual),
            **self._options(plan),
        )

    def _options(self, plan: Kind | None) -> dict[str, Any]:
        by_norm: dict[str, dict[str, Any]] = {
            "batch": {"use_batch_stats": True},
            "group": {"num_groups": self.groups},
            "layer": {"normalized_shape": self.normalized_shape},
        }
        return by_norm[self.norm] | {"seed": 1, "dropout_p": self.dropout, "relu": True, "plan": plan}
