"""Several drafters in one loop: a router chooses one for each row and round, or none.

Every drafter has a state of every row. One that no row chose only takes note of what was committed (`observe`), and reads it with its next
proposal, in one call. In a batch whose rows chose differently, each chosen drafter proposes for all rows and the row takes the tree it
wants: nothing is copied between states. Which drafter is asked hangs on rounds that are over, so every lossless rule stays exact. The host
makes the choices, so that a round waits for it more than once.

B rows, N nodes, T committed tokens, A arms (the drafters, then plain decoding), V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.core.plan import Plan, Shape
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree, root_only
from drafttrain.core.types import Committed, Scored
from drafttrain.drafters.base import Drafter, DrafterState
from drafttrain.drafters.pool import DrafterPool
from drafttrain.runtime.classifier import mean_states
from drafttrain.runtime.proposer import Prompts, Proposer, begun
from drafttrain.runtime.router import RoundOutcome, Router, Trail
from drafttrain.runtime.rows import CutVerdict, Rows
from drafttrain.runtime.stats import Statistics
from drafttrain.target.cache import TreeCache

PLAIN = "plain"
"""What statistics call rounds without a drafter."""


class Routed(Proposer):
    """A pool of drafters and each row's router."""

    def __init__(
        self, pool: DrafterPool, router_of: Callable[[int], Router], treat_as: Draws | None = None, reads_prompt: bool = False
    ) -> None:
        """router_of: the router of a fresh row, by the number of its random stream; rows may share one. reads_prompt: routers see each
        row's prompt."""
        super().__init__()
        self.reads_prompt = reads_prompt
        self.pool, self.router_of, self.treat_as = pool, router_of, treat_as
        self.members = pool.members
        self.needs = pool.needs | {"last_hidden_state"} if reads_prompt else pool.needs
        self.labels = (*pool.labels, PLAIN)
        self.states: list[DrafterState] = []  # of each drafter
        self.routers: list[Router] = []  # [B]
        self.trails: list[Trail] = []  # [B]
        self.arms: list[int] = []  # [B] of the round that runs
        self.missed = [0] * len(self.members)  # tokens that each drafter has noted and not read
        self.plan: Plan
        self.sampling: Sampling
        self.by_drafter: dict[str, Counter[str]] = {label: Counter() for label in pool.labels}

    @property
    def drafters(self) -> Sequence[Drafter]:
        return self.members

    @property
    def plain(self) -> int:
        """The arm of plain decoding."""
        return len(self.members)

    @property
    def counts(self) -> Statistics:
        """Calls, catch-ups and memory drafter by drafter."""
        return Statistics(by_drafter={label: dict(counts) for label, counts in self.by_drafter.items()})

    @counts.setter
    def counts(self, value: Statistics) -> None:
        """It counts in `by_drafter`."""

    def fresh(self) -> Routed:
        return Routed(self.pool, self.router_of, self.treat_as, self.reads_prompt)

    def begin(self, prompts: Prompts) -> None:
        self.states = []
        for place, drafter in enumerate(self.members):
            with self._counting(place):
                self.states.append(begun(drafter, prompts))
        self.routers = [self.router_of(stream) for stream in prompts.streams]
        if self.reads_prompt:
            for router, state in zip(self.routers, mean_states(prompts.features["last_hidden_state"], prompts.lengths), strict=True):
                router.read(state)
        self.trails = [Trail() for _ in prompts.streams]
        self.missed = [0] * len(self.members)
        self._weigh()

    # -- a round ----------------------------------------------------------------------------------------------------------------------

    def propose(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        self.plan, self.sampling = plan, sampling
        self.arms = [
            router.choose() if goes_on and plan.draft else self.plain
            for router, goes_on in zip(self.routers, rows.going, strict=True)
        ]  # fmt: skip
        rows.arms = self.arms
        everyone = torch.arange(len(rows), device=rows.roots.device)
        trees: dict[int, Tree] = {}
        for place in sorted({*self.arms} - {self.plain}):
            with self._counting(place):
                rng = rows.rng.select(everyone)  # each from the same place: only one of a row's trees is used
                limited = replace(plan, left=rows.left)
                trees[place] = self.members[place].propose(self.states[place], rows.roots, limited, sampling, rng)
            self._caught_up(place)
        tree = picked(trees, self.arms, rows.roots)
        return tree if self.treat_as is None else replace(tree, draws=self.treat_as)

    def observe(self, committed: Committed, cut: CutVerdict, scored: Scored, tree: Tree) -> None:
        chosen = {arm for arm, goes_on in zip(self.arms, cut.count.tolist(), strict=True) if goes_on}
        scores: list[Tensor] = []
        for place, drafter in enumerate(self.members):
            noted = committed.only(drafter.needs)
            if chosen != {place}:  # some row's nodes are of another drafter's tree
                noted = replace(noted, nodes=None)
            with self._counting(place):
                if self._counterfactual:
                    scores.append(drafter.teacher_forced_logits(self.states[place], noted))
                else:
                    drafter.observe(self.states[place], noted)
                    self.missed[place] += committed.tokens.shape[1]
        self._learn(committed, cut, scored, tree, scores)

    @property
    def _counterfactual(self) -> bool:
        return any(router.counterfactual for router in self.routers)

    def _learn(self, committed: Committed, cut: CutVerdict, scored: Scored, tree: Tree, scores: list[Tensor]) -> None:
        """Tells each row's router what the round showed."""
        counts, accepted = cut.count.tolist(), cut.verdict.length.tolist()
        divergences = block_divergence(tree, scored).tolist()
        alignments = self._aligned(committed, cut, scored, scores) if scores else None
        for row, router in enumerate(self.routers):
            if not counts[row]:
                continue
            router.learn(RoundOutcome(self.arms[row], accepted[row], divergences[row]))
            if alignments is not None:
                for accept, realised in alignments[row][: counts[row]]:
                    router.reveal(self.trails[row], accept[: router.arms], realised[: router.arms])

    def _aligned(
        self, committed: Committed, cut: CutVerdict, scored: Scored, scores: Sequence[Tensor]
    ) -> list[list[tuple[list[float], list[float]]]]:
        """Of each row and committed token: g and w of every arm, plain decoding last."""
        assert committed.nodes is not None
        p = scored.probs_at(committed.nodes)  # [B, T, V]
        T = committed.tokens.shape[1]
        following = cut.tokens[:, :T]  # [B, T] what came after each committed token
        pairs = [alignment(p, logits, following, self.plan, self.sampling) for logits in scores]
        nothing = torch.zeros_like(p[..., 0])
        accept = torch.stack([pair[0] for pair in pairs] + [nothing], -1).tolist()  # [B, T, A]
        realised = torch.stack([pair[1] for pair in pairs] + [nothing], -1).tolist()
        return [list(zip(row_accept, row_realised, strict=True)) for row_accept, row_realised in zip(accept, realised, strict=True)]

    # -- rows -------------------------------------------------------------------------------------------------------------------------

    def set_lengths(self, lengths: list[int]) -> None:
        for state in self.states:
            state.set_lengths(lengths)

    def select(self, rows: Tensor) -> None:
        kept = rows.tolist()
        self.states = [state.select(rows) for state in self.states]
        self.routers, self.trails = [self.routers[row] for row in kept], [self.trails[row] for row in kept]

    def join(self, other: Proposer) -> None:
        assert isinstance(other, Routed)
        self.states = [mine.join(theirs) for mine, theirs in zip(self.states, other.states, strict=True)]
        self.routers, self.trails = self.routers + other.routers, self.trails + other.trails
        for label, counts in other.by_drafter.items():
            self.by_drafter[label] += counts
        self._weigh()

    # -- counting ---------------------------------------------------------------------------------------------------------------------

    def _counting(self, place: int) -> CallCounter:
        return CallCounter(self.members[place], self.by_drafter[self.pool.labels[place]])

    def _caught_up(self, place: int) -> None:
        """A drafter that was idle has read what it missed."""
        counts = self.by_drafter[self.pool.labels[place]]
        if self.missed[place] > self.plan.shape.depth + 1:  # more than its own round's
            counts["catch_ups"] += 1
            counts["caught_up"] += self.missed[place]
        self.missed[place] = 0

    def _weigh(self) -> None:
        for label, state in zip(self.pool.labels, self.states, strict=True):
            counts = self.by_drafter[label]
            counts["bytes"] = max(counts["bytes"], state_bytes(state))

    def slots(self, shape: Shape) -> int:
        return shape.depth + 1  # what an idle drafter notes is read behind the text's end


class CallCounter:
    """Forwards of one drafter inside the block."""

    def __init__(self, drafter: Drafter, counts: Counter[str]) -> None:
        self.drafter, self.counts, self.before = drafter, counts, 0

    def __enter__(self) -> None:
        self.before = self.drafter.calls

    def __exit__(self, *error: object) -> None:
        self.counts["calls"] += self.drafter.calls - self.before


def state_bytes(state: DrafterState) -> int:
    """What the tensors of a state take, those of its caches included."""
    total, waiting, seen = 0, [*vars(state).values()], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) and value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            total += value.nbytes
        elif isinstance(value, (list, tuple)):
            waiting += value
        elif isinstance(value, DrafterState):
            waiting += vars(value).values()
        elif isinstance(value, TreeCache):
            waiting += value.storage
    return total


