"""What a CUDA graph demands of a step, checked and imitated on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read a number from the device, whose result's shape depends on values, or that take data of the host.
REFUSED = {
    "_local_scalar_dense": "reads a number",
    "is_nonzero": "reads a number",
    "equal": "reads a number",
    "nonzero": "has a shape that depends on values",
    "masked_select": "has a shape that depends on values",
    "_unique2": "has a shape that depends on values",
    "unique_dim": "has a shape that depends on values",
    "unique_consecutive": "has a shape that depends on values",
    "repeat_interleave": "has a shape that depends on values",
    "bincount": "has a shape that depends on values",
    "lift_fresh": "takes data of the host",
}
# Of Tensor; on a CPU they call no operator.
READING_METHODS = ("tolist", "numpy", "__array__", "cpu")


class _RefusesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in REFUSED and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            raise AssertionError(f"{name} {REFUSED[name]}")
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise AssertionError(f"{name} by a mask has a shape that depends on values")
        return func(*args, **kwargs)


class _RefusesMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", None) in READING_METHODS and isinstance(args[0], Tensor):
            raise AssertionError(f"Tensor.{func.__name__} reads from the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def refuse_what_no_graph_holds() -> Iterator[None]:
    """Raises AssertionError where a CUDA graph could not hold what runs, or would hold a number for all replays."""
    with ExitStack() as stack:
        stack.enter_context(_RefusesMethods())
        stack.enter_context(_RefusesOperators())
        yield


class Recording(TorchDispatchMode):
    """Records the operators that run and runs them again on the same memory, as a CUDA graph replays its kernels.

    Code in between does not run again: a number that it computed stays what it was.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            if func._schema.name.removeprefix("aten::").startswith(("empty", "new_empty")):
                continue
            for returned, old, new in zip(func._schema.returns, _flat(result), _flat(again), strict=False):
                if returned.alias_info is None and isinstance(old, Tensor):
                    old.copy_(new)


def _flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]
