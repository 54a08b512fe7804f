"""Converts models: fuse replaces norm, dropout, sum and activation by fused layers; unfuse undoes it.

Both copy the model's modules, share its parameters and buffers, and change classes in the copy: a norm becomes a fused
layer, the module whose forward has the chain gets a forward that was traced by torch.fx and edited, and activation and
dropout modules that are no longer called are marked. Paths, parameters, buffers, hooks and attributes stay in place.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..activations import Activation
from ..modules import FusedLayer
from .chains import Chains, Match, record_shapes
from .copying import copy_structure, has_hooks, scratch_copy
from .forwards import TracedForward, replace_forward, restore_forward
from .parts import (
    FUSED,
    FUSED_BATCH_NORMS,
    NORMS,
    STOCK,
    NoChain,
    stock_norm,
)
from .report import FusedChain, FusionReport, LeftAlone, class_name
from .tracing import CALLS_DIFFER, Call, Traces

if TYPE_CHECKING:
    from .report import FusedModel


def fuse(
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> "FusedModel":
    """Fuses each norm [-> dropout] [-> + residual] -> activation of a model into one operation.

    The result shares the parameters and buffers of `model`, which is not changed: train only one of them. Paths,
    state_dict keys, modes, hooks and existing optimizers stay valid. A chain is fused only if torch.fx shows that
    nothing else uses the norm's output. `result.fusion_report`, a `FusionReport`, lists what was fused, and why the
    rest was not. Python values that forwards read, other than tensors and the `training` of modules of the model, must
    not change afterwards.

    A forward that has a chain is replaced by a traced one. The original forward still runs for calls unlike the traced
    one, such as other values of arguments with a default, and after children of the module were added or removed or
    fused parts replaced. Sums are fused if both operands have the same shape and dtype, which each call checks. A
    dropout in a chain keeps its p and follows the norm's mode. Under CUDA autocast, stock layer and group norms return
    float32, fused ones the input's dtype. No other thread may run a model during the call, because torch.fx patches
    nn.Module. See docs/fuse.md.

    Args:
        model: any module, before it is wrapped (DistributedDataParallel) or compiled.
        example_inputs: the positional arguments of one call; sums that broadcast in it are left alone.
        process_group: compute the statistics of all batch norms, fused or not, over its processes; all must call fuse.

    Returns:
        A module of the same class, with the attribute `fusion_report`.

    Raises:
        TypeError: `model` is not a module, or is a wrapped or compiled one; process_group is not a ProcessGroup; a
            batch norm of an unknown class cannot be synchronised.
        ValueError: the model does not run on `example_inputs`; the processes have different batch norms.
        RuntimeError: the modules cannot be copied; process_group is given, but torch.distributed is not initialised.
    """
    _check_model(model)
    if process_group is not None and not isinstance(process_group, ProcessGroup):
        raise TypeError(f"process_group must be a ProcessGroup or None, got {type(process_group).__name__}")
    if process_group is not None and not dist.is_initialized():
        raise RuntimeError("process_group requires torch.distributed: call torch.distributed.init_process_group first")
    result = copy_structure(model)
    kinds = {path: class_name(module) for path, module in result.named_modules()}
    left: dict[str, NoChain] = dict.fromkeys(
        _frozen_norms(result), NoChain("train() of the model leaves it in eval mode")
    )
    fused = {path: chain for path in kinds if (chain := _fuse_own_epilogue(path, result, left)) is not None}
    traces = [Traces(result, mode=False)]
    if any(trace.branches for trace in traces[0].values()):
        traces.append(Traces(result, mode=True))
    if example_inputs is not None:
        inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
        record_shapes(result, traces[0], inputs)
    chains = _find_chains(result, traces, {*fused, *left}, left)
    forwards, absorbed = _rewrite_forwards(result, traces, chains)
    for path, chain in chains.items():
        _fuse_norm(result.get_submodule(path), *chain.kind, in_forward=True)
    for path, norms in absorbed.items():
        _absorb(result.get_submodule(path), norms)
    for path, forward in forwards.items():
        replace_forward(result.get_submodule(path), forward)
    if process_group is not None:
        _synchronise(result, process_group)
    fused |= chains
    report = FusionReport(
        tuple(
            FusedChain(path, kinds[path], p, chain.has_sum, str(activation), chain.owner)
            for path in kinds
            if (chain := fused.get(path))
            for activation, p in [chain.kind]
        ),
        tuple(LeftAlone(path, kinds[path], str(left[path]), left[path].status) for path in kinds if path in left),
    )
    fused_model: Any = result
    vars(fused_model)["fusion_report"] = report
    return fused_model


def unfuse(model: nn.Module) -> nn.Module:
    """Converts fused layers back to stock modules, and undoes what fuse changed.

    A fused layer that fuse did not create becomes an `UnfusedLayer` of stock modules. The result shares the parameters
    and buffers of `model`, which is not changed. The state_dict keys stay the same. Statistics over a process group
    become those of one process.

    Raises:
        TypeError: `model` is not a module, or is a wrapped or compiled one.
        RuntimeError: the modules cannot be copied, or a fused layer has an unknown class.
    """
    _check_model(model)
    result = copy_structure(model)
    vars(result).pop("fusion_report", None)
    for path, module in list(result.named_modules()):
        restore_forward(module)
        if isinstance(module, Absorbed):
            del module.norms
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
        raise TypeError(
            "model must be fused or unfused before it is wrapped or compiled: pass the module inside, not "
            f"{type(model).__name__}"
        )


def _frozen_norms(model: nn.Module) -> list[str]:
    """The norms that a train() of the model's own keeps in eval mode. It may look for stock classes, so fuse none."""
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return []
    trained = scratch_copy(model)
    for module in trained.modules():  # a train() may merge weights
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter):
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    try:
        trained.train()
    except Exception:  # such as one with further arguments
        return []
    return [path for path, module in trained.named_modules() if isinstance(module, NORMS) and not module.training]


