"""Traces the forward of each module of a model with torch.fx, and checks whether the trace can replace the forward."""

import gc
import inspect
import operator
import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from types import FunctionType, ModuleType
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .bytecode import CHECKS_TYPE, GENERATORS, problem_of
from .copying import copy_to_trace
from .parts import IN_PLACE_OPERATORS, NORMS, activation_of_module
from .report import class_name

_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
CALLS_DIFFER = "it is called with different arguments"
_TENSOR_LAYERS = (*NORMS, nn.modules.conv._ConvNd, nn.Linear, nn.modules.dropout._DropoutNd)
_UNKNOWN = object()  # replaces what a callee put into an argument of its caller: a trace that uses it fails
_TRACING = RLock()  # torch.fx patches classes while it traces, and so does _rejecting_functions


_BUILTIN = ("builtins", "typing")


class Untraceable(Exception):  # noqa: N818 - a finding rather than an error
    """Raised for a forward that cannot be traced."""


@dataclass(frozen=True)
class Call:
    """How a forward was called in a trace: the structure of its arguments by name, and their leaves.

    A leaf that is a tensor is stored as the class Tensor. `only_tensors` is the number of arguments if each of them is
    one tensor, else -1.
    """

    signature: inspect.Signature
    structure: Any
    leaves: list[Any]
    only_tensors: int

    @classmethod
    def of(cls, module: nn.Module, args: Any, kwargs: Any) -> "Call":
        signature = inspect.signature(type(module).forward)
        leaves, structure = pytree.tree_flatten(_by_name(signature, args, kwargs))
        kinds = [Tensor if _is_tensor(leaf) else leaf for leaf in leaves]
        is_plain = len(kinds) == len(signature.parameters) - 1 and all(kind is Tensor for kind in kinds)
        return cls(signature, structure, kinds, len(kinds) if is_plain else -1)

    def is_like(self, other: "Call") -> bool:
        """Whether the calls differ only in their tensors."""
        return bool(self.structure == other.structure and self.leaves == other.leaves)

    def arguments(self, node: fx.Node) -> list[Any]:
        """The tensors that a node passes in such a call."""
        leaves = pytree.tree_leaves(_by_name(self.signature, node.args, node.kwargs))
        return [argument for argument, leaf in zip(leaves, self.leaves, strict=True) if leaf is Tensor]

    @classmethod
    def with_tensors(cls, module: nn.Module) -> "Call":
        """A call with a tensor for each argument that has no default."""
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
        return cls.of(module, (), dict.fromkeys(required, torch.empty(0)))

    def tensors(self, args: Any, kwargs: Any) -> Any:
        """The tensors of another call if it differs only in them, else None."""
        if len(args) == self.only_tensors and not kwargs and all(map(_is_tensor, args)):
            return args
        try:
            leaves, structure = pytree.tree_flatten(_by_name(self.signature, args, kwargs))
        except TypeError:  # the original forward raises it
            return None
        if structure != self.structure or not all(map(_is_same, self.leaves, leaves)):
            return None
        return [leaf for leaf, expected in zip(leaves, self.leaves, strict=True) if expected is Tensor]

    def changed(self, args: Any, kwargs: Any, structure: Any) -> list[Any]:
        """The arguments of such a call that the forward changes; `structure` is that of a trace's `changed`."""
        return [_by_name(self.signature, args, kwargs)[name] for name in structure.context]

    @property
    def problem(self) -> str | None:
        """Why this call cannot be compared with another one; None if it can."""
        for name, value in pytree.tree_unflatten(self.leaves, self.structure).items():
            if not all(leaf is Tensor or type(leaf) in _CONSTANTS for leaf in pytree.tree_leaves(value)):
                return f"its argument {name} is neither a tensor nor a number, string or None"
        return None


