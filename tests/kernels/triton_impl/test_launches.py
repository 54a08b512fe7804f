"""Direct launches, over a stub of the CUDA driver under Triton's own launcher: which way each call takes, with what."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from benchmarks import host
from benchmarks.instruments import machine_code, stub_driver
from mnistnorm import batch_norm_relu, group_norm_relu, layer_norm_relu
from mnistnorm.kernels import functional
from mnistnorm.kernels.triton_impl import launches, operation

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, with a driver"),
    pytest.mark.xdist_group("stub driver"),
]

CHANNELS = 8


@pytest.fixture(scope="module")
def process():
    """A process in which Triton compiles."""
    with machine_code.compiler_processes(1) as pool:
        reason = pool.submit(stub_driver.unavailable).result()
        if reason:
            pytest.skip(f"no stub of the driver: {reason}")
        yield pool


class Counted:
    """The launches that the driver saw, and those of them that went through kernel[grid]."""

    def __init__(self, stub: stub_driver.Stub) -> None:
        self.stub = stub
        self.through_triton = 0

    def of(self, call: Callable[[], object]) -> tuple[int, int]:
        launched, through_triton = self.stub.launches, self.through_triton
        call()
        return self.stub.launches - launched, self.through_triton - through_triton


@contextmanager
def counted() -> Iterator[Counted]:
    run = JITFunction.run

    def counting_run(self, *arguments, warmup, **options):
        count.through_triton += 1
        compiled = run(self, *arguments, warmup=True, **options)
        stub.keep_parameters(sum(kind != "constexpr" for kind in compiled.src.signature.values()))
        return run(self, *arguments, warmup=warmup, **options)

    patched = mock.patch.object(JITFunction, "run", counting_run)
    with stub_driver.stub_driver() as stub, host.triton_on_the_cpu(), patched:
        count = Counted(stub)
        yield count


def tensors(dtype=torch.float32):
    return torch.randn(4, CHANNELS, 3, 4, dtype=dtype), torch.ones(CHANNELS), torch.zeros(CHANNELS)


NORMS = {
    "batch": lambda x, w, b, **options: batch_norm_relu(x, None, None, w, b, True, impl="triton", **options),
    "group": lambda x, w, b, **options: group_norm_relu(x, 2, w, b, impl="triton", **options),
    "layer": lambda x, w, b, **options: layer_norm_relu(x, (3, 4), w[:1].expand(3, 4), impl="triton", **options),
}


def count_the_ways_of_a_call(norm):
    with counted() as count:
        x, w, b = tensors()
        x.requires_grad_()
        call = NORMS[norm]

        def step():
            torch.autograd.grad(call(x, w, b, dropout_p=0.1), x, torch.ones_like(x))

        return [count.of(step) for _ in range(3)]


@pytest.mark.parametrize("norm", NORMS)
def test_only_the_first_call_goes_through_triton(process, norm):
    first, *others = process.submit(count_the_ways_of_a_call, norm).result()
    assert first[0] == first[1] > 0
    assert others == [(first[0], 0)] * 2


def compare_both_ways(norm):
    """The parameters of every launch of a step, through Triton and direct."""
    with counted() as count:
        x, w, b = tensors()
        residual = torch.randn_like(x)
        results = []
        run = launches.Launch.run

        def spied_run(launch, arguments, varying=()):
            for _ in range(2):
                run(launch, arguments, varying)
                results.append(count.stub.last)

        with mock.patch.object(launches.Launch, "run", spied_run):
            x.requires_grad_()
            torch.manual_seed(0)
            y = NORMS[norm](x, w.requires_grad_(), b, residual=residual, dropout_p=0.1, activation="silu")
            torch.autograd.grad(y, (x, w), torch.ones_like(x))
        return results


@pytest.mark.parametrize("norm", NORMS)
def test_both_ways_hand_the_driver_the_same(process, norm):
    results = process.submit(compare_both_ways, norm).result()
    assert len(results) >= 4
    for through_triton, direct in zip(results[::2], results[1::2], strict=True):
        assert direct == through_triton
        assert len(direct.parameters) >= 4


def take_misaligned_tensors():
    with counted() as count:
        x, w, b = tensors()
        buffer = torch.randn(x.numel() + 1)
        misaligned = buffer[1:].view(x.shape)
        assert misaligned.data_ptr() % launches.ALIGNMENT == 4
        assert functional._kind(misaligned) == functional._kind(x)
        call = NORMS["group"]
        return [count.of(lambda x=x: call(x, w, b)) for x in (x, x, misaligned, misaligned, x)]


def test_misaligned_pointers_go_through_triton(process):
    assert process.submit(take_misaligned_tensors).result() == [(1, 1), (1, 0), (1, 1), (1, 1), (1, 0)]


def begin_with_a_misaligned_tensor():
    with counted() as count:
        x, w, b = tensors()
        misaligned = torch.randn(x.numel() + 1)[1:].view(x.shape)
        return [count.of(lambda x=x: NORMS["group"](x, w, b)) for x in (misaligned, x, x)]


def test_a_kernel_for_misaligned_pointers_is_not_kept(process):
    assert process.submit(begin_with_a_misaligned_tensor).result() == [(1, 1), (1, 1), (1, 0)]


def set_a_hook(name):
    with counted() as count:
        x, w, b = tensors()
        call = NORMS["group"]
        call(x, w, b)
        called = []
        if name == "pre_run":
            kernel = operation.forward_kernel
            kernel.add_pre_run_hook(lambda *arguments, **options: called.append(name))
            remove = kernel.pre_run_hooks.clear
        else:
            hook = getattr(triton.knobs.runtime, f"launch_{name}_hook")

            def note(metadata):
                called.append(metadata.get()["name"])

            hook.add(note)
            remove = lambda: hook.remove(note)  # noqa: E731
        hooked = count.of(lambda: call(x, w, b))
        remove()
        return hooked, called, count.of(lambda: call(x, w, b))


@pytest.mark.parametrize("name", ["enter", "exit", "pre_run"])
def test_hooks_see_every_launch(process, name):
    hooked, called, after = process.submit(set_a_hook, name).result()
    assert hooked == (1, 1)
    assert set(called) == {"pre_run" if name == "pre_run" else "forward_kernel"}
    assert after == (1, 0)


def change_what_is_asked():
    with counted() as count:
        x, w, b = tensors()
        call = NORMS["group"]
        changes = [
            {},
            {"dropout_p": 0.5},
            {"activation": "gelu"},
            {"residual": torch.randn_like(x)},
            {"eps": 1e-3},
        ]
        ways = [count.of(lambda options=options: call(x, w, b, **options)) for options in (*changes, *changes)]
        others = [
            count.of(lambda t=t: call(t, w.to(t.dtype), b.to(t.dtype)))
            for t in (x.double(), x.bfloat16(), x[:3], x.contiguous(memory_format=torch.channels_last))
        ]
        return ways, others


def test_other_options_and_dtypes_are_prepared_for_themselves(process):
    ways, others = process.submit(change_what_is_asked).result()
    assert ways == [(1, 1)] * 5 + [(1, 0)] * 5
    assert others == [(1, 1)] * 4


def pass_what_varies():
    with counted() as count:
        x, w, b = tensors()
        running = torch.zeros(CHANNELS), torch.ones(CHANNELS)
        seen = []
        for seed, momentum in ((1, 0.1), (1, 0.1), (2, 0.1), (2, 0.5)):
            torch.manual_seed(seed)
            batch_norm_relu(x, *running, w, b, True, momentum, dropout_p=0.1, impl="triton")
            *_, bits_of_momentum, bits_of_seed = count.stub.last.parameters
            seen.append((bits_of_momentum, bits_of_seed))
        return seen, count.through_triton


def test_seed_and_momentum_are_those_of_each_call(process):
    seen, through_triton = process.submit(pass_what_varies).result()
    assert through_triton == 1
    assert seen[0] == seen[1]
    assert seen[1][0] == seen[2][0]
    assert seen[1][1] != seen[2][1] == seen[3][1]
    assert seen[2][0] != seen[3][0]


def move_the_seed():
    with counted() as count:
        x, w, b = tensors()
        seeds = 1, torch.tensor(2), 3, torch.tensor(4), torch.tensor([0, 5])[1], 6
        with mock.patch.object(functional, "draw_seed", side_effect=seeds):
            return [count.of(lambda: NORMS["group"](x, w, b, dropout_p=0.1)) for _ in seeds]


def test_a_seed_in_memory_has_a_kernel_of_its_own(process):
    in_triton, direct = (1, 1), (1, 0)
    # The last tensor is not aligned as a direct launch requires.
    expected = [in_triton, in_triton, direct, direct, in_triton, direct]
    assert process.submit(move_the_seed).result() == expected


def launch_on_devices():
    with counted() as count:
        x, w, b = tensors()
        caught = []
        with mock.patch.object(launches.Launch, "run", lambda launch, *arguments: caught.append((launch, arguments))):
            NORMS["group"](x, w, b)
        launch, arguments = caught[0]
        streams = []
        for index in (0, 1):
            device = torch.device("cuda", index)
            sizes, constants = launch.sizes, launch.constants
            other = launches.Launch(launch.kernel, launch.grid[0], sizes, constants, device, launch.pair)
            other.run(*arguments)
            other.run(*arguments)
            streams.append(count.stub.last.stream)
        return streams


def test_launches_go_to_the_stream_of_their_device(process):
    assert process.submit(launch_on_devices).result() == [0, 16]


def refuse_after_a_good_call():
    with counted() as count:
        x, w, b = tensors()
        call = NORMS["group"]
        launched = count.stub.launches
        call(x, w, b)
        bad = [
            lambda: call(x, w[:3], b),
            lambda: call(x, w.double(), b),
            lambda: call(x, w, b, residual=x[:1]),
            lambda: call(x, w, b, dropout_p=2.0),
            lambda: group_norm_relu(x, 2.0, w, b, impl="triton"),
            lambda: group_norm_relu(x, 3, w, b, impl="triton"),
        ]
        for each in bad:
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                each()
        return count.stub.launches - launched


def test_bad_input_is_refused_after_a_good_call_of_the_same_kind(process):
    launched = process.submit(refuse_after_a_good_call).result()
    assert launched == 1
