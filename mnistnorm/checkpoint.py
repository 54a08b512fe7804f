"""Checkpoints and atomic file writes."""

import io
import os
import secrets
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .cnn import CNN, NUM_CLASSES
from .data import Normalization
from .engine import Settings
from .errors import UserError, one_line

FORMAT = "mnistnorm checkpoint 1"

# Advice in errors about an unusable checkpoint.
CHECKPOINT_HINT = "name another last.pt or best.pt, or train again"

# Suffix of the temporary files that are being written.
TEMP_SUFFIX = ".mnistnorm.tmp"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: at any time it has either its old or its new content.

    Raises:
        UserError: the file cannot be written; any existing file is unchanged.
    """
    # A unique name, so that concurrent writers do not collide; tempfile's files would be private to their owner.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMP_SUFFIX}")
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        reason = f"{error.strerror}; any existing file is unchanged: free some space or write to another folder"
        raise UserError(f"cannot write {path}: {reason}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A network with all that is needed to use it and, if `training` is not None, to resume its training.

    Attributes:
        settings: settings of the run.
        model: state_dict of the network.
        classes: names of the ten classes.
        normalization: normalization of the network's input.
        metrics: metrics of the last completed epoch.
        training: state_dict of the Trainer.
    """

    settings: Settings
    model: dict[str, torch.Tensor]
    classes: tuple[str, ...]
    normalization: Normalization
    metrics: dict[str, float]
    training: dict[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Writes the checkpoint atomically, as plain values and tensors only."""
        content = vars(self) | {
            "format": FORMAT,
            "settings": asdict(self.settings),
            "normalization": asdict(self.normalization),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, hint: str = CHECKPOINT_HINT) -> "Checkpoint":
        """Loads a checkpoint to the CPU, without executing code from it. `hint` ends the messages of errors.

        Raises:
            UserError: `path` cannot be read or is not a checkpoint of this network.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the checkpoint {path}: {error.strerror}; {hint}") from error
        try:
            # torch.load does not verify the checksums.
            if damaged := zipfile.ZipFile(io.BytesIO(data)).testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises all kinds of errors for damaged files
            raise UserError(f"{path} is not a checkpoint, or is truncated or damaged; {hint}") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise UserError(f"{path} is not a checkpoint of mnistnorm, whose format is {FORMAT!r}; {hint}")
        try:
            content["settings"] = Settings(**content["settings"])
            content["normalization"] = Normalization(**content["normalization"])
            checkpoint = cls(**content)
            checkpoint.network()
            if [type(name) for name in checkpoint.classes] != [str] * NUM_CLASSES:
                raise ValueError(f"its classes are {checkpoint.classes}")
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{one_line(error)}; {hint}"
            raise UserError(f"{path} is a checkpoint of another network or version: {reason}") from error
        return checkpoint

    def network(self) -> CNN:
        """Builds the network with its weights on the CPU; it can be moved to any device, since `impl` is "auto"."""
        model = CNN(self.settings.norm, fused=self.settings.fused, dropout=self.settings.dropout)
        model.load_state_dict(self.model)
        return model
