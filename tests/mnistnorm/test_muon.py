"""The batched Muon, against torch.optim.Muon computed in the same dtype."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from mnistnorm.muon import BatchedMuon, orthogonalize

# Wide, tall, square, a single row and a single column, of convolutions and of a matrix.
SHAPES = [(8, 1, 3, 3), (12, 8, 3, 3), (50, 26, 1, 1), (6, 6), (1, 7), (7, 1, 1, 1)]

FORMATS = [torch.contiguous_format, torch.channels_last]

# Of the weights after a few steps of up to 0.1 each. In bfloat16 both round after each product, in another order.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


def make_weights(dtype: torch.dtype, memory_format: torch.memory_format) -> list[nn.Parameter]:
    tensors = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    return [
        nn.Parameter(tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor)
        for tensor in tensors
    ]


@pytest.fixture
def torch_muon_keeps_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has torch.optim.Muon iterate in the dtype of the gradients instead of bfloat16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.usefixtures("torch_muon_keeps_dtype")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.0},
        {"nesterov": False, "momentum": 0.7},
        {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1e-3},
        *({"adjust_lr_fn": name} for name in ("original", "match_rms_adamw")),
    ],
)
def test_it_is_muon(options: dict[str, Any], dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    weights = make_weights(dtype, memory_format)
    references = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in weights]
    muon = BatchedMuon(weights, lr=torch.tensor(0.1, dtype=torch.float64), **options)
    expected = torch.optim.Muon(references, lr=0.1, **options)
    for _ in range(4):
        for weight, reference in zip(weights, references, strict=True):
            weight.grad = torch.randn_like(weight)
            reference.grad = weight.grad.flatten(1).clone()
        muon.step()
        expected.step()
    tolerance = TOLERANCES[dtype]
    for weight, reference in zip(weights, references, strict=True):
        torch.testing.assert_close(weight.flatten(1), reference, rtol=tolerance, atol=tolerance)
        momentum, buffer = muon.state[weight]["momentum_buffer"], expected.state[reference]["momentum_buffer"]
        torch.testing.assert_close(momentum.flatten(1), buffer)


def test_its_state_dict_has_the_options_of_torchs() -> None:
    weights = make_weights(torch.float32, torch.contiguous_format)
    (group,) = BatchedMuon(weights).state_dict()["param_groups"]
    (expected,) = torch.optim.Muon([nn.Parameter(weight.flatten(1)) for weight in weights]).state_dict()["param_groups"]
    assert group == expected
    assert list(group) == list(expected)


def test_an_lr_from_the_device_counts_at_each_step() -> None:
    weight, lr = nn.Parameter(torch.zeros(4, 6)), torch.tensor(0.5)
    muon = BatchedMuon([weight], lr=lr, weight_decay=0.0)
    moves = []
    for _ in range(2):
        before = weight.detach().clone()
        weight.grad = torch.eye(4, 6)
        muon.step()
        moves.append((weight - before).norm().item())
        lr.fill_(0.25)
    assert moves[1] == pytest.approx(moves[0] / 2, rel=1e-5)


def test_rows_become_orthonormal_and_padding_stays_zero() -> None:
    torch.manual_seed(0)
    matrices = torch.zeros(2, 5, 9)
    matrices[0], matrices[1, :3, :4] = torch.randn(5, 9), torch.randn(3, 4)
    results = orthogonalize(matrices, (3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    for result in (results[0], results[1, :3, :4]):
        values = torch.linalg.svdvals(result)
        assert values.min() > 0.5
        assert values.max() < 1.3
    assert results[1, 3:].eq(0).all()
    assert results[1, :, 4:].eq(0).all()


def test_the_momentum_moves_between_memory_formats() -> None:
    """As when a run on a GPU, contiguous, goes on on a CPU, channels last."""
    gradients = [torch.randn(12, 8, 3, 3) for _ in range(2)]
    results = []
    for formats in ((FORMATS[0],) * 2, FORMATS):
        values, state = torch.zeros(12, 8, 3, 3), None
        for memory_format, gradient in zip(formats, gradients, strict=True):
            weight = nn.Parameter(values.contiguous(memory_format=memory_format))
            weight.grad = gradient.contiguous(memory_format=memory_format)
            muon = BatchedMuon([weight], lr=0.05)
            if state is not None:
                muon.load_state_dict(state)
            muon.step()
            values, state = weight.detach(), copy.deepcopy(muon.state_dict())
        results.append(values)
        momentum = 0.95 * 0.05 * gradients[0] + 0.05 * gradients[1]
        torch.testing.assert_close(state["state"][0]["momentum_buffer"], momentum)
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_a_state_from_before_the_first_step_has_no_momentum() -> None:
    """As torch.optim.Muon's, which makes its buffers in the first step."""
    weights = make_weights(torch.float32, torch.contiguous_format)
    muon = BatchedMuon(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    muon.step()
    muon.load_state_dict(muon.state_dict() | {"state": {}})
    assert all(muon.state[weight]["momentum_buffer"].eq(0).all() for weight in weights)


def test_what_it_does_not_take_is_named() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"adjust_lr_fn must be one of original, .*, got 'none'"):
        BatchedMuon([weight], adjust_lr_fn="none")
    muon = BatchedMuon([weight])
    with pytest.raises(RuntimeError, match=r"a weight of shape \(4, 6\) has no gradient"):
        muon.step()
    other = BatchedMuon([nn.Parameter(torch.randn(4, 5))]).state_dict()
    with pytest.raises(ValueError, match=r"momentum_buffer must be of shape \(4, 6\), got \(4, 5\)"):
        muon.load_state_dict(other)


def test_a_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    muon = BatchedMuon([weight])

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    before = weight.detach().norm().item()
    assert math.isfinite(muon.step(closure).item())
    assert weight.norm().item() < before
