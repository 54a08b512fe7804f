"""What the benchmarks run: the stock and the fused layers, and the shapes they run at."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from mnistnorm import BatchNormReLU2d, GroupNormReLU, LayerNormReLU
from mnistnorm.model import CNN, IMAGE_SIZE

T = TypeVar("T")
Shape = tuple[int, ...]
NORMS = ("batch", "group", "layer")
NUM_GROUPS = 2


def network_shapes(batch_size: int) -> list[Shape]:
    """The shapes that the eight norms of the MNIST CNN see."""
    shapes: list[Shape] = []
    with torch.device("meta"):
        model = CNN("batch")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
        model(torch.empty(batch_size, 1, IMAGE_SIZE, IMAGE_SIZE))
    return shapes


def stock_layer(norm: str, shape: Shape, dropout: float) -> nn.Module:
    """Norm, dropout and ReLU as three modules of torch.nn."""
    layers: dict[str, nn.Module] = {
        "batch": nn.BatchNorm2d(shape[1]),
        "group": nn.GroupNorm(NUM_GROUPS, shape[1]),
        "layer": nn.LayerNorm(shape[-1]),
    }
    return nn.Sequential(layers[norm], nn.Dropout(dropout), nn.ReLU())


def fused_layer(norm: str, shape: Shape, dropout: float) -> nn.Module:
    """The same as one module."""
    layers: dict[str, nn.Module] = {
        "batch": BatchNormReLU2d(shape[1], dropout_p=dropout),
        "group": GroupNormReLU(NUM_GROUPS, shape[1], dropout_p=dropout),
        "layer": LayerNormReLU(shape[-1], dropout_p=dropout),
    }
    return layers[norm]


LAYERS = {"stock": stock_layer, "fused": fused_layer}


@dataclass(frozen=True)
class Case:
    """One layer with an input and a gradient for its output."""

    layer: nn.Module
    input: Tensor
    grad: Tensor

    @classmethod
    def of(cls, contender: str, norm: str, shape: Shape, dropout: float, device: torch.device) -> "Case":
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=generator).to(device).requires_grad_()
        grad = torch.randn(shape, generator=generator).to(device)
        return cls(LAYERS[contender](norm, shape, dropout).to(device), x, grad)

    def forward_backward(self) -> None:
        self.input.grad = None
        self.layer(self.input).backward(self.grad)

    def saved_bytes(self) -> int:
        """What autograd keeps for the backward beyond the layer's input, output and parameters."""
        output, saved = saved_storages(lambda: self.layer(self.input))
        return bytes_beyond(saved, (self.input, output, *self.layer.parameters(), *self.layer.buffers()))


def saved_storages(call: Callable[[], T]) -> tuple[T, list[torch.UntypedStorage]]:
    """What `call` returns, and the storages of all that autograd keeps meanwhile for the backward."""
    saved: list[torch.UntypedStorage] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return call(), saved


def bytes_beyond(storages: Iterable[torch.UntypedStorage], tensors: Iterable[Tensor]) -> int:
    """The bytes of `storages`, each counted once, but for those of `tensors`."""
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for tensor in tensors:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def check(contender: str, norm: str, shape: Shape, device: torch.device) -> None:
    """Compares output and gradients with the stock layer's in float64, without dropout.

    Raises:
        AssertionError: they differ by more than float32's rounding explains.
    """
    case, exact = Case.of(contender, norm, shape, 0.0, device), Case.of("stock", norm, shape, 0.0, device)
    exact_input = exact.input.detach().double().requires_grad_()
    expected = exact.layer.double()(exact_input)
    expected.backward(exact.grad.double())
    case.forward_backward()
    pairs = [(case.layer(case.input), expected), (case.input.grad, exact_input.grad)]
    pairs += [
        (ours.grad, theirs.grad) for ours, theirs in zip(case.layer.parameters(), exact.layer.parameters(), strict=True)
    ]
    for actual, reference in pairs:
        assert actual is not None
        assert reference is not None
        tolerance = 1e-4 * max(1.0, reference.abs().max().item())
        torch.testing.assert_close(actual.double(), reference, atol=tolerance, rtol=0)
