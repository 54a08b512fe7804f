"""fuse leaves alone what is not certain, and says why."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fusion_networks import (
    IMAGE,
    BroadcastSum,
    Chains,
    DataDependent,
    Sum,
    counts,
    image,
    same_step,
    sequence,
)
from left_alone_networks import LEFT, FreezesNorms, Frozen, hidden, replaced_forward
from torch import nn

from mnistnorm import BatchNormReLU2d, fuse


@pytest.mark.parametrize(("network", "reason"), LEFT, ids=lambda value: getattr(value, "__name__", value))
def test_left_alone(network, reason):
    torch.manual_seed(0)
    stock = network().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    report = model.fusion_report
    assert not report.fused, str(report)
    assert re.search(reason, report.left[0].reason), str(report)
    assert repr(model) == repr(expected)
    if network is not replaced_forward:  # its forward is that of the model it was made for
        same_step(model, expected, image())


def test_other_norms_are_left_alone_and_reported():
    norms = [nn.SyncBatchNorm(4), nn.RMSNorm(4), torchvision.ops.FrozenBatchNorm2d(4)]
    names = ["torch.nn.SyncBatchNorm", "torch.nn.RMSNorm", "torchvision.ops.misc.FrozenBatchNorm2d"]
    report = fuse(nn.Sequential(*(layer for norm in norms for layer in (norm, nn.ReLU())))).fusion_report
    assert [norm.reason for norm in report.left] == [f"there is no fused {name}" for name in names]


@pytest.mark.parametrize(("after", "chains"), [(nn.ReLU, 1), (nn.Flatten, 0)])
def test_only_norms_before_an_activation_count_as_chains(after, chains):
    report = fuse(nn.Sequential(nn.SyncBatchNorm(4), after())).fusion_report
    assert report.chains == chains
    assert len(report.left) == 1


def test_a_sum_that_broadcasts_on_the_example_is_left_alone(capsys):
    report = fuse(BroadcastSum(), example_inputs=torch.randn(IMAGE)).fusion_report
    assert [chain.norm for chain in report.fused] == ["norm1"]
    assert "broadcasts (3, 4, 5, 7) and (3, 4, 1, 1)" in report.left[0].reason
    assert len(fuse(Sum(), example_inputs=(torch.randn(IMAGE),)).fusion_report.fused) == 2
    with pytest.raises(ValueError, match=r"on example_inputs: Given groups=1.* but got 1 channels") as failure:
        fuse(Sum(), example_inputs=(torch.randn(1, 1, 1, 1),))
    assert "\n" not in str(failure.value)
    assert capsys.readouterr() == ("", "")


def test_what_cannot_be_traced_is_fused_by_parts():
    class Root(DataDependent):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([sequence(nn.BatchNorm2d(4), nn.ReLU()), Sum()])

        def forward(self, x):
            return super().forward(x), self.blocks[0](x), self.blocks[1](x)

    torch.manual_seed(0)
    stock = nn.Sequential(Root(), nn.Flatten()).double()[:1]
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert [chain.norm for chain in model.fusion_report.fused] == [
        "0.blocks.0.1",
        "0.blocks.1.norm1",
        "0.blocks.1.norm2",
    ]
    assert [norm.norm for norm in model.fusion_report.left] == ["0.norm1", "0.norm2"]
    assert "the forward of 0 cannot be traced" in model.fusion_report.left[0].reason
    for training in (True, False):
        same_step(model.train(training), expected.train(training), image())


def test_a_relu_shared_with_what_is_not_traced_still_computes_there():
    class Root(Chains):
        def __init__(self):
            super().__init__()
            self.opaque = DataDependent()
            self.opaque.relu = self.relu

        def forward(self, x):
            return self.opaque(self.relu(self.norm1(self.conv1(x)))[:, :3])

    torch.manual_seed(0)
    stock = Root().double()
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert [chain.rewritten for chain in model.fusion_report.fused] == [""]
    assert type(model.relu) is nn.ReLU
    for training in (True, False):
        same_step(model.train(training), expected.train(training), image())


class Recursive(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.inner = Recursive(depth - 1) if depth else None

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        if self.inner is None:
            return x if x.sum() > 0 else -x
        return self.inner(x)


class Calls(nn.Module):
    """Calls what cannot be traced, with what no trace can record."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(3), DataDependent()

    def forward(self, x):
        return self.inner(F.relu(self.norm(x)), object())


