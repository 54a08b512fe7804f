"""Finds norm [-> dropout] [-> + residual] -> activation chains in traced forwards, and replaces each by one call."""

import copy
import operator
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.passes.shape_prop import ShapeProp

from ..activations import Activation
from .copying import scratch_copy
from .parts import (
    IN_PLACE_OPERATORS,
    NORMS,
    SUMS,
    SUMS_IN_PLACE,
    NoChain,
    activation_of,
    dropout_of,
    is_no_op,
    stock_norm,
)
from .report import class_name
from .tracing import Trace, Traces, first_line

_IDENTITY = Activation("identity")
_OTHER_OPERAND = "the sum after it is fused with the norm of the other operand"
_KNOWN_FUNCTIONS = ("torch", "_operator", "math", "builtins", "None")


@dataclass(eq=False)
class Match:
    """A chain in a graph: its nodes from the norm to the activation, and what they are.

    Attributes:
        inside: the paths of the modules whose forwards contain a part of it.
        mode: the path of the module whose mode its dropout follows.
    """

    nodes: list[fx.Node]
    activation: Activation = _IDENTITY
    dropout_p: float = 0.0
    mode: str | None = None
    sums: list[fx.Node] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)

    @property
    def residuals(self) -> list[Any]:
        """What the sums add, in the current state of the graph."""
        return [next((a for a in node.args if a not in self.nodes), None) for node in self.sums]

    @property
    def members(self) -> list[str]:
        """The paths of its modules."""
        return [str(node.target) for node in self.nodes if node.op == "call_module"]


