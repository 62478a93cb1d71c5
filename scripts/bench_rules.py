"""What each lossless rule costs beside the target's forward of the same tree: real rounds at batch 1, all rules on every tree in turn.

    python scripts/bench_rules.py RECIPE [--drafter FOLDER] [--rounds 24] [--nodes 64] [--output FILE] [section.key=value ...]

A tree is drawn from the drafter, scored by the target and judged by each rule, the order turning. A rule computes the target's distribution
where it reads it, within its own time. Medians over rounds, in ms.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from drafttrain.core.plan import Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.types import Scored
from drafttrain.evaluation.machine import commit, device_name, versions
from drafttrain.evaluation.suites import load_suite
from drafttrain.recipe import load_recipe
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.runtime.generate import RoundRecord
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Target
from drafttrain.verify import RULES

SAMPLINGS = (Sampling(0.7), Sampling(1.0, top_p=0.95))
PROMPTS = 6
HEAD = ("draws", "sampling", "rule", "forward, ms", "rule, ms", "of forward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--drafter", type=Path, help="a trained drafter, or the run that trained it; by default the recipe's output")
    parser.add_argument("--rounds", type=int, default=24, help="of each sampling and kind of draws")
    parser.add_argument("--nodes", type=int, default=64)
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.overrides)
    target = Target.load(recipe.target)
    shape = Static(choices=tuple(widest(args.nodes)))
    lines = []
    for sampling in SAMPLINGS:
        for draws in ("iid", "without_replacement", "deterministic"):
            runtime = recipe.runtime.model_copy(update={"shape": shape, "draws": draws, "rule": "recursive", "hybrid": None})
            decoder = SpeculativeDecoder.from_pretrained(target, args.drafter or Path(recipe.output), runtime)
            for name, forward, alone in measure(decoder, sampling, draws, args.rounds):
                how = f"T {sampling.temperature}" + (f", top-p {sampling.top_p}" if sampling.top_p < 1 else "")
                lines.append((draws, how, name, f"{forward:.1f}", f"{alone:.2f}", f"{alone / forward:.1%}"))
                print(*lines[-1], sep="\t", flush=True)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, ("---",) * 3 + ("---:",) * 3, *lines))
    made = ", ".join(f"{package} {version}" for package, version in versions().items())
    text = (
        f"# Cost of the lossless rules\n\nMade by `python scripts/bench_rules.py`; medians of {args.rounds} rounds.\n\n{table}\n\n"
        f"{args.nodes} nodes, {target.vocab_size:,} tokens, batch 1, {recipe.target.dtype}; target {target.name} ({target.fingerprint}); "
        f"{device_name(target.device)}, {torch.get_num_threads()} threads; {made} ({commit()}).\n"
    )
    if args.output:
        args.output.write_text(text, encoding="utf-8")


def widest(nodes: int) -> list[tuple[int, ...]]:
    """A tree of depth 4 whose elder branches are the wider ones: each node has 4, 3, 2, 2 children, level by level, cut at `nodes`."""
    paths: list[tuple[int, ...]] = [()]
    for width in (4, 3, 2, 2):
        paths += [(*path, rank) for path in paths if len(path) == max(map(len, paths)) for rank in range(width)]
    return sorted(paths[1:], key=lambda path: (len(path), path))[:nodes]


def measure(decoder: SpeculativeDecoder, sampling: Sampling, draws: Any, rounds: int) -> list[tuple[str, float, float]]:
    """(rule, forward, rule) in ms, medians."""
    rules = {
        name: kind(kind.Config(name=name))
        for name, kind in RULES.items()
        if kind.lossless and kind.temperatures != "zero" and (draws, "tree") in kind.accepts
    }
    took: dict[str, list[float]] = defaultdict(list)

    def watch(record: RoundRecord) -> None:
        tree, scored = record.tree, record.scored
        turn = len(took[next(iter(rules))])
        order = [*rules][turn % len(rules) :] + [*rules][: turn % len(rules)]
        for name in order:
            rng = SeededRng(turn, torch.arange(len(tree.tokens), device=tree.tokens.device))
            own = replace(tree), Scored(scored.logits, scored.sampling)  # nothing of what an earlier rule worked out of them
            own[0].layout()  # the target has asked for it
            took[name].append(seconds(lambda name=name, own=own, rng=rng: rules[name](*own, rng)))

    forwards: list[float] = []
    items = load_suite("builtin").items
    for number, item in enumerate(items[:: max(1, len(items) // PROMPTS)][:PROMPTS]):
        batch = decoder.batch(sampling, on_round=watch)
        batch.start([Request(decoder.tokenize(item.opening()), number, rounds * (decoder.runtime.shape.depth + 1))])
        for _ in range(max(1, rounds // PROMPTS)):
            if not batch.done:
                batch.step()
        forwards += [spent["score"] for spent in batch.clock.runs()[1:]]
    return [(name, median(forwards) * 1e3, median(took[name]) * 1e3) for name in rules]


def seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
