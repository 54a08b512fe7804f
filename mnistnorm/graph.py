"""A step as a CUDA graph: run eagerly to warm up, captured once, replayed from then on."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global

from .errors import one_line

# Steps that run before the capture: in them libraries load, kernels compile and optimizers make their state.
WARMUP_STEPS = 3


class GraphedStep:
    """Calls `step`, which after WARMUP_STEPS calls is captured as a CUDA graph and replayed.

    The warm-up calls count: nothing is run for its own sake. Where the capture fails, `step` goes on being called.
    What `step` changes and what it reads but for its input must stay in the same memory.

    Args:
        step: takes a tensor on `device`, always of the same shape and dtype, and changes tensors there.
        device: of type cuda.
        optimizers: that it calls.
        generators: those on `device` that `step` draws from, besides the default one.

    Attributes:
        failure: in one line why the capture failed; None where it has not.
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
            # The context of the stream restores the current one, which that of the graph does not where it fails.
            with (
                _capturable(self._optimizers),
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream),
            ):
                self._step(static_input)
        except RuntimeError as error:
            self.failure = one_line(_first(error))
            # A capture that was cut off leaves the generators unusable in eager mode.
            for generator, state in zip(self._generators, states, strict=True):
                generator.graphsafe_set_state(state)
        else:
            self._graph, self._input = graph, static_input


@contextmanager
def _capturable(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Declares torch's optimizers capturable, which they demand during a capture and warn of at other times."""
    groups = [group for each in optimizers for group in each.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False


def _first(error: Exception) -> Exception:
    """What was raised first: the end of a capture that an error cut off raises one of its own."""
    while isinstance(error.__context__, Exception):
        error = error.__context__
    return error


def has_hooks(model: nn.Module) -> bool:
    """Whether Python code hangs on the calls of `model`: a replayed graph would not run it."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    everywhere = any(getattr(_global, f"_global_{kind}", None) for kind in kinds)
    on_modules = any(getattr(module, f"_{kind}", None) for module in model.modules() for kind in kinds)
    on_gradients = any(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        for parameter in model.parameters()
    )
    return bool(everywhere or on_modules or on_gradients)
