"""The fused layers as modules: each takes the place of a torch.nn norm and of the dropout and ReLU behind it."""

import operator
import warnings
from collections.abc import Callable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _NormBase

from . import sync, traced
from .functional import Activation, Impl, batch_norm_relu, check_fused_options, group_norm_relu, layer_norm_relu


class FusedLayer(nn.Module):
    """What every fused layer adds to the norm that it extends: dropout, residual and activation."""

    dropout_p: float
    activation: Activation
    impl: Impl

    def set_options(self, dropout_p: float, activation: Activation, impl: Impl) -> None:
        check_fused_options(dropout_p, activation, impl)
        self.dropout_p, self.activation, self.impl = dropout_p, activation, impl

    def forward(self, input: Tensor, residual: Tensor | None = None, *, _in_place: bool | None = None) -> Tensor:
        """Of the input's shape and dtype; `residual` of the same shape is added before the activation.

        With `_in_place`, which fuse passes, a residual of another shape or dtype is added as well, as torch does.
        """
        if _in_place is None or _fits(residual, input):
            return self._compute(input, self._arguments(residual, self.activation))
        output = self._compute(input, self._arguments(None, "identity"))
        output = (operator.iadd if _in_place else operator.add)(output, residual)
        return F.relu(output) if self.activation == "relu" else output

    def _compute(self, input: Tensor, options: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def _arguments(self, residual: Tensor | None, activation: Activation) -> dict[str, Any]:
        return {
            "residual": residual,
            "dropout_p": self.dropout_p if self.training else 0.0,
            "activation": activation,
            "impl": self.impl,
        }

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}, activation={self.activation}, impl={self.impl}"


def _fits(residual: Any, input: Tensor) -> bool:
    """Whether the operation can add it."""
    return isinstance(residual, Tensor) and (residual.shape, residual.dtype, residual.device) == (
        input.shape,
        input.dtype,
        input.device,
    )


