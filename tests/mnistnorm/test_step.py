"""The training step: what it asks of the host, and as a CUDA graph."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from benchmarks.instruments.counting import Operators
from mnistnorm import run as run_module
from mnistnorm.cli import settings_of
from mnistnorm.cnn import CNN, NORMS
from mnistnorm.data import Augmentation, Dataset, TrainingBatches
from mnistnorm.engine import ELASTIC, LEARNING_RATES, Settings, Trainer
from mnistnorm.errors import UserError
from mnistnorm.graph import WARMUP_STEPS, GraphedStep, has_hooks
from mnistnorm.kernels import BatchNormReLU2d, GroupNormReLU, LayerNormReLU
from mnistnorm.run import check_cuda_graph, describe
from tests.mnistnorm.capture import Recording, refuse_what_no_graph_holds

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

OPTIONS: list[dict[str, Any]] = [
    *({"norm": norm, "optimizer": optimizer} for norm in NORMS for optimizer in LEARNING_RATES),
    {"amp": True},
    {"weight_decay": 0.1, "l1": 0.01, "label_smoothing": 0.1},
    {"optimizer": "sgd", "weight_decay": 0.1},
    {"augment": False},
]


@pytest.fixture
def train() -> ModuleType:
    """The program; skips where its packages are missing, as on a GPU machine without network."""
    try:
        from mnistnorm import train
    except SystemExit as missing:
        pytest.skip(str(missing))
    return train


def names(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items())


def small_fused_network(norm: str) -> nn.Module:
    """Small enough for Triton's interpreter; a stride of 9 leaves 3 x 3 pixels."""
    norms = {
        "batch": lambda: BatchNormReLU2d(4, impl="triton"),
        "group": lambda: GroupNormReLU(2, 4, impl="triton"),
        "layer": lambda: LayerNormReLU(3, impl="triton"),
        "sample": lambda: GroupNormReLU(1, 4, impl="triton"),
    }
    first, last = nn.Conv2d(1, 4, 3, stride=9, bias=False), nn.Conv2d(4, 10, 3, bias=False)
    return nn.Sequential(first, norms[norm](), last, nn.Flatten(), nn.LogSoftmax(1))


def trainer(
    mnist: Dataset,
    images: int = 64,
    batch_size: int = 8,
    device: str = "cpu",
    network: Callable[[str], nn.Module] | None = None,
    **options: Any,
) -> Trainer:
    """A trainer before its first step."""
    settings = Settings(**{"lr": 0.05, "epochs": 20, "batch_size": batch_size, "device": device, **options})
    torch.manual_seed(0)
    if network is None:
        model: nn.Module = CNN(settings.norm, fused=settings.fused, dropout=settings.dropout)
    else:
        model = network(settings.norm)
    dataset = Dataset("small", mnist.train[:images], mnist.test[:50], mnist.classes, mnist.normalization)
    dataset = dataset.to(torch.device(device))
    augmentation = Augmentation(elastic=ELASTIC[settings.norm]) if settings.augment else None
    batches = TrainingBatches(dataset.train, batch_size, dataset.normalization, augmentation)
    return Trainer(model.to(device).train(), dataset, settings, batches)


def tensors_of(run: Trainer) -> dict[str, torch.Tensor]:
    """All that a step changes on the device."""
    tensors = {**run.model.state_dict(), "totals": run._totals}
    for index, optimizer in enumerate(run.optimizers):
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{number}.{name}": value for name, value in state.items()}
    return tensors


def choices_of(run: Trainer) -> Any:
    """The numbers of the images of each full batch, epoch after epoch."""
    while True:
        yield from (chosen for chosen in run.batches.choices() if len(chosen) == run.batches.batch_size)


# Two threads: with one, batch norm on a CPU computes the statistics of large planes by a dozen small operators.
@pytest.mark.parametrize(("fused", "most"), [(True, 130), (False, 130)])
def test_a_step_is_few_operators(fused: bool, most: int, mnist: Dataset) -> None:
    torch.set_num_threads(2)
    run = trainer(mnist, images=256, batch_size=128, fused=fused)
    choices = choices_of(run)
    for _ in range(2):
        run.train_batch(next(choices))
    with Operators() as operators:
        images, labels = run.batches.make(next(choices))
        made = len(operators.take())
        run.train_step(images, labels)
        stepped = len(operators.take())
    assert 10 < made <= 25
    assert 80 < stepped <= most


def host_read(tensor: torch.Tensor) -> None:
    if tensor.sum() > 0:
        pass


