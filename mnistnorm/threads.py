"""Chooses the number of CPU threads of a training run."""

import itertools
import os
import time
from dataclasses import replace

import torch

from .engine import Settings
from .run import build_trainer, check_cuda_graph, check_processes, describe_implementation

# After one step to warm up.
MEASURED_STEPS = 5


def choose_threads(settings: Settings) -> int:
    """Chooses one CPU thread or all, whichever runs a few training steps faster, and prints the choice.

    If OMP_NUM_THREADS is set, on other devices and with several processes, torch's default is kept.
    """
    threads = torch.get_num_threads()
    measure = "OMP_NUM_THREADS" not in os.environ and settings.device == "cpu" and settings.processes == 1
    if not measure or threads == 1:
        return threads
    describe_implementation(settings)
    check_processes(settings)
    check_cuda_graph(settings)
    seconds = {}
    for count in (1, threads):
        trainer = build_trainer(replace(settings, threads=count, compile=False))
        batches = iter(trainer.batches)
        trainer.train_step(*next(batches))
        started = time.perf_counter()
        for batch in itertools.islice(batches, MEASURED_STEPS):
            trainer.train_step(*batch)
        seconds[count] = (time.perf_counter() - started) / max(trainer.step - 1, 1)
    fastest = min(seconds, key=lambda count: seconds[count])
    steps = ", ".join(f"{1000 * took:.1f} ms a step with {count}" for count, took in seconds.items())
    print(f"threads  {fastest}, measured: {steps}", flush=True)
    return fastest