def picked(trees: dict[int, Tree], arms: Sequence[int], roots: Tensor) -> Tree:
    """One tree a row, taken from the tree of the drafter that its arm names; the lone root where there is none. Rows of narrower trees are
    filled up with dead nodes."""
    if not trees:
        return root_only(roots)
    if len({*arms}) == 1:
        return next(iter(trees.values()))
    widest = max(trees.values(), key=lambda tree: tree.tokens.shape[1])
    B, N, device = len(arms), widest.tokens.shape[1], roots.device
    skeletons = {tree.skeleton for tree in trees.values()}
    skeleton = widest.skeleton if len(skeletons) == 1 else None
    filled = torch.zeros(B, N, dtype=torch.long, device=device)
    hung = filled if skeleton is None else widest.parents.clone()
    tokens, parents, live = filled.clone(), hung.clone(), filled.clone().bool()
    tokens[:, 0], live[:, 0] = roots, True
    recorded = [tree.draft_probs for tree in trees.values() if tree.draft_probs is not None]
    draft_probs = probs_row = None
    if recorded:
        V = recorded[0].shape[-1]
        most = max(probs.shape[1] for probs in recorded)
        draft_probs = recorded[0].new_full((B, most, V), 1 / V)  # of dead nodes: any distribution will do
        assert widest.probs_row is not None or skeleton is None
        probs_row = filled.clone() if skeleton is None or widest.probs_row is None else widest.probs_row.clone()
    for place, tree in trees.items():
        rows = torch.tensor([row for row, arm in enumerate(arms) if arm == place], device=device)
        n = tree.tokens.shape[1]
        tokens[rows, :n], parents[rows, :n], live[rows, :n] = tree.tokens[rows], tree.parents[rows], tree.live[rows]
        if draft_probs is not None and probs_row is not None and tree.draft_probs is not None and tree.probs_row is not None:
            draft_probs[rows, : tree.draft_probs.shape[1]] = tree.draft_probs[rows]
            probs_row[rows, :n] = tree.probs_row[rows]
    return Tree(
        tokens, parents, live, widest.draws, max_depth=max(tree.max_depth for tree in trees.values()),
        max_children=max(tree.max_children for tree in trees.values()), draft_probs=draft_probs, probs_row=probs_row, skeleton=skeleton,
    )  # fmt: skip


