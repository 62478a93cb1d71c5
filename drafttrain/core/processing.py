"""What changes the target's logits by the text before them: penalties, biases, forbidden words, and any logits processors.

A node's text is its row's text and the path down to the node. Each option is a pure function of one node's logits and its text, so that a
tree's nodes get what they would get alone: every rule then verifies the changed distribution, and plain decoding draws from the same.
B rows, N nodes, V vocabulary, K tokens of the longest forbidden word, T tokens of a row's text, whose last is the tree's root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.core.errors import UserError
from drafttrain.core.tree import Tree

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]
"""transformers' own: ([n, T] texts, [n, V] logits of their next tokens) -> [n, V]."""

STATEFUL = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor", "ClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor",
    "PrefixConstrainedLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor",
    "WhisperTimeStampLogitsProcessor", "AlternatingCodebooksLogitsProcessor",
)  # fmt: skip
"""Those of transformers that read more than text and logits: a row's place in the batch, or what they saw before."""

NEVER = float("-inf")


@dataclass
class Texts:
    """What stands before a tree, row by row, as the host knows it."""

    tokens: list[list[int]]  # [B][T] prompt and answer so far, the tree's root last
    prompts: list[int]  # [B] how many of them are the prompt


@dataclass
class Processed:
    """Changed logits, and where nothing can follow."""

    logits: Tensor  # [B, N, V] fp32
    blocked: Tensor | None = None  # [B, N] bool: every token is forbidden there; None where that cannot be


@dataclass(frozen=True)
class Processing:
    """The options, in the order they are applied: bias, penalties, forbidden words, processors. The default changes nothing."""

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that stand in prompt or answer, and multiplies negative ones (Keskar et al., 2019)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that stand in the answer."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens once for each time they stand in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that are never completed."""
    processors: tuple[LogitsProcessor, ...] = ()
    """Called on the host with each depth's texts; they must be pure functions of each text and its logits."""

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return self != Processing()

    def check(self, vocab_size: int) -> Processing:
        """Itself, or a `UserError` that names the value out of range."""
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"repetition_penalty {self.repetition_penalty!r} is not a finite positive number; use 1 for none, or 1.1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = vars(self)[name]
            if not abs(value) < float("inf"):
                raise UserError(f"{name} {value!r} is not a finite number; use 0 for none, or 0.5")
        for token, bias in self.logit_bias:
            _check_token("logit_bias", token, vocab_size)
            if isnan(bias) or bias == float("inf"):
                raise UserError(f"logit_bias of token {token}: {bias!r} is no finite number; give one, or -inf to forbid it")
        for word in self.bad_words:
            if not word:
                raise UserError("bad_words holds an empty word, which stands everywhere; leave it out")
            for token in word:
                _check_token("bad_words", token, vocab_size)
        for processor in self.processors:
            _check_processor(processor)
        forbidden = {word[0] for word in self.bad_words if len(word) == 1} | {token for token, bias in self.logit_bias if bias == NEVER}
        if len(forbidden) == vocab_size:
            raise UserError(f"bad_words and logit_bias forbid all {vocab_size} tokens; leave some")
        return self

    def then(self, other: Processing) -> Processing:
        """These options, with the other's processors behind the own ones."""
        return replace(self, processors=self.processors + other.processors)

    def __call__(self, logits: Tensor, tree: Tree, texts: Texts, ends: Sequence[int] = ()) -> Processed:
        """[B, N, V] the target's logits at the tree's nodes -> the same under these options. ends: tokens after which nothing comes."""
        logits = logits.to(torch.float32, copy=True)
        for token, bias in self.logit_bias:
            logits[..., token] += bias
        if self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty:
            logits = self._penalised(logits, tree, texts)
        if self.bad_words:
            logits = _without_words(logits, tree, texts, self.bad_words)
        return self._by_depth(logits, tree, texts, ends) if self.processors else Processed(logits)

    def _penalised(self, logits: Tensor, tree: Tree, texts: Texts) -> Tensor:
        vocab = logits.shape[-1]
        drafted = _path_counts(tree, vocab)  # [B, N, V]
        answers = [tokens[start:] for tokens, start in zip(texts.tokens, texts.prompts, strict=True)]
        written = drafted + _counts(answers, vocab, logits.device)[:, None]
        if self.repetition_penalty != 1:
            seen = (drafted + _counts(texts.tokens, vocab, logits.device)[:, None]) > 0
            punished = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, punished, logits)
        return logits - self.presence_penalty * (written > 0) - self.frequency_penalty * written

    def _by_depth(self, logits: Tensor, tree: Tree, texts: Texts, ends: Sequence[int]) -> Processed:
        """Through the processors, parents before their children: what comes after a forbidden token or an end is nobody's question, and a
        grammar need not have an answer to it."""
        blocked = torch.zeros_like(tree.live)
        asked = torch.zeros_like(tree.live)
        nodes = list(zip(tree.tokens.tolist(), tree.parents.tolist(), tree.live.tolist(), tree.depth.tolist(), strict=True))
        for row, (tokens, parents, live, depth) in enumerate(nodes):
            paths: dict[int, list[int]] = {0: texts.tokens[row]}
            for level in range(max(depth) + 1):
                for node in range(1, len(tokens)):
                    parent, token = parents[node], tokens[node]
                    possible = live[node] and depth[node] == level and parent in paths and (parent == 0 or tokens[parent] not in ends)
                    if possible and logits[row, parent, token] > NEVER:
                        paths[node] = [*paths[parent], token]
                group = [node for node in paths if depth[node] == level]
                if not group:
                    break
                ids = torch.tensor([paths[node] for node in group], device=logits.device)
                ended = [node for node in group if node and tokens[node] in ends]
                answered = _through(self.processors, ids, logits[row, group])
                logits[row, group] = answered
                asked[row, group] = True
                blocked[row, group] = (answered == NEVER).all(-1)
                asked[row, ended] = False
        open_ended = ~asked | blocked
        return Processed(logits.masked_fill(open_ended[..., None], 0.0), blocked & asked)


