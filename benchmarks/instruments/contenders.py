"""The layers that are compared, ours and other libraries', and the case of one layer that is checked and timed."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistnorm import BatchNormAct2d, GroupNormAct, LayerNormAct
from mnistnorm.errors import one_line
from mnistnorm.kernels.activations import Activation
from mnistnorm.kernels.implementations import Impl

from .cases import NORMS
from .chain import Chain, Tensors
from .memory import bytes_beyond, saved_storages

Passes = Literal["forward", "backward", "both"]

# Allowed error against float64, relative to the largest value or to 1. float32: rounding in sums over large slabs.
# bfloat16, float16: four rounding errors, since each module of a chain rounds its output.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-10}

# Where an activation's derivative is discontinuous.
KINKS = (-3.0, 0.0, 3.0, 6.0)

NOT_INSTALLED = "is not installed"


class UnavailableError(Exception):
    """A contender cannot run a chain; the message says why."""


class WrongResultError(Exception):
    """A contender's result differs from float64's; the message says by how much."""


class Stock(nn.Module):
    """Norm, dropout, residual and activation as separate operations."""

    def __init__(self, norm: nn.Module, chain: Chain) -> None:
        super().__init__()
        self.norm, self.dropout, self.activation = norm, chain.dropout, Activation.of(chain.activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.dropout(self.norm(input), self.dropout)
        return self.activation.forward(y if residual is None else y + residual)


def stock_norm(chain: Chain) -> nn.Module:
    match chain.norm:
        case "batch":
            return nn.BatchNorm2d(chain.shape[1])
        case "group":
            return nn.GroupNorm(chain.groups, chain.shape[1])
        case _:
            return nn.LayerNorm(chain.normalized_shape)


def stock(chain: Chain) -> nn.Module:
    return Stock(stock_norm(chain), chain)


def fused(chain: Chain, impl: Impl = "torch") -> nn.Module:
    options: dict[str, Any] = {"dropout_p": chain.dropout, "activation": chain.activation, "impl": impl}
    match chain.norm:
        case "batch":
            return BatchNormAct2d(chain.shape[1], **options)
        case "group":
            return GroupNormAct(chain.groups, chain.shape[1], **options)
        case _:
            return LayerNormAct(chain.normalized_shape, **options)


def triton(chain: Chain) -> nn.Module:
    return fused(chain, "triton")


def liger_kernel(chain: Chain) -> nn.Module:
    if chain.norm == "group":
        module = importlib.import_module("liger_kernel.transformers.group_norm")
        norm = module.LigerGroupNorm(chain.shape[1], chain.groups, eps=1e-5)
    else:
        width = _only_rows(chain)
        norm = importlib.import_module("liger_kernel.transformers.layer_norm").LigerLayerNorm(width, eps=1e-5)
    return Stock(norm, chain)


def torchnorm(chain: Chain) -> nn.Module:
    if chain.norm == "group":
        raise UnavailableError("its group norm is torch's")
    return Stock(importlib.import_module("torchnorm").LayerNorm(_only_rows(chain)), chain)


def apex(chain: Chain) -> nn.Module:
    if chain.norm == "layer":
        norm = importlib.import_module("apex.normalization").FusedLayerNorm(chain.normalized_shape)
    else:
        module = importlib.import_module("apex.contrib.group_norm")
        norm = module.GroupNorm(chain.groups, chain.shape[1])
        kernel = chain.groups in norm.SUPPORTED_GROUPS and chain.shape[1] in norm.SUPPORTED_CHANNELS
        if not (chain.channels_last and kernel):
            raise UnavailableError(
                "its group norm falls back to torch's except for channels_last, 16 or 32 groups and certain channels"
            )
    return Stock(norm, chain)


def flag_gems(chain: Chain) -> nn.Module:
    return Stock(_Native(stock_norm(chain), chain, importlib.import_module("flag_gems")), chain)


def _only_rows(chain: Chain) -> int:
    if len(chain.normalized_shape) > 1:
        raise UnavailableError("its layer norm supports the last dimension only")
    return chain.normalized_shape[0]


class _Native(nn.Module):
    """A norm by functions with the signatures of ATen's native_batch_norm, native_group_norm and native_layer_norm."""

    def __init__(self, norm: nn.Module, chain: Chain, functions: Any) -> None:
        super().__init__()
        self.norm, self.chain = norm, chain
        self.run = getattr(functions, f"{chain.norm}_norm")
        self.run_backward = getattr(functions, f"{chain.norm}_norm_backward")

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _NativeFunction.apply(input, self.norm.weight, self.norm.bias, self)
        return output


