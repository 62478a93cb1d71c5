"""Reflective verification (Think Before You Accept: Wang et al., 2025, arXiv:2505.18629): the frozen target reads the draft, a prompt to
reflect, and a copy of the draft in the same forward. What it says at the copy is mixed into the distribution that verifies. LOSSY.

    committed text | root, draft | R | root, draft again            one forward; only accepted nodes of the first draft are ever kept
    l = (1 - alpha) l_first + alpha l_copy                          logits of a node: at the node, and at its copy

R is the L tokens of the reflection prompt; the root's copy before the draft's is the paper's position prefix (s) of one token. In a tree R
sees every live node, and so does the copy, whose nodes see R and the copies above them. Nodes of the first draft see nothing of what
follows, so l_first is what it would be alone. The inner lossless rule decides, with softmax(l) as p. The distribution depends on the draft:
there is no fixed distribution to be lossless against, and copying itself raises acceptance. B rows, N nodes, M = N + L + N.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Shape
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Layout, Topology, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.target.adapter import Target
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.lossy import Inner, check_inner, lossless_rule


class ReflectiveConfig(RuleConfig):
    """A higher alpha trusts the second look more."""

    name: Literal["reflective"] = "reflective"
    alpha: float = Field(default=0.2, ge=0, le=1)
    """Weight of the logits at the copy. 0 turns the rule off: nothing is appended, and the inner rule decides alone."""
    prompt: str | tuple[int, ...] = "[BACK]"
    """What comes between the draft and its copy: a text, or token ids."""
    inner: Inner = "auto"
    """The lossless rule that decides with the mixed distribution."""

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if not prompt:
            raise ValueError("the reflection prompt is empty; give a text, or token ids")
        return prompt


class Reflective(Rule):
    """Any tree that the inner rule takes. A round scores 2 N + L tokens instead of N."""

    Config = ReflectiveConfig
    config: ReflectiveConfig
    lossless = False
    accepts = ANY

    def __init__(self, config: RuleConfig) -> None:
        super().__init__(config)
        self.reflection = torch.zeros(0, dtype=torch.long)  # [L]; known after `prepare`

    def check(self, topology: Topology, draws: Draws, sampling: Sampling) -> None:
        super().check(topology, draws, sampling)
        check_inner(self.config.inner, topology, draws, sampling)

    def prepare(self, target: Target) -> None:
        if self.config.alpha > 0:
            self.reflection = torch.tensor(prompt_ids(self.config.prompt, target), dtype=torch.long, device=target.device)

    def slots(self, shape: Shape) -> int:
        return len(self.reflection) + shape.nodes + 1 if self.config.alpha > 0 else 0

    def layout(self, tree: Tree) -> Layout:
        if self.config.alpha == 0:
            return tree.layout()
        B, N = tree.tokens.shape
        L, device = len(self.reflection), tree.tokens.device
        reflection = torch.arange(L, device=device)
        depth = torch.cat([tree.depth, (tree.max_depth + 1 + reflection).expand(B, L), tree.max_depth + 1 + L + tree.depth], 1)  # [B, M]
        mask = torch.zeros(B, 2 * N + L, 2 * N + L, dtype=torch.bool, device=device)
        mask[:, :N, :N] = tree.ancestors
        mask[:, N:, :N] = tree.live[:, None, :]
        mask[:, N : N + L, N : N + L] = reflection[:, None] >= reflection
        mask[:, N + L :, N : N + L] = True
        mask[:, N + L :, N + L :] = tree.ancestors
        return Layout(torch.cat([tree.tokens, self.reflection.expand(B, L), tree.tokens], 1), depth, mask)

    def readings(self, nodes: int) -> tuple[slice, ...]:
        return (slice(0, nodes),) if self.config.alpha == 0 else (slice(0, nodes), slice(-nodes, None))

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        inner = lossless_rule(self.config.inner, tree, scored)
        if self.config.alpha == 0:
            return inner(tree, scored, rng)
        N = tree.tokens.shape[1]
        logits = mixed(scored.logits[:, :N], scored.logits[:, -N:], self.config.alpha)
        features = {name: value[:, :N] for name, value in scored.features.items()}
        return inner(tree, Scored(logits, scored.sampling, features), rng)


def mixed(first: Tensor, copy: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) first + alpha copy, in fp32: [..., V], [..., V] -> [..., V]."""
    never = torch.isneginf(first) | torch.isneginf(copy)  # forbidden by a logits processor, which 0 * -inf would make NaN
    return ((1 - alpha) * first.float() + alpha * copy.float()).masked_fill(never, float("-inf"))


def prompt_ids(prompt: str | tuple[int, ...], target: Target) -> list[int]:
    """The reflection prompt in the target's tokens, or a `UserError` where it has none."""
    if isinstance(prompt, str):
        if target.tokenizer is None:
            raise UserError("rule 'reflective': this target has no tokenizer; give runtime.rule.prompt as token ids")
        ids = list(target.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError(f"rule 'reflective': the prompt {prompt!r} has no tokens; give another")
        return ids
    V = target.vocab_size
    if not all(0 <= token < V for token in prompt):
        raise UserError(f"rule 'reflective': prompt {list(prompt)} holds ids outside of the target's vocabulary (0 to {V - 1})")
    return list(prompt)