def forbidden(tree: Tree, logits: Tensor) -> Tensor:
    """[B, N] bool: the node's token cannot come after its parent, or stands below such a one. logits: [B, N, V] processed."""
    row = torch.arange(len(logits), device=logits.device)[:, None]
    never = logits[row, tree.parents, tree.tokens] == NEVER
    never[:, 0] = False
    return (tree.ancestors & never[:, None, :]).any(-1)


def _through(processors: Sequence[LogitsProcessor], ids: Tensor, scores: Tensor) -> Tensor:
    shape = scores.shape
    for processor in processors:
        scores = processor(ids, scores.clone())
        if not isinstance(scores, Tensor) or scores.shape != shape:
            raise UserError(
                f"logits processor {type(processor).__name__}: expected it to return logits of shape {tuple(shape)}, as it got"
            )
    return scores.float()


def _path_counts(tree: Tree, vocab: int) -> Tensor:
    """[B, N, V] how often each token stands on the path to a node, without the root, which the text holds."""
    tokens = torch.zeros(*tree.tokens.shape, vocab, device=tree.tokens.device).scatter_(-1, tree.tokens[..., None], 1.0)
    tokens[:, 0] = 0
    return tree.ancestors.float() @ tokens


def _counts(texts: Sequence[Sequence[int]], vocab: int, device: torch.device) -> Tensor:
    """[B, V] how often each token stands in a text."""
    padded = pad_sequence([torch.tensor(text, dtype=torch.long) for text in texts], batch_first=True, padding_value=vocab).to(device)
    counts = torch.zeros(len(texts), vocab + 1, device=device)
    return counts.scatter_add_(1, padded, torch.ones_like(padded, dtype=counts.dtype))[:, :vocab]


def _without_words(logits: Tensor, tree: Tree, texts: Texts, words: Sequence[Sequence[int]]) -> Tensor:
    """-inf for the last token of each word where the tokens before it stand at the end of a node's text."""
    before = _last_tokens(tree, texts, max(map(len, words)) - 1)  # [B, N, K - 1]
    for word in words:
        start = torch.tensor(word[:-1], dtype=torch.long, device=logits.device)
        begun = (before[..., before.shape[-1] - len(start) :] == start).all(-1)
        logits[..., word[-1]] = logits[..., word[-1]].masked_fill(begun, NEVER)
    return logits


def _last_tokens(tree: Tree, texts: Texts, count: int) -> Tensor:
    """[B, N, count] the last tokens of each node's text; -1 before its beginning."""
    ends = [torch.tensor([-1] * count + tokens)[-count - 1 :] for tokens in texts.tokens]
    text = torch.stack(ends).to(tree.tokens.device)  # [B, count + 1], the root last
    node = torch.arange(tree.tokens.shape[1], device=text.device).expand_as(tree.tokens)
    past = torch.zeros_like(node)  # steps beyond the root
    out = []
    for _ in range(count):
        above = text.gather(1, (count - past).clamp_min(0))
        out.append(torch.where(node > 0, tree.tokens.gather(1, node), above))
        past = past + (node == 0).long()
        node = tree.parents.gather(1, node)
    return torch.stack(out[::-1], -1) if out else tree.tokens.new_zeros(*tree.tokens.shape, 0)


def _check_token(option: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise UserError(f"{option}: token {token} is none of the target's ids, 0 to {vocab_size - 1}")


def _check_processor(processor: object) -> None:
    kind = type(processor).__name__
    if not callable(processor):
        raise UserError(f"logits_processor holds {processor!r}; expected functions of (texts, logits), such as a LogitsProcessorList")
    if kind in STATEFUL:
        raise UserError(
            f"logits processor {kind} reads more than a text and its logits: a tree's nodes would not get what they get alone; leave it out"
        )
