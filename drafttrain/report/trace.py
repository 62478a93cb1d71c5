"""The rounds of one decoding as one HTML page: each round's tree, what stood and what fell, probabilities, and where the time went.

`Recorder` is a round hook; `write_trace` draws what it saw. p is the target's probability of a node's token below its parent, q the
drafter's where the tree recorded the distribution that the token was drawn from. Greedy decoding shows p before it is sharpened to 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from drafttrain.core.disk import check_file_name, write_text
from drafttrain.core.errors import UserError
from drafttrain.core.tree import Tree
from drafttrain.report.page import document
from drafttrain.report.plots import PHASE_COLOURS
from drafttrain.runtime.decoder import Prompt, SpeculativeDecoder, Stream
from drafttrain.runtime.generate import RoundRecord
from drafttrain.runtime.stats import Statistics, alpha_text
from drafttrain.target.adapter import Target

State = Literal["root", "accepted", "rejected", "unreached", "next"]
"""Of a node: committed before; stands; tried and fell; never tried, because its parent fell; the target's own token behind those that
stand."""

KEY: dict[State, str] = {
    "root": "last committed token", "accepted": "drafted, stands", "rejected": "drafted, falls",
    "unreached": "drafted, parent fell", "next": "the target's own",
}  # fmt: skip
VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"})
LONGEST = 16  # letters of a token shown in a node
LETTER, SMALL, HEIGHT, ROW, GAP, EDGE = 7.6, 6.1, 36, 44, 46, 6  # pixels; letters of a word and of a distribution


@dataclass
class Node:
    """One token of a round's tree."""

    token: int
    parent: int  # place in the round's nodes; the root's is itself
    depth: int
    state: State
    p: float | None = None
    q: float | None = None
    likeliest: tuple[int, float] | None = None  # what the target puts first after this node, and its probability


@dataclass
class TracedRound:
    """One round; the root stands first, a parent before its children."""

    nodes: list[Node]
    seconds: dict[str, float] = field(default_factory=dict)
    kept: int = 0
    """Tokens that it gave; an end or the limit may have cut what stood."""

    @property
    def given(self) -> list[int]:
        """The tokens that stand, in order, before any cut."""
        return [node.token for node in self.nodes if node.state == "accepted"] + [node.token for node in self.nodes if node.state == "next"]


class TraceRecorder:
    """Keeps each round of one row. It waits for the device, which a round alone does once; the clock stands still meanwhile."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.rounds: list[TracedRound] = []

    def __call__(self, record: RoundRecord) -> None:
        tree, scored, verdict = record.tree, record.scored, record.verdict
        assert len(tree.tokens) == 1, f"{len(tree.tokens)} rows; a trace shows one"
        tokens, parents, depth = tree.tokens[0].tolist(), tree.parents[0].tolist(), tree.depth[0].tolist()
        live = [place for place, real in enumerate(tree.live[0].tolist()) if real]
        probs = scored.logits[0].float().softmax(-1) if scored.sampling.greedy else scored.target_probs[0]  # [N, V]
        p = probs[tree.parents[0], tree.tokens[0]].tolist()
        q = drawn_with(tree)
        best, first = probs.max(-1)
        likeliest = list(zip(first.tolist(), best.tolist(), strict=True))
        length = int(verdict.length[0])
        path = [0, *verdict.path[0, :length].tolist()]
        order = {place: number for number, place in enumerate(live)}
        nodes = [
            Node(
                tokens[place], order[parents[place]], depth[place], state(place, parents[place], path), p[place] if place else None,
                q[place] if place and q else None, likeliest[place],
            ) for place in live
        ]  # fmt: skip
        if verdict.next is not None:
            token = int(verdict.next[0])
            nodes.append(Node(token, order[path[-1]], length + 1, "next", float(probs[path[-1], token])))
        self.rounds.append(TracedRound(nodes, kept=int(record.kept[0])))

    def finish(self, seconds: Sequence[dict[str, float]]) -> list[TracedRound]:
        """The rounds with their times."""
        for seen, spent in zip(self.rounds, seconds, strict=True):
            seen.seconds = spent
        return self.rounds


def state(place: int, parent: int, path: Sequence[int]) -> State:
    """Of the node at `place` of a tree in which `path` (the root first) stands."""
    if place == 0:
        return "root"
    if place in path:
        return "accepted"
    return "rejected" if parent in path else "unreached"


def drawn_with(tree: Tree) -> list[float] | None:
    """[N] probability of each node's token under the distribution it was drawn from; None where none was recorded."""
    if tree.draft_probs is None or tree.probs_row is None:
        return None
    distributions: Tensor = tree.draft_probs[0]
    return distributions[tree.probs_row[0].clamp_min(0), tree.tokens[0]].tolist()


