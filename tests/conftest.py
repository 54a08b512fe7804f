"""Set-up shared by all tests: where there is no GPU, Triton's interpreter runs the kernels, and is watched."""

import os
from collections.abc import Callable, Iterator
from multiprocessing import get_context

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit decorates, so set before triton is imported

# What these check is the code that this version of Triton's compiler generates.
COMPILER = (3, 8)
GENERATED_CODE = {"test_compile_matrix.py", "test_machine_code.py", "test_programs.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from mnistnorm.kernels.compat import triton_version

    for item in items:
        if item.path.name in GENERATED_CODE and triton_version() < COMPILER:
            item.add_marker(pytest.mark.skip(reason="checks the code that Triton 3.8 generates"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in each test, whichever ran before it in this process."""
    torch.manual_seed(0)


@pytest.fixture
def device() -> Iterator[str]:
    """Where kernels run: a GPU, or a CPU with the interpreter, which then also raises what a GPU would not forgive."""
    if torch.cuda.is_available():
        yield "cuda"
    else:
        from benchmarks.instruments import watch

        with watch.watch():
            yield "cpu"


@pytest.fixture
def run_two_processes() -> Callable[..., None]:
    """Calls function(rank, *arguments) in two new processes and checks that both end well."""

    def run(function: Callable[..., None], *arguments: object) -> None:
        processes = [get_context("spawn").Process(target=function, args=(rank, *arguments)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0

    return run
