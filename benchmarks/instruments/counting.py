"""Counts the bytes that kernels read and write: for our launches by formula, for ATen operators by their operands.

Every load and store of a kernel counts, even of the same memory; lanes of one load that share an address count once.
Caches are not modelled.
"""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from mnistnorm.kernels.triton_impl.plans import Kind, Layout, Memory, cdiv

from .chain import Chain
from .interception import CaughtLaunch, launches_caught, planned_for

if TYPE_CHECKING:
    from . import watch


class Kernel(NamedTuple):
    """One launch, or one ATen operator: bytes read and written, by tensor."""

    name: str
    reads: dict[str, int]
    writes: dict[str, int]


Phases = dict[str, list[Kernel]]

# Name suffix for what a kernel, or the kernels behind an operator, read again.
AGAIN = " again"
# What separates the name of an operand and the number of its storage, by which other operators can be found to use it.
NUMBER = " #"


def once(phases: Phases) -> Phases:
    """Counts each tensor of a kernel as read once, as if a cache held them all while the kernel runs."""

    def cached(kernel: Kernel) -> Kernel:
        return kernel._replace(reads={name: size for name, size in kernel.reads.items() if not name.endswith(AGAIN)})

    return {phase: [cached(kernel) for kernel in kernels] for phase, kernels in phases.items()}


def total(kernels: Iterable[Kernel]) -> tuple[int, int]:
    """Returns the bytes read and the bytes written."""
    kernels = list(kernels)
    return sum(sum(k.reads.values()) for k in kernels), sum(sum(k.writes.values()) for k in kernels)


# Our kernels.


def fused(chain: Chain, target: GPUTarget, plan: Kind | None = None, memory: Memory | None = None) -> Phases:
    """Counts the fused chain: its launches by formula, and the ATen operators around them."""
    with Operators() as operators:

        def count(launch: CaughtLaunch) -> None:
            operators.kernels.append(launch_traffic(launch))

        with launches_caught(count):
            return by_phase(chain, "meta", target, plan, operators.take, memory)


def interpreted(chain: Chain, target: GPUTarget, plan: Kind | None = None, memory: Memory | None = None) -> Phases:
    """Runs the launches of the fused chain in Triton's interpreter and counts each access.

    Raises:
        RuntimeError: TRITON_INTERPRET was not set when triton was imported.
    """
    from . import watch

    with watch.watch() as trace:

        def take() -> list[Kernel]:
            kernels = [_traced(launch) for launch in trace.launches]
            trace.launches.clear()
            return kernels

        return by_phase(chain, "cpu", target, plan, take, memory)


def _traced(launch: "watch.Launch") -> Kernel:
    loaded = {name: traffic.loaded for name, traffic in launch.traffic.items() if traffic.loaded}
    stored = {name: traffic.stored for name, traffic in launch.traffic.items() if traffic.stored}
    return Kernel(launch.kernel, loaded, stored)


Taken = TypeVar("Taken")


def by_phase(
    chain: Chain,
    device: str,
    target: GPUTarget,
    plan: Kind | None,
    take: Callable[[], list[Taken]],
    memory: Memory | None = None,
) -> dict[str, list[Taken]]:
    """Returns what `take` returns after the forward and after the backward of the fused chain."""
    with torch.no_grad(), planned_for(target, memory):
        tensors = chain.tensors(device)
        operation = chain.operation(tensors, plan)
        take()
        saved = chain.fused_forward(tensors, operation)
        kernels = take()
        chain.fused_backward(tensors, operation, saved)
        return {"forward": kernels, "backward": take()}


def launches(phases: Phases) -> Phases:
    """Returns the Triton launches only, without the ATen operators."""
    return {phase: [kernel for kernel in kernels if kernel.name in _COUNTS] for phase, kernels in phases.items()}


def launch_traffic(launch: CaughtLaunch) -> Kernel:
    """Returns the exact bytes that one launch reads and writes."""
    name = launch.kernel.__name__
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.constants
    named["programs"] = launch.grid[0]
    count = _COUNTS[name](named)
    reads, writes = (
        {
            parameter: int(times * named[parameter].nbytes)
            for parameter, times in side.items()
            if named[parameter] is not None and times * named[parameter].nbytes
        }
        for side in count
    )
    return Kernel(name, reads, writes)


# How often each tensor is read, and how often written.
Times = int | Fraction
Count = tuple[dict[str, Times], dict[str, Times]]


