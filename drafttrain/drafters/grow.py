"""Growing a tree level by level, for every family that can give a next-token distribution at a node.

B rows, W frontier nodes, F nodes fed so far, V vocabulary, Vd draft vocabulary. A drafter gives `step`; what is drawn, in which order and
with which record of distributions is decided here, once for all families. Draws kept exact: static shapes any, dynamic ones `deterministic`
only (they drop tokens after seeing them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.core.tree import Skeleton, Tree, skeleton_mask
from drafttrain.core.types import gathered


@dataclass
class Frontier:
    """The nodes to be expanded next. Feeding order is: frontier after frontier."""

    level: int  # depth of these nodes; 0 is the root's
    tokens: Tensor  # [B, W]
    parent: Tensor  # [B, W] index of each node's parent in the previous frontier
    previous: Frontier | None = None
    sliced: Tensor | None = None  # [W, F] `mask`, of every row, where the shape is known beforehand

    @classmethod
    def of(cls, roots: Tensor) -> Frontier:
        """[B] roots -> the first frontier."""
        return cls(0, roots[:, None], torch.zeros_like(roots)[:, None])

    def below(self, tokens: Tensor, parent: Tensor, sliced: Tensor | None = None) -> Frontier:
        """The next frontier: `tokens` [B, W'] under the nodes `parent` [B, W'] of this one."""
        return Frontier(self.level + 1, tokens, parent, self, sliced)

    @cached_property
    def mask(self) -> Tensor:
        """[B, W, F] bool over all nodes fed so far, these included: itself and what stands above it."""
        if self.sliced is not None:
            return self.sliced.expand(len(self.tokens), -1, -1)
        itself = torch.eye(self.tokens.shape[1], dtype=torch.bool, device=self.tokens.device).expand(len(self.tokens), -1, -1)
        if self.previous is None:
            return itself
        return torch.cat([gathered(self.previous.mask, self.parent), itself], -1)


@dataclass
class Growth:
    """A tree, and which of the candidates seen while it grew its nodes are."""

    tree: Tree
    kept: Tensor  # [B, N] the candidate that each node is
    order: Tensor  # [B, F] the candidates fed, first to last

    @cached_property
    def fed(self) -> Tensor:
        """[B, N] where each node came in feeding order, -1 where it was never fed: for drafters with a cache."""
        same = self.kept[:, :, None] == self.order[:, None, :]
        return torch.where(same.any(-1), same.long().argmax(-1), -1)


Step = Callable[[Frontier], Tensor]
"""Frontier -> logits [B, W, Vd] of the token after each of its nodes; [B, 1, Vd] where they are all alike."""


class Parallel:
    """The `Step` of drafters that give all distributions of a round in one call (parallel heads, blocks): a node's depends on its depth
    alone."""

    def __init__(self, logits: Tensor, hidden: Tensor, states: list[Tensor]) -> None:
        """logits: [B, K, Vd]; hidden: [B, K, D] what they were read from; states: see `grow`."""
        self.logits, self.states = logits, states
        self.levels, self.hidden = logits.split(1, 1), hidden.split(1, 1)

    def __call__(self, frontier: Frontier) -> Tensor:
        self.states.append(self.hidden[frontier.level].expand(-1, frontier.tokens.shape[1], -1))
        return self.levels[frontier.level]


def grow(
    step: Step, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng, vocab: Tensor | None = None, size: int = 0,
    states: list[Tensor] | None = None,
) -> Growth:
    """A tree below `roots` [B] as `plan` wants it.

    sampling: the target's; the drafter's distribution uses `plan.temperature` where given. vocab: [Vd] ascending target ids of the draft
    vocabulary, None where it is the target's own; size: V, read only with a draft vocabulary. states: where `step` leaves the states
    [B, W, D] that its logits were read from, call by call; `plan.keep_states` keeps them with the tree.
    """
    if isinstance(plan.shape, Dynamic):
        assert plan.draws == "deterministic", "best-first trees drop tokens after seeing them: only deterministic draws stay exact"
        grown = _best_first(step, roots, plan.shape, plan, vocab, size, states)
    else:
        own = sampling if plan.temperature is None else sampling._replace(temperature=plan.temperature)
        grown = _static(step, roots, plan.shape, plan, own, rng, vocab, size, states)
    return _with_states(grown, states) if plan.keep_states and states else grown


class _Ended:
    """Which rows `plan.enough` has ended, level by level."""

    def __init__(self, plan: Plan, states: list[Tensor] | None) -> None:
        self.plan, self.states = plan, states
        self.rows: Tensor | None = None  # [B] bool: rows that draw nothing from here on

    def after(self, level: int, logits: Tensor, width: int) -> bool:
        """Asks at the nodes of a level; whether every row has ended, so that the next level need not be fed."""
        if self.plan.enough is None:
            return False
        here = self.plan.enough(level, logits.expand(-1, width, -1), self.states[-1] if self.states else None)
        self.rows = here if self.rows is None else self.rows | here
        return bool(self.rows.all())


def _with_states(grown: Growth, states: list[Tensor]) -> Growth:
    """A node was drawn from the state of its parent, whose place among the states is when it was fed."""
    probs_row = grown.fed.gather(1, grown.tree.parents).clamp_min(0)
    return replace(grown, tree=replace(grown.tree, probs_row=probs_row, draft_states=torch.cat(states, 1)))


def _static(
    step: Step, roots: Tensor, shape: Chain | Static, plan: Plan, sampling: Sampling, rng: Rng, vocab: Tensor | None, size: int,
    states: list[Tensor] | None,
) -> Growth:
    B, device = len(roots), roots.device
    assert plan.draws == "deterministic" or not plan.path_prob, "only tokens chosen with certainty are ranked by their reach"
    assert plan.target_candidates is None or (plan.draws == "deterministic" and not plan.path_prob), (
        "the target's candidates have no draft distribution"
    )
    stages, skeleton, parents, order, probs_row = _stages(shape, device)
    tokens, live = [roots[:, None]], [torch.ones(B, 1, dtype=torch.bool, device=device)]
    path_prob = [torch.zeros(B, 1, device=device)] if plan.path_prob else []  # [B, n] log probability of the paths, level by level
    draft_probs: list[Tensor] = []
    ended = _Ended(plan, states)
    frontier = Frontier.of(roots)
    for level, level_shape in enumerate(stages):
        if level:
            frontier = frontier.below(tokens[-1][:, level_shape.nodes], level_shape.parent.expand(B, -1), level_shape.mask)
        logits = step(frontier).expand(-1, frontier.tokens.shape[1], -1)
        stopped = None if plan.stop is None else plan.stop(level, logits)
        if plan.target_candidates is not None and level == 0:
            drawn, real = _from_target(plan.target_candidates, level_shape.width)
            stopped = None  # they are the target's, and stand whatever the drafter thinks
        else:
            drawn, real, probs = _drawn(logits, level_shape.width, plan, sampling, rng)
            if path_prob:
                gain = logits.gather(-1, drawn).float() - logits.float().logsumexp(-1, keepdim=True)  # [B, W, width]
                path_prob.append(path_prob[-1][:, level_shape.nodes[level_shape.slot]] + gain[:, level_shape.slot, level_shape.rank])
            if probs is not None:
                draft_probs.append(widen(probs, vocab, size))
            drawn = drawn if vocab is None else vocab[drawn]
        tokens.append(drawn[:, level_shape.slot, level_shape.rank])
        alive = real[:, level_shape.slot, level_shape.rank]
        alive = alive if stopped is None else alive & ~stopped[:, None]
        live.append(alive if ended.rows is None else alive & ~ended.rows[:, None])
        if ended.after(level, logits, frontier.tokens.shape[1]):
            break
    drawn_tokens = torch.cat(tokens, 1)
    N = drawn_tokens.shape[1]  # levels follow each other: a tree that ended early is the first N nodes of the whole shape's
    depth = len(tokens) - 1
    fed = sum(len(level_shape.nodes) for level_shape in stages[:depth])
    tree = Tree(
        drawn_tokens, parents[:N].expand(B, -1), torch.cat(live, 1), plan.draws, max_depth=depth,
        max_children=max(level_shape.width for level_shape in stages[:depth]),
        path_prob=torch.cat(path_prob, 1).exp() if path_prob else None,
        draft_probs=torch.cat(draft_probs, 1) if draft_probs else None, probs_row=probs_row[:N].expand(B, -1) if draft_probs else None,
        skeleton=skeleton, from_target=plan.target_candidates is not None,
    )
    return Growth(tree, torch.arange(N, device=device).expand(B, -1), order[:fed].expand(B, -1))


def _drawn(logits: Tensor, width: int, plan: Plan, sampling: Sampling, rng: Rng) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, W, Vd] -> [B, W, width] draft ids in drawn order, which of them are real, and the distribution they came from if it is
    recorded."""
    if plan.draws == "deterministic":
        drawn = top(logits, min(width, logits.shape[-1]))
        real = torch.ones_like(drawn, dtype=torch.bool)
        if short := width - drawn.shape[-1]:  # a vocabulary of fewer tokens than siblings
            drawn, real = (nn.functional.pad(part, (0, short)) for part in (drawn, real))
        return drawn, real, logits.float().softmax(-1) if plan.record_probs else None
    probs = sampling.probs(logits)
    drawn = rng.draw(probs, width, replace=plan.draws == "iid")
    real = probs.gather(-1, drawn) > 0  # a distribution of fewer tokens than siblings
    if plan.draws == "without_replacement":  # past the last of them a draw may repeat one
        real &= torch.arange(width, device=logits.device) < (probs > 0).sum(-1, keepdim=True)
    return drawn, real, probs


