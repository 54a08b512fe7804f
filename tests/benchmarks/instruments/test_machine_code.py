"""Reports on compiled kernels, against kernels with known properties; in processes without the interpreter."""

import inspect

import pytest
import torch
import triton
import triton.language as tl
from triton.compiler import make_backend
from triton.tools.disasm import get_sass

from benchmarks.instruments import machine_code

TARGETS = [
    target if target == "sm_90" else pytest.param(target, marks=pytest.mark.slow) for target in machine_code.TARGETS
]


@triton.jit
def load_through(pointers, mask):
    return tl.load(pointers, mask=mask)


@triton.jit
def copy_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = load_through(x_ptr + offsets, offsets < length)
    tl.store(y_ptr + offsets, x, mask=offsets < length)


@triton.jit
def add_kernel(x_ptr, scale_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = load_through(scale_ptr + tl.program_id(0), True)
    x = load_through(x_ptr + offsets, offsets >= 0)
    bias = load_through(scale_ptr + tl.program_id(0) + 1, True)
    tl.store(y_ptr + offsets, x * scale + bias)


@triton.jit
def sum_kernel(x_ptr, y_ptr, scale_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.program_id(0), tl.sum(x) * tl.load(scale_ptr + tl.program_id(0)))


@triton.jit
def hoarding_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Keeps BLOCK values in registers until their sum is known."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x / tl.sum(x))


def compile_copy(target, length=1024, offset=0, dtype=torch.float32, **options):
    x = torch.empty(length + offset, dtype=dtype, device="meta")[offset:]
    return machine_code.compile_kernel(copy_kernel, target, (1,), x, torch.empty_like(x), length, BLOCK=1024, **options)


def compile_sum(target, block, **options):
    x = torch.empty(block, device="meta")

    def grid(meta):
        return (meta["x_ptr"].numel() // meta["BLOCK"],)

    return machine_code.compile_kernel(sum_kernel, target, grid, x, x, x, BLOCK=block, **options)


def compile_add(target):
    x = torch.empty(1024, device="meta")
    return machine_code.compile_kernel(add_kernel, target, (1,), x, x, x, BLOCK=1024)


def compile_hoarding(target, block, num_warps):
    x = torch.empty(block, device="meta")
    return machine_code.compile_kernel(hoarding_kernel, target, (1,), x, x, BLOCK=block, num_warps=num_warps)


def count_compilations(target, lengths):
    counts = []
    with machine_code.capture(target) as captured:
        for length in lengths:
            x = torch.empty(length, device="meta")
            copy_kernel[(1,)](x, x, length, BLOCK=1024)
            counts.append(captured.compilations)
    return counts, len(captured.reports())


def compile_for_unknown_target():
    return compile_copy("sm_10")


@pytest.fixture(scope="module")
def processes():
    with machine_code.compiler_processes() as pool:
        yield pool


@pytest.fixture
def run(processes):
    return lambda function, *args, **kwargs: processes.submit(function, *args, **kwargs).result()


@pytest.mark.parametrize("target", TARGETS)
def test_aligned_copy_is_128_bits_wide(run, target):
    compiled = run(compile_copy, target)
    assert (compiled.kernel, compiled.target, compiled.grid) == ("copy_kernel", target, (1,))
    assert (compiled.num_warps, compiled.num_ctas) == (4, 1)
    assert set(compiled.widths("load")) == set(compiled.widths("store")) == {128}
    # 4 warps move 1024 floats, each thread 4 at a time.
    threads = 4 * machine_code.TARGETS[target].gpu.warp_size
    assert compiled.widths("load") == compiled.widths("store") == {128: max(1, 1024 // (4 * threads))}
    assert compiled.widths("load", "load_through(") == compiled.widths("load")
    assert compiled.widths("store", "tl.store(y_ptr") == compiled.widths("store")
    assert compiled.widths("load", "tl.store(y_ptr") == {}
    assert (compiled.spills, compiled.local_memory) == (False, 0)
    assert compiled.dynamic_shared_memory == compiled.static_shared_memory == 0
    assert compiled.occupancy == 1
    assert 4 < compiled.registers < 40
    assert 10 < compiled.instructions < 200


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("length", "offset"), [(1024, 1), (1023, 0)], ids=["address", "length"])
def test_unaligned_copy_is_not(run, target, length, offset):
    assert set(run(compile_copy, target, length, offset).widths("load")) == {32}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.int8, 8), (torch.bfloat16, 16), (torch.float64, 64)])
def test_narrow_and_wide_elements(run, target, dtype, bits):
    compiled = run(compile_copy, target, 1023, 0, dtype)
    assert set(compiled.widths("load")) == set(compiled.widths("store")) == {bits}
    assert set(run(compile_copy, target, 1024, 0, dtype, num_warps=1).widths("load")) == {128}