@pytest.mark.parametrize(
    "call",
    [
        host_read,
        torch.Tensor.tolist,
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.sum().item(),
        lambda tensor: float(tensor[0]),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.index_put((tensor > 0,), tensor[0]),
        lambda tensor: torch.tensor(1.0),
        torch.nonzero,
        torch.unique,
        lambda tensor: tensor.repeat_interleave(tensor.long()),
        lambda tensor: tensor.equal(tensor),
        lambda tensor: tensor.cpu(),
    ],
)
def test_what_no_graph_holds_is_refused(call: Callable[[torch.Tensor], object]) -> None:
    tensor = torch.ones(3)
    with pytest.raises(AssertionError), refuse_what_no_graph_holds():
        call(tensor)


@pytest.mark.parametrize("options", OPTIONS, ids=names)
def test_a_step_takes_nothing_from_the_device(options: dict[str, Any], mnist: Dataset) -> None:
    take_guarded_steps(trainer(mnist, dropout=0.1, **options), 2)


# By Triton, as on a GPU; in PyTorch the fused layers look at values to choose the faster way on a CPU.
@pytest.mark.parametrize("norm", NORMS)
def test_a_fused_step_takes_nothing_from_the_device(norm: str, mnist: Dataset, device: str) -> None:
    pytest.importorskip("triton")
    take_guarded_steps(trainer(mnist, batch_size=4, network=small_fused_network, norm=norm, device=device), 1)


def take_guarded_steps(run: Trainer, count: int) -> None:
    choices = choices_of(run)
    run.batches.make(next(choices))  # makes the constants of the augmentation
    for _ in range(count):
        chosen = next(choices)
        with refuse_what_no_graph_holds():
            run._set_learning_rates()
            run._compute_batch(chosen)
        run._count(len(chosen))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=names)
def test_a_replayed_step_gives_the_bits_of_the_eager_one(options: dict[str, Any], fused: bool, mnist: Dataset) -> None:
    results = []
    for replayed in (False, True):
        run = trainer(mnist, fused=fused, dropout=0.0 if fused else 0.1, **options)
        recording, given = Recording(), torch.empty(8, dtype=torch.int64)
        for step, chosen in zip(range(WARMUP_STEPS + 12), choices_of(run), strict=False):
            if not replayed or step < WARMUP_STEPS:
                run.train_batch(chosen)
                continue
            run._set_learning_rates()
            given.copy_(chosen)
            if step == WARMUP_STEPS:
                with recording:
                    run._compute_batch(given)
            else:
                recording.replay()
            run._count(len(chosen))
        results.append(tensors_of(run))
    eager, replays = results
    for name, value in eager.items():
        assert value.equal(replays[name]), name


class StandInGenerator:
    """Knows of its state whether a capture was cut off in it."""

    def __init__(self) -> None:
        self.state = "usable"

    def clone_state(self) -> str:
        return self.state

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


@pytest.fixture
def stand_in_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces what GraphedStep uses of torch.cuda; a replay and what is registered are noted."""
    noted = SimpleNamespace(replays=0, registered=[], current="main", default=StandInGenerator())

    class Graph:
        def register_generator_state(self, generator: object) -> None:
            noted.registered.append(generator)

        def replay(self) -> None:
            noted.replays += 1

    @contextmanager
    def on_stream(stream: object) -> Iterator[None]:
        previous, noted.current = noted.current, stream
        try:
            yield
        finally:
            noted.current = previous

    @contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        noted.default.state = "capturing"
        try:
            yield
        except ValueError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        noted.default.state = "usable"

    stream = SimpleNamespace(device="cuda:0", device_index=0, wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": on_stream,
        "graph": capture,
        "CUDAGraph": Graph,
        "default_generators": (noted.default,),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return noted


def test_a_graphed_step_is_warmed_up_captured_and_replayed(stand_in_cuda: SimpleNamespace) -> None:
    adamw = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    calls: list[Any] = []

    def step(given: torch.Tensor) -> None:
        calls.append((given, stand_in_cuda.current != "main", adamw.param_groups[0]["capturable"]))

    generator: Any = StandInGenerator()
    graphed = GraphedStep(step, torch.device("cuda"), [adamw], [generator])
    inputs = [torch.full((3,), float(number)) for number in range(WARMUP_STEPS + 2)]
    for given in inputs:
        assert not graphed.captured
        graphed(given)
        if given is inputs[WARMUP_STEPS]:
            break
    assert [given is one for (given, _, _), one in zip(calls, inputs[:WARMUP_STEPS], strict=False)] == [True] * 3
    assert [flags for _, *flags in calls] == [[True, False]] * WARMUP_STEPS + [[True, True]]
    assert graphed.captured
    assert (graphed.failure, stand_in_cuda.replays, stand_in_cuda.registered) == (None, 1, [generator])
    graphed(inputs[-1])
    assert (len(calls), stand_in_cuda.replays) == (WARMUP_STEPS + 1, 2)
    assert calls[-1][0].equal(inputs[-1])  # the graph's own input
    assert adamw.param_groups[0]["capturable"] is False


def test_a_capture_that_fails_leaves_eager_steps(stand_in_cuda: SimpleNamespace) -> None:
    calls: list[torch.Tensor] = []

    def step(given: torch.Tensor) -> None:
        if stand_in_cuda.default.state == "capturing":
            raise ValueError("a number was read\nduring the capture")
        calls.append(given)

    graphed = GraphedStep(step, torch.device("cuda"))
    inputs = [torch.full((3,), float(number)) for number in range(WARMUP_STEPS + 3)]
    for given in inputs:
        graphed(given)
    assert [id(given) for given in calls] == [id(given) for given in inputs]  # each step is taken, and once
    assert graphed.failure == "a number was read during the capture"
    assert not graphed.captured
    assert (stand_in_cuda.default.state, stand_in_cuda.current, stand_in_cuda.replays) == ("usable", "main", 0)


def test_hooks_are_found() -> None:
    model = CNN()
    assert not has_hooks(model)
    layer, weight = model.blocks[1].conv, model.classifier.weight
    for register in (
        lambda: layer.register_forward_hook(print),
        lambda: layer.register_forward_pre_hook(print),
        lambda: layer.register_full_backward_hook(print),
        lambda: layer.register_full_backward_pre_hook(print),
        lambda: weight.register_hook(print),
        lambda: weight.register_post_accumulate_grad_hook(print),
        lambda: register_module_forward_hook(print),
    ):
        handle = register()
        assert has_hooks(model)
        handle.remove()
        assert not has_hooks(model)


class OwnStep(Trainer):
    def train_step(self, *batch: Any) -> None:
        super().train_step(*batch)


def test_why_a_step_is_eager(mnist: Dataset, stand_in_cuda: SimpleNamespace) -> None:
    eager = trainer(mnist)
    assert eager.graph is None
    assert eager.why_eager() == "the device is cpu"
    eager.device = torch.device("cuda:0")
    assert eager.why_eager() is None
    for change, reason in (({"cuda_graph": False}, "--no-cuda-graph"), ({"compile": True}, "--compile")):
        eager.settings = replace(eager.settings, **change)
        assert eager.why_eager() == reason
        eager.settings = replace(eager.settings, cuda_graph=None, compile=False)
    with eager.model.register_forward_hook(print):
        assert eager.why_eager() == "the model has hooks, which a graph would not call"
    eager._network = nn.Identity()
    assert eager.why_eager() == "started by torchrun"
    eager._network = eager.model
    eager.__class__ = OwnStep
    assert eager.why_eager() == "train_step is overridden"


def test_batches_of_full_size_go_to_the_graph(mnist: Dataset) -> None:
    """And a short one at the end of an epoch is an eager step."""
    run, graphed = trainer(mnist, images=20), []
    run.graph = lambda chosen: graphed.append(len(chosen))  # type: ignore[assignment]
    run.train_epoch()
    assert graphed == [8, 8]
    assert run.step == 3
    assert run.history[0]["train_accuracy"] <= 4 / 20  # of which only the last batch of 4 was computed


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [({"device": "cpu"}, "--device cpu"), ({"processes": 2}, "2 processes"), ({"compile": True}, "--compile")],
)
def test_a_graph_that_cannot_be_is_refused_where_it_is_asked_for(changes: dict[str, Any], obstacle: str) -> None:
    settings = Settings(**{"lr": 0.1, "device": "cuda", "cuda_graph": True, **changes})
    with pytest.raises(UserError, match=f"without --compile, not for {obstacle}: use --no-cuda-graph") as failure:
        check_cuda_graph(settings)
    assert failure.value.exit_code == 2
    check_cuda_graph(replace(settings, cuda_graph=None))


def test_a_run_says_whether_its_step_is_a_graph(mnist: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    on_gpu = trainer(mnist)
    assert not [line for line in described(on_gpu) if line.startswith("step")]
    on_gpu.device = torch.device("cuda:0")
    assert "step     CUDA graph, after 3 eager steps" in described(on_gpu)
    on_gpu.settings = replace(on_gpu.settings, compile=True)
    assert "step     eager: --compile" in described(on_gpu)


def described(run: Trainer) -> list[str]:
    return list(describe(run, "layers", Path("out"), run.settings))


def test_a_capture_that_failed_is_said_once(
    train: ModuleType,
    quick: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failed:
        failure = "a number was read"

        def __init__(self, run: Trainer) -> None:
            self.step = run._compute_batch

        def __call__(self, chosen: torch.Tensor) -> None:
            self.step(chosen)

    monkeypatch.setattr(Trainer, "_new_graph", lambda run: Failed(run))
    assert train.main([*quick, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("note     no CUDA graph, the steps are eager: a number was read\n") == 1
    assert printed.count("note") == 1


@pytest.mark.parametrize(("seconds", "reads"), [(math.inf, 2), (0.0, 2 + 10)])
def test_the_progress_bar_reads_from_the_device_now_and_then(
    seconds: float, reads: int, train: ModuleType, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each of the two epochs at its end."""
    seen = []
    running = Trainer.running

    def count(run: Trainer) -> Any:
        seen.append(run.step)
        return running.fget(run)

    trainer_bar = run_module.tqdm
    monkeypatch.setattr(
        run_module, "tqdm", lambda **given: trainer_bar(**given | {"disable": False, "file": StringIO()})
    )
    monkeypatch.setattr(run_module, "PROGRESS_SECONDS", seconds)
    settings = settings_of(train.get_parser().parse_args([*quick, "--out", str(tmp_path)]))
    monkeypatch.setattr(Trainer, "running", property(count))
    run_module.run_training(settings, tmp_path)
    assert len(seen) - 1 == reads  # once where the bar begins


@needs_gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=names)
def test_replays_on_a_gpu_train_as_eager_steps(
    options: dict[str, Any], fused: bool, mnist: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    runs = [
        trainer(mnist, images=512, batch_size=64, device="cuda", fused=fused, cuda_graph=wanted, **options)
        for wanted in (False, True)
    ]
    choices = [choices_of(run) for run in runs]
    for step in range(WARMUP_STEPS + 100):
        for run, each in zip(runs, choices, strict=True):
            run.train_batch(next(each))
        if step == WARMUP_STEPS + 5:  # later, rounding may have led them apart
            for name, value in tensors_of(runs[0]).items():
                torch.testing.assert_close(tensors_of(runs[1])[name], value, rtol=1e-3, atol=1e-3, msg=name)
    assert runs[0].graph is None
    assert runs[1].graph is not None
    assert runs[1].graph.failure is None
    assert runs[1].graph.captured
    assert runs[1].running[0] == pytest.approx(runs[0].running[0], rel=0.05)


@needs_gpu
def test_each_replay_on_a_gpu_draws_anew(mnist: Dataset) -> None:
    run = trainer(mnist, device="cuda", dropout=0.5, optimizer="sgd", lr=0.0)
    chosen = next(choices_of(run))
    losses = []
    for _ in range(WARMUP_STEPS + 5):
        before = run.running[0] * run.running[2]
        run.train_batch(chosen)
        losses.append(run.running[0] * run.running[2] - before)
    assert run.graph is not None
    assert run.graph.captured
    assert len({round(loss, 3) for loss in losses}) == len(losses)


@needs_gpu
def test_a_capture_that_fails_on_a_gpu_leaves_eager_steps() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    total = torch.zeros((), device="cuda")

    def step(given: torch.Tensor) -> None:
        total.add_(
            given.sum() + torch.rand(3, device="cuda", generator=generator).sum() + torch.rand((), device="cuda")
        )
        total.item()

    graphed = GraphedStep(step, torch.device("cuda"), generators=[generator])
    current = torch.cuda.current_stream()
    for _ in range(WARMUP_STEPS + 5):
        graphed(torch.ones(1, device="cuda"))
    assert graphed.failure
    assert torch.cuda.current_stream() == current
    assert WARMUP_STEPS + 5 < total.item() < 5 * (WARMUP_STEPS + 5)


@needs_gpu
def test_a_run_on_a_gpu_says_how_it_steps_and_resumes(
    train: ModuleType, quick: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*quick[:-1], "cuda", "--out", str(tmp_path)]  # the last ones are --device cpu
    assert train.main(flags) == 0
    assert "\nstep     CUDA graph, after 3 eager steps\n" in capsys.readouterr().out
    assert train.main([*flags, "--overwrite", "--no-cuda-graph"]) == 0
    assert "\nstep     eager: --no-cuda-graph\n" in capsys.readouterr().out
