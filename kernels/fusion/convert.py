"""Converts models: fuse puts the fused layers where a model has their parts, unfuse puts the parts back.

Both work on a copy of the model's modules that shares its parameters and buffers, and change nothing but classes there:
a norm becomes a fused layer, a ReLU or dropout module that it takes in becomes a stand-in that passes its input on, and
a module whose forward calls functions, or shares one ReLU, gets a forward that torch.fx has traced and fuse has edited.
All paths, parameters, buffers, hooks and attributes stay where they are.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup

from ..activations import Activation
from ..functional import ActivationLike
from ..modules import BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d, FusedLayer, GroupNormReLU, LayerNormReLU
from .rewriting import (
    NORMS,
    Forward,
    Model,
    RewritingTracer,
    Rewritten,
    Untraceable,
    check_one_way,
    copy_structure,
    has_hooks,
    keeping_generators,
    scratch_copy,
)
from .search import FUSIBLE, SUMS_IN_PLACE, Chain, Findings, Match, Refusal, find_chains, first_line, match_chains

_FUSED_LAYERS = (BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d, GroupNormReLU, LayerNormReLU)
_FUSED: dict[type[nn.Module], type[FusedLayer]] = dict(zip(FUSIBLE, _FUSED_LAYERS, strict=True))
_STOCK: dict[type[nn.Module], type[nn.Module]] = {fused: stock for stock, fused in _FUSED.items()}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_FUSED_BATCH_NORMS = (BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d)


@dataclass(frozen=True)
class FusedChain:
    """A chain that became one layer."""

    norm: str
    """Where it is: the path of the norm."""
    kind: str
    dropout_p: float
    residual: bool
    """Whether a sum is part of it."""
    rewritten: str | None
    """The path of a module whose forward was rewritten for it, "" for the model itself; None where none was."""


@dataclass(frozen=True)
class LeftAlone:
    """A norm that stays as it is."""

    norm: str
    kind: str
    reason: str


@dataclass(frozen=True)
class FusionReport:
    """What fuse did: every norm of the model is in one of the two lists, in the model's order."""

    fused: tuple[FusedChain, ...]
    left: tuple[LeftAlone, ...]

    def __str__(self) -> str:
        summed = sum(chain.residual for chain in self.fused)
        chains, norms = (
            f"{n} {what}{'s' * (n != 1)}" for n, what in ((len(self.fused), "chain"), (len(self.left), "norm"))
        )
        lines = [f"fused {chains}, {summed} with a sum; left {norms} alone"]
        for chain in self.fused:
            parts = [chain.kind]
            parts += [f"dropout {chain.dropout_p}"] if chain.dropout_p > 0 else []
            parts += ["sum"] if chain.residual else []
            line = f"  {chain.norm}: {' + '.join([*parts, 'ReLU'])}"
            if chain.rewritten is not None:
                line += f", in the forward of {chain.rewritten or 'the model'}"
            lines.append(line)
        lines += [f"  {norm.norm or 'the model'}: {norm.kind} left alone: {norm.reason}" for norm in self.left]
        return "\n".join(lines)