class _NativeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, module: _Native) -> Tensor:
        n, c, *spatial = input.shape
        norm: Any = module.norm
        match module.chain.norm:
            case "batch":
                buffers = norm.running_mean, norm.running_var
                y, mean, rstd = module.run(input, weight, bias, *buffers, True, 0.1, 1e-5)
            case "group":
                sizes = n, c, torch.Size(spatial).numel(), module.chain.groups
                y, mean, rstd = module.run(input, weight, bias, *sizes, 1e-5)
            case _:
                y, mean, rstd = module.run(input, module.chain.normalized_shape, weight, bias, 1e-5)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.module = module
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        n, c, *spatial = input.shape
        module, wanted = ctx.module, [True, True, True]
        match module.chain.norm:
            case "batch":
                buffers = module.norm.running_mean, module.norm.running_var
                gradients = module.run_backward(grad, input, weight, *buffers, mean, rstd, True, 1e-5, wanted)
            case "group":
                sizes = n, c, torch.Size(spatial).numel(), module.chain.groups
                gradients = module.run_backward(grad, input, mean, rstd, weight, *sizes, wanted)
            case _:
                shape = module.chain.normalized_shape
                gradients = module.run_backward(grad, input, shape, mean, rstd, weight, bias, wanted)
        return *gradients, None


class Contender(NamedTuple):
    """One row of the table.

    Attributes:
        build: makes the layer for a chain, in float32 on the CPU.
        compiled: whether torch.compile compiles it.
        on_gpu_only: whether its kernels require a GPU.
        package: must be installed.
        norms: supported norms.
    """

    build: Callable[[Chain], nn.Module]
    compiled: bool = False
    on_gpu_only: bool = False
    package: str = ""
    norms: tuple[str, ...] = NORMS


CONTENDERS = {
    "stock": Contender(stock),
    "compiled": Contender(stock, compiled=True),
    "fused": Contender(fused),
    "fused-compiled": Contender(fused, compiled=True),
    "triton": Contender(triton, on_gpu_only=True),
    "triton-compiled": Contender(triton, compiled=True, on_gpu_only=True),
    "liger-kernel": Contender(liger_kernel, on_gpu_only=True, package="liger_kernel", norms=("group", "layer")),
    "flag-gems": Contender(flag_gems, on_gpu_only=True, package="flag_gems"),
    "torchnorm": Contender(torchnorm, on_gpu_only=True, package="torchnorm", norms=("group", "layer")),
    "apex": Contender(apex, on_gpu_only=True, package="apex", norms=("group", "layer")),
}


