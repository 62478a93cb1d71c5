"""Peak memory of a stretch of work: bytes allocated on a GPU, else the process's resident set."""

from __future__ import annotations

import sys

import torch


class PeakMemory:
    """On CUDA the count starts here; the resident set's peak is the process's since its start, weights and all."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import resource  # POSIX only

        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
