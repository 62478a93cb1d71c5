"""Drafting on hidden states alone, with tokens injected behind them (Chen et al., 2026, arXiv:2602.21224).

A small attention layer f continues the target's last hidden states: h'[t+1] = f(h[..t]), h'[t+2] = f(h[..t], h'[t+1]), and so on. No
token enters f. A node's logits are U h' + W2 W1[y], y the token above it. So the states of a round are the same whatever
tokens are drawn, and when a token is rejected those of the positions behind it stay useful: with the token that the target put in
its place they give new candidates at no call of f, which the next round verifies beside its own.
B rows, T time, K levels, W nodes, N and M nodes of two trees, D hidden, r rank, V vocabulary, Vd draft vocabulary, d head size, S cache
slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.errors import UserError
from drafttrain.core.layers import RMSNorm, document_bias, repeat_heads, unrolled_attention
from drafttrain.core.losses import LossMix, ScoringLayer, guesses
from drafttrain.core.packed import linear
from drafttrain.core.plan import Dynamic, Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed, Features, TrainingBatch
from drafttrain.drafters.base import CATCH_UP, DrafterConfig, DrafterState, Loss, bare_forward, distilled, state_distance
from drafttrain.drafters.block import BlockLayer
from drafttrain.drafters.grow import Frontier, grow
from drafttrain.drafters.output import FullHead, OutputConfig, OutputDrafter, OutputHead
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead
from drafttrain.target.rope import target_rotary

Drafted = Callable[[Callable[[int], Tensor], Plan], Tree]
"""(a level's state [B, 1, D], plan) -> a tree."""


class HiddenArConfig(DrafterConfig):
    """One attention layer over hidden states, and what tokens add behind it."""

    name: Literal["hidden_ar"] = "hidden_ar"
    steps: int = Field(default=5, ge=1, le=64)
    """States that training unrolls (K), the deepest tree it can draft."""
    rank: int = Field(default=256, ge=1)
    """Rank of what the token above a node adds to its logits."""
    reuse: bool = True
    """Best-first trees hold candidates from the states that the last round left beyond its rejected token; they cost no call of the layer.
    Trees of fixed shapes, and so drawn tokens, never do."""
    reuse_discount: float = Field(default=0.5, gt=0, le=1)
    """What the path probabilities of such candidates are multiplied with: their states were guessed from an older text."""
    regression: float = Field(default=0.1, ge=0)
    """Weight of the smooth L1 distance between guessed and true states."""
    step_decay: float = Field(default=0.8, gt=0, le=1)
    """Step k's loss weighs `step_decay ** k`."""
    loss: LossMix = LossMix()
    """What each step learns from the target's distribution."""
    intermediate_size: int | None = Field(default=None, ge=1)
    """Width of the gated MLP; None: the target's."""
    output: OutputConfig = FullHead()
    """What turns states into logits: the target's own matrix, some rows of it, or one of low rank."""
    loss_chunk: int = Field(default=1024, ge=1)
    """Labels whose [V] logits stand in memory at once."""

    @property
    def max_depth(self) -> int:
        return self.steps


class InjectedLayer(NamedTuple):
    """An output layer that also reads what the token above adds: states [..., D + r] -> logits [..., Vd]."""

    output: ScoringLayer
    up: Tensor  # [Vd, r]

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return *self.output.parameters, self.up

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D + r] -> [..., Vd]."""
        rank = self.up.shape[1]
        own = self.output.logits(hidden[..., :-rank])
        return own + linear(hidden[..., -rank:].to(self.up.dtype), self.up)

    def guesses(self, hidden: Tensor, vocab: Tensor | None, chunk: int) -> Tensor:
        """See `ScoringLayer.guesses`."""
        return guesses(self, hidden, vocab, chunk)


@dataclass
class KeptStates:
    """The states that a round guessed, each tied to the position that it was guessed for."""

    states: Tensor  # [B, K, D]
    first: Tensor  # [B] position of the first
    count: Tensor  # [B] how many there are

    @classmethod
    def none(cls, state: Tensor) -> KeptStates:
        """state: [B, D] of any content."""
        zeros = torch.zeros(len(state), dtype=torch.long, device=state.device)
        return cls(state[:, None][:, :0], zeros, zeros)

    def select(self, rows: Tensor) -> KeptStates:
        return KeptStates(self.states[rows], self.first[rows], self.count[rows])

    def join(self, other: KeptStates) -> KeptStates:
        most = max(self.states.shape[1], other.states.shape[1])
        states = [F.pad(part, (0, 0, 0, most - part.shape[1])) for part in (self.states, other.states)]
        return KeptStates(torch.cat(states), torch.cat([self.first, other.first]), torch.cat([self.count, other.count]))

    def beyond(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """From each row's `position` [B] on: states [B, K, D], and how many of them there are, [B]."""
        passed = position - self.first
        order = torch.arange(self.states.shape[1], device=position.device)
        index = (passed[:, None] + order).clamp(0, max(len(order) - 1, 0))
        left = (self.count - passed).clamp_min(0)
        return self.states.gather(1, index[..., None].expand(-1, -1, self.states.shape[2])), left