def _by_name(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    bound = signature.bind(None, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (fx.Proxy, Tensor))


def _is_same(expected: Any, value: Any) -> bool:
    return _is_tensor(value) if expected is Tensor else type(value) is type(expected) and value == expected


@dataclass(eq=False)
class Trace:
    """What a forward computes when it is called like `call`; each module that it calls is one node.

    Attributes:
        graph: from the call's tensors to a tuple of the leaves of the result and then those of the changed arguments.
        structure: structure of the result.
        changed: structure of the arguments that the forward changes, by name: lists of leaves.
        branches: training flags that the forward branches on.
        problem: why the graph cannot replace the forward; None if it can.
        is_tensor: whether the result is certainly a tensor.
        returns_norm: whether the forward returns the output of a norm, which may be part of a chain of its caller.
    """

    module: nn.Module
    call: Call
    graph: fx.Graph
    structure: Any
    changed: Any
    branches: set[str]
    problem: str | None
    is_tensor: bool
    returns_norm: bool = False

    @property
    def is_single(self) -> bool:
        """Whether the forward returns one value, rather than a structure, and changes no argument."""
        return bool(self.structure.is_leaf() and not self.changed.context)

    def result(self, proxy: fx.Proxy) -> Any:
        """The result of the call recorded as `proxy`, with leaves that are read from the proxy."""
        leaves: Any = next(iter(reversed(self.graph.nodes))).args[0]
        values = pytree.tree_unflatten(leaves[: self.structure.num_leaves], self.structure)
        return pytree.tree_map_with_path(
            lambda path, value: _read(proxy, path) if isinstance(value, fx.Node) else value, values
        )


def _read(value: Any, path: Any) -> Any:
    for key in path:
        value = key.get(value)
    return value


class _Proxy(fx.Proxy):
    """Records `x += y` as in-place: torch.fx records `x = x + y`, which leaves aliases of x unchanged."""

    tracer: "_Tracer"

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """isinstance reads this if the type does not match; a tensor would give another answer."""
        self.tracer.note(CHECKS_TYPE)
        return _Proxy

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):  # so that hasattr answers as for a tensor
            raise AttributeError(f"tensors have no attribute {name}")
        if not callable(getattr(Tensor, name)):  # such as shape: a value, not a method
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Proxy":
        raise Untraceable("it copies a value by copy.deepcopy")

    def __hash__(self) -> int:
        raise Untraceable("it uses a value as a key")

    def __repr__(self) -> str:
        raise Untraceable("it converts a value to a string, which a trace would do only once")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # such as data: a trace would not record it
            raise Untraceable("it sets an attribute of a value")
        super().__setattr__(name, value)


for _function in IN_PLACE_OPERATORS:
    setattr(
        _Proxy,
        f"__{_function.__name__}__",
        lambda self, other, function=_function: self.tracer.create_proxy("call_function", function, (self, other), {}),
    )


class Traces(dict[nn.Module, Trace]):
    """The traces of a model's forwards, callees before callers.

    Each forward is traced with the arguments that its caller passes. The `roots` are traced with tensors as arguments:
    the model, and the children of modules that cannot be traced. A forward that branches on a training flag takes the
    branch of `mode`. The modules are copies of those at `paths`.
    """

    def __init__(self, model: nn.Module, mode: bool) -> None:
        super().__init__()
        self.mode, copied = mode, copy_to_trace(model)
        self.paths = {module: path for path, module in copied.named_modules()}
        self.untraceable: dict[nn.Module, str] = {}
        self.roots: list[nn.Module] = []
        with _TRACING, _rejecting_functions():
            pending = [copied]
            while pending:
                module = pending.pop(0)
                if type(module).forward is not nn.Module.forward:  # not a mere container such as nn.ModuleList
                    self.trace(module)
                    self.roots.append(module)
                if module not in self and not _is_leaf(module):
                    pending += module.children()
                elif module in self:
                    opaque = [child for child in module.modules() if child in self.untraceable]
                    pending += [child for each in opaque for child in each.children()]

    def trace(self, module: nn.Module, args: Any = None, kwargs: Any = None) -> Trace | None:
        """The trace of a call, by default with tensors; None if it cannot be traced."""
        if _is_leaf(module) or module in self.untraceable or (args is None and module in self):
            return self.get(module)
        known = self.get(module)
        try:
            call = Call.with_tensors(module) if args is None else Call.of(module, args, kwargs)
            if known and known.call.is_like(call):
                return known
            trace = _Tracer(self).record(module, call)
        except Exception as error:
            if known is None:
                self.untraceable[module] = first_line(error)
            return None
        if known is None:
            return self.setdefault(module, trace)
        known.problem = CALLS_DIFFER
        return trace

    def called(self, graph: fx.Graph, caller: nn.Module) -> list[nn.Module]:
        """The modules that the nodes of a graph call."""
        return [caller.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]


