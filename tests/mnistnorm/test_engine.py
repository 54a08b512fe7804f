import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mnistnorm.cnn import CNN, NORMS
from mnistnorm.data import Augmentation, Dataset, TrainingBatches
from mnistnorm.engine import (
    LEARNING_RATES,
    Settings,
    Trainer,
    build_optimizers,
    lr_factors,
    rng_states,
    score,
    set_rng_states,
)


def trainer(mnist: Dataset, seed: int = 0, images: int = 64, **changes: object) -> Trainer:
    settings = Settings(**{"lr": 0.05, "epochs": 2, "batch_size": 16, **changes})
    torch.manual_seed(seed)
    model = CNN(settings.norm, fused=settings.fused, dropout=settings.dropout)
    dataset = Dataset("small", mnist.train[:images], mnist.test[:50], mnist.classes, mnist.normalization)
    batches = TrainingBatches(dataset.train, settings.batch_size, dataset.normalization, Augmentation(), seed)
    return Trainer(model, dataset, settings, batches)


def test_the_learning_rate_rises_for_a_fifth_and_falls_to_0() -> None:
    assert lr_factors(5).tolist() == pytest.approx([0.5, 0.875, 0.625, 0.375, 0.125])
    assert lr_factors(10_000)[[0, 1000, 2000, 6000, -1]].tolist() == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-3)


def test_there_is_a_learning_rate_for_every_optimizer_and_norm() -> None:
    assert all(set(by_norm) == set(NORMS) for by_norm in LEARNING_RATES.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": [{}]}, "it has 1 completed epochs and 0 steps, with 4 steps per epoch"),
        ({"optimizers": []}, "is shorter"),
        ({"step": "4"}, "unsupported operand"),
        ({"history": None}, "has no len"),
    ],
)
def test_a_foreign_state_is_refused(change: dict[str, object], message: str, mnist: Dataset) -> None:
    run = trainer(mnist)
    with pytest.raises((TypeError, ValueError), match=message):
        run.load_state_dict(run.state_dict() | change)


def test_another_optimizers_state_is_refused(mnist: Dataset) -> None:
    with pytest.raises(ValueError, match="its optimizer has"):
        trainer(mnist, optimizer="sgd").load_state_dict(trainer(mnist, optimizer="adamw").state_dict())


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_a_step_takes_the_learning_rate_of_its_middle(optimizer: str, mnist: Dataset) -> None:
    run = trainer(mnist, optimizer=optimizer)
    optimizers = build_optimizers(run.model, run.settings)
    peaks = [group["lr"] for each in optimizers for group in each.param_groups]
    for step, (images, labels) in zip(range(3), run.batches, strict=False):
        run.train_step(images, labels)
        factor = lr_factors(run.total_steps)[step].item()
        rates = [group["lr"].item() for each in run.optimizers for group in each.param_groups]
        assert rates == pytest.approx([peak * factor for peak in peaks])


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_a_state_with_learning_rates_as_numbers_loads(optimizer: str, mnist: Dataset) -> None:
    """As checkpoints had them once, of runs stopped before their first step without momentum."""
    whole, resumed = trainer(mnist, optimizer=optimizer), trainer(mnist, optimizer=optimizer)
    state = copy.deepcopy(resumed.state_dict())
    for each in state["optimizers"]:
        each["state"] = {}
        for group in each["param_groups"]:
            group["lr"] = 0.123
    resumed.load_state_dict(state)
    for run in (whole, resumed):
        for _, (images, labels) in zip(range(3), run.batches, strict=False):
            run.train_step(images, labels)
    for name, value in whole.model.state_dict().items():
        assert value.equal(resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
@pytest.mark.parametrize("norm", NORMS)
def test_every_parameter_is_trained(norm: str, optimizer: str, mnist: Dataset) -> None:
    run = trainer(mnist, norm=norm, optimizer=optimizer)
    before = copy.deepcopy(dict(run.model.named_parameters()))
    for _, (images, labels) in zip(range(3), run.batches, strict=False):
        run.train_step(images, labels)
    for name, parameter in run.model.named_parameters():
        assert not parameter.equal(before[name]), name
        assert parameter.shape == before[name].shape


@pytest.mark.parametrize("optimizer", LEARNING_RATES)
def test_weight_decay_is_for_convolutions_only(optimizer: str) -> None:
    model = CNN("batch")
    optimizers = build_optimizers(model, Settings(lr=0.1, optimizer=optimizer, weight_decay=0.5))
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    for name, parameter in model.named_parameters():
        assert parameter.equal(before[name]) == (parameter.ndim == 1), name


def test_the_loss_has_its_smoothing_and_l1(mnist: Dataset) -> None:
    for changes in ({}, {"label_smoothing": 0.2}, {"l1": 0.01}):
        run = trainer(mnist, optimizer="sgd", **changes)
        images, labels = next(iter(run.batches))
        expected = copy.deepcopy(run.model).train()
        loss = F.cross_entropy(expected(images), labels, label_smoothing=changes.get("label_smoothing", 0.0))
        weights = [parameter for parameter in expected.parameters() if parameter.ndim == 4]
        (loss + changes.get("l1", 0.0) * sum(weight.abs().sum() for weight in weights)).backward()
        run.train_step(images, labels)
        for actual, parameter in zip(run.model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, parameter.grad)


def test_the_score_is_loss_and_share_of_right_answers() -> None:
    log_probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]]).log()
    result = score(log_probs, torch.tensor([0, 1, 0, 0]))
    assert result.accuracy == 0.75
    expected = -torch.tensor([0.5, 0.8, 0.2, 0.7]).log().mean().item()
    assert result.loss == pytest.approx(expected)


