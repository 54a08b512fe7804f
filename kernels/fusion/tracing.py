"""Traces forwards by torch.fx, with the checks that tell whether a trace can be relied on. Changes no model."""

import copy
import gc
import inspect
import operator
import random
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from threading import RLock
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .parts import NORMS

Model = TypeVar("Model", bound=nn.Module)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
IN_PLACE_OPERATORS = {getattr(operator, name) for name in _IN_PLACE}

_TRACING = RLock()  # a trace by torch.fx patches classes, and so does _watching

_ASKS = "it asks for the type of a value"


class Untraceable(Exception):  # noqa: N818 - a finding rather than an error
    """A forward that cannot be traced, or not so that the trace can stand for it."""


def copy_structure(model: Model, *, share_buffers: bool = True) -> Model:
    """A copy of the modules and of what they refer to, with the same parameters, hooks and process groups.

    With `share_buffers` the buffers, and tensors that are plain attributes, are the same as well. Does not call the
    __deepcopy__ or __getstate__ of a module: they may leave out its mode and attributes.

    Raises:
        RuntimeError: the model cannot be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    modules = list(model.modules())
    for module in modules:
        kind = type(module)
        if isinstance(module, fx.GraphModule):  # each has a class of its own, which holds its forward
            kind = type(kind.__name__, kind.__bases__, {"__module__": kind.__module__})
        memo[id(module)] = object.__new__(kind)
    for module in modules:
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value if share_buffers or is_lazy(value) else value.detach().clone()
            elif isinstance(value, ProcessGroup):
                memo[id(value)] = value
        for hook in (hook for name in _HOOKS for hook in vars(module)[name].values()):
            # Share the objects that registered hooks: they wait for the calls.
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
    """Whether anything is called before or after the module's forward or backward."""
    return any(vars(module)[name] for name in _HOOKS)


def scratch_copy(module: nn.Module) -> nn.Module:
    """A copy to trace: without hooks, and with buffers of its own, for whatever the forward does to them."""
    scratch = copy_structure(module, share_buffers=False)
    for child in scratch.modules():
        for name in _HOOKS:
            vars(child)[name].clear()
    return scratch


@dataclass(frozen=True)
class Call:
    """How a forward was called in a trace: the structure of its arguments by name, and their leaves.

    Of a leaf that is a tensor only the class is kept.
    """

    signature: inspect.Signature
    structure: Any
    leaves: list[Any]
    is_assumed: bool = False

    @classmethod
    def of(cls, module: nn.Module, args: Any, kwargs: Any) -> "Call":
        signature = inspect.signature(type(module).forward)
        leaves, structure = pytree.tree_flatten(_by_name(signature, args, kwargs))
        return cls(signature, structure, [Tensor if _is_tensor(leaf) else leaf for leaf in leaves])

    def tensors(self, args: Any, kwargs: Any) -> list[Any] | None:
        """The tensors of another call that is the same but for them; None of one that is not."""
        if (
            not kwargs
            and len(args) == len(self.leaves) == len(self.signature.parameters) - 1
            and all(map(_is_tensor, args))
        ):
            return list(args)
        try:
            leaves, structure = pytree.tree_flatten(_by_name(self.signature, args, kwargs))
        except TypeError:  # the original forward raises it
            return None
        if structure != self.structure or not all(map(_is_same, self.leaves, leaves)):
            return None
        return [leaf for leaf, mine in zip(leaves, self.leaves, strict=True) if mine is Tensor]

    @property
    def needs_guard(self) -> bool:
        """Whether it may depend on more than tensors."""
        has_default = any(p.default is not p.empty for p in self.signature.parameters.values())
        is_open = self.is_assumed and len(self.leaves) > 1
        return has_default or is_open or any(leaf is not Tensor for leaf in self.leaves)

    def check(self) -> None:
        """Raises Untraceable where it cannot be told whether another call is the same."""
        for name, value in pytree.tree_unflatten(self.leaves, self.structure).items():
            if not all(leaf is Tensor or type(leaf) in _CONSTANTS for leaf in pytree.tree_leaves(value)):
                raise Untraceable(f"its argument {name} is neither a tensor nor a number, string or None")


def _by_name(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (fx.Proxy, Tensor))


def _is_same(expected: Any, value: Any) -> bool:
    return _is_tensor(value) if expected is Tensor else type(value) is type(expected) and value == expected


