"""N-gram lookup: what followed when the newest tokens occurred in the prompt or the output before (prompt lookup decoding, Saxena,
2023), and in past outputs where a datastore is named (REST, He et al., 2023, arXiv:2311.08252).

Nothing to train and nothing to run on the device. Longest match first, then shorter ones: see `lookup.py`.
"""

from __future__ import annotations

from typing import Literal

from drafttrain.drafters.lookup import Lookup, LookupConfig


class NgramConfig(LookupConfig):
    """Looks up in the row's own text."""

    name: Literal["ngram"] = "ngram"


class Ngram(Lookup):
    """Drafts what followed the newest tokens where they occurred before in the prompt or the output."""

    Config = NgramConfig
    config: NgramConfig
