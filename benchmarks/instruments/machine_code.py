"""Compiles Triton kernels to machine code without a GPU, and reports registers, spills and the widths of accesses.

One `capture` of many launches is faster than many captures: it runs the assembler and the disassembler once. Requires
a process in which TRITON_INTERPRET was not set when triton was imported; see `compiler_processes`.
"""

import hashlib
import itertools
import linecache
import os
import re
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.code_generator import ast_to_ttir
from triton.runtime.cache import get_cache_manager, triton_key
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Target:
    """A GPU architecture, and the limits of one of its multiprocessors.

    Attributes:
        gpu: Triton's target.
        block_shared_memory: bytes that one program, or each program of a cluster, may have.
        shared_memory: bytes of a multiprocessor.
        reserved_shared_memory: bytes that the system reserves for each program.
        warps: most resident warps of a multiprocessor.
        blocks: most resident programs of a multiprocessor.
        registers: 32-bit registers of a multiprocessor; 0 for AMD, whose compiler reports how many warps fit.
    """

    gpu: GPUTarget
    block_shared_memory: int
    shared_memory: int
    reserved_shared_memory: int
    warps: int
    blocks: int
    registers: int

    @property
    def name(self) -> str:
        return f"sm_{self.gpu.arch}" if self.gpu.backend == "cuda" else str(self.gpu.arch)


def _nvidia(capability: int, block_kib: int, kib: int, reserved: int, warps: int, blocks: int) -> Target:
    gpu = GPUTarget("cuda", capability, 32)
    return Target(gpu, block_kib * 1024, kib * 1024, reserved, warps, blocks, registers=65536)


def _amd(arch: str, warp_size: int, kib: int, warps: int, blocks: int) -> Target:
    return Target(GPUTarget("hip", arch, warp_size), 64 * 1024, kib * 1024, 0, warps, blocks, registers=0)


# NVIDIA: CUDA Programming Guide, "Technical Specifications per Compute Capability".
# AMD: LLVM's AMDGPUBaseInfo (getMaxWavesPerEU, getMaxWorkGroupsPerCU, getLocalMemorySize). The multiprocessor is a
# compute unit of 4 SIMDs (gfx9), or a work-group processor of 4 (gfx11, gfx12).
TARGETS = {
    target.name: target
    for target in (
        _nvidia(75, 64, 64, 0, 32, 16),
        _nvidia(80, 163, 164, 1024, 64, 32),
        _nvidia(86, 99, 100, 1024, 48, 16),
        _nvidia(89, 99, 100, 1024, 48, 24),
        _nvidia(90, 227, 228, 1024, 64, 32),
        _nvidia(100, 227, 228, 1024, 64, 32),
        _nvidia(120, 99, 100, 1024, 48, 24),
        _amd("gfx90a", 64, 64, 32, 16),
        _amd("gfx942", 64, 64, 32, 16),
        _amd("gfx1100", 32, 128, 64, 32),
        _amd("gfx1201", 32, 128, 64, 32),
    )
}

# Of all targets: the most threads of a program; parts of a multiprocessor with their own registers and warps.
_BLOCK_THREADS = 1024
_SIMDS = 4


@dataclass(frozen=True)
class Access:
    """Load or store instructions on global memory: their width, count and line in the kernel."""

    kind: Literal["load", "store"]
    bits: int
    count: int
    line: int
    source: str


