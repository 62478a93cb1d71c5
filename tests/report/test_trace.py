"""The trace of a decoding: what the recorder keeps is what was decoded, and a real browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.core.tree import Tree
from drafttrain.report.trace import KEY, Node, TokenTexts, TracedRound, TraceRecorder, check_writable, drawn_with, write_trace
from drafttrain.report.trace import _rows as rows_of_tree
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder, Stream
from drafttrain.runtime.stats import START, Clock
from tests.evaluation.toys import contender

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
PROMPT = [5, 10, 12, 30, 3]
SHAPES = {
    "chain": Chain(length=3), "static": Static(children=(3, 2)), "dynamic": Dynamic(depth=3, beam=3, top_k=3, nodes=8),
}  # fmt: skip


class Traced(NamedTuple):
    """A decoding with a recorder."""

    decoder: SpeculativeDecoder
    answer: Stream
    recorder: TraceRecorder
    rounds: list[TracedRound]
    text: str


def traced(shape: str = "dynamic", **options: Any) -> Traced:
    inner = contender().decoder
    decoder = SpeculativeDecoder(inner.target, inner.drafter, RuntimeConfig(shape=SHAPES[shape]))
    recorder = TraceRecorder(decoder.target)
    answer = decoder.stream(PROMPT, on_round=recorder, **options)
    text = "".join(piece.text for piece in answer)
    return Traced(decoder, answer, recorder, recorder.finish(answer.round_seconds), text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_rounds_give_the_decoded_text_and_the_statistics(shape: str, temperature: float) -> None:
    decoder, answer, _, rounds, text = traced(shape, max_new_tokens=20, temperature=temperature, seed=3)
    tokens = [rounds[0].nodes[0].token, *(token for one in rounds for token in one.given[: one.kept])]
    assert "".join(TokenTexts(decoder.target).pieces(tokens)) == text
    assert len(tokens) == 20
    assert (len(rounds), sum(one.kept for one in rounds)) == (answer.statistics.rounds, answer.statistics.tokens)
    assert any(node.state == "accepted" for one in rounds for node in one.nodes)
    assert {node.state for one in rounds for node in one.nodes} <= set(KEY)


def test_the_next_root_is_the_token_that_the_round_before_ended_with() -> None:
    *_, rounds, _ = traced(max_new_tokens=20)
    for before, after in pairwise(rounds):
        assert before.given[-1] == after.nodes[0].token


def test_p_is_the_targets_own_probability_and_the_greedy_token_is_its_likeliest() -> None:
    decoder, _, _, rounds, _ = traced(max_new_tokens=12)
    text = list(PROMPT)
    for one in rounds:
        root, paths = one.nodes[0], [[0]]
        text.append(root.token) if text == PROMPT else None
        for node in one.nodes[1:]:
            paths.append([*paths[node.parent], len(paths)])
            above = [one.nodes[place].token for place in paths[-1][1:-1]]
            probs = decoder.target.model(torch.tensor([text + above])).logits[0, -1].softmax(-1)
            assert node.p == pytest.approx(float(probs[node.token]), abs=1e-4)
            if node.state == "next":
                assert node.token == int(probs.argmax())
                assert one.nodes[node.parent].likeliest == pytest.approx((node.token, node.p), abs=1e-6)
        text += one.given


def test_q_is_the_distribution_a_token_was_drawn_from_and_absent_where_none_was_recorded() -> None:
    probs = torch.tensor([[[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]])
    tokens, parents = torch.tensor([[0, 2, 1, 0]]), torch.tensor([[0, 0, 0, 1]])
    tree = Tree(tokens, parents, tokens >= 0, "iid", 2, 2, draft_probs=probs, probs_row=torch.tensor([[0, 0, 0, 1]]))
    assert drawn_with(tree) == pytest.approx([0.1, 0.7, 0.2, 0.5])
    assert drawn_with(Tree(tokens, parents, tokens >= 0, "deterministic", 2, 2)) is None
    *_, sampled, _ = traced("static", max_new_tokens=8, temperature=1.0)
    *_, greedy, _ = traced("static", max_new_tokens=8)
    assert all(node.q is not None for one in sampled for node in one.nodes if node.state in ("accepted", "rejected", "unreached"))
    assert all(node.q is None for one in greedy for node in one.nodes)


def test_every_round_has_its_times_and_the_recorders_own_count_nowhere() -> None:
    _, answer, _, rounds, _ = traced(max_new_tokens=20)
    for one in rounds:
        assert {"draft", "score", "verify", "commit", "other"} == set(one.seconds)
    spent = sum(second for one in rounds for second in one.seconds.values())
    assert spent == pytest.approx(answer.statistics.decode_seconds)


def test_the_clock_stands_still_while_somebody_looks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(torch.device("cpu"))
    clock.laps = [
        (START, 0.0), (START, 1.0), ("prefill", 3.0), (START, 10.0), ("score", 11.0), ("verify", 11.5), ("pause", 99.0), ("verify", 100.0),
    ]  # fmt: skip
    assert clock.runs() == [{"prefill": 2.0}, {"score": 1.0, "verify": 1.5}]
    assert clock.take() == {"prefill": 2.0, "draft": 0.0, "score": 1.0, "verify": 1.5, "commit": 0.0, "other": 0.0}
    assert clock.runs() == []


def test_leaves_stand_below_each_other_in_drawn_order_and_parents_amid_their_children() -> None:
    parents = [0, 0, 0, 1, 1, 2]
    nodes = [Node(0, parent, depth, "unreached") for parent, depth in zip(parents, [0, 1, 1, 2, 2, 2], strict=True)]
    assert rows_of_tree(nodes) == [1.25, 0.5, 2.0, 0.0, 1.0, 2.0]


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "gone" / "trace.html", "is no folder")):
        with pytest.raises(UserError, match=reason):
            check_writable(path)
    check_writable(tmp_path / "trace.html")


def in_browser(path: Path) -> str:
    """The page's elements after its script has run."""
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_browser_shows_every_node_of_every_round_and_its_script_runs(tmp_path: Path) -> None:
    decoder, answer, recorder, rounds, text = traced("static", max_new_tokens=16, temperature=1.0)
    write_trace(tmp_path / "trace.html", decoder, answer, recorder, "What <b>is</b> it?", {"temperature": 1.0})
    dom = in_browser(tmp_path / "trace.html")
    for state in KEY:
        assert dom.count(f'data-state="{state}"') == sum(node.state == state for one in rounds for node in one.nodes)
    assert f"Round 1 of {len(rounds)}" in dom  # the script wrote it
    assert len(re.findall(r'class="card round here"', dom)) == 1
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in dom
    shown = "".join(re.findall(r'<span class="token [^>]*>([^<]*)</span>', dom))
    assert shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") == text


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    decoder, answer, recorder, *_ = traced(max_new_tokens=8)
    write_trace(tmp_path / "trace.html", decoder, answer, recorder, PROMPT, {})
    assert not re.search(r"""(src|href)=|@import|url\(|https?:""", (tmp_path / "trace.html").read_text())


def test_an_answer_without_rounds_has_a_page_that_says_so(tmp_path: Path) -> None:
    decoder, answer, recorder, rounds, _ = traced(max_new_tokens=1)
    assert rounds == []
    write_trace(tmp_path / "trace.html", decoder, answer, recorder, PROMPT, {})
    assert "No round was needed" in (tmp_path / "trace.html").read_text()