class _Grid:
    """How often the programs of a launch visit their tensors; see triton_impl/kernels.py."""

    def __init__(self, named: dict[str, Any]) -> None:
        self.named = named
        self.rows = named["rows"]
        layout: Layout = named["LAYOUT"]
        self.channels = named["channel_vectors"] * layout.channel_vector
        self.positions = named["position_vectors"] * layout.position_vector
        self.groups = named["groups"]
        self.per_channel, self.elementwise = layout.per_channel, layout.elementwise_affine
        self.split = named.get("REDUCTION") == "split"
        self.given = named.get("REDUCTION") == "none"
        self.block_rows, block_channels, block_positions = layout.tile
        self.row_blocks = cdiv(self.rows, self.block_rows)
        self.channel_blocks = cdiv(self.channels, block_channels)
        self.position_blocks = cdiv(self.positions, block_positions)
        self.splits = named["splits"]
        self.programs = named["programs"]
        # The share of the slabs that this launch handles: 1, unless a split plan launches block by block.
        block, slabs = (block_channels, self.channels) if self.per_channel else (self.block_rows, self.rows)
        self.slab_blocks = named.get("slab_blocks", self.programs // self.splits)
        first = named["first_slab_block"]
        self.share = Fraction(min((first + self.slab_blocks) * block, slabs) - first * block, slabs)
        # Programs of the forward and the backward kernel that load the same channels' parameters.
        self.sharers = named.get("row_programs", 0) * (1 if self.elementwise else self.position_blocks)

    @property
    def groups_per_tile(self) -> Fraction:
        """Share of a group norm's parameters that the rows of a tile use."""
        if self.per_channel or self.elementwise:
            return Fraction(1)
        return Fraction(min(self.block_rows, self.groups), self.groups)

    @property
    def parameter_reads(self) -> Fraction:
        """How often the forward and the backward kernel load each weight."""
        return self.sharers * self.groups_per_tile * (self.share if self.per_channel else 1)

    @property
    def slab_visits(self) -> int:
        """How often the forward and the backward kernel load the statistics or sums of each slab."""
        return self.sharers if self.per_channel else self.channel_blocks * self.position_blocks


def _statistics(named: dict[str, Any]) -> Count:
    share = _Grid(named).share
    return {"x_ptr": share}, {"partials_ptr": share}


def _forward(named: dict[str, Any]) -> Count:
    grid = _Grid(named)
    share, parameters = grid.share, grid.parameter_reads
    reads: dict[str, Times] = {"x_ptr": share, "residual_ptr": share, "weight_ptr": parameters, "bias_ptr": parameters}
    writes: dict[str, Times] = {"y_ptr": share, "mean_ptr": share, "rstd_ptr": share}
    running: dict[str, Times] = {"running_mean_ptr": share, "running_var_ptr": share}
    reads["seed_ptr"] = grid.programs
    if grid.split:
        reads["partials_ptr"] = grid.slab_visits * share
    if grid.given:
        reads |= dict.fromkeys(running, grid.sharers)
    else:
        reads |= running
        writes |= running
    return reads, writes


def _gradient_sums(named: dict[str, Any]) -> Count:
    grid = _Grid(named)
    share = grid.share
    if grid.elementwise:
        parameters: Times = grid.slab_blocks
    elif grid.per_channel:
        parameters = grid.row_blocks * grid.position_blocks * share
    else:
        parameters = grid.slab_blocks * grid.position_blocks * grid.groups_per_tile
    reads: dict[str, Times] = dict.fromkeys(("dy_ptr", "x_ptr", "kept_ptr"), share)
    reads |= {"weight_ptr": parameters, "bias_ptr": parameters, "seed_ptr": grid.programs}
    return reads | dict.fromkeys(("mean_ptr", "rstd_ptr"), grid.splits * share), {"partials_ptr": share}


def _backward(named: dict[str, Any]) -> Count:
    grid = _Grid(named)
    share, parameters = grid.share, grid.parameter_reads
    reads: dict[str, Times] = dict.fromkeys(("dy_ptr", "x_ptr", "kept_ptr"), share)
    reads |= {"weight_ptr": parameters, "bias_ptr": parameters, "seed_ptr": grid.programs}
    reads |= dict.fromkeys(("mean_ptr", "rstd_ptr"), grid.slab_visits * share)
    if grid.split:
        reads["partials_ptr"] = grid.slab_visits * share
    gradients: Times = share
    if grid.split and not grid.per_channel:  # each launch writes an equal share of the partial sums
        gradients = Fraction(1, cdiv(grid.row_blocks, grid.slab_blocks))
    return reads, {"dx_ptr": share, "dresidual_ptr": share, "dweight_ptr": gradients, "dbias_ptr": gradients}


def _parameter_sums(_: dict[str, Any]) -> Count:
    return {"weight_sums_ptr": 1, "bias_sums_ptr": 1}, {"dweight_ptr": 1, "dbias_ptr": 1}


# For each kernel: how often a launch with given parameters reads and writes each tensor.
_COUNTS: dict[str, Callable[[dict[str, Any]], Count]] = {
    "statistics_kernel": _statistics,
    "forward_kernel": _forward,
    "gradient_sums_kernel": _gradient_sums,
    "backward_kernel": _backward,
    "parameter_sums_kernel": _parameter_sums,
}


# Stock torch's operators.


def eager(chain: Chain) -> Phases:
    """Counts the ATen operators that the stock chain runs on a CUDA device, forward and backward.

    Each operand counts once, and again if SECOND_READS lists it. Nothing is computed: the tensors are fake.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = chain.tensors("cuda")
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        with Operators(numbered=True) as operators:
            output = chain.stock(tensors)
            forward = operators.take()
            gradients([output], wanted, [tensors.grad])
            phases = {"forward": forward, "backward": operators.take()}
    return {phase: [_with_second_reads(kernel) for kernel in kernels] for phase, kernels in phases.items()}


# Operands that the CUDA kernels behind one operator read twice: once for the norm's statistics or the sums of its
# gradient, in a separate kernel (or pass over a slab), and once for the result. Sources in aten/src/ATen/native/cuda:
# Normalization.cuh, group_norm_kernel.cu, layer_norm_kernel.cu, whose forward is one kernel that keeps short rows in
# the cache. cuDNN is closed source; its kernels are counted like ATen's.
SECOND_READS = {
    "native_batch_norm": ("input",),
    "cudnn_batch_norm": ("input",),
    "native_group_norm": ("input",),
    "native_batch_norm_backward": ("grad_out", "input"),
    "cudnn_batch_norm_backward": ("grad_output", "input"),
    "native_group_norm_backward": ("grad_out", "input"),
    "native_layer_norm_backward": ("grad_out", "input"),
}


def _with_second_reads(kernel: Kernel) -> Kernel:
    names = SECOND_READS.get(kernel.name, ())
    again = {f"{name}{AGAIN}": size for name, size in kernel.reads.items() if name.partition(NUMBER)[0] in names}
    return kernel._replace(reads=kernel.reads | again)


def gradients(
    outputs: list[Tensor], inputs: list[Tensor], grad_outputs: list[Tensor], allow_unused: bool = False
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad without the engine, which requires the device: calls the nodes of a chain one by one.

    Each value of a chain is used once, so gradients are never accumulated.
    """
    edges = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in inputs]
    found: list[Tensor | None] = [None] * len(inputs)

    def walk(node: Any, output: int, grad: Tensor | None) -> None:
        for index, edge in enumerate(edges):
            if edge is not None and edge.node is node and edge.output_nr == output:
                found[index] = grad
                return
        grads: list[Tensor | None] = [None] * len(node._input_metadata)
        grads[output] = grad
        results = node(*grads)
        results = results if isinstance(results, tuple) else (results,)
        for (following, place), result in zip(node.next_functions, results, strict=True):
            if following is not None:
                walk(following, place, result)

    with torch.no_grad():
        for tensor, grad in zip(outputs, grad_outputs, strict=True):
            walk(tensor.grad_fn, tensor.output_nr, grad)
    return tuple(found)


