"""Training runs: progress output, files, interruption and resumption."""

import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import distributed, plots
from .checkpoint import TEMP_SUFFIX, Checkpoint, write_atomically
from .cnn import CNN
from .data import Augmentation, TrainingBatches, load_dataset
from .engine import MACHINE_SETTINGS, Settings, Trainer
from .errors import UserError, one_line
from .graph import WARMUP_STEPS
from .kernels.implementations import choose_implementation

LAST, BEST = "last.pt", "best.pt"
CONFIG, METRICS, CURVES, MISTAKES = "config.json", "metrics.jsonl", "curves.png", "misclassified.png"
TENSORBOARD = "events.out.tfevents.*"
RUN_FILES = (LAST, BEST, CONFIG, METRICS, CURVES, MISTAKES, TENSORBOARD)
# Interval at which the progress bar reads loss and accuracy, for which the host waits for the device.
PROGRESS_SECONDS = 1.0
# Config of mnistnorm.compare, in the folder that has the folders of its runs.
COMPARISON_CONFIG = "comparison-config.json"
# Interval of the progress lines within an epoch, without a terminal for a progress bar.
PLAIN_LINE_SECONDS = 15.0


def default_out(dataset: str, norm: str, fused: bool, seed: int) -> Path:
    """The default folder of a run."""
    return Path("runs", f"{dataset}-{norm}-{'fused' if fused else 'stock'}-seed{seed}")


def run_training(settings: Settings, out: Path, *, resume: bool = False, overwrite: bool = False) -> Trainer:
    """Trains with `settings`, writes the files of the run to `out` and prints progress to stdout.

    With several processes, the main one reads, writes and prints.

    Args:
        settings: settings of the run.
        out: folder of the run, created if missing.
        resume: continue from the checkpoint in `out`, which must have the same settings except MACHINE_SETTINGS.
        overwrite: replace a run in `out`.

    Returns:
        the trainer at the end of the run.

    Raises:
        UserError: `out` already has a run or cannot be written; the training diverged; a signal stopped the run, which
            was saved.
    """
    implementation = describe_implementation(settings)
    check_processes(settings)
    check_cuda_graph(settings)
    checkpoint = distributed.from_main(lambda: load_run(out, settings)) if resume else None
    distributed.from_main(lambda: prepare_run_folder(out, allow_existing=resume or overwrite))
    with locked(out) if distributed.is_main() else nullcontext():
        trainer = build_trainer(settings)
        if checkpoint:
            _continue(trainer, checkpoint, out / LAST)
        if distributed.is_main():
            _begin(trainer, out, implementation, checkpoint)
        with _signals_deferred() as first_signal:
            _train_to_the_end(trainer, out, first_signal)
            complete = trainer.epoch >= settings.epochs
            if complete:
                _report(trainer, out)
            elif distributed.is_main():
                _check_convergence(settings, trainer.epoch + 1, [trainer.running[0]])
                save(trainer, out / LAST)
        if number := first_signal():
            state = "after the last epoch, complete" if complete else f"in epoch {trainer.epoch + 1} and saved"
            hint = "" if complete else "; the same command with --resume continues"
            raise UserError(f"stopped by {signal.Signals(number).name} {state} in {out}{hint}", exit_code=128 + number)
    return trainer


def _begin(trainer: Trainer, out: Path, implementation: str, checkpoint: Checkpoint | None) -> None:
    """Writes the first files and prints the description of a run; `checkpoint` is the one to resume from."""
    settings = trainer.settings
    if not checkpoint:
        save(trainer, out / LAST)
    if trainer.step == 0:  # files of an earlier run, which are removed only after this one has been saved
        remove_files(out, (BEST, METRICS, CURVES, MISTAKES, TENSORBOARD))
    for line in describe(trainer, implementation, out, checkpoint.settings if checkpoint else settings):
        print(line, flush=True)
    environment = {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform()}
    config = {"settings": asdict(settings), "layers": implementation, "environment": environment}
    write_atomically(out / CONFIG, json.dumps(config, indent=2) + "\n")