def _fuse_own_epilogue(path: str, model: nn.Module, left: dict[str, NoChain]) -> "_Chain | None":
    """Converts a norm that applies dropout and activation itself, for which no trace is needed."""
    module = model.get_submodule(path)
    if not isinstance(module, NORMS) or not module._modules or path in left:
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
    return _Chain(epilogue)


@dataclass
class _Chain:
    """A chain of a model: its activation and dropout probability; the path of the module whose forward has it."""

    kind: tuple[Activation, float]
    has_sum: bool = False
    owner: str | None = None


def _find_chains(model: nn.Module, traces: list[Traces], done: set[str], left: dict[str, NoChain]) -> dict[str, _Chain]:
    """The norms that begin a chain of the same kind in every call; adds to `left` why the others do not."""
    found: dict[str, list[NoChain | _Chain]] = {}
    returned: dict[str, NoChain] = {}
    calls: dict[str, Call] = {}
    for each in traces:
        called = {module for caller, trace in each.items() for module in each.called(trace.graph, caller)}
        for module, trace in each.items():
            if not calls.setdefault(each.paths[module], trace.call).is_like(trace.call):
                trace.problem = CALLS_DIFFER
            chains = Chains(trace, each, inside=None if trace.problem is None else ())
            trace.returns_norm = any(isinstance(what, NoChain) and what.is_returned for what in chains.found.values())
            for node, what in chains.found.items():
                path = each.paths[chains.modules[str(node.target)]]
                if isinstance(what, Match):
                    found.setdefault(path, []).append(_check_match(what, chains, model))
                elif what.is_returned and trace.problem is None and module in called:
                    returned[path] = what  # the callers show what follows
                else:
                    found.setdefault(path, []).append(what)
    chains_of: dict[str, _Chain] = {}
    for path, module in model.named_modules():
        if path in done:
            continue
        if not isinstance(module, NORMS):
            if "running_var" in module._buffers:  # such as torchvision's FrozenBatchNorm2d
                left[path] = NoChain(f"there is no fused {class_name(module)}", "unknown")
            continue
        each_call = found.get(path, [returned[path]] if path in returned else [])
        refusals = [call for call in each_call if isinstance(call, NoChain)]
        matches = [call for call in each_call if isinstance(call, _Chain)]
        if isinstance(module, FusedLayer):
            left[path] = NoChain("already fused", "already fused")
        elif refusals:
            left[path] = refusals[0]
        elif not matches:
            left[path] = NoChain(_why_not_called(path, traces), "unknown")
        elif len({match.kind for match in matches}) > 1:
            left[path] = NoChain("called in several places with different chains")
        else:
            chains_of[path] = matches[0]
    return chains_of


