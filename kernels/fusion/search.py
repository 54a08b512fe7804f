"""Finds norm [-> dropout] [-> + residual] -> ReLU chains in models, by torch.fx; changes no model."""

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from ..modules import FusedLayer
from .rewriting import IN_PLACE_OPERATORS, NORMS, Rewritten, Tracer, check_one_way, scratch_copy

FUSIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)

_RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_OTHER_SIDE = "the sum behind it is fused with the norm on the other side"
SUMS_IN_PLACE = {operator.iadd, "add_"}
_KNOWN_FUNCTIONS = ("torch", "_operator", "math", "builtins", "None")
_DROPOUTS = {F.dropout, torch.dropout}


@dataclass(frozen=True)
class Chain:
    """One chain. Modules are given by their paths in the model; a function by None."""

    norm: str
    dropout_p: float
    dropout: str | None
    dropout_mode: str | None
    """The module whose training flag rules the dropout, None without a dropout."""
    summed: bool
    relu: str | None
    owner: str
    """The innermost module in whose forward the whole chain lies."""
    opened: frozenset[str]
    """The modules inside `owner` whose forward makes a part of the chain."""

    @property
    def is_of_modules(self) -> bool:
        """Whether it is a sequence of modules, which can be replaced without touching any forward."""
        return not self.summed and self.relu is not None and (self.dropout is not None or self.dropout_mode is None)


@dataclass(frozen=True)
class Match:
    """A chain's nodes in a graph."""

    norm: fx.Node
    dropout: fx.Node | None
    dropout_p: float
    dropout_training: Any
    """The argument of a dropout function: a bool, or a node where it is read when the graph runs."""
    sum: fx.Node | None
    relu: fx.Node

    @property
    def residual(self) -> Any:
        """What the sum adds, None without a sum. Looked up in the graph as it is by now."""
        if self.sum is None:
            return None
        first, second = self.sum.args
        return second if first is (self.dropout or self.norm) else first


@dataclass(frozen=True)
class Refusal:
    """Why a norm begins no chain in a graph."""

    norm: fx.Node
    reason: str


@dataclass
class Findings:
    """What is known of a model. A module that is shared goes by the first of its paths."""

    model: nn.Module
    first_path: dict[nn.Module, str] = field(init=False)
    calls: dict[str, list[Chain | str]] = field(default_factory=dict)
    """For each norm, in each call that was traced, its chain or why there is none."""
    uses: list[tuple[str, Chain | None]] = field(default_factory=list)
    """Each call of a ReLU or dropout module, with the chain that it belongs to."""
    untraceable: dict[str, str] = field(default_factory=dict)
    """The modules whose forward cannot be traced, and why."""
    traced: set[str] = field(default_factory=set)
    """The modules whose forward was traced."""
    beyond_tensors: set[str] = field(default_factory=set)
    """The modules that are called with something else than tensors by position, or that get something else from a
    module they call."""

    def __post_init__(self) -> None:
        self.first_path = {module: path for path, module in self.model.named_modules()}

    def path(self, root: str, path: str) -> str:
        """The first path in the model of the module that is at `path` in the one at `root`."""
        return self.first_path[self.model.get_submodule(join(root, path))]


