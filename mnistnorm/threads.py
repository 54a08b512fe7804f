"""How many threads of the CPU a training run takes if nobody says so."""

import itertools
import os
import time
from dataclasses import replace

import torch

from .engine import Settings
from .run import build_trainer, check_cuda_graph, check_processes, describe_implementation

# After a first one.
MEASURED_STEPS = 5


def choose_threads(settings: Settings) -> int:
    """One thread of the CPU or all, whichever takes a few training steps faster, and says so on stdout.

    OMP_NUM_THREADS decides where it is set, and torch's choice for other devices and for several processes.
    """
    threads = torch.get_num_threads()
    measures = "OMP_NUM_THREADS" not in os.environ and settings.device == "cpu" and settings.processes == 1
    if not measures or threads == 1:
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
