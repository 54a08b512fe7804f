"""Training by several processes that torchrun started: each computes its part of every batch.

In a process that has not joined others, nothing here communicates.
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
    """Joins the processes that torchrun started, if it started this one.

    What ends them all is raised in one of them; the others exit without a word.

    Raises:
        UserError: they cannot be joined.
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
    """Makes the process group, gloo's for the CPU and NCCL's for GPUs, and returns the store that all share."""
    if not dist.is_gloo_available():
        raise UserError(
            "this torch has no gloo, which several processes need: start one, without torchrun", exit_code=2
        )
    instead = "start the processes with torchrun, or unset WORLD_SIZE for one"
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is set, {', '.join(missing)} not: {instead}", exit_code=2)
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        local_rank = int(os.environ["LOCAL_RANK"])
        store, number, count = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {one_line(error)}; {instead}", exit_code=2) from error
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)  # what "cuda" means from here on
    return store


def _is_first(store: Store) -> bool:
    """Whether no process has asked before."""
    try:
        return store.add("asked", 1) == 1
    except RuntimeError:  # the store has ended with the process that held it
        return False


def refuse(program: str) -> None:
    """Raises UserError where torchrun started several processes of a program that is for one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{program} runs in one process: start it without torchrun", exit_code=2)


def processes() -> int:
    """How many share each batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that reads and writes files and says how it goes."""
    return rank() == 0


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns, or the UserError it raises, in the main process, which alone calls it."""
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
    """`model` with gradients that are averaged over the processes."""
    # Buffers are copied when they are used, at the end of an epoch.
    return DistributedDataParallel(model, **compat.LEAVE_BUFFERS) if dist.is_initialized() else model


def synchronise_batch_norm(model: nn.Module) -> None:
    """Makes the batch norm in `model`, fused or torch.nn's, one over the batches of all processes."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, BatchNormReLU2d):
            module.process_group = dist.group.WORLD


def seed_dropout(seed: int, step: int) -> None:
    """Gives each process its own dropout at each step; the main one goes on with torch's generator as it stands."""
    if not is_main():
        torch.manual_seed(zlib.crc32(f"{seed} {step} {rank()}".encode()))


def add_up(tensor: Tensor) -> None:
    """Makes `tensor`, in place, the sum of the processes' own."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def copy_buffers(model: nn.Module) -> None:
    """Gives all processes the main one's running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def split_up(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """function(rows), row by row, of which each process computes a part; all return the whole."""
    if not dist.is_initialized():
        return function(rows)
    own = function(rows.tensor_split(processes())[rank()])
    result = own.new_zeros(len(rows), *own.shape[1:])
    result.tensor_split(processes())[rank()].copy_(own)
    dist.all_reduce(result)
    return result