class Chains:
    """The chains of one forward, in a copy of its graph in which calls may be inlined.

    Args:
        trace: trace of the forward.
        traces: traces of all forwards.
        inside: the paths of the modules to inline; None for all that may return the output of a norm.
        norms: the norms to consider; None for all.
    """

    def __init__(
        self,
        trace: Trace,
        traces: Traces,
        inside: Collection[str] | None = None,
        norms: Collection[nn.Module] | None = None,
    ) -> None:
        self.trace, self.traces = trace, traces
        self.graph = copy.deepcopy(trace.graph)
        self.branches = set(trace.branches)
        self.modules = dict(trace.module.named_modules(remove_duplicate=False))
        self.found: dict[fx.Node, Match | NoChain] = {}
        self.fused: set[str] = set()
        self.inlined: set[str] = set()
        pending = list(self.graph.nodes)
        while pending:
            node = pending.pop()
            called = self._trace_of(node)
            if called and called.returns_norm and (inside is None or node.target in inside):
                pending += self._inline(node, called)
        self._match_all(norms)

    def _trace_of(self, node: fx.Node) -> Trace | None:
        """The trace that can replace a call, if any."""
        trace = self.traces.get(self.modules[str(node.target)]) if node.op == "call_module" else None
        return trace if trace is not None and trace.is_single and trace.problem is None else None

    def _inline(self, node: fx.Node, trace: Trace) -> list[fx.Node]:
        """Replaces a call by the nodes of the forward that it calls."""
        called = str(node.target)
        given = trace.call.arguments(node)
        copies: dict[fx.Node, Any] = {}
        with self.graph.inserting_before(node):
            for inner in trace.graph.nodes:
                if inner.op == "placeholder":
                    copies[inner] = given[len(copies)]
                elif inner.op == "output":
                    node.replace_all_uses_with(copies[inner.args[0][0]])
                else:
                    copies[inner] = new = self.graph.node_copy(inner, copies.__getitem__)
                    within = [f"{called}.{path}" for path in new.meta.get("inside", ())]
                    new.meta["inside"] = [*node.meta.get("inside", ()), called, *within]
                    if new.op in ("call_module", "get_attr"):
                        new.target = f"{called}.{new.target}"
        self.graph.erase_node(node)
        self.branches |= {f"{called}.{flag}" for flag in trace.branches}
        return [new for inner, new in copies.items() if inner.op != "placeholder"]

    def _match_all(self, norms: Collection[nn.Module] | None) -> None:
        """Finds the chain of each call of a norm, or why it has none. No two chains share a node."""
        used_sums: set[fx.Node] = set()
        for norm in self.graph.nodes:
            module = self.modules[str(norm.target)] if norm.op == "call_module" else None
            if not isinstance(module, NORMS) or (norms is not None and module not in norms):
                continue
            try:
                match = self._match(norm, module)
                if not used_sums.isdisjoint(match.sums):
                    raise NoChain(_OTHER_OPERAND)
                used_sums.update(match.sums)
                self.found[norm] = match
            except NoChain as reason:
                self.found[norm] = reason.with_traceback(None)  # a traceback would keep the model alive
        for chain in list(self.found.values()):
            for other in chain.residuals if isinstance(chain, Match) else ():
                if isinstance(self.found.get(other), NoChain):
                    self.found[other] = NoChain(_OTHER_OPERAND, "no activation")

    def _match(self, norm: fx.Node, module: nn.Module) -> Match:
        if len(norm.args) != 1 or norm.kwargs or "forward" in vars(module):
            raise NoChain("called with other than one positional argument, or its forward is overridden")
        match = Match([norm])
        while match.activation.name == "identity":
            node = match.nodes[-1]
            if len(node.users) != 1:
                is_chain = any(activation_of(user, self.modules) for user in node.users)
                reason = f"the output of {self._name(node)} is used {len(node.users)} times"
                raise NoChain(reason, "chain" if is_chain else "no activation")
            user = next(iter(node.users))
            called = self._trace_of(user)
            if called and self._begins_with_part(called):
                match.inside.add(str(user.target))
                self._inline(user, called)
                continue
            self._add(match, user)
        if stock_norm(module)[1]:
            raise NoChain("a part of it has hooks")
        for node in match.nodes[:-1]:
            if node.meta.get("stored"):
                raise NoChain(f"the output of {self._name(node)} is stored in an attribute")
        for node, residual in zip(match.sums, match.residuals, strict=True):
            self._check_sum(node, match.nodes[match.nodes.index(node) - 1], residual)
        if any(node.meta["context"] != norm.meta["context"] for node in match.nodes):
            raise NoChain("what follows it runs under another grad mode, autocast, checkpoint or saved-tensor hook")
        if match.sums:
            self._check_between(match)
        self._check_saved(match)
        match.inside.update(*(node.meta.get("inside", ()) for node in match.nodes))
        return match

    def _add(self, match: Match, user: fx.Node) -> None:
        """Adds the next node to a chain."""
        if activation := activation_of(user, self.modules):
            match.activation = activation
        elif match.mode is None and not match.sums and (dropout := dropout_of(user, self.modules)):
            match.dropout_p, training = dropout
            owner = "".join(f"{path}." for path in user.meta.get("inside", ())[-1:])
            match.mode = str(user.target) if training is None else owner.rstrip(".")
            if training is not None and getattr(training, "target", None) != f"{owner}training":
                raise NoChain("the dropout after it does not follow its training mode")
        elif user.op != "call_module" and user.target in SUMS:
            match.sums.append(user)
        elif not is_no_op(user, self.modules):
            raise NoChain(f"followed by {self._name(user)}", "no activation", user.op == "output")
        match.nodes.append(user)

    def _begins_with_part(self, trace: Trace) -> bool:
        """Whether a forward begins with what may follow a norm, so that it is inlined after a norm."""
        first = next(iter(trace.graph.nodes))
        if first.op != "placeholder" or len(first.users) != 1:
            return False
        user, modules = next(iter(first.users)), dict(trace.module.named_modules(remove_duplicate=False))
        called = self.traces.get(modules[str(user.target)]) if user.op == "call_module" else None
        return (
            user.op == "output"
            or activation_of(user, modules) is not None
            or dropout_of(user, modules) is not None
            or is_no_op(user, modules)
            or (user.op != "call_module" and user.target in SUMS)
            or (called is not None and called.is_single and called.problem is None and self._begins_with_part(called))
        )

    def _check_sum(self, sum_node: fx.Node, before: fx.Node, residual: Any) -> None:
        if len(sum_node.args) != 2 or sum_node.kwargs:
            raise NoChain("the sum after it has further arguments")
        if not isinstance(residual, fx.Node):
            raise NoChain("the sum after it does not add a tensor")
        if sum_node.target in SUMS_IN_PLACE and sum_node.args[0] is not before and not self._is_temporary(residual):
            raise NoChain("the sum after it changes the other tensor in place")
        shapes = [getattr(node.meta.get("tensor_meta"), "shape", None) for node in (before, residual)]
        if shapes[0] != shapes[1]:
            first, second = (shape if shape is None else tuple(shape) for shape in shapes)
            raise NoChain(f"the sum after it broadcasts {first} and {second}")

    def _is_temporary(self, node: fx.Node) -> bool:
        """Whether only the one user of a tensor can see an in-place change of it."""
        if len(node.users) != 1 or node.meta.get("stored"):
            return False
        if node.op == "call_module":
            return isinstance(self.modules[str(node.target)], (nn.modules.conv._ConvNd, *NORMS))
        if node.target in SUMS_IN_PLACE:
            return isinstance(node.args[0], fx.Node) and self._is_temporary(node.args[0])
        return node.target in (operator.add, operator.mul)

    def _check_between(self, match: Match) -> None:
        """The call of the norm moves to the sum: nothing in between may change its input or use its statistics."""
        norm = node = match.nodes[0]
        module = self.modules[str(norm.target)]
        buffers = {f"{norm.target}.{name}" for name, _ in module.named_buffers()}
        buffers.discard(f"{norm.target}.training")
        if any(node.op == "get_attr" and node.target in buffers for node in self.graph.nodes):
            raise NoChain("its running statistics are used in the forward that calls it")
        while (node := node.next) is not match.sums[-1]:
            if buffers and node.target == norm.target:
                raise NoChain("it is called again before the sum after it")
            called = self.modules[str(node.target)].modules() if node.op == "call_module" else ()
            if buffers and node is not norm and module in called:
                raise NoChain("a module that contains it is called before the sum after it")
            if node not in match.nodes and self._may_write(node, self.modules):
                raise NoChain("an operation between it and the sum after it may change a tensor in place")

    def _check_saved(self, match: Match) -> None:
        """What the fused operation saves for backward, and torch's own do not, must not change."""
        name, kind = match.activation.name, match.activation.kind
        saved = [match.nodes[-1]] if kind.gradient_from_output and name not in ("identity", "relu") else []
        if not kind.gradient_from_output:
            saved += [node for node in match.residuals if isinstance(node, fx.Node)]
        for node in saved:
            if any(user not in match.nodes and self._writes(user, node) for user in node.users):
                raise NoChain(f"the output of {self._name(node)}, which is kept for backward, is changed in place")

    def _writes(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether a user of a node may change it, other than inside another forward."""
        if user.op == "call_module":
            return bool(getattr(self.modules[str(user.target)], "inplace", False))
        return user.args[:1] == (node,) and self._may_write(user, self.modules)

    def _may_write(self, node: fx.Node, modules: dict[str, nn.Module]) -> bool:
        """Whether the node may change one of its inputs."""
        target: Any = node.target
        if node.op == "call_module":
            module = modules[target]
            if (trace := self.traces.get(module)) is not None:
                inner = dict(module.named_modules(remove_duplicate=False))
                return bool(trace.changed.context) or any(self._may_write(node, inner) for node in trace.graph.nodes)
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

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({class_name(self.modules[str(node.target)])})"
        return "the output" if node.op == "output" else getattr(node.target, "__name__", str(node.target))

    def own(self) -> list[Match]:
        """The chains that do not lie within one inlined forward."""
        matches = [match for match in self.found.values() if isinstance(match, Match)]
        return [m for m in matches if not set.intersection(*({*node.meta.get("inside", ())} for node in m.nodes))]

    def fuse(self) -> None:
        """Replaces each chain by one call: at its norm, or at its sum, where the residual is known."""
        for match in self.found.values():
            if isinstance(match, NoChain):
                continue
            norm, residuals = match.nodes[0], match.residuals
            self.fused.update(match.members)
            self.inlined |= match.inside
            with self.graph.inserting_before(match.sums[-1] if match.sums else norm):
                while len(residuals) > 1:
                    residuals[:2] = [self.graph.call_function(operator.add, tuple(residuals[:2]))]
                in_place = any(node.target in SUMS_IN_PLACE and node.args[0] in match.nodes for node in match.sums[-1:])
                options: Any = {"_in_place": in_place}
                layer = self.graph.create_node("call_module", norm.target, (norm.args[0], *residuals), options)
            match.nodes[-1].replace_all_uses_with(layer)
            for node in reversed(match.nodes):
                self.graph.erase_node(node)
        for node in reversed(self.graph.nodes):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)


def record_shapes(model: nn.Module, traces: Traces, example_inputs: tuple[Any, ...]) -> None:
    """Runs the model, and records the shapes of its values in the traces of its forwards."""
    scratch = scratch_copy(model)
    try:
        with torch.no_grad():
            scratch(*example_inputs)  # without ShapeProp, which prints a traceback on failure
    except Exception as error:
        raise ValueError(f"the model does not run on example_inputs: {first_line(error)}") from error
    for traced, module in zip(traces.paths, scratch.modules(), strict=True):
        module.register_forward_pre_hook(_ShapeRecorder(traces.get(traced)), with_kwargs=True)
    with torch.no_grad():
        scratch(*example_inputs)


@dataclass
class _ShapeRecorder:
    """Records the shapes of the values in a forward at its first call."""

    trace: Trace | None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        trace, self.trace = self.trace, None
        if trace and (tensors := trace.call.tensors(args, kwargs)) is not None:
            ShapeProp(fx.GraphModule(module, trace.graph)).propagate(*tensors)