def check_writable(path: Path) -> None:
    """A `UserError`, before anything is decoded, where no page can be written to `path`."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "is a folder" if path.is_dir() else f"lies in '{path.parent}', which is no folder"
        raise UserError(f"trace '{path}' {reason}; name a file such as trace.html in a folder that exists")
    check_file_name(path)


def write_trace(
    path: Path, decoder: SpeculativeDecoder, answer: Stream, recorder: TraceRecorder, prompt: Prompt, options: dict[str, Any]
) -> None:
    """One self-contained page of an answer that `decoder` has streamed to its end, with `recorder` as its hook."""
    rounds = recorder.finish(answer.round_seconds)
    html = render(rounds, TokenTexts(recorder.target), header(decoder, answer.statistics, prompt, options))
    write_text(path, html)


class TokenTexts:
    """What tokens say."""

    def __init__(self, target: Target) -> None:
        self.tokenizer = target.tokenizer

    def one(self, token: int) -> str:
        """A token alone, blanks made visible."""
        text = f"[{token}]" if self.tokenizer is None else str(self.tokenizer.decode([token]))
        return text.translate(VISIBLE) or "∅"

    def short(self, token: int) -> str:
        """As much of it as a node has room for."""
        text = self.one(token)
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to the text; letters that several tokens spell stand with the last of them."""
        if self.tokenizer is None:
            return [f"{token} " for token in tokens]
        out, shown = [], ""
        for count in range(1, len(tokens) + 1):
            text = str(self.tokenizer.decode(list(tokens[:count])))
            whole = text.startswith(shown) and (not text.endswith("\ufffd") or count == len(tokens))
            out.append(text[len(shown) :] if whole else "")
            shown = text if whole else shown
        return out


def header(decoder: SpeculativeDecoder, took: Statistics, prompt: Prompt, options: dict[str, Any]) -> dict[str, str]:
    """What was decoded how, and what it took."""
    drafter = decoder.drafter
    asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"] if prompt and isinstance(prompt[-1], dict) else prompt)
    temperature = options.get("temperature", 0.0)
    shape = decoder.runtime.shape
    seconds = took.decode_seconds
    return {
        "prompt": asked,
        "target": f"{decoder.target.name} ({str(decoder.target.dtype).removeprefix('torch.')}, {decoder.target.device.type})",
        "drafter": "none (plain decoding)" if drafter is None else f"{drafter.config.name}, {shape.shape} of {shape.nodes} nodes",
        "sampling": "greedy" if temperature == 0 else f"temperature {temperature:g}, seed {options.get('seed', 0)}",
        "tokens": f"{took.tokens} in {took.rounds} rounds",
        "tau": f"{took.tau:.2f}",
        "speed": f"{took.tokens / seconds:.1f} tokens/s" if seconds else "–",
        "alpha": alpha_text(value for value in took.alpha if value is not None) or "–" if drafter else "–",
    }


def render(rounds: Sequence[TracedRound], texts: TokenTexts, facts: dict[str, str]) -> str:
    """The page."""
    listed = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items() if name != "prompt")
    key = "".join(f'<span class="key {name}"><i></i>{text}</span>' for name, text in KEY.items())
    phases = "".join(f'<span class="key"><i style="background:{colour}"></i>{phase}</span>' for phase, colour in PHASE_COLOURS.items())
    cards = "".join(card(number, one, texts) for number, one in enumerate(rounds, 1))
    empty = "" if rounds else '<p class="note">No round was needed: the first token, which the prompt\'s own pass gives, was the last.</p>'
    return document(
        "drafttrain trace",
        f"<h1>Trace of one answer</h1><blockquote>{escape(facts['prompt'])}</blockquote><dl>{listed}</dl>"
        f'<section class="card answer">{answer(rounds, texts)}</section>'
        f'<nav><button data-step="-1" aria-label="previous round">‹</button><output></output>'
        f'<button data-step="1" aria-label="next round">›</button>'
        f'<label><input type="checkbox" id="alone"> one at a time</label>{overview(rounds)}</nav>'
        f'<p class="keys">{key}<span class="gap"></span>{phases}</p>{empty}<div id="rounds">{cards}</div>',
        STYLE, SCRIPT,
    )  # fmt: skip


