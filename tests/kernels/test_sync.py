"""Batch norm over a process group: two processes with parts of a batch against one with the whole of it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from mnistnorm import BatchNormReLU2d

SHAPE = (6, 4, 5, 3)


def data():
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    return x * 3 + 1, residual, grad


def layer(**options):
    module = BatchNormReLU2d(SHAPE[1], momentum=0.3, dtype=torch.float64, **options)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 2.0, SHAPE[1]))
        module.bias.copy_(torch.linspace(-0.3, 0.3, SHAPE[1]))
    return module


def train_part(rank: int, folder: Path, sizes: list[int]) -> None:
    """One process's share of a step; writes what it computed."""
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), len(sizes)), rank=rank, world_size=len(sizes)
    )
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x, residual, grad = (t[part] for t in data())
    module = layer(process_group=dist.group.WORLD)
    x.requires_grad_()
    output = module(x, residual)
    output.backward(grad)
    results = {"output": output.detach(), "dx": x.grad, "dw": module.weight.grad, "db": module.bias.grad}
    torch.save(results | dict(module.named_buffers()), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [[3, 3], [5, 1], [6, 0]], ids=str)
def test_two_processes_are_one(tmp_path, sizes, run_two_processes):
    run_two_processes(train_part, tmp_path, sizes)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    x, residual, grad = data()
    x.requires_grad_()
    module = layer()
    running = torch.zeros(SHAPE[1], dtype=torch.float64), torch.ones(SHAPE[1], dtype=torch.float64)
    output = F.relu(F.batch_norm(x, *running, module.weight, module.bias, True, 0.3) + residual)
    output.backward(grad)

    def check(actual, expected):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)

    check(torch.cat([part["output"] for part in parts]), output)
    check(torch.cat([part["dx"] for part in parts]), x.grad)
    check(sum(part["dw"] for part in parts), module.weight.grad)
    check(sum(part["db"] for part in parts), module.bias.grad)
    for part in parts:
        check(part["running_mean"], running[0])
        check(part["running_var"], running[1])
        assert part["num_batches_tracked"] == 1