# Operators that overwrite a tensor without reading it; that use only the shape of a tensor; that move nothing,
# including a view that is not declared as one in its schema.
_OVERWRITES = {"copy_", "fill_", "zero_", "bernoulli_", "normal_", "uniform_", "random_"}
_SHAPED_LIKE = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"}
_MOVES_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class Operators(TorchDispatchMode):
    """Records every ATen operator that moves memory: inputs as read, outputs and in-place changes as written.

    Views and allocations move nothing. A tensor passed twice is read once; an expanded tensor counts its real size.
    What an operator's schema omits, such as batch norm's update of the running statistics, is not counted. If
    `numbered`, the names of operands end in the number of their storage.
    """

    def __init__(self, *, numbered: bool = False) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._storages: dict[int, tuple[int, Any]] | None = {} if numbered else None

    def take(self) -> list[Kernel]:
        """Returns what was recorded since the last call."""
        taken, self.kernels = self.kernels, []
        return taken

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if func.namespace == "aten" and not is_view and schema.name.removeprefix("aten::") not in _MOVES_NOTHING:
            kernel = _operator_traffic(schema, args, kwargs, result, self._name)
            if any((*kernel.reads.values(), *kernel.writes.values())):
                self.kernels.append(kernel)
        return result

    def _name(self, name: str, tensor: Tensor) -> str:
        if self._storages is None:
            return name
        storage = tensor.untyped_storage()  # kept, so that no other one gets its address
        number, _ = self._storages.setdefault(storage._cdata, (len(self._storages), storage))
        return f"{name}{NUMBER}{number}"


def _operator_traffic(
    schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, name_of: Callable[[str, Tensor], str]
) -> Kernel:
    name = schema.name.removeprefix("aten::")
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    reads: dict[str, int] = {}
    writes: dict[str, int] = {}
    seen: set[int] = set()
    for argument in schema.arguments:
        changed = argument.alias_info is not None and argument.alias_info.is_write
        overwritten = changed and (argument.kwarg_only or name in _OVERWRITES)
        for label, tensor in _tensors(argument.name, named.get(argument.name)):
            if changed:
                writes[name_of(label, tensor)] = _distinct_bytes(tensor)
            if id(tensor) not in seen and not overwritten and name not in _SHAPED_LIKE:
                reads[name_of(label, tensor)] = _distinct_bytes(tensor)
            seen.add(id(tensor))
    for label, tensor in _tensors("output", result):
        if id(tensor) not in seen:
            writes[name_of(label, tensor)] = _distinct_bytes(tensor)
    return Kernel(name, reads, writes)


def _tensors(label: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield label, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{label}[{index}]", item)


def _distinct_bytes(tensor: Tensor) -> int:
    """Bytes of the elements at distinct addresses."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()
