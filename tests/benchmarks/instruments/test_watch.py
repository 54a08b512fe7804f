"""Every kind of fault is caught in a small kernel, and a correct variant of the kernel passes."""

import inspect

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from benchmarks.instruments import watch
from mnistnorm.kernels import compat

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")

SIZE = 16


@pytest.fixture
def trace():
    with watch.watch() as trace:
        yield trace


@triton.jit
def copy_kernel(x_ptr, y_ptr, length, shift, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < length
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets + shift, mask=mask), mask=mask)


@triton.jit
def program_store_kernel(y_ptr, stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(y_ptr + program * stride + tl.arange(0, BLOCK), program)


@triton.jit
def neighbour_kernel(x_ptr, reach, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.maximum(offsets + reach, 0))
    tl.store(x_ptr + offsets, x + 1)


@triton.jit
def store_then_load_kernel(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, offsets)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK + offsets, tl.load(x_ptr + BLOCK - 1 - offsets))


@triton.jit
def crowded_store_kernel(y_ptr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y_ptr + lanes // DIVISOR, lanes // 2)


@triton.jit
def use_kernel(x_ptr, y_ptr, length, USE: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    mask = lanes < length
    x = tl.load(x_ptr + lanes, mask=mask, other=0.0 if OTHER else None)
    x = (x * 2).to(tl.float64)
    if USE == "sum":
        tl.store(y_ptr, tl.sum(x))
    elif USE == "selected sum":
        tl.store(y_ptr, tl.sum(tl.where(mask, x, 0.0)))
    elif USE == "multiplied sum":
        tl.store(y_ptr, tl.sum(x * mask))
    elif USE == "moved sum":
        tl.store(y_ptr, tl.sum(tl.trans(tl.reshape(x, (2, BLOCK // 2)))[:, None, :]))
    elif USE == "scan":
        tl.store(y_ptr + lanes, tl.cumsum(x, 0))
    elif USE == "store":
        tl.store(y_ptr + lanes, x)
    elif USE == "masked store":
        tl.store(y_ptr + lanes, x, mask=mask)
    elif USE == "mask":
        tl.store(y_ptr + lanes, 1.0, mask=x > 0)
    elif USE == "address":
        tl.store(y_ptr + (x * 0).to(tl.int32) + lanes, 1.0)


@triton.jit
def product_kernel(y_ptr, factor, WIDE: tl.constexpr):
    index = tl.program_id(0) + factor
    index = index.to(tl.int64) if WIDE else index
    tl.store(y_ptr, index * factor // factor)


@triton.jit
def atomic_kernel(y_ptr):
    tl.atomic_add(y_ptr, 1.0)


@triton.jit
def compare_and_swap_kernel(y_ptr):
    tl.atomic_cas(y_ptr, 0, 1)


@triton.jit
def load_in_device_function(x_ptr):
    return tl.load(x_ptr + 1)


@triton.jit
def calling_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, load_in_device_function(x_ptr))


@triton.jit
def either_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    pointers = tl.where(lanes % 2 == 0, x_ptr + lanes, y_ptr + lanes)
    tl.store(z_ptr + lanes, tl.load(pointers))


@triton.jit
def sum_columns_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    bias = tl.load(y_ptr + columns + 0 * rows)
    tl.store(x_ptr + rows + columns * ROWS, tl.load(x_ptr + rows + columns * ROWS) + bias)


def line_of(kernel, text):
    lines, first = inspect.getsourcelines(kernel.fn)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if text in line)}"


class TestTraffic:
    @pytest.mark.parametrize("length", [1, 127, 128, 1000])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_copy_is_exact(self, trace, length, dtype):
        x, y = torch.randn(length).to(dtype), torch.empty(length, dtype=dtype)
        grid = (triton.cdiv(length, 128),)
        copy_kernel[grid](x, y, length, 0, BLOCK=128, num_warps=2)
        assert torch.equal(x, y)
        (launch,) = trace.launches
        assert (launch.kernel, launch.module, launch.grid) == ("copy_kernel", __name__, (*grid, 1, 1))
        assert launch.options == {"num_warps": 2}
        assert launch.arguments["length"] == length
        assert (trace.loaded(x), trace.stored(x)) == (x.nbytes, 0)
        assert (trace.loaded(y), trace.stored(y)) == (0, y.nbytes)
        assert launch.traffic["x_ptr"].loaded == x.nbytes

    def test_adds_up_over_launches(self, trace):
        x, y, z = (torch.ones(SIZE) for _ in range(3))
        copy_kernel[(1,)](x, y, SIZE, 0, BLOCK=SIZE)
        copy_kernel[(1,)](y, z, SIZE, 0, BLOCK=SIZE)
        copy_kernel[(1,)](x, z, SIZE // 2, 0, BLOCK=SIZE)
        assert len(trace.launches) == 3
        assert (trace.loaded(x), trace.loaded(y), trace.stored(y), trace.stored(z)) == (96, 64, 64, 96)

    def test_lanes_that_share_an_address_count_once(self, trace):
        x, y = torch.ones(4, 8), torch.ones(4)
        sum_columns_kernel[(1,)](x, y, ROWS=8, COLUMNS=4)
        assert (trace.loaded(x), trace.stored(x), trace.loaded(y)) == (x.nbytes, x.nbytes, y.nbytes)

    def test_parts_of_one_storage_are_told_apart(self, trace):
        x = torch.arange(2.0 * SIZE)
        copy_kernel[(1,)](x[:SIZE], x[SIZE:], SIZE, 0, BLOCK=SIZE)
        assert torch.equal(x[SIZE:], x[:SIZE])
        assert (trace.loaded(x[:SIZE]), trace.stored(x[:SIZE]), trace.loaded(x), trace.stored(x)) == (64, 0, 64, 64)


class TestOutOfBounds:
    @pytest.mark.parametrize(("shift", "offset"), [(1, SIZE), (-1, -1), (2**20, 2**20), (-(2**40), -(2**40))])
    def test_outside(self, trace, shift, offset):
        x, y = torch.ones(SIZE), torch.ones(SIZE)
        with pytest.raises(watch.KernelFault, match=rf"element {offset} of x_ptr .*copy_kernel.*program") as caught:
            copy_kernel[(1,)](x, y, SIZE, shift, BLOCK=SIZE)
        fault = caught.value
        assert (fault.kind, fault.kernel, fault.tensor, fault.offset) == (
            "out of bounds",
            "copy_kernel",
            "x_ptr",
            offset,
        )
        assert (fault.program, fault.location) == ((0, 0, 0), line_of(copy_kernel, "tl.load"))
        assert trace.launches == []

    def test_inside_another_tensor(self, trace):
        x, y = torch.ones(2, SIZE)
        with pytest.raises(watch.KernelFault, match="out of bounds"):
            copy_kernel[(1,)](x, y, SIZE, SIZE, BLOCK=SIZE)

    def test_store(self, trace):
        with pytest.raises(watch.KernelFault, match="element 16 of y_ptr") as caught:
            program_store_kernel[(3,)](torch.ones(SIZE), SIZE // 2, BLOCK=SIZE // 2)
        assert caught.value.program == (2, 0, 0)

    def test_inactive_lanes_may_be_anywhere(self, trace):
        x, y = torch.ones(SIZE - 3), torch.ones(SIZE - 3)
        copy_kernel[(1,)](x, y, SIZE - 3, 0, BLOCK=SIZE)
        copy_kernel[(1,)](x[:0], y[:0], 0, 0, BLOCK=SIZE)

    def test_between_the_elements_of_a_strided_tensor(self, trace):
        x, y = torch.ones(SIZE), torch.ones(SIZE)
        copy_kernel[(1,)](x[::5], y, 1, 5, BLOCK=SIZE)
        with pytest.raises(watch.KernelFault, match="strided"):
            copy_kernel[(1,)](x[::5], y, 1, 1, BLOCK=SIZE)

    def test_expanded_tensor(self, trace):
        x, y = torch.ones(1).expand(SIZE), torch.ones(SIZE)
        copy_kernel[(1,)](x, y, 1, 0, BLOCK=SIZE)
        with pytest.raises(watch.KernelFault, match="out of bounds"):
            copy_kernel[(1,)](x, y, 2, 0, BLOCK=SIZE)

    def test_pointers_into_two_tensors(self, trace):
        x, y, z = torch.arange(SIZE), -torch.arange(SIZE), torch.empty(SIZE, dtype=torch.int64)
        either_kernel[(1,)](x, y, z, BLOCK=SIZE)
        assert torch.equal(z, torch.where(x % 2 == 0, x, y))
        assert (trace.loaded(x), trace.loaded(y)) == (x.nbytes // 2, y.nbytes // 2)
        with pytest.raises(watch.KernelFault, match="of y_ptr"):
            either_kernel[(1,)](x, y[:-1], z, BLOCK=SIZE)

    def test_location_is_in_the_device_function(self, trace):
        x, y = torch.ones(2), torch.empty(1)
        calling_kernel[(1,)](x, y)
        with pytest.raises(watch.KernelFault) as caught:
            calling_kernel[(1,)](x[:1], y)
        assert caught.value.location == line_of(load_in_device_function, "tl.load")


class TestRace:
    def test_two_programs_store_one_address(self, trace):
        y = torch.zeros(3 * SIZE, dtype=torch.int32)
        program_store_kernel[(3,)](y, SIZE, BLOCK=SIZE)
        with pytest.raises(watch.KernelFault, match=f"element {SIZE - 1} of y_ptr") as caught:
            program_store_kernel[(3,)](y, SIZE - 1, BLOCK=SIZE)
        assert (caught.value.kind, caught.value.program, caught.value.offset) == ("race", (1, 0, 0), SIZE - 1)

    @pytest.mark.parametrize("reach", [1 - SIZE, -1, 1])
    def test_a_program_loads_what_another_stores(self, trace, reach):
        x = torch.zeros(3 * SIZE + 1)
        with pytest.raises(watch.KernelFault, match="race"):
            neighbour_kernel[(3,)](x, reach, BLOCK=SIZE)

    def test_in_place_update_is_none(self, trace):
        x = torch.zeros(3 * SIZE)
        neighbour_kernel[(3,)](x, 0, BLOCK=SIZE)
        neighbour_kernel[(3,)](x, 0, BLOCK=SIZE)
        assert torch.equal(x, torch.full_like(x, 2))

    def test_shared_memory_of_two_arguments(self, trace):
        x = torch.zeros(3 * SIZE)
        with pytest.raises(watch.KernelFault, match="race"):
            copy_kernel[(2,)](x[: 2 * SIZE], x[SIZE:], 2 * SIZE, 0, BLOCK=SIZE)

    def test_a_program_loads_its_own_store(self, trace):
        x = torch.zeros(2 * SIZE, dtype=torch.int32)
        store_then_load_kernel[(1,)](x, BARRIER=True, BLOCK=SIZE)
        assert torch.equal(x[SIZE:], x[:SIZE].flip(0))
        with pytest.raises(watch.KernelFault, match="no barrier"):
            store_then_load_kernel[(1,)](x, BARRIER=False, BLOCK=SIZE)

    def test_lanes_disagree(self, trace):
        y = torch.zeros(SIZE, dtype=torch.int32)
        crowded_store_kernel[(1,)](y, DIVISOR=2, BLOCK=SIZE)
        assert trace.stored(y) == y.nbytes // 2
        with pytest.raises(watch.KernelFault, match="different values"):
            crowded_store_kernel[(1,)](y, DIVISOR=4, BLOCK=SIZE)


class TestUndefinedLanes:
    @pytest.mark.parametrize("use", ["sum", "multiplied sum", "moved sum", "scan", "store", "mask", "address"])
    def test_caught(self, trace, use):
        x, y = torch.ones(SIZE), torch.zeros(SIZE)
        with pytest.raises(watch.KernelFault) as caught:
            use_kernel[(1,)](x, y, SIZE - 1, USE=use, OTHER=False, BLOCK=SIZE)
        assert caught.value.kind == "undefined"

    @pytest.mark.parametrize("use", ["sum", "multiplied sum", "moved sum", "scan", "store", "mask", "address"])
    def test_defined_by_other(self, trace, use):
        use_kernel[(1,)](torch.ones(SIZE), torch.zeros(SIZE), SIZE - 1, USE=use, OTHER=True, BLOCK=SIZE)

    @pytest.mark.parametrize("use", ["sum", "multiplied sum", "moved sum", "scan", "store", "mask", "address"])
    def test_defined_by_full_mask(self, trace, use):
        use_kernel[(1,)](torch.ones(SIZE), torch.zeros(SIZE), SIZE, USE=use, OTHER=False, BLOCK=SIZE)

    @pytest.mark.parametrize("use", ["selected sum", "masked store"])
    def test_unused(self, trace, use):
        y = torch.zeros(SIZE)
        use_kernel[(1,)](torch.ones(SIZE), y, SIZE - 1, USE=use, OTHER=False, BLOCK=SIZE)
        assert y.sum() == 2 * (SIZE - 1)


class TestUninitialized:
    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
    )
    @pytest.mark.parametrize(
        "make",
        [
            lambda dtype: torch.empty(SIZE, dtype=dtype),
            lambda dtype: torch.empty_like(torch.ones(SIZE, dtype=dtype)),
            lambda dtype: torch.empty_strided((SIZE,), (1,), dtype=dtype),
            lambda dtype: torch.ones(1, dtype=dtype).new_empty(SIZE),
            lambda dtype: torch.ones(1, dtype=dtype).new_empty_strided((SIZE,), (1,)),
        ],
        ids=["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"],
    )
    def test_read(self, trace, dtype, make):
        x, y = make(dtype), torch.ones(SIZE, dtype=dtype)
        x[:-1] = float("nan") if dtype.is_floating_point else 0
        copy_kernel[(1,)](x, y, SIZE - 1, 0, BLOCK=SIZE)
        with pytest.raises(watch.KernelFault, match="x_ptr") as caught:
            copy_kernel[(1,)](x, y, SIZE, 0, BLOCK=SIZE)
        assert caught.value.kind == "uninitialized"

    def test_torch_is_restored(self):
        before = torch.empty, torch.Tensor.new_empty
        with watch.watch():
            assert torch.empty is not before[0]
            assert torch.empty(3).isnan().all()
        assert (torch.empty, torch.Tensor.new_empty) == before


class TestOverflow:
    @pytest.mark.skipif(compat.triton_version() < (3, 7), reason="Triton 3.6's interpreter does not check products")
    def test_int32(self, trace):
        y = torch.zeros(1, dtype=torch.int64)
        product_kernel[(1,)](y, 46340, WIDE=False)
        product_kernel[(1,)](y, 65536, WIDE=True)
        with pytest.raises(watch.KernelFault, match="4294967296") as caught:
            product_kernel[(1,)](y, 65536, WIDE=False)
        assert (caught.value.kind, caught.value.location) == ("overflow", line_of(product_kernel, "tl.store"))

    def test_random_numbers_wrap_on_purpose(self, trace):
        @triton.jit
        def random_kernel(y_ptr, seed, BLOCK: tl.constexpr):
            lanes = tl.arange(0, BLOCK)
            tl.store(y_ptr + lanes, tl.rand(seed, lanes))

        y = torch.zeros(SIZE)
        random_kernel[(1,)](y, 2**62 + 12345, BLOCK=SIZE)
        assert y.unique().numel() == SIZE


@pytest.mark.parametrize(("kernel", "dtype"), [(atomic_kernel, torch.float32), (compare_and_swap_kernel, torch.int32)])
def test_atomics(trace, kernel, dtype):
    with pytest.raises(watch.KernelFault) as caught:
        kernel[(1,)](torch.zeros(1, dtype=dtype))
    assert caught.value.kind == "atomic"


class TestCorrections:
    @staticmethod
    @triton.jit
    def cast_kernel(x_ptr, y_ptr, length, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < length), mask=offsets < length)

    @pytest.fixture(autouse=True)
    def corrected(self):
        with watch.correct_interpreter():
            yield

    def cast(self, x, dtype):
        y = torch.zeros(x.shape, dtype=dtype)
        self.cast_kernel[(triton.cdiv(x.numel(), 65536),)](x, y, x.numel(), BLOCK=65536)
        return y

    def test_bfloat16_round_trip(self):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
        wide = self.cast(patterns, torch.float32)
        assert torch.equal(wide.view(torch.int32), patterns.float().view(torch.int32))
        assert torch.equal(self.cast(wide, torch.bfloat16).nan_to_num(1.5), patterns.nan_to_num(1.5))

    @pytest.mark.parametrize("low_bits", [0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    def test_bfloat16_rounds_as_torch(self, low_bits):
        high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
        x = (high | low_bits).view(torch.float32)
        y = self.cast(x, torch.bfloat16)
        assert torch.equal(y.isnan(), x.isnan())
        finite = ~x.isnan()
        assert torch.equal(y[finite].view(torch.int16), x[finite].bfloat16().view(torch.int16))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
    def test_casts_between_bfloat16_and_others(self, dtype):
        x = torch.randint(-1000, 1000, (1000,)).to(dtype)
        assert torch.equal(self.cast(x, torch.bfloat16), x.bfloat16())
        assert torch.equal(self.cast(x.bfloat16(), dtype), x.bfloat16().to(dtype))

    def test_bfloat16_arithmetic(self):
        @triton.jit
        def kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
            lanes = tl.arange(0, BLOCK)
            x = tl.load(x_ptr + lanes)
            y = tl.load(y_ptr + lanes)
            tl.store(z_ptr + lanes, tl.where(x > y, -x * y + y, (y - x) * 2.0))
            tl.store(z_ptr + BLOCK + lanes, (x > y).to(tl.bfloat16))

        x, y = torch.randn(2, 1024).bfloat16()
        z = torch.empty(2, 1024, dtype=torch.bfloat16)
        kernel[(1,)](x, y, z, BLOCK=1024)
        assert torch.equal(z[0], torch.where(x > y, -x * y + y, (y - x) * 2))
        assert torch.equal(z[1], (x > y).bfloat16())

    def test_bfloat16_reduction_raises(self):
        @triton.jit
        def kernel(x_ptr, WIDE: tl.constexpr):
            x = tl.load(x_ptr + tl.arange(0, 4))
            x = x.to(tl.float32) if WIDE else x
            tl.store(x_ptr, tl.sum(x))

        x = torch.ones(4, dtype=torch.bfloat16)
        kernel[(1,)](x, WIDE=True)
        assert x[0] == 4
        with pytest.raises(triton.runtime.errors.InterpreterError, match="float32 first"):
            kernel[(1,)](x, WIDE=False)

    @pytest.mark.parametrize("axis", [0, 1, 2, None])
    @pytest.mark.parametrize("keep_dims", [False, True])
    def test_sums(self, axis, keep_dims):
        @triton.jit
        def kernel(x_ptr, y_ptr, SHAPE: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr):
            x = tl.load(x_ptr + tl.arange(0, SHAPE[0] * SHAPE[1] * SHAPE[2])).reshape(SHAPE)
            sums = tl.sum(x, AXIS, keep_dims=KEEP)
            tl.store(y_ptr + tl.arange(0, sums.numel).reshape(sums.shape) if sums.shape else y_ptr, sums)

        x = torch.rand(1024, 2, 4)
        expected = x.double().sum(axis, keepdim=keep_dims)
        y = torch.empty(expected.shape)
        kernel[(1,)](x, y, SHAPE=x.shape, AXIS=axis, KEEP=keep_dims)
        # A tree of 13 levels rounds 13 times, by at most 2^-24 each.
        assert torch.allclose(y.double(), expected, rtol=13 * 2**-24, atol=0)

    def test_long_sums_are_not_taken_one_by_one(self):
        @triton.jit
        def kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
            lanes = tl.arange(0, BLOCK)[:, None] * 2 + tl.arange(0, 2)[None, :]
            tl.store(y_ptr + tl.arange(0, 2), tl.sum(tl.load(x_ptr + lanes), axis=0))

        x = torch.rand(2**17, 2)
        y = torch.empty(2)
        kernel[(1,)](x, y, BLOCK=2**17)
        assert torch.allclose(y.double(), x.double().sum(0), rtol=17 * 2**-24, atol=0)

    def test_scalar_arguments_have_their_compiled_type(self):
        @triton.jit
        def kernel(y_ptr, single, double: tl.float64, index: tl.int64):
            tl.store(y_ptr, single)
            tl.store(y_ptr + 1, double)
            tl.static_assert(index.dtype == tl.int64)

        y = torch.zeros(2, dtype=torch.float64)
        kernel[(1,)](y, 1e-5, 1e-5, index=3)
        assert y.tolist() == [float(np.float32(1e-5)), 1e-5]

    def test_exceptions_are_silent(self):
        @triton.jit
        def kernel(x_ptr):
            tl.store(x_ptr, 1 / tl.load(x_ptr))

        x = torch.zeros(1)
        kernel[(1,)](x)
        assert x.item() == float("inf")


def test_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before"), watch.watch():
        pass
