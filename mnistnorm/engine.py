"""The pieces of a training run, free of files and flags: settings, optimizers, schedule, trainer, evaluation."""

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

# The elastic part of the augmentation in pixels, by norm: on a split of the training set it lowered the loss of layer
# norm by a sixth, that of group norm by little, and not that of batch norm.
ELASTIC = {"batch": 0.0, "group": 1.0, "layer": 1.0, "sample": 0.0}

# With Muon, what Muon does not take runs on AdamW at this share of the learning rate.
ADAMW_SHARE = 0.2

# The share of the steps in which the learning rate rises.
WARMUP = 0.2

# The settings that say where and how to compute, not what: of the result they decide the rounding and, but for threads
# and data_dir, which random numbers are drawn.
MACHINE_SETTINGS = ("impl", "device", "threads", "compile", "cuda_graph", "data_dir")


# The values of the settings that are one of a few.
CHOICES: dict[str, tuple[str, ...]] = {
    "norm": NORMS,
    "impl": get_args(Impl),
    "optimizer": (*LEARNING_RATES,),
    "dataset": (*DATASETS,),
}

# The least value of each setting that is a number, and the first that is too large.
BOUNDS: dict[str, tuple[int, float]] = {
    **dict.fromkeys(("epochs", "batch_size", "processes"), (1, 2**31)),
    "threads": (1, 1025),  # of more threads than the system grants, OpenMP ends the process
    "seed": (0, 2**31),
    **dict.fromkeys(("lr", "weight_decay", "l1", "elastic"), (0, math.inf)),
    **dict.fromkeys(("dropout", "label_smoothing", "val_split"), (0, 1)),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides the result of a training run.

    Attributes:
        norm: one of cnn.NORMS.
        fused: whether the network is built of the fused layers.
        impl: "auto", "triton" or "torch", of the fused layers.
        dropout: probability of zeroing an element between norm and ReLU.
        optimizer: "muon" (on the convolutions but the last, AdamW on the rest), "sgd" (Nesterov) or "adamw".
        lr: peak learning rate.
        epochs: length of the schedule.
        batch_size: images per step.
        weight_decay: decoupled with muon and adamw, as a gradient with sgd; on convolutions only.
        l1: factor of the sum of the convolutions' absolute weights in the loss.
        label_smoothing: share of the loss that is the mean over all classes.
        augment: whether training images are augmented.
        elastic: pixels by which the augmentation bends images, see data.Augmentation.
        seed: of the initial weights, the order of the images, the augmentation and the dropout.
        dataset: a key of data.DATASETS.
        data_dir: folder of the data set; None: see data.load_dataset.
        val_split: fraction of the training images kept for validation.
        device: a torch device.
        threads: of the CPU.
        amp: forward in bfloat16 where autocast allows it.
        compile: whether the network runs under torch.compile.
        cuda_graph: whether a step is captured as a CUDA graph; None: where it can be, see Trainer.why_eager.
        sync_batch_norm: whether batch norm takes its statistics over all processes' parts of a batch.
        processes: that share each batch.

    Raises:
        TypeError, ValueError: one of them is of another type, unknown or out of range.
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
    """Where `enabled`, a context in which the network computes in bfloat16 what bears it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@dataclass(frozen=True)
class Evaluation:
    """The mean negative log-likelihood in nats, and the share of right answers."""

    loss: float
    accuracy: float


@torch.inference_mode()
def log_probabilities(
    model: nn.Module, images: Tensor, normalization: Normalization, *, amp: bool = False, batch_size: int = 1000
) -> Tensor:
    """What `model`, in eval mode, says of raw images (uint8, (N, 1, 28, 28)): float32, (N, classes)."""
    model.eval()
    with autocast(images.device, amp):
        return torch.cat([model(normalization(batch)).float() for batch in images.split(batch_size)])


def score(log_probs: Tensor, labels: Tensor) -> Evaluation:
    """How good `log_probs`, float of (N, classes), are for `labels`, int64 of (N,)."""
    correct = log_probs.argmax(1).eq(labels).sum().item()
    return Evaluation(loss=F.nll_loss(log_probs, labels).item(), accuracy=correct / len(labels))


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """The states of the random-number generators of the CPU and of `device`, by the device's type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Sets the generators of the CPU and of `device` to what rng_states returned, on whatever device."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


class Trainer:
    """A model on its way through its training, with a state that can be saved after any step.

    A step reads no number from the device, so the host runs ahead of it.

    Where several processes train together, each has a trainer and does the same with it; their states are the same.

    Args:
        model: on the device of the data.
        dataset: on the device to train on.
        settings: how to train.
        batches: what to train on.

    Attributes:
        graph: the step as a CUDA graph; None where `why_eager` had a reason when the trainer was made.
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
        self._take_learning_rates()
        self.graph = self._new_graph()
        self._weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
        self.history: list[dict[str, float]] = []
        self.step = 0
        self._totals = torch.zeros(2, device=self.device)  # of loss and of right answers, over _images
        self._start_epoch()

    def _param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _take_learning_rates(self) -> None:
        """Makes the learning rates of the optimizers views of one tensor on the device, written at each step."""
        for group, lr in zip(self._param_groups(), self._lrs, strict=True):
            group["lr"] = lr

    def why_eager(self) -> str | None:
        """Why the step is not captured as a CUDA graph; None where it is, as far as can be told beforehand."""
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
        """Mean loss, accuracy and number of images of the running epoch so far."""
        loss, correct = (self._totals / max(self._images, 1)).tolist()
        return loss, correct, self._images

    def train_epoch(self, after_step: Callable[[int], bool] = lambda images: False) -> bool:
        """Trains to the end of the running epoch and evaluates.

        Args:
            after_step: called with the number of images of each step, in all processes; returns whether to stop
                there, which after an epoch's last step is no longer heeded.

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
        self._totals.tolist()  # waits until the device is done
        self._seconds += time.perf_counter() - started

    def train_batch(self, chosen: Tensor) -> None:
        """One step, the making of its batch included; as a CUDA graph where there is one for batches of this size.

        Args:
            chosen: numbers of the batch's training images, as from `batches.choices`.
        """
        if self.graph is not None and len(chosen) == self.batches.batch_size:
            self._set_learning_rates()
            self.graph(chosen)
            self._count(len(chosen))
        else:
            self.train_step(*self.batches.make(chosen), len(chosen))

    def train_step(self, images: Tensor, labels: Tensor, size: int | None = None) -> None:
        """One eager step.

        Args:
            images: normalized, float32, (N, 1, 28, 28).
            labels: of the images, int64, (N,).
            size: number of images of the batch, where other processes have the rest of it.
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
        """The part of a step that a CUDA graph holds."""
        self._compute(*self.batches.make(chosen), len(chosen))

    def _compute(self, images: Tensor, labels: Tensor, size: int) -> None:
        """Forward, backward, optimizers and the sums of the epoch, on the device alone: it reads nothing from there."""
        with autocast(self.device, self.settings.amp):
            log_probs = self._network(images).float()
        nll = F.nll_loss(log_probs, labels) if len(labels) else log_probs.sum()  # the mean of nothing is NaN
        loss = nll
        if self.settings.label_smoothing:
            loss = torch.lerp(nll, -log_probs.mean(), self.settings.label_smoothing)
        if self.settings.processes > 1:
            # Gradients are averaged over processes, of which some may have more images than others.
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
        """All that training continues from, but the model's own state."""
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
        """Continues from what state_dict returned; the model's own state must be loaded as well.

        Raises:
            AttributeError, LookupError, RuntimeError, TypeError, ValueError: `state` is of something else.
        """
        if len(state["history"]) != state["step"] // len(self.batches):
            raise ValueError(f"it has {len(state['history'])} epochs of {len(self.batches)} in {state['step']} steps")
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            saved, own = (list(each["param_groups"][0]) for each in (optimizer_state, optimizer.state_dict()))
            if saved != own:
                raise ValueError(f"its optimizer has {', '.join(saved)}, not {', '.join(own)}")
            optimizer.load_state_dict(optimizer_state)
        self._take_learning_rates()
        self.graph = self._new_graph()  # a captured one would go on with the tensors of before
        self.batches.load_state_dict(state["batches"])
        self.history = state["history"]
        self.step = state["step"]
        self._totals.copy_(state["totals"])
        self._images = state["images"]
        self._seconds = state["seconds"]
        set_rng_states(state["rng"], self.device)

    def log_probabilities(self, split: Split) -> Tensor:
        """What the model, as it stands, says of a split's images: float32, (N, classes)."""
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