def load_run(out: Path, settings: Settings | None = None) -> Checkpoint:
    """The checkpoint to resume the run in `out` from.

    Raises:
        UserError: there is none, or its settings other than MACHINE_SETTINGS differ from `settings`.
    """
    if not (out / LAST).exists():
        raise UserError(
            f"there is no run to resume in {out}: name its folder with --out, leave out --resume, or replace what is "
            "there (--overwrite)"
        )
    checkpoint = Checkpoint.load(out / LAST, hint="start again with --overwrite, or train in another folder (--out)")
    for name, value in asdict(settings or checkpoint.settings).items():
        saved = getattr(checkpoint.settings, name)
        if saved != value and name not in MACHINE_SETTINGS:
            advice = "without the change"
            if name == "processes":
                advice = f"with torchrun --nproc-per-node {saved}" if saved > 1 else "without torchrun"
            raise UserError(f"the run in {out} has {name}={saved}, not {value}: resume it {advice}", exit_code=2)
    return checkpoint


def _continue(trainer: Trainer, checkpoint: Checkpoint, path: Path) -> None:
    if checkpoint.training is None:
        raise UserError(f"{path} holds a network only, no run to resume: start again with --overwrite")
    if checkpoint.normalization != trainer.dataset.normalization:
        raise UserError(f"the run of {path} was trained on other images: name their folder with --data-dir")
    trainer.model.load_state_dict(checkpoint.model)
    try:
        trainer.load_state_dict(checkpoint.training)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{one_line(error)}; start again with --overwrite"
        raise UserError(f"{path} holds the training state of another run or version: {reason}") from error


def prepare_run_folder(out: Path, *, allow_existing: bool) -> None:
    """Creates the folder of a run and checks that it can be written."""
    others = {"a comparison": [COMPARISON_CONFIG]}
    complete = not allow_existing and is_complete(out)
    prepare_folder(out, RUN_FILES, "a run", allow_existing=allow_existing, others=others, complete=complete)


def is_complete(out: Path) -> bool:
    """Whether the folder holds a run that has reached its last epoch."""
    try:
        checkpoint = Checkpoint.load(out / LAST)
    except UserError:
        return False
    return bool(checkpoint.metrics.get("epoch", 0) == checkpoint.settings.epochs)


def prepare_folder(
    out: Path,
    files: Sequence[str],
    content: str,
    *,
    allow_existing: bool,
    others: Mapping[str, Sequence[str]],
    complete: bool,
) -> None:
    """Creates a folder and checks that it can be written and holds no other content.

    Args:
        out: the folder.
        files: glob patterns of the files of its content.
        content: name of the content in messages.
        allow_existing: whether the folder may already have such files.
        others: contents that the folder must not have, by name, with the glob patterns of their files.
        complete: whether existing content is complete.
    """

    def holds(files: Sequence[str]) -> bool:
        return any(path for name in files for path in out.glob(name))

    for other, their_files in others.items():
        if holds(their_files):
            raise UserError(f"{out} holds {other}, not {content}: name another --out")
    if not allow_existing and holds(files):
        state, remedy = (", complete", "") if complete else ("", "continue it (--resume), ")
        raise UserError(f"{out} holds {content}{state}: {remedy}replace it (--overwrite) or name another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {out}: {error.strerror}; name another --out") from error
    if not os.access(out, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"the folder {out} cannot be written to; name another --out")


