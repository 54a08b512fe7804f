"""Traces modules by torch.fx: to see what a forward does, and to put another in its place. Changes no model."""

import copy
import inspect
import operator
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import BuiltinMethodType, MethodType, ModuleType
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy

Model = TypeVar("Model", bound=nn.Module)

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
IN_PLACE_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
_NUMPY_GENERATOR = np.random.mtrand._rand  # what the functions of np.random draw from
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


class Untraceable(Exception):  # noqa: N818 - a finding rather than an error
    """A forward that cannot be traced, or not so that the trace can stand for it."""


def copy_structure(model: Model, *, share_buffers: bool) -> Model:
    """A deep copy of the modules and of what they refer to, with the same parameters and hooks.

    With `share_buffers` the buffers, and tensors that are plain attributes, are the same as well.

    Raises:
        RuntimeError: the model cannot be copied.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    members = set(map(id, model.modules()))
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = value if share_buffers or is_lazy(value) else value.detach().clone()
            elif isinstance(value, ProcessGroup):
                memo[id(value)] = value
        for hook in (hook for name in _HOOKS for hook in vars(module)[name].values()):
            # Whoever else registered a hook waits for its calls.
            memo |= {id(part): part for part in _parts(hook) if id(part) not in members}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise RuntimeError(f"{type(model).__name__} cannot be copied by copy.deepcopy: {error}") from error


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


class Tracer(fx.Tracer):
    """Traces through all modules but torch.nn's own, norms and `opaque` ones; notes where it fails.

    Notes in the meta of nodes what a graph does not show: the context, and "stored" where an attribute keeps the value.
    Raises what a trace cannot show: autograd Functions, whose gradient is their own, and random numbers, which may
    decide what is computed.
    """

    proxy_buffer_attributes = True

    def __init__(self, opaque: Collection[str] = ()) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None
        self.traced: set[str] = set()
        """The modules, but for the root, whose forward is traced."""
        self.beyond_tensors: set[str] = set()
        """The modules that are called with something else than tensors by position, or that get something else from
        a module they call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            module_qualified_name in self.opaque
            or isinstance(m, (NORMS, Rewritten))
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        caller = next(reversed(self.module_stack.values()))[0] if self.module_stack else ""
        if kwargs or not all(isinstance(argument, fx.Proxy) for argument in args):
            self.beyond_tensors.add(path)
        if not self.is_leaf_module(m, path):
            self.traced.add(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        if not isinstance(result, fx.Proxy):
            self.beyond_tensors.add(caller)
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["context"] = _context()
        return node

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        before = _generators(_held(root))
        with patch.object(torch.autograd.Function, "apply", _refuse):
            graph = super().trace(root, concrete_args)
        self.held = _held(root)
        if _generators(self.held) != before:
            raise Untraceable("it draws random numbers of its own")
        for value in self.held:
            if type(value) is _Proxy:
                value.node.meta["stored"] = True
        return graph


class _Proxy(fx.Proxy):
    """A value in a trace. For isinstance it is a tensor, as what it stands for mostly is.

    Records `x += y` as what it is: torch.fx takes it for `x = x + y`, which leaves other names of x unchanged.
    """

    _is_param = _is_buffer = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(self.tracer, RewritingTracer) and asker.partition(".")[0] != "torch":
            raise Untraceable("it asks for the type of a value")
        return Tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # such as data: no trace would show it
            raise Untraceable("it changes an attribute of a value")
        super().__setattr__(name, value)


def _record_in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _record_in_place(_function))


class RewritingTracer(Tracer):
    """Traces one module's forward, and those of the `opened` modules inside it, for use in the place of its forward.

    Raises what a trace would get wrong: contexts such as no_grad, tensors made on the way, changes of attributes.
    Training flags, and tensors that are attributes, are read when the traced forward runs.
    """

    def __init__(self, opened: Collection[str]) -> None:
        super().__init__()
        self.opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> Any:
        result = super().create_args_for_root(*args, **kwargs)
        for path, module in self.root.named_modules():
            for name, value in vars(module).items():
                if name == "training" or isinstance(value, Tensor):
                    vars(module)[name] = self.create_proxy("get_attr", f"{path}.{name}".lstrip("."), (), {})
        self.before = _held(self.root)
        return result

    def get_fresh_qualname(self, prefix: str) -> str:
        raise Untraceable("it makes a tensor that does not depend on its inputs")

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        graph = super().trace(root, concrete_args)
        if len(self.held) != len(self.before) or not all(map(operator.is_, self.held, self.before)):
            raise Untraceable("it changes attributes")
        if len({node.meta["context"] for node in graph.nodes}) > 1:
            raise Untraceable("it runs a part under another grad mode, autocast, checkpoint or saved-tensor hook")
        return graph


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise Untraceable("it applies an autograd Function or a checkpoint")


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