@dataclass(frozen=True)
class Compiled:
    """The machine code of one launch of a kernel.

    Attributes:
        kernel: its name.
        target: name of the target.
        grid: programs on each axis.
        num_warps: of each program.
        num_ctas: programs of a cluster.
        registers: of each thread.
        spill_stores, spill_loads: bytes of each thread; for AMD, 4 for each spilled vector register.
        scalar_spills: AMD's scalar registers spilled to vector registers, which takes instructions but no memory.
        local_memory: bytes of each thread: stack, spills, indexed arrays.
        static_shared_memory, dynamic_shared_memory: bytes of each program.
        occupancy: the share of the target's warps that registers, shared memory and programs allow to be resident.
        instructions: number of instructions.
        accesses: instructions on global memory.
    """

    kernel: str
    target: str
    grid: tuple[int, ...]
    num_warps: int
    num_ctas: int
    registers: int
    spill_stores: int
    spill_loads: int
    scalar_spills: int
    local_memory: int
    static_shared_memory: int
    dynamic_shared_memory: int
    occupancy: float
    instructions: int
    accesses: tuple[Access, ...]

    @property
    def spills(self) -> bool:
        """Whether registers are spilled to memory."""
        return self.spill_stores + self.spill_loads > 0

    @property
    def fits(self) -> bool:
        """Whether the target can launch it."""
        return self.occupancy > 0

    def widths(self, kind: Literal["load", "store"], source: str = "") -> dict[int, int]:
        """Instructions by width in bits, of the kernel's lines that contain a text."""
        counts: Counter[int] = Counter()
        for access in self.accesses:
            if access.kind == kind and source in access.source:
                counts[access.bits] += access.count
        return dict(counts)


@dataclass
class Capture:
    """The launches that were compiled instead of run, and how many of them were not cached."""

    target: Target
    compilations: int = 0
    _launches: list[tuple[JITFunction, tuple[int, ...], CompiledKernel]] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return len(self._launches)

    @property
    def kernels(self) -> list[CompiledKernel]:
        """One for each launch, in order."""
        return [kernel for _, _, kernel in self._launches]

    def reports(self) -> list[Compiled]:
        """One for each launch, in order."""
        compiled = {kernel.hash: kernel for kernel in self.kernels}
        inspect = _inspect_nvidia if self.target.gpu.backend == "cuda" else _inspect_amd
        codes = dict(zip(compiled, inspect(list(compiled.values())), strict=True))
        return [_report(self.target, *launch, codes[launch[2].hash]) for launch in self._launches]


@contextmanager
def capture(target: str) -> Iterator[Capture]:
    """Compiles every kernel that is launched inside for a target, instead of launching it.

    Arguments are specialised as in a launch. Tensors may be on any device; those on "meta" need no memory, and their
    alignment follows from their storage offset. Each capture starts with an empty cache of compiled kernels.

    Args:
        target: a key of TARGETS.

    Raises:
        KeyError: unknown target.
        RuntimeError: the interpreter is on.
    """
    if target not in TARGETS:
        raise KeyError(f"unknown target {target!r}: expected one of {', '.join(TARGETS)}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton's interpreter is on: compile in one of compiler_processes()")
    captured = Capture(TARGETS[target])
    device = next(_devices)
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> CompiledKernel:
        cache = self.device_caches[device][0]
        known = len(cache)
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        captured.compilations += len(cache) - known
        if callable(grid):
            grid = grid(self.signature.bind_partial(*args, **_only_named(self, kwargs)).arguments)
        captured._launches.append((self, tuple(grid), kernel))
        return kernel

    driver = triton.runtime.driver
    previous = driver._active
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(ASTSource, "make_ir", _make_ir),
        mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _leave_out_assembly),
    ):
        driver.set_active(_Driver(TARGETS[target].gpu, device))
        try:
            yield captured
        finally:
            driver._active = previous


def compile_kernel(
    kernel: JITFunction, target: str, grid: tuple[int, ...] | Callable[..., tuple[int, ...]], *args: Any, **kwargs: Any
) -> Compiled:
    """Compiles one kernel as `kernel[grid](*args, **kwargs)` would for a target.

    Args:
        kernel: what @triton.jit gave.
        target: a key of TARGETS.
        grid: as in a launch.
        args: the kernel's arguments; tensors on any device.
        kwargs: the same by name, constexprs, num_warps and other options.

    Raises:
        KeyError: unknown target.
        RuntimeError: the interpreter is on.
    """
    with capture(target) as captured:
        kernel[grid](*args, **kwargs)
    return captured.reports()[0]


@contextmanager
def compiler_processes(workers: int = 2) -> Iterator[ProcessPoolExecutor]:
    """New processes in which Triton compiles, whether or not this one uses the interpreter.

    Submit functions of importable modules, with arguments that can be pickled, as meta tensors can.
    """
    with _fresh_processes(workers, interpret=None) as pool:
        yield pool


