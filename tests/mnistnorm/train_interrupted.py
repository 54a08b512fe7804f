"""mnistnorm.train, of whose processes the last one, and it alone, is interrupted at step 25."""

import signal
import sys
from typing import Any

from mnistnorm import distributed, train
from mnistnorm.engine import Trainer

train_step = Trainer.train_step


def interrupted(trainer: Trainer, *batch: Any) -> None:
    train_step(trainer, *batch)
    if trainer.step == 25 and distributed.rank() == distributed.processes() - 1:
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    Trainer.train_step = interrupted  # type: ignore[method-assign]
    sys.exit(train.main())