def _held(root: Any) -> list[Any]:
    """What a module holds, to any depth: attributes and their names, elements of containers, objects of methods."""
    held = [root]
    seen: set[int] = set()
    for value in held:  # which grows meanwhile
        kind = type(value)  # isinstance would ask a proxy
        if id(value) in seen or issubclass(kind, (fx.Proxy, ModuleType, type)):
            continue
        seen.add(id(value))
        if issubclass(kind, dict):
            held += [*value, *value.values()]
        elif issubclass(kind, (list, tuple, set, frozenset, deque)):
            held += value
        elif issubclass(kind, (MethodType, BuiltinMethodType)):
            held.append(value.__self__)
        attributes = getattr(value, "__dict__", {})
        held += [*attributes, *attributes.values()]
    return held


def _generators(held: list[Any]) -> bytes:
    """The states of the global random number generators and of those that a module holds."""
    states = torch.get_rng_state().numpy(), random.getstate(), _NUMPY_GENERATOR.get_state(legacy=False)
    return pickle.dumps((states, [value for value in held if issubclass(type(value), _GENERATORS)]))


@contextmanager
def keeping_generators() -> Iterator[None]:
    """Restores the state of the random number generators."""
    python, numpy = random.getstate(), _NUMPY_GENERATOR.get_state(legacy=False)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        _NUMPY_GENERATOR.set_state(numpy)


def check_one_way(module: nn.Module) -> None:
    """Raises Untraceable where a trace from outside would show one of several forwards."""
    if "forward" in vars(module):
        raise Untraceable("it is replaced on the instance")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty for p in parameters):
        raise Untraceable("it takes optional or variable arguments")


def scratch_copy(module: nn.Module) -> nn.Module:
    """A copy to trace: without hooks, and with buffers of its own, for whatever the forward does to them."""
    scratch = copy_structure(module, share_buffers=False)
    for child in scratch.modules():
        for name in _HOOKS:
            vars(child)[name].clear()
    return scratch


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward as source text and what the names in it mean: it can be pickled, which functions cannot."""

    source: str
    values: dict[str, Any]
    imports: dict[str, str]
    """The names that mean Python modules, and which."""

    @classmethod
    def of(cls, graph: fx.Graph) -> "Forward":
        """The forward that computes `graph`."""
        code = graph.python_code("self")
        used = {name: value for name, value in code.globals.items() if name in code.src}
        imports = {name: value.__name__ for name, value in used.items() if isinstance(value, ModuleType)}
        return cls(code.src, {name: value for name, value in used.items() if name not in imports}, imports)

    def rewrite(self, original: type[nn.Module]) -> type[nn.Module]:
        """A subclass of `original` with this forward."""
        names = self.values | {name: import_module(module) for name, module in self.imports.items()}
        exec(compile(self.source, "<forward rewritten by fuse>", "exec"), names)
        members = {"forward": names["forward"], "original": original, "rewritten": self}
        return type(original.__name__, (Rewritten, original), members | {"__module__": original.__module__})

    def __deepcopy__(self, memo: dict[int, Any]) -> "Forward":
        return self


class Rewritten:
    """Mixed into the class of a module whose forward was rewritten."""

    original: ClassVar[type[nn.Module]]
    rewritten: ClassVar[Forward]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (_new_rewritten, (self.original, self.rewritten), *super().__reduce_ex__(protocol)[2:])


def _new_rewritten(original: type[nn.Module], forward: Forward) -> nn.Module:
    return original.__new__(forward.rewrite(original))
