"""A count of each thread."""

from __future__ import annotations

import copy
import threading

from drafttrain.core.counts import ThreadCount


class Counted:
    calls = ThreadCount()


def test_threads_count_apart_and_copies_on_their_own() -> None:
    counted, seen = Counted(), []

    def work() -> None:
        before = counted.calls
        for _ in range(100):
            counted.calls += 1
        seen.append(counted.calls - before)

    counted.calls += 7
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    copied = copy.deepcopy(counted)
    copied.calls += 1
    assert seen == [100] * 3
    assert (counted.calls, copied.calls) == (7, 8)