def test_an_epoch_is_recorded(mnist: Dataset) -> None:
    run = trainer(mnist)
    assert run.train_epoch()
    (metrics,) = run.history
    assert metrics["epoch"] == 1
    assert {"train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds", "images_per_second"} < set(metrics)
    evaluation = score(run.log_probabilities(run.dataset.test), run.dataset.test.labels)
    assert (metrics["test_loss"], metrics["test_accuracy"]) == (evaluation.loss, evaluation.accuracy)
    assert run.step == 4


def test_training_learns(mnist: Dataset) -> None:
    run = trainer(mnist, epochs=5, images=256)
    while run.epoch < 5:
        run.train_epoch()
    assert run.history[-1]["train_loss"] < 0.6 * run.history[0]["train_loss"]
    assert run.history[-1]["test_accuracy"] > 0.6


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("steps", [2, 4, 5])
def test_a_trainer_continues_from_its_state_to_the_same_bits(norm: str, steps: int, mnist: Dataset) -> None:
    options = {"norm": norm, "dropout": 0.1, "fused": norm != "layer"}
    whole = trainer(mnist, **options)
    while whole.epoch < 2:
        whole.train_epoch()

    interrupted = trainer(mnist, **options)
    while interrupted.epoch < 2 and interrupted.step < steps:
        interrupted.train_epoch(lambda _: interrupted.step == steps)
    state, weights = copy.deepcopy((interrupted.state_dict(), interrupted.model.state_dict()))

    resumed = trainer(mnist, seed=5, **options)
    resumed.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    while resumed.epoch < 2:
        resumed.train_epoch()
    for name, value in whole.model.state_dict().items():
        assert value.equal(resumed.model.state_dict()[name]), name
    for expected, actual in zip(whole.history, resumed.history, strict=True):
        assert {key: expected[key] for key in expected if "second" not in key} == {
            key: actual[key] for key in actual if "second" not in key
        }


def test_the_generators_of_cpu_and_device_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    device, others = torch.device("mps"), {torch.device("mps"): torch.tensor([7])}
    module = SimpleNamespace(get_rng_state=others.get, set_rng_state=lambda state, where: others.update({where: state}))
    monkeypatch.setattr(torch, "get_device_module", lambda where: {"mps": module}[where.type])
    states = rng_states(device)
    drawn = torch.rand(3)
    others[device] = torch.tensor([8])
    set_rng_states(states, torch.device("cpu"))
    assert torch.rand(3).equal(drawn)
    assert others[device].item() == 8
    set_rng_states(states, device)
    assert torch.rand(3).equal(drawn)
    assert others[device].item() == 7
    set_rng_states(rng_states(torch.device("cpu")), device)
    assert others[device].item() == 7
