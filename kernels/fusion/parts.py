"""The parts of a chain: which modules and torch calls are a norm, a dropout, a sum or an activation."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .. import modules as layers
from ..activations import Activation
from ..modules import FusedLayer
from .report import Status, class_name

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
FUSED_BATCH_NORMS = (layers.BatchNormAct1d, layers.BatchNormAct2d, layers.BatchNormAct3d)
FUSED: dict[type[nn.Module], type[FusedLayer]] = {
    **{getattr(nn, f"BatchNorm{n}d"): getattr(layers, f"BatchNormAct{n}d") for n in (1, 2, 3)},
    **{getattr(nn, f"InstanceNorm{n}d"): getattr(layers, f"InstanceNormAct{n}d") for n in (1, 2, 3)},
    nn.GroupNorm: layers.GroupNormAct,
    nn.LayerNorm: layers.LayerNormAct,
}
STOCK = {fused: stock for stock, fused in FUSED.items()}

# Subclasses whose own forward computes the same as torch.nn's; those of norm_act apply `drop` and `act` after it.
_TIMM_NORMS = {
    "timm.layers.norm_act.BatchNormAct2d": nn.BatchNorm2d,
    "timm.layers.norm_act.GroupNormAct": nn.GroupNorm,
    "timm.layers.norm_act.GroupNorm1Act": nn.GroupNorm,
    "timm.layers.norm_act.LayerNormAct": nn.LayerNorm,
    "timm.layers.norm.GroupNorm": nn.GroupNorm,
    "timm.layers.norm.GroupNorm1": nn.GroupNorm,
    "timm.layers.norm.LayerNorm": nn.LayerNorm,
}
_TIMM_ACTIVATIONS = {
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.HardSwish": "hardswish",
}

SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
SUMS_IN_PLACE = {operator.iadd, "add_"}
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
IN_PLACE_OPERATORS = {getattr(operator, name) for name in _IN_PLACE}
_DROPOUTS = {F.dropout, torch.dropout}


# Members of a subclass of a norm that do not change what it does after it was created, and attributes of fused layers.
_PLAIN = {
    *("__module__", "__doc__", "__init__", "__annotations__", "__annotate_func__", "__annotations_cache__", "__dict__"),
    *("__weakref__", "__constants__", "__parameters__", "__orig_bases__", "__firstlineno__", "__static_attributes__"),
    *("extra_repr", "reset_parameters", "forward"),  # forward was compared
}
_OPTIONS = {"dropout_p", "activation", "impl", "process_group", "in_forward", "fused_from"}


class NoChain(Exception):  # noqa: N818 - a finding rather than an error
    """Why a norm does not begin a chain; `status` as in LeftAlone. `is_returned`: the forward returns its output."""

    def __init__(self, reason: str, status: Status = "chain", is_returned: bool = False) -> None:
        super().__init__(reason)
        self.status, self.is_returned = status, is_returned


def stock_norm(module: nn.Module) -> tuple[type[nn.Module], tuple[Activation, float] | None]:
    """The torch.nn class whose forward `module` computes; the activation and dropout that it applies itself, if any.

    Raises:
        NoChain: it cannot be fused.
    """
    kind: Any = type(module)
    name = class_name(module)
    if isinstance(module, FusedLayer):
        raise NoChain("already fused", "already fused")
    stock: Any = _TIMM_NORMS.get(name) or next((stock for stock in FUSED if issubclass(kind, stock)), None)
    known = name in _TIMM_NORMS or (stock is not None and kind.forward is stock.forward)
    if stock is None or not known or any(map(is_lazy, module.parameters())):
        raise NoChain(f"there is no fused {name}")
    if parametrize.is_parametrized(module):
        raise NoChain("it is parametrized")
    own = {member for base in kind.__mro__[: kind.__mro__.index(stock)] for member in vars(base)} - _PLAIN
    if name not in _TIMM_NORMS and own:
        raise NoChain(f"{name} defines {min(own)}, which a fused layer would lose")
    if taken := _OPTIONS & vars(module).keys():
        raise NoChain(f"it has an attribute {min(taken)}, which a fused layer uses")
    if getattr(module, "_fast_norm", False):
        raise NoChain("it uses timm's fast norm, which computes in another dtype")
    if issubclass(stock, _INSTANCE_NORMS) and vars(module)["track_running_stats"]:
        raise NoChain("there is no fused instance norm with running statistics")
    if not module._modules:
        return stock, None
    drop, act = module._modules.get("drop"), module._modules.get("act")
    activation = activation_of_module(act)
    if type(drop) not in (nn.Identity, nn.Dropout) or activation is None or len(module._modules) > 2:
        raise NoChain(f"its parts {' and '.join(map(class_name, module.children()))} cannot be fused")
    p = float(getattr(drop, "p", 0.0))
    if activation.name == "identity" and p > 0:
        raise NoChain("it has a dropout without an activation", "no activation")
    return stock, None if activation.name == "identity" else (activation, p)


def activation_of_module(module: nn.Module | None) -> Activation | None:
    """The activation that a module computes; None if it is not a known one."""
    if module is None or "forward" in vars(module):
        return None
    try:
        return Activation.of(_TIMM_ACTIVATIONS.get(class_name(module), module))
    except ValueError:
        return None


def activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    """The activation that a node computes; None if it is not a known one or is the identity."""
    if node.op == "call_module":
        activation = activation_of_module(modules[str(node.target)])
        return None if activation is not None and activation.name == "identity" else activation
    return Activation.of_call(node.target, node.args, node.kwargs)


def dropout_of(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[float, Any] | None:
    """The probability and the argument `training` (None for a module) of a dropout; None for another node."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return (float(module.p), None) if type(module) is nn.Dropout and "forward" not in vars(module) else None
    if node.op != "call_function" or node.target not in _DROPOUTS:
        return None
    p, training = _dropout_arguments(*node.args, **node.kwargs)
    if isinstance(p, fx.Node):
        raise NoChain("the probability of the dropout after it is not a constant")
    return float(p), training


def _dropout_arguments(
    input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False, train: Any = None
) -> tuple[Any, Any]:
    return p, training if train is None else train


def is_no_op(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node returns its input unchanged."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.Identity and "forward" not in vars(module)
    return node.op == "call_method" and node.target == "contiguous" and len(node.args) == 1 and not node.kwargs
