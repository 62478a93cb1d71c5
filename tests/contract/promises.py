"""What a family promises about its distributions, as checks that raise `AssertionError`: every family is held to them, and so are families
that are wrong on purpose. B rows, T time, K draft steps, V vocabulary, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import chisquare
from torch import Tensor

from drafttrain.core.plan import Chain, Plan, Shape
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree
from drafttrain.core.types import TrainingBatch
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target

WARM = Sampling(temperature=1.0)
ROWS = 4000
LEAST_P = 1e-4
"""A right family fails one test of 10,000 seeds; these seeds are fixed."""


def check_training_alpha(drafter: Drafter, batch: TrainingBatch, target: Target) -> int:
    """Training's alpha_k are the hits of the family's own teacher-forced drafts at the labels; returns how many K there are.

    A family counts all labels that its step reaches, or those below the roots that decoding can have, which are answer tokens.
    """
    with torch.no_grad():
        metrics = drafter.loss(batch, target.head).metrics
        steps = [name for name in metrics if name.startswith("alpha_") and not name.endswith("_count")]
        drafts = drafter.teacher_forced_drafts(batch, target.head, len(steps))  # [B, T, K]
    labels = batch.labels()
    for step in range(len(steps)):
        reaches = labels.reaches(step + 2)  # draft k at t is of token t + k + 2
        answered = reaches & labels.before(batch.mask, step + 1)
        right = labels.before(drafts[..., step], step + 2) == labels.tokens
        count, hits = int(metrics[f"alpha_{step}_count"]), int(metrics[f"alpha_{step}"])
        counted = {int(some.sum()): int((right & some).sum()) for some in (reaches, answered)}
        assert count in counted, f"alpha_{step} counts other labels: {count}, not {sorted(counted)}"
        assert hits == counted[count], f"alpha_{step} counts other drafts"
    return len(steps)


def check_sampled_texts(drafter: Drafter, target: Target, shape: Shape, draws: Draws, prompt: list[int], seed: int = 5) -> float:
    """The p-value of three sampled tokens after a prompt, against the target's own distribution, over `ROWS` rows of the whole loop."""
    decoder = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=shape, draws=draws))
    texts = decoder.generate(prompt, max_new_tokens=3, temperature=1.0, n=ROWS, batch_size=ROWS, seed=seed)
    assert sum(one.statistics.rounds for one in texts) < sum(one.statistics.tokens for one in texts), "nothing was accepted"
    V = target.vocab_size
    seen = np.zeros((V, V, V))
    np.add.at(seen, tuple(np.array([one.tokens for one in texts]).T), 1)
    expected = ROWS * own_distribution(target, prompt)
    often = expected >= 5  # the rest counts as one cell
    cells, due = (np.append(part[often], part[~often].sum()) for part in (seen, expected))
    p_value = float(chisquare(cells, due).pvalue)
    assert p_value > LEAST_P, f"p = {p_value:.1e}"
    return p_value


def own_distribution(target: Target, prompt: list[int]) -> np.ndarray:
    """[V, V, V] of the three tokens after a prompt, by plain forwards."""
    V = target.vocab_size
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # [V * V, 2]
    texts = torch.cat([torch.tensor([prompt]).expand(len(pairs), -1), pairs], 1)
    with torch.no_grad():
        probs = target.model(texts).logits[:, -3:].double().softmax(-1).view(V, V, 3, V)
    first, second, third = probs[0, 0, 0], probs[:, 0, 1], probs[:, :, 2]
    joint: np.ndarray = (first[:, None, None] * second[:, :, None] * third).numpy()
    return joint


def check_node_distributions(drafter: Drafter, target: Target, shape: Shape, prompts: list[list[int]]) -> int:
    """Each node's distribution is that of its path drafted as a chain; returns how many paths were drafted.

    Rows have unequal prompts. The chain is drafted with `iid` draws from an `rng` that hands out the path's tokens.
    """
    tree = proposed(drafter, target, prompts, Plan(shape, "deterministic", record_probs=True), SeededRng(0, torch.arange(len(prompts))))
    paths = {}  # of tokens below the root, the same ranks in each row
    for node in range(1, tree.tokens.shape[1]):
        path, length = tree.path_to(torch.full((len(prompts),), node))
        for depth in sorted(set(length.tolist())):
            rows = (length == depth) & tree.live[:, node]
            paths[node, depth] = rows, path[:, :depth]
    for (node, depth), (rows, path) in paths.items():
        tokens = tree.tokens.gather(1, path)  # [B, depth]
        told = Told(draft_columns(drafter, tokens))
        chain = proposed(drafter, target, prompts, Plan(Chain(length=depth), "iid"), told)
        assert torch.equal(chain.tokens[:, 1:][rows], tokens[rows])
        ours = tree.draft_probs_at(torch.full((len(prompts),), node))[rows]
        along = chain.draft_probs_at(torch.full((len(prompts),), depth))[rows]
        gap = float((ours - along).abs().max())
        assert gap < 1e-5, f"node {node} of depth {depth}: another distribution than its path's as a chain, by {gap:.1e}"
    return len(paths)


def proposed(drafter: Drafter, target: Target, prompts: list[list[int]], plan: Plan, rng: Any) -> Tree:
    """The first round's tree below the root 7 of each row, from a new state."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    position = torch.arange(padded.shape[1]).expand_as(padded)
    features = target.encode(padded, position, torch.zeros_like(padded), drafter.needs)
    with torch.inference_mode():
        state = drafter.begin(padded, lengths, features, target.head, 64)
        return drafter.propose(state, torch.full_like(lengths, 7), plan, WARM, rng)


def draft_columns(drafter: Drafter, tokens: Tensor) -> Tensor:
    """Target ids as ids of the draft vocabulary; tokens outside of it, which only dead nodes have, as any."""
    if drafter.draft_ids is None:
        return tokens
    return torch.searchsorted(drafter.draft_ids, tokens).clamp_max(len(drafter.draft_ids) - 1)


@dataclass
class Told:
    """An `Rng` that draws what it is told, level by level."""

    tokens: Tensor  # [B, K] ids of the draft vocabulary
    level: int = field(default=0, init=False)

    def substream(self, number: int) -> None:
        raise AssertionError("drafting begins no stream")

    def bernoulli(self, p: Tensor) -> Tensor:
        raise AssertionError("drafting throws no coins")

    def draw(self, probs: Tensor, k: int, replace: bool) -> Tensor:
        """[B, 1, Vd] -> [B, 1, 1], or [B, K, 1] where a family draws its levels in one call."""
        W = probs.shape[1]
        drawn = self.tokens[:, self.level : self.level + W, None]
        self.level += W
        assert k == 1 and drawn.shape[1] == W
        return drawn
