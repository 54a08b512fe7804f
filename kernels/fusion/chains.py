"""Finds norm [-> dropout] [-> + residual] -> activation chains in traced forwards. Changes no model."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.passes.shape_prop import ShapeProp

from ..activations import Activation
from .parts import (
    NORMS,
    SUMS,
    SUMS_IN_PLACE,
    NoChain,
    activation_of,
    dropout_of,
    passes_on,
    stock_norm,
)
from .report import class_name
from .tracing import IN_PLACE_OPERATORS, Call, Tracer, scratch_copy

_IDENTITY = Activation("identity")
_OTHER_SIDE = "the sum behind it is fused with the norm on the other side"
_KNOWN_FUNCTIONS = ("torch", "_operator", "math", "builtins", "None")


@dataclass(eq=False)
class Match:
    """A chain in a graph: its nodes from the norm to the activation, and what they are."""

    nodes: list[fx.Node]
    activation: Activation = _IDENTITY
    dropout: fx.Node | None = None
    dropout_p: float = 0.0
    sums: list[fx.Node] = field(default_factory=list)

    @property
    def residuals(self) -> list[Any]:
        """What the sums add. Looked up in the graph as it is by now."""
        return [next((a for a in node.args if a not in self.nodes), None) for node in self.sums]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the fused operation must do."""
        return self.activation, self.dropout_p, bool(self.sums)


@dataclass(frozen=True)
class Chain:
    """A chain in a model, by the paths of modules.

    `members` are its modules, and `mode` the one whose mode its dropout follows. `owner` is the innermost module in
    whose forward it lies, `opened` are those inside whose forward makes a part of it. `of_modules` tells whether it is
    a sequence of modules, which can be replaced without touching any forward.
    """

    norm: str
    kind: tuple[Any, ...]
    members: tuple[str, ...] = ()
    mode: str = ""
    owner: str = ""
    opened: frozenset[str] = frozenset()
    of_modules: bool = True