def fuse(
    model: Model,
    *,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Model:
    """The model with each norm [-> dropout] [-> + residual] -> ReLU as one fused layer; computes what `model` computes.

    The result shares the parameters and buffers of `model`, which is not changed: train the one or the other. Paths,
    state_dict keys, modes, hooks and optimizers made before stay good. `result.fusion_report`, a `FusionReport`, says
    what was fused and what was left alone and why. Left alone is whatever is not certain: torch.fx must show that the
    norm's output goes nowhere else, in train and in eval mode. Other Python values that this depends on, such as
    flags, must stay as they are.

    A module whose forward calls F.relu, a sum or a shared ReLU gets a traced forward: Python attributes read there,
    other than `training` and tensors, are as they were. A sum is fused where both sides have the same shape and dtype,
    which is checked at each call; other sums are computed apart. Submodules are taken to be used as traced: calling a
    fused norm by hand gives the whole chain, and a ReLU or dropout taken into it does nothing any more. A dropout that
    is a part of one keeps its p, follows the norm's mode, and is, like the norm, no longer found by its class. Under
    CUDA's autocast stock layer and group norms return float32, fused ones the input's dtype. No other thread may run a
    model meanwhile: torch.fx patches nn.Module to trace.

    Args:
        model: any module, before it is wrapped (DistributedDataParallel) or compiled.
        example_inputs: the arguments of one call, in order; sums that broadcast there are left alone.
        process_group: take the statistics of all batch norms, also of those left alone or fused before, over its
            processes, all of which must call. Before init_process_group, torch.distributed.group.WORLD is None, which
            asks for no synchronisation.

    Returns:
        A module of the same class, with the attribute `fusion_report`.

    Raises:
        TypeError: `model` is not a module, or is a wrapped or compiled one; process_group is not a ProcessGroup; a
            subclass of a batch norm cannot be synchronised.
        ValueError: the model does not run on `example_inputs`; the processes have batch norms of different channels.
        RuntimeError: the modules cannot be copied; process_group is given and torch.distributed not initialised.
    """
    _check_model(model)
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}")
    if process_group is not None and not dist.is_initialized():
        raise RuntimeError("process_group must be alive: call torch.distributed.init_process_group first")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs

    result = copy_structure(model, share_buffers=True)
    for module in result.modules():
        if isinstance(module, _Unfused):
            _turn_into(module, module.fused)
    with keeping_generators():
        findings = find_chains(result, inputs)
        users = _users(result, findings.first_path)
        chains, reasons = _decide(result, users, findings)
        owned, forwards = _rewrite_forwards(result, chains, reasons, users, findings)
    owners = {norm: owner for owner, part in owned.items() for norm in part.norms}
    vars(result)["fusion_report"] = _report(result, chains, owners, reasons)

    for norm, chain in chains.items():
        _fuse_norm(result.get_submodule(norm), chain.dropout_p, "relu")
    for path, norms in _taken_in(result, chains, owners, findings).items():
        _absorb(result.get_submodule(path), norms)
    for path, rewritten in forwards.items():
        _turn_into(result.get_submodule(path), rewritten)
    if process_group is not None:
        _synchronise(result, process_group)
    return result


def unfuse(model: Model) -> Model:
    """The model with stock modules again: what fuse made is undone, and fused layers made by hand become chains of
    torch.nn.functional.

    The result shares the parameters and buffers of `model`, which is not changed. State_dict keys stay as they are.
    Statistics over a process group become those of one process.

    Raises:
        TypeError: `model` is not a module, or is a wrapped or compiled one.
        RuntimeError: the modules cannot be copied.
    """
    _check_model(model)
    result = copy_structure(model, share_buffers=True)
    vars(result).pop("fusion_report", None)
    for module in result.modules():
        if isinstance(module, Rewritten):
            _turn_into(module, module.original)
        elif isinstance(module, Absorbed):
            _restore(module)
        elif type(module) in _STOCK:
            _unfuse_norm(module)
    return result


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    compiled = hasattr(model, "_orig_mod") or any(
        isinstance(module, torch.jit.ScriptModule) or module._compiled_call_impl for module in model.modules()
    )
    if compiled or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise TypeError(f"model must be given before it is wrapped or compiled, got {type(model).__name__}")


