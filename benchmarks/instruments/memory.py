"""Peak memory of a call, and the bytes that autograd keeps for the backward."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch allocates on `device` during a call, beyond those allocated before it.

    Counts tensors only, not code or memory cached by the allocator.
    """
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        call()
        return torch.accelerator.max_memory_allocated(device) - before
    with (
        _without_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler,
    ):
        call()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Silences stderr, since the profiler always logs there from C++."""
    kept = os.dup(2)
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def saved_storages(call: Callable[[], T]) -> tuple[T, list[torch.UntypedStorage]]:
    """Returns the result of `call` and the storages that autograd saves for the backward during it."""
    saved: list[torch.UntypedStorage] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), saved


def bytes_beyond(storages: Iterable[torch.UntypedStorage], tensors: Iterable[Tensor]) -> int:
    """Bytes of `storages`, each counted once, except those of `tensors`."""
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for tensor in tensors:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())