@pytest.mark.parametrize(
    ("network", "expected_counts", "reason"),
    [
        (lambda: Recursive(2), (2, 0, 1), "it branches on a value or a shape"),
        (Calls, (0, 0, 3), "argument of type"),
    ],
    ids=["recursive", "called with an object"],
)
def test_what_cannot_be_traced_ends_and_is_reported(network, expected_counts, reason):
    model = fuse(network())
    assert counts(model) == expected_counts, str(model.fusion_report)
    assert reason in str(model.fusion_report)


@pytest.mark.parametrize("network", [FreezesNorms, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), Frozen(4), nn.ReLU())])
def test_norms_that_train_freezes_stay_frozen(network):
    torch.manual_seed(0)
    stock = network().double().train()
    model = fuse(stock)
    assert not model.fusion_report.fused, str(model.fusion_report)
    same_step(model.train(), copy.deepcopy(stock).train(), image())


def test_a_train_that_changes_weights_does_not_change_those_of_the_model():
    class Merges(nn.Conv2d):
        def train(self, mode=True):
            self.weight.data += 1
            return super().train(mode)

    stock = nn.Sequential(Merges(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    before = stock[0].weight.detach().clone()
    assert len(fuse(stock).fusion_report.fused) == 1
    assert torch.equal(stock[0].weight, before)


def test_what_functions_of_torch_do_does_not_matter():
    """torch._assert, which timm's forwards call, checks types."""

    class Asserts(Chains):
        def forward(self, x):
            torch._assert(True, "never")
            return self.relu(self.norm1(self.conv1(x)))

    assert len(fuse(Asserts()).fusion_report.fused) == 1


def test_a_train_with_further_arguments_is_not_called():
    class Phases(Chains):
        def train(self, mode, phase):
            return super().train(mode)

        def forward(self, x):
            return self.relu(self.norm1(self.conv1(x)))

    assert len(fuse(Phases()).fusion_report.fused) == 1


@pytest.mark.parametrize("by", ["mode", "call"])
def test_calls_with_different_constants_keep_the_original_forward(by):
    class Scales(Chains):
        def forward(self, x, scale):
            return self.relu(self.norm1(self.conv1(x)) * scale)

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = sequence(nn.BatchNorm2d(4), nn.ReLU()), Scales()

        def forward(self, x):
            if by == "call":
                return self.first(x) + self.inner(x, 1.0) + self.inner(x, 2.0)
            return self.first(x) + self.inner(x, 1.0 if self.training else 2.0)

    torch.manual_seed(0)
    stock = Calls().double()
    model = fuse(stock)
    assert [chain.norm for chain in model.fusion_report.fused] == ["first.1"]
    for training in (True, False):
        same_step(model.train(training), copy.deepcopy(stock).train(training), image())


def test_hasattr_answers_as_for_a_tensor():
    torch.manual_seed(0)
    stock = hidden(lambda self, x: x if hasattr(x, "materialize") else x * 2).double()
    model = fuse(stock)
    assert len(model.fusion_report.fused) == 1
    same_step(model, copy.deepcopy(stock), image())


def test_a_fused_layer_before_an_activation_is_left_alone():
    torch.manual_seed(0)
    stock = sequence(BatchNormReLU2d(4, activation="identity"), nn.ReLU()).double()
    model = fuse(stock)
    assert [norm.status for norm in model.fusion_report.left] == ["already fused"]
    same_step(model, copy.deepcopy(stock), image())


def test_slots_are_an_error():
    class Slotted(nn.Module):
        __slots__ = ("scale",)

    with pytest.raises(RuntimeError, match="Slotted cannot be copied: it has __slots__"):
        fuse(nn.Sequential(Slotted(), nn.BatchNorm2d(4), nn.ReLU()))