def _decide(
    model: nn.Module, users: dict[str, set[str]], findings: Findings
) -> tuple[dict[str, Chain], dict[str, str]]:
    """Which norms are certain to begin one and the same chain at every call, and why the others are not."""
    chains: dict[str, Chain] = {}
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, NORMS):
            if "running_var" in module._buffers:  # such as torchvision's FrozenBatchNorm2d
                reasons[path] = f"there is no fused {type(module).__name__}"
            continue
        calls = findings.calls.get(path, [])
        refusals = [call for call in calls if isinstance(call, str)]
        found = {call for call in calls if isinstance(call, Chain)}
        if refusals or len(found) != 1:
            reasons[path] = refusals[0] if refusals else _why_not_found(path, len(found), module, findings)
            continue
        chain = found.pop()
        reason = _why_not_fused(model, chain, users, findings)
        if reason:
            reasons[path] = reason
        else:
            chains[path] = chain
    return chains, reasons


def _why_not_found(path: str, count: int, module: nn.Module, findings: Findings) -> str:
    if count > 1:
        return "called in several places, which differ"
    if isinstance(module, FusedLayer):
        return "already fused"
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


def _why_not_fused(model: nn.Module, chain: Chain, users: dict[str, set[str]], findings: Findings) -> str | None:
    norm = model.get_submodule(chain.norm)
    if chain.dropout_mode is not None and model.get_submodule(chain.dropout_mode).training != norm.training:
        return "the dropout behind it is in another mode"
    members = [path for path in (chain.norm, chain.dropout, chain.relu) if path is not None]
    for path in (*members, *sorted(chain.opened)):
        if has_hooks(model.get_submodule(path)):
            return f"{path} has hooks"
    for path in members:
        for user in sorted(users[path] - findings.traced):
            return f"{path} is also a part of {user or 'the model'}, whose forward is not traced"
    return None


@dataclass
class _Owned:
    """What a module's rewritten forward takes over."""

    norms: set[str] = field(default_factory=set)
    opened: set[str] = field(default_factory=set)
    """The modules inside whose forward becomes a part of it."""


def _split(chains: dict[str, Chain], users: dict[str, set[str]], findings: Findings) -> dict[str, _Owned]:
    """The chains that need a rewritten forward, by the modules whose forward that is.

    The others are sequences of modules, of which no part is used for anything else.
    """
    simple = {norm for norm, chain in chains.items() if chain.is_of_modules}
    while True:
        shared = {path for path, chain in findings.uses if chain is None or chain.norm not in simple}
        divided = {norm for norm in simple if shared & {chains[norm].dropout, chains[norm].relu}}
        if not divided:
            break
        simple -= divided
    rewritten = {norm: chain for norm, chain in chains.items() if norm not in simple}
    inside: dict[str, set[str]] = {}
    for chain in rewritten.values():
        inside.setdefault(chain.owner, {chain.owner}).update(chain.opened)

    def owners(path: str) -> set[str]:
        """Whose forwards call what the module at `path` calls: of those that open it, and its own."""
        opening = {owner for owner, opened in inside.items() if path != owner and path in opened}
        outer = {found for owner in opening for found in owners(owner)}
        called_elsewhere = users[path] - {user for owner in opening for user in inside[owner]}
        return outer | {path} if not outer or called_elsewhere else outer

    owned: dict[str, _Owned] = {}
    for norm, chain in rewritten.items():
        for owner in sorted(owners(chain.owner)):
            entry = owned.setdefault(owner, _Owned())
            entry.norms.add(norm)
            entry.opened |= inside[chain.owner] - {owner}
    return owned


def _rewrite_forwards(
    model: nn.Module,
    chains: dict[str, Chain],
    reasons: dict[str, str],
    users: dict[str, set[str]],
    findings: Findings,
) -> tuple[dict[str, _Owned], dict[str, type[nn.Module]]]:
    """What is rewritten and as what class, by path. Chains that cannot be had move from `chains` to `reasons`."""
    while True:
        owned_by = _split(chains, users, findings)
        forwards: dict[str, type[nn.Module]] = {}
        failed: dict[str, str] = {}
        for owner, owned in owned_by.items():
            forward = _try_to_rewrite(model, owner, owned, chains, findings)
            if isinstance(forward, type):
                forwards[owner] = forward
            else:
                reason = f"the forward of {owner or 'the model'} cannot be rewritten: {forward}"
                failed |= dict.fromkeys(owned.norms, reason)
        if not failed:
            return owned_by, forwards
        for norm in failed:
            del chains[norm]
        reasons |= failed


