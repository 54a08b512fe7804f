"""Copies the modules of a model, which share its parameters."""

import copy
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

Model = TypeVar("Model", bound=nn.Module)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def copy_structure(model: Model, *, share_buffers: bool = True) -> Model:
    """Copies the modules and what they refer to, but shares parameters, hooks, process groups and unregistered modules.

    With `share_buffers`, buffers and tensors that are plain attributes are shared as well. Does not call __deepcopy__
    or __getstate__ of a module, because they may omit its mode and attributes.

    Raises:
        RuntimeError: the model cannot be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    modules = list(model.modules())
    for module in modules:
        kind = type(module)
        if any(vars(base).get("__slots__") for base in kind.__mro__):
            raise RuntimeError(f"{kind.__name__} cannot be copied: it has __slots__, use plain attributes")
        if isinstance(module, fx.GraphModule):  # each has its own class, which holds its forward
            kind = type(kind.__name__, kind.__bases__, {"__module__": kind.__module__})
        memo[id(module)] = object.__new__(kind)
    for module in modules:
        # Share modules that are not registered, such as a teacher in a list.
        memo.update(
            (id(v), v)
            for v in tree_leaves(list(vars(module).values()))
            if isinstance(v, nn.Module) and id(v) not in memo
        )
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value if share_buffers or is_lazy(value) else value.detach().clone()
            elif isinstance(value, ProcessGroup):
                memo[id(value)] = value
        for hook in (hook for name in _HOOKS for hook in vars(module)[name].values()):
            # Share the objects that registered hooks: they expect to see the calls.
            memo |= {id(part): part for part in _parts(hook) if id(part) not in memo}
    try:
        for module in modules:
            vars(memo[id(module)]).update(copy.deepcopy(vars(module), memo))
            if isinstance(module, fx.GraphModule):
                memo[id(module)].recompile()
    except Exception as error:
        raise RuntimeError(f"{type(model).__name__} cannot be copied by copy.deepcopy: {error}") from error
    copied: Model = memo[id(model)]
    return copied


def _parts(hook: Any) -> Iterator[Any]:
    """The functions and objects that a hook consists of."""
    if isinstance(hook, partial):
        for part in (hook.func, *hook.args, *hook.keywords.values()):
            yield from _parts(part)
    else:
        yield hook.__self__ if isinstance(hook, MethodType) else hook


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has forward or backward hooks."""
    return any(vars(module)[name] for name in _HOOKS)


def scratch_copy(module: nn.Module) -> nn.Module:
    """A copy to run, without hooks and with its own buffers, which the forward may change."""
    scratch = copy_structure(module, share_buffers=False)
    for child in scratch.modules():
        for name in _HOOKS:
            vars(child)[name].clear()
    return scratch


def copy_to_trace(module: nn.Module) -> nn.Module:
    """A scratch copy in which training flags and tensor attributes are buffers, so that torch.fx records their use."""
    scratch = scratch_copy(module)
    for child in scratch.modules():
        names = [name for name, value in vars(child).items() if name == "training" or isinstance(value, Tensor)]
        for name in names:
            value = vars(child).pop(name)
            child._buffers[name] = value if isinstance(value, Tensor) else torch.tensor(value)
    return scratch
