"""The activations of the fused operations: one entry of `_KINDS` each.

Their formulas in Triton are in `activate` and `activation_gradient` of device_functions.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten = torch.ops.aten


class _Kind(NamedTuple):
    """Formulas and properties of an activation. Every function takes the parameter last, used or not.

    Attributes:
        forward: the activation; differentiable.
        forward_: the same in place.
        backward: the gradient, from grad_output and the pre-activation, or the output if `gradient_from_output`;
            differentiable with respect to grad_output.
        modules: the torch.nn classes that compute it.
        gradient_from_output: whether backward takes the output instead of the pre-activation.
        records_output: whether autograd saves at most the output of `forward_`, not a copy of its input.
        masks: whether the gradient is 0 where the output is 0 or not the pre-activation, and unchanged elsewhere: then
            the output alone shows which elements dropout removed.
        default: default of the parameter, 0 if there is none.
        attribute: attribute of the modules that holds the parameter; functions have an argument of this name.
        functions: torch functions, and names of Tensor methods, that compute it; see Activation.of_call.
    """

    forward: Callable[[Tensor, float], Tensor]
    forward_: Callable[[Tensor, float], Tensor]
    backward: Callable[[Tensor, Tensor, float], Tensor]
    modules: tuple[type[nn.Module], ...]
    gradient_from_output: bool = False
    records_output: bool = False
    masks: bool = False
    default: float = 0.0
    attribute: str = ""
    functions: tuple[Callable[..., Tensor] | str, ...] = ()


_KINDS = {
    "identity": _Kind(
        lambda x, _: x,
        lambda x, _: x,
        lambda grad, _, __: grad,
        (nn.Identity,),
        gradient_from_output=True,
        records_output=True,
    ),
    "relu": _Kind(
        lambda x, _: F.relu(x),
        lambda x, _: x.relu_(),
        lambda grad, value, _: _aten.threshold_backward.default(grad, value, 0),
        (nn.ReLU,),
        gradient_from_output=True,
        records_output=True,
        masks=True,
        functions=(F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    ),
    "relu6": _Kind(
        lambda x, _: F.hardtanh(x, 0.0, 6.0),
        lambda x, _: F.hardtanh_(x, 0.0, 6.0),
        lambda grad, value, _: _aten.hardtanh_backward.default(grad, value, 0.0, 6.0),
        (nn.ReLU6,),
        gradient_from_output=True,
        masks=True,
        functions=(F.relu6,),
    ),
    "leaky_relu": _Kind(
        lambda x, slope: F.leaky_relu(x, slope),
        lambda x, slope: F.leaky_relu_(x, slope),
        lambda grad, value, slope: _aten.leaky_relu_backward.default(grad, value, slope, False),
        (nn.LeakyReLU,),
        gradient_from_output=True,  # with a positive slope the output has the sign of the input
        records_output=True,
        default=0.01,
        attribute="negative_slope",
        functions=(F.leaky_relu, F.leaky_relu_),
    ),
    "silu": _Kind(
        lambda x, _: F.silu(x),
        lambda x, _: F.silu(x, inplace=True),
        lambda grad, value, _: _aten.silu_backward.default(grad, value),
        (nn.SiLU,),
        functions=(F.silu,),
    ),
    "gelu": _Kind(
        lambda x, _: F.gelu(x),
        lambda x, _: _aten.gelu_.default(x),
        lambda grad, value, _: _aten.gelu_backward.default(grad, value),
        (nn.GELU,),
        functions=(F.gelu,),
    ),
    "gelu_tanh": _Kind(
        lambda x, _: F.gelu(x, approximate="tanh"),
        lambda x, _: _aten.gelu_.default(x, approximate="tanh"),
        lambda grad, value, _: _aten.gelu_backward.default(grad, value, approximate="tanh"),
        (),  # nn.GELU as well: see Activation.of
    ),
    "hardswish": _Kind(
        lambda x, _: F.hardswish(x),
        lambda x, _: F.hardswish(x, inplace=True),
        lambda grad, value, _: _aten.hardswish_backward.default(grad, value),
        (nn.Hardswish,),
        functions=(F.hardswish,),
    ),
}

ACTIVATIONS = tuple(_KINDS)

_CLAMPS: tuple[Callable[..., Tensor] | str, ...] = (
    *(F.hardtanh, F.hardtanh_, torch.clamp, torch.clamp_, torch.clamp_min, torch.clamp_min_),
    *("clamp", "clamp_", "clamp_min", "clamp_min_"),
)


@dataclass(frozen=True)
class Activation:
    """An activation and its parameter.

    Attributes:
        name: one of `ACTIVATIONS`.
        parameter: the negative slope of "leaky_relu"; 0 otherwise.

    Raises:
        ValueError: unknown name, or a slope that is not positive and finite.
    """

    name: str
    parameter: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise _unknown(self.name)
        if self.name == "leaky_relu" and not 0.0 < self.parameter < math.inf:
            hint = '; use activation="relu"' if self.parameter == 0 else ""
            raise ValueError(
                f"the negative slope of leaky_relu must be positive and finite, got {self.parameter}{hint}"
            )

    @classmethod
    def of(cls, activation: "str | nn.Module | Activation") -> "Activation":
        """The activation of a name (with torch's default parameter) or of a module of torch.nn.

        Raises:
            ValueError: unknown name or module, or a slope that is not positive and finite.
        """
        if isinstance(activation, Activation):
            return activation
        if isinstance(activation, str) and activation in _KINDS:
            return cls(activation, _KINDS[activation].default)
        if type(activation) is nn.GELU and activation.approximate == "tanh":
            return cls("gelu_tanh")
        if type(activation) is nn.Hardtanh and (activation.min_val, activation.max_val) == (0, 6):
            return cls("relu6")
        if isinstance(activation, nn.Module):
            for name, kind in _KINDS.items():
                if type(activation) in kind.modules:
                    return cls(name, float(getattr(activation, kind.attribute)) if kind.attribute else 0.0)
        raise _unknown(activation)

    @classmethod
    def of_call(cls, function: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Activation | None":
        """The activation that a call of a torch function, or of the Tensor method of that name, computes.

        None if it is not a known one, or has arguments that are not constants.
        """
        further = [*args[1:], *kwargs.values()]
        if not all(isinstance(value, (int, float, str, type(None))) for value in further):
            return None
        if function in _CLAMPS:
            low, high = (*args[1:3], None, None)[:2]
            low = kwargs.get("min", kwargs.get("min_val", low))
            high = kwargs.get("max", kwargs.get("max_val", high))
            bounds = {(0, None): "relu", (0, 6): "relu6"}
            no_hardtanh = function not in (F.hardtanh, F.hardtanh_) or high is not None
            return cls(bounds[low, high]) if (low, high) in bounds and no_hardtanh else None
        name = next((name for name, kind in _KINDS.items() if function in kind.functions), None)
        if name is None or "out" in kwargs:
            return None
        if name == "gelu":
            return cls("gelu_tanh" if "tanh" in further else "gelu")
        if not (attribute := _KINDS[name].attribute):
            return cls(name)
        slope = kwargs.get(attribute, args[1] if len(args) > 1 else _KINDS[name].default)
        return cls(name, float(slope)) if slope > 0 else None

    def module(self) -> nn.Module:
        """A module of torch.nn that computes it."""
        if self.name == "gelu_tanh":
            return nn.GELU(approximate="tanh")
        (kind,) = self.kind.modules
        return kind(self.parameter) if self.kind.attribute else kind()

    def __str__(self) -> str:
        return f"{self.name}({self.parameter:g})" if self.kind.attribute else self.name

    @property
    def short(self) -> "str | Activation":
        """The name if the parameter is the default, otherwise the activation itself."""
        return self.name if self.parameter == self.kind.default else self

    @property
    def kind(self) -> _Kind:
        """Its formulas and properties."""
        return _KINDS[self.name]

    def forward(self, input: Tensor) -> Tensor:
        return self.kind.forward(input, self.parameter)

    def forward_(self, input: Tensor) -> Tensor:
        """In place."""
        return self.kind.forward_(input, self.parameter)

    def backward(self, grad_output: Tensor, value: Tensor) -> Tensor:
        """The gradient of the input; `value` is the pre-activation, or the output if `gradient_from_output`."""
        return self.kind.backward(grad_output, value, self.parameter)


def _unknown(activation: object) -> ValueError:
    known = ", ".join(f'"{name}"' for name in _KINDS)
    classes = ", ".join(f"nn.{module.__name__}" for kind in _KINDS.values() for module in kind.modules)
    return ValueError(f"activation must be one of {known} or a module of the classes {classes}, got {activation!r}")