@dataclass
class Findings:
    """What the traces of a model show. A module that is shared goes by the first of its paths.

    Attributes:
        norms: for each norm, in each call that was traced, its chain or why there is none.
        uses: each call of an activation or dropout module, with the chain that it belongs to.
        untraceable: the modules whose forward cannot be traced, and why.
        tracers: for each module whose forward was traced, the tracers and its path there.
    """

    model: nn.Module
    norms: dict[str, list[Chain | NoChain]] = field(default_factory=dict)
    uses: list[tuple[str, Chain | None]] = field(default_factory=list)
    untraceable: dict[str, str] = field(default_factory=dict)
    tracers: dict[str, list[tuple[Tracer, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first_path = {module: path for path, module in self.model.named_modules()}

    def path(self, root: str, path: str) -> str:
        """The first path in the model of the module that is at `path` in the one at `root`."""
        return self.first_path[self.model.get_submodule(join(root, path))]

    def calls(self, path: str) -> list[Call]:
        """How the module at `path` is called."""
        return [call for tracer, at in self.tracers.get(path, []) for call in tracer.calls[at]]

    def find(self, root: str, example_inputs: tuple[Any, ...] | None = None) -> None:
        """Traces the module at `root`; the children of what cannot be traced are traced by themselves."""
        module = self.model.get_submodule(root)
        if isinstance(module, NORMS) or "traced_forward" in vars(module):
            return
        opaque: dict[str, str] = {}
        while type(module).forward is not nn.Module.forward:  # not a mere container such as nn.ModuleList
            tracers = [Tracer(opaque=opaque, mode=mode) for mode in (False, True)]
            try:
                for tracer in tracers:
                    tracer.trace(scratch_copy(module))
                    if not tracer.branches:
                        tracers = [tracer]
                        break
            except Exception as error:
                if tracer.failed is None or tracer.failed in opaque:  # it is called with what no trace can record
                    opaque = {"": first_line(error)}
                    break
                failed = type(module.get_submodule(tracer.failed))
                opaque |= {
                    at: first_line(error) for at, child in module.named_modules() if at and type(child) is failed
                }
            else:
                if example_inputs is not None:
                    _note_shapes(scratch_copy(module), tracers[0].graph, example_inputs)
                for tracer in tracers:
                    self._collect(tracer, root)
                break
        else:
            opaque = {"": ""}
        self.untraceable |= {self.path(root, path): reason for path, reason in opaque.items() if reason}
        children = [name for name, _ in module.named_children()] if "" in opaque else list(opaque)
        for path in children:
            self.find(join(root, path))

    def _collect(self, tracer: Tracer, root: str) -> None:
        """Adds what one graph shows."""
        members: dict[fx.Node, Chain] = {}
        for norm, match in match_chains(tracer):
            found = match if isinstance(match, NoChain) else self._describe(match, root)
            if isinstance(found, Chain):
                members |= dict.fromkeys(match.nodes, found)
            self.norms.setdefault(self.path(root, str(norm.target)), []).append(found)
        for node in tracer.graph.nodes:
            if node.op == "call_module" and (activation_of(node, tracer.modules) or dropout_of(node, tracer.modules)):
                self.uses.append((self.path(root, str(node.target)), members.get(node)))
        for path in tracer.calls:
            self.tracers.setdefault(self.path(root, path), []).append((tracer, path))

    def _describe(self, match: Match, root: str) -> Chain:
        scopes = [_scope(node) for node in match.nodes]
        depth = 0
        while all(len(scope) > depth for scope in scopes) and len({scope[depth][0] for scope in scopes}) == 1:
            depth += 1
        called = {node: self.path(root, str(node.target)) for node in match.nodes if node.op == "call_module"}
        norm = called[match.nodes[0]]
        at = ["", *(path for _, path in _scope(match.dropout))][-1] if match.dropout else ""
        return Chain(
            norm,
            match.kind,
            members=tuple(called.values()),
            mode=called.get(match.dropout, self.path(root, at)) if match.dropout else norm,
            owner=self.path(root, scopes[0][depth - 1][1] if depth else ""),
            opened=frozenset(self.path(root, path) for scope in scopes for _, path in scope[depth:]),
            of_modules=all(node in called or node.target == "contiguous" for node in match.nodes),
        )


def _note_shapes(module: nn.Module, graph: fx.Graph, example_inputs: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad():
            ShapeProp(fx.GraphModule(module, graph)).propagate(*example_inputs)
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {error}") from error


def match_chains(tracer: Tracer, known: Collection[str] | None = None) -> list[tuple[fx.Node, Any]]:
    """For each call of a norm in a trace, its chain, or why it has none. No two chains share a node.

    With `known`, looks at those norms alone, which are known to have nothing between norm and sum that would notice.
    """
    found: dict[fx.Node, Any] = {}
    taken: set[fx.Node] = set()
    for norm in tracer.graph.nodes:
        if norm.op != "call_module" or not isinstance(tracer.modules[str(norm.target)], NORMS):
            continue
        if known is not None and norm.target not in known:
            continue
        try:
            _check_norm(norm, tracer.modules[str(norm.target)])
            match = _match(norm, tracer)
            if not taken.isdisjoint(match.sums):
                raise NoChain(_OTHER_SIDE)
            if match.sums and known is None:
                _check_between(match, tracer.modules)
            taken.update(match.sums)
            found[norm] = match
        except NoChain as reason:
            found[norm] = reason.with_traceback(None)  # whose frames would keep the model alive
    for match in list(found.values()):
        for other in match.residuals if isinstance(match, Match) else ():
            if isinstance(found.get(other), NoChain):
                found[other] = NoChain(_OTHER_SIDE, "no activation")
    return list(found.items())


def _match(norm: fx.Node, tracer: Tracer) -> Match:
    match, modules, training = Match([norm]), tracer.modules, None
    while match.activation.name == "identity":
        node = match.nodes[-1]
        if len(node.users) != 1:
            is_chain = any(activation_of(user, modules) for user in node.users)
            reason = f"the output of {_name(node, modules)} is used {len(node.users)} times"
            raise NoChain(reason, "chain" if is_chain else "no activation")
        user = next(iter(node.users))
        if activation := activation_of(user, modules):
            match.activation = activation
        elif not match.dropout and not match.sums and (dropout := dropout_of(user, modules)):
            match.dropout, (match.dropout_p, training) = user, dropout
        elif user.op != "call_module" and user.target in SUMS:
            match.sums.append(user)
        elif not passes_on(user, modules, tracer.passes_on):
            raise NoChain(f"followed by {_name(user, modules)}", "no activation")
        match.nodes.append(user)
    for node in match.nodes[:-1]:
        if node in tracer.stored:
            raise NoChain(f"the output of {_name(node, modules)} is stored in an attribute")
    if training is not None:
        owner = [path for _, path in _scope(match.dropout or norm)][-1:]
        if getattr(training, "target", None) != ".".join([*owner, "training"]):
            raise NoChain("the dropout behind it does not follow the mode")
    for node, residual in zip(match.sums, match.residuals, strict=True):
        _check_sum(node, match.nodes[match.nodes.index(node) - 1], residual)
    if any(node.meta["context"] != norm.meta["context"] for node in match.nodes):
        raise NoChain("what follows runs under another grad mode, autocast, checkpoint or saved-tensor hook")
    return match


def _check_norm(norm: fx.Node, module: nn.Module) -> None:
    if stock_norm(module)[1]:
        raise NoChain("a part of it has hooks")
    if len(norm.args) != 1 or norm.kwargs or "forward" in vars(module):
        raise NoChain("called in an unusual way")


def _check_sum(sum_node: fx.Node, before: fx.Node, residual: Any) -> None:
    if len(sum_node.args) != 2 or sum_node.kwargs:
        raise NoChain("the sum behind it has further arguments")
    if not isinstance(residual, fx.Node):
        raise NoChain("the sum behind it does not add a tensor")
    if sum_node.target in SUMS_IN_PLACE and sum_node.args[0] is not before:
        raise NoChain("the sum behind it changes the other tensor in place")
    shapes = [getattr(node.meta.get("tensor_meta"), "shape", None) for node in (before, residual)]
    if shapes[0] != shapes[1]:
        first, second = (shape if shape is None else tuple(shape) for shape in shapes)
        raise NoChain(f"the sum behind it broadcasts {first} and {second}")


def _check_between(match: Match, modules: dict[str, nn.Module]) -> None:
    """The norm is to be called where the sum is: nothing before may change its input, or see or move its statistics."""
    norm = node = match.nodes[0]
    buffers = {f"{norm.target}.{name}" for name, _ in modules[str(norm.target)].named_buffers()}
    if any(node.op == "get_attr" and node.target in buffers for node in norm.graph.nodes):
        raise NoChain("its running statistics are used where it is called")
    while (node := node.next) is not match.sums[-1]:
        if buffers and node.target == norm.target:
            raise NoChain("it is called again before the sum behind it")
        if node not in match.nodes and _may_write(node, modules):
            raise NoChain("something between it and the sum behind it may change a tensor in place")


def _may_write(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node may change one of its inputs."""
    target: Any = node.target
    if node.op == "call_module":
        module = modules[target]
        known = type(module).__module__.startswith("torch.nn.") and not any(module.children())
        return not (known or isinstance(module, NORMS)) or getattr(module, "inplace", False)
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        overloads = [target] if isinstance(target, OpOverload) else [getattr(target, n) for n in target.overloads()]
        return any(overload._schema.is_mutable for overload in overloads)
    if node.op == "call_function" and not str(getattr(target, "__module__", "torch")).startswith(_KNOWN_FUNCTIONS):
        return True
    name = str(target if node.op == "call_method" else getattr(target, "__name__", ""))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or target in IN_PLACE_OPERATORS
        or any(argument is True for argument in (*node.args, node.kwargs.get("inplace")))
        or "out" in node.kwargs
    )


def _name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target} ({class_name(modules[str(node.target)])})"
    return "the output" if node.op == "output" else getattr(node.target, "__name__", str(node.target))


def _scope(node: fx.Node) -> list[tuple[str, str]]:
    """The calls in which `node` was made, outermost first: what tells them apart, and the path of the module."""
    stack = [(call, path) for call, (path, _) in node.meta.get("nn_module_stack", {}).items()]
    return stack[:-1] if node.op == "call_module" else stack


def join(root: str, path: str) -> str:
    """Two paths as one; either may be empty."""
    return ".".join(part for part in (root, path) if part)


def first_line(error: Exception) -> str:
    """What to say of an error in a report."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