def _is_leaf(module: nn.Module) -> bool:
    """Whether there is nothing inside the module to fuse, or everything is fused already."""
    is_of_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    is_container = isinstance(module, nn.Sequential) or type(module).forward is nn.Module.forward
    has_branches = "traced_forward" in vars(module) and bool(vars(module)["traced_forward"].branches)
    return isinstance(module, NORMS) or has_branches or (is_of_torch and not is_container)


class _Tracer(fx.Tracer):
    """Traces one forward. Raises if a trace would be wrong, and notes why it cannot replace the forward."""

    proxy_buffer_attributes = True

    def __init__(self, traces: Traces) -> None:
        super().__init__()
        self.traces = traces
        self.branches: set[str] = set()
        self.problem: str | None = None
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def note(self, problem: str | None) -> None:
        self.problem = self.problem or problem

    def record(self, module: nn.Module, call: Call) -> Trace:
        if "forward" in vars(module):
            raise Untraceable("it is overridden on the instance")
        before = _referenced_by(module)
        if any(issubclass(type(value), GENERATORS) for value in before):
            raise Untraceable("it holds a generator of random numbers")
        self.note(call.problem)
        if type(module).__reduce__ is not object.__reduce__:  # such as a GraphModule
            self.note(
                "it is a GraphModule: fuse the model that it was created from"
                if isinstance(module, fx.GraphModule)
                else f"{class_name(module)} overrides __reduce__"
            )
        if any("__init_subclass__" in vars(kind) for kind in type(module).__mro__ if kind.__module__ not in _BUILTIN):
            self.note(f"{class_name(module)} overrides __init_subclass__")
        with _rejecting_random_numbers(), _patched_isinstance(getattr(type(module).forward, "__globals__", {})):
            graph = self.trace(module, call)  # type: ignore[arg-type]
        after = _referenced_by(module)
        if len(after) != len(before) or not all(map(operator.is_, after, before)):
            self.note("it changes attributes")
        if len({node.meta["context"] for node in graph.nodes}) > 1:
            self.note("it runs a part under another grad mode, autocast, checkpoint or saved-tensor hook")
        for _ in range(2):
            stored = {proxy.node for reference in self.proxies if (proxy := reference()) is not None}
            if not any(node.op.startswith("call") for node in stored):
                break
            gc.collect()  # frees proxies that only refer to each other
        for node in stored:
            node.meta["stored"] = True
        if any(node.op.startswith("call") for node in stored):
            self.note("it stores a value")
        self.note(problem_of(module))
        for node in reversed(graph.nodes):
            if node.op == "get_attr" and not node.users:
                graph.erase_node(node)
        leaves: Any = next(iter(reversed(graph.nodes))).args[0]
        is_tensor = self.structure.is_leaf() and isinstance(leaves[0], fx.Node) and self.gives_tensor(leaves[0])
        return Trace(module, call, graph, self.structure, self.changed, self.branches, self.problem, is_tensor)

    def gives_tensor(self, node: fx.Node) -> bool:
        """Whether the value of a node is certainly a tensor."""
        if node.op != "call_module":
            return node.op == "placeholder"
        module = self.root.get_submodule(str(node.target))
        if (trace := self.traces.get(module)) is not None:
            return trace.is_tensor
        return isinstance(module, _TENSOR_LAYERS) or activation_of_module(module) is not None

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        call: Call = concrete_args
        leaves = [
            self.create_proxy("placeholder", f"input_{i}", (), {}) if leaf is Tensor else leaf
            for i, leaf in enumerate(call.leaves)
        ]

        def compute() -> Any:
            bound = call.signature.bind_partial(self.root)
            bound.arguments.update(pytree.tree_unflatten(leaves, call.structure))
            given = pytree.tree_unflatten(leaves, call.structure)
            result, self.structure = pytree.tree_flatten(root_fn(*bound.args, **bound.kwargs))
            changed = {
                name: bound.arguments[name] for name, value in given.items() if not _unchanged(bound, name, value)
            }
            if any(not isinstance(v, list) or len(pytree.tree_leaves(v)) != len(v) for v in changed.values()):
                self.note("it modifies the contents of an argument")
            changes, self.changed = pytree.tree_flatten(changed)
            return (*result, *changes)

        return compute, ()

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if any("__call__" in vars(kind) for kind in type(m).__mro__ if not kind.__module__.startswith("torch.")):
            raise Untraceable(f"it calls a {class_name(m)}, which overrides __call__")
        proxy = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        trace = self.traces.trace(m, args, kwargs)
        if trace is None:
            return proxy
        for value in trace.call.changed(args, kwargs, trace.changed):
            value[:] = [_UNKNOWN] * len(value)
        return trace.result(proxy)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        value = super().getattr(attr, attr_val, parameter_proxy_cache)
        if attr == "training" and type(value) is not _Proxy:
            raise Untraceable("it reads the training flag of a module that it does not contain")
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node.op == "get_attr" and str(obj.node.target).rpartition(".")[2] == "training":
            self.branches.add(str(obj.node.target))
            return self.traces.mode
        raise Untraceable("it branches on a value or a shape")

    def create_arg(self, a: Any) -> Any:
        if type(a) is not _Proxy:
            return super().create_arg(a)
        if a.tracer is not self:
            raise Untraceable("it uses a value from another forward")
        return a.node

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["context"] = _context()
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def get_fresh_qualname(self, prefix: str) -> str:
        self.note("it creates a tensor that does not depend on its inputs")
        return super().get_fresh_qualname(prefix)


