"""The Triton implementation of the contract: from checked tensors to launches.

The kernels take dense tensors that are all contiguous or all channels last. Other tensors are copied first.
"""

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import compat, sync
from ..activations import Activation
from ..contract import Epilogue, Gradients, Inputs, Needs, Operation, Saved, Seed
from ..norms import NO_BUFFERS, BatchNorm, Buffers, Norm
from .kernels import backward_kernel, forward_kernel, gradient_sums_kernel, parameter_sums_kernel, statistics_kernel
from .launches import Launch, Pair, current_target, device_memory, is_current, made_current
from .plans import EpilogueConstants, Kind, Plan, make_plan, parameter_sums_plan, saves_statistics


class TritonOperation(Operation):
    """A norm and its epilogue in Triton: the plans and the prepared launches for one kind of arguments.

    `plan` selects how slabs are reduced; None to choose.
    """

    def __init__(
        self, norm: Norm, epilogue: Epilogue, inputs: Inputs, buffers: Buffers = NO_BUFFERS, plan: Kind | None = None
    ) -> None:
        super().__init__(norm, epilogue, inputs, reads_output=False)
        input, weight, bias, residual = inputs
        activation = epilogue.activation
        dense, channels_last = as_dense(input, norm.leading(input))
        parameters = weight, bias, buffers.running_mean, buffers.running_var
        self.strides = dense.stride()
        self.copies = (
            dense is not input
            or _laid_out_like(dense, residual) is not residual
            or any(tensor is not None and not tensor.is_contiguous() for tensor in parameters)
        )
        self.device = input.device
        self._index = input.device.index  # None on a CPU
        self.geometry = norm.geometry(input.shape, channels_last)
        self.group = norm.process_group if isinstance(norm, BatchNorm) else None
        self.reduces = not isinstance(norm, BatchNorm) or norm.use_batch_stats
        self.dropout = round(epilogue.dropout_p * 2**31), epilogue.scale  # the probability in units of 2^-31
        self.constants = EpilogueConstants(epilogue.dropout_p > 0, activation.name, activation.parameter)
        self._itemsize, self._target = input.element_size(), current_target(input.device)
        # Sums over a process group need all slabs at once.
        self._memory = device_memory(input.device) if self.group is None else None
        self._plan: Kind | None = plan if self.group is None else "split"
        self._statistics_shape = norm.statistics_shape(input)
        self.statistics = Pair.of(5, self.geometry.slabs, self.dtype)  # mean and rstd of each slab
        self.saves_statistics = plan == "split" or saves_statistics(norm, self._itemsize)
        self._forward = _Forward(self, reduces=self.reduces and self.group is None)
        self._moments = None
        if self.group is not None:
            self._moments = _Statistics(self, self.make_plan(backward=False, reduces=True))
        self._is_plain = not self.copies and self._moments is None
        self._backwards: dict[Needs, _Backward] = {}

    def make_plan(self, *, backward: bool, reduces: bool) -> Plan:
        return make_plan(
            *(self.geometry, self._itemsize, self._target),
            backward=backward,
            residual=self.has_residual,
            dropout=self.epilogue.dropout_p > 0,
            reduces=reduces,
            clusters=compat.compiles_clusters(),
            kind=self._plan,
            memory=self._memory,
        )

    def forward(self, inputs: Inputs, buffers: Buffers, seed: Seed) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        if self._index is not None and not is_current(self.device):
            with made_current(self.device):
                return self.forward(inputs, buffers, seed)
        running = buffers[:2]
        if self._is_plain:
            return self._forward.run(inputs, running, buffers.momentum, seed)
        if self.copies:
            input, weight, bias, residual = inputs
            input, _ = as_dense(input, self.norm.leading(input))
            inputs = input, _contiguous(weight), _contiguous(bias), _laid_out_like(input, residual)
            running = _contiguous(buffers.running_mean), _contiguous(buffers.running_var)
        if self._moments is not None and self.group is not None:
            input = inputs[0]
            moments = self._moments.moments(input)
            mean, var, unbiased = sync.batch_statistics(moments, self.geometry.slab_size, self.group)
            buffers.update_(mean, unbiased)
            if input.numel() == 0:
                return torch.empty_like(input), (mean.new_zeros(self.statistics.size),)
            running = mean, var
        results = self._forward.run(inputs, running, buffers.momentum, seed)
        if self.reduces and self._moments is None:
            for buffer, updated in zip(buffers[:2], running, strict=True):
                if isinstance(buffer, Tensor) and isinstance(updated, Tensor) and updated is not buffer:
                    buffer.copy_(updated)
        return results

    def backward(self, needs: Needs, seed: Seed, grad_output: Tensor, saved: Saved) -> Gradients:
        if self._index is not None and not is_current(self.device):
            with made_current(self.device):
                return self.backward(needs, seed, grad_output, saved)
        backward = self._backwards.get(needs)
        if backward is None:
            backward = self._backwards[needs] = _Backward(self, needs)
        return backward.run(seed, grad_output, saved)

    def mean_and_rstd(self, saved: Saved) -> tuple[Tensor, Tensor]:
        statistics = saved[3]
        assert statistics is not None
        mean, rstd = self.statistics.unbind(statistics)
        return mean.view(self._statistics_shape), rstd.view(self._statistics_shape)

    def dropout_factor(self, input: Tensor, seed: Seed) -> Tensor:
        # The operation itself, with given statistics, weight 0 and bias 1, over zeros in the input's own strides.
        last = sum((length - 1) * stride for length, stride in zip(input.shape, input.stride(), strict=True))
        zeros = input.new_zeros(last + 1).as_strided(input.shape, input.stride())
        weight = input.new_zeros(self.norm.parameter_shape(input))
        norm, buffers = replace(self.norm, eps=1.0), NO_BUFFERS
        if isinstance(norm, BatchNorm):
            norm = replace(norm, use_batch_stats=False, process_group=None)
            buffers = Buffers(weight, torch.ones_like(weight))
        inputs = zeros, weight, torch.ones_like(weight), None
        with torch.no_grad():
            operation = TritonOperation(
                norm, Epilogue(self.epilogue.dropout_p, Activation("identity")), inputs, buffers
            )
            return operation.forward(inputs, buffers, seed)[0]