def _check_match(match: Match, chains: Chains, model: nn.Module) -> NoChain | _Chain:
    """The chain of a match, or why it cannot be fused."""
    paths = chains.traces.paths
    owner = paths[chains.trace.module]
    if chains.trace.problem is not None:
        return NoChain(f"the forward of {owner or 'the model'} cannot be rewritten: {chains.trace.problem}")
    modules = {path: model.get_submodule(paths[chains.modules[path]]) for path in [*match.members, *match.inside]}
    hooked = [path for path in modules if has_hooks(modules[path])]
    if hooked:
        return NoChain(f"{hooked[0]} has hooks")
    if match.mode is not None:
        mode = model.get_submodule(paths[chains.modules[match.mode]])
        if mode.training != modules[match.members[0]].training:
            return NoChain("the dropout after it is in another mode")
    return _Chain((match.activation, match.dropout_p), bool(match.sums), owner)


def _why_not_called(path: str, traces: list[Traces]) -> str:
    reasons = {each.paths[module]: reason for each in traces for module, reason in each.untraceable.items()}
    while path:
        path = path.rpartition(".")[0]
        if path in reasons:
            return f"the forward of {path or 'the model'} cannot be traced: {reasons[path]}"
    return "not called by a traced forward"


def _rewrite_forwards(
    model: nn.Module, traces: list[Traces], wanted: dict[str, _Chain]
) -> tuple[dict[str, TracedForward], dict[str, list[str]]]:
    """By path: the new forwards; the activations and dropouts that are no longer called, with their norms."""
    forwards: dict[str, list[Chains | None]] = {}
    absorbed: dict[str, dict[str, None]] = {}
    called: set[str] = set()
    for index, each in enumerate(traces):
        norms = {module for module, path in each.paths.items() if path in wanted}
        callees = {}
        for module, trace in each.items():
            callees[module] = each.called(trace.graph, module)
            own = [] if trace.problem else Chains(trace, each, norms=norms).own()
            if not own:
                continue
            chains = Chains(trace, each, {path for match in own for path in match.inside}, norms)
            for match in chains.found.values():
                if isinstance(match, Match):
                    norm, *parts = (each.paths[chains.modules[path]] for path in match.members)
                    for part in parts:
                        absorbed.setdefault(part, {})[norm] = None
            chains.fuse()
            callees[module] = each.called(chains.graph, module)
            forwards.setdefault(each.paths[module], [None] * len(traces))[index] = chains
        pending = [*each.roots, *(child for module in each.untraceable for child in module.children())]
        while pending:
            module = pending.pop()
            if each.paths[module] not in called:
                called.add(each.paths[module])
                pending += callees.get(module, [])
    return (
        {path: TracedForward.of(model.get_submodule(path), chains) for path, chains in forwards.items()},
        {path: list(norms) for path, norms in absorbed.items() if path not in called},
    )


class Absorbed(nn.Module):
    """Replaces an activation or dropout that is now a part of the fused layers at `norms`.

    Only an original forward calls it, and it computes the same as before.
    """

    absorbed: type[nn.Module]
    norms: list[str]

    def forward(self, input: Tensor) -> Tensor:
        return self.absorbed.forward(self, input)

    def extra_repr(self) -> str:
        return f"{self.absorbed.__name__}, part of {', '.join(self.norms)}"


def _absorb(module: nn.Module, norms: list[str]) -> None:
    vars(module).update(absorbed=type(module), norms=norms)
    module.__class__ = Absorbed


def _fuse_norm(module: Any, activation: Activation, dropout_p: float, in_forward: bool = False) -> None:
    stock, _ = stock_norm(module)
    vars(module)["fused_from"] = type(module)
    module.__class__ = FUSED[stock]
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
    """The stock modules of a fused layer, with the state_dict of the norm."""

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
    for name in [name for name in vars(parts) if "_hook" in name and "state_dict" not in name]:  # of the whole layer
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
    gathered: list[Any] = [None] * process_group.size()
    dist.all_gather_object(gathered, channels, group=process_group)
    for rank, other in enumerate(gathered):
        if other != channels:
            differing = next(path for path in channels | other if channels.get(path) != other.get(path))
            raise ValueError(
                f"all processes must have the same batch norms: {differing} has {channels.get(differing)} channels "
                f"here and {other.get(differing)} in process {rank} of the group"
            )
    for path in channels:
        module = model.get_submodule(path)
        if not isinstance(module, FusedLayer):
            try:
                if stock_norm(module)[1]:
                    raise NoChain("it has its own activation")
            except NoChain as reason:
                raise TypeError(f"{path} cannot be synchronised: it is a {class_name(module)}: {reason}") from reason
            _fuse_norm(module, Activation("identity"), 0.0)
        module.process_group = process_group  # type: ignore[assignment]
