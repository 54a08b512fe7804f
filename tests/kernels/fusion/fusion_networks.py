"""Networks and comparisons that the tests of fuse and unfuse share."""

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mnistnorm import (
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    GroupNormReLU,
    LayerNormReLU,
)

FUSED = (BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d, GroupNormReLU, LayerNormReLU)
IMAGE = (3, 3, 5, 7)


def torchvision_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in ("fcn_resnet50", "deeplabv3_resnet50"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, aux_loss=True)
    elif name in ("googlenet", "inception_v3"):
        aux_logits = name == "googlenet"  # inception_v3's ask for images of 299 x 299
        model = torchvision.models.get_model(name, init_weights=False, aux_logits=aux_logits, num_classes=5)
    else:
        model = torchvision.models.get_model(name, num_classes=5)
    return model.double()


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    return [tensor for tensor in (output.values() if isinstance(output, dict) else output) if tensor is not None]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def same_step(actual: nn.Module, expected: nn.Module, *inputs: Tensor) -> None:
    """One forward and backward of both, from the same random state: outputs, gradients and buffers are equal."""
    results = []
    for model in (actual, expected):
        torch.manual_seed(1)
        outputs = tensors(model(*inputs))
        grads = [torch.randn_like(output) for output in outputs]
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(outputs, parameters, grads, allow_unused=True) if parameters else ()
        results.append((outputs, list(gradients)))
    close(*results)
    close(list(actual.buffers()), list(expected.buffers()))


def counts(model: nn.Module) -> tuple[int, int, int]:
    report = model.fusion_report
    return len(report.fused), sum(chain.residual for chain in report.fused), len(report.left)


class Chains(nn.Module):
    """Small networks that differ in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.norm2 = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.relu = nn.ReLU()
        self.eval_relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.tensor(0.7))


class Functional(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(x))) * self.scale


class SharedReLU(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(x)))


class PartlySharedReLU(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.eval_relu(self.norm2(self.conv2(x))) - 0.1)


class Sum(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(x)))


class SumInPlace(Chains):
    def forward(self, x):
        identity = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(identity))
        out += identity
        return self.eval_relu(out)


class SumMethod(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return torch.add(x, self.norm2(self.conv2(x))).relu()


class SumOfNorms(Chains):
    def forward(self, x):
        x = self.conv1(x)
        return self.relu(self.norm1(x).add(self.norm2(self.conv2(x))))


class BroadcastSum(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + x.mean((2, 3), keepdim=True))


class BroadcastSumInPlace(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(x))
        out += x.mean((2, 3), keepdim=True)
        return F.relu(out)


class WideningSum(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        pooled = self.norm2(self.conv2(F.adaptive_avg_pool2d(x, 1)))
        return F.relu(pooled + x)


class PromotingSum(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + x.float())


class Counter(Chains):
    count = 0

    def forward(self, x):
        self.count += 1
        return F.relu(self.norm1(self.conv1(x)))


class DataDependent(Chains):
    def forward(self, x):
        x = self.relu(self.norm1(self.conv1(x)))
        return x + 1 if x.sum() > 0 else x


class RandomBranch(Chains):
    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        return x + 1 if torch.rand(()) < 2 else x


class LayerDrop(Chains):
    def __init__(self, draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        return self.relu(x) if self.draw() > -1 else x


def draw_from_numpy():
    return np.random.random()  # noqa: NPY002 - the generator that a forward may draw from


class Subclass(nn.BatchNorm2d):
    pass


def sequence(*modules):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *modules)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def image():
    return torch.randn(IMAGE, dtype=torch.float64)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What one forward keeps for backward beside parameters and buffers, storage that is shared counted once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert tensors(output)
    return sum(size for address, (_, size) in kept.items() if address not in own)


class DataDependentOuter(nn.Module):
    def __init__(self, *blocks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if x.sum() < 1e9 else x
        return x