def unavailable(name: str, device: torch.device) -> str | None:
    """Returns why a contender cannot run on a device, or None if it can. Imports the package of a peer."""
    contender = CONTENDERS[name]
    if contender.package:
        try:
            importlib.import_module(contender.package)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == contender.package:
                return NOT_INSTALLED
            return f"is installed but cannot be imported: {type(error).__name__}: {one_line(error)}"
    if contender.on_gpu_only and device.type != "cuda":
        return "has kernels for GPUs only; on a CPU this would time Triton's interpreter"
    if contender.compiled and device.type == "cpu" and not _has_compiler():
        return "needs a C++ compiler on a CPU: install g++"
    return None


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@dataclass(frozen=True)
class Case:
    """One contender's layer for one chain, with its inputs.

    Attributes:
        name: of the contender.
        chain: what it computes.
        module: holds the parameters.
        layer: the module, or its compiled version.
        tensors: the input, the residual and the gradient of the output.
        inputs: tensors that get gradients: input, weight, bias and the residual, if any.
    """

    name: str
    chain: Chain
    module: nn.Module
    layer: Callable[[Tensor, Tensor | None], Tensor]
    tensors: Tensors
    inputs: tuple[Tensor, ...]

    @classmethod
    def of(cls, name: str, chain: Chain, device: torch.device) -> "Case":
        """Builds a case, with the same values for every contender.

        Raises:
            UnavailableError: it cannot run the chain.
        """
        contender = CONTENDERS[name]
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            torch.manual_seed(0)
            tensors = chain.tensors(str(device))
            module = contender.build(chain)
            for parameter, mean in zip(module.parameters(), (1.0, 0.0), strict=True):  # weight and bias
                nn.init.normal_(parameter, mean, 0.3)
        module.to(device, chain.dtype)
        residual = () if tensors.residual is None else (tensors.residual,)
        inputs = (tensors.input, *module.parameters(), *residual)
        return cls(name, chain, module, _compiled(module) if contender.compiled else module, tensors, inputs)

    def forward(self) -> Tensor:
        return self.layer(self.tensors.input, self.tensors.residual)

    def gradients(self, output: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.inputs, grad)

    def call(self, passes: Passes) -> Callable[[], object]:
        """Returns a function that runs `passes`; the forward before a backward has already run."""
        grad = self.tensors.grad
        if passes == "forward":
            return self.forward
        if passes == "backward":
            output = self.forward()
            return lambda: self.gradients(output, grad)
        return lambda: self.gradients(self.forward(), grad)

    def saved_bytes(self) -> int:
        """What autograd keeps for the backward beyond the layer's input, residual, output and parameters."""
        output, saved = saved_storages(self.forward)
        return bytes_beyond(saved, (*self.inputs, output, *self.module.buffers()))

    def check(self) -> None:
        """Compares output and gradients with a float64 reference that has the same dropout mask.

        The incoming gradient is zero where rounding decides on which side of an activation's kink an element lies, or
        where the output does not tell whether the element was kept.

        Raises:
            WrongResultError: they differ by more than rounding explains, or the dropout drops too many or too few.
        """
        p, tolerance = self.chain.dropout, TOLERANCES[self.chain.dtype]
        output = self.forward()
        inputs = tuple(tensor.detach().double().requires_grad_() for tensor in self.inputs)
        input, weight, bias = inputs[:3]
        residual = inputs[3] if self.chain.residual else None
        normalized = self.chain.normalized(Tensors(input, weight, bias, None, None, residual, self.tensors.grad))
        kept = normalized / (1 - p) if residual is None else normalized / (1 - p) + residual
        dropped = torch.zeros_like(kept) if residual is None else residual
        close = tolerance * max(1.0, kept.abs().max().item())
        activate = Activation.of(self.chain.activation).forward

        def is_off_kinks(values: Tensor) -> Tensor:
            return torch.stack([(values - kink).abs() > close for kink in KINKS]).all(0)

        settled, value = is_off_kinks(kept), kept
        if p:
            actual = output.detach().double()
            is_kept = (actual - activate(kept)).abs() <= (actual - activate(dropped)).abs()
            value = torch.where(is_kept, kept, dropped)
            settled &= (activate(kept) - activate(dropped)).abs() > 2 * close
            settled &= (dropped == 0) | is_off_kinks(dropped)
            count, drops = int(settled.sum()), int((settled & ~is_kept).sum())
            if abs(drops - p * count) > 6 * (p * (1 - p) * count) ** 0.5:  # six standard deviations
                raise WrongResultError(f"drops {drops} of {count} elements")
        expected = activate(value)
        grad = self.tensors.grad * settled
        gradients = torch.autograd.grad(expected, inputs, grad.double())
        names = ("output", *(f"gradient of the {name}" for name in ("input", "weight", "bias", "residual")))
        actuals = (output, *self.gradients(output, grad))
        for name, actual, reference in zip(names, actuals, (expected, *gradients), strict=False):
            error = (actual.double() - reference).abs().max().item()
            allowed = tolerance * max(1.0, reference.abs().max().item())
            if not error <= allowed:
                raise WrongResultError(f"has a wrong {name}: error {error:.2g}, allowed {allowed:.2g}")


def _compiled(module: nn.Module) -> Callable[[Tensor, Tensor | None], Tensor]:
    def layer(input: Tensor, residual: Tensor | None) -> Tensor:
        output: Tensor = module(input, residual)
        return output

    # A code object for each case: Dynamo searches all that it compiled for a code object at each call.
    layer.__code__ = layer.__code__.replace()
    return torch.compile(layer, dynamic=False, fullgraph=True)


def prepare(name: str, chain: Chain, device: torch.device) -> Case:
    """Builds a case and checks its results; for stock torch, wrong results only print a note.

    Raises:
        UnavailableError: the contender has no such operation, does not compile, or is a peer that fails or is wrong.
        WrongResultError: the results of one of ours are wrong.
    """
    contender = CONTENDERS[name]
    try:
        case = Case.of(name, chain, device)
        case.check()
    except UnavailableError:
        raise
    except WrongResultError as error:
        if contender.package:
            raise UnavailableError(str(error)) from error
        if contender.build is not stock:
            raise
        print(f"note: {name} {error}: {chain.title}")
    except Exception as error:
        if contender.package or contender.compiled:
            raise UnavailableError(f"fails: {type(error).__name__}: {one_line(error)}") from error
        raise
    return case