def _from_target(first: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """[B, w] -> [B, 1, width] the first ones, and which of them are real."""
    shown = nn.functional.pad(first[:, :width], (0, max(0, width - first.shape[1])))
    real = torch.arange(width, device=first.device) < first.shape[1]
    return shown[:, None], real.expand_as(shown)[:, None]


def _best_first(
    step: Step, roots: Tensor, shape: Dynamic, plan: Plan, vocab: Tensor | None, size: int, states: list[Tensor] | None
) -> Growth:
    """Candidates are numbered as they are seen, the root is 0; the children of a fed node follow each other."""
    device = roots.device
    frontier = Frontier.of(roots)
    number = torch.zeros_like(frontier.tokens)  # [B, W] the frontier's candidate numbers
    score = torch.zeros(number.shape, device=device)  # [B, W] log probability of the path
    tokens, scores, numbers = [frontier.tokens], [score], []
    draft_probs: list[Tensor] = []
    known = _by_level(_likeliest(step.logits, shape.top_k, vocab)) if isinstance(step, Parallel) else None
    seen, k = 1, 0  # candidates so far, and children a fed node
    ended = _Ended(plan, states)
    for level in range(shape.depth):
        logits, W = step(frontier), frontier.tokens.shape[1]
        numbers.append(number)
        stopped = None if plan.stop is None else plan.stop(level, logits.expand(-1, W, -1))
        if plan.record_probs:
            draft_probs.append(widen(logits.float().softmax(-1), vocab, size).expand(-1, W, -1))
        gain, best = _likeliest(logits, shape.top_k, vocab) if known is None else known[level]
        k = best.shape[-1]
        path_prob = score[..., None] + gain
        if stopped is not None:
            path_prob = path_prob.masked_fill(stopped[:, None, None], float("-inf"))
        if ended.rows is not None:
            path_prob = path_prob.masked_fill(ended.rows[:, None, None], float("-inf"))
        drawn = (best if best.shape[1] == W else best.expand(-1, W, -1)).flatten(1)  # [B, W * k]
        tokens.append(drawn)
        scores.append(path_prob.flatten(1))
        if ended.after(level, logits, W):
            break
        if level + 1 < shape.depth:
            score, chosen = scores[-1].topk(min(shape.beam, drawn.shape[1]), -1)  # [B, W]
            frontier = frontier.below(drawn.gather(1, chosen), chosen // k)
            number = seen + chosen
        seen += drawn.shape[1]
    return _rerank(torch.cat(tokens, 1), torch.cat(scores, 1), torch.cat(numbers, 1), k, len(numbers), draft_probs, shape)


def _rerank(
    tokens: Tensor, score: Tensor, numbers: Tensor, k: int, depth: int, draft_probs: list[Tensor], shape: Dynamic
) -> Growth:
    """The root and the likeliest candidates, parents before children: a stable sort keeps a parent ahead of a child of equal score.

    tokens, score: [B, C] of all candidates; numbers: [B, F] those that were fed, in that order, each with k children.
    """
    kept = score.sort(dim=1, descending=True, stable=True).indices[:, : shape.nodes + 1].sort(dim=1).values  # [B, N]
    score = score.gather(1, kept)
    live = score > float("-inf")
    hangs = (kept - 1).clamp_min(0) // k  # from which of the fed ones; the root's is unused
    place = torch.searchsorted(kept, numbers)  # [B, F] their nodes in the tree
    tree = Tree(
        tokens.gather(1, kept),
        place.gather(1, hangs).masked_fill(~live, 0),
        live,
        "deterministic",
        max_depth=depth,
        max_children=shape.top_k,
        path_prob=score.exp(),
        draft_probs=torch.cat(draft_probs, 1) if draft_probs else None,
        probs_row=hangs if draft_probs else None,
    )
    return Growth(tree, kept, numbers)


def _likeliest(logits: Tensor, k: int, vocab: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B, W, Vd] -> log probabilities and target ids [B, W, k] of the likeliest tokens, the best first; fewer where Vd is."""
    best = logits.log_softmax(-1, dtype=torch.float32).topk(min(k, logits.shape[-1]), -1)
    return best.values, best.indices if vocab is None else vocab[best.indices]


def _by_level(best: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """[B, K, k] of all levels -> [B, 1, k] level by level."""
    return list(zip(*(part.split(1, 1) for part in best), strict=True))


def top(logits: Tensor, k: int) -> Tensor:
    """[..., Vd] -> [..., k] ids, the likeliest first."""
    return likeliest(logits)[..., None] if k == 1 else logits.topk(k, -1).indices


def widen_logits(logits: Tensor, vocab: Tensor | None, size: int) -> Tensor:
    """Logits over the draft vocabulary as some over the target's, -inf for tokens outside: [..., Vd] -> [..., V]."""
    if vocab is None:
        return logits
    wide = logits.new_full((*logits.shape[:-1], size), float("-inf"))
    wide[..., vocab] = logits
    return wide


def widen(probs: Tensor, vocab: Tensor | None, size: int) -> Tensor:
    """A distribution over the draft vocabulary as one over the target's: [..., Vd] -> [..., V]. Without a draft vocabulary, itself."""
    if vocab is None:
        return probs
    wide = probs.new_zeros(*probs.shape[:-1], size)
    wide[..., vocab] = probs
    return wide


@dataclass(frozen=True)
class Level:
    """One level of a static shape, as index tensors."""

    nodes: Tensor  # [W] which nodes of the level above are expanded
    parent: Tensor  # [W] index of each one's parent in the previous frontier
    slot: Tensor  # [n] the frontier node each new node hangs from
    rank: Tensor  # [n] which of its children it is
    width: int  # children drawn a frontier node
    mask: Tensor  # [W, F] bool: what the nodes expanded see of all nodes fed so far; a slice of the whole shape's


@lru_cache(maxsize=64)
def _stages(shape: Chain | Static, device: torch.device) -> tuple[tuple[Level, ...], Skeleton, Tensor, Tensor, Tensor]:
    """Stages, skeleton, parents [N], nodes in feeding order [F] and distribution row [N] of a static shape."""
    paths = [(), *shape.paths]
    place = {path: index for index, path in enumerate(paths)}
    inner = {path[:-1] for path in paths[1:]}
    levels = [[path for path in paths if len(path) == depth] for depth in range(shape.depth + 1)]
    frontiers = [[path for path in level if path in inner] for level in levels[:-1]]
    order = {path: index for index, path in enumerate(path for frontier in frontiers for path in frontier)}

    def index(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    skeleton = Skeleton(
        parents=(0, *(place[path[:-1]] for path in paths[1:])), probs_row=(0, *(order[path[:-1]] for path in paths[1:])),
    )  # fmt: skip
    feeding = index([place[path] for path in order])
    whole = skeleton_mask(skeleton, device)[feeding][:, feeding]  # [F, F] of all nodes that are ever fed
    stages, fed_before = [], 0
    for depth, frontier in enumerate(frontiers):
        above = frontiers[depth - 1] if depth else []
        stages.append(
            Level(
                nodes=index([levels[depth].index(path) for path in frontier]),
                parent=index([above.index(path[:-1]) if depth else 0 for path in frontier]),
                slot=index([frontier.index(path[:-1]) for path in levels[depth + 1]]),
                rank=index([path[-1] for path in levels[depth + 1]]),
                width=max(path[-1] for path in levels[depth + 1]) + 1,
                mask=whole[fed_before : fed_before + len(frontier), : fed_before + len(frontier)],
            )
        )
        fed_before += len(frontier)
    return tuple(stages), skeleton, index([*skeleton.parents]), feeding, index([*skeleton.probs_row])
