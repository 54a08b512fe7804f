"""Training in several processes, started by torchrun: each computes its part of every batch.

In a process without a process group, nothing here communicates.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from .errors import UserError, one_line
from .kernels import BatchNormReLU2d, compat

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Joins the process group, if torchrun started this process.

    The first process to fail raises its error; the others exit silently.

    Raises:
        UserError: the process group cannot be joined.
    """
    if "WORLD_SIZE" not in os.environ:
        yield
        return
    store = _join()
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not _is_first(store):
            raise SystemExit(getattr(error, "exit_code", 1)) from None
        raise
    finally:
        dist.destroy_process_group()


def _join() -> Store:
    """Initializes the process group, gloo for the CPU and NCCL for GPUs, and returns the store that all share."""
    if not dist.is_gloo_available():
        raise UserError("this torch has no gloo, which several processes need: start one without torchrun", exit_code=2)
    hint = "start the processes with torchrun, or unset WORLD_SIZE for a single process"
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but not {', '.join(missing)}: {hint}", exit_code=2)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        local_rank = int(os.environ["LOCAL_RANK"])
        store, number, count = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {one_line(error)}; {hint}", exit_code=2) from error
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # makes "cuda" this process's GPU
    return store


def _is_first(store: Store) -> bool:
    """Whether this is the first process to call."""
    try:
        return store.add("asked", 1) == 1
    except RuntimeError:  # the process that hosts the store has exited
        return False


def refuse_several_processes(program: str) -> None:
    """Raises UserError if torchrun started several processes of a program that runs in one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{program} runs in one process: start it without torchrun", exit_code=2)


def processes() -> int:
    """The number of processes that share each batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that reads and writes files and prints progress."""
    return rank() == 0


def from_main(function: Callable[[], T]) -> T:
    """Calls `function` in the main process only; all processes return its result or raise its UserError."""
    if not dist.is_initialized():
        return function()
    result: list[Any] = [None, None]
    if is_main():
        try:
            result[0] = function()
        except UserError as error:
            result[1] = error
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


def wrap(model: nn.Module) -> nn.Module:
    """Wraps `model` so that its gradients are averaged over the processes."""
    # Buffers are broadcast only when they are used, at the end of an epoch.
    return DistributedDataParallel(model, **compat.NO_BUFFER_SYNC) if dist.is_initialized() else model


def synchronise_batch_norm(model: nn.Module) -> None:
    """Makes batch norm in `model`, fused or torch.nn's, take its statistics over all processes."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, BatchNormReLU2d):
            module.process_group = dist.group.WORLD


def seed_dropout(seed: int, step: int) -> None:
    """Seeds the dropout of each process and step; the main process keeps the state of its generator."""
    if not is_main():
        torch.manual_seed(zlib.crc32(f"{seed} {step} {rank()}".encode()))


def add_up(tensor: Tensor) -> None:
    """Sums `tensor` over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def largest(number: int) -> int:
    """The largest `number` of all processes."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def copy_buffers(model: nn.Module) -> None:
    """Broadcasts the running statistics of the main process."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def split_up(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Returns function(rows), which acts row by row; each process computes a part, and all return the whole."""
    if not dist.is_initialized():
        return function(rows)
    own = function(rows.tensor_split(processes())[rank()])
    result = own.new_zeros(len(rows), *own.shape[1:])
    result.tensor_split(processes())[rank()].copy_(own)
    dist.all_reduce(result)
    return result