@dataclass
class HiddenArState(DrafterState):
    """The layer's cache over committed states, what follows the newest of them, and what the last round guessed."""

    head: TargetHead
    keys: Tensor  # [B, Hkv, S, d]
    values: Tensor  # [B, Hkv, S, d]
    lengths: Tensor  # [B] committed tokens; the root is not among them
    next: Tensor  # [B, D] the guessed state of the root
    kept: KeptStates

    def select(self, rows: Tensor) -> HiddenArState:
        kept = self.kept.select(rows)
        return HiddenArState(self.head, self.keys[rows], self.values[rows], self.lengths[rows], self.next[rows], kept)

    def join(self, other: DrafterState) -> HiddenArState:
        assert isinstance(other, HiddenArState)
        slots = max(self.keys.shape[2], other.keys.shape[2])

        def stacked(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([F.pad(part, (0, 0, 0, slots - part.shape[2])) for part in (ours, theirs)])

        keys, values = stacked(self.keys, other.keys), stacked(self.values, other.values)
        lengths, following = torch.cat([self.lengths, other.lengths]), torch.cat([self.next, other.next])
        return HiddenArState(self.head, keys, values, lengths, following, self.kept.join(other.kept))


class HiddenAr(OutputDrafter):
    """Drafts on hidden states; see the module."""

    Config = HiddenArConfig
    config: HiddenArConfig
    needs = frozenset({"last_hidden_state"})

    def __init__(self, config: HiddenArConfig, target: TargetShape) -> None:
        super().__init__(config, target)
        size, known = target.hidden_size, target.text_config
        eps = float(known.get("rms_norm_eps") or 1e-5)
        query_heads = int(known["num_attention_heads"])
        kv_heads = int(known.get("num_key_value_heads") or query_heads)
        self.head_dim = int(known.get("head_dim") or size // query_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise UserError(
                f"drafter hidden_ar turns numbers in pairs, and the target's attention heads have {self.head_dim}; use another family here"
            )
        inner = config.intermediate_size or int(known.get("intermediate_size") or 4 * size)
        self.groups = query_heads // kv_heads
        self.layer = BlockLayer(size, inner, query_heads, kv_heads, self.head_dim, eps, qk_norm=False, conv_group=None)
        self.norm = RMSNorm(size, eps)
        self.output = OutputHead(config.output, target)
        draft_size = target.vocab_size if self.draft_ids is None else len(self.draft_ids)
        self.token_down = nn.Embedding(target.vocab_size, config.rank)
        self.token_up = nn.Linear(config.rank, draft_size, bias=False)
        nn.init.normal_(self.token_down.weight, std=0.02)
        nn.init.zeros_(self.token_up.weight)  # a fresh one adds nothing
        self.rotary = target_rotary(target, self.head_dim)

    @torch.no_grad()
    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        """Layer, norm and output from the target's last ones, where they fit."""
        self.output.start_from(head, counts)
        head.start_norm(self.norm)
        head.start_layer(self.layer, self.target.num_layers - 1)

    # -- training ---------------------------------------------------------------------------------------------------------------------

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        labels = batch.labels()
        above = self.token_down(labels.before(batch.tokens, 1))  # [R, r] of the token before each label, at every step
        hidden = [labels.before(state, step + 2) for step, state in enumerate(self._unrolled(batch, self.config.steps))]
        injected = [torch.cat([state, above.to(state.dtype)], -1) for state in hidden]
        config = self.config
        loss = distilled(
            batch, labels, injected, [self._layer(head)], head, config.loss, self.draft_ids, config.loss_chunk, decay=config.step_decay
        )
        if not config.regression:
            return loss
        distance = state_distance(batch, labels, hidden, decay=config.step_decay)
        return replace(loss, sum=loss.sum + config.regression * distance)

    def _unrolled(self, batch: TrainingBatch, steps: int) -> Iterator[Tensor]:
        """The guessed states [B, T, D] at draft step 0, 1, .., every row a start of its own."""
        states = batch.features["last_hidden_state"].to(self.norm.weight.dtype)
        bias = document_bias(batch.document, states.dtype)
        shared: tuple[Tensor, ...] = ()  # keys and values of the true states, which all rows share
        own: tuple[Tensor, ...] = ()  # of the guessed ones, which they don't
        for step in range(steps):
            x, turned = self.layer.enter(states), self.rotary(batch.position + step)
            query = self.layer.queries(x, *turned)
            pair = tuple(repeat_heads(part, self.groups) for part in self.layer.keys_and_values(x, *turned))
            shared, own = (shared, (*own, *pair)) if step else (pair, own)
            mixed = unrolled_attention(query, *shared, bias.to(query.dtype), *own)
            states = self.norm(self.layer.finish(states, mixed))
            yield states

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        for step, states in enumerate(self._unrolled(batch, min(steps, self.config.steps))):
            above = self.token_down(batch.ahead(step + 1)[0])
            yield torch.cat([states, above.to(states.dtype)], -1)

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        return self._layer(head).logits(states)

    @torch.no_grad()
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        drafts = torch.full((*batch.tokens.shape, length), -1, device=batch.tokens.device)  # deeper than the steps: never right
        layer = self._layer(head)
        for step, states in enumerate(self.teacher_forced_states(batch, head, length)):
            drafts[..., step] = layer.guesses(states, self.draft_ids, self.config.loss_chunk)
        return drafts

    def _layer(self, head: TargetHead) -> InjectedLayer:
        return InjectedLayer(self.output.layer(head), self.token_up.weight)

    # -- decoding ---------------------------------------------------------------------------------------------------------------------

    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> HiddenArState:
        B, size = len(prompts), self.target.hidden_size
        kv_heads, dtype = self.layer.kv_heads, self.norm.weight.dtype
        keys = torch.zeros(B, kv_heads, capacity + CATCH_UP + self.config.steps, self.head_dim, device=prompts.device, dtype=dtype)
        following = keys.new_zeros(B, size)
        state = HiddenArState(head, keys, torch.zeros_like(keys), torch.zeros_like(lengths), following, KeptStates.none(following))
        self._read(state, features["last_hidden_state"], lengths)
        return state

    def observe(self, state: DrafterState, committed: Committed) -> None:
        assert isinstance(state, HiddenArState)
        self._read(state, committed.features["last_hidden_state"], committed.count)

    def _read(self, state: HiddenArState, true: Tensor, count: Tensor) -> None:
        """True states [B, T, D], of which `count` [B] are real, behind those in the cache."""
        slots = state.lengths[:, None] + torch.arange(true.shape[1], device=true.device)
        guessed = self._run(state, true.to(state.keys.dtype), slots)
        row = torch.arange(len(count), device=count.device)
        newest = guessed[row, (count - 1).clamp_min(0)]
        state.next = torch.where((count > 0)[:, None], newest, state.next)
        state.lengths = state.lengths + count

    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        assert isinstance(state, HiddenArState)
        guessed = [state.next[:, None]]  # [B, 1, D] level by level

        def level_state(level: int) -> Tensor:
            if level == len(guessed):
                slots = state.lengths[:, None] + (level - 1)
                guessed.append(self._run(state, guessed[-1], slots))
            return guessed[level]

        def injected(own: Tensor, tokens: Tensor) -> Tensor:
            above = self.token_down(tokens).to(own.dtype)
            return torch.cat([own.expand(-1, tokens.shape[1], -1), above], -1)

        def drafted(own_state: Callable[[int], Tensor], plan: Plan) -> Tree:
            states: list[Tensor] = []

            def step(frontier: Frontier) -> Tensor:
                states.append(injected(own_state(frontier.level), frontier.tokens))
                return self._logits(states[-1], state.head)

            return grow(step, roots, plan, sampling, rng, self.draft_ids, self.target.vocab_size, states).tree

        tree = drafted(level_state, plan)
        if not (self.config.reuse and isinstance(plan.shape, Dynamic)):
            return tree
        tree = self._with_kept(state, tree, plan, drafted)
        count = torch.full_like(state.lengths, len(guessed))
        state.kept = KeptStates(torch.cat(guessed, 1), state.lengths, count)
        return tree

    def _with_kept(self, state: HiddenArState, tree: Tree, plan: Plan, drafted: Drafted) -> Tree:
        """The tree with candidates from the states that the last round left, where these are likelier than its own last ones."""
        assert isinstance(plan.shape, Dynamic)
        levels = min(plan.shape.depth, state.kept.states.shape[1] - 1)  # the first one's token is committed: that of the root
        if levels < 1:
            return tree
        kept, left = state.kept.beyond(state.lengths)

        def ended(level: int, logits: Tensor) -> Tensor:
            return left <= level

        shape = plan.shape.model_copy(update={"depth": levels})
        more = drafted(lambda level: kept[:, level, None], replace(plan, shape=shape, stop=ended, enough=None))
        return fused(tree, more, plan.shape.nodes, self.config.reuse_discount)

    @bare_forward
    def _run(self, state: HiddenArState, states: Tensor, slots: Tensor) -> Tensor:
        """The layer over states [B, T, D] written at `slots` [B, T], each of which sees what stands up to it -> the next ones [B, T, D]."""
        self.calls += 1
        turned = self.rotary(slots)
        x = self.layer.enter(states)
        key, value = self.layer.keys_and_values(x, *turned)
        row = torch.arange(len(slots), device=slots.device)[:, None]
        state.keys[row, :, slots] = key.transpose(1, 2)  # indexed: [B, T, Hkv, d]
        state.values[row, :, slots] = value.transpose(1, 2)
        seen = torch.arange(state.keys.shape[2], device=slots.device) <= slots[..., None]  # [B, T, S]
        keys, values = repeat_heads(state.keys, self.groups), repeat_heads(state.values, self.groups)
        mixed = F.scaled_dot_product_attention(self.layer.queries(x, *turned), keys, values, attn_mask=seen[:, None])
        return self.norm(self.layer.finish(states, mixed))

    @bare_forward
    def _logits(self, states: Tensor, head: TargetHead) -> Tensor:
        return self._layer(head).logits(states)


def fused(tree: Tree, more: Tree, nodes: int, discount: float) -> Tree:
    """The likeliest `nodes` nodes of two trees below the same roots, those of the second at `discount`; paths that both hold count once.

    tree: [B, N]; more: [B, M].
    """
    assert tree.path_prob is not None and more.path_prob is not None, "best-first trees say how likely paths are"
    N, M = tree.tokens.shape[1], more.tokens.shape[1]
    own = torch.arange(N - 1, N - 1 + M, device=tree.tokens.device).expand_as(more.tokens)  # its root's number is unused
    match = torch.where(own == N - 1, 0, own)
    for _ in range(more.max_depth):  # a node is one of the tree's if its parent is and the tokens are the same
        above = match.gather(1, more.parents)
        same = (tree.tokens[:, None] == more.tokens[..., None]) & (tree.parents[:, None] == above[..., None]) & tree.live[:, None]
        same[:, :, 0] = False
        match = torch.where(same.any(-1), same.long().argmax(-1), own)
        match[:, 0] = 0
    new = (more.live & (match >= N))[:, 1:]
    parents = torch.cat([tree.parents, match.gather(1, more.parents)[:, 1:]], 1)
    tokens = torch.cat([tree.tokens, more.tokens[:, 1:]], 1)
    live = torch.cat([tree.live, new], 1)
    path_prob = torch.cat([tree.path_prob, discount * more.path_prob[:, 1:]], 1).masked_fill(~live, -1.0)
    for _ in range(more.max_depth):  # no path is likelier than what it begins with
        path_prob = torch.minimum(path_prob, path_prob.gather(1, parents))
    best = path_prob.sort(dim=1, descending=True, stable=True).indices[:, : nodes + 1].sort(dim=1).values  # parents before children
    live = live.gather(1, best)
    probs, states = both(tree.draft_probs, more.draft_probs), both(tree.draft_states, more.draft_states)
    probs_row: Tensor | None = None
    recorded = tree.draft_states if tree.draft_probs is None else tree.draft_probs
    if recorded is not None and tree.probs_row is not None and more.probs_row is not None:
        probs_row = torch.cat([tree.probs_row, recorded.shape[1] + more.probs_row[:, 1:]], 1).gather(1, best)
    return Tree(
        tokens.gather(1, best),
        torch.searchsorted(best, parents.gather(1, best)).masked_fill(~live, 0),
        live,
        "deterministic",
        max_depth=max(tree.max_depth, more.max_depth),
        max_children=tree.max_children + more.max_children,
        draft_probs=probs,
        probs_row=probs_row,
        path_prob=path_prob.gather(1, best).clamp_min(0),
        draft_states=states,
    )


def both(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
    """What two trees [B, .., X] recorded, one behind the other."""
    return None if ours is None or theirs is None else torch.cat([ours, theirs], 1)