class _CopiedGroup:
    """Stands for a process group, of which there are no copies, where a module that has it is copied or pickled."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_CopiedGroup":
        return self

    def __reduce__(self) -> tuple[Callable[[], "_CopiedGroup"], tuple[()]]:
        if self.group is not None and self.group.group_desc != "default_pg":
            raise TypeError("only the default process group can be pickled: set process_group to None first")
        return _unpickled_group, ()


def _unpickled_group() -> _CopiedGroup:
    if not dist.is_initialized():
        warnings.warn(
            "a batch norm over the default process group was unpickled before torch.distributed.init_process_group: "
            "its process_group is None",
            stacklevel=2,
        )
    return _CopiedGroup(dist.group.WORLD)


# The layers whose channels were compared, and the name of the group: not a part of them, to be copied or pickled.
_checked: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _BatchNormReLU(FusedLayer, _NormBase):
    """The batch norms, which differ in the inputs that they take."""

    layouts: ClassVar[dict[int, str]]
    """The names of an input's dimensions, by the numbers of them that it may have."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        activation: Activation = "relu",
        process_group: ProcessGroup | None = None,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, bias=bias, device=device, dtype=dtype
        )
        self.set_options(dropout_p, activation, impl)
        self.process_group = process_group

    def __getstate__(self) -> dict[str, Any]:
        group = self.process_group
        return {**super().__getstate__(), "process_group": None if group is None else _CopiedGroup(group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state["process_group"]
        super().__setstate__({**state, "process_group": group.group if isinstance(group, _CopiedGroup) else group})

    def extra_repr(self) -> str:
        group = self.process_group
        return super().extra_repr() + ("" if group is None else f", process_group={group.group_name}")

    def _compute(self, input: Tensor, options: dict[str, Any]) -> Tensor:
        if input.dim() not in self.layouts:
            expected = " or ".join(f"{dim}D input {layout}" for dim, layout in self.layouts.items())
            raise ValueError(f"expected {expected}, got {input.dim()}D input of shape {tuple(input.shape)}")
        training, group = self.training, self.process_group if self.training else None
        running_mean, running_var = self.running_mean, self.running_var
        counter = self.num_batches_tracked if training and self.track_running_stats else None
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if counter is not None and self.momentum is None:
            momentum = 1.0 / (counter + 1).double()
        if isinstance(group, ProcessGroup) and not traced.is_traced(input) and _checked.get(self) != group.group_name:
            sync.check_channels(input, group)
            _checked[self] = group.group_name
        # nn's rules: in training the running statistics are updated if tracked, in eval used if there.
        use_batch_stats = training or running_mean is None
        if training and not self.track_running_stats:
            running_mean = running_var = None
        output = batch_norm_relu(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            use_batch_stats,
            momentum,
            self.eps,
            process_group=group,
            **options,
        )
        if counter is not None:
            counter.add_(1)
        return output


class BatchNormReLU1d(_BatchNormReLU):
    """relu(dropout(batch_norm(input)) + residual) over (N, C) or (N, C, L); otherwise as BatchNormReLU2d."""

    layouts: ClassVar = {2: "(N, C)", 3: "(N, C, L)"}


class BatchNormReLU2d(_BatchNormReLU):
    """relu(dropout(batch_norm(input)) + residual) over (N, C, H, W); the first five arguments are nn.BatchNorm2d's.

    Parameters, buffers, state_dict keys and initialization are those of nn.BatchNorm2d: a state_dict of either loads
    into the other. It is not a subclass of it, because nn.SyncBatchNorm.convert_sync_batchnorm would replace it and
    drop the ReLU: pass `process_group` for synchronised statistics.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, bias: as for nn.BatchNorm2d; momentum=None is a cumulative average.
        dropout_p: probability to zero an element, in training mode only.
        activation: "relu" or "identity".
        process_group: take the batch statistics over all its processes, which must have as many channels: the first
            call that is not compiled compares them. Copies of the layer share it; pickled, the layer belongs to the
            default group of the process that loads it.
        impl: "auto", "triton" or "torch", as for `batch_norm_relu`.
        device, dtype: of the parameters and buffers.

    Called as layer(input, residual=None), with a residual of the input's shape and dtype.
    """

    layouts: ClassVar = {4: "(N, C, H, W)"}


class BatchNormReLU3d(_BatchNormReLU):
    """relu(dropout(batch_norm(input)) + residual) over (N, C, D, H, W); otherwise as BatchNormReLU2d."""

    layouts: ClassVar = {5: "(N, C, D, H, W)"}


class GroupNormReLU(FusedLayer, nn.GroupNorm):
    """relu(dropout(group_norm(input)) + residual) over (N, C, ...); the first four arguments are nn.GroupNorm's.

    Args:
        num_groups, num_channels, eps, affine, bias: as for nn.GroupNorm.
        dropout_p: probability to zero an element, in training mode only.
        activation: "relu" or "identity".
        impl: "auto", "triton" or "torch", as for `group_norm_relu`.
        device, dtype: of the parameters.

    Called as layer(input, residual=None), with a residual of the input's shape and dtype.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        activation: Activation = "relu",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, bias=bias, device=device, dtype=dtype)
        self.set_options(dropout_p, activation, impl)

    def _compute(self, input: Tensor, options: dict[str, Any]) -> Tensor:
        return group_norm_relu(input, self.num_groups, self.weight, self.bias, self.eps, **options)


class LayerNormReLU(FusedLayer, nn.LayerNorm):
    """relu(dropout(layer_norm(input)) + residual) over (*, *normalized_shape); first four arguments as nn.LayerNorm's.

    Args:
        normalized_shape, eps, elementwise_affine, bias: as for nn.LayerNorm.
        dropout_p: probability to zero an element, in training mode only.
        activation: "relu" or "identity".
        impl: "auto", "triton" or "torch", as for `layer_norm_relu`.
        device, dtype: of the parameters.

    Called as layer(input, residual=None), with a residual of the input's shape and dtype.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dropout_p: float = 0.0,
        activation: Activation = "relu",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        self.set_options(dropout_p, activation, impl)

    def _compute(self, input: Tensor, options: dict[str, Any]) -> Tensor:
        return layer_norm_relu(input, self.normalized_shape, self.weight, self.bias, self.eps, **options)
