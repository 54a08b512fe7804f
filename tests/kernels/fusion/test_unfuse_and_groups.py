"""unfuse of layers made by hand, process groups, and bad input."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fusion_networks import (
    FUSED,
    Subclass,
    Sum,
    SumOfNorms,
    close,
    image,
    same_step,
    sequence,
)
from torch import nn
from torch.nn.utils import parametrize, prune

from mnistnorm import (
    BatchNormReLU2d,
    GroupNormReLU,
    LayerNormReLU,
    fuse,
    unfuse,
)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = BatchNormReLU2d(4)
        self.norm2 = GroupNormReLU(2, 4, activation="identity")
        self.norm3 = LayerNormReLU(7)

    def forward(self, x):
        x = self.norm1(self.conv(x))
        return self.norm3(self.norm2(x), residual=x)


def test_unfuse_of_layers_made_by_hand():
    model = ByHand().double()
    stock = unfuse(model)
    assert not any(isinstance(module, FUSED) for module in stock.modules())
    assert list(stock.state_dict()) == list(model.state_dict())
    assert [type(part) for part in pickle.loads(pickle.dumps(stock)).norm1] == [nn.BatchNorm2d, nn.Dropout, nn.ReLU]
    stock.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(stock.state_dict(), strict=True)
    expected = copy.deepcopy(model)
    for training in (True, False):
        same_step(stock.train(training), expected.train(training), image())
    again = fuse(stock)
    assert len(again.fusion_report.fused) == 2, str(again.fusion_report)
    same_step(again.train(), expected.train(), image())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # torch.jit's own
def test_not_a_module():
    compiled_inside = nn.Sequential(Sum())
    compiled_inside[0].compile()
    for function in (fuse, unfuse):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
            function(F.relu)
        with pytest.raises(TypeError, match=r"unfused before it is wrapped .* inside, not DataParallel"):
            function(nn.DataParallel(Sum()))
        with pytest.raises(TypeError, match=r"unfused before it is wrapped .* inside, not OptimizedModule"):
            function(torch.compile(Sum()))
        with pytest.raises(TypeError, match=r"unfused before it is wrapped .* inside, not RecursiveScriptModule"):
            function(torch.jit.script(nn.ReLU()))
        for inside in (compiled_inside, nn.Sequential(torch.jit.script(nn.ReLU()))):
            with pytest.raises(TypeError, match=r"unfused before it is wrapped .* inside, not Sequential"):
                function(inside)


def test_a_model_that_cannot_be_copied_is_not_changed():
    model = Sum()
    model.lock = (value for value in ())
    before = repr(model)
    with pytest.raises(RuntimeError, match=r"Sum cannot be copied by copy.deepcopy: cannot pickle 'generator'"):
        fuse(model)
    assert repr(model) == before


def test_process_group_must_be_one():
    with pytest.raises(TypeError, match="process_group must be a ProcessGroup or None, got str"):
        fuse(Sum(), process_group="world")


def test_process_group_reaches_every_batch_norm(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        by_hand = fuse(ByHand(), process_group=group)
        assert by_hand.norm1.process_group is group
        model = fuse(Sum(), process_group=group)
        assert model.norm1.process_group is group
        assert fuse(model).norm1.process_group is group
        assert fuse(fuse(Sum()), process_group=group).norm2.process_group is group
        with pytest.raises(TypeError, match=r"1 cannot be synchronised: it is a test_unfuse_and_groups\.OwnForward"):
            fuse(sequence(OwnForward(4)), process_group=group)
        hooked = pytest.importorskip("timm.layers").BatchNormAct2d(4)
        hooked.act.register_forward_hook(lambda *_: None)
        with pytest.raises(TypeError, match=r"1 cannot be synchronised: .* it has its own activation"):
            fuse(sequence(hooked), process_group=group)
        assert fuse(sequence(Subclass(4)), process_group=group)[1].process_group is group
        alone = fuse(nn.BatchNorm2d(4), process_group=group)
        x = torch.randn(5, 4, 3, 3)
        torch.testing.assert_close(alone(x), nn.BatchNorm2d(4)(x))
        assert type(unfuse(alone)) is nn.BatchNorm2d
    finally:
        dist.destroy_process_group()
    with pytest.raises(RuntimeError, match="init_process_group first"):
        fuse(Sum(), process_group=group)


def train_synchronised(rank: int, folder: Path) -> None:
    """One process's half of a step of SumOfNorms."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    model = fuse(SumOfNorms().double(), process_group=dist.group.WORLD)
    assert all(model.get_submodule(f"norm{i}").process_group is dist.group.WORLD for i in (1, 2))
    torch.manual_seed(1)
    x = torch.randn((6, 3, 5, 7), dtype=torch.float64)
    output = model(x[3 * rank :][:3])
    torch.save({"output": output.detach(), "buffers": dict(model.named_buffers())}, folder / f"{rank}.pt")
    assert type(unfuse(model).norm2) is nn.BatchNorm2d
    with pytest.raises(ValueError, match=rf"0 has {4 + rank} channels here and {5 - rank} in process {1 - rank}"):
        fuse(nn.Sequential(nn.BatchNorm2d(4 + rank)), process_group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.slow
def test_process_group_is_for_all_batch_norms(tmp_path, run_two_processes):
    run_two_processes(train_synchronised, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.manual_seed(0)
    model = SumOfNorms().double()
    torch.manual_seed(1)
    close(torch.cat([part["output"] for part in parts]), model(torch.randn((6, 3, 5, 7), dtype=torch.float64)))
    close(parts[0]["buffers"], dict(model.named_buffers()))


def test_convert_sync_batchnorm_keeps_the_activation_of_a_layer_made_by_hand():
    model = nn.Sequential(BatchNormReLU2d(4)).eval()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(unfuse(model)).eval()
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(synced(x), model(x))


class Doubles(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_chain_whose_norm_is_parametrized_since_is_unfused_as_a_whole():
    torch.manual_seed(0)
    model = fuse(Sum().double())
    for norm in (model.norm1, model.norm2):
        parametrize.register_parametrization(norm, "weight", Doubles())
    back = unfuse(model)
    assert not any(isinstance(module, FUSED) for module in back.modules())
    x = image()
    close(back(x), model(x))
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    close(unfuse(model)(x), model(x))


class Other(BatchNormReLU2d):
    pass


def test_a_fused_layer_of_an_unknown_class_is_an_error():
    with pytest.raises(RuntimeError, match="0 cannot be unfused: it is a Other, not a BatchNormAct2d"):
        unfuse(nn.Sequential(Other(4)))


HOOKS = {
    "forward": lambda layer, log: layer.register_forward_hook(lambda *_: log.append("forward"), always_call=True),
    "forward with keywords": lambda layer, log: layer.register_forward_hook(
        lambda module, args, kwargs, output: log.append(sorted(kwargs)), with_kwargs=True
    ),
    "before with keywords": lambda layer, log: layer.register_forward_pre_hook(
        lambda module, args, kwargs: log.append((len(args), sorted(kwargs))), with_kwargs=True
    ),
    "backward": lambda layer, log: layer.register_full_backward_hook(
        lambda module, inputs, outputs: log.append(len(inputs))
    ),
    "before backward": lambda layer, log: layer.register_full_backward_pre_hook(
        lambda module, outputs: log.append(len(outputs))
    ),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_a_layer_made_by_hand_see_its_calls(hook):
    logs = []
    layer = BatchNormReLU2d(4)
    log = []
    HOOKS[hook](layer, log)
    for each in (layer, unfuse(layer)):
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        each(x, residual=x * 2).sum().backward()
        logs.append(log.copy())
        log.clear()
    assert logs[0] == logs[1] != []