def answer(rounds: Sequence[TracedRound], texts: TokenTexts) -> str:
    """The text, token by token, by who wrote it; the first token is the prefill's."""
    written: list[tuple[int, str, int]] = []  # token, who, round
    for number, one in enumerate(rounds, 1):
        if number == 1:
            written.append((one.nodes[0].token, "root", 1))
        drafted = sum(node.state == "accepted" for node in one.nodes)
        written += [(token, "accepted" if at < drafted else "next", number) for at, token in enumerate(one.given[: one.kept])]
    pieces = texts.pieces([token for token, *_ in written])
    return "".join(
        f'<span class="token {who}" data-round="{number}">{escape(piece)}</span>'
        for (_, who, number), piece in zip(written, pieces, strict=True)
    )


def overview(rounds: Sequence[TracedRound]) -> str:
    """A bar a round, as high as the tokens it gave: the drafter's green, the target's own on top."""
    most = max((one.kept for one in rounds), default=1) or 1
    width, unit = max(3.0, min(14.0, 860 / max(1, len(rounds)))), 34 / most
    bars = []
    for number, one in enumerate(rounds):
        drafted = min(one.kept, sum(node.state == "accepted" for node in one.nodes))
        x, low, high = number * width, unit * drafted, unit * one.kept
        bars.append(
            f'<g class="bar" data-round="{number + 1}"><title>round {number + 1}: {one.kept} tokens</title>'
            f'<rect class="back" x="{x:.1f}" y="0" width="{width:.1f}" height="36"/>'
            f'<rect class="accepted" x="{x + 0.5:.1f}" y="{36 - low:.1f}" width="{width - 1:.1f}" height="{low:.1f}"/>'
            f'<rect class="next" x="{x + 0.5:.1f}" y="{36 - high:.1f}" width="{width - 1:.1f}" height="{high - low:.1f}"/></g>'
        )
    return f'<svg class="overview" width="{width * len(rounds):.0f}" height="36">{"".join(bars)}</svg>'


def card(number: int, one: TracedRound, texts: TokenTexts) -> str:
    """One round."""
    states = [node.state for node in one.nodes]
    drafted, stood = len(states) - 1 - states.count("next"), states.count("accepted")
    total = sum(one.seconds.values())
    cut = f", cut to {one.kept}" if one.kept < len(one.given) else ""
    said = f"{stood} of {drafted} drafted stand" if drafted else "nothing drafted"
    segments = "".join(
        f'<i style="width:{100 * one.seconds.get(phase, 0.0) / total if total else 0:.2f}%;background:{colour}"'
        f' title="{phase} {1e3 * one.seconds.get(phase, 0.0):.1f} ms"></i>' for phase, colour in PHASE_COLOURS.items()
    )  # fmt: skip
    times = " · ".join(f"{phase} {1e3 * one.seconds[phase]:.1f}" for phase in PHASE_COLOURS if one.seconds.get(phase, 0.0) >= 5e-5)
    return (
        f'<section class="card round" id="round-{number}" data-round="{number}"><header><h3>Round {number}</h3>'
        f'<span>{said}; {len(one.given)} token{"s" if len(one.given) != 1 else ""}{cut}</span>'
        f'<span class="times"><b>{1e3 * total:.1f} ms</b> {times}</span></header>'
        f'<div class="split">{segments}</div><div class="scroll">{drawing(one.nodes, texts)}</div></section>'
    )


