"""Traffic of torch's operators and Inductor's kernels against hand-counted cases."""

import pytest
import torch
from torch import Tensor

from benchmarks.instruments import machine_code
from benchmarks.instruments.chain import Chain, default_groups
from benchmarks.instruments.counting import Kernel, Operators, eager, once, total
from benchmarks.instruments.gpus import GPUS
from benchmarks.instruments.inductor import inductor

SHAPE = (4, 8, 5, 7)
UNIT = 4 * 4 * 8 * 5 * 7  # bytes of one activation in float32


def record(function, *args) -> list[Kernel]:
    with Operators() as operators:
        function(*args)
    return operators.kernels


def test_an_operator_reads_its_inputs_and_writes_its_outputs() -> None:
    x, y = torch.zeros(10), torch.zeros(10)
    assert record(torch.add, x, y) == [Kernel("add", {"self": 40, "other": 40}, {"output": 40})]
    assert record(torch.cat, [x, y]) == [Kernel("cat", {"tensors[0]": 40, "tensors[1]": 40}, {"output": 80})]
    assert record(torch.max, x, 0) == [Kernel("max", {"self": 40}, {"output[0]": 4, "output[1]": 8})]


def test_a_tensor_passed_twice_is_read_once_and_an_expanded_one_in_its_real_size() -> None:
    x = torch.zeros(10)
    assert record(torch.mul, x, x) == [Kernel("mul", {"self": 40}, {"output": 40})]
    wide = torch.zeros(1).expand(10)
    assert record(torch.mul, x, wide) == [Kernel("mul", {"self": 40, "other": 4}, {"output": 40})]


@pytest.mark.parametrize(
    "view", [lambda x: x.view(5, 2), lambda x: x[2:], Tensor.detach, lambda x: x.view(5, 2).t(), torch.empty_like]
)
def test_views_and_allocations_move_nothing(view) -> None:
    assert record(view, torch.zeros(10)) == []


def test_in_place_operators_write_what_they_change() -> None:
    x, y = torch.zeros(10), torch.zeros(10)
    assert record(x.add_, y) == [Kernel("add_", {"self": 40, "other": 40}, {"self": 40})]
    assert record(x.copy_, y) == [Kernel("copy_", {"src": 40}, {"self": 40})]
    assert record(x.zero_) == [Kernel("zero_", {}, {"self": 40})]
    assert record(lambda: torch.add(x, y, out=x)) == [Kernel("add", {"self": 40, "other": 40}, {"out": 40})]
    assert record(torch.zeros_like, x) == [Kernel("zeros_like", {}, {"output": 40})]


def units(kernels: list[Kernel]) -> tuple[int, int]:
    """Whole activations read and written; statistics and parameters are much smaller than one."""
    reads, writes = total(kernels)
    return reads // UNIT, writes // UNIT


@pytest.mark.parametrize(("norm", "again"), [("batch", (1, 2)), ("group", (1, 2)), ("layer", (0, 2))])
def test_eager_norm_and_relu(norm: str, again: tuple[int, int]) -> None:
    """Forward: norm and ReLU 1R + 1W each. Backward: ReLU's reads dy and y, the norm's dy and x, 1W each."""
    phases = eager(Chain(norm, SHAPE, groups=2))
    assert [units(kernels) for kernels in once(phases).values()] == [(2, 2), (4, 2)]
    assert [len(kernels) for kernels in phases.values()] == [2, 2]
    assert [units(kernels)[0] for kernels in phases.values()] == [2 + again[0], 4 + again[1]]


def test_eager_dropout_and_residual() -> None:
    """Dropout adds 1R + 1W and writes a mask of bytes, which its backward reads on top of 1R + 1W; the sum 2R + 1W."""
    plain, more = (
        once(eager(Chain("batch", SHAPE, dropout=p, residual=residual))) for p, residual in ((0, False), (0.5, True))
    )
    (reads, writes), (reads_more, writes_more) = total(plain["forward"]), total(more["forward"])
    assert (reads_more - reads, writes_more - writes) == (3 * UNIT, 2 * UNIT + UNIT // 4)
    (reads, writes), (reads_more, writes_more) = total(plain["backward"]), total(more["backward"])
    assert (reads_more - reads, writes_more - writes) == (UNIT + UNIT // 4, UNIT)


def test_minimum_is_that_of_the_design() -> None:
    assert Chain("batch", SHAPE).minimum() == {"forward": (UNIT, UNIT), "backward": (2 * UNIT, UNIT)}
    assert Chain("group", SHAPE, residual=True).minimum() == {
        "forward": (2 * UNIT, UNIT),
        "backward": (3 * UNIT, 2 * UNIT),
    }


def test_default_groups() -> None:
    assert [default_groups(channels) for channels in (256, 64, 32, 8, 3, 1)] == [32, 32, 2, 2, 1, 1]


@pytest.fixture(scope="module")
def generated():
    """Returns Inductor's kernels for an H100 or a T4, from a process without the interpreter."""
    gpus = {gpu.name: gpu for gpu in GPUS}
    with machine_code.compiler_processes(1) as pool:
        yield lambda chain, gpu: pool.submit(inductor, chain, gpus[gpu]).result()


@pytest.mark.slow
def test_inductor_fuses_layer_norm(generated) -> None:
    """Forward 1R + 1W and the ReLU's mask, a byte per element; backward dy, x and mask for dx, again for dweight."""
    unit = 64 * 8 * 56 * 56 * 4
    phases = generated(Chain("layer", (64, 8, 56, 56)), "H100")
    statistics = 2 * unit // 56
    (reads, writes), (backward_reads, backward_writes) = (total(kernels) for kernels in phases.values())
    assert reads - unit < 0.01 * unit
    assert writes == unit + unit // 4 + statistics
    assert backward_reads == pytest.approx(2 * (2 * unit + unit // 4 + statistics), rel=0.01)
    assert backward_writes == pytest.approx(unit, rel=0.02)
    assert once(phases) == phases


@pytest.mark.slow
def test_inductor_loops_over_a_slab_once_more(generated) -> None:
    """Few multiprocessors, many channels: one program per channel, which loads it twice."""
    chain = Chain("batch", (16, 256, 28, 28))
    phases = generated(chain, "T4")
    assert [len(kernels) for kernels in phases.values()] == [1, 1]
    pairs = zip(phases.values(), once(phases).values(), strict=True)
    reads = [total(kernels)[0] - total(cached)[0] for kernels, cached in pairs]
    assert [round(more / chain.activation_bytes, 2) for more in reads] == [1, 2.25]