@contextmanager
def interpreter_process() -> Iterator[ProcessPoolExecutor]:
    """One new process in which Triton's interpreter runs the kernels."""
    with _fresh_processes(1, interpret="1") as pool:
        yield pool


@contextmanager
def _fresh_processes(workers: int, interpret: str | None) -> Iterator[ProcessPoolExecutor]:
    before = os.environ.get("TRITON_INTERPRET")
    _set_environment("TRITON_INTERPRET", interpret)
    try:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        for _ in range(workers):  # a task that finds no idle process starts one, with this environment
            pool.submit(time.sleep, 0.1)
    finally:
        _set_environment("TRITON_INTERPRET", before)
    with pool:
        yield pool


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# One device for each capture, because Triton caches compiled kernels by device.
_devices = itertools.count()


@dataclass(frozen=True)
class _Driver:
    """The parts of a driver that Triton needs before it launches."""

    gpu: GPUTarget
    device: int

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def _make_ir(
    source: ASTSource, target: GPUTarget, options: Any, codegen_fns: Any, module_map: Any, context: ir.context
) -> ir.module:
    """The IR of a kernel's Python source, from Triton's cache: it is the same for all targets of a backend."""
    key = f"{triton_key()}-{target.backend}-{source.hash()}"
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    name = f"{source.name}.ttir"
    if path := cache.get_file(name):
        module = ir.parse_mlir_module(path, context)
        module.context = context
        return module
    module = ast_to_ttir(source.fn, source, context, options, codegen_fns, module_map)
    cache.put(str(module), name, binary=False)
    return module


def _leave_out_assembly(*arguments: Any) -> tuple[str, str] | None:
    """A hook of Triton that skips the assembler: `_inspect_nvidia` runs it for all kernels at once."""
    if not arguments:
        return "not assembled", "not assembled"  # a part of the names under which Triton caches
    stages = arguments[1]
    if "cubin" in stages:
        stages["cubin"] = lambda ptx, metadata: b""
    return None


def _only_named(kernel: JITFunction, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in kernel.arg_names}


def _report(
    target: Target, kernel: JITFunction, grid: tuple[int, ...], compiled: CompiledKernel, code: "_Code"
) -> Compiled:
    metadata = compiled.metadata
    shared = code.static_shared_memory + metadata.shared
    accesses = Counter(code.accesses)
    file = kernel.fn.__code__.co_filename
    return Compiled(
        kernel=metadata.name,
        target=target.name,
        grid=grid,
        num_warps=metadata.num_warps,
        num_ctas=metadata.num_ctas,
        registers=code.registers,
        spill_stores=code.spill_stores,
        spill_loads=code.spill_loads,
        scalar_spills=code.scalar_spills,
        local_memory=code.local_memory,
        static_shared_memory=code.static_shared_memory,
        dynamic_shared_memory=metadata.shared,
        occupancy=_occupancy(target, code, metadata.num_warps, shared),
        instructions=code.instructions,
        accesses=tuple(
            Access(kind, bits, count, line, linecache.getline(file, line).strip())
            for (kind, bits, line), count in sorted(accesses.items())
        ),
    )


# Kind, width in bits, and the kernel's line.
_CodeAccess = tuple[Literal["load", "store"], int, int]


@dataclass(frozen=True)
class _Code:
    """The figures of one kernel from the tools; AMD's include the warps that its registers allow on a SIMD."""

    registers: int
    spill_stores: int
    spill_loads: int
    local_memory: int
    static_shared_memory: int
    instructions: int
    accesses: tuple[_CodeAccess, ...]
    simd_warps: int = 0
    scalar_spills: int = 0