def remove_files(out: Path, files: Sequence[str]) -> None:
    """Deletes the files in `out` whose names match one of the patterns `files`."""
    for path in (path for name in files for path in out.glob(name)):
        path.unlink()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Locks the folder `out` against other programs, and removes temporary files of a program that was killed.

    The kernel releases the lock when the process ends in any way, and the lock needs no file.

    Raises:
        UserError: another program is writing to the folder.
    """
    if sys.platform == "win32":  # no flock
        yield
        return
    import fcntl

    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {out}: wait until it ends or name another --out") from error
        remove_files(out, [f".*{TEMP_SUFFIX}"])
        yield
    finally:
        os.close(folder)


def check_processes(settings: Settings) -> None:
    """Raises UserError if the running processes cannot train with `settings`."""
    device, processes = torch.device(settings.device), distributed.processes()
    if settings.batch_size < processes:
        message = f"--batch-size {settings.batch_size} leaves some of {processes} processes without an image: raise it"
        raise UserError(message, exit_code=2)
    if processes > 1 and (device.type not in ("cpu", "cuda") or device.index is not None):
        raise UserError(f"--device {device} is not for {processes} processes: use cpu or cuda", exit_code=2)
    if processes > 1 and device.type == "cuda" and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        message = f"there are more processes than the {count} GPUs of this machine: start at most {count}"
        raise UserError(message, exit_code=2)
    if settings.sync_batch_norm:
        if not torch.distributed.is_initialized():
            raise UserError("--sync-batch-norm is for several processes: start them with torchrun", exit_code=2)
        if settings.norm != "batch":
            message = f"--sync-batch-norm is for batch norm: --norm {settings.norm} has nothing to synchronise"
            raise UserError(message, exit_code=2)
        if not settings.fused and device.type == "cpu":
            raise UserError("--sync-batch-norm on a CPU is for the fused layers: add --fused", exit_code=2)


def build_trainer(settings: Settings) -> Trainer:
    """Builds a trainer, with data and model on the device and all random generators seeded."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    model = CNN(settings.norm, fused=settings.fused, dropout=settings.dropout, impl=settings.impl).to(device)
    if device.type == "cpu" and settings.norm in ("group", "sample"):
        # Faster convolutions and pooling; batch and layer norm lose more than that.
        model = model.to(memory_format=torch.channels_last)
    if settings.sync_batch_norm:
        distributed.synchronise_batch_norm(model)
    if settings.compile:
        _check_compiler(device)
        model.compile()
    data_dir = None if settings.data_dir is None else Path(settings.data_dir)
    dataset = distributed.from_main(lambda: load_dataset(settings.dataset, data_dir))
    if settings.val_split:
        dataset = dataset.with_validation(settings.val_split)
    if settings.batch_size > len(dataset.train):
        message = (
            f"--batch-size {settings.batch_size} is more than the {len(dataset.train):,} training images: lower it"
        )
        raise UserError(message, exit_code=2)
    dataset = dataset.to(device)
    augmentation = Augmentation(elastic=settings.elastic) if settings.augment else None
    batches = TrainingBatches(
        dataset.train,
        settings.batch_size,
        dataset.normalization,
        augmentation,
        settings.seed,
        parts=distributed.processes(),
        part=distributed.rank(),
    )
    return Trainer(model, dataset, settings, batches)


def check_cuda_graph(settings: Settings) -> None:
    """Raises UserError if a CUDA graph is requested but not possible."""
    if not settings.cuda_graph:
        return
    obstacles = {
        f"--device {settings.device}": torch.device(settings.device).type != "cuda",
        f"{settings.processes} processes": settings.processes > 1,
        "--compile": settings.compile,
    }
    for obstacle, present in obstacles.items():
        if present:
            message = f"--cuda-graph is for one process on a GPU without --compile, not for {obstacle}"
            raise UserError(f"{message}: use --no-cuda-graph", exit_code=2)


def _check_compiler(device: torch.device) -> None:
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--compile does not work on this machine, leave it out: {reason}") from error


def describe_implementation(settings: Settings) -> str:
    """Which implementation computes norm, dropout and ReLU, and why.

    Raises:
        UserError: the requested one does not run here.
    """
    if not settings.fused:
        if settings.impl != "auto":
            raise UserError(f"--impl {settings.impl} is for the fused layers: add --fused", exit_code=2)
        return "torch.nn's own layers (--no-fused)"
    try:
        chosen = choose_implementation(settings.impl, torch.device(settings.device))
    except RuntimeError as error:
        raise UserError(f"--impl {settings.impl}: {error}", exit_code=2) from error
    name = {"torch": "fused layers in PyTorch", "triton": "fused layers in Triton"}[chosen]
    if settings.impl != "auto":
        return f"{name} (--impl {settings.impl})"
    return f"{name} (Triton {'compiles' if chosen == 'triton' else 'does not compile'} for {settings.device})"