def _unchanged(bound: inspect.BoundArguments, name: str, value: Any) -> bool:
    """Whether an argument still contains the same objects."""
    before, after = pytree.tree_leaves(value), pytree.tree_leaves(bound.arguments[name])
    return len(before) == len(after) and all(map(operator.is_, before, after))


def _referenced_by(module: nn.Module) -> list[Any]:
    """All objects that a module refers to, to any depth, except other modules."""
    referenced: list[Any] = [vars(module)]
    seen: set[int] = set()
    skipped = (fx.Proxy, Tensor, nn.Module, fx.Graph, type, ModuleType, FunctionType)
    for value in referenced:  # the list grows in the loop
        if id(value) not in seen and not issubclass(type(value), skipped):
            seen.add(id(value))
            referenced += gc.get_referents(value)
    return referenced


def _isinstance(value: Any, kinds: Any) -> bool:
    """isinstance for a traced forward: a value that is certainly a tensor counts as one."""
    if type(value) is _Proxy and value.tracer.gives_tensor(value.node):
        each = kinds if isinstance(kinds, tuple) else get_args(kinds) or (kinds,)
        if all(isinstance(kind, type) and (kind is Tensor or not issubclass(kind, Tensor)) for kind in each):
            return issubclass(Tensor, each)
    return isinstance(value, kinds)


@contextmanager
def _patched_isinstance(names: dict[str, Any]) -> Iterator[None]:
    """Puts _isinstance in the global names of a forward, as torch.fx does with wrapped functions."""
    before = names.get("isinstance", isinstance)
    names["isinstance"] = _isinstance
    try:
        yield
    finally:
        names["isinstance"] = before
        if before is isinstance:
            del names["isinstance"]


@contextmanager
def _rejecting_functions() -> Iterator[None]:
    """Rejects autograd Functions, whose gradients torch.fx does not record."""

    def reject(*args: Any, **kwargs: Any) -> Any:
        raise Untraceable("it applies an autograd Function or a checkpoint")

    function: Any = torch.autograd.Function
    apply, function.apply = vars(function)["apply"], reject
    try:
        yield
    finally:
        function.apply = apply


@contextmanager
def _rejecting_random_numbers() -> Iterator[None]:
    """Rejects random numbers, which would be constants in a trace, and restores the generators."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
        after = np.random.get_state()  # noqa: NPY002
        same_numpy = all(np.array_equal(a, b) for a, b in zip(after, before[2], strict=True))
        if not (torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1] and same_numpy):
            raise Untraceable("it draws random numbers while it is traced")
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])  # noqa: NPY002


def _context() -> tuple[Any, ...]:
    """State that a `with` statement can change and a graph does not record."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
