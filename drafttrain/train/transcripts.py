"""What decoding leaves behind for learning: each request's tokens, the target's features at them, and where the drafter was wrong.

The features are those that decoding computed anyway: no forward of the target is added, and the target's distribution at any position is
its frozen head applied to `last_hidden_state` there, so that no row of V numbers is kept. B rows, T tokens, F numbers of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.errors import UserError
from drafttrain.core.plan import Plan
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Tree
from drafttrain.core.types import Committed, Features, Groups, Scored, TrainingBatch
from drafttrain.data.store import Conversation, Store
from drafttrain.drafters.base import Drafter
from drafttrain.runtime.accounting import tried_depths
from drafttrain.runtime.proposer import Drafting, Prompts
from drafttrain.runtime.rows import CutVerdict, Rows
from drafttrain.target.head import TargetHead


@dataclass(eq=False)
class Transcript:
    """One request as it was decoded so far."""

    place: int  # in the stream
    prompt: int  # tokens of the prompt
    tokens: list[int]  # prompt and what was committed
    parts: dict[str, list[Tensor]]  # name -> pieces [t, F]; together they reach as far as the tokens, or one token less at the end
    rejected: list[int] = field(default_factory=list)  # positions whose drafted token was refused: what stands there is the target's
    versions: list[int] = field(default_factory=list)  # of the weights that drafted, in the order in which they came
    learnt: int = 0  # labels before this position were learnt from already

    def features(self, name: str) -> Tensor:
        """[T, F]; zeros at the last token, after which nothing is drafted, where the target never read it."""
        whole = torch.cat(self.parts[name])
        self.parts[name] = [whole]
        missing = len(self.tokens) - len(whole)
        return torch.cat([whole, whole.new_zeros(missing, whole.shape[1])])[: len(self.tokens)]

    def labels(self, window: int | None) -> list[int]:
        """Positions to learn that are new: of each rejected one the `window` tokens from it on; None: all drafted ones."""
        first, end = max(self.learnt, self.prompt + 1), len(self.tokens)  # the answer's first token is the prefill's, never drafted
        if window is None:
            return list(range(first, end))
        wanted = {start + offset for start in self.rejected for offset in range(window)}
        return sorted(position for position in wanted if first <= position < end)

    def state(self) -> dict[str, Any]:
        """As tensors and plain values, to be saved."""
        features = {name: self.features(name).clone() for name in self.parts}
        return {**vars(self), "parts": None, "features": features}

    def conversation(self, task: str) -> Conversation:
        """As a store keeps it."""
        return Conversation.answered(self.tokens, self.prompt, {"domain": task, "rejected": self.rejected}, self.place)

    @classmethod
    def of_store(cls, store: Store, index: int, names: Sequence[str]) -> Transcript:
        """A request that `conversation` put into a store. Raises `UserError` for one that was not decoded with a drafter."""
        conversation = store[index]
        if "rejected" not in conversation.meta:
            raise UserError(
                f"store '{store.folder}' is no log of decoding: it does not say where drafts were rejected; make one with "
                f"`drafttrain online ... online.keep_log=true`"
            )
        parts = {name: [value] for name, value in store.features(index, names).items()}
        rejected = list(conversation.meta["rejected"])
        return cls(conversation.id, int(conversation.mask.argmax()), conversation.tokens.tolist(), parts, rejected)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Transcript:
        """What `state` gave."""
        parts = {name: [value] for name, value in state["features"].items()}
        return cls(**{name: value for name, value in state.items() if name not in ("parts", "features")}, parts=parts)


class Recording(Drafting):
    """Drafts with one drafter, and keeps a transcript of each request; requests are known by the number of their random stream."""

    def __init__(self, drafter: Drafter, treat_as: Draws | None = None, texts: dict[int, Transcript] | None = None) -> None:
        super().__init__(drafter, treat_as)
        self.needs = drafter.needs | drafter.teacher_needs
        self.texts: dict[int, Transcript] = {} if texts is None else texts  # by place in the stream
        self.places: list[int] = []  # [B] of the rows
        self.capacity, self.groups = 0, Groups([], {})

    def fresh(self) -> Recording:
        return Recording(self.drafter, self.treat_as, self.texts)

    def begin(self, prompts: Prompts) -> None:
        super().begin(prompts)
        self.places, self.capacity, self.groups = list(prompts.streams), prompts.capacity, prompts.groups
        for row, place in enumerate(self.places):
            size = int(prompts.lengths[row])
            parts = {name: [value[row, :size].cpu()] for name, value in prompts.features.items() if name in self.needs}
            self.texts[place] = Transcript(place, size, prompts.tokens[row, :size].tolist(), parts)

    def propose(self, rows: Rows, plan: Plan, sampling: Sampling) -> Tree:
        for place, going in zip(self.places, rows.going, strict=True):
            versions = self.texts[place].versions
            if going and self.drafter.weight_version not in versions[-1:]:
                versions.append(self.drafter.weight_version)
        return super().propose(rows, plan, sampling)

    def observe(self, committed: Committed, cut: CutVerdict, scored: Scored, tree: Tree) -> None:
        self.drafter.observe(self.state, committed.only(self.drafter.needs))
        refused = tried_depths(tree, cut) > cut.verdict.length
        told = torch.stack([committed.count, refused.long()], 1).tolist()
        self.counts.syncs += 1  # what is recorded goes to the host
        features = {name: value.cpu() for name, value in committed.features.items() if name in self.needs}
        for row, (place, (count, wrong)) in enumerate(zip(self.places, told, strict=True)):
            text = self.texts[place]
            text.tokens += committed.tokens[row, :count].tolist()
            for name, value in features.items():
                text.parts[name].append(value[row, :count])
            if count and wrong:
                text.rejected.append(len(text.tokens))  # the next root: the target's own token where the draft was refused

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.places, self.groups = [self.places[row] for row in rows.tolist()], self.groups.select(rows)

    def join(self, other: Any) -> None:
        assert isinstance(other, Recording) and other.texts is self.texts
        super().join(other)
        self.places, self.groups = self.places + other.places, self.groups.join(other.groups)
        self.capacity = max(self.capacity, other.capacity)

    @torch.inference_mode()
    def rebuild(self, head: TargetHead) -> None:
        """A fresh state of the running rows by the present weights: what older ones left in the caches is gone."""
        texts = [self.texts[place] for place in self.places]
        device = head.device
        lengths = torch.tensor([len(text.tokens) for text in texts], device=device)
        tokens = pad_sequence([torch.tensor(text.tokens, device=device) for text in texts], batch_first=True)
        features = {
            name: pad_sequence([text.features(name).to(device) for text in texts], batch_first=True) for name in self.drafter.needs
        }
        self.state = self.drafter.begin(tokens, lengths, features, head, self.capacity)
        self.state.set_groups(self.groups)
        self.state.set_lengths(lengths.tolist())


def training_batch(texts: Sequence[Transcript], names: Sequence[str], window: int | None, device: torch.device) -> TrainingBatch:
    """One transcript a row. window: see `Transcript.labels`."""
    tokens = pad_sequence([torch.tensor(text.tokens) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.tokens) for text in texts])
    prompts = torch.tensor([text.prompt for text in texts])
    order = torch.arange(tokens.shape[1]).expand_as(tokens)
    real = order < lengths[:, None]
    learns = torch.zeros_like(real)
    for row, text in enumerate(texts):
        learns[row, text.labels(window)] = True
    features: Features = {name: pad_sequence([text.features(name) for text in texts], batch_first=True) for name in names}
    mask = real & (order >= prompts[:, None])
    batch = TrainingBatch(tokens, mask, torch.where(real, 0, -1), torch.where(real, order, 0), features, learns=learns)
    return batch.to(device)