def drawing(nodes: Sequence[Node], texts: TokenTexts) -> str:
    """The tree from left to right as SVG."""
    shown = [texts.short(node.token) for node in nodes]
    widths = [18 + max(44.0, LETTER * len(text), SMALL * len(_probs_text(node))) for text, node in zip(shown, nodes, strict=True)]
    left = _columns(nodes, widths)
    middle = _rows(nodes)
    edges, boxes = [], []
    for place, node in enumerate(nodes):
        x, y = left[node.depth], middle[place] * ROW + HEIGHT / 2 + EDGE
        if place:
            above = nodes[node.parent]
            x0, y0 = left[above.depth] + widths[node.parent], middle[node.parent] * ROW + HEIGHT / 2 + EDGE
            bend = (x - x0) / 2
            edges.append(
                f'<path class="edge {node.state}" d="M{x0:.1f},{y0:.1f}'
                f'C{x0 + bend:.1f},{y0:.1f} {x - bend:.1f},{y:.1f} {x:.1f},{y:.1f}"/>'
            )
        boxes.append(
            f'<g class="node {node.state}" data-state="{node.state}" transform="translate({x:.1f},{y - HEIGHT / 2:.1f})">'
            f"<title>{escape(_told(node, texts))}</title>"
            f'<rect width="{widths[place]:.1f}" height="{HEIGHT}" rx="7"/><text class="word" x="9" y="15">{escape(shown[place])}</text>'
            f'<text class="distribution" x="9" y="29">{escape(_probs_text(node))}</text></g>'
        )
    wide = max(left[node.depth] + width for node, width in zip(nodes, widths, strict=True)) + EDGE
    high = (max(middle) + 1) * ROW - (ROW - HEIGHT) + 2 * EDGE
    return f'<svg class="tree" width="{wide:.0f}" height="{high:.0f}">{"".join(edges)}{"".join(boxes)}</svg>'


def _columns(nodes: Sequence[Node], widths: Sequence[float]) -> list[float]:
    """Left edge of each depth."""
    left = [float(EDGE)]
    for depth in range(max(node.depth for node in nodes)):
        left.append(left[-1] + GAP + max(width for node, width in zip(nodes, widths, strict=True) if node.depth == depth))
    return left


def _rows(nodes: Sequence[Node]) -> list[float]:
    """Row of each node: leaves one below the other in drawn order, a parent in the middle of its children."""
    children: list[list[int]] = [[] for _ in nodes]
    for place, node in enumerate(nodes[1:], 1):
        children[node.parent].append(place)
    rows, leaves, waiting = [0.0] * len(nodes), 0, [0]
    order = []
    while waiting:
        place = waiting.pop()
        order.append(place)
        waiting += children[place][::-1]
        if not children[place]:
            rows[place], leaves = float(leaves), leaves + 1
    for place in reversed(order):
        if children[place]:
            rows[place] = (rows[children[place][0]] + rows[children[place][-1]]) / 2
    return rows


def _probs_text(node: Node) -> str:
    shown = [f"{name} {_share(value)}" for name, value in (("p", node.p), ("q", node.q)) if value is not None]
    return "  ".join(shown)


def _share(value: float) -> str:
    return "<.01" if value < 0.005 else f"{value:.2f}".lstrip("0") if value < 0.995 else "1.0"


def _told(node: Node, texts: TokenTexts) -> str:
    """What hovering tells."""
    lines = [f"{texts.one(node.token)} (id {node.token}): {KEY[node.state]}"]
    lines += [f"target's p {node.p:.4f}"] if node.p is not None else []
    lines += [f"drafter's q {node.q:.4f}"] if node.q is not None else []
    if node.likeliest is not None:
        token, share = node.likeliest
        lines.append(f"after it the target puts {texts.one(token)} first, with {share:.4f}")
    return "\n".join(lines)


