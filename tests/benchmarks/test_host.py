"""benchmarks.host measures every norm and pass, and launches nothing."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton

from benchmarks import host
from benchmarks.instruments import machine_code, stub_driver, watch
from mnistnorm.kernels.triton_impl.launches import Launch


def test_prints_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "host.json"
    assert host.main(["--calls", "1", "--rounds", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert host.METHOD in printed
    report = json.loads(file.read_text())
    assert report["method"] == host.METHOD
    assert {(row["norm"], row["dropout"], row["pass"]) for row in report["rows"]} == {
        (norm, dropout, name) for norm in host.NORMS for dropout in (0.05, 0.0) for name in host.PASSES
    }
    for row in report["rows"]:
        assert set(row["microseconds"]) == {"stock", "fused"}
        assert all(len(values) == 2 and min(values) > 0 for values in row["microseconds"].values())
        assert host.line(row) in printed


def test_modules_are_measured_with_their_launches(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    flags = ["--modules", "--calls", "1", "--rounds", "2", "--dropout", "0.05", "--json", str(file)]
    with machine_code.compiler_processes(1) as pool:
        reason = pool.submit(stub_driver.unavailable).result()
        if reason:
            pytest.skip(f"no stub of the driver: {reason}")
        assert pool.submit(host.main, flags).result() == 0
    report = json.loads(file.read_text())
    assert report["method"] == host.MODULES_METHOD
    *chains, launch = report["rows"]
    assert [(row["norm"], row["pass"]) for row in chains] == [(norm, "modules") for norm in host.NORMS]
    assert launch["pass"] == "launch: kernel[grid], ours"


def test_modules_are_refused_in_one_line_where_there_is_no_stub(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stub_driver, "unavailable", lambda: "no C compiler found")
    assert host.main(["--modules"]) == 1
    assert "--modules cannot use the stub of the CUDA driver: no C compiler found" in capsys.readouterr().err


@pytest.mark.parametrize("norm", host.NORMS)
def test_the_fused_call_reaches_its_launch_and_no_further(norm: str) -> None:
    kernels: list[str] = []

    def run(launch: Launch, tensors: tuple[Any, ...], varying: tuple[Any, ...] = ()) -> None:
        kernels.append(launch.kernel.__name__)

    parameters = host.SHAPE[-1:] if norm == "layer" else host.SHAPE[1:2]
    inputs = [torch.randn(shape, requires_grad=True) for shape in (host.SHAPE, parameters, parameters)]
    with host.launches_skipped(), mock.patch.object(Launch, "run", run):
        output = host.functions(norm, 0.05)["fused"](*inputs)
        torch.autograd.grad(output, inputs, torch.ones_like(output))
    # Two samples give two partial sums of the parameter gradients, except where a slab is a channel.
    sums = [] if norm == "batch" else ["parameter_sums_kernel"]
    assert kernels == ["forward_kernel", "backward_kernel", *sums]


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("norm", host.NORMS)
def test_both_compute_the_same(norm: str) -> None:
    parameters = host.SHAPE[-1:] if norm == "layer" else host.SHAPE[1:2]
    inputs = [torch.randn(shape) for shape in (host.SHAPE, parameters, parameters)]
    functions = host.functions(norm, 0.0)
    with watch.correct_interpreter():
        torch.testing.assert_close(functions["fused"](*inputs), functions["stock"](*inputs))