def describe(trainer: Trainer, implementation: str, out: Path, saved: Settings) -> Iterator[str]:
    """Yields the lines that describe a run and its machine; `saved` are the settings before it was resumed."""
    settings, dataset = trainer.settings, trainer.dataset
    held_out = f", {len(dataset.validation):,} validation" if dataset.validation is not None else ""
    extras = {
        "elastic": settings.elastic,
        "dropout": settings.dropout,
        "weight decay": settings.weight_decay,
        "L1": settings.l1,
        "label smoothing": settings.label_smoothing,
    }
    recipe = [
        f"{settings.epochs} epoch{'s' * (settings.epochs > 1)}",
        f"batch {settings.batch_size}",
        f"{settings.optimizer} at {settings.lr:g}",
        "augmented" if settings.augment else "not augmented",
        *(f"{name} {value:g}" for name, value in extras.items() if value),
        f"seed {settings.seed}",
    ]
    options = "".join(f", {name}" for name in ("compile", "amp") if getattr(settings, name))
    if settings.processes > 1:
        options += f", {settings.processes} processes"
    over = " over all processes" if settings.sync_batch_norm else ""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    name = f" ({torch.cuda.get_device_name(trainer.device)})" if trainer.device.type == "cuda" else ""
    yield f"device   {settings.device}{name}, CPU threads: {settings.threads}, torch {torch.__version__}{options}"
    yield f"layers   {implementation}"
    yield f"network  {settings.norm} norm{over}, {parameters:,} parameters"
    yield f"data     {dataset.name}: {len(dataset.train):,} training{held_out}, {len(dataset.test):,} test images"
    yield f"recipe   {', '.join(recipe)}"
    if trainer.device.type == "cuda":
        reason = trainer.why_eager()
        yield f"step     {f'eager: {reason}' if reason else f'CUDA graph, after {WARMUP_STEPS} eager steps'}"
    if trainer.epoch >= settings.epochs:
        progress = ", already complete"
    else:
        progress = f", resumed in epoch {trainer.epoch + 1}" if trainer.step else ""
    yield f"out      {out}{progress}"
    changes = [
        f"{name} {getattr(settings, name)} instead of {getattr(saved, name)}"
        for name in MACHINE_SETTINGS
        if getattr(settings, name) != getattr(saved, name)
    ]
    if changes:
        yield f"note     resumed with {', '.join(changes)}: rounding and random numbers may differ"


def _train_to_the_end(trainer: Trainer, out: Path, first_signal: Callable[[], int]) -> None:
    """Trains and saves epoch after epoch, until the last one or until `first_signal` returns a signal."""
    if trainer.epoch >= trainer.settings.epochs:
        return
    images, epochs = len(trainer.dataset.train), trainer.settings.epochs
    bar = tqdm(
        total=epochs * images,
        initial=trainer.epoch * images + trainer.running[2],
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        disable=None if distributed.is_main() else True,  # None: disabled if stderr is not a terminal
    )

    shown = time.monotonic()
    note_failure = trainer.graph is not None

    def after_step(batch: int) -> bool:
        nonlocal shown, note_failure
        bar.update(batch)
        if bar.disable and distributed.is_main() and time.monotonic() - shown >= PLAIN_LINE_SECONDS:
            loss, accuracy, done = trainer.running  # waits for the device
            scores = f"train {loss:.4f} {accuracy:.2%}"
            print(f"epoch {trainer.epoch + 1:2}/{epochs}   {scores}   after {done:,} of {images:,} images", flush=True)
            shown = time.monotonic()
        if not bar.disable and time.monotonic() - shown >= PROGRESS_SECONDS:
            loss, accuracy, _ = trainer.running  # waits for the device
            bar.set_description(f"epoch {trainer.epoch + 1}/{epochs}", refresh=False)
            bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
            shown = time.monotonic()
        if note_failure and trainer.graph is not None and trainer.graph.failure is not None:
            bar.write(f"note     no CUDA graph, the steps are eager: {trainer.graph.failure}")
            note_failure = False
        return first_signal() != 0

    with bar, _tensorboard_writer(out, purge_step=trainer.epoch + 1) as writer:
        while trainer.epoch < epochs and not first_signal():
            if trainer.train_epoch(after_step) and distributed.is_main():
                _save_epoch(trainer, out, writer)
                bar.write(_epoch_line(trainer.history[-1], epochs))
                sys.stdout.flush()
                shown = time.monotonic()


