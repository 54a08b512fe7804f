"""The fused layers: each replaces a norm of torch.nn and the dropout, residual add and activation after it."""

import operator
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _NormBase

from . import compat, compiler, sync
from .activations import Activation
from .functional import ActivationLike, batch_norm_relu, check_epilogue, group_norm_relu, layer_norm_relu
from .implementations import Impl


class FusedLayer(compat.NormBase):
    """Base class of the fused layers: adds dropout, residual and activation to a norm."""

    dropout_p: float
    activation: ActivationLike
    impl: Impl
    _function: ClassVar[Callable[..., Tensor]]

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError("torch.jit.script does not support fused layers: use torch.export or torch.compile")

    def set_options(self, dropout_p: float, activation: ActivationLike, impl: Impl) -> None:
        """Checks and sets the options that the norms of torch.nn lack."""
        epilogue = check_epilogue(dropout_p, activation, impl)
        self.dropout_p, self.activation, self.impl = dropout_p, epilogue.activation.short, impl

    in_forward = False
    """Whether a forward that fuse rewrote calls it, with `_in_place`; any other call then computes the norm alone."""

    def forward(self, input: Tensor, residual: Tensor | None = None, *, _in_place: bool | None = None) -> Tensor:
        """Returns a tensor of the input's shape and dtype; `residual` of the same shape is added before the activation.

        With `_in_place`, which fuse passes, a residual of another shape or dtype is added by torch's rules.
        """
        if isinstance(input, fx.Proxy):
            return self._record(input, residual, _in_place)
        self._check_input(input)
        if self.in_forward and _in_place is None and residual is None:
            return self._call(self._function, input, None, 0.0, "identity")
        if _in_place is None or residual is None or _fits(residual, input):
            return self._call(self._function, input, residual, self.dropout_p, self.activation)
        output = self._call(self._function, input, None, self.dropout_p, "identity")
        output = (operator.iadd if _in_place else operator.add)(output, residual)
        return Activation.of(self.activation).forward(output)

    def _check_input(self, input: Tensor) -> None:
        """Rejects inputs that the function accepts but the module does not."""

    def _call(
        self, function: Callable[..., Any], input: Any, residual: Any, dropout_p: float, activation: ActivationLike
    ) -> Any:
        """Calls `function`, which has the arguments of `_function`, with the layer's parameters and options."""
        return function(
            *(input, self._norm_argument(input), self.weight, self.bias, self.eps),
            residual=residual,
            dropout_p=dropout_p if self.training else 0.0,
            activation=activation,
            impl=self.impl,
        )

    def _norm_argument(self, input: Any) -> Any:
        """The second argument of `_function`: the number of groups, or the normalized shape."""
        raise NotImplementedError

    def _record(self, input: fx.Proxy, residual: Any, in_place: bool | None) -> Any:
        """Records a call in a torch.fx trace: the layer as a leaf, or its function if the layer is the root."""
        tracer: Any = input.tracer
        path = tracer.path_of_module(self)
        if path == "":
            function = partial(_record_function, tracer, self._function)
            return self._call(function, input, residual, self.dropout_p, self.activation)
        options = {} if in_place is None else {"_in_place": in_place}
        arguments = (input,) if residual is None else (input, residual)
        return tracer.create_proxy("call_module", path, arguments, options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_p={self.dropout_p}, activation={self.activation}, impl={self.impl}"


def _record_function(tracer: Any, function: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Any:
    return tracer.create_proxy("call_function", function, arguments, keywords)


def _fits(residual: Any, input: Tensor) -> bool:
    """Whether the fused operation accepts this residual."""
    return isinstance(residual, Tensor) and (residual.shape, residual.dtype, residual.device) == (
        input.shape,
        input.dtype,
        input.device,
    )


class _GroupPlaceholder:
    """Replaces a process group, which cannot be copied, while a module is copied or pickled."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> "_GroupPlaceholder":
        return self

    def __reduce__(self) -> tuple[Callable[[], "_GroupPlaceholder"], tuple[()]]:
        if self.group is not None and self.group.group_desc != "default_pg":
            raise TypeError("only the default process group can be pickled: set process_group to None first")
        return _unpickled_group, ()


def _unpickled_group() -> _GroupPlaceholder:
    if not dist.is_initialized():
        warnings.warn(
            "a batch norm over the default process group was unpickled before torch.distributed.init_process_group: "
            "its process_group is None",
            stacklevel=2,
        )
    return _GroupPlaceholder(dist.group.WORLD)


# Layers whose channels were compared, and the name of the group: not an attribute, so that it is not copied or pickled.
_checked: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


class _BatchNormAct(FusedLayer, _NormBase):
    """Base class of the batch norms, which differ only in the inputs that they accept."""

    layouts: ClassVar[dict[int, str]]
    """Names of the input's dimensions, by their number."""
    _function = staticmethod(batch_norm_relu)

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
        activation: ActivationLike = "relu",
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
        return {**super().__getstate__(), "process_group": None if group is None else _GroupPlaceholder(group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state["process_group"]
        super().__setstate__({**state, "process_group": group.group if isinstance(group, _GroupPlaceholder) else group})

    def extra_repr(self) -> str:
        group = self.process_group
        return super().extra_repr() + ("" if group is None else f", process_group={group.group_name}")

    def _check_input(self, input: Tensor) -> None:
        if input.dim() not in self.layouts:
            expected = " or ".join(f"{dim}D input {layout}" for dim, layout in self.layouts.items())
            raise ValueError(f"expected {expected}, got {input.dim()}D input of shape {tuple(input.shape)}")
        group = self.process_group if self.training else None
        if isinstance(group, ProcessGroup) and not compiler.is_traced(input) and _checked.get(self) != group.group_name:
            sync.check_channels(input, group)
            _checked[self] = group.group_name

    def _call(
        self, function: Callable[..., Any], input: Any, residual: Any, dropout_p: float, activation: ActivationLike
    ) -> Any:
        training = self.training
        tracks = training and self.track_running_stats
        # nn's rules: in training the running statistics are updated if tracked, in eval mode used if they exist.
        running_mean, running_var = (self.running_mean, self.running_var) if tracks or not training else (None, None)
        counter = self.num_batches_tracked if tracks else None
        momentum = 0.0 if not tracks or (self.momentum is None and counter is None) else self.momentum
        return function(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training or running_mean is None,
            momentum,
            self.eps,
            num_batches_tracked=counter,
            process_group=self.process_group if training else None,
            residual=residual,
            dropout_p=dropout_p if training else 0.0,
            activation=activation,
            impl=self.impl,
        )


class BatchNormAct1d(_BatchNormAct):
    """activation(dropout(batch_norm(input)) + residual) over (N, C) or (N, C, L); otherwise as BatchNormAct2d."""

    layouts: ClassVar = {2: "(N, C)", 3: "(N, C, L)"}


class BatchNormAct2d(_BatchNormAct):
    """activation(dropout(batch_norm(input)) + residual) over (N, C, H, W); first five arguments as nn.BatchNorm2d's.

    Parameters, buffers, state_dict keys and initialization are those of nn.BatchNorm2d: a state_dict of either loads
    into the other. It is not a subclass of it, because nn.SyncBatchNorm.convert_sync_batchnorm would replace it and
    drop the activation; pass `process_group` for synchronised statistics.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, bias: as for nn.BatchNorm2d; momentum=None is a cumulative average.
        dropout_p: probability to zero an element, in training mode only.
        activation: a name or a module of torch.nn, as for `batch_norm_relu`.
        process_group: compute the batch statistics over all its processes, which must have the same number of
            channels: the first uncompiled call checks that. Copies of the layer share the group; an unpickled
            layer uses the default group of the process that loads it.
        impl: "auto", "triton" or "torch", as for `batch_norm_relu`.
        device, dtype: of the parameters and buffers.

    Called as layer(input, residual=None), with a residual of the input's shape and dtype.
    """

    layouts: ClassVar = {4: "(N, C, H, W)"}


class BatchNormAct3d(_BatchNormAct):
    """activation(dropout(batch_norm(input)) + residual) over (N, C, D, H, W); otherwise as BatchNormAct2d."""

    layouts: ClassVar = {5: "(N, C, D, H, W)"}


class GroupNormAct(FusedLayer, nn.GroupNorm):
    """activation(dropout(group_norm(input)) + residual) over (N, C, ...); the first four arguments are nn.GroupNorm's.

    Args:
        num_groups, num_channels, eps, affine, bias: as for nn.GroupNorm.
        dropout_p: probability to zero an element, in training mode only.
        activation: a name or a module of torch.nn, as for `batch_norm_relu`.
        impl: "auto", "triton" or "torch", as for `batch_norm_relu`.
        device, dtype: of the parameters.

    Called as layer(input, residual=None), with a residual of the input's shape and dtype.
    """

    _function = staticmethod(group_norm_relu)

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        activation: ActivationLike = "relu",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, bias=bias, device=device, dtype=dtype)
        self.set_options(dropout_p, activation, impl)

    def _norm_argument(self, input: Any) -> int:
        return self.num_groups


class _InstanceNormAct(FusedLayer, _NormBase):
    """Base class of the instance norms: group norms with a group for each channel, for different inputs."""

    layouts: ClassVar[dict[int, str]]
    """Names of the dimensions of a batch, by their number."""
    _function = staticmethod(group_norm_relu)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        dropout_p: float = 0.0,
        activation: ActivationLike = "relu",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if track_running_stats:
            raise ValueError(
                "track_running_stats must be False: the fused instance norms always use the statistics of the sample; "
                "use torch.nn's instance norm for running statistics"
            )
        super().__init__(num_features, eps, momentum, affine, False, bias=bias, device=device, dtype=dtype)
        self.set_options(dropout_p, activation, impl)

    def forward(self, input: Tensor, residual: Tensor | None = None, *, _in_place: bool | None = None) -> Tensor:
        if isinstance(input, Tensor) and input.dim() + 1 in self.layouts:  # an unbatched sample
            batch = input.unsqueeze(0), residual.unsqueeze(0) if isinstance(residual, Tensor) else residual
            return super().forward(*batch, _in_place=_in_place).squeeze(0)
        return super().forward(input, residual, _in_place=_in_place)

    def _check_input(self, input: Tensor) -> None:
        shape = tuple(input.shape)
        if input.dim() not in self.layouts:
            ((dim, layout),) = self.layouts.items()
            raise ValueError(f"expected {dim - 1}D or {dim}D input {layout}, got {input.dim()}D input of shape {shape}")
        if shape[1] != self.num_features:
            message = f"expected {self.num_features} channels (num_features), got input of shape {shape}"
            if self.affine:
                raise ValueError(message)
            warnings.warn(f"{message}; num_features is not used, because affine is False", stacklevel=6)
        if input.shape[2:].numel() == 1:
            raise ValueError(f"expected more than 1 spatial element, got input of shape {shape}")

    def _norm_argument(self, input: Any) -> int:
        return max(1, input.shape[1]) if isinstance(input, Tensor) else self.num_features


class InstanceNormAct1d(_InstanceNormAct):
    """activation(dropout(instance_norm(input)) + residual) over (N, C, L) or (C, L); otherwise as InstanceNormAct2d."""

    layouts: ClassVar = {3: "(N, C, L)"}


class InstanceNormAct2d(_InstanceNormAct):
    """activation(dropout(instance_norm(input)) + residual) over (N, C, H, W) or (C, H, W).

    The first five arguments, their defaults, the parameters and the state_dict are those of nn.InstanceNorm2d.

    Args:
        num_features: C.
        eps, affine, bias: as for nn.InstanceNorm2d.
        momentum: not used, as there are no running statistics.
        track_running_stats: must be False.
        dropout_p: probability to zero an element, in training mode only.
        activation: a name or a module of torch.nn, as for `batch_norm_relu`.
        impl: "auto", "triton" or "torch", as for `batch_norm_relu`.
        device, dtype: of the parameters.

    Called as layer(input, residual=None), with a residual of the input's shape and dtype.

    Raises:
        ValueError: track_running_stats is True.

    Source: Ulyanov, Vedaldi & Lempitsky 2016, "Instance Normalization", equation 4.
    """

    layouts: ClassVar = {4: "(N, C, H, W)"}


class InstanceNormAct3d(_InstanceNormAct):
    """activation(dropout(instance_norm(input)) + residual) over (N, C, D, H, W) or (C, D, H, W)."""

    layouts: ClassVar = {5: "(N, C, D, H, W)"}


class LayerNormAct(FusedLayer, nn.LayerNorm):
    """activation(dropout(layer_norm(input)) + residual) over (*, *normalized_shape).

    Args:
        normalized_shape, eps, elementwise_affine, bias: as for nn.LayerNorm.
        dropout_p: probability to zero an element, in training mode only.
        activation: a name or a module of torch.nn, as for `batch_norm_relu`.
        impl: "auto", "triton" or "torch", as for `batch_norm_relu`.
        device, dtype: of the parameters.

    Called as layer(input, residual=None), with a residual of the input's shape and dtype.
    """

    _function = staticmethod(layer_norm_relu)

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size | tuple[int, ...],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dropout_p: float = 0.0,
        activation: ActivationLike = "relu",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)
        self.set_options(dropout_p, activation, impl)

    def _norm_argument(self, input: Any) -> tuple[int, ...]:
        return self.normalized_shape


# Aliases: ReLU is the default activation.
BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d = BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
GroupNormReLU, LayerNormReLU = GroupNormAct, LayerNormAct
