"""Old words are read as the words of now, and said."""

from __future__ import annotations

import pytest

from drafttrain.core.config import Config, parse
from drafttrain.core.errors import UserError
from drafttrain.core.renamed import KEYS, Renamed, current_row
from drafttrain.drafters.eagle3 import Eagle3Config
from drafttrain.drafters.hybrid import HybridConfig
from drafttrain.runtime.decoder import RuntimeConfig


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (
            Eagle3Config,
            {"name": "eagle3", "unroll": 3, "unroll_ramp": [0.0, 0.5]},
            {"name": "eagle3", "ttt_steps": 3, "ttt_ramp": [0.0, 0.5]},
        ),
        (HybridConfig, {"head_cost": 0.3, "head_gain": 1.5}, {"draft_cost": 0.3, "draft_gain": 1.5}),
        (RuntimeConfig, {"draws": "point", "treat_as": "point"}, {"draws": "deterministic", "treat_as": "deterministic"}),
    ],
    ids=["keys of a drafter", "keys of a section", "values"],
)
def test_an_old_word_is_read_as_the_word_of_now_and_said(config: type[Config], old: dict[str, object], new: dict[str, object]) -> None:
    with pytest.warns(Renamed, match="is called"):
        read = parse(config, old, "here")
    assert read == parse(config, new, "here")


def test_an_old_word_beside_its_new_one_is_refused() -> None:
    with pytest.raises(UserError, match="unroll"):
        parse(Eagle3Config, {"name": "eagle3", "unroll": 3, "ttt_steps": 4}, "here")


def test_old_result_rows_are_read_at_every_depth() -> None:
    row = {"draws": "point", "options": {"hybrid": {"head_cost": 1}}, "prefetch": {"bets": 3, "hits": 1}, "label": "point"}
    assert current_row(row) == {
        "draws": "deterministic", "options": {"hybrid": {"draft_cost": 1}}, "prefetch": {"prefetched": 3, "prefetch_hits": 1},
        "label": "point",
    }  # fmt: skip


def test_no_new_name_is_an_old_one_too() -> None:
    assert not set(KEYS) & set(KEYS.values())