def _taken_in(
    model: nn.Module, chains: dict[str, Chain], owners: dict[str, str], findings: Findings
) -> dict[str, list[str]]:
    """The modules that are to be stand-ins, each with the norms of the chains that its uses are parts of.

    Every use of them is a part of a fused chain. A dropout becomes one also where a rewritten forward no longer calls
    it: whoever looks for dropouts, to switch them on, is to find none without effect. Such a ReLU stays as it is.
    """
    norms: dict[str, list[str]] = {}
    for path, chain in findings.uses:
        norms.setdefault(path, []).append(chain.norm if chain else "")
    return {
        path: list(dict.fromkeys(of))
        for path, of in norms.items()
        if chains.keys() >= set(of) and (isinstance(model.get_submodule(path), nn.Dropout) or not owners.keys() & of)
    }


def _try_to_rewrite(
    model: nn.Module, owner: str, owned: _Owned, chains: dict[str, Chain], findings: Findings
) -> type[nn.Module] | str:
    """The class to take, or why there is none."""
    try:
        return _rewrite_forward(model, owner, owned, chains, findings)
    except Exception as error:  # whatever a forward raises when it is traced
        return first_line(error)


def _rewrite_forward(
    model: nn.Module, owner: str, owned: _Owned, chains: dict[str, Chain], findings: Findings
) -> type[nn.Module]:
    """A subclass of the owner's class whose forward has one call for each of the chains in it."""
    module = model.get_submodule(owner)
    check_one_way(module)
    if findings.beyond_tensors & {owner, *owned.opened}:
        raise Untraceable("it is called with something else than tensors, or a module it calls returns something else")
    inside = {findings.first_path[child]: path for path, child in module.named_modules()}
    if not inside.keys() >= owned.norms | owned.opened:
        raise Untraceable("it calls modules that are not its own")
    expected = {inside[norm]: chains[norm] for norm in owned.norms}
    scratch = scratch_copy(module)
    graph = RewritingTracer({inside[path] for path in owned.opened}).trace(scratch)
    modules = dict(scratch.named_modules())
    matches = list(match_chains(graph, modules, expected))
    for match in matches:
        chain = expected[str(match.norm.target)]
        if isinstance(match, Refusal) or (match.dropout_p, match.sum is not None) != (chain.dropout_p, chain.summed):
            raise Untraceable("it is another by itself than in the model")
        if chain.dropout is None and chain.dropout_mode is not None:
            flag = f"{inside[chain.dropout_mode]}.training".lstrip(".")
            if getattr(match.dropout_training, "target", None) != flag:
                raise Untraceable("the dropout in it does not follow the mode")
        _fuse_nodes(graph, match)
    if {match.norm.target for match in matches} != expected.keys():
        raise Untraceable("it is another by itself than in the model")
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return Forward.of(graph).rewrite(type(module))


def _fuse_nodes(graph: fx.Graph, match: Match) -> None:
    """Puts one call in the chain's place: where the norm is, or the sum, before which the residual may not be there."""
    if match.sum is None:
        match.relu.replace_all_uses_with(match.norm)
    else:
        arguments, in_place = (match.norm.args[0], match.residual), match.sum.target in SUMS_IN_PLACE
        with graph.inserting_before(match.sum):
            layer = graph.create_node("call_module", match.norm.target, arguments, {"_in_place": in_place})
        match.relu.replace_all_uses_with(layer)
    for node in (match.relu, match.sum, match.dropout, match.norm):
        if node is not None and not node.users:
            graph.erase_node(node)


class Absorbed(nn.Identity):
    """Stands where a ReLU or dropout was that is now a part of the fused layers at `norms`; unfuse puts it back."""

    absorbed: type[nn.Module]
    norms: list[str]

    def extra_repr(self) -> str:
        return f"{self.absorbed.__name__}, part of {', '.join(self.norms)}"


