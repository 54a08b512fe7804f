"""Machine code of the kernels for many GPUs, compiled without one: it fits, does not spill, and moves 128 bits at once.

The whole matrix takes long: `make test-exhaustive` runs it. Run on pytest's report, this module then stores digests of
the sources with which the whole matrix passed. The default run fails if one of them has changed since.
"""

import hashlib
import json
import re
import sys
from collections import defaultdict
from datetime import datetime
from functools import cache
from itertools import product
from math import gcd
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import torch
import triton

from benchmarks.compiled import ACTIVATION_LOADS, ACTIVATION_STORES
from benchmarks.instruments import machine_code
from benchmarks.instruments.interception import planned_for
from mnistnorm.kernels.activations import ACTIVATIONS, Activation
from mnistnorm.kernels.contract import Epilogue
from mnistnorm.kernels.norms import BatchNorm, Buffers, GroupNorm, LayerNorm
from mnistnorm.kernels.triton_impl.operation import TritonOperation
from mnistnorm.kernels.triton_impl.plans import Memory

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
NORMS = ("batch", "group", "layer")
NETWORK = (128, 8, 26, 26)
LARGE = (64, 64, 56, 56)
LATER_IN_NETWORK = ((24, 8), (22, 8), (9, 12), (7, 14), (7, 8), (5, 26), (5, 50))
PRIME = (13, 7, 17, 19)
SHAPES = (
    *(NETWORK, *((128, channels, size, size) for size, channels in LATER_IN_NETWORK)),
    *(LARGE, (64, 256, 14, 14), PRIME),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Options that change the code, in float32, which needs the most registers. "dropout-residual" contains the code of a
# residual alone and without ReLU. "graph": the seed is in memory, as in a CUDA graph. "eval": batch norm with given
# statistics. "streams": a split plan in blocks of slabs for a small L2.
VARIANTS = ("dropout", "dropout-residual", "graph-dropout-residual", "eval", "streams-residual")
# The other activations, each with different parts of a pre-activation.
ACTIVATION_VARIANTS = (
    *("silu", "gelu-residual", "gelu_tanh-dropout-residual", "hardswish", "leaky_relu-residual", "relu6"),
)
# The ones that `make test` compiles.
SAMPLED_VARIANTS = {"batch": "gelu_tanh-dropout-residual", "group": "gelu-residual", "layer": "silu"}

# What the machine code and the matrix depend on, and the file for their digests.
ROOT = Path(__file__).parents[3]
SOURCES = (
    *(f"kernels/triton_impl/{name}.py" for name in ("device_functions", "kernels", "plans", "operation", "launches")),
    *("kernels/norms.py", "benchmarks/instruments/machine_code.py", "benchmarks/compiled.py"),
    "tests/kernels/triton_impl/test_compile_matrix.py",
)
PASSED = Path(__file__).with_name("compile_matrix.json")


class Case(NamedTuple):
    norm: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    target: str
    variant: str = "plain"

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{self.target}-{self.group}-{str(self.dtype)[6:]}-{layout}-{self.variant}"

    @property
    def group(self) -> str:
        """The cases to compile together: their kernels have much in common, for one target and between targets."""
        return f"{self.norm}-{'x'.join(map(str, self.shape))}"

    @property
    def length(self) -> int:
        """Elements of the longest run that the kernels may move as one: adjacent in memory and with the same mask."""
        groups = 2 if self.norm == "group" and self.shape[1] % 2 == 0 else 1
        if self.channels_last:
            return self.shape[1] // groups
        return self.shape[3] if self.norm == "layer" else self.shape[2] * self.shape[3]

    @property
    def bits(self) -> int:
        itemsize = self.dtype.itemsize
        return 8 * itemsize * gcd(self.length, 16 // itemsize)

    @property
    def activation(self) -> Activation:
        return Activation.of(next((name for name in self.variant.split("-") if name in ACTIVATIONS), "relu"))

    @property
    def sums_parameters(self) -> bool:
        """Whether several programs sum the gradient of the same parameter."""
        if self.norm == "layer" and self.channels_last and self.shape == LARGE:
            return self.dtype != torch.float64  # a parameter for each element of a row: one program sums all rows
        return self.norm != "batch" or self.variant == "eval"  # else a slab has its own parameters

    @property
    def launches(self) -> int:
        """For a shape of the network and a target with large clusters, without the sums of parameter gradients."""
        size = self.shape[2]
        if self.norm == "group" and self.channels_last and size >= 24 and self.dtype == torch.float64:
            return 3  # only the backward is split, for lack of registers
        if self.norm == "batch":
            # A tile of adjacent channels has several slabs.
            fits = not self.channels_last and not (size >= 22 and self.dtype == torch.float64)
        else:
            # Two programs share the eight channels in float32. In half precision, they are one vector of one program.
            fits = not (self.norm == "layer" and self.channels_last and size >= 24 and self.dtype != torch.float32)
        return 2 if fits else 4


def launch(case, samples=None, plan=None):
    """Runs the forward and the backward for all gradients on tensors without memory."""
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    shape = (samples or case.shape[0], *case.shape[1:])
    x = torch.empty(shape, dtype=case.dtype, device="meta").to(memory_format=layout)
    residual = torch.empty_like(x) if "residual" in case.variant else None
    buffers = Buffers()
    if case.norm == "batch":
        norm = BatchNorm(1e-5, use_batch_stats=case.variant != "eval")
        buffers = Buffers(*torch.empty(2, shape[1], device="meta").unbind(), momentum=0.1)
    elif case.norm == "group":
        norm = GroupNorm(2 if shape[1] % 2 == 0 else 1, 1e-5)
    else:
        norm = LayerNorm(shape[1:] if case.channels_last else shape[3:], 1e-5)
    weight, bias = torch.empty(2, *norm.parameter_shape(x), device="meta").unbind()
    epilogue = Epilogue(0.05 if "dropout" in case.variant else 0.0, case.activation)
    inputs = x, weight, bias, residual
    seed = torch.empty((), dtype=torch.int64, device="meta") if "graph" in case.variant else 1
    streams = "streams" in case.variant
    memory = Memory(x.nbytes, 0) if streams else None
    with planned_for(machine_code.TARGETS[case.target].gpu, memory):
        operation = TritonOperation(norm, epilogue, inputs, buffers, "split" if streams else plan)
        y, statistics = operation.forward(inputs, buffers, seed)
        kept = {None: (), "output": (y,), "residual": (residual,)}[operation.keeps]
        saved = (*inputs[:3], *statistics, *kept)
        operation.backward((True, True, True, residual is not None), seed, torch.empty_like(x), saved)


def compile_cases(target, cases):
    """Reports of the launches of each case, all for one target."""
    ends = []
    with machine_code.capture(target) as captured:
        for case in cases:
            launch(case)
            ends.append(captured.launches)
    reports = captured.reports()
    return {case: reports[start:end] for case, start, end in zip(cases, [0, *ends], ends, strict=False)}


def count_compilations(case, batch_sizes, plan):
    counts = []
    with machine_code.capture(case.target) as captured:
        for samples in batch_sizes:
            launch(case, samples, plan)
            counts.append(captured.compilations)
    return counts


def marks_of(case):
    """Which run compiles it: `make test` two shapes of the network and the prime one, `make test-slow` a few more."""
    if case.variant in ACTIVATION_VARIANTS:
        sampled = case.shape == NETWORK and case.target == "sm_90"
        marks = [] if case.variant == SAMPLED_VARIANTS[case.norm] else [pytest.mark.slow]
    elif case.shape[0] == NETWORK[0]:
        dtypes = {NETWORK: (torch.float32, torch.bfloat16), (128, 14, 7, 7): (torch.float32,)}.get(case.shape, ())
        sampled = (
            case.target == "sm_90" and case.dtype in dtypes and case.variant in ("plain", "graph-dropout-residual")
        )
        sampled = sampled and not case.channels_last
        marks = []
    else:
        sampled = case.target in ("sm_75", "gfx942") and case.dtype == torch.float32
        sampled = sampled and case.variant in ("plain", "streams-residual")
        sampled = sampled and (not case.channels_last or case.shape == (64, 256, 14, 14))
        marks = [] if case.shape == PRIME else [pytest.mark.slow]
    return marks if sampled else [pytest.mark.exhaustive]


def cases():
    matrix = [Case(*values) for values in product(NORMS, SHAPES, DTYPES, (False, True), TARGETS)]
    matrix += [
        Case(norm, shape, torch.float32, False, target, variant)
        for norm, shape, target, variant in product(
            NORMS, (NETWORK, LARGE, PRIME), TARGETS, (*VARIANTS, *ACTIVATION_VARIANTS)
        )
        if (norm == "batch" or variant != "eval") and (norm != "layer" or variant != "streams-residual")
    ]
    return [
        pytest.param(
            case,
            id=str(case),
            marks=[pytest.mark.xdist_group(case.group), *marks_of(case)],
        )
        for case in matrix
    ]


@pytest.fixture(scope="session")
def processes(worker_id):
    # One for each worker of pytest-xdist.
    with machine_code.compiler_processes(2 if worker_id == "master" else 1) as pool:
        yield pool


@pytest.fixture(scope="session")
def reports(request, processes):
    """Reports of a case. The first case of a group compiles all cases of that group in this run."""
    groups = defaultdict(lambda: defaultdict(list))
    for item in request.session.items:
        if "reports" in item.fixturenames:
            case = item.callspec.params["case"]
            groups[case.group][case.target].append(case)

    @cache
    def compiled(group):
        return {target: processes.submit(compile_cases, target, cases) for target, cases in groups[group].items()}

    return lambda case: compiled(case.group)[case.target].result()[case]


def test_every_activation_is_compiled():
    variants = {Case("batch", PRIME, torch.float32, False, "sm_90", variant) for variant in ACTIVATION_VARIANTS}
    compiled = {case.activation.name for case in variants} | {"relu"}
    # The code of identity is a part of all others.
    assert compiled | {"identity"} == set(ACTIVATIONS)


@pytest.mark.parametrize("case", cases())
def test_fits_without_spills_and_moves_wide(reports, case):
    names = [compiled.kernel for compiled in reports(case)]
    assert names.count("parameter_sums_kernel") == case.sums_parameters
    if case.shape[0] == NETWORK[0] and case.target in ("sm_90", "sm_100") and "streams" not in case.variant:
        assert len(names) == case.launches + case.sums_parameters
    for compiled in reports(case):
        assert compiled.fits, compiled
        assert not compiled.spills, compiled
        assert compiled.local_memory == 0, compiled
        if compiled.kernel == "parameter_sums_kernel":  # moves no activations
            continue
        loads = {bits for line in ACTIVATION_LOADS for bits in compiled.widths("load", line)}
        stores = {bits for line in ACTIVATION_STORES for bits in compiled.widths("store", line)}
        assert loads == {case.bits}, compiled
        assert stores == ({case.bits} if compiled.kernel in ("forward_kernel", "backward_kernel") else set()), compiled


def marked_instructions(case):
    """By kernel: its wide loads and stores, which move activations, and how many of each have a mark for the L2."""
    with machine_code.capture(case.target) as captured:
        launch(case)
    counts = {}
    for kernel in captured.kernels:
        loads, stores = (re.findall(rf"{kind}\.global\S*\.v4\S*", kernel.asm["ptx"]) for kind in ("ld", "st"))
        marked_loads = sum("L2::cache_hint" in load for load in loads)
        counts[kernel.name] = len(loads), marked_loads, len(stores), sum(".cs." in store for store in stores)
    return counts


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("target", ["sm_75", "sm_90"])
def test_the_last_launch_marks_what_it_moves(processes, norm, target):
    case = Case(norm, (8, 16, 32, 32), torch.float32, False, target, "streams-residual")
    counts = processes.submit(marked_instructions, case).result()
    for name in ("statistics_kernel", "forward_kernel", "gradient_sums_kernel", "backward_kernel"):
        loads, marked_loads, stores, marked_stores = counts[name]
        is_last = name in ("forward_kernel", "backward_kernel")
        assert marked_loads == (loads if is_last and target == "sm_90" else 0)
        assert marked_stores == (stores if is_last else 0)
        assert loads > 0
        assert (stores > 0) == is_last


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("target", "plan"), [("sm_90", "resident"), ("sm_90", "split"), ("gfx942", "split")])
def test_batch_size_does_not_recompile(processes, norm, target, plan):
    case = Case(norm, NETWORK, torch.float32, False, target)
    first, *later = processes.submit(count_compilations, case, [128, 127, 100, 112], plan).result()
    assert later == [first] * 3


def versions():
    """The version of Triton and a digest of each source."""
    digests = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in SOURCES}
    return {"triton": triton.__version__, **digests}


