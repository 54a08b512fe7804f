"""The kernels that torch.compile's Inductor generates for the stock chain, without a GPU.

Inductor runs on fake tensors as on the GPU, up to the source of its Triton kernels, which are neither compiled nor run.
Requires a process in which TRITON_INTERPRET was not set, and patches torch there while it runs.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor, nn

from .chain import Chain, Tensors
from .counting import AGAIN, Kernel, Phases, gradients
from .gpus import GPU
from .machine_code import TARGETS


class _Stock(nn.Module):
    """The stock chain as a function of its tensors that are not None."""

    def __init__(self, chain: Chain, present: list[str]) -> None:
        super().__init__()
        self.chain, self.present = chain, present

    def forward(self, values: list[Tensor]) -> tuple[Tensor]:
        fields: dict[str, Any] = dict.fromkeys(Tensors._fields) | dict(zip(self.present, values, strict=True))
        return (self.chain.stock(Tensors(**fields)),)


def inductor(chain: Chain, gpu: GPU) -> Phases:
    """Returns the kernels of the compiled chain, with the bytes of each buffer as counted by Inductor's scheduler.

    The scheduler counts each buffer once per kernel. If the source loads it in several places, as in a reduction that
    loops over its slab a second time to write the result, the further loads count as "again".
    For AMD GPUs only the number of multiprocessors and the warp size are used; the code is the CUDA backend's.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode()
    with fake:
        tensors = chain.tensors("cuda")._asdict()
        del tensors["grad"]
        present = [name for name, tensor in tensors.items() if tensor is not None]
        values = [tensors[name] for name in present]
    with _without_device(gpu) as phases, tracing(TracingContext(fake)), fake:
        compile_fx(_graph(_Stock(chain, present), values), values)
    return phases


def _graph(module: nn.Module, values: list[Tensor]) -> torch.fx.GraphModule:
    """Traces the module's torch functions into a graph with one input per value."""
    graph = torch.fx.Graph()
    tracer = torch.fx.proxy.GraphAppendingTracer(graph)
    inputs = []
    for index, value in enumerate(values):
        node = graph.placeholder(f"value_{index}")
        node.meta["val"] = value
        inputs.append(torch.fx.Proxy(node, tracer))
    (output,) = module(inputs)
    graph.output((output.node,))
    return torch.fx.GraphModule(nn.Module(), graph)


def _kernels(graph: Any, sources: list[tuple[Any, str]]) -> list[Kernel]:
    """Returns the kernels of a graph; `sources` has the arguments and source of each Triton kernel."""
    kernels = []
    for node in graph.scheduler.nodes:
        reads = dict(node.get_read_write_buffer_accesses(include_reads=True, include_writes=False))
        writes = dict(node.get_read_write_buffer_accesses(include_reads=False, include_writes=True))
        if not any((*reads.values(), *writes.values())):
            continue
        for arguments, source in sources:
            if set(writes) & _written(arguments):
                for buffer, pointer in arguments.input_buffers.items():
                    loads = source.count(f"tl.load({pointer} +")
                    if loads > 1 and buffer in reads:
                        reads[f"{buffer}{AGAIN}"] = (loads - 1) * reads[buffer]
        kernels.append(Kernel(node.get_name(), reads, writes))
    return kernels


def _written(arguments: Any) -> set[str]:
    in_place = (buffer.other_names for buffer in arguments.inplace_buffers.values() if hasattr(buffer, "other_names"))
    return {*arguments.output_buffers, *(name for names in in_place for name in names)}


@contextmanager
def _without_device(gpu: GPU) -> Iterator[Phases]:
    """Makes Inductor generate code for `gpu`, and records its kernels instead of compiling them."""
    from torch._dynamo import device_interface
    from torch._functorch import config as functorch_config
    from torch._inductor import config
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties

    target = TARGETS[gpu.target].gpu
    # AMD architectures have no number: use that of the NVIDIA GPU of the same years.
    major, minor = divmod(target.arch, 10) if isinstance(target.arch, int) else (9, 0)
    properties = SimpleNamespace(
        name=gpu.name,
        major=major,
        minor=minor,
        multi_processor_count=gpu.multiprocessors,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=32 * TARGETS[gpu.target].warps,
        max_threads_per_block=1024,
        warp_size=target.warp_size,
    )
    phases: Phases = {}

    sources: list[tuple[Any, str]] = []

    def collect(graph: Any) -> SimpleNamespace:
        sources.clear()
        graph.codegen()
        phases["backward" if graph.is_backward else "forward"] = _kernels(graph, sources)
        return SimpleNamespace(call=lambda args: None, runner=None)

    generate = TritonKernel.codegen_kernel

    def keep_source(kernel: Any, name: str | None = None) -> str:
        source = generate(kernel, name)
        sources.append((kernel.args, source))
        return source

    driver = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    interface = device_interface.CudaInterface
    known: Any = inspect.getattr_static(DeviceProperties, "create").__func__
    with ExitStack() as stack:
        for patch in (
            # Fold no constants on the device, cache no code, compile the backward without running it.
            config.patch(joint_graph_constant_folding=False, force_disable_caches=True),
            functorch_config.patch(force_non_lazy_backward_lowering=True),
            mock.patch.object(GraphLowering, "compile_to_module", collect),
            mock.patch.object(TritonKernel, "codegen_kernel", keep_source),
            mock.patch.object(torch.autograd, "grad", gradients),
            mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
            mock.patch.object(torch.cuda, "current_device", return_value=0),
            mock.patch.object(interface, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(major, minor)),
            mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
            mock.patch.object(interface, "get_device_properties", staticmethod(lambda *_: properties)),
            mock.patch.object(interface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
            mock.patch.object(triton.runtime.driver, "_active", driver),
        ):
            stack.enter_context(patch)
        known.cache_clear()
        try:
            yield phases
        finally:
            known.cache_clear()
