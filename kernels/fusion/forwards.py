"""Replaces the forward of a module by an edited graph."""

import operator
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple

from torch import fx, nn
from torch.utils import _pytree as pytree

from .chains import Chains
from .copying import has_hooks
from .tracing import Call


@dataclass(frozen=True)
class _Number:
    """Refers to the node of this number."""

    value: int


class _Computation(NamedTuple):
    """The function of a graph, with the trace's structure, changed and is_single."""

    function: Any
    structure: Any
    changed: Any
    is_single: bool


class TracedForward:
    """Replaces a forward in calls like the traced one, as long as the module has the same children.

    `children` has those of the module and, by path, of modules whose forwards became a part of this one. `parts` has
    the paths of the fused modules and their classes, which are known after the conversion.

    Graphs are stored as steps that refer to each other by number, because pickle would recurse through nodes. If the
    forward branches on training flags, there are two graphs, for all flags off and all on; if one of them is None, the
    original forward runs in that mode.
    """

    def __init__(
        self, call: Call, children: dict[str, Any], parts: dict[str, type], branches: list[str], graphs: list[Any]
    ) -> None:
        self.call, self.children, self.parts, self.branches, self.graphs = call, children, parts, branches, graphs
        self._inlined = [(path, names) for path, names in children.items() if path]
        self.compute = [graph and _Computation(_generate(graph[0]), *graph[1:]) for graph in graphs]

    @classmethod
    def of(cls, module: nn.Module, chains: list[Chains | None]) -> "TracedForward":
        made = [each for each in chains if each is not None]
        branches = sorted(set().union(*(each.branches for each in made)))
        graphs = [
            each and (_steps(each.graph), each.trace.structure, each.trace.changed, each.trace.is_single)
            for each in (chains if branches else made[:1])
        ]
        parts: dict[str, type] = dict.fromkeys(sorted(set().union(*(each.fused for each in made))), nn.Module)
        inlined = ["", *sorted(set().union(*(each.inlined for each in made)))]
        children = {path: _children(module.get_submodule(path)) for path in inlined}
        return cls(made[0].trace.call, children, parts, branches, graphs)

    def __call__(self, module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
        compute = self.compute[0] if not self.branches else self._for_mode(module)
        tensors = self.call.tensors(args, kwargs)
        if compute is None or tensors is None or not self._fits(module):
            return original(module, *args, **kwargs)
        leaves = compute.function(module, *tensors)
        if compute.is_single:
            return leaves[0]
        count = compute.structure.num_leaves
        changes = pytree.tree_unflatten(leaves[count:], compute.changed).values()
        for argument, value in zip(self.call.changed(args, kwargs, compute.changed), changes, strict=True):
            argument[:] = value
        return pytree.tree_unflatten(leaves[:count], compute.structure)

    def _fits(self, module: nn.Module) -> bool:
        """Whether the module still has the children that it had when it was fused, and the inlined ones no hooks."""
        try:
            return (
                _children(module) == self.children[""]
                and all(isinstance(_submodule(module, path), kind) for path, kind in self.parts.items())
                and not any(_has_changed(_submodule(module, path), children) for path, children in self._inlined)
            )
        except (AttributeError, KeyError):
            return False

    def _for_mode(self, module: nn.Module) -> "_Computation | None":
        modes = {operator.attrgetter(flag)(module) for flag in self.branches}
        return self.compute[int(True in modes)] if len(modes) == 1 else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedForward":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return TracedForward, (self.call, self.children, self.parts, self.branches, self.graphs)


def _children(module: nn.Module) -> list[tuple[str, bool]]:
    """The names of a module's children, and whether they are None."""
    return [(name, child is None) for name, child in module._modules.items()]


def _submodule(module: nn.Module, path: str) -> Any:
    """As nn.Module.get_submodule, in a tenth of its time."""
    for name in path.split("."):
        module = module._modules[name]  # type: ignore[assignment]
    return module


def _has_changed(module: nn.Module, children: list[tuple[str, bool]]) -> bool:
    return has_hooks(module) or _children(module) != children


def _steps(graph: fx.Graph) -> list[tuple[str, Any, Any, Any]]:
    numbers: dict[fx.Node, Any] = {node: _Number(i) for i, node in enumerate(graph.nodes)}
    arguments = [fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__) for node in graph.nodes]
    return [(node.op, node.target, *each) for node, each in zip(graph.nodes, arguments, strict=True)]


def _generate(steps: list[tuple[str, Any, Any, Any]]) -> Any:
    """Generates a function of the module and tensors; what it calls is looked up in the module."""
    graph, nodes = fx.Graph(), list[fx.Node]()
    for op, target, *arguments in steps:
        args, kwargs = fx.node.map_aggregate(arguments, lambda a: nodes[a.value] if isinstance(a, _Number) else a)
        nodes.append(graph.create_node(op, target, args, kwargs))
    names = [str(node.target) for node in nodes if node.op in ("call_module", "get_attr")]
    return type(fx.GraphModule(dict.fromkeys(names), graph)).forward


def replace_forward(module: nn.Module, forward: TracedForward) -> None:
    """Makes the module run `forward`. Its class becomes a subclass, the same for all modules of the class."""
    forward.parts.update((path, type(module.get_submodule(path))) for path in forward.parts)
    if "traced_forward" not in vars(module):
        module.__class__ = _with_traced_forward(type(module))  # type: ignore[arg-type]
    vars(module)["traced_forward"] = forward


def restore_forward(module: nn.Module) -> None:
    """Undoes replace_forward, if it was applied."""
    vars(module).pop("traced_forward", None)
    module.__class__ = vars(type(module)).get("original", type(module))


@cache
def _with_traced_forward(original: type[nn.Module]) -> type[nn.Module]:
    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "traced_forward" not in vars(self):  # a new module of this class, such as a slice of an nn.Sequential
            return original.forward(self, *args, **kwargs)
        return self.traced_forward(self, original.forward, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _new_with_traced_forward, (original,), *object.__reduce_ex__(self, protocol)[2:]

    members = {"forward": forward, "original": original, "__reduce_ex__": reduce, "__module__": original.__module__}
    return type(original.__name__, (original,), members)


def _new_with_traced_forward(original: type[nn.Module]) -> nn.Module:
    return object.__new__(_with_traced_forward(original))  # type: ignore[arg-type]
