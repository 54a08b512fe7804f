"""Watches every load and store of kernels in Triton's interpreter: exact traffic, and faults that it does not report.

`correct_interpreter()` makes the interpreter compute what a GPU computes; `watch()` does that and watches.
Both require TRITON_INTERPRET=1 before triton is imported, and support one thread, like the interpreter.
"""

import contextlib
import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils._device import _device_constructors
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceOps, ScanOps, TensorHandle
from triton.runtime.jit import _normalize_ty
from triton.tools.tensor_descriptor import TensorDescriptor

from . import compat

FaultKind = Literal["atomic", "out of bounds", "overflow", "race", "undefined", "uninitialized"]


class KernelFault(RuntimeError):  # noqa: N818 - the fault is in the kernel
    """A kernel did something that is an error on a GPU.

    Attributes:
        kind: one of
            "out of bounds": an active lane outside the tensor of its pointer, or in the gaps of a strided tensor;
            "race": an address that two programs of a launch store, that one stores and another loads, that a program
            stores and then loads without a barrier, or to which lanes of one store write different values;
            "undefined": a lane masked off in a load without `other` reaches a reduction, a store, an address or a mask;
            "uninitialized": an active lane loads memory that was never written;
            "overflow": integer arithmetic beyond its 8, 16 or 32 bits;
            "atomic": any atomic operation.
        kernel: the kernel's name.
        location: file:line of the operation, in the kernel or in a device function that it called.
        program: the program id, three axes.
        tensor: the parameter that was addressed, if any.
        offset: the element of that tensor, counted from its first one in memory.
    """

    def __init__(
        self,
        kind: FaultKind,
        detail: str,
        kernel: str,
        location: str,
        program: tuple[int, int, int],
        tensor: str | None = None,
        offset: int | None = None,
    ) -> None:
        super().__init__(f"{kind}: {detail} ({kernel}, program {program}, {location})")
        self.kind = kind
        self.kernel = kernel
        self.location = location
        self.program = program
        self.tensor = tensor
        self.offset = offset


@dataclass
class Traffic:
    """Bytes that one launch loads from and stores to one tensor.

    Lanes of one access that share an address count once, as in the memory system; a second access counts again.
    """

    tensor: torch.Tensor
    loaded: int = 0
    stored: int = 0


@dataclass(frozen=True)
class Launch:
    """One launch: kernel and its module, grid, arguments and options (num_warps) as passed, traffic by parameter."""

    kernel: str
    module: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, Any]
    traffic: dict[str, Traffic]


@dataclass
class Trace:
    """The launches, in order. They keep their tensors alive, so that no address is reused within a trace."""

    launches: list[Launch] = field(default_factory=list)

    def loaded(self, tensor: torch.Tensor) -> int:
        """Bytes loaded through the arguments that overlap this tensor in memory."""
        return sum(traffic.loaded for traffic in self._overlapping(tensor))

    def stored(self, tensor: torch.Tensor) -> int:
        """Bytes stored through the arguments that overlap this tensor in memory."""
        return sum(traffic.stored for traffic in self._overlapping(tensor))

    def _overlapping(self, tensor: torch.Tensor) -> Iterator[Traffic]:
        start, end = tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)
        for launch in self.launches:
            for traffic in launch.traffic.values():
                first = traffic.tensor.data_ptr()
                if start < first + _extent(traffic.tensor) and first < end:
                    yield traffic


@contextlib.contextmanager
def correct_interpreter() -> Iterator[None]:
    """Makes Triton's interpreter compute what a GPU computes.

    Casts to bfloat16 round to nearest even; bfloat16 arithmetic is done in float32 and rounded; bfloat16 reductions
    raise TypeError, since their result depends on the order of the lanes; other sums are pairwise, as on a GPU, and not
    sequential; scalar arguments get their type in a compiled kernel (float32, unless annotated otherwise);
    floating-point exceptions are silent. It also patches the language once instead of at each call of a device
    function, which takes most of the interpreter's time.

    Raises:
        RuntimeError: TRITON_INTERPRET was not set when triton was imported.
    """
    with _patched_interpreter(_CorrectedBuilder, TritonSemantic, _CorrectedExecutor, _CorrectedReduce, _CorrectedScan):
        yield


