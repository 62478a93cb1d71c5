"""Offline replay with any drafter and any tree: its proposals are followed along greedy texts that the target has written already.

Greedy acceptance is a function of the target's text alone, so that not one target forward is needed: the drafter proposes below a root,
what the text says next stands, the drafter observes it with the target's features, and so on, many texts side by side. In fp32
it counts what decoding the same prompts counts. `runtime/replay.py` is the faster way for chains, from one teacher-forced pass.
B rows, T time, N nodes, D depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.plan import Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.stats import Statistics, Tally
from drafttrain.target.adapter import Target
from drafttrain.target.head import TargetHead

PAD = -1  # no token: nothing matches it


@dataclass
class ReplayTexts:
    """What the target wrote greedily, with its features."""

    tokens: Tensor  # [B, T] prompts with their answers behind them, then PAD
    starts: Tensor  # [B] where the answers begin
    stops: Tensor  # [B] where they end
    features: Features  # name -> [B, T, ...]


def read_texts(target: Target, prompts: Sequence[list[int]], answers: Sequence[list[int]], features: Iterable[str]) -> ReplayTexts:
    """Prompts and the target's own greedy answers (token ids) as one batch; one plain pass gives the features."""
    whole = [torch.tensor(prompt + answer, device=target.device) for prompt, answer in zip(prompts, answers, strict=True)]
    tokens = pad_sequence(whole, batch_first=True, padding_value=PAD)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=target.device)
    stops = torch.tensor([len(text) for text in whole], device=target.device)
    position = torch.arange(tokens.shape[1], device=target.device).expand_as(tokens)
    document = torch.where(tokens == PAD, -1, 0)
    return ReplayTexts(tokens, starts, stops, target.encode(tokens.clamp_min(0), position, document, features))


def tree_replay(drafter: Drafter, head: TargetHead, texts: Iterable[ReplayTexts], plan: Plan) -> Statistics:
    """What greedy decoding would count on these texts with this plan, times aside."""
    return reduce(add, (_retrace(drafter, head, batch, plan) for batch in texts), Statistics())


@torch.inference_mode()
def _retrace(drafter: Drafter, head: TargetHead, texts: ReplayTexts, plan: Plan) -> Statistics:
    tokens, at = texts.tokens, texts.starts.clone()  # [B] the root's place
    B, T = tokens.shape
    row = torch.arange(B, device=tokens.device)
    P = int(texts.starts.max())
    real = torch.arange(P, device=tokens.device) < texts.starts[:, None]
    prompts = torch.where(real, tokens[:, :P], 0)
    state = drafter.begin(
        prompts, texts.starts, {name: value[:, :P] * real[..., None] for name, value in texts.features.items()}, head,
        T + plan.shape.slots + 1,
    )  # fmt: skip
    state.set_lengths(at.tolist())
    rng, tally = SeededRng(0, row), Tally(B, tokens.device)
    while bool((at + 1 < texts.stops).any()):
        alive = at + 1 < texts.stops
        limited = replace(plan, left=(texts.stops - 1 - at).clamp_min(0))  # lookups draft nothing beyond a text's end
        tree = drafter.propose(state, tokens[row, at].clamp_min(0), limited, Sampling(), rng)
        D = max(1, tree.max_depth)  # where nothing was drafted, a path is still one node long
        place = at[:, None] + torch.arange(D + 1, device=at.device)  # [B, D + 1] the root, and what the text says below
        written = torch.where(place < T, tokens.gather(1, place.clamp_max(T - 1)), PAD)
        path, accepted = follow(tree, written[:, 1:])
        accepted = torch.where(alive, accepted, 0)
        kept = torch.where(alive, torch.minimum(accepted + 1, texts.stops - 1 - at), 0)
        tally.add(row, alive, kept, accepted, accepted + (_has_child(tree, path, accepted) & (kept > accepted)), tree.max_depth)
        nodes = torch.cat([torch.zeros_like(at)[:, None], path], 1)
        features = {name: value[row[:, None], place.clamp_max(T - 1)] for name, value in texts.features.items()}
        drafter.observe(state, Committed(tree.tokens.gather(1, nodes), torch.where(alive, accepted + 1, 0), features, nodes))
        at = at + kept
        state.set_lengths(at.tolist())
    return reduce(add, (tally.row(index) for index in range(B)))


def follow(tree: Tree, text: Tensor) -> tuple[Tensor, Tensor]:
    """The deepest nodes that say what `text` [B, D] says below the root: ([B, D] their path, padded with 0; [B] how many)."""
    right = tree.live & (tree.tokens == text.gather(1, (tree.depth - 1).clamp_min(0)))
    right[:, 0] = True
    stands = ~(tree.ancestors & ~right[:, None, :]).any(-1)  # right, and so is everything above it
    return tree.path_to(torch.where(stands, tree.depth, -1).argmax(1))


def _has_child(tree: Tree, path: Tensor, accepted: Tensor) -> Tensor:
    """[B] whether something was drafted below the last accepted node."""
    tip = torch.where(accepted > 0, path.gather(1, (accepted - 1).clamp_min(0)[:, None])[:, 0], 0)
    below = (tree.parents == tip[:, None]) & tree.live
    below[:, 0] = False
    return below.any(1)
