"""The GPUs that bounds are given for: memory bandwidth by the vendor's datasheet."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """A GPU by its datasheet.

    Attributes:
        name: as it is sold.
        target: key of machine_code.TARGETS.
        multiprocessors: or compute units.
        bandwidth: of its memory, bytes per second.
        source: where the bandwidth is from.
    """

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    source: str

    def bound(self, moved: int) -> float:
        """Seconds that it takes at least to move so many bytes."""
        return moved / self.bandwidth


GPUS = (
    GPU("T4", "sm_75", 40, 320e9, "NVIDIA T4 product brief, memory specifications (up to 320 GB/s)"),
    GPU("A100", "sm_80", 108, 2039e9, "NVIDIA A100 datasheet, 80 GB SXM (2,039 GB/s; 80 GB PCIe 1,935, 40 GB 1,555)"),
    GPU("L4", "sm_89", 58, 300e9, "NVIDIA L4 datasheet (300 GB/s)"),
    GPU("H100", "sm_90", 132, 3.35e12, "NVIDIA H100 datasheet, SXM (3.35 TB/s; PCIe 2 TB/s)"),
    GPU("H200", "sm_90", 132, 4.8e12, "NVIDIA H200 datasheet (4.8 TB/s)"),
    GPU("B200", "sm_100", 148, 8e12, "NVIDIA DGX B200 datasheet, one of eight (64 TB/s)"),
    GPU("MI300X", "gfx942", 304, 5.3e12, "AMD Instinct MI300X data sheet (5.3 TB/s peak)"),
)
