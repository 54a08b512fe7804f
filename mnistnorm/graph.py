"""A step as a CUDA graph: run eagerly to warm up, captured once, then replayed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .errors import one_line

# Eager steps before the capture, in which libraries load, kernels compile and optimizers create their state.
WARMUP_STEPS = 3


class GraphedStep:
    """Calls `step`, captures it as a CUDA graph after WARMUP_STEPS calls and then replays the graph.

    The warm-up calls are ordinary steps. If the capture fails, `step` stays eager. All tensors that `step` reads or
    changes, except its input, must stay in the same memory.

    Args:
        step: takes a tensor on `device`, always of the same shape and dtype, and changes tensors there.
        device: a CUDA device.
        optimizers: optimizers that `step` calls.
        generators: generators on `device` that `step` draws from, besides the default one.

    Attributes:
        failure: why the capture failed, in one line; None if it has not failed.
    """

    def __init__(
        self,
        step: Callable[[Tensor], None],
        device: torch.device,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.failure: str | None = None
        self._step = step
        self._optimizers = optimizers
        self._stream = torch.cuda.Stream(device)
        self._generators = [torch.cuda.default_generators[self._stream.device_index], *generators]
        self._warmups = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._input: Tensor | None = None

    @property
    def captured(self) -> bool:
        """Whether calls replay the graph."""
        return self._graph is not None

    def __call__(self, input: Tensor) -> None:
        if self.failure is None and self._warmups < WARMUP_STEPS:
            self._warmups += 1
            self._warm_up(input)
            return
        if self.failure is None and self._graph is None:
            self._capture(input)
        if self._graph is None or self._input is None:
            self._step(input)
        else:
            self._input.copy_(input)
            self._graph.replay()

    def _warm_up(self, input: Tensor) -> None:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(input)
        current.wait_stream(self._stream)

    def _capture(self, input: Tensor) -> None:
        graph, static_input = torch.cuda.CUDAGraph(), input.clone()
        for generator in self._generators[1:]:
            graph.register_generator_state(generator)
        states = [generator.clone_state() for generator in self._generators]
        try:
            # torch.cuda.stream restores the current stream; torch.cuda.graph does not if the capture fails.
            with (
                _capturable(self._optimizers),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream),
            ):
                self._step(static_input)
        except RuntimeError as error:
            self.failure = one_line(_root_cause(error))
            # A failed capture leaves the generators unusable in eager mode.
            for generator, state in zip(self._generators, states, strict=True):
                generator.graphsafe_set_state(state)
        else:
            self._graph, self._input = graph, static_input


@contextmanager
def _capturable(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Sets `capturable` of torch's optimizers, which they require during a capture and warn about otherwise."""
    groups = [group for each in optimizers for group in each.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _root_cause(error: Exception) -> Exception:
    """The exception that was raised first: ending a failed capture raises another one."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def has_hooks(model: nn.Module) -> bool:
    """Whether `model` has hooks, which a replayed graph would not run."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    everywhere = any(getattr(nn_module, f"_global_{kind}", None) for kind in kinds)
    on_modules = any(getattr(module, f"_{kind}", None) for module in model.modules() for kind in kinds)
    on_gradients = any(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        for parameter in model.parameters()
    )
    return bool(everywhere or on_modules or on_gradients)