@contextlib.contextmanager
def watch() -> Iterator[Trace]:
    """Watches the kernels launched in the context, in a corrected interpreter; fills torch.empty tensors with NaN.

    Yields:
        the trace, to which each finished launch is appended.

    Raises:
        KernelFault: from the launch at fault.
        RuntimeError: TRITON_INTERPRET was not set when triton was imported.
    """
    trace = Trace()
    executor = functools.partial(_WatchedExecutor, trace)
    with (
        _patched_interpreter(_WatchedBuilder, _WatchedSemantic, executor, _WatchedReduce, _WatchedScan),
        _poisoned_empties(),
    ):
        yield trace


@contextlib.contextmanager
def _patched_interpreter(
    builder: type, semantic: type, executor: Callable[..., GridExecutor], reduce: type, scan: type
) -> Iterator[None]:
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is off: set TRITON_INTERPRET=1 before triton is imported")
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with contextlib.ExitStack() as stack:
        _set(stack, interpreter.interpreter_builder, "__class__", builder)
        _set(stack, interpreter.interpreter_semantic, "__class__", semantic)
        _set(stack, interpreter, "GridExecutor", executor)
        _set(stack, interpreter, "ReduceOps", reduce)
        _set(stack, interpreter, "ScanOps", scan)
        stack.callback(interpreter._patch_lang(language).restore)
        _set(stack, tl.tensor, "__index__", compat.index)
        _set(stack, interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
        # A block is true, as in the compiler; else the interpreter drops the `other=0` of a one-element load.
        _set(stack, tl.tensor, "__bool__", lambda self: self.type.is_block() or bool(self.handle.data))
        yield


def _set(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute until the stack unwinds."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


# Corrections: what the interpreter computes.


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to each value, ties to even, as uint16 patterns; NaN gives 0x7FC0, as in torch."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(single), np.uint32(0x7FC0), rounded).astype(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> np.ndarray:
    return bfloat16_values(handle.data) if _is_bfloat16(handle) else handle.data


def _rounded(values: np.ndarray) -> TensorHandle:
    if values.dtype == bool:
        return TensorHandle(values, tl.int1)
    return TensorHandle(bfloat16_bits(values), tl.bfloat16)


class _CorrectedBuilder(InterpreterBuilder):
    def get_bf16(self, value: float) -> TensorHandle:
        return _rounded(np.array([value]))

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16:
            return _rounded(_widened(src).astype(np.float32))
        return super().cast_impl(TensorHandle(_widened(src), tl.float32) if _is_bfloat16(src) else src, dst_type)

    def unary_op(self, arg: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        return _rounded(op(_widened(arg))) if _is_bfloat16(arg) else super().unary_op(arg, op)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if _is_bfloat16(lhs):
            return _rounded(op(_widened(lhs), _widened(rhs)))
        result = super().binary_op(lhs, rhs, op)
        # The interpreter keeps the operands' type on a comparison, and a cast of the result then misreads its bits.
        return TensorHandle(result.data, tl.int1) if result.data.dtype == bool else result

    def ternary_op(
        self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        if _is_bfloat16(other) and op is not np.where:
            return _rounded(op(_widened(lhs), _widened(rhs), _widened(other)))
        return super().ternary_op(lhs, rhs, other, op)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if _is_bfloat16(z):
            return _rounded(_widened(x) * _widened(y) + _widened(z))
        return super().create_fma(x, y, z)


def _reject_bfloat16(input: tuple[tl.tensor, ...]) -> None:
    if any(_is_bfloat16(part.handle) for part in input):
        raise TypeError("a reduction in bfloat16 depends on the order of the lanes: cast to tl.float32 first")


class _CorrectedReduce(ReduceOps):
    def check_tensor(self, input: tuple[tl.tensor, ...]) -> None:
        super().check_tensor(input)
        _reject_bfloat16(input)

    def sum(self, input: tl.tensor) -> tl.tensor:
        values = input.handle.data
        sums = values.reshape(-1) if self.axis is None else np.moveaxis(values, self.axis, 0)
        while len(sums) > 1:  # the length of an axis is a power of two
            sums = sums[0::2] + sums[1::2]
        if not self.keep_dims:
            return self.to_tensor(sums[0], input.dtype)
        kept = [1] * values.ndim if self.axis is None else np.moveaxis(sums, 0, self.axis).shape
        return self.to_tensor(sums.reshape(kept), input.dtype)


class _CorrectedScan(ScanOps):
    def check_tensor(self, input: tuple[tl.tensor, ...]) -> None:
        super().check_tensor(input)
        _reject_bfloat16(input)


class _CorrectedExecutor(GridExecutor):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            super().__call__(*args, **kwargs)

    def _init_args_hst(self, args_dev: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        positional, named = self._host = super()._init_args_hst(args_dev, kwargs)
        return (
            [self._argument(name, value) for name, value in zip(self.arg_names, positional, strict=False)],
            {name: self._argument(name, value) for name, value in named.items()},
        )

    def _restore_args_dev(self, args_dev: tuple[Any, ...], args_hst: Any, kwargs: dict[str, Any], _: Any) -> None:
        positional, named = self._host
        super()._restore_args_dev(args_dev, positional, kwargs, named)

    def _argument(self, name: str, value: Any) -> Any:
        """The argument as the kernel sees it: a number with the type that it has in a compiled kernel."""
        annotation = inspect.get_annotations(self.fn).get(name)
        if name in self.constexprs or not isinstance(value, int | float) or isinstance(value, bool):
            return value
        if annotation is None and isinstance(value, int):
            return value
        dtype = tl.str_to_ty("fp32" if annotation is None else _normalize_ty(annotation), None)
        return tl.tensor(TensorHandle(np.array([value], dtype=interpreter._get_np_dtype(dtype)), dtype), dtype)


# Memory: what belongs to each tensor, and who accessed it.

_POISON = {
    tl.float16: 0x7E5A,
    tl.bfloat16: 0x7FDA,
    tl.float32: 0x7FDA5A5A,
    tl.float64: 0x7FFA5A5A5A5A5A5A,
    tl.int32: 0x5A5A5A5A,
    tl.int64: 0x5A5A5A5A5A5A5A5A,
}
"""Bits of uninitialized values: NaNs that arithmetic never gives, and integers too large to occur by chance."""

_EMPTY_FILL = {
    torch.float16: (torch.int16, _POISON[tl.float16]),
    torch.bfloat16: (torch.int16, _POISON[tl.bfloat16]),
    torch.float32: (torch.int32, _POISON[tl.float32]),
    torch.float64: (torch.int64, _POISON[tl.float64]),
    torch.int32: (torch.int32, _POISON[tl.int32]),
    torch.int64: (torch.int64, _POISON[tl.int64]),
}


@contextlib.contextmanager
def _poisoned_empties() -> Iterator[None]:
    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.dtype in _EMPTY_FILL:
                dtype, bits = _EMPTY_FILL[tensor.dtype]
                tensor.detach().view(dtype).fill_(bits)
            return tensor

        return empty

    _device_constructors()  # caches the original torch.empty, at its first call
    with contextlib.ExitStack() as stack:
        for name in ("empty", "empty_like", "empty_strided"):
            _set(stack, torch, name, poisoned(getattr(torch, name)))
        for name in ("new_empty", "new_empty_strided"):
            _set(stack, torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
        yield


def _poison(element: tl.dtype) -> np.ndarray:
    dtype = interpreter._get_np_dtype(element)
    if element in _POISON:
        return np.array(_POISON[element], dtype=f"u{dtype.itemsize}").view(dtype)
    return np.array(True if dtype.kind == "b" else np.iinfo(dtype).max, dtype=dtype)


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _gaps(tensor: torch.Tensor) -> np.ndarray | None:
    """Mask of the elements in the extent that are not the tensor's; None if all are."""
    elements = _extent(tensor) // tensor.element_size()
    distinct = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    if distinct >= elements:
        return None
    owned = np.zeros(elements, dtype=bool)
    torch.from_numpy(owned).as_strided(tensor.shape, tensor.stride()).fill_(True)
    return ~owned


@dataclass(frozen=True)
class _Pointer:
    """Replaces a tensor in the interpreter."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class _Argument:
    """A tensor argument of a launch, and its address in the kernel."""

    name: str
    tensor: torch.Tensor
    address: int
    traffic: Traffic

    @functools.cached_property
    def extent(self) -> int:
        return _extent(self.tensor)

    @functools.cached_property
    def gaps(self) -> np.ndarray | None:
        return _gaps(self.tensor)

    @functools.cached_property
    def itemsize(self) -> int:
        return self.tensor.element_size()

    @functools.cached_property
    def storage_offset(self) -> int:
        return int(self.tensor.storage_offset()) * self.itemsize


@dataclass(frozen=True)
class _Access:
    """The active lanes of one load or store in one argument, and their byte offsets from its first element."""

    argument: _Argument
    lanes: np.ndarray | slice
    offsets: np.ndarray
    size: int

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of the distinct addresses."""
        ascending = (self.offsets[1:] > self.offsets[:-1]).all()
        return self.size * (self.offsets.size if ascending else np.unique(self.offsets).size)


@dataclass
class _Memory:
    """Who accessed each granule of a storage: epochs of the launch, 0 for none, -1 for several programs."""

    storage_bytes: int
    granule: int = 0

    @functools.cached_property
    def writer(self) -> np.ndarray:
        return np.zeros(-(-self.storage_bytes // self.granule), dtype=np.int32)

    @functools.cached_property
    def reader(self) -> np.ndarray:
        return np.zeros(-(-self.storage_bytes // self.granule), dtype=np.int32)


# Each tensor is in the middle of its own 2^44 addresses, so that an address identifies its argument.
_WINDOW = 44


class _LaunchWatch:
    """Checks the accesses of one launch."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.arguments: list[_Argument] = []
        self.memories: dict[int, _Memory] = {}
        # A barrier or a new program starts an epoch; stores before epoch `program` are from other programs.
        self.epoch = self.program = 0

    def pointer(self, name: str, value: Any) -> _Pointer:
        """Assigns a tensor its window of addresses."""
        tensor = interpreter._unwrap_tensor(value)
        address = (len(self.arguments) << _WINDOW) + (1 << (_WINDOW - 1)) + tensor.data_ptr() % 4096
        argument = _Argument(name, tensor, address, Traffic(tensor))
        self.arguments.append(argument)
        storage = tensor.untyped_storage()
        memory = self.memories.setdefault(storage.data_ptr(), _Memory(storage.nbytes()))
        memory.granule = math.gcd(memory.granule, argument.itemsize, argument.storage_offset)
        return _Pointer(value.dtype, address)

    def start_program(self) -> None:
        self.epoch += 1
        self.program = self.epoch

    def barrier(self) -> None:
        self.epoch += 1

    def fail(self, kind: FaultKind, detail: str, tensor: str | None = None, offset: int | None = None) -> NoReturn:
        program = interpreter.interpreter_builder.grid_idx
        raise KernelFault(kind, detail, self.kernel, _location(), program, tensor, offset)

    def require_defined(self, handle: TensorHandle, use: str, active: np.ndarray | None = None) -> None:
        undefined = handle.attr.get(_UNDEFINED)
        if undefined is not None and (undefined if active is None else undefined & active).any():
            self.fail("undefined", f"a lane masked off in a load without `other` reaches {use}")

    def load(self, pointers: TensorHandle, mask: np.ndarray, filler: np.ndarray) -> np.ndarray:
        """Loads, checks and counts; inactive lanes get `filler`."""
        addresses, accesses = self._resolve(pointers, mask)
        for access in accesses:
            access.argument.traffic.loaded += access.bytes
            memory, granules = self._granules(access)
            writer, reader = memory.writer[granules], memory.reader[granules]
            stale = (writer != 0) & ((writer < self.program) | (writer == self.epoch))
            self._forbid(stale, "race", "loads what this launch stores, with no barrier in between:", access)
            memory.reader[granules] = np.where((reader == 0) | (reader == self.program), self.program, -1)
        element = pointers.get_element_ty()
        data = interpreter._interpreter.load(addresses, mask, filler, interpreter._get_np_dtype(element))
        if element in _POISON:
            unwritten = _bits(data)[mask] == _POISON[element]
            for access in accesses:
                self._forbid(unwritten[access.lanes], "uninitialized", "loads what was never written:", access)
        return data

    def store(self, pointers: TensorHandle, values: np.ndarray, mask: np.ndarray) -> None:
        """Stores, checks and counts."""
        addresses, accesses = self._resolve(pointers, mask)
        for access in accesses:
            access.argument.traffic.stored += access.bytes
            memory, granules = self._granules(access)
            writer, reader = memory.writer[granules], memory.reader[granules]
            self._forbid((writer != 0) & (writer < self.program), "race", "stores what another program stores:", access)
            self._forbid((reader != 0) & (reader != self.program), "race", "stores what another program loads:", access)
            memory.writer[granules] = self.epoch
        interpreter._interpreter.store(addresses, values, mask)
        if any(access.bytes < access.offsets.size * access.size for access in accesses):
            kept = interpreter._interpreter.load(addresses, mask, values, values.dtype)
            lost = (_bits(kept) != _bits(values))[mask]
            for access in accesses:
                self._forbid(lost[access.lanes], "race", "lanes of one store write different values to", access)

    def _resolve(self, pointers: TensorHandle, mask: np.ndarray) -> tuple[np.ndarray, list[_Access]]:
        """Returns the addresses in memory of all lanes, and the accesses of the active ones."""
        active = pointers.data.ravel() if mask.all() else pointers.data[mask]
        if active.size == 0:
            return pointers.data, []
        windows = active >> np.uint64(_WINDOW)
        present = windows[:1] if (windows == windows[0]).all() else np.unique(windows)
        if present.max() >= len(self.arguments):
            self.fail("out of bounds", "an address that belongs to no argument of the launch")
        addresses, accesses = pointers.data, []
        for window in present:
            argument = self.arguments[int(window)]
            lanes = slice(None) if present.size == 1 else windows == window
            offsets = active[lanes].astype(np.int64) - argument.address
            access = _Access(argument, lanes, offsets, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
            self._require_inside(access)
            accesses.append(access)
            moved = pointers.data + np.uint64((argument.tensor.data_ptr() - argument.address) % 2**64)
            here = pointers.data >> np.uint64(_WINDOW) == window
            addresses = moved if present.size == 1 else np.where(here, moved, addresses)
        return addresses, accesses

    def _require_inside(self, access: _Access) -> None:
        argument = access.argument
        outside = (access.offsets < 0) | (access.offsets > argument.extent - access.size)
        elements = argument.extent // argument.itemsize
        self._forbid(outside, "out of bounds", f"outside the tensor's {elements} elements:", access)
        if argument.gaps is not None:
            between = argument.gaps[access.offsets // argument.itemsize]
            self._forbid(between, "out of bounds", "between the elements of a strided tensor:", access)

    def _granules(self, access: _Access) -> tuple[_Memory, np.ndarray]:
        memory = self.memories[access.argument.tensor.untyped_storage().data_ptr()]
        first = (access.offsets + access.argument.storage_offset) // memory.granule
        count = max(1, access.size // memory.granule)
        return memory, first if count == 1 else (first[:, None] + np.arange(count)).ravel()

    def _forbid(self, lanes: np.ndarray, kind: FaultKind, detail: str, access: _Access) -> None:
        if lanes.any():
            lane = int(np.argmax(lanes)) // (lanes.size // access.offsets.size)
            element = int(access.offsets[lane]) // access.argument.itemsize
            self.fail(kind, f"{detail} element {element} of {access.argument.name}", access.argument.name, element)


def _bits(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def _location() -> str:
    """file:line of the innermost frame that is neither this file's nor Triton's."""
    skipped = (__file__, str(Path(triton.__file__).parent))
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(skipped):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


# Undefined lanes: TensorHandle.attr[_UNDEFINED] holds them as a boolean array, if there are any.

_UNDEFINED = "undefined"


def _undefined(handle: TensorHandle) -> np.ndarray:
    return handle.attr.get(_UNDEFINED, np.zeros(handle.data.shape, dtype=bool))


def _with_undefined(handle: TensorHandle, lanes: np.ndarray) -> TensorHandle:
    if lanes.any():
        handle.set_attr(_UNDEFINED, np.broadcast_to(lanes, handle.data.shape))
    return handle


class _WatchedBuilder(_CorrectedBuilder):
    launch: _LaunchWatch

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.launch.start_program()

    def create_barrier(self) -> None:
        self.launch.barrier()

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *_: Any, **__: Any
    ) -> TensorHandle:
        mask = mask if isinstance(mask, TensorHandle) else TensorHandle(mask, tl.int1)
        self.launch.require_defined(mask, "the mask of a load")
        self.launch.require_defined(ptrs, "the address of a load", mask.data)
        element = ptrs.get_element_ty()
        if other is None:
            filler, undefined = np.broadcast_to(_poison(element), ptrs.data.shape), ~mask.data
        else:
            filler, undefined = other.data, ~mask.data & _undefined(other)
        return _with_undefined(TensorHandle(self.launch.load(ptrs, mask.data, filler), element), undefined)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *_: Any) -> None:
        mask = mask if isinstance(mask, TensorHandle) else TensorHandle(mask, tl.int1)
        self.launch.require_defined(mask, "the mask of a store")
        self.launch.require_defined(ptrs, "the address of a store", mask.data)
        self.launch.require_defined(value, "a store", mask.data)
        self.launch.store(ptrs, value.data, mask.data)

    def create_atomic_cas(self, *_: Any) -> NoReturn:
        self.launch.fail("atomic", "an atomic compare-and-swap")

    def create_atomic_rmw(self, *_: Any) -> NoReturn:
        self.launch.fail("atomic", "an atomic read-modify-write")

    def create_select(self, cond: TensorHandle, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        lanes = _undefined(cond) | np.where(cond.data, _undefined(lhs), _undefined(rhs))
        return _with_undefined(super().create_select(cond, lhs, rhs), lanes)


_MOVES = ("broadcast", "cat", "expand_dims", "join", "reshape", "splat", "split", "trans", "unsplat")
_SUMS = ("dot", "dot_scaled", "histogram")
_OWN_RULE = ("masked_load", "masked_store", "select", "load", "store", "print", "assert", "assume")


def _follow_undefined_lanes() -> None:
    """Makes each remaining operation of _WatchedBuilder mark the undefined lanes of its result."""

    def moved(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def move(self: _WatchedBuilder, *args: Any) -> Any:
            result = method(self, *args)
            if any(isinstance(arg, TensorHandle) and _UNDEFINED in arg.attr for arg in args):
                lanes = [
                    TensorHandle(_undefined(arg), tl.int1) if isinstance(arg, TensorHandle) else arg for arg in args
                ]
                parts = zip(_as_tuple(result), _as_tuple(method(self, *lanes)), strict=True)
                for part, undefined in parts:
                    _with_undefined(part, undefined.data)
            return result

        return move

    def combined(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def combine(self: _WatchedBuilder, *args: Any) -> Any:
            result = method(self, *args)
            lanes = [arg.attr[_UNDEFINED] for arg in args if isinstance(arg, TensorHandle) and _UNDEFINED in arg.attr]
            return _with_undefined(result, functools.reduce(np.logical_or, lanes)) if lanes else result

        return combine

    def summed(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def total(self: _WatchedBuilder, *args: Any) -> Any:
            for arg in args:
                if isinstance(arg, TensorHandle):
                    self.launch.require_defined(arg, "a reduction")
            return method(self, *args)

        return total

    for name, method in inspect.getmembers(_CorrectedBuilder, inspect.isfunction):
        operation = name.removeprefix("create_")
        if operation != name and operation not in _OWN_RULE and name not in vars(_WatchedBuilder):
            rule = moved if operation in _MOVES else summed if operation in _SUMS else combined
            setattr(_WatchedBuilder, name, rule(method))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


_follow_undefined_lanes()


class _WatchedReduce(_CorrectedReduce):
    def check_tensor(self, input: tuple[tl.tensor, ...]) -> None:
        super().check_tensor(input)
        _require_defined_lanes(input)


class _WatchedScan(_CorrectedScan):
    def check_tensor(self, input: tuple[tl.tensor, ...]) -> None:
        super().check_tensor(input)
        _require_defined_lanes(input)


def _require_defined_lanes(input: tuple[tl.tensor, ...]) -> None:
    for part in input:
        interpreter.interpreter_builder.launch.require_defined(part.handle, "a reduction")


class _WatchedSemantic(TritonSemantic):
    def binary_op_sanitize_overflow_impl(self, lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable[..., Any]) -> None:
        dtype = lhs.type.scalar
        if not 1 < dtype.int_bitwidth < 64:
            return
        combine = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
        low, high = dtype.get_int_min_value(), dtype.get_int_max_value()
        left, right = lhs.handle.data, rhs.handle.data
        # All results lie between those of the operands' minima and maxima.
        corners = [
            combine(int(x), int(y), dtype=np.int64)
            for x in (left.min(), left.max())
            for y in (right.min(), right.max())
        ]
        if low <= min(corners) and max(corners) <= high:
            return
        exact = combine(left.astype(np.int64), right.astype(np.int64))
        wrong = ((exact < low) | (exact > high)) & ~(_undefined(lhs.handle) | _undefined(rhs.handle))
        if wrong.any():
            value = exact[wrong].flat[0]
            self.builder.launch.fail("overflow", f"{value} is not in the range of {dtype}")


class _WatchedExecutor(_CorrectedExecutor):
    def __init__(self, trace: Trace, fn: Callable[..., None], *args: Any) -> None:
        super().__init__(fn, *args)
        self.trace = trace

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        builder = interpreter.interpreter_builder
        launch = builder.launch = _LaunchWatch(self.fn.__name__)
        try:
            super().__call__(*args, **kwargs)
        except InterpreterError as error:
            # The interpreter wraps an error once for each device function on the way out.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, KernelFault):
                cause = cause.__cause__
            raise error if cause is None else cause from None
        named = {name: value for name, value in kwargs.items() if name in self.arg_names}
        self.trace.launches.append(
            Launch(
                kernel=launch.kernel,
                module=self.fn.__globals__["__name__"],
                grid=builder.grid_dim,
                arguments=inspect.getcallargs(self.fn, *args, **named),
                options={name: value for name, value in kwargs.items() if name not in self.arg_names},
                traffic={argument.name: argument.traffic for argument in launch.arguments},
            )
        )

    def _argument(self, name: str, value: Any) -> Any:
        launch = interpreter.interpreter_builder.launch
        if name in self.constexprs:
            return value
        if hasattr(value, "data_ptr"):
            return launch.pointer(name, value)
        if isinstance(value, TensorDescriptor):
            return replace(value, base=launch.pointer(name, value.base))
        if isinstance(value, tuple):
            return compat.tuple_create(value, [self._argument(f"{name}[{i}]", item) for i, item in enumerate(value)])
        return super()._argument(name, value)
