"""The command line: one function a command in `commands.py`; `main` is the entry point."""

from drafttrain.cli.commands import main

__all__ = ["main"]
