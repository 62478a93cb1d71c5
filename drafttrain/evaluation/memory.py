"""Peak memory of a stretch of work: bytes allocated on a GPU, else the process's resident set."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


class PeakMemory:
    """The count starts here, weights and all; where the system cannot forget the resident set's peak, it is the process's so far."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.counts_anew = device.type != "cuda" and _forget_peak()

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if self.counts_anew:
            peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            return int(peak.split()[1]) * 1024  # given in KiB
        import resource  # POSIX only

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak() -> bool:
    """Sets the resident set's peak back to what it is now, where Linux lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
