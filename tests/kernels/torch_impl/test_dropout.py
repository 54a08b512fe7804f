"""The random draws behind the PyTorch implementation's dropout."""

import numpy as np
import pytest
import torch
from oracle import DTYPES

from mnistnorm.kernels.torch_impl import dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_zeroes_the_lowest_bytes_and_the_second_chances(monkeypatch, dtype):
    # All 256 bytes once, where the second chance takes the last of them.
    every_byte = np.arange(-128, 128).astype(np.int8)
    monkeypatch.setattr(dropout, "_bytes", lambda random, count: every_byte)
    for dropout_p in (0.002, 0.05, 0.13, 0.5, 1 / 3, 0.999, 1.0):
        # A small probability has the second chance alone.
        lowest = int(dropout_p * 256) if dropout_p > dropout.SPARSE else 0
        chances = []

        def last(random, probability, trials, chances=chances):
            chances.append(probability)
            return torch.tensor([trials - 1])

        monkeypatch.setattr(dropout, "_successes", last)
        values = torch.ones(256, dtype=dtype)
        dropout.drop_(values, torch.contiguous_format, dropout_p, 0)
        assert values.eq(0).tolist() == [index < lowest or (index == 255 and chances != []) for index in range(256)]
        share = lowest / 256
        assert share + (1 - share) * sum(chances) == pytest.approx(dropout_p, abs=1e-15)


def test_successes_are_independent_trials():
    random = np.random.default_rng(0)
    trials, rounds = 200, 20_000
    for probability in (0.003, 0.4, 0.999):
        times = np.zeros(trials)
        followed = 0
        for _ in range(rounds):
            indices = np.unique(dropout._successes(random, probability, trials).numpy())
            times[indices] += 1
            followed += (np.diff(indices) == 1).sum()
        # Each trial succeeds at the rate, and so does the one after a success: six standard deviations of a binomial.
        deviation = (probability * (1 - probability) / rounds) ** 0.5
        assert abs(times / rounds - probability).max() < 6 * deviation
        pairs = rounds * (trials - 1)
        expected = probability**2
        assert abs(followed / pairs - expected) < 6 * (2 * expected * (1 - probability) / pairs) ** 0.5 + 1e-9
    assert dropout._successes(random, 1e-300, trials).tolist() == []