def _save_epoch(trainer: Trainer, out: Path, writer: Any) -> None:
    metrics = trainer.history[-1]
    _check_convergence(trainer.settings, trainer.epoch, metrics.values())
    if best_epoch(trainer.history) == trainer.epoch:
        save(trainer, out / BEST, to_resume=False)
    write_atomically(out / METRICS, "".join(json.dumps(line) + "\n" for line in trainer.history))
    if writer:
        try:
            for name, value in metrics.items():
                writer.add_scalar(name, value, trainer.epoch)
            writer.flush()
        except OSError as error:
            raise UserError(f"cannot write TensorBoard's events to {out}: {error.strerror}") from error
    # Saved last, so that a run that is resumed from it has this epoch in all other files.
    save(trainer, out / LAST)


def _check_convergence(settings: Settings, epoch: int, metrics: Iterable[float]) -> None:
    if not all(map(math.isfinite, metrics)):
        raise UserError(f"the training diverged in epoch {epoch}: use a lower --lr than {settings.lr:g}")


@contextmanager
def _signals_deferred() -> Iterator[Callable[[], int]]:
    """Records SIGINT and SIGTERM instead of letting them interrupt.

    Yields a function that returns the first signal of any process, or 0 if there is none; all processes must call it.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: distributed.largest(received[0] if received else 0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tensorboard_writer(out: Path, purge_step: int) -> AbstractContextManager[Any]:
    """A SummaryWriter that replaces events from `purge_step` on; None if TensorBoard is not installed."""
    if not distributed.is_main():
        return nullcontext()
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return nullcontext()
    return SummaryWriter(str(out), purge_step=purge_step)


def save(trainer: Trainer, path: Path, *, to_resume: bool = True) -> None:
    """Writes a checkpoint of `trainer`; without `to_resume`, of the network only."""
    Checkpoint(
        settings=trainer.settings,
        model=trainer.model.state_dict(),
        classes=trainer.dataset.classes,
        normalization=trainer.dataset.normalization,
        metrics=trainer.history[-1] if trainer.history else {},
        training=trainer.state_dict() if to_resume else None,
    ).save(path)


def best_epoch(history: plots.History) -> int:
    """The epoch of the highest validation accuracy, or without a validation split of the lowest training loss.

    The test images never choose it: the result is reported on them.
    """
    if "validation_accuracy" in history[0]:
        best = max(history, key=lambda metrics: metrics["validation_accuracy"])
    else:
        best = min(history, key=lambda metrics: metrics["train_loss"])
    return int(best["epoch"])


def _epoch_line(metrics: dict[str, float], epochs: int) -> str:
    scores = (
        f"{split} {metrics[f'{split}_loss']:.4f} {metrics[f'{split}_accuracy']:.2%}"
        for split in ("train", "validation", "test")
        if f"{split}_loss" in metrics
    )
    return (
        f"epoch {metrics['epoch']:2}/{epochs}   {'   '.join(scores)}   "
        f"{metrics['seconds']:.1f} s, {metrics['images_per_second']:,.0f} images/s"
    )


def mistakes_of(trainer: Trainer) -> plots.Mistakes:
    """The test images that the network misclassifies."""
    test = trainer.dataset.test
    return plots.Mistakes.of(trainer.log_probabilities(test), test)


def _report(trainer: Trainer, out: Path) -> None:
    mistakes = mistakes_of(trainer)
    if not distributed.is_main():
        return
    settings, dataset, last = trainer.settings, trainer.dataset, trainer.history[-1]
    title = f"{dataset.name}, {settings.norm} norm"
    curves_title = f"{title}, trained on augmented images" if settings.augment else title
    grid = plots.mistake_grid(mistakes, dataset.classes, title, rows=5, columns=10)
    write_atomically(out / CURVES, plots.png(plots.run_curves(trainer.history, curves_title)))
    write_atomically(out / MISTAKES, plots.png(grid))
    minutes, seconds = divmod(round(sum(metrics["seconds"] for metrics in trainer.history)), 60)
    reason = "highest validation accuracy" if dataset.validation is not None else "lowest training loss"
    print(f"test     {last['test_accuracy']:.2%} correct, loss {last['test_loss']:.4f}, after the last epoch")
    print(f"time     {minutes} min {seconds} s of training")
    print(f"files    {out}: {LAST}, {BEST} (epoch {best_epoch(trainer.history)}, {reason}),")
    events = f", {TENSORBOARD}" if any(out.glob(TENSORBOARD)) else ""
    print(f"         {CONFIG}, {METRICS}, {CURVES}, {MISTAKES}{events}")