def find_chains(model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> Findings:
    """Traces the model in train and in eval mode.

    A module that cannot be traced is taken for an operation of its own, and its children are looked at by themselves.

    Raises:
        ValueError: the model does not run on `example_inputs`.
    """
    findings = Findings(model)
    _find_in_module("", example_inputs, findings)
    return findings


def _find_in_module(root: str, example_inputs: tuple[Any, ...] | None, findings: Findings) -> None:
    module = findings.model.get_submodule(root)
    if isinstance(module, (NORMS, Rewritten)):
        return
    opaque: dict[str, str] = {}
    if type(module).forward is not nn.Module.forward:  # not a mere container such as nn.ModuleList
        try:
            check_one_way(module)
            tracers = _trace_both_modes(module, opaque)
        except Exception as error:
            findings.untraceable[findings.path(root, "")] = first_line(error)
        else:
            if example_inputs is not None:
                _note_shapes(tracers[0], example_inputs)
            for tracer in tracers:
                _collect(tracer, root, findings)
            for path, reason in opaque.items():
                findings.untraceable[findings.path(root, path)] = reason
                for name, _ in module.get_submodule(path).named_children():
                    _find_in_module(join(root, f"{path}.{name}"), None, findings)
            return
    for name, _ in module.named_children():
        _find_in_module(join(root, name), None, findings)


def _trace_both_modes(module: nn.Module, opaque: dict[str, str]) -> list[Tracer]:
    """Tracers that have traced the module in eval and in train mode; adds what they cannot trace inside to `opaque`."""
    tracers: list[Tracer] = []
    while len(tracers) < 2:
        scratch = scratch_copy(module)
        for child in scratch.modules():  # not by train(), where a module may merge its weights or the like
            child.training = len(tracers) == 1
        tracer = Tracer(opaque)
        try:
            tracer.trace(scratch)
        except Exception as error:
            if tracer.failed is None or tracer.failed in opaque:  # it is called with what no trace can record
                raise
            failed = type(module.get_submodule(tracer.failed))
            opaque |= {
                path: first_line(error) for path, child in module.named_modules() if path and type(child) is failed
            }
            tracers.clear()
        else:
            tracers.append(tracer)
    return tracers


def _note_shapes(tracer: Tracer, example_inputs: tuple[Any, ...]) -> None:
    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["shape"] = getattr(result, "shape", None)
            return result

    try:
        with torch.no_grad():
            Recorder(tracer.root, graph=tracer.graph).run(*example_inputs)
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {error}") from error


def _collect(tracer: Tracer, root: str, findings: Findings) -> None:
    """Adds what one graph shows to `findings`."""
    modules = dict(tracer.root.named_modules())
    members: dict[fx.Node, Chain] = {}
    for match in match_chains(tracer.graph, modules):
        path = findings.path(root, str(match.norm.target))
        if isinstance(match, Match) and match.dropout_training not in (None, tracer.root.training):
            match = Refusal(match.norm, "the dropout behind it does not follow the mode")
        if isinstance(match, Refusal):
            findings.calls.setdefault(path, []).append(match.reason)
            continue
        chain = _describe(match, root, findings)
        members |= {node: chain for node in (match.dropout, match.relu) if node is not None}
        findings.calls.setdefault(path, []).append(chain)
    for node in tracer.graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], (nn.ReLU, nn.Dropout)):
            findings.uses.append((findings.path(root, node.target), members.get(node)))
    findings.traced |= {findings.path(root, path) for path in ("", *tracer.traced)}
    findings.beyond_tensors |= {findings.path(root, path) for path in tracer.beyond_tensors}


def match_chains(
    graph: fx.Graph, modules: dict[str, nn.Module], known: Collection[str] | None = None
) -> Iterator[Match | Refusal]:
    """For each call of a norm in `graph`, its chain, or why it has none. No two chains share a node.

    With `known`, looks at those norms alone, which are known to have nothing between norm and sum that would notice.
    """
    norms = [node for node in graph.nodes if node.op == "call_module" and isinstance(modules[node.target], NORMS)]
    matches: dict[fx.Node, Match] = {}
    reasons: dict[fx.Node, str] = {}
    for norm in norms:
        if known is None or norm.target in known:
            try:
                match = _match(norm, modules, may_write=known is None)
            except _NoChain as reason:
                reasons[norm] = str(reason)
            else:
                if match.sum is not None and any(match.sum is other.sum for other in matches.values()):
                    reasons[norm] = _OTHER_SIDE
                else:
                    matches[norm] = match
    reasons |= {match.residual: _OTHER_SIDE for match in matches.values() if match.residual in reasons}
    yield from matches.values()
    yield from (Refusal(norm, reason) for norm, reason in reasons.items())


class _NoChain(Exception):  # noqa: N818 - a finding rather than an error
    """Why a norm does not begin a chain."""


def _match(norm: fx.Node, modules: dict[str, nn.Module], may_write: bool) -> Match:
    _check_fusible(norm, modules)
    node = norm
    user = _only_user(node, modules)
    dropout_p, training, dropout = 0.0, None, None
    if _is_module(user, modules, nn.Dropout):
        dropout, dropout_p = user, vars(modules[str(user.target)])["p"]
    elif user.op == "call_function" and user.target in _DROPOUTS:
        dropout, (dropout_p, training) = user, _dropout_arguments(user)
    if dropout is not None:
        node, user = dropout, _only_user(dropout, modules)
    sum_node = None
    if user.target in _SUMS and user.op != "call_module":
        sum_node = user
        _check_sum(sum_node, node)
        if may_write and any(_may_write(other, modules) for other in _between(norm, sum_node) if other is not dropout):
            raise _NoChain("something between it and the sum behind it may change a tensor in place")
        if may_write:
            _check_statistics(norm, sum_node, modules)
        node, user = sum_node, _only_user(sum_node, modules)
    is_function = user.op != "call_module" and user.target in _RELUS
    if not (is_function or _is_module(user, modules, nn.ReLU)):
        raise _NoChain(f"followed by {_name(user, modules)}")
    if any(part.meta["context"] != norm.meta["context"] for part in (dropout, sum_node, user) if part is not None):
        raise _NoChain("what follows runs under another grad mode, autocast, checkpoint or saved-tensor hook")
    return Match(norm, dropout, dropout_p, training, sum_node, user)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    while (first := first.next) is not last:
        yield first


