"""Where and with what a measurement was made."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from drafttrain.core.disk import processor

PACKAGES = ("torch", "transformers", "drafttrain")


def device_name(device: torch.device) -> str:
    """`cuda (NVIDIA H100 80GB HBM3)`, `cpu (AMD EPYC 7763)`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{device.type} ({name})"


def versions() -> dict[str, str]:
    """Of the packages that move the numbers."""
    return {package: _version(package) for package in PACKAGES}


def commit() -> str | None:
    """The git commit of this package's source, `+` where files differ from it; None where it is not run from a
    checkout."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None  # installed, perhaps inside somebody else's repository
    changed = _git(here.parents[1], "status", "--porcelain", "--untracked-files=no", ".")
    return f"{_git(here.parent, 'rev-parse', '--short=12', 'HEAD')}{'+' if changed else ''}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "source"


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
