"""What fuse did with each norm of a model."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

PATHS_SHOWN = 3
Status = Literal["chain", "no activation", "already fused", "unknown"]


@dataclass(frozen=True)
class FusedChain:
    """A chain that became one operation.

    Attributes:
        norm: the path of the norm.
        kind: the class of the norm, with its module.
        dropout_p: of the dropout in it, 0 without one.
        residual: whether a sum is part of it.
        activation: its name, with its parameter where it has one.
        rewritten: the module whose forward was rewritten for it, "" for the model itself; None where none was.
    """

    norm: str
    kind: str
    dropout_p: float
    residual: bool
    activation: str
    rewritten: str | None


@dataclass(frozen=True)
class LeftAlone:
    """A norm that stays as it is.

    Attributes:
        norm: the path of the norm.
        kind: the class of the norm, with its module.
        reason: why it was not fused.
        status: "chain" with an activation behind it, "no activation" without, "already fused", or "unknown" where the
            call of the norm was not traced.
    """

    norm: str
    kind: str
    reason: str
    status: Status


@dataclass(frozen=True)
class FusionReport:
    """What fuse did: every norm of the model is in one of the two tuples, in the order of the model."""

    fused: tuple[FusedChain, ...]
    left: tuple[LeftAlone, ...]

    @property
    def chains(self) -> int:
        """The number of norms with an activation behind them that were not fused before."""
        return len(self.fused) + sum(norm.status == "chain" for norm in self.left)

    def __str__(self) -> str:
        summed = sum(chain.residual for chain in self.fused)
        first = [f"fused {len(self.fused)} of {self.chains} norm-activation chains, {summed} with a sum"]
        for status, text in (
            ("no activation", "without an activation"),
            ("already fused", "already fused"),
            ("unknown", "not traced"),
        ):
            count = sum(norm.status == status for norm in self.left)
            first += [f"{count} norm{'s' * (count != 1)} {text}"] if count else []
        groups: dict[str, list[str]] = {}
        for chain in self.fused:
            parts = [chain.kind, *([f"dropout {chain.dropout_p}"] * (chain.dropout_p > 0)), *(["sum"] * chain.residual)]
            where = "" if chain.rewritten is None else f", in the forward of {chain.rewritten or 'the model'}"
            groups.setdefault(f"{' + '.join([*parts, chain.activation])}{where}", []).append(chain.norm)
        for norm in self.left:
            groups.setdefault(f"{norm.kind} left alone: {norm.reason}", []).append(norm.norm)
        return "\n".join(["; ".join(first), *(f"  {_shorten(paths)}: {text}" for text, paths in groups.items())])


def _shorten(paths: Iterable[str]) -> str:
    names = [path or "the model" for path in paths]
    more = f" and {len(names) - PATHS_SHOWN} more" if len(names) > PATHS_SHOWN else ""
    return ", ".join(names[:PATHS_SHOWN]) + more


def class_name(module: nn.Module) -> str:
    """The class with its module, as short as torch.nn is imported: torch.nn.BatchNorm2d, timm.layers.norm.LayerNorm."""
    kind = type(module)
    if getattr(nn, kind.__name__, None) is kind:
        return f"torch.nn.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


if TYPE_CHECKING:

    class FusedModel(nn.Module, Any):
        """To type checkers: of the class of the model that was fused, with the report."""

        fusion_report: FusionReport

else:
    FusedModel = nn.Module
