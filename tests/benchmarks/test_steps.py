"""The timed loop of our training step takes as many steps as it is counted for, across the ends of epochs."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import training
from mnistnorm.data import Normalization, Split, TrainingBatches
from mnistnorm.training import Settings


def test_a_round_takes_all_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split(torch.zeros(6, 1, 28, 28, dtype=torch.uint8), torch.arange(6))
    seen: list[torch.Tensor] = []
    trainer = SimpleNamespace(
        batches=TrainingBatches(split, 2, Normalization(0, 1)),
        model=torch.nn.Identity(),
        train_step=lambda images, labels: seen.append(labels),
    )
    monkeypatch.setattr(training, "build_trainer", lambda settings: trainer)
    run = training.ours(Settings(lr=0.1), steps=5)
    run()
    run()
    assert len(seen) == 10
    for epoch in range(3):
        assert torch.cat(seen[3 * epoch : 3 * epoch + 3]).sort().values.equal(split.labels)