@pytest.mark.parametrize("target", TARGETS)
def test_spills(run, target):
    kept = run(compile_hoarding, target, 1024, 4)
    assert (kept.spills, kept.local_memory) == (False, 0)
    # A thread keeps 512 values, each in its own register, and has at most 512 registers.
    spilled = run(compile_hoarding, target, 512 * machine_code.TARGETS[target].gpu.warp_size, 1)
    assert spilled.spills
    assert spilled.spill_stores > 0
    assert spilled.spill_loads > 0
    assert spilled.local_memory > 0


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_and_lines(run, target):
    compiled = run(compile_sum, target, 4096, num_warps=8)
    assert compiled.grid == (1,)
    assert 8 * 4 <= compiled.dynamic_shared_memory < 1024
    assert set(compiled.widths("load", "tl.load(x_ptr")) == {128}
    assert compiled.widths("store") == {32: 1}


@pytest.mark.parametrize("target", [target for target in machine_code.TARGETS if target.startswith("sm_")])
def test_calls_of_one_device_function_are_told_apart(run, target):
    compiled = run(compile_add, target)
    assert compiled.widths("load", "scale = load_through") == {32: 1}
    assert compiled.widths("load", "x = load_through") == {128: 2}
    assert compiled.widths("load", "bias = load_through") == {32: 1}
    assert {access.line for access in compiled.accesses} <= set(range(*lines_of(add_kernel)))


def lines_of(kernel):
    lines, first = inspect.getsourcelines(kernel.fn)
    return first, first + len(lines)


def compare_with_triton():
    """Returns our report, and the instructions of the code that Triton would load."""
    with machine_code.capture("sm_90") as captured:
        x = torch.empty(4096, device="meta")
        sum_kernel[(1,)](x, x, x, BLOCK=4096)
    ptx, metadata = captured._launches[0][2].asm["ptx"], captured._launches[0][2].metadata
    sass = get_sass(make_backend(metadata.target).make_cubin(ptx, {}, metadata, metadata.target.arch))
    instructions = [line.split("\t")[1] for line in sass.splitlines() if "\t" in line]
    return captured.reports()[0], [instruction for instruction in instructions if not instruction.startswith("NOP")]


def test_the_code_is_that_of_triton(run):
    compiled, instructions = run(compare_with_triton)
    assert compiled.instructions == len(instructions)
    assert sum(compiled.widths("load").values()) == sum("LDG" in instruction for instruction in instructions)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_cluster(run, target):
    assert run(compile_sum, target, 4096, num_ctas=4).num_ctas == 4


class TestOccupancy:
    """Against the CUDA occupancy calculator; for AMD, against values computed by hand."""

    @staticmethod
    def occupancy(target, registers=32, num_warps=4, shared=0, simd_warps=0):
        code = machine_code._Code(registers, 0, 0, 0, 0, 0, (), simd_warps)
        return machine_code._occupancy(machine_code.TARGETS[target], code, num_warps, shared)

    @pytest.mark.parametrize(
        ("target", "registers", "num_warps", "shared", "warps"),
        [
            ("sm_90", 32, 8, 0, 64),
            ("sm_90", 33, 8, 0, 48),
            ("sm_90", 128, 8, 0, 16),
            ("sm_90", 255, 8, 0, 8),
            ("sm_90", 32, 8, 100 * 1024, 16),
            ("sm_90", 32, 8, 227 * 1024, 8),
            ("sm_90", 32, 1, 0, 32),
            ("sm_80", 64, 16, 0, 32),
            ("sm_86", 32, 8, 0, 48),
            ("sm_75", 32, 8, 40 * 1024, 8),
            ("sm_120", 32, 32, 0, 32),
        ],
    )
    def test_nvidia(self, target, registers, num_warps, shared, warps):
        expected = warps / machine_code.TARGETS[target].warps
        assert self.occupancy(target, registers, num_warps, shared) == expected

    @pytest.mark.parametrize(
        ("target", "simd_warps", "num_warps", "shared", "warps"),
        [("gfx942", 8, 4, 0, 32), ("gfx942", 3, 4, 0, 12), ("gfx942", 8, 4, 33000, 4), ("gfx1100", 16, 8, 65536, 16)],
    )
    def test_amd(self, target, simd_warps, num_warps, shared, warps):
        expected = warps / machine_code.TARGETS[target].warps
        assert self.occupancy(target, num_warps=num_warps, shared=shared, simd_warps=simd_warps) == expected

    @pytest.mark.parametrize(("target", "num_warps", "shared"), [("sm_86", 4, 99 * 1024 + 1), ("gfx942", 32, 0)])
    def test_what_does_not_fit(self, target, num_warps, shared):
        assert self.occupancy(target, num_warps=num_warps, shared=shared, simd_warps=8) == 0


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compilations_are_counted(run, target):
    counts, launches = run(count_compilations, target, [1024, 2048, 1023, 1025, 4096, 1])
    assert counts == [1, 1, 2, 2, 2, 3]
    assert launches == 6


def test_unknown_target(run):
    with pytest.raises(KeyError, match="expected one of sm_75"):
        run(compile_for_unknown_target)


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the interpreter is off here")
def test_interpreter_is_on():
    with pytest.raises(RuntimeError, match="compiler_processes"):
        compile_copy("sm_90")
