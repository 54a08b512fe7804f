"""Set-up shared by the tests of the kernels. Test files of all its folders import oracle.py, which lies beside it."""

import pytest

from mnistnorm.kernels.torch_impl import cpu

pytest.register_assert_rewrite("oracle")


@pytest.fixture
def fast_paths(monkeypatch):
    """Lets the fast ways begin at tensors small enough for tests; the smaller ones take torch's kernel."""
    monkeypatch.setattr(cpu, "BATCH_STATISTICS_ELEMENTS", 2**14)
    monkeypatch.setattr(cpu, "ONE_THREAD_ELEMENTS", 2**14)
    monkeypatch.setattr(cpu, "CHANNELS_LAST_ELEMENTS", 2**8)