class _Proxy(fx.Proxy):
    """Records `x += y` as what it is: torch.fx takes it for `x = x + y`, which leaves other names of x unchanged."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What isinstance asks for where a class is not that of this: a tensor would answer otherwise."""
        if self.tracer.opened is not None:  # type: ignore[attr-defined]
            raise Untraceable(_ASKS)
        return _Proxy

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):  # the answer that a tensor gives to hasattr
            raise AttributeError(f"tensors have no attribute {name}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # such as data: no trace would show it
            raise Untraceable("it changes an attribute of a value")
        super().__setattr__(name, value)


for _function in IN_PLACE_OPERATORS:
    setattr(
        _Proxy,
        f"__{_function.__name__}__",
        lambda self, other, function=_function: self.tracer.create_proxy("call_function", function, (self, other), {}),
    )


class Tracer(fx.Tracer):
    """Traces a forward through all modules but torch.nn's own, norms and `opaque` ones, or through `opened` ones alone.

    The latter is to be run in place of the forward: raises what would be wrong there. Training flags, and tensors that
    are attributes, are values of the trace; `mode` is which way it goes where it branches on a flag.

    Attributes:
        branches: the training flags that it branches on.
        failed: the path of the innermost module whose forward raised.
        calls: for each module whose forward is traced, how it is called.
        returns_more: the modules that get something else than a tensor from a module that they call.
        passes_on: for each module whose forward is traced, whether every call of it returned its first argument.
        stored: the nodes whose value something still refers to when the trace is over: an attribute, a list, ...
    """

    proxy_buffer_attributes = True

    def __init__(self, opened: Collection[str] | None = None, opaque: Collection[str] = (), mode: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.branches: set[str] = set()
        self.opened = None if opened is None else {"", *opened}
        self.opaque = opaque
        self.failed: str | None = None
        self.calls: dict[str, list[Call]] = {}
        self.returns_more: set[str] = set()
        self.passes_on: dict[str, bool] = {}
        self.stored: set[fx.Node] = set()
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self.modules: dict[str, nn.Module] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self.opened is not None:
            return module_qualified_name not in self.opened
        is_known = isinstance(m, NORMS) or "traced_forward" in vars(m) or module_qualified_name in self.opaque
        return is_known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        caller = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        is_leaf = self.is_leaf_module(m, path)
        try:
            if not is_leaf:
                check_forward(m)
                self.calls.setdefault(path, []).append(Call.of(m, args, kwargs))
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        if not is_leaf:
            self.passes_on[path] = self.passes_on.get(path, True) and bool(args) and result is args[0]
        if not isinstance(result, fx.Proxy):
            self.returns_more.add(caller)
        return result

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.op == "get_attr" and str(obj.node.target).rpartition(".")[2] == "training":
            self.branches.add(str(obj.node.target))
            return self.mode
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Proxy else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["context"] = _context()
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def get_fresh_qualname(self, prefix: str) -> str:
        if self.opened is not None:
            raise Untraceable("it makes a tensor that does not depend on its inputs")
        return super().get_fresh_qualname(prefix)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """Calls the root like `concrete_args`, by default with tensors for all arguments that have no default."""
        call = concrete_args
        if call is None:
            parameters = list(inspect.signature(root_fn).parameters.values())[1:]
            required = [
                p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            ]
            call = Call.of(self.root, (), dict.fromkeys(required, torch.empty(0)))
            call = replace(call, is_assumed=True)
        self.calls[""] = [call]
        leaves = [
            self.create_proxy("placeholder", f"input_{i}", (), {}) if leaf is Tensor else leaf
            for i, leaf in enumerate(call.leaves)
        ]
        bound = call.signature.bind_partial(self.root)
        bound.arguments.update(pytree.tree_unflatten(leaves, call.structure))
        for path, module in self.root.named_modules():
            for name, value in vars(module).items():
                if name == "training" or isinstance(value, Tensor):
                    vars(module)[name] = self.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})
        self.before = self._held()
        return partial(root_fn, *bound.args, **bound.kwargs), ()

    def _held(self) -> list[Any]:
        return [value for path in self.opened or () for value in held_by(self.root.get_submodule(path))]

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        check_forward(root)
        self.modules = dict(root.named_modules())
        for path in self.opened or ():
            if "type" in type(root.get_submodule(path)).forward.__code__.co_names:
                raise Untraceable(_ASKS)
        with _TRACING, _watching():
            graph = super().trace(root, concrete_args)
        for _ in range(2):
            self.stored = {proxy.node for reference in self.proxies if (proxy := reference()) is not None}
            if not any(node.op.startswith("call") for node in self.stored):
                break
            gc.collect()  # of proxies that only refer to each other
        if self.opened is None:
            return graph
        held = self._held()
        if len(held) != len(self.before) or not all(map(operator.is_, held, self.before)):
            raise Untraceable("it changes attributes")
        if len({node.meta["context"] for node in graph.nodes}) > 1:
            raise Untraceable("it runs a part under another grad mode, autocast, checkpoint or saved-tensor hook")
        return graph


def check_forward(module: nn.Module) -> None:
    """Raises Untraceable where a trace would show one of several forwards."""
    if "forward" in vars(module):
        raise Untraceable("it is replaced on the instance")
    if any(issubclass(type(value), _GENERATORS) for value in held_by(module)):
        raise Untraceable("it has a generator of random numbers")


def held_by(module: nn.Module) -> list[Any]:
    """What a module refers to beside other modules, to any depth."""
    held: list[Any] = [vars(module)]
    seen: set[int] = set()
    skipped = (fx.Proxy, Tensor, nn.Module, fx.Graph, type, ModuleType, FunctionType)
    for value in held:  # which grows meanwhile
        if id(value) not in seen and not isinstance(value, skipped):
            seen.add(id(value))
            held += gc.get_referents(value)
    return held


@contextmanager
def _watching() -> Iterator[None]:
    """Refuses what torch.fx does not see: gradients of autograd Functions, and random numbers, which it restores."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Untraceable("it applies an autograd Function or a checkpoint")

    function: Any = torch.autograd.Function
    apply, before = vars(function)["apply"], (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002
    function.apply = refuse
    try:
        yield
        after = np.random.get_state()  # noqa: NPY002
        same_numpy = all(np.array_equal(a, b) for a, b in zip(after, before[2], strict=True))
        if not (torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1] and same_numpy):
            raise Untraceable("it draws random numbers of its own")
    finally:
        function.apply = apply
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002


def _context() -> tuple[Any, ...]:
    """What a `with` statement can change and a graph does not record."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )
