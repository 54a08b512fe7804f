"""Training without files and flags: settings, optimizers, schedule, trainer, evaluation."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .cnn import NORMS
from .data import DATASETS, Dataset, Normalization, Split, TrainingBatches
from .graph import GraphedStep, has_hooks
from .kernels.implementations import Impl
from .muon import BatchedMuon

# The peak learning rate, by optimizer and norm.
LEARNING_RATES = {
    "muon": {"batch": 0.05, "group": 0.08, "layer": 0.2, "sample": 0.05},
    "sgd": {"batch": 0.2, "group": 0.2, "layer": 0.2, "sample": 0.2},
    "adamw": {"batch": 0.01, "group": 0.01, "layer": 0.02, "sample": 0.01},
}

# The elastic displacement in pixels, by norm: on a split of the training set it lowered the loss of layer norm by a
# sixth, that of group norm slightly, and not that of batch norm.
ELASTIC = {"batch": 0.0, "group": 1.0, "layer": 1.0, "sample": 0.0}

# With Muon, AdamW trains the other parameters at this share of the learning rate.
ADAMW_SHARE = 0.2

# The share of the steps in which the learning rate rises.
WARMUP = 0.2

# The settings that may change when a run is resumed: they affect only the rounding and, except for threads and
# data_dir, which random numbers are drawn.
MACHINE_SETTINGS = ("impl", "device", "threads", "compile", "cuda_graph", "data_dir")


# The allowed values of the settings that are a choice.
CHOICES: dict[str, tuple[str, ...]] = {
    "norm": NORMS,
    "impl": get_args(Impl),
    "optimizer": (*LEARNING_RATES,),
    "dataset": (*DATASETS,),
}

# The bounds of the settings that are numbers: inclusive below, exclusive above.
BOUNDS: dict[str, tuple[int, float]] = {
    **dict.fromkeys(("epochs", "batch_size", "processes"), (1, 2**31)),
    "threads": (1, 1025),  # OpenMP ends the process if the system refuses a thread
    "seed": (0, 2**31),
    **dict.fromkeys(("lr", "weight_decay", "l1", "elastic"), (0, math.inf)),
    **dict.fromkeys(("dropout", "label_smoothing", "val_split"), (0, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the result of a training run.

    Attributes:
        norm: one of cnn.NORMS.
        fused: whether the network has the fused layers.
        impl: implementation of the fused layers: "auto", "triton" or "torch".
        dropout: probability of zeroing an element between norm and ReLU.
        optimizer: "muon" (on all convolutions but the last, AdamW on the rest), "sgd" (Nesterov) or "adamw".
        lr: peak learning rate.
        epochs: number of epochs.
        batch_size: images per step.
        weight_decay: decoupled with muon and adamw, as a gradient with sgd; on convolutions only.
        l1: factor of the L1 penalty on the convolutions' weights.
        label_smoothing: weight of the uniform target, as in nn.CrossEntropyLoss.
        augment: whether training images are augmented.
        elastic: largest elastic displacement of the augmentation in pixels, see data.Augmentation.
        seed: random seed of the initial weights, the order of the images, the augmentation and the dropout.
        dataset: a key of data.DATASETS.
        data_dir: folder of the data set; None: see data.load_dataset.
        val_split: fraction of the training images held out for validation.
        device: a torch device.
        threads: number of CPU threads.
        amp: forward in bfloat16 where autocast allows it.
        compile: whether the network runs under torch.compile.
        cuda_graph: whether a step is captured as a CUDA graph; None: where possible, see Trainer.why_eager.
        sync_batch_norm: whether batch norm takes its statistics over all processes' parts of a batch.
        processes: number of processes that share each batch.

    Raises:
        TypeError, ValueError: a setting is of the wrong type, unknown or out of range.
    """

    norm: str = "batch"
    fused: bool = False
    impl: Impl = "auto"
    dropout: float = 0.0
    optimizer: str = "muon"
    lr: float
    epochs: int = 15
    batch_size: int = 128
    weight_decay: float = 0.0
    l1: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = True
    elastic: float = 0.0
    seed: int = 0
    dataset: str = "mnist"
    data_dir: str | None = None
    val_split: float = 0.0
    device: str = "cpu"
    threads: int = 1
    amp: bool = False
    compile: bool = False
    cuda_graph: bool | None = None
    sync_batch_norm: bool = False
    processes: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if field.name in CHOICES:
                if value not in CHOICES[field.name]:
                    raise ValueError(f"{field.name} must be one of {', '.join(CHOICES[field.name])}, got {value!r}")
            elif not isinstance(value, (int, float) if kind is float else kind) or (  # type: ignore[arg-type]
                isinstance(value, bool) and kind not in (bool, bool | None)
            ):
                raise TypeError(f"{field.name} must be of type {getattr(kind, '__name__', kind)}, got {value!r}")
        for name, (low, end) in BOUNDS.items():
            if not low <= getattr(self, name) < end:
                raise ValueError(f"{name} must be from {low} to below {end}, got {getattr(self, name)}")