def test_the_whole_matrix_has_passed_with_these_sources():
    passed, now = json.loads(PASSED.read_text()), versions()
    if passed["triton"] != now["triton"]:
        pytest.skip(f"the whole matrix has passed with Triton {passed['triton']}")
    changed = [name for name in now if passed.get(name) != now[name]]
    assert not changed, f"{', '.join(changed)} changed since the whole matrix passed: run make test-exhaustive"


def exhaustive_cases():
    return sum(any(mark.name == "exhaustive" for mark in case.marks) for case in cases())


def note(report):
    """Stores the digests of the sources if every case in a JUnit report passed. Returns a message."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    passed = [case for case in suite.iter("testcase") if len(case) == 0]  # a failure or a skip would be in it
    if len(passed) != exhaustive_cases():
        return f"{len(passed)} of the {exhaustive_cases()} cases passed: digests not stored"
    started = datetime.fromisoformat(suite.get("timestamp")).timestamp()
    changed = [name for name in SOURCES if (ROOT / name).stat().st_mtime > started]
    if changed:
        sys.exit(f"digests not stored, run it again: {', '.join(changed)} changed meanwhile")
    PASSED.write_text(json.dumps(versions(), indent=1) + "\n")
    return f"digests stored in {PASSED.name}"


class TestNote:
    EXPECTED = exhaustive_cases()

    @pytest.fixture(autouse=True)
    def passed(self, tmp_path, monkeypatch):
        path = tmp_path / "passed.json"
        monkeypatch.setattr(sys.modules[__name__], "PASSED", path)
        return path

    def report(self, tmp_path, timestamp, inside):
        path = tmp_path / "report.xml"
        path.write_text(f'<testsuites><testsuite timestamp="{timestamp}">{inside}</testsuite></testsuites>')
        return path

    def test_all_of_the_matrix(self, tmp_path, passed):
        report = self.report(tmp_path, "2100-01-01T00:00:00+00:00", self.EXPECTED * "<testcase/>")
        assert note(report) == "digests stored in passed.json"
        assert json.loads(passed.read_text()) == versions()

    @pytest.mark.parametrize("outcome", ["failure", "error", "skipped"])
    def test_all_but_one(self, outcome, tmp_path, passed):
        inside = (self.EXPECTED - 1) * "<testcase/>" + f"<testcase><{outcome}/></testcase>"
        report = self.report(tmp_path, "2100-01-01T00:00:00+00:00", inside)
        assert note(report) == f"{self.EXPECTED - 1} of the {self.EXPECTED} cases passed: digests not stored"
        assert not passed.exists()

    def test_a_source_that_changed_meanwhile(self, tmp_path, passed):
        report = self.report(tmp_path, "2000-01-01T00:00:00+00:00", self.EXPECTED * "<testcase/>")
        with pytest.raises(SystemExit, match=r"kernels/triton_impl/plans\.py.* changed meanwhile"):
            note(report)
        assert not passed.exists()


if __name__ == "__main__":
    print(note(sys.argv[1]))