STYLE = """
:root { --good: #0f8a5f; --bad: #c2410c; --own: #0072b2; }
blockquote { margin: 10px 0 14px; padding: 8px 16px; border-left: 4px solid var(--line); background: #fff; white-space: pre-wrap;
  max-height: 9em; overflow: auto; }
dl { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0 0 6px; }
dt { color: var(--faint); font-size: 12px; } dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.answer { white-space: pre-wrap; font-size: 15.5px; line-height: 1.65; }
.token { cursor: pointer; border-radius: 3px; }
.token.accepted { background: #d9f2e6; } .token.here { box-shadow: 0 0 0 2px #f59e0b; }
.token:hover { box-shadow: 0 0 0 2px #fbbf24; }
nav { position: sticky; top: 0; z-index: 5; display: flex; align-items: center; gap: 10px; padding: 8px 12px; margin: 14px 0 6px;
  background: rgba(255,255,255,.96);
  border: 1px solid var(--line); border-radius: 10px; box-shadow: 0 2px 8px rgba(15,23,42,.06); overflow-x: auto; }
nav button { font: inherit; font-size: 18px; line-height: 1; width: 32px; height: 30px; border: 1px solid var(--line);
  border-radius: 7px; background: #fff; cursor: pointer; }
nav output { min-width: 104px; text-align: center; font-weight: 600; font-variant-numeric: tabular-nums; }
nav label { font-size: 13px; color: var(--faint); white-space: nowrap; margin-right: 8px; }
.overview { flex: none; } .bar { cursor: pointer; } .bar .back { fill: transparent; } .bar:hover .back { fill: #f1f5f9; }
.bar.here .back { fill: #fde68a; }
.bar .accepted { fill: var(--good); } .bar .next { fill: var(--own); }
.keys { font-size: 12.5px; color: var(--faint); margin: 8px 2px; } .key { margin-right: 16px; white-space: nowrap; }
.gap { margin-right: 20px; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 5px; vertical-align: -1px;
  border: 1.5px solid transparent; }
.key.root i { background: #334155; } .key.accepted i { background: #d9f2e6; border-color: var(--good); }
.key.rejected i { background: #fff; border: 1.5px dashed var(--bad); }
.key.unreached i { background: #fff; border-color: #cbd5e1; } .key.next i { background: #e0f0fa; border-color: var(--own); }
.round { scroll-margin-top: 76px; padding: 12px 16px 10px; } .round.here { border-color: #f59e0b; box-shadow: 0 0 0 1px #f59e0b; }
.round header { display: flex; align-items: baseline; gap: 14px; flex-wrap: wrap; font-size: 13.5px; }
.round h3 { margin: 0; font-size: 15.5px; }
.times { margin-left: auto; color: var(--faint); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.times b { color: var(--ink); margin-right: 6px; }
.split { display: flex; height: 6px; border-radius: 3px; overflow: hidden; background: var(--line); margin: 7px 0 8px; }
.split i { display: block; }
#rounds.alone .round:not(.here) { display: none; }
.node rect { fill: #fff; stroke: #cbd5e1; stroke-width: 1.2; } .node text { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
.node .word { font-size: 12.5px; fill: var(--ink); } .node .distribution { font-size: 10px; fill: var(--faint); white-space: pre; }
.node.root rect { fill: #334155; stroke: #334155; } .node.root .word { fill: #fff; }
.node.accepted rect { fill: #d9f2e6; stroke: var(--good); stroke-width: 1.8; }
.node.rejected rect { stroke: var(--bad); stroke-dasharray: 4 3; }
.node.unreached .word, .node.unreached .distribution { fill: #94a3b8; }
.node.next rect { fill: #e0f0fa; stroke: var(--own); stroke-width: 1.8; }
.edge { fill: none; stroke: #cbd5e1; stroke-width: 1.3; } .edge.accepted { stroke: var(--good); stroke-width: 2.6; }
.edge.next { stroke: var(--own); stroke-width: 2.2; }
.edge.rejected { stroke: var(--bad); stroke-dasharray: 4 3; opacity: .75; }
"""
SCRIPT = """
const cards = [...document.querySelectorAll('.round')], places = document.querySelectorAll('[data-round]');
const said = document.querySelector('nav output'), alone = document.getElementById('alone');
let at = 0;
function go(round, scroll) {
  if (!cards.length) { said.textContent = 'no rounds'; return; }
  at = Math.max(1, Math.min(cards.length, round));
  places.forEach(place => place.classList.toggle('here', Number(place.dataset.round) === at));
  said.textContent = `Round ${at} of ${cards.length}`;
  if (scroll) { cards[at - 1].scrollIntoView({ block: alone.checked ? 'nearest' : 'start', behavior: 'smooth' }); }
}
document.querySelectorAll('[data-step]').forEach(
  button => button.addEventListener('click', () => go(at + Number(button.dataset.step), true)));
document.querySelectorAll('.token, .bar').forEach(place => place.addEventListener('click', () => go(Number(place.dataset.round), true)));
cards.forEach(card => card.querySelector('header').addEventListener('click', () => go(Number(card.dataset.round), false)));
alone.addEventListener('change', () => { document.getElementById('rounds').classList.toggle('alone', alone.checked); go(at, true); });
document.addEventListener('keydown', event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) { event.preventDefault(); go(at + step, true); }
});
go(Number(location.hash.replace('#round-', '')) || 1, false);
"""
