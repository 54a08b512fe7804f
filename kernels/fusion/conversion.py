"""Converts models: fuse puts fused layers where a model has norm, dropout, sum and activation; unfuse undoes it.

Both work on a copy of the model's modules that shares its parameters and buffers, and change classes there: a norm
becomes a fused layer; an activation or dropout module that it takes in becomes a stand-in that passes its input on; a
module whose forward calls functions, or shares one activation, gets a forward that torch.fx has traced and fuse has
edited. All paths, parameters, buffers, hooks and attributes stay where they are.
"""

import operator
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.nn.utils import parametrize

from ..activations import Activation
from ..modules import FusedLayer
from .chains import Chain, Findings, Match, first_line, match_chains
from .parts import (
    FUSED,
    FUSED_BATCH_NORMS,
    NORMS,
    STOCK,
    SUMS_IN_PLACE,
    NoChain,
    stock_norm,
)
from .report import FusedChain, FusionReport, LeftAlone, class_name
from .tracing import Call, Tracer, Untraceable, copy_structure, has_hooks, scratch_copy

if TYPE_CHECKING:
    from .report import FusedModel


def fuse(
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> "FusedModel":
    """The model with each norm [-> dropout] [-> + residual] -> activation as one operation.

    The result shares the parameters and buffers of `model`, which is not changed: train the one or the other. Paths,
    state_dict keys, modes, hooks and optimizers made before stay good. What is not certain is left alone: torch.fx must
    show that the norm's output goes nowhere else. `result.fusion_report`, a `FusionReport`, says what was fused and why
    the rest was not. Python values that forwards read, other than `training` and tensors, must stay as they are.

    A forward that calls functions, sums or a shared activation is replaced by a traced one, for calls like the traced
    one: other values of arguments with a default take the original forward. Sums are fused where both sides have the
    same shape and dtype, which each call checks. A dropout in a chain keeps its p and follows the norm's mode. Under
    CUDA's autocast stock layer and group norms return float32, fused ones the input's dtype. No other thread may run a
    model meanwhile: torch.fx patches nn.Module. See docs/fuse.md.

    Args:
        model: any module, before it is wrapped (DistributedDataParallel) or compiled.
        example_inputs: the arguments of one call, in order; sums that broadcast there are left alone.
        process_group: take the statistics of all batch norms, fused or not, over its processes, all of which must call.

    Returns:
        A module of the same class, with the attribute `fusion_report`.

    Raises:
        TypeError: `model` is not a module, or is a wrapped or compiled one; process_group is not a ProcessGroup; a
            batch norm of an unknown class cannot be synchronised.
        ValueError: the model does not run on `example_inputs`; the processes have batch norms of different channels.
        RuntimeError: the modules cannot be copied; process_group is given and torch.distributed not initialised.
    """
    _check_model(model)
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}")
    if process_group is not None and not dist.is_initialized():
        raise RuntimeError("process_group must be alive: call torch.distributed.init_process_group first")
    result = copy_structure(model)
    kinds = {path: class_name(module) for path, module in result.named_modules()}
    findings = Findings(result)
    left: dict[str, NoChain] = {}
    fused = {path: chain for path in kinds if (chain := _fuse_own_epilogue(path, result, left)) is not None}
    findings.find("", (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs)
    chains = _certain_chains(findings, {*fused, *left}, left)
    forwards, simple = _rewrite_forwards(findings, chains, left)
    for norm, chain in chains.items():
        _fuse_norm(result.get_submodule(norm), chain.kind[0], chain.kind[1], norm not in simple)
    for path in dict.fromkeys(path for path, _ in findings.uses):
        norms = dict.fromkeys(chain.norm if chain else "" for used, chain in findings.uses if used == path)
        module = result.get_submodule(path)
        if chains.keys() >= norms.keys() and (isinstance(module, nn.Dropout) or simple >= norms.keys()):
            _absorb(module, list(norms), passes_on=simple >= norms.keys())
    for path, forward in forwards.items():
        module = result.get_submodule(path)
        vars(module)["traced_forward"] = forward
        module.__class__ = _with_traced_forward(type(module))
    if process_group is not None:
        _synchronise(result, process_group)
    owners = {norm: chain.owner for norm, chain in chains.items() if norm not in simple}
    fused |= chains
    report = FusionReport(
        tuple(
            FusedChain(path, kinds[path], p, has_sum, str(activation), owners.get(path))
            for path in kinds
            if path in fused
            for activation, p, has_sum in [fused[path].kind]
        ),
        tuple(LeftAlone(path, kinds[path], str(left[path]), left[path].status) for path in kinds if path in left),
    )
    fused_model: Any = result
    vars(fused_model)["fusion_report"] = report
    return fused_model


def unfuse(model: nn.Module) -> nn.Module:
    """The model with stock modules again: what fuse made is undone.

    A fused layer made by hand becomes an `UnfusedLayer` of stock modules. The result shares the parameters and buffers
    of `model`, which is not changed. State_dict keys stay as they are. Statistics over a process group become those of
    one process.

    Raises:
        TypeError: `model` is not a module, or is a wrapped or compiled one.
        RuntimeError: the modules cannot be copied, or a fused layer is of a class that is not known.
    """
    _check_model(model)
    result = copy_structure(model)
    vars(result).pop("fusion_report", None)
    for path, module in list(result.named_modules()):
        if "traced_forward" in vars(module):
            del vars(module)["traced_forward"]
            module.__class__ = vars(type(module))["original"]
        elif isinstance(module, Absorbed):
            del module.norms, module.passes_on
            module.__class__ = vars(module).pop("absorbed")
        elif isinstance(module, FusedLayer):
            _unfuse_norm(path, module)
    return result


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    compiled = hasattr(model, "_orig_mod") or any(
        isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl for module in model.modules()
    )
    if compiled or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(f"model must be fused before it is wrapped or compiled, got {type(model).__name__}")


def _fuse_own_epilogue(path: str, model: nn.Module, left: dict[str, NoChain]) -> Chain | None:
    """Converts a norm that applies dropout and activation itself, which takes no trace."""
    module = model.get_submodule(path)
    if not isinstance(module, NORMS) or not module._modules:
        return None
    try:
        epilogue = stock_norm(module)[1]
        if any(map(has_hooks, module.children())):
            raise NoChain("a part of it has hooks")
    except NoChain as reason:
        left[path] = reason.with_traceback(None)
        return None
    if epilogue is None:
        return None
    _fuse_norm(module, *epilogue)
    for child in module.children():
        if not isinstance(child, nn.Identity):
            _absorb(child, [path])
    return Chain(path, (*epilogue, False))


def _certain_chains(findings: Findings, done: set[str], left: dict[str, NoChain]) -> dict[str, Chain]:
    """The norms that begin one and the same chain at every call; adds to `left` why the others do not."""
    model, chains = findings.model, {}
    for path, module in model.named_modules():
        if path in done:
            continue
        if not isinstance(module, NORMS):
            if "running_var" in module._buffers:  # such as torchvision's FrozenBatchNorm2d
                left[path] = NoChain(f"there is no fused {class_name(module)}", "unknown")
            continue
        calls = findings.norms.get(path, [])
        refusals = [call for call in calls if isinstance(call, NoChain)]
        found = {call for call in calls if isinstance(call, Chain)}
        if isinstance(module, FusedLayer):
            left[path] = NoChain("already fused", "already fused")
        elif refusals:
            left[path] = refusals[0]
        elif len(found) > 1:
            left[path] = NoChain("called in several places, which differ")
        elif not found:
            left[path] = NoChain(_why_not_called(path, findings), "unknown")
        else:
            chain = found.pop()
            parts = (*chain.members, *sorted(chain.opened))
            hooked = [at for at in parts if has_hooks(model.get_submodule(at))]
            if hooked:
                left[path] = NoChain(f"{hooked[0]} has hooks")
            elif model.get_submodule(chain.mode).training != module.training:
                left[path] = NoChain("the dropout behind it is in another mode")
            else:
                chains[path] = chain
    return chains


def _why_not_called(path: str, findings: Findings) -> str:
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        if parent in findings.untraceable:
            return f"the forward of {parent or 'the model'} cannot be traced: {findings.untraceable[parent]}"
    return "not called by a forward that is traced"


def _users(model: nn.Module, first_path: dict[nn.Module, str]) -> dict[str, set[str]]:
    """For each module, the modules it is a child of: those that have a forward which may call it."""
    users: dict[str, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        parent = path.rpartition(".")[0]
        while parent and type(model.get_submodule(parent)).forward is nn.Module.forward:
            parent = parent.rpartition(".")[0]
        users.setdefault(first_path[module], set()).add(first_path[model.get_submodule(parent)])
    return users


def _rewrite_forwards(
    findings: Findings, chains: dict[str, Chain], left: dict[str, NoChain]
) -> tuple[dict[str, "TracedForward"], set[str]]:
    """The forwards to put in, by path, and the norms of the chains that need none.

    These are sequences of modules, of which no part is used for anything else. Chains that cannot be had move from
    `chains` to `left`.
    """
    users = _users(findings.model, findings.first_path)
    while True:
        simple = {
            norm
            for norm, chain in chains.items()
            if chain.of_modules
            and not any(call.needs_guard for path in (chain.owner, *chain.opened) for call in findings.calls(path))
            and all(
                user in findings.tracers or _is_sequence_of(findings.model.get_submodule(user), user, chain)
                for path in chain.members
                for user in users[path]
            )
        }
        while divided := {
            chain.norm
            for norm in simple
            for chain in [chains[norm]]
            if any(path in chain.members and (use is None or use.norm not in simple) for path, use in findings.uses)
        }:
            simple -= divided
        forwards: dict[str, TracedForward] = {}
        failed: dict[str, NoChain] = {}
        for owner in dict.fromkeys(chain.owner for norm, chain in chains.items() if norm not in simple):
            wanted = {norm: chain for norm, chain in chains.items() if norm not in simple}
            try:
                forwards[owner] = _rewrite(findings, owner, wanted)
            except Exception as error:  # whatever a forward raises when it is traced
                reason = f"the forward of {owner or 'the model'} cannot be rewritten: {first_line(error)}"
                failed |= {norm: NoChain(reason) for norm, chain in wanted.items() if chain.owner == owner}
        if not failed:
            return forwards, simple
        for norm in failed:
            del chains[norm]
        left |= failed


def _is_sequence_of(module: nn.Module, path: str, chain: Chain) -> bool:
    """Whether the module, if it is ever called, calls the whole chain: its parts are called one by one elsewhere."""
    return type(module) is nn.Sequential and all(member.rpartition(".")[0] == path for member in chain.members)


def _rewrite(findings: Findings, owner: str, wanted: dict[str, Chain]) -> "TracedForward":
    """The forward of a module with one call for each chain in it, of those that are wanted."""
    module, kind = findings.model.get_submodule(owner), type(findings.model.get_submodule(owner))
    if hasattr(kind, "__deepcopy__") or kind.__reduce__ is not object.__reduce__:
        raise Untraceable(f"{class_name(module)} copies itself in its own way")
    own = {norm: chain for norm, chain in wanted.items() if chain.owner == owner}
    inside = {findings.first_path[child]: path for path, child in module.named_modules()}
    opened = {path for chain in own.values() for path in chain.opened}
    if not inside.keys() >= {*own, *opened}:
        raise Untraceable("it calls modules that are not its own")
    calls = findings.calls(owner)
    for call in calls:
        call.check()
    if any((call.structure, call.leaves) != (calls[0].structure, calls[0].leaves) for call in calls):
        raise Untraceable("it is called with different arguments")
    if any(at in tracer.returns_more for path in (owner, *opened) for tracer, at in findings.tracers[path]):
        raise Untraceable("a module it calls returns something else than a tensor")
    seen = {path: [tracer.passes_on.get(at) for tracer, at in of] for path, of in findings.tracers.items()}
    expected = {inside[norm]: chain for norm, chain in wanted.items() if norm in inside}
    graphs, branches = [], set[str]()
    for mode in (False, True):
        tracer = Tracer({inside[path] for path in opened}, mode=mode)
        graphs.append(tracer.trace(scratch_copy(module), calls[0]))
        branches |= tracer.branches
        tracer.passes_on = {inside[path]: all(each) for path, each in seen.items() if path in inside}
        fused = set()
        for norm, match in match_chains(tracer, expected.keys()):
            chain = expected[str(norm.target)]
            if isinstance(match, Match) and match.kind == chain.kind:
                _fuse_nodes(tracer.graph, match)
                fused.add(chain.norm)
        if not fused >= own.keys():
            raise Untraceable("it is another by itself than in the model")
        for node in reversed(tracer.graph.nodes):
            if node.op == "get_attr" and not node.users:
                tracer.graph.erase_node(node)
        if not branches:
            break
    return TracedForward.of(graphs, sorted(branches), calls[0])


def _fuse_nodes(graph: fx.Graph, match: Match) -> None:
    """Puts one call in the chain's place: where the norm is, or the sum, before which the residual may not be there."""
    norm, residuals = match.nodes[0], match.residuals
    with graph.inserting_before(match.sums[-1] if match.sums else norm):
        while len(residuals) > 1:
            residuals[:2] = [graph.call_function(operator.add, tuple(residuals[:2]))]
        options: dict[str, Any] = {"_in_place": bool(match.sums) and match.sums[-1].target in SUMS_IN_PLACE}
        layer = graph.create_node("call_module", norm.target, (norm.args[0], *residuals), options)
    match.nodes[-1].replace_all_uses_with(layer)
    for node in reversed(match.nodes):
        graph.erase_node(node)


@dataclass(frozen=True)
class _Number:
    """Stands for the node of this number."""

    value: int


class TracedForward:
    """A forward in the place of another, for calls that are like the traced one.

    Made of a graph's nodes, with numbers for those that they refer to: pickle would recurse through the nodes. Where it
    branches on training flags there are two graphs, for when all of these are off and on.
    """

    def __init__(self, graphs: list[list[tuple[str, Any, Any, Any]]], branches: list[str], call: Call) -> None:
        self.graphs, self.branches, self.call = graphs, branches, call
        self.compute = [_generate(steps) for steps in graphs]

    @classmethod
    def of(cls, graphs: list[fx.Graph], branches: list[str], call: Call) -> "TracedForward":
        all_steps = []
        for graph in graphs:
            numbers: dict[fx.Node, Any] = {node: _Number(i) for i, node in enumerate(graph.nodes)}
            arguments = [fx.node.map_arg((node.args, node.kwargs), numbers.__getitem__) for node in graph.nodes]
            all_steps.append([(node.op, node.target, *each) for node, each in zip(graph.nodes, arguments, strict=True)])
        return cls(all_steps, branches, call)

    def choose(self, module: nn.Module) -> Any:
        """The function to call, None where none is for these training flags."""
        modes = {operator.attrgetter(flag)(module) for flag in self.branches}
        return None if len(modes) > 1 else self.compute[int(True in modes)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedForward":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return TracedForward, (self.graphs, self.branches, self.call)


def _generate(steps: list[tuple[str, Any, Any, Any]]) -> Any:
    """A function of the module and tensors; GraphModule generates it, what it calls is looked up in the module."""
    graph, nodes = fx.Graph(), list[fx.Node]()
    for op, target, *arguments in steps:
        args, kwargs = fx.node.map_aggregate(arguments, lambda a: nodes[a.value] if isinstance(a, _Number) else a)
        nodes.append(graph.create_node(op, target, args, kwargs))
    names = [str(node.target) for node in nodes if node.op in ("call_module", "get_attr")]
    return type(fx.GraphModule(dict.fromkeys(names), graph)).forward


def _with_traced_forward(original: type[nn.Module]) -> type[nn.Module]:
    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = self.traced_forward.call.tensors(args, kwargs)
        compute = self.traced_forward.choose(self)
        if tensors is None or compute is None:
            return original.forward(self, *args, **kwargs)
        return compute(self, *tensors)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _new_with_traced_forward, (original,), *object.__reduce_ex__(self, protocol)[2:]

    members = {"forward": forward, "original": original, "__reduce_ex__": reduce, "__module__": original.__module__}
    return type(original.__name__, (original,), members)


def _new_with_traced_forward(original: type[nn.Module]) -> nn.Module:
    return object.__new__(_with_traced_forward(original))


class Absorbed(nn.Identity):
    """Stands where an activation or dropout was that is now a part of the fused layers at `norms`.

    Where these are called by a forward that fuse rewrote, only the original forward calls it: it computes what it did.
    """

    absorbed: type[nn.Module]
    norms: list[str]
    passes_on: bool

    def forward(self, input: Tensor) -> Tensor:
        return input if self.passes_on else self.absorbed.forward(self, input)

    def extra_repr(self) -> str:
        return f"{self.absorbed.__name__}, part of {', '.join(self.norms)}"


def _absorb(module: nn.Module, norms: list[str], passes_on: bool = True) -> None:
    vars(module).update(absorbed=type(module), norms=norms, passes_on=passes_on)
    module.__class__ = Absorbed


def _fuse_norm(module: Any, activation: Activation, dropout_p: float, in_forward: bool = False) -> None:
    vars(module)["fused_from"] = type(module)
    module.__class__ = FUSED[stock_norm(module)[0]]
    module.set_options(dropout_p, activation, "auto")
    module.in_forward = in_forward
    if isinstance(module, FUSED_BATCH_NORMS):
        module.process_group = None


def _unfuse_norm(path: str, module: Any) -> None:
    kind = type(module)
    fused = next(base for base in kind.__mro__ if base in STOCK)
    original = vars(module).get("fused_from")
    if original and parametrize.is_parametrized(module) and kind.__bases__ == (fused,):
        original = type(kind.__name__, (original,), dict(vars(kind)))
    elif kind is not fused:
        raise RuntimeError(f"{path or 'the model'} cannot be unfused: it is a {kind.__name__}, not a {fused.__name__}")
    if original is None:
        _unfuse_by_hand(module, STOCK[fused])
        return
    module.__class__ = original
    for name in ("dropout_p", "activation", "impl", "process_group", "in_forward", "fused_from"):
        vars(module).pop(name, None)


class UnfusedLayer(nn.Sequential):
    """What a fused layer computes, by stock modules; with the state_dict of its norm."""

    norm: nn.Module
    dropout: nn.Module
    activation: nn.Module

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = self.dropout(self.norm(input))
        return self.activation(output if residual is None else output + residual)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.norm.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}norm.{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _unfuse_by_hand(layer: Any, stock: type[nn.Module]) -> None:
    norm, parts = object.__new__(stock), UnfusedLayer()
    vars(norm).update(vars(layer))
    dropout_p, activation = layer.dropout_p, Activation.of(layer.activation)
    for name in ("dropout_p", "activation", "impl", "process_group"):
        vars(norm).pop(name, None)
    for name in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks"):  # around the whole layer
        vars(parts)[name], vars(norm)[name] = vars(norm)[name], vars(parts)[name]
    vars(layer).clear()
    vars(layer).update(vars(parts))
    layer.__class__ = UnfusedLayer
    layer.norm, layer.dropout, layer.activation = norm, nn.Dropout(dropout_p), activation.module()
    layer.train(norm.training)


def _synchronise(model: nn.Module, process_group: ProcessGroup) -> None:
    channels = {}
    for path, module in model.named_modules():
        if isinstance(module, (*FUSED_BATCH_NORMS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            channels[path] = module.num_features
    everywhere: list[Any] = [None] * process_group.size()
    dist.all_gather_object(everywhere, channels, group=process_group)
    for rank, theirs in enumerate(everywhere):
        if theirs != channels:
            differing = next(path for path in channels | theirs if channels.get(path) != theirs.get(path))
            raise ValueError(
                f"all processes must have the same batch norms: {differing} has {channels.get(differing)} channels "
                f"here and {theirs.get(differing)} in process {rank} of the group"
            )
    for path in channels:
        module = model.get_submodule(path)
        if not isinstance(module, FusedLayer):
            try:
                if stock_norm(module)[1]:
                    raise NoChain("it has an activation of its own")
            except NoChain as reason:
                raise TypeError(f"{path} cannot be synchronised: it is a {class_name(module)}: {reason}") from reason
            _fuse_norm(module, Activation("identity"), 0.0)
        module.process_group = process_group  # type: ignore[assignment]