class _Statistics:
    """The launch that computes count, mean and sum of squared deviations of parts of each slab."""

    def __init__(self, operation: TritonOperation, plan: Plan) -> None:
        self._splits, self._slabs, self._dtype = plan.splits, operation.geometry.slabs, operation.dtype
        sizes, constants = (*_sizes(operation, plan), plan.splits), {"LAYOUT": plan.layout, **plan.options}
        self._launch = Launch(statistics_kernel, plan.slab_blocks * plan.splits, sizes, constants, operation.device)

    def partials(self, input: Tensor) -> Tensor:
        """A flat tensor for its results: moment, split, slab."""
        return input.new_empty(3 * self._splits * self._slabs, dtype=self._dtype)

    def run(self, input: Tensor, partials: Tensor, first_slab_block: int) -> None:
        self._launch.run((input, partials), (first_slab_block,))

    def moments(self, input: Tensor) -> Tensor:
        """The moments of the slabs as in sync.py."""
        partials = self.partials(input)
        self.run(input, partials, 0)
        return torch.stack(sync.merge_moments(partials.view(3, self._splits, self._slabs)))


class _Forward:
    """The launches of a forward."""

    def __init__(self, operation: TritonOperation, *, reduces: bool) -> None:
        plan = operation.make_plan(backward=False, reduces=reduces)
        self._size, self._dtype = operation.statistics.size if operation.saves_statistics else None, operation.dtype
        self._statistics = _Statistics(operation, plan) if plan.reduction == "split" else None
        self._first_slab_blocks = plan.first_slab_blocks
        fixed = (
            operation.geometry.slab_size,
            plan.slab_blocks,
            plan.row_programs,
            plan.splits,
            operation.norm.eps,
            *operation.dropout,
        )
        constants = {"LAYOUT": plan.layout, "EPILOGUE": operation.constants, **_last_launch(plan)}
        sizes = (*_sizes(operation, plan), *fixed)
        self._launch = Launch(forward_kernel, plan.programs, sizes, constants, operation.device, operation.statistics)

    def run(
        self, inputs: Inputs, running: tuple[Any, ...], momentum: float | Tensor, seed: Seed
    ) -> tuple[Tensor, tuple[Tensor | None]]:
        input = inputs[0]
        partials = None if self._statistics is None else self._statistics.partials(input)
        output = torch.empty_like(input)
        statistics = None if self._size is None else input.new_empty(self._size, dtype=self._dtype)
        number, seed_tensor = (seed, None) if isinstance(seed, int) else (0, seed)  # the kernels prefer a tensor
        tensors = (*inputs, output, statistics, *running, partials, seed_tensor)
        for first in self._first_slab_blocks:
            if self._statistics is not None and partials is not None:
                self._statistics.run(input, partials, first)
            self._launch.run(tensors, (first, momentum, number))
        return output, (statistics,)


