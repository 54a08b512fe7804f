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
        lowest = int(dropout_p * 256) if dropout_p > dropout.MAX_SPARSE_P else 0
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


def test_hashes_are_those_of_splitmix64():
    seed, count = 2**62 + 12345, 1000
    word = np.uint64(seed) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    expected = (word & np.uint64(2**31 - 1)).astype(np.int64)
    assert np.array_equal(dropout._hashes(torch.tensor(seed), count).numpy(), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.002, 0.3, 0.999, 1.0])
def test_a_seed_on_the_device_drops_at_the_right_rate(dropout_p):
    n, seeds = 2**16, (torch.tensor(seed) for seed in (0, 1, 2**63 - 1))
    rows = [torch.ones(n) for _ in range(3)]
    for row, seed in zip(rows, seeds, strict=True):
        dropout.drop_(row, torch.contiguous_format, dropout_p, seed)
        # Five standard deviations of a binomial.
        assert abs((row == 0).double().mean() - dropout_p) <= 5 * (dropout_p * (1 - dropout_p) / n) ** 0.5
    together = (rows[0] == 0) & (rows[1] == 0)
    assert abs(together.double().mean() - dropout_p**2) <= 5 * (dropout_p**2 * (1 - dropout_p**2) / n) ** 0.5


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
