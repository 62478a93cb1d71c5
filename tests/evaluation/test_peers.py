"""Transformers' own decoding beside ours: the same texts, counted in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from drafttrain.core.errors import UserError
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.files import save_drafter
from drafttrain.evaluation.bench import EvaluationConfig, evaluate, peers
from drafttrain.evaluation.peers import PeerConfig, make_peer
from drafttrain.runtime.decoder import SpeculativeDecoder
from tests.evaluation.toys import SUITE, contender, target
from tests.families import trained_drafter

PROMPT = [5, 9, 11, 30, 5, 9, 11]


def small_lm(folder: Path) -> str:
    save_drafter(trained_drafter("small_lm", target(), [PROMPT]), folder / "drafter")
    return str(folder)


def test_every_mode_writes_plain_decodings_text_and_adds_up(tmp_path: Path) -> None:
    plain = SpeculativeDecoder(target()).generate([PROMPT], 20)[0].tokens
    kinds = (
        PeerConfig(kind="generate"), PeerConfig(kind="prompt_lookup", tokens=4),
        PeerConfig(kind="assisted", drafter=small_lm(tmp_path), tokens=3, confidence=0.0),
    )  # fmt: skip
    for config in kinds:
        out = make_peer(target(), config).run(PROMPT, 20, Sampling(), 0)
        assert out.tokens == plain, config.name
        assert sum(out.statistics.seconds.values()) == pytest.approx(out.wall)
        assert out.statistics.target_forwards == out.statistics.rounds + 1
    assert make_peer(target(), kinds[0]).run(PROMPT, 20, Sampling(), 0).statistics.tau == 1.0


def test_tokens_of_the_first_forward_are_not_counted_in_rounds(tmp_path: Path) -> None:
    """Assisted decoding drafts before its first forward already."""
    config = PeerConfig(kind="assisted", drafter=small_lm(tmp_path), tokens=3, confidence=0.0)
    out = make_peer(target(), config).run(PROMPT, 20, Sampling(), 0)
    assert 20 - 4 <= out.statistics.tokens <= 20 - 1
    assert out.statistics.tau > 1


def test_peers_get_rows_of_their_own(tmp_path: Path) -> None:
    config = EvaluationConfig(max_new_tokens=12, warmup=0, efficiency=False, peers=(PeerConfig(kind="generate"),))
    rows = evaluate(target(), [contender(), *peers(target(), config)], SUITE, config, tmp_path / "results.jsonl")
    (row,) = [row for row in rows if row.measured.label == "generate" and row.measured.task == "all" and row.measured.outputs == "all"]
    assert row.measured.options == {"library": "transformers", "kind": "generate", "tokens": 8, "ngram": 3}
    assert row.measured.exactness is not None
    assert row.measured.exactness.different == 0


def test_what_a_checkpoint_would_have_generate_do_does_not_change_a_peer() -> None:
    peer, own = make_peer(target(), PeerConfig(kind="generate")), target().model.generation_config
    plain = peer.run(PROMPT, 24, Sampling(), 0).tokens
    before = own.repetition_penalty, own.no_repeat_ngram_size
    try:
        own.repetition_penalty, own.no_repeat_ngram_size = 1.5, 2
        assert peer.run(PROMPT, 24, Sampling(), 0).tokens == plain
    finally:
        own.repetition_penalty, own.no_repeat_ngram_size = before


def test_sampled_texts_of_equal_seeds_are_equal() -> None:
    peer = make_peer(target(), PeerConfig(kind="generate"))
    one, same, other = (peer.run(PROMPT, 16, Sampling(1.0), seed).tokens for seed in (1, 1, 2))
    assert one == same != other


def test_an_assistant_is_a_small_lm_and_only_assisted_takes_one(tmp_path: Path) -> None:
    save_drafter(trained_drafter("medusa", target(), [PROMPT], steps=1), tmp_path / "drafter")
    with pytest.raises(UserError, match="is a medusa; transformers takes a small_lm only"):
        make_peer(target(), PeerConfig(kind="assisted", drafter=str(tmp_path)))
    with pytest.raises(ValidationError, match="only that kind takes one"):
        PeerConfig(kind="generate", drafter="somewhere")


@pytest.mark.parametrize("options", [{"kind": "generate", "label": "hf"}, {"kind": "prompt_lookup", "label": "generate"}])
def test_the_label_of_the_second_baseline_is_generates_own(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is a baseline and known by that label"):
        PeerConfig.model_validate(options)
