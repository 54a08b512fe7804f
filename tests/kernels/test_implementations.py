"""The choice of the implementation."""

import pytest
import torch
import triton

from mnistnorm.kernels.implementations import choose_implementation, missing_for_triton


def test_choice_of_implementation(monkeypatch):
    missing_for_triton.cache_clear()
    cpu = torch.device("cpu")
    assert choose_implementation("auto", cpu) == "torch"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert choose_implementation("triton", cpu) == "triton"
    missing_for_triton.cache_clear()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=r'does not run on cpu.*TRITON_INTERPRET=1.*impl="torch" does'):
        choose_implementation("triton", cpu)
    with pytest.raises(RuntimeError, match="does not run on meta"):
        choose_implementation("triton", torch.device("meta"))
    assert choose_implementation("auto", torch.device("meta")) == "torch"
    missing_for_triton.cache_clear()
