"""What every drafter family is: a configuration, a loss, and a proposal.

A family is one file beside this one and one line in `DRAFTERS` (`drafters/__init__.py`). The loop owns the state; the module holds
none. Borrowed weights (the target's embedding and head) come in as `head` and never enter a state dict.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import ClassVar, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.config import Config
from drafttrain.core.counts import ThreadCount
from drafttrain.core.errors import UserError
from drafttrain.core.losses import LossMix, ScoringLayer, distill
from drafttrain.core.nodes import Nodes, to_nodes
from drafttrain.core.plan import Chain, Plan
from drafttrain.core.rng import Rng, SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree
from drafttrain.core.types import Committed, Features, Groups, Labels, TrainingBatch
from drafttrain.target.files import TargetShape
from drafttrain.target.head import TargetHead

CATCH_UP = 32
"""Committed tokens at most that an idle drafter lets wait, to read them in one call: its caches have room for so many more."""


class DrafterConfig(Config):
    """Base of the families' configurations; `name` is the key in `DRAFTERS`."""

    name: str

    @property
    def max_depth(self) -> int | None:
        """The deepest tree that a drafter of this configuration can draft; None where there is no bound."""
        return None

    def check_draws(self, draws: Draws) -> None:
        """A `UserError` where siblings drawn so would not stay exact with these options."""


@dataclass
class Loss:
    """One batch's loss, unreduced across processes: the loop divides `sum` by the global `count`."""

    sum: Tensor  # scalar
    count: Tensor  # scalar: what the sum is over, in labels as the family weighs them
    metrics: dict[str, Tensor] = field(default_factory=dict)  # `x` with `x_count`: the loop logs sum(x) / sum(x_count)


def distilled(
    batch: TrainingBatch, labels: Labels, hidden: Sequence[Tensor], output_layers: Sequence[ScoringLayer], head: TargetHead, mix: LossMix,
    vocab: Tensor | None, chunk: int, first_label: int = 2, decay: float = 1.0,
) -> Loss:
    """The loss of draft steps that all learn the target's distribution at the same labels, step k weighing `decay ** k` of it.

    hidden: each step's states [R, D], `first_label + k` tokens before the labels; the others as `core.losses.distill` takes them.
    """
    reaches = torch.stack([labels.reaches(first_label + step) for step in range(len(hidden))])  # [K, R]
    weight = decay ** torch.arange(len(hidden), device=reaches.device, dtype=torch.float32)
    teacher = labels.before(batch.features["last_hidden_state"], 1)  # the states that give the labels
    total, hits = distill(
        hidden, output_layers, reaches * (weight / weight.sum())[:, None], teacher, head, labels.tokens, mix, vocab, chunk
    )
    counts = reaches.sum(1).float()
    metrics: dict[str, Tensor] = {}
    for step, (right, count) in enumerate(zip(hits, counts, strict=True)):
        metrics |= {f"alpha_{step}": right, f"alpha_{step}_count": count}
    return Loss(total, counts[0], metrics)


def state_distance(batch: TrainingBatch, labels: Labels, hidden: Sequence[Tensor], first_label: int = 2, decay: float = 1.0) -> Tensor:
    """Smooth L1 distance between guessed states and the target's last ones, summed over the labels; step k weighs `decay ** k` of it.

    hidden: each step's states [R, D], as `distilled` takes them.
    """
    true = labels.before(batch.features["last_hidden_state"], 1).float()  # [R, D]
    weights = [decay**step for step in range(len(hidden))]
    total = torch.zeros((), device=true.device)
    for step, (states, weight) in enumerate(zip(hidden, weights, strict=True)):
        distance = F.smooth_l1_loss(states.float(), true, reduction="none").mean(-1) * labels.reaches(first_label + step)
        total = total + weight / sum(weights) * distance.sum()
    return total


class DrafterState(ABC):
    """One batch of rows as a drafter remembers them; what it holds is the family's own affair."""

    @abstractmethod
    def select(self, rows: Tensor) -> DrafterState:
        """Only these rows, in this order ([R] int64)."""

    @abstractmethod
    def join(self, other: DrafterState) -> DrafterState:
        """These rows followed by the other's."""

    def set_lengths(self, lengths: list[int]) -> None:  # noqa: B027
        """What the host has learnt of the rows' committed lengths; states with a cache bound their reads by it."""

    def set_groups(self, groups: Groups) -> None:  # noqa: B027
        """Said once, after `begin`: which rows are samples of one prompt. States of drafters that read siblings keep it, and `select` and
        `join` it as they do their rows."""


Params = ParamSpec("Params")
Result = TypeVar("Result")
AnyDrafter = TypeVar("AnyDrafter", bound="Drafter")