def _occupancy(target: Target, code: _Code, num_warps: int, shared: int) -> float:
    """The share of the target's warps that can be resident, by the rules of the CUDA occupancy calculator."""
    if shared > target.block_shared_memory or num_warps * target.gpu.warp_size > _BLOCK_THREADS:
        return 0.0
    if target.gpu.backend == "cuda":
        warp_registers = -(-code.registers * target.gpu.warp_size // 256) * 256
        warps = target.registers // _SIMDS // warp_registers * _SIMDS
    else:
        warps = code.simd_warps * _SIMDS
    blocks = min(min(warps, target.warps) // num_warps, target.blocks)
    taken = -(-(shared + target.reserved_shared_memory) // 128) * 128
    if taken:
        blocks = min(blocks, target.shared_memory // taken)
    return blocks * num_warps / target.warps


_PTX_LINE = re.compile(r"\t\.loc\s+(\d+ \d+ \d+)(?:,.* inlined_at (\d+ \d+ \d+))?")
_SASS_KERNEL = re.compile(r"\.text\.kernel(\d+):")
_SASS_LINE = re.compile(r'\s*//## File ".*", line (\d+)$')
_SASS_INSTRUCTION = re.compile(r"\s*/\*\w+\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)((?:\.\w+)*)")


def _together(ptx: list[str]) -> tuple[str, list[int]]:
    """Joins kernels to one module, named kernel0, kernel1, ..., and lists the kernel's line for each line number in it.

    Each run of instructions from one place, and each piece of inline assembly, such as a load or a store, gets a line
    number of its own, counted from 0. Otherwise, the assembler would merge the calls of a device function, and count
    lines within a piece.
    """
    lines: list[int] = []
    header: dict[str, None] = {}
    body = []
    for index, text in enumerate(ptx):
        declarations, entry, code = text.partition(".visible .entry ")
        # After the code comes debug information.
        code = re.split(r"^\t\.(?:file|section)\t", code, maxsplit=1, flags=re.MULTILINE)[0]
        header.update(dict.fromkeys(line for line in declarations.splitlines() if not line.strip().startswith("//")))
        callers: dict[str, str] = {}
        expected = inside = False
        body.append(entry + re.sub(r"^\w+", f"kernel{index}", code.partition("\n")[0]))
        for line in code.splitlines()[1:]:
            if "// begin inline asm" in line:
                expected = inside = True
            elif "// end inline asm" in line:
                inside = False
            elif match := _PTX_LINE.match(line):
                if inside and not expected:
                    continue
                expected = False
                place, caller = match.groups()
                callers[place] = callers.get(caller, caller) if caller else place
                line = f"\t.loc\t1 {len(lines)} 0"
                lines.append(int(callers[place].split()[1]))
            body.append(line)
    return "\n".join([*header, *body, '\t.file\t1 "kernels.py"', ""]), lines


def _inspect_nvidia(compiled: list[CompiledKernel]) -> list[_Code]:
    if not compiled:
        return []
    metadata = compiled[0].metadata
    arch = metadata.target.arch
    text, lines = _together([kernel.asm["ptx"] for kernel in compiled])
    with tempfile.TemporaryDirectory() as directory:
        ptx, cubin = Path(directory, "kernels.ptx"), Path(directory, "kernels.cubin")
        ptx.write_text(text)
        # The same flags as Triton's.
        flags = ["-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={sm_arch_from_capability(arch)}"]
        if not metadata.enable_fp_fusion:
            flags.append("--fmad=false")
        log = _run(get_ptxas(arch).path, *flags, ptx, "-o", cubin)
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "--print-line-info", "--print-code", "--no-dataflow", cubin)
    resources = dict(re.findall(r"Compiling entry function 'kernel(\d+)'(.*(?:\n(?!.*Compiling entry).*)*)", log))
    instructions, accesses = Counter[int](), defaultdict[int, list[Any]](list)
    kernel = line = 0
    for text in sass.splitlines():
        if match := _SASS_KERNEL.match(text):
            kernel = int(match[1])
        elif match := _SASS_LINE.match(text):
            line = lines[int(match[1])]
        elif match := _SASS_INSTRUCTION.match(text):
            operation, modifiers = match[1], match[2].split(".")
            instructions[kernel] += operation != "NOP"
            if operation in ("LDG", "LDGSTS", "STG"):
                accesses[kernel].append((_kind(operation == "STG"), _sass_bits(modifiers), line))
    return [
        _Code(
            registers=_number(r"Used (\d+) registers", resources[str(index)]),
            spill_stores=_number(r"(\d+) bytes spill stores", resources[str(index)]),
            spill_loads=_number(r"(\d+) bytes spill loads", resources[str(index)]),
            local_memory=_number(r"(\d+) bytes stack frame", resources[str(index)]),
            static_shared_memory=_number(r"(\d+) bytes smem", resources[str(index)]),
            instructions=instructions[index],
            accesses=tuple(accesses[index]),
        )
        for index in range(len(compiled))
    ]


def _inspect_amd(compiled: list[CompiledKernel]) -> list[_Code]:
    return [_read_amd(kernel.asm["amdgcn"], kernel.asm["llir"]) for kernel in compiled]


def _read_amd(asm: str, llir: str) -> _Code:
    instructions, line = 0, 0
    accesses: list[_CodeAccess] = []
    for text in asm.partition(".Lfunc_end0:")[0].splitlines():
        if text.startswith("\t.loc") and (places := re.findall(r"[^\s:]+:(\d+):\d+", text)):
            line = int(places[-1])  # from the innermost place to the kernel's
        elif match := re.match(r"\t([a-z]\w+)", text):
            instructions += 1
            if access := re.fullmatch(r"(?:buffer|global|flat)_(load|store)_(\w+?)(?:_d16\w*)?", match[1]):
                accesses.append((_kind(access[1] == "store"), _amd_bits(access[2]), line))
    spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", asm)
    return _Code(
        registers=_number(r"\.vgpr_count:\s+(\d+)", asm),
        spill_stores=spilled,
        spill_loads=spilled,
        local_memory=_number(r"\.private_segment_fixed_size:\s+(\d+)", asm),
        static_shared_memory=_number(r"\.group_segment_fixed_size:\s+(\d+)", asm),
        instructions=instructions,
        accesses=tuple(_restore_lines(accesses, llir)),
        simd_warps=_number(r"; Occupancy: (\d+)", asm),
        scalar_spills=_number(r"\.sgpr_spill_count:\s+(\d+)", asm),
    )


_LLVM_LOCATION = re.compile(r"^!(\d+) = (?:distinct )?!DILocation\(line: (\d+)(?:.* inlinedAt: !(\d+))?", re.MULTILINE)
_LLVM_ACCESS = re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.(load|store)\.(?:v(\d+))?[a-z]+(\d+)\(.* !dbg !(\d+)")


def _restore_lines(accesses: list[_CodeAccess], llir: str) -> list[_CodeAccess]:
    """Restores the lines of accesses that LLVM moved to other blocks, which sets their line to 0."""
    if all(line for _, _, line in accesses):
        return accesses
    locations = {number: (int(line), caller) for number, line, caller in _LLVM_LOCATION.findall(llir)}

    def kernel_line(number: str) -> int:
        line, caller = locations[number]
        return kernel_line(caller) if caller else line

    before = Counter(
        (_kind(kind == "store"), int(length or 1) * int(bits), kernel_line(number))
        for kind, length, bits, number in _LLVM_ACCESS.findall(llir)
    )
    missing = defaultdict(list)
    for kind, bits, line in (before - Counter(accesses)).elements():
        missing[kind, bits].append((kind, bits, line))
    return [missing[access[:2]].pop(0) if access[2] == 0 and missing[access[:2]] else access for access in accesses]


def _run(*command: str | os.PathLike[str]) -> str:
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout + result.stderr


def _number(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


def _kind(stores: bool) -> Literal["load", "store"]:
    return "store" if stores else "load"


def _sass_bits(modifiers: list[str]) -> int:
    for modifier in modifiers:
        if match := re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            return int(match[1])
    return 32


def _amd_bits(suffix: str) -> int:
    if match := re.fullmatch(r"dword(?:x(\d))?", suffix):
        return 32 * int(match[1] or 1)
    if match := re.fullmatch(r"[biu](\d+)", suffix):
        return int(match[1])
    return 8 if suffix.endswith("byte") else 16