class _Backward:
    """The launches of a backward that computes the gradients in `needs`."""

    def __init__(self, operation: TritonOperation, needs: Needs) -> None:
        geometry, device, statistics = operation.geometry, operation.device, operation.statistics
        self._operation, self._needs, self._group = operation, needs, operation.group
        reduces = operation.reduces and (needs[0] or not operation.saves_statistics)
        plan = operation.make_plan(backward=True, reduces=reduces)
        epilogue = replace(operation.constants, kept=operation.keeps)
        sizes, constants = _sizes(operation, plan), {"LAYOUT": plan.layout, "EPILOGUE": epilogue, **plan.options}
        self._splits, self._slabs, self._dtype = plan.splits, geometry.slabs, operation.dtype
        self._first_slab_blocks = plan.first_slab_blocks
        self._sums: Launch | None = None
        splits = plan.splits
        if plan.reduction == "split":
            fixed = (*sizes, splits, *operation.dropout)
            self._sums = Launch(gradient_sums_kernel, plan.slab_blocks * splits, fixed, constants, device, statistics)
            splits = splits if self._group is None else 1  # the sums over all processes
        constants = constants | _last_launch(plan)
        more = geometry.slab_size, plan.slab_blocks, plan.row_programs, splits, operation.norm.eps, *operation.dropout
        self._launch = Launch(backward_kernel, plan.programs, (*sizes, *more), constants, device, statistics)
        self._parameter_sums: Launch | None = None
        if plan.parameter_partials > 1 and (needs[1] or needs[2]):
            programs, blocks = parameter_sums_plan(geometry.parameters)
            sums = plan.parameter_partials, geometry.parameters
            self._parameter_sums_size = prod(sums)
            self._parameter_sums = Launch(parameter_sums_kernel, programs, sums, blocks, device)

    def run(self, seed: Seed, grad_output: Tensor, saved: Saved) -> Gradients:
        operation = self._operation
        input, weight, bias, statistics, *_ = saved
        statistics = statistics if operation.saves_statistics else None  # the operator passes an empty tensor
        kept = saved[4] if operation.keeps else None
        assert input is not None
        if operation.copies:
            input, _ = as_dense(input, operation.norm.leading(input))
            weight, bias = _contiguous(weight), _contiguous(bias)
        if grad_output.stride() != operation.strides:
            grad_output = _laid_out_like(input, grad_output)
        if kept is not None and kept.stride() != operation.strides:  # a saved-tensor hook may change the strides
            kept = _laid_out_like(input, kept)
        needs_input, needs_weight, needs_bias, needs_residual = self._needs
        grad_input = torch.empty_like(input) if needs_input else None
        grad_residual = torch.empty_like(input) if needs_residual else None
        grad_weight = torch.empty_like(weight) if needs_weight and weight is not None else None
        grad_bias = torch.empty_like(bias) if needs_bias and bias is not None else None
        weight_sums, bias_sums, partials = grad_weight, grad_bias, None
        if self._parameter_sums is not None:
            size, dtype = self._parameter_sums_size, self._dtype
            weight_sums = input.new_empty(size, dtype=dtype) if needs_weight else None
            bias_sums = input.new_empty(size, dtype=dtype) if needs_bias else None
        tensors = (grad_output, input, kept, weight, bias, statistics)
        number, seed_tensor = (seed, None) if isinstance(seed, int) else (0, seed)  # the kernels prefer a tensor
        if self._sums is not None:
            partials = input.new_empty(2 * self._splits * self._slabs, dtype=self._dtype)
        for first in self._first_slab_blocks:
            if self._sums is not None and partials is not None:
                self._sums.run((*tensors, partials, seed_tensor), (first, number))
                if self._group is not None:
                    partials = self._synchronise(partials, grad_weight, grad_bias)
                    weight_sums = bias_sums = None
            results = grad_input, grad_residual, weight_sums, bias_sums
            self._launch.run((*tensors, *results, partials, seed_tensor), (first, number))
        if self._parameter_sums is not None:
            self._parameter_sums.run((weight_sums, bias_sums, grad_weight, grad_bias))
        return grad_input, grad_weight, grad_bias, grad_residual

    def _synchronise(self, partials: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None) -> Tensor:
        """The sums over all processes. The parameters' gradients get the sums of this process."""
        assert self._group is not None
        sums = partials.view(2, self._splits, self._slabs).sum(1)
        for gradient, share in ((grad_bias, sums[0]), (grad_weight, sums[1])):
            if gradient is not None:
                gradient.copy_(share)
        # The kernel divides by the elements of this process.
        count = self._operation.geometry.slab_size
        return sync.averages(sums, count, self._group) * count


def _last_launch(plan: Plan) -> dict[str, Any]:
    """Constexprs that only the kernel of the last launch takes, and compiler options."""
    return {"REDUCTION": plan.reduction, "STREAMS": plan.streams, **plan.options}


def _sizes(operation: TritonOperation, plan: Plan) -> tuple[int, int, int, int]:
    """Sizes in vectors, so that the compiler knows that lengths are multiples of the vector length."""
    rows, channels, positions, groups = operation.geometry[:4]
    return rows, channels // plan.layout.channel_vector, positions // plan.layout.position_vector, groups


def as_dense(input: Tensor, leading: int) -> tuple[Tensor, bool]:
    """The input, copied if it is neither contiguous nor channels last, and whether it is channels last."""
    if input.is_contiguous():
        return input, False
    if leading == 1 and input.dim() > 2 and input.movedim(1, -1).is_contiguous():
        return input, True
    return input.contiguous(), False


def _laid_out_like(input: Tensor, tensor: Any) -> Any:
    """The tensor, if any, in the layout of the dense input."""
    if tensor is None or tensor.stride() == input.stride() or (tensor.is_contiguous() and input.is_contiguous()):
        return tensor
    return torch.empty_like(input).copy_(tensor)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
