"""Muon with all matrices in one batch: a step of few operators, which can be captured as a CUDA graph."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The factor on a matrix's learning rate, by its rows and columns, for each adjust_lr_fn of torch.optim.Muon.
_LR_RATIOS: dict[str | None, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}
_LR_RATIOS[None] = _LR_RATIOS["original"]


class BatchedMuon(torch.optim.Optimizer):
    """torch.optim.Muon for weights of shape (out, ...), each taken as a matrix of `out` rows.

    The matrices are orthogonalized together, zero-padded to one batch, in the weights' dtype; torch's Muon
    orthogonalizes them one by one in bfloat16. A step does not synchronise with the device.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
    https://kellerjordan.github.io/posts/muon/

    Args:
        weights: parameters of one dtype, on one device. All need a gradient at each step.
        lr: learning rate, a number or a 0-d tensor on the device.
        weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in torch.optim.Muon.

    Raises:
        ValueError: unknown `adjust_lr_fn`.
    """

    def __init__(
        self,
        weights: Sequence[nn.Parameter],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        if adjust_lr_fn not in _LR_RATIOS:
            known = ", ".join(name for name in _LR_RATIOS if name)
            raise ValueError(f"adjust_lr_fn must be one of {known}, got {adjust_lr_fn!r}")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(weights, defaults)
        self._dims = [_dims_in_memory(weight) for weight in weights]
        shapes = [(len(weight), weight[0].numel()) for weight in weights]
        batch_indices, vector_indices = _index_maps(shapes)
        self._batch_shape, device = batch_indices.shape, weights[0].device
        self._batch_indices, self._vector_indices = batch_indices.flatten().to(device), vector_indices.to(device)
        ratios = [_LR_RATIOS[adjust_lr_fn](*shape) for shape in shapes]
        self._ratios = weights[0].new_tensor(ratios).view(-1, 1, 1)
        # All momenta in one vector, and a zero at its end that fills the padding.
        self._momentum = weights[0].new_zeros(len(vector_indices) + 1)
        self._zero = weights[0].new_zeros(1)
        self._keep_momentum_as_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` as in torch.optim.Optimizer.step.

        Raises:
            RuntimeError: a weight has no gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        weights, lr = group["params"], group["lr"]
        gradients = torch.cat([*map(_gradient_in_memory, weights, self._dims), self._zero])
        self._momentum.lerp_(gradients, 1 - group["momentum"])
        update = gradients.lerp(self._momentum, group["momentum"]) if group["nesterov"] else self._momentum
        matrices = update.index_select(0, self._batch_indices).view(self._batch_shape)
        matrices = orthogonalize(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
        change = (matrices * (self._ratios * lr)).flatten().index_select(0, self._vector_indices)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(weights, self._like_weights(change))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state from state_dict, whatever device and memory format its weights had."""
        super().load_state_dict(state_dict)
        for weight, momentum in zip(self.param_groups[0]["params"], self._like_weights(self._momentum), strict=True):
            saved = self.state[weight].get("momentum_buffer", torch.zeros_like(weight))
            if saved.shape != weight.shape:
                raise ValueError(f"momentum_buffer must be of shape {(*weight.shape,)}, got {(*saved.shape,)}")
            momentum.copy_(saved)
        self._keep_momentum_as_state()

    def _keep_momentum_as_state(self) -> None:
        weights = self.param_groups[0]["params"]
        for weight, momentum in zip(weights, self._like_weights(self._momentum), strict=True):
            self.state[weight]["momentum_buffer"] = momentum

    def _like_weights(self, vector: Tensor) -> list[Tensor]:
        """Views of `vector`, one for each weight, in its shape and layout."""
        views, start = [], 0
        for weight, dims in zip(self.param_groups[0]["params"], self._dims, strict=True):
            part = vector[start : start + weight.numel()].view([weight.shape[dim] for dim in dims])
            views.append(part.permute([dims.index(dim) for dim in range(weight.dim())]))
            start += weight.numel()
        return views


def orthogonalize(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximates the nearest semi-orthogonal matrix of each: singular values from 0.7 to 1.2.

    Newton-Schulz iterations, x <- a x + (b g + c g^2) x with g = x x^T. Rows and columns of zeros stay zero.

    Args:
        matrices: (N, rows, columns), best with no more rows than columns.
        coefficients: a, b and c.
        steps: number of iterations.
        eps: lower bound of the Frobenius norm that a matrix is divided by.
    """
    a, b, c = coefficients
    x = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _index_maps(shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Maps between a vector of the elements of all matrices and a zero-padded batch of the matrices.

    Returns:
        for each element of the batch, (N, rows, columns), its index in the vector, or the index after the last for
        padding; and for each element of the vector, its index in the flat batch. Tall matrices are transposed there.
    """
    total = sum(rows * columns for rows, columns in shapes)
    batch_shape = (len(shapes), max(map(min, shapes)), max(map(max, shapes)))
    batch_indices, start = torch.full(batch_shape, total), 0
    for matrix, (rows, columns) in zip(batch_indices, shapes, strict=True):
        positions = torch.arange(start, start + rows * columns).view(rows, columns)
        positions = positions.t() if rows > columns else positions
        matrix[: len(positions), : positions.shape[1]] = positions
        start += rows * columns
    return batch_indices, batch_indices.flatten().argsort(stable=True)[:total]


def _dims_in_memory(weight: Tensor) -> list[int]:
    """The dimensions of `weight`: rows first, then the others in memory order.

    Muon does not depend on the order of a matrix's columns, and memory order needs no copy.
    """
    return [0, *sorted(range(1, weight.dim()), key=weight.stride, reverse=True)]


def _gradient_in_memory(weight: Tensor, dims: list[int]) -> Tensor:
    if weight.grad is None:
        raise RuntimeError(f"a weight of shape {(*weight.shape,)} has no gradient: call backward() before step()")
    return weight.grad.permute(dims).reshape(-1)
