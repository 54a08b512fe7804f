"""fuse and unfuse on whole models: they compute what the stock models compute, and keep no more for backward."""

import copy
import pickle

import pytest
import torch
from fusion_networks import (
    FUSED,
    close,
    counts,
    same_step,
    saved_bytes,
    torchvision_model,
)
from torch import Tensor, nn

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

FAST = ("resnet18", "mnasnet1_0", "regnet_y_400mf")


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


# timm's name, chains that fuse, those with a sum, norms that are left alone
TIMM_MODELS = [
    ("resnet18", 17, 8, 3),
    ("resnet50", 49, 16, 4),
    ("seresnet50", 33, 0, 20),
    ("resnetv2_50", 49, 0, 0),
    ("densenet121", 121, 0, 0),
    ("efficientnet_b0", 33, 0, 16),
    ("mobilenetv3_small_100", 23, 0, 11),
    ("regnety_002", 40, 13, 4),
    ("hrnet_w18_small", 72, 29, 19),
    ("cspresnet50", 51, 13, 4),
]
TIMM_FAST = ("resnet18", "efficientnet_b0", "mobilenetv3_small_100")


def timm_model(name: str) -> nn.Module:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=5).double()


def check_both_ways(stock: nn.Module, x: Tensor) -> nn.Module:
    """Compares fused and unfused with the stock model, in training and eval mode; returns the fused one."""
    expected = copy.deepcopy(stock)
    model = fuse(stock)
    assert list(model.state_dict()) == list(expected.state_dict())
    for training in (True, False):
        same_step(model.train(training), expected.train(training), x)
    back = unfuse(model)
    assert repr(back) == repr(stock)
    assert [type(module) for module in back.modules()] == [type(module) for module in stock.modules()]
    for training in (True, False):
        same_step(back.train(training), expected.train(training), x)
    return model


@pytest.mark.parametrize(
    ("name", "fused", "summed", "left"),
    [pytest.param(*m, id=m[0], marks=[] if m[0] in TIMM_FAST else [pytest.mark.slow]) for m in TIMM_MODELS],
)
def test_models_of_timm(name, fused, summed, left):
    # The last batch norms need more than two elements for each channel: their gradients amplify rounding otherwise.
    model = check_both_ways(timm_model(name), torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert counts(model) == (fused, summed, left), str(model.fusion_report)
    assert any(module is model.get_classifier() for module in model.modules())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    close(model.forward_head(model.forward_features(x)), model(x))


class Convolutions3d(nn.Module):
    """The blocks of nnU-Net: convolution, instance norm, leaky ReLU; one with a residual."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(channels, width, 3, padding=1), nn.Conv3d(width, width, 3, padding=1)
        self.norm1, self.norm2 = (nn.InstanceNorm3d(width, affine=True) for _ in range(2))
        self.act = nn.LeakyReLU(0.01, inplace=True)
        self.skip = nn.Conv3d(channels, width, 1)

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(y)) + self.skip(x))


class Segmentation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = Convolutions3d(2, 4), Convolutions3d(4, 6), Convolutions3d(10, 4)
        self.pool, self.grow, self.head = nn.MaxPool3d(2), nn.Upsample(scale_factor=2), nn.Conv3d(4, 3, 1)

    def forward(self, x):
        skip = self.down(x)
        x = self.grow(self.bottom(self.pool(skip)))
        return self.head(self.up(torch.cat([x, skip], 1)))


class Diffusion(nn.Module):
    """The residual block of diffusion U-Nets: group norm, SiLU, convolution, and the embedding of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, 32), nn.GroupNorm(32, 64, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.embed, self.shortcut = nn.Linear(8, 64), nn.Conv2d(32, 64, 1)
        self.dropout = nn.Dropout(0.0)
        self.nonlinearity = nn.SiLU()

    def forward(self, x, embedding=None, *args, **kwargs):
        if len(args) > 0 or kwargs.get("scale") is not None:
            raise ValueError("scale is not supported")
        hidden = self.conv1(self.nonlinearity(self.norm1(x)))
        if embedding is not None:
            hidden = hidden + self.embed(self.nonlinearity(embedding))[:, :, None, None]
        hidden = self.conv2(self.dropout(self.nonlinearity(self.norm2(hidden))))
        return (self.shortcut(x) + hidden) / 1.5


def test_a_network_for_segmentation_in_3d():
    model = check_both_ways(Segmentation().double(), torch.randn(2, 2, 6, 4, 4, dtype=torch.float64))
    assert counts(model) == (6, 3, 0)


def test_a_block_of_a_diffusion_model():
    stock = Diffusion().double()
    x, embedding = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 32, 5, 5), (2, 8)))
    model = check_both_ways(stock, x)
    assert counts(model) == (2, 0, 0)
    same_step(model, copy.deepcopy(stock), x, embedding)
    with pytest.raises(ValueError, match="scale is not supported"):
        model(x, scale=2)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.export's own
def test_fused_models_of_timm_compile_and_export(name):
    model = fuse(timm_model(name)).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    close(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")(x), expected)
    close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_fused_model_of_timm_trains_compiled():
    model = fuse(timm_model("efficientnet_b0")).train()
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outputs = [network(x) for network in (compiled, expected)]
    close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    close([p.grad for p in model.parameters()], [p.grad for p in expected.parameters()])


def test_pickles_copies_and_averages_of_a_model_of_timm():
    model = fuse(timm_model("resnet18"))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    again = pickle.loads(pickle.dumps(model))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    for other in (copy.deepcopy(model), again, average.module):
        same_step(other.train(), copy.deepcopy(model).train(), x)
    close(unfuse(again).eval()(x), again.eval()(x))


@pytest.mark.parametrize(
    ("name", "share"), [("efficientnet_b0", 0.75), pytest.param("densenet121", 1.0, marks=pytest.mark.slow)]
)
def test_models_of_timm_keep_less(name, share):
    stock = timm_model(name).float()
    x = torch.randn(2, 3, 64, 64)
    assert saved_bytes(fuse(stock), x) <= share * saved_bytes(stock, x)
