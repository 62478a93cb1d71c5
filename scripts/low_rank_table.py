"""Which low-rank stand-in for the target's output matrix keeps its likeliest token: shares by rank, candidates and way of starting.

    python scripts/low_rank_table.py STORE --target smollm2-demo [--build N] [--test N]

STORE holds conversations with the feature `last_hidden_state` (`drafttrain capture`, or `data.capture` of a recipe). Matrices are fitted to
the first N answer states and judged on the next ones, which are of other conversations but for one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.data.store import Store
from drafttrain.drafters.output import low_rank
from drafttrain.target.files import TargetConfig, resolve
from drafttrain.target.head import TargetHead

CASES = ((64, 128), (128, 16), (128, 128), (192, 128))
WAYS = ("plain SVD", "token frequency", "states", "both")


def answer_states(store: Store, count: int) -> tuple[Tensor, Tensor]:
    """At least `count` last states [R, D] that give answer tokens, and those tokens [R], of whole conversations."""
    store.require(("last_hidden_state",))
    states: list[Tensor] = []
    tokens: list[Tensor] = []
    for index in range(len(store)):
        conversation = store[index]
        mask = torch.as_tensor(conversation.mask)
        last = store.features(index, ("last_hidden_state",))["last_hidden_state"]
        states.append(last[:-1][mask[1:]].float())
        tokens.append(torch.as_tensor(conversation.tokens)[1:][mask[1:]].long())
        if sum(map(len, states)) >= count:
            return torch.cat(states), torch.cat(tokens)
    raise UserError(f"store '{store.folder}': fewer than {count} answer tokens; lower --build or --test")


def share_kept(best: Tensor, states: Tensor, down: Tensor, up: Tensor, candidates: int) -> float:
    """How often `best` [R] is among the `candidates` best tokens by the thin matrices."""
    hits = [
        (((part @ down.T) @ up.T).topk(candidates, -1).indices == token[:, None]).any(-1)
        for part, token in zip(states.split(512), best.split(512), strict=True)
    ]
    return float(torch.cat(hits).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--target", default="smollm2-demo", help="the target whose states the store holds")
    parser.add_argument("--build", type=int, default=12_000, help="states to fit to")
    parser.add_argument("--test", type=int, default=3_000, help="states to judge on")
    given = parser.parse_args()
    head = TargetHead.from_folder(resolve(TargetConfig(model=given.target)), dtype=torch.float32)
    states, tokens = answer_states(Store.open(given.store), given.build + given.test)
    fitted, judged = states[: given.build], states[given.build : given.build + given.test]
    counts = tokens[: given.build].bincount(minlength=head.vocab_size)
    best = torch.cat([head.logits(part).argmax(-1) for part in judged.split(512)])
    table = Table("rank, candidates", *WAYS)
    for rank, candidates in CASES:
        shares = []
        for seen, often in ((None, None), (None, counts), (fitted, None), (fitted, counts)):
            shares.append(share_kept(best, judged, *low_rank(head.output, rank, seen, often), candidates))
        table.add_row(f"{rank}, {candidates}", *(f"{share:.3f}" for share in shares))
    Console().print(table)
    for size in (8192, 16384):
        covered = torch.isin(best, counts.topk(size).indices).float().mean()
        print(f"the {size:,} most frequent tokens of the fitted part cover {covered:.3f}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