def _check_statistics(norm: fx.Node, sum_node: fx.Node, modules: dict[str, nn.Module]) -> None:
    """The norm is to be called where the sum is: nothing before may see or move its running statistics."""
    buffers = {f"{norm.target}.{name}" for name, _ in modules[str(norm.target)].named_buffers()}
    if any(node.op == "get_attr" and node.target in buffers for node in norm.graph.nodes):
        raise _NoChain("its running statistics are used where it is called")
    if buffers and any(node.target == norm.target for node in _between(norm, sum_node)):
        raise _NoChain("it is called again before the sum behind it")


def _check_fusible(norm: fx.Node, modules: dict[str, nn.Module]) -> None:
    module = modules[str(norm.target)]
    kind = type(module)
    if isinstance(module, FusedLayer):
        raise _NoChain("already fused")
    if kind not in FUSIBLE:
        raise _NoChain(f"there is no fused {kind.__name__}")
    if len(norm.args) != 1 or norm.kwargs or "forward" in vars(module):
        raise _NoChain("called in an unusual way")


def _only_user(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node:
    if len(node.users) != 1:
        raise _NoChain(f"the output of {_name(node, modules)} is used {len(node.users)} times")
    if "stored" in node.meta:
        raise _NoChain(f"the output of {_name(node, modules)} is stored in an attribute")
    return next(iter(node.users))


def _is_module(node: fx.Node, modules: dict[str, nn.Module], kind: type[nn.Module]) -> bool:
    if node.op != "call_module":
        return False
    module = modules[str(node.target)]
    return type(module) is kind and "forward" not in vars(module)


def _dropout_arguments(node: fx.Node) -> tuple[float, Any]:
    def bind(
        input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False, train: Any = None
    ) -> tuple[Any, Any]:
        return p, training if train is None else train

    p, training = bind(*node.args, **node.kwargs)
    if isinstance(p, fx.Node):
        raise _NoChain("the probability of the dropout behind it is computed")
    return float(p), training


def _check_sum(sum_node: fx.Node, node: fx.Node) -> None:
    if len(sum_node.args) != 2 or sum_node.kwargs:
        raise _NoChain("the sum behind it has further arguments")
    first, second = sum_node.args
    residual = second if first is node else first
    if not isinstance(residual, fx.Node) or residual is node:
        raise _NoChain("the sum behind it does not add a tensor")
    if sum_node.target in SUMS_IN_PLACE and first is not node:
        raise _NoChain("the sum behind it changes the other tensor in place")
    shape, other = node.meta.get("shape"), residual.meta.get("shape")
    if shape is not None and shape != other:
        raise _NoChain(f"the sum behind it broadcasts {tuple(shape)} and {None if other is None else tuple(other)}")


def _may_write(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the node may change one of its inputs."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        known = type(module).__module__.startswith("torch.nn.") and not any(module.children())
        return not known or getattr(module, "inplace", False)
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        target = node.target
        overloads = [target] if isinstance(target, OpOverload) else [getattr(target, n) for n in target.overloads()]
        return any(overload._schema.is_mutable for overload in overloads)
    if node.op == "call_function" and not str(getattr(node.target, "__module__", "torch")).startswith(_KNOWN_FUNCTIONS):
        return True
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or node.target in IN_PLACE_OPERATORS
        or any(argument is True for argument in (*node.args, node.kwargs.get("inplace")))
        or "out" in node.kwargs
    )


def _name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    return "the output" if node.op == "output" else getattr(node.target, "__name__", str(node.target))


def _describe(match: Match, root: str, findings: Findings) -> Chain:
    def path(node: fx.Node | None) -> str | None:
        return None if node is None or node.op != "call_module" else findings.path(root, str(node.target))

    nodes = [node for node in (match.norm, match.dropout, match.sum, match.relu) if node is not None]
    scopes = [_scope(node) for node in nodes]
    depth = 0
    while all(len(scope) > depth for scope in scopes) and len({scope[depth][0] for scope in scopes}) == 1:
        depth += 1
    dropout = mode = path(match.dropout)
    if match.dropout is not None and dropout is None:
        mode = findings.path(root, _innermost(_scope(match.dropout)))
    return Chain(
        norm=findings.path(root, str(match.norm.target)),
        dropout_p=match.dropout_p,
        dropout=dropout,
        dropout_mode=mode,
        summed=match.sum is not None,
        relu=path(match.relu),
        owner=findings.path(root, _innermost(scopes[0][:depth])),
        opened=frozenset(findings.path(root, path) for scope in scopes for _, path in scope[depth:]),
    )


def _innermost(scope: list[tuple[str, str]]) -> str:
    return scope[-1][1] if scope else ""


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