def _turn_into(module: Any, kind: type[nn.Module]) -> None:
    """Changes the class alone: whatever refers to the module, its parameters or its hooks stays good."""
    module.__class__ = kind


def _absorb(module: nn.Module, norms: list[str]) -> None:
    vars(module).update(absorbed=type(module), norms=norms)
    _turn_into(module, Absorbed)


def _restore(module: Absorbed) -> None:
    del module.norms
    _turn_into(module, vars(module).pop("absorbed"))


def _fuse_norm(module: nn.Module, dropout_p: float, activation: ActivationLike) -> None:
    _turn_into(module, _FUSED[type(module)])
    assert isinstance(module, FusedLayer)
    module.set_options(dropout_p, activation, "auto")
    if isinstance(module, _FUSED_BATCH_NORMS):
        module.process_group = None
    vars(module)["made_by_fuse"] = True


def _unfuse_norm(module: nn.Module) -> None:
    if not vars(module).pop("made_by_fuse", False):
        if isinstance(module, _FUSED_BATCH_NORMS):
            module.process_group = None
        _turn_into(module, _UNFUSED[type(module)])
        return
    _turn_into(module, _STOCK[type(module)])
    for name in ("dropout_p", "activation", "impl", "process_group"):
        vars(module).pop(name, None)


def _synchronise(model: nn.Module, process_group: ProcessGroup) -> None:
    channels = {}
    for path, module in model.named_modules():
        if isinstance(module, (*_FUSED_BATCH_NORMS, *_BATCH_NORMS)):
            if type(module) not in (*_FUSED_BATCH_NORMS, *_BATCH_NORMS):
                raise TypeError(f"{path} cannot be synchronised: it is a {type(module).__name__}")
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
    for module in model.modules():
        if type(module) in _BATCH_NORMS:
            _fuse_norm(module, 0.0, "identity")
        if isinstance(module, _FUSED_BATCH_NORMS):
            module.process_group = process_group


class _Unfused(nn.Module):
    """What every fused layer computes, by the stock norm it is mixed into and torch.nn.functional."""

    fused: ClassVar[type[FusedLayer]]
    dropout_p: float
    activation: ActivationLike

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = F.dropout(super().forward(input), self.dropout_p, self.training)
        if residual is not None:
            output = output + residual
        return Activation.of(self.activation).forward(output)


class _UnfusedBatchNorm1d(_Unfused, nn.BatchNorm1d):
    fused = BatchNormReLU1d


class _UnfusedBatchNorm2d(_Unfused, nn.BatchNorm2d):
    fused = BatchNormReLU2d


class _UnfusedBatchNorm3d(_Unfused, nn.BatchNorm3d):
    fused = BatchNormReLU3d


class _UnfusedGroupNorm(_Unfused, nn.GroupNorm):
    fused = GroupNormReLU


class _UnfusedLayerNorm(_Unfused, nn.LayerNorm):
    fused = LayerNormReLU


_UNFUSED: dict[type[nn.Module], type[nn.Module]] = {
    cls.fused: cls
    for cls in (_UnfusedBatchNorm1d, _UnfusedBatchNorm2d, _UnfusedBatchNorm3d, _UnfusedGroupNorm, _UnfusedLayerNorm)
}


def _report(
    model: nn.Module, chains: dict[str, Chain], owners: dict[str, str], reasons: dict[str, str]
) -> FusionReport:
    fused, left = [], []
    for path, module in model.named_modules():
        kind = type(module).__name__
        if path in chains:
            fused.append(FusedChain(path, kind, chains[path].dropout_p, chains[path].summed, owners.get(path)))
        elif path in reasons:
            left.append(LeftAlone(path, kind, reasons[path]))
    return FusionReport(tuple(fused), tuple(left))