def build_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """The optimizers that together train all parameters of `model`."""
    convolutions = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    others = [parameter for parameter in model.parameters() if parameter.ndim != 4]
    lr, weight_decay = settings.lr, settings.weight_decay
    if settings.optimizer == "muon":
        *hidden, last = convolutions
        return [
            BatchedMuon(hidden, lr=lr, momentum=0.95, weight_decay=weight_decay),
            torch.optim.AdamW(_decay_groups([last], others, weight_decay), lr=lr * ADAMW_SHARE, fused=True),
        ]
    groups = _decay_groups(convolutions, others, weight_decay)
    if settings.optimizer == "sgd":
        return [torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)]
    return [torch.optim.AdamW(groups, lr=lr, fused=True)]


def _decay_groups(decayed: list[nn.Parameter], others: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def lr_factors(steps: int) -> Tensor:
    """The learning rate in the middle of each step, relative to the peak: linear up, then linear down to 0; float64."""
    progress = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    return torch.minimum(progress / WARMUP, (1 - progress) / (1 - WARMUP))


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[None]:
    """torch.autocast to bfloat16 on `device`, if `enabled`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class Evaluation:
    """The mean negative log-likelihood in nats, and the accuracy from 0 to 1."""

    loss: float
    accuracy: float


@torch.inference_mode()
def log_probabilities(
    model: nn.Module, images: Tensor, normalization: Normalization, *, amp: bool = False, batch_size: int = 1000
) -> Tensor:
    """The output of `model`, in eval mode, for raw images (uint8, (N, 1, 28, 28)): float32, (N, classes)."""
    model.eval()
    with autocast(images.device, amp):
        return torch.cat([model(normalization(batch)).float() for batch in images.split(batch_size)])


def score(log_probs: Tensor, labels: Tensor) -> Evaluation:
    """Evaluates `log_probs`, float (N, classes), against `labels`, int64 (N,)."""
    correct = log_probs.argmax(1).eq(labels).sum().item()
    return Evaluation(loss=F.nll_loss(log_probs, labels).item(), accuracy=correct / len(labels))


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random-number generators of the CPU and of `device`, by the device's type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets the generators of the CPU and of `device` to states from rng_states, which may be of another device."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


class Trainer:
    """Trains a model; its state can be saved after any step.

    A step does not synchronise with the device, so the host runs ahead of it.

    With several processes, each has a trainer and makes the same calls; their states stay equal.

    Args:
        model: the network, on the device of the data.
        dataset: the data set, on the device to train on.
        settings: settings of the run.
        batches: batches of the training split.

    Attributes:
        graph: the step as a CUDA graph; None if `why_eager` gave a reason when the trainer was made.
    """

    def __init__(self, model: nn.Module, dataset: Dataset, settings: Settings, batches: TrainingBatches) -> None:
        self.model = model
        self.dataset = dataset
        self.settings = settings
        self.batches = batches
        self._network = distributed.wrap(model)
        self.device = dataset.train.images.device
        self.optimizers = build_optimizers(model, settings)
        peaks = torch.tensor([group["lr"] for group in self._param_groups()], dtype=torch.float64)
        self._schedule = (lr_factors(self.total_steps)[:, None] * peaks).to(self.device, torch.float32)
        self._lrs = self._schedule[0].clone()
        self._share_learning_rates()
        self.graph = self._new_graph()
        self._weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        self.history: list[dict[str, float]] = []
        self.step = 0
        self._totals = torch.zeros(2, device=self.device)  # loss and correct predictions, summed over _images
        self._start_epoch()

    def _param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _share_learning_rates(self) -> None:
        """Makes the optimizers' learning rates views of one tensor on the device, which each step overwrites."""
        for group, lr in zip(self._param_groups(), self._lrs, strict=True):
            group["lr"] = lr

    def why_eager(self) -> str | None:
        """Why the step is not captured as a CUDA graph; None if a capture is attempted."""
        if self.settings.cuda_graph is False:
            return "--no-cuda-graph"
        if self.device.type != "cuda":
            return f"the device is {self.device.type}"
        if self._network is not self.model:
            return "started by torchrun"
        if self.settings.compile:
            return "--compile"
        if type(self).train_step is not Trainer.train_step:
            return "train_step is overridden"
        if has_hooks(self.model):
            return "the model has hooks, which a graph would not call"
        return None

    def _new_graph(self) -> GraphedStep | None:
        if self.why_eager() is not None:
            return None
        return GraphedStep(self._compute_batch, self.device, self.optimizers, [self.batches.generator])

    def _start_epoch(self) -> None:
        self._totals.zero_()
        self._images = 0
        self._seconds = 0.0

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return len(self.history)

    @property
    def total_steps(self) -> int:
        return self.settings.epochs * len(self.batches)

    @property
    def running(self) -> tuple[float, float, int]:
        """Mean loss, accuracy and number of images of the current epoch so far."""
        loss, correct = (self._totals / max(self._images, 1)).tolist()
        return loss, correct, self._images

    def train_epoch(self, after_step: Callable[[int], bool] = lambda images: False) -> bool:
        """Trains to the end of the current epoch and evaluates.

        Args:
            after_step: called after each step, in all processes, with its number of images; returns whether to stop.
                After the last step of an epoch the result is ignored.

        Returns:
            whether the epoch was completed.
        """
        started = time.perf_counter()
        self.model.train()
        for chosen in self.batches.choices():
            self.train_batch(chosen)
            if after_step(self.batches.size) and self.step % len(self.batches) != 0:
                self._count_seconds(started)
                return False
        self._count_seconds(started)
        self._end_epoch()
        return True

    def _count_seconds(self, started: float) -> None:
        self._totals.tolist()  # waits for the device
        self._seconds += time.perf_counter() - started

    def train_batch(self, chosen: Tensor) -> None:
        """Makes a batch and takes one step; replays the CUDA graph if there is one and the batch is of full size.

        Args:
            chosen: indices of the batch's training images, from `batches.choices`.
        """
        if self.graph is not None and len(chosen) == self.batches.batch_size:
            self._set_learning_rates()
            self.graph(chosen)
            self._count(len(chosen))
        else:
            self.train_step(*self.batches.make(chosen), len(chosen))

    def train_step(self, images: Tensor, labels: Tensor, size: int | None = None) -> None:
        """Takes one eager step.

        Args:
            images: normalized, float32, (N, 1, 28, 28).
            labels: labels of the images, int64, (N,).
            size: number of images in the whole batch, if other processes have parts of it.
        """
        size = size or len(labels)
        self._set_learning_rates()
        distributed.seed_dropout(self.settings.seed, self.step)
        self._compute(images, labels, size)
        self._count(size)

    def _set_learning_rates(self) -> None:
        self._lrs.copy_(self._schedule[self.step])

    def _count(self, images: int) -> None:
        self.step += 1
        self._images += images

    def _compute_batch(self, chosen: Tensor) -> None:
        """The part of a step that is captured as a CUDA graph."""
        self._compute(*self.batches.make(chosen), len(chosen))

    def _compute(self, images: Tensor, labels: Tensor, size: int) -> None:
        """Forward, backward, optimizer steps and the sums of the epoch, without synchronising with the device."""
        with autocast(self.device, self.settings.amp):
            log_probs = self._network(images).float()
        nll = F.nll_loss(log_probs, labels) if len(labels) else log_probs.sum()  # avoid the NaN of an empty mean
        loss = nll
        if self.settings.label_smoothing:
            loss = torch.lerp(nll, -log_probs.mean(), self.settings.label_smoothing)
        if self.settings.processes > 1:
            # Gradients are averaged over processes, which may have different numbers of images.
            loss = loss * (self.settings.processes * len(labels) / size)
        if self.settings.l1:
            loss = loss + self.settings.l1 * torch.stack([weight.abs().sum() for weight in self._weights]).sum()
        self.model.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        correct = log_probs.detach().argmax(1).eq(labels).sum()
        totals = torch.stack([nll.detach() * len(labels), correct])
        distributed.add_up(totals)
        self._totals += totals

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, without the model's own."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "batches": self.batches.state_dict(),
            "history": self.history,
            "step": self.step,
            "totals": self._totals.cpu(),
            "images": self._images,
            "seconds": self._seconds,
            "rng": rng_states(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state from state_dict; the model's own state must be loaded separately.

        Raises:
            AttributeError, LookupError, RuntimeError, TypeError, ValueError: `state` does not fit this trainer.
        """
        if len(state["history"]) != state["step"] // len(self.batches):
            counts = f"{len(state['history'])} completed epochs and {state['step']} steps"
            raise ValueError(f"it has {counts}, with {len(self.batches)} steps per epoch")
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            saved, own = (list(each["param_groups"][0]) for each in (optimizer_state, optimizer.state_dict()))
            if saved != own:
                raise ValueError(f"its optimizer has {', '.join(saved)}, not {', '.join(own)}")
            optimizer.load_state_dict(optimizer_state)
        self._share_learning_rates()
        self.graph = self._new_graph()  # a captured graph would use the old tensors
        self.batches.load_state_dict(state["batches"])
        self.history = state["history"]
        self.step = state["step"]
        self._totals.copy_(state["totals"])
        self._images = state["images"]
        self._seconds = state["seconds"]
        set_rng_states(state["rng"], self.device)

    def log_probabilities(self, split: Split) -> Tensor:
        """The current model's output for a split's images: float32, (N, classes)."""
        return distributed.split_up(
            lambda images: log_probabilities(self.model, images, self.dataset.normalization, amp=self.settings.amp),
            split.images,
        )

    def _end_epoch(self) -> None:
        distributed.copy_buffers(self.model)
        loss, accuracy, images = self.running
        metrics = {"epoch": self.epoch + 1, "train_loss": loss, "train_accuracy": accuracy}
        for name, split in (("validation", self.dataset.validation), ("test", self.dataset.test)):
            if split is not None:
                evaluation = score(self.log_probabilities(split), split.labels)
                metrics |= {f"{name}_loss": evaluation.loss, f"{name}_accuracy": evaluation.accuracy}
        metrics |= {"seconds": self._seconds, "images_per_second": images / self._seconds}
        self.history.append(metrics)
        self._start_epoch()
