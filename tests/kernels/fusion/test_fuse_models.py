"""fuse and unfuse on whole models: they compute what the stock models compute, and keep no more for backward."""

import copy

import pytest
import torch
from fusion_networks import (
    FUSED,
    counts,
    same_step,
    saved_bytes,
    torchvision_model,
)
from torch import nn

from mnistnorm import (
    fuse,
    unfuse,
)

# torchvision's name, input shape, chains that fuse, those with a sum, norms that are left alone
MODELS = [
    ("resnet18", (2, 3, 32, 32), 17, 8, 3),
    ("resnet50", (2, 3, 32, 32), 49, 16, 4),
    ("resnext50_32x4d", (2, 3, 32, 32), 49, 16, 4),
    ("wide_resnet50_2", (2, 3, 32, 32), 49, 16, 4),
    ("densenet121", (2, 3, 32, 32), 121, 0, 0),
    ("vgg16_bn", (2, 3, 32, 32), 13, 0, 0),
    ("googlenet", (2, 3, 64, 64), 59, 0, 0),
    ("inception_v3", (2, 3, 96, 96), 94, 0, 0),
    ("shufflenet_v2_x1_0", (2, 3, 32, 32), 37, 0, 19),
    ("mnasnet1_0", (2, 3, 32, 32), 35, 0, 17),
    ("regnet_y_400mf", (2, 3, 32, 32), 49, 16, 4),
    ("convnext_tiny", (2, 3, 32, 32), 0, 0, 23),
    ("fcn_resnet50", (2, 3, 32, 32), 51, 16, 4),
    ("deeplabv3_resnet50", (2, 3, 32, 32), 57, 16, 4),
    ("r2plus1d_18", (2, 3, 4, 16, 16), 34, 8, 3),
]

FAST = ("resnet18", "shufflenet_v2_x1_0", "mnasnet1_0", "regnet_y_400mf")


@pytest.mark.parametrize(
    ("name", "shape", "fused", "summed", "left"),
    [pytest.param(*model, id=model[0], marks=[] if model[0] in FAST else [pytest.mark.slow]) for model in MODELS],
)
def test_models_of_torchvision(name, shape, fused, summed, left):
    stock = torchvision_model(name)
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert counts(model) == (fused, summed, left)
    assert sum(isinstance(module, FUSED) for module in model.modules()) == fused
    assert list(model.state_dict()) == list(expected.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        same_step(model.train(training), expected.train(training), x)
    back = unfuse(model)
    assert repr(back) == repr(stock)
    for training in (True, False):
        same_step(back.train(training), expected.train(training), x)


@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.export's own
def test_exports_whole_with_any_batch_size(training):
    model = fuse(torchvision_model("resnet18")).train(training)
    x = torch.randn(4, 3, 40, 40, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    exported = program.module()
    for size in (7, 1):
        same_step(exported, model, torch.randn(size, 3, 40, 40, dtype=torch.float64))
    assert not [node for node in program.graph.nodes if ".out" in str(node.target)]


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.filterwarnings("ignore")  # torch.jit's own
def test_is_traced_by_torch_jit(training):
    model = fuse(torchvision_model("resnet18")).train(training)
    traced = torch.jit.trace(copy.deepcopy(model), (torch.randn(4, 3, 40, 40, dtype=torch.float64),), check_trace=False)
    traced.load_state_dict(model.state_dict())
    same_step(traced, model, torch.randn(7, 3, 40, 40, dtype=torch.float64))


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_keeps_no_more_than_stock(name):
    stock = torchvision_model(name).float()
    x = torch.randn(4, 3, 64, 64)
    assert saved_bytes(fuse(stock), x) <= saved_bytes(stock, x)


def test_keeps_less_with_dropout():
    layers = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.2), nn.ReLU()) for _ in range(6)]
    stock = nn.Sequential(*(layer for chain in layers for layer in chain))
    x = torch.randn(4, 8, 16, 16)
    assert saved_bytes(fuse(stock), x) <= 0.7 * saved_bytes(stock, x)
