"""GPUs that bounds are computed for: memory bandwidth and L2 size from the datasheets."""

from dataclasses import dataclass

from mnistnorm.kernels.triton_impl.launches import LAUNCH_GAP
from mnistnorm.kernels.triton_impl.plans import Memory


@dataclass(frozen=True)
class GPU:
    """A GPU, from its datasheet.

    Attributes:
        name: product name.
        target: key of machine_code.TARGETS.
        multiprocessors: number of multiprocessors or compute units.
        bandwidth: memory bandwidth, bytes per second.
        l2: L2 size in bytes, as PyTorch reports it.
        source: of bandwidth and L2.
    """

    name: str
    target: str
    multiprocessors: int
    bandwidth: float
    l2: int
    source: str

    def bound(self, moved: int) -> float:
        """Lower bound in seconds for moving this many bytes."""
        return moved / self.bandwidth

    @property
    def memory(self) -> Memory:
        """The memory sizes that plans depend on."""
        return Memory(self.l2, round(self.bandwidth * LAUNCH_GAP))


_MB = 2**20
_ADA = "NVIDIA Ada GPU architecture whitepaper"
GPUS = (
    GPU(
        *("T4", "sm_75", 40, 320e9, 4 * _MB),
        "NVIDIA T4 product brief, memory specifications (up to 320 GB/s); Turing architecture whitepaper (4 MB)",
    ),
    GPU(
        *("A100", "sm_80", 108, 2039e9, 40 * _MB),
        "NVIDIA A100 datasheet, 80 GB SXM (2,039 GB/s; 80 GB PCIe 1,935, 40 GB 1,555); Ampere architecture whitepaper "
        "(40 MB)",
    ),
    GPU("L4", "sm_89", 58, 300e9, 48 * _MB, f"NVIDIA L4 datasheet (300 GB/s); {_ADA}, AD104 (48 MB)"),
    GPU("L40S", "sm_89", 142, 864e9, 96 * _MB, f"NVIDIA L40S datasheet (864 GB/s); {_ADA}, AD102 (up to 96 MB)"),
    GPU("RTX 4090", "sm_89", 128, 1008e9, 72 * _MB, f"{_ADA}, appendix on the RTX 4090 (1,008 GB/s; 72 MB)"),
    GPU(
        *("H100", "sm_90", 132, 3.35e12, 50 * _MB),
        "NVIDIA H100 datasheet, SXM (3.35 TB/s; PCIe 2 TB/s); Hopper architecture whitepaper (50 MB)",
    ),
    GPU(
        *("H200", "sm_90", 132, 4.8e12, 50 * _MB),
        "NVIDIA H200 datasheet (4.8 TB/s); Hopper architecture whitepaper (50 MB)",
    ),
    GPU(
        *("B200", "sm_100", 148, 8e12, 126 * _MB),
        "NVIDIA DGX B200 datasheet, one of eight (64 TB/s); Blackwell tuning guide (126 MB)",
    ),
    GPU(
        *("MI300X", "gfx942", 304, 5.3e12, 4 * _MB),
        "AMD Instinct MI300X data sheet (5.3 TB/s peak); CDNA 3 white paper (4 MB for each of eight dies; the 256 MB "
        "Infinity Cache behind them is left out)",
    ),
)
