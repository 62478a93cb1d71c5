"""What all tests share."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Who is started in a shell's background ignores Ctrl-C, and so would the processes that tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