def bare_forward(
    method: Callable[Concatenate[AnyDrafter, Params], Result],
) -> Callable[Concatenate[AnyDrafter, Params], Result]:
    """Marks a method as model arithmetic without bookkeeping (layers and head; no masks, no growing): `evaluation` times it alone.

    While `drafter.watcher` is set, it gets every outermost marked call, done already, as a function that does it again: a
    second call must find the same shapes and leave the same result (writing the same cache slots is fine).
    """

    @wraps(method)
    def call(self: AnyDrafter, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        watcher, self.watcher = self.watcher, None  # marked calls inside belong to this one
        try:
            result = method(self, *args, **kwargs)
            if watcher is not None:
                watcher(partial(method, self, *args, **kwargs))
        finally:
            self.watcher = watcher
        return result

    return call


class Drafter(nn.Module, ABC):
    """Guesses the target's next tokens."""

    Config: ClassVar[type[DrafterConfig]]
    config: DrafterConfig
    needs: frozenset[str] = frozenset()  # features the target must hand over, decoding and training alike
    first_label: ClassVar[int] = 2  # the row of token t first predicts token t + first_label
    trainable: ClassVar[bool] = True  # False: no weights, `loss` and `start_from` are never called
    gives_draft_probs: bool = True  # the distributions that chose the tokens of `deterministic` trees can be recorded (`plan.record_probs`)
    draws: ClassVar[frozenset[str]] = frozenset({"deterministic", "iid", "without_replacement"})  # how it can draw siblings
    watcher: Callable[[Callable[[], object]], None] | None = None  # see `bare_forward`
    origin: str | None = None  # an existing model (folder or Hub id) that it begins as, which must have the target's tokenizer
    origin_rows: int = 0  # of that model's vocabulary
    weight_version = 0  # whoever changes the weights while decoding counts it up: the records of rounds name it
    files: Path | None = None  # the folder it was loaded from; `drafters.files.folder_fingerprint` tells drafters apart by it

    calls = ThreadCount()
    """Forwards while decoding, of this thread."""

    def __init__(self, config: DrafterConfig, target: TargetShape) -> None:
        super().__init__()
        self.config, self.target = config, target

    @property
    def max_depth(self) -> int | None:
        """The deepest tree it can draft; None where there is no bound."""
        return self.config.max_depth

    @property
    def draft_ids(self) -> Tensor | None:
        """[Vd] ascending target ids of the draft vocabulary; None where it is the target's own."""
        return None

    @property
    def teacher_needs(self) -> frozenset[str]:
        """Features that only `loss` reads; `last_hidden_state` wherever the teacher's distribution is."""
        return frozenset({"last_hidden_state"})

    def check_layers(self, aux_layers: Sequence[int]) -> None:
        """A `UserError` where the target's feature `aux_hidden_states` is of other layers than this was trained on."""
        trained = list(self.target.aux_layers)
        if "aux_hidden_states" in self.needs and list(aux_layers) != trained:
            raise UserError(
                f"this {self.config.name} drafter was trained on the target's layers {trained}, but this one hands over "
                f"{list(aux_layers)}; load it with aux_layers={trained} (target.aux_layers in recipes), or train a drafter on those"
            )

    def start_from(self, head: TargetHead, counts: Tensor) -> None:
        """Initialise from the frozen target before training.

        head: also reads the decoder layers that are wanted (`head.layer_weights`); counts: [V] how often each token stands in the
        training answers.
        """

    @property
    def reads_start_states(self) -> bool:
        """Whether `start_output` wants to see states of the target."""
        return False

    def start_output(self, head: TargetHead, counts: Tensor, states: Tensor) -> None:
        """Fit the output head to states [R, D] of the target (`last_hidden_state`) in the training answers; after `start_from`."""

    @abstractmethod
    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        """Sum of the losses over what the batch teaches, how much that was (the loop divides by this number, summed over all processes),
        and what to log.

        rng: the only source of randomness, one stream a row, so that two processes that share the rows draw what one would; None: the
        streams of seed 0.
        """

    @abstractmethod
    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        """Teacher-forced chains: [B, T, length], the drafter's greedy guesses for the `length` tokens that follow token t + 1.

        Guess k at t is what greedy drafting would propose at depth k + 1 in a round whose root is token t + 1, if the guesses before
        it were right. `runtime.replay` turns guesses into the accepted length that decoding would measure.
        """

    def teacher_forced_states(self, batch: TrainingBatch, head: TargetHead, steps: int) -> Iterator[Tensor]:
        """Teacher-forced states [B, T, D] at draft step 0, 1, ..., of which `readout` makes logits.

        Step k at t stands for the distribution of token t + k + 2 in a round whose root is token t + 1, if everything drafted before it
        was what the text says. Raises `UserError` where a family has no such states.
        """
        raise UserError(f"{self.config.name} drafters hand over no states to recompute their distributions from; use another family here")

    def readout(self, states: Tensor, level: int, head: TargetHead) -> Tensor:
        """States [..., D] of nodes at depth `level` (0 is the root's), from `teacher_forced_states` or `Tree.draft_states`, -> logits [...,
        Vd]."""
        raise UserError(f"{self.config.name} drafters hand over no states to recompute their distributions from; use another family here")

    @abstractmethod
    def begin(self, prompts: Tensor, lengths: Tensor, features: Features, head: TargetHead, capacity: int) -> DrafterState:
        """A state for rows whose prompts ([B, P], right-padded, lengths [B]) stand in the target's cache, with the features there.

        capacity: positions a row may reach at most (prompt, new tokens and one tree).
        """

    @abstractmethod
    def propose(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        """One tree a row, below `roots` ([B], the last committed tokens)."""

    def nodes(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> list[Nodes]:
        """The same trees on the host, for who merges them there: a family that finds them there hands them over as they are."""
        return to_nodes(self.propose(state, roots, plan, sampling, rng))

    @abstractmethod
    def observe(self, state: DrafterState, committed: Committed) -> None:
        """Learn what was committed: the root and the accepted nodes, with the target's features there.

        Rounds may pass without a proposal (the loop decoded plainly); what they commit is best read with the next one, in one call.
        """

    def teacher_forced_logits(self, state: DrafterState, committed: Committed) -> Tensor:
        """`observe`, and what it would have drafted on the way: [B, T, V] logits of the first draft token of a round whose root is the
        token at t; -inf for tokens that it cannot draft, everywhere where it would draft nothing. Beyond a row's count they mean nothing.

        This way runs the drafter token by token on a copy of its state. Families that can read all of them in one call do so.
        """
        rows = torch.arange(len(committed.count), device=committed.count.device)
        trial, first = state.select(rows), Plan(Chain(length=1), record_probs=self.gives_draft_probs)
        logits = []
        for step, tokens in enumerate(committed.tokens.unbind(1)):
            tree = self.propose(trial, tokens, first, Sampling(), SeededRng(0, rows))
            logits.append(self._first_logits(tree))
            features = {name: value[:, step : step + 1] for name, value in committed.features.items()}
            self.observe(trial, Committed(tokens[:, None], (committed.count > step).long(), features))
        self.observe(state, committed)
        return torch.stack(logits, 1)

    def _first_logits(self, tree: Tree) -> Tensor:
        """[B, V] of a chain's first token: log probabilities where they were recorded, else the token itself with certainty."""
        if tree.draft_probs is not None:
            return tree.draft_probs[:, 0].log()
        drafted = torch.full((len(tree.tokens), self.target.vocab_size), float("-inf"), device=tree.tokens.device)
        if tree.tokens.shape[1] > 1:
            certain = torch.where(tree.live[:, 1], 0.0, float("-inf"))
            drafted.scatter_(1, tree.tokens[:, 1:2], certain[:, None])
        return drafted


class WrappedDrafter(Drafter):
    """A drafter that drafts with another one inside: bounds, training and replay are the inner one's."""

    def __init__(self, config: DrafterConfig, inner: Drafter) -> None:
        super().__init__(config, inner.target)
        self.inner, self.needs, self.files, self.gives_draft_probs = inner, inner.needs, inner.files, inner.gives_draft_probs

    @property
    def max_depth(self) -> int | None:
        return self.inner.max_depth

    @property
    def watcher(self) -> Callable[[Callable[[], object]], None] | None:
        return self.inner.watcher

    @watcher.setter
    def watcher(self, watcher: Callable[[Callable[[], object]], None] | None) -> None:
        self.inner.watcher = watcher

    def loss(self, batch: TrainingBatch, head: TargetHead, rng: SeededRng | None = None) -> Loss:
        return self.inner.loss(batch, head, rng)

    def teacher_forced_drafts(self, batch: TrainingBatch, head: TargetHead, length: int) -> Tensor:
        return self.inner.teacher_forced_drafts(batch, head, length)

    def inner_tree(self, state: DrafterState, roots: Tensor, plan: Plan, sampling: Sampling, rng: Rng) -> Tree:
        """What the inner one proposes; its calls count as this one's."""
        before = self.inner.calls
        tree = self.inner.propose(state, roots, plan, sampling, rng)
        self.calls += self.inner.calls - before
        return tree
