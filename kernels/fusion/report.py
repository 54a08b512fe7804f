"""What fuse did with each norm of a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

PATHS_SHOWN = 3
Status = Literal["chain", "no activation", "already fused", "unknown"]


@dataclass(frozen=True)
class FusedChain:
    """A chain that was fused: the path and class of its norm, and its other parts.

    `rewritten` is the path of the module whose forward was rewritten for it: "" for the model, None if there is none.
    """

    norm: str
    kind: str
    dropout_p: float
    residual: bool
    activation: str
    rewritten: str | None


@dataclass(frozen=True)
class LeftAlone:
    """A norm that was left alone: its path, class and the reason; `status` says whether an activation follows it."""

    norm: str
    kind: str
    reason: str
    status: Status


@dataclass(frozen=True)
class FusionReport:
    """What fuse did: each norm of the model is in one of the two tuples, in the order of the model."""

    fused: tuple[FusedChain, ...]
    left: tuple[LeftAlone, ...]

    @property
    def chains(self) -> int:
        """The number of norms that are followed by an activation and were not fused before."""
        return len(self.fused) + sum(norm.status == "chain" for norm in self.left)

    def __str__(self) -> str:
        summed = sum(chain.residual for chain in self.fused)
        first = [f"fused {len(self.fused)} of {self.chains} norm-activation chains, {summed} with a sum"]
        texts = {
            "no activation": "without a known activation",
            "already fused": "already fused",
            "unknown": "not traced",
        }
        for status, text in texts.items():
            count = sum(norm.status == status for norm in self.left)
            first += [f"{count} norm{'s' * (count != 1)} {text}"] if count else []
        groups: dict[str, list[str]] = {}
        for chain in self.fused:
            parts = [chain.kind, *([f"dropout {chain.dropout_p}"] * (chain.dropout_p > 0)), *(["sum"] * chain.residual)]
            where = "" if chain.rewritten is None else ", in a rewritten forward"
            groups.setdefault(f"{' + '.join([*parts, chain.activation])}{where}", []).append(chain.norm)
        for norm in self.left:
            groups.setdefault(f"{norm.kind} left alone: {norm.reason}", []).append(norm.norm)
        lines = ["; ".join(first)]
        for text, paths in groups.items():
            more = f" and {len(paths) - PATHS_SHOWN} more" if len(paths) > PATHS_SHOWN else ""
            lines.append(f"  {', '.join(path or 'the model' for path in paths[:PATHS_SHOWN])}{more}: {text}")
        return "\n".join(lines)


def class_name(module: nn.Module) -> str:
    """The class name with its module, torch.nn where possible: torch.nn.BatchNorm2d, timm.layers.norm.LayerNorm."""
    kind = type(module)
    is_of_torch = getattr(nn, kind.__name__, None) is kind
    return f"torch.nn.{kind.__name__}" if is_of_torch else f"{kind.__module__}.{kind.__qualname__}"


if TYPE_CHECKING:

    class FusedModel(nn.Module, Any):
        """For type checkers: a model of the class that was fused, with the report."""

        fusion_report: FusionReport
