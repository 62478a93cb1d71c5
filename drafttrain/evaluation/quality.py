"""Quality of decoded text, for rules that do not keep the target's distribution: how far the text is from what the target itself would
write.

One teacher-forced pass of the target over the text, after the clock has stopped. At every committed token x (those that rounds kept;
the prefill's token is the target's own) the target's distribution after the text so far is known:

    p   the softmax of its logits at the run's temperature (1 where decoding is greedy), all tokens kept
    r   the distribution that plain decoding draws from there: p after top-k and top-p; at temperature 0 all mass on the argmax

    argmax agreement   share of committed tokens that are the argmax
    excess KL          mean of  KL(x || p) - E_{y ~ r} KL(y || p)  =  -log p(x) + sum_y r(y) log p(y),  in nats

KL(x || p) is the divergence of a realised choice, all mass on x. A text alone does not tell the distribution that a lossy rule drew from,
only what it chose. For greedy decoding the excess is log(p_max / p(x)), 0 for the argmax and positive for every other token; for sampling
its expectation is 0 under every lossless rule, whatever the sampling options, positive where unlikely tokens stand and negative where
only likely ones do.

Where an item has a checkable answer (`check.py`), the text's final answer is compared with it, and with plain decoding's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.core.sampling import Sampling, likeliest
from drafttrain.evaluation.check import AnswerCheck, final_answer, program, right
from drafttrain.evaluation.execute import passes
from drafttrain.target.adapter import Target

Quality = dict[str, float | None]
"""What a result row says: see `pooled`."""

ROWS = 64  # positions whose logits are held at once


@dataclass
class JudgedText:
    """One decoding, as the journal keeps it."""

    tokens: int  # committed tokens
    agreed: int  # of them the target's argmax
    excess: float  # nats, summed over them
    right: bool | None = None  # the answer; None where it cannot be checked
    same: bool | None = None  # the final answer is plain decoding's; None where neither text gives one


def judge(
    target: Target, prompt: Sequence[int], tokens: Sequence[int], text: str, plain: str, check: AnswerCheck | None, sampling: Sampling,
    execute: bool = False,
) -> JudgedText:
    """The quality of one decoding.

    tokens: the answer's, the prefill's first; text: the same as text; plain: plain decoding's text. execute: run programs
    (`check.kind` is `code`); otherwise they count as not checkable.
    """
    read = read_text(target, prompt, tokens, sampling)
    judged = JudgedText(len(tokens) - 1, int(read.agreed.sum()), float(read.excess.sum()))
    if check is not None and check.kind == "code":
        judged.right = passes(program(check, text)) if execute else None
    elif check is not None:
        judged.right = right(check, text)
        ours, theirs = final_answer(check, text), final_answer(check, plain)
        judged.same = None if ours is theirs is None else ours == theirs
    return judged


def pooled(judged: Sequence[JudgedText]) -> Quality | None:
    """Over all committed tokens and all checkable answers; None where nothing was judged.

    `tokens`, `argmax_agreement`, `excess_kl` (nats a token), `checked` (answers that could be checked), `right` (share of them),
    `compared` (answers read in either text), `same_answer` (share of them that are plain decoding's). Shares of nothing are None.
    """
    if not judged:
        return None
    tokens = sum(one.tokens for one in judged)
    verdicts = [one.right for one in judged if one.right is not None]
    same = [one.same for one in judged if one.same is not None]
    return {
        "tokens": tokens,
        "argmax_agreement": _share(sum(one.agreed for one in judged), tokens),
        "excess_kl": _share(sum(one.excess for one in judged), tokens),
        "checked": len(verdicts),
        "right": _share(sum(verdicts), len(verdicts)),
        "compared": len(same),
        "same_answer": _share(sum(same), len(same)),
    }


@dataclass
class Read:
    """What the target says of each committed token."""

    agreed: Tensor  # [T] bool
    excess: Tensor  # [T] fp32, nats


@torch.inference_mode()
def read_text(target: Target, prompt: Sequence[int], tokens: Sequence[int], sampling: Sampling) -> Read:
    """One pass over prompt and answer; T is the answer's length less the prefill's token."""
    text = torch.tensor([[*prompt, *tokens[:-1]]], device=target.device)
    length = torch.tensor([text.shape[1]], device=target.device)
    hidden = target.prefill(target.new_cache(1, text.shape[1]), text, length, {"last_hidden_state"}).features["last_hidden_state"]
    chosen = torch.tensor(list(tokens[1:]), dtype=torch.long, device=target.device)  # [T]
    parts = [
        (likeliest(logits) == token, excess_surprisal(logits, token, sampling))
        for state, token in zip(hidden[0, len(prompt) :].split(ROWS), chosen.split(ROWS), strict=True)
        for logits in [target.head.logits(state)]
    ]
    return Read(*(torch.cat(part) for part in zip(*parts, strict=True)))


def excess_surprisal(logits: Tensor, tokens: Tensor, sampling: Sampling) -> Tensor:
    """-log p(x) less what plain decoding's token has in expectation: [T, V], [T] -> [T] nats."""
    surprisal = -(logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)  # [T, V]
    probs = sampling.probs(logits)
    expected = torch.where(probs > 0, probs * surprisal, 0.0).sum(-1)
    return surprisal.gather(-1, tokens[:, None])[:, 0] - expected


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