def alignment(p: Tensor, logits: Tensor, following: Tensor, plan: Plan, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """g and w, [B, T] each, of a drafter whose logits at committed tokens are [B, T, V]. p: [B, T, V] the target's distributions there;
    following: [B, T] the tokens that came. Of wider trees than a chain it is the first level's."""
    if plan.draws == "deterministic":
        top = logits.topk(min(first_width(plan.shape), logits.shape[-1]), -1)
        drafted = top.values > float("-inf")  # a lookup may find nothing
        accept = (p.gather(-1, top.indices) * drafted).sum(-1)
        realised = ((top.indices == following[..., None]) & drafted).any(-1).float()
        return accept, realised
    own = sampling if plan.temperature is None else sampling._replace(temperature=plan.temperature)
    q = own.probs(logits)
    came = following[..., None]
    ratio = q.gather(-1, came) / p.gather(-1, came).clamp_min(1e-30)
    return torch.minimum(p, q).sum(-1), ratio[..., 0].clamp_max(1.0)


def first_width(shape: Shape) -> int:
    """Nodes of a tree's first level."""
    if shape.shape == "chain":
        return 1
    if shape.shape == "dynamic":
        return shape.top_k
    return sum(len(path) == 1 for path in shape.paths)


def block_divergence(tree: Tree, scored: Scored) -> Tensor:
    """[B] mean over the levels of the first chain of sum min(p, q), where q is what the level's tokens were drawn from: for tokens chosen
    with certainty, the target's probability of any of them. 0 where nothing was drafted."""
    chain, live = tree.first_born()  # [B, K + 1]
    row = torch.arange(len(chain), device=chain.device)[:, None]
    above, reached = chain[:, :-1], live[:, 1:]
    if not above.shape[1]:
        return torch.zeros(len(chain), device=chain.device)
    p = scored.probs_at(above)  # [B, K, V]
    if tree.draws == "deterministic" or tree.draft_probs is None or tree.probs_row is None:
        children = tree.children[row, above]  # [B, K, C]
        tokens = tree.tokens[row[..., None], children.clamp_min(0)]
        share = (p.gather(-1, tokens) * (children >= 0)).sum(-1).clamp_max(1.0)
    else:
        q = tree.draft_probs[row, tree.probs_row[row, chain[:, 1:]]]
        share = torch.minimum(p, q).sum(-1)
    return (share * reached).sum(-1) / above.shape[1]
