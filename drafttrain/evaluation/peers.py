"""Other libraries' decoding as runners: transformers' own `generate`, plain, with prompt lookup, and assisted by a small LM.

They decode the very module that our target wraps: same weights, dtype, device and threads. Rounds are its forwards after the first one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from drafttrain.core.config import Config
from drafttrain.core.disk import folder_fingerprint
from drafttrain.core.errors import UserError
from drafttrain.core.layers import in_precision
from drafttrain.core.packed import packed
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.files import load_drafter
from drafttrain.drafters.small_lm import SmallLM
from drafttrain.evaluation.memory import PeakMemory
from drafttrain.evaluation.runners import GENERATE, Facts, Outcome
from drafttrain.runtime.decoder import find_drafter
from drafttrain.runtime.stats import Statistics, now
from drafttrain.target.adapter import Target


class PeerConfig(Config):
    """One mode of transformers' `generate`, measured beside ours."""

    kind: Literal["generate", "prompt_lookup", "assisted"]
    """Plain decoding; lookup in the prompt and the output; a small LM drafts."""
    label: str | None = None
    """Its name in tables; by default made from its options."""
    drafter: str | None = None
    """`assisted`: folder of a trained `small_lm` drafter, or of the run that trained it."""
    tokens: int = Field(default=8, ge=1)
    """Tokens drafted a round at most (`prompt_lookup_num_tokens`, `num_assistant_tokens`)."""
    ngram: int = Field(default=3, ge=1)
    """`prompt_lookup`: the longest n-gram looked up (`max_matching_ngram_size`)."""
    confidence: float | None = Field(default=None, ge=0, le=1)
    """`assisted`: drafting stops below this probability (`assistant_confidence_threshold`); None: transformers' default."""

    @model_validator(mode="after")
    def _fits_together(self) -> PeerConfig:
        if (self.kind == "assisted") != (self.drafter is not None):
            raise ValueError("`drafter` names the small LM of kind 'assisted', and only that kind takes one")
        if (self.kind == GENERATE) != (self.name == GENERATE):
            raise ValueError(f"kind '{GENERATE}' is a baseline and known by that label: leave its label out, and give it to no other kind")
        return self

    @property
    def name(self) -> str:
        """`label`, or one made from the options."""
        sure = "" if self.confidence is None else f" at {self.confidence:g}"
        made = {"generate": "generate", "prompt_lookup": f"prompt lookup {self.tokens}", "assisted": f"assisted {self.tokens}{sure}"}
        return self.label or made[self.kind]


NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": None, "typical_p": None, "min_new_tokens": None}
"""What a checkpoint's own generation_config might ask for; plain decoding does what is not left out by `ignore_generation_options`."""


@dataclass
class Peer:
    """One of transformers' own ways of decoding, measured beside ours."""

    target: Target
    config: PeerConfig
    assistant: nn.Module | None = None
    """The small LM of kind `assisted`."""

    @property
    def label(self) -> str:
        return self.config.name

    @torch.inference_mode()
    def run(self, prompt: list[int], max_new_tokens: int, sampling: Sampling, seed: int) -> Outcome:
        torch.manual_seed(seed)
        ids = torch.tensor([prompt], device=self.target.device)
        memory, rounds = PeakMemory(self.target.device), PeerRounds(self.target, len(prompt))
        start = time.perf_counter()
        with rounds:
            out: Tensor = self.target.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, eos_token_id=list(self.target.eos_ids) or None,
                pad_token_id=(self.target.eos_ids or (0,))[0], **{**NEUTRAL, **self.target.own_options}, **self._drawing(sampling),
                **self._drafting(),
            )  # fmt: skip
        tokens = out[0, len(prompt) :].tolist()
        wall = time.perf_counter() - start
        tokenizer = self.target.tokenizer
        text = "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
        return Outcome(tokens, text, rounds.statistics(len(tokens), start, wall), wall, rounds.drafted, memory.read())

    def facts(self, sampling: Sampling) -> Facts:
        config = self.config
        K = 0 if config.kind == "generate" else config.tokens
        folder = None if config.drafter is None else folder_fingerprint(find_drafter(Path(config.drafter)))
        options = {"library": "transformers", **config.model_dump(mode="json", exclude={"label", "drafter"}, exclude_none=True)}
        return Facts(None if K == 0 else f"transformers {config.kind}", folder, draft_length=K, slots=K, options=options)

    @staticmethod
    def _drawing(sampling: Sampling) -> dict[str, Any]:
        if sampling.greedy:
            return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        return {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}

    def _drafting(self) -> dict[str, Any]:
        if self.config.kind == "prompt_lookup":
            return {"prompt_lookup_num_tokens": self.config.tokens, "max_matching_ngram_size": self.config.ngram}
        return {} if self.assistant is None else {"assistant_model": self.assistant}


@dataclass
class PeerRounds:
    """Watches the target's forwards while it is entered."""

    target: Target
    prompt: int  # tokens
    forwards: int = 0
    first: int = 0  # tokens that the first forward gave
    drafted: int = 0
    prefill_end: float = 0.0
    hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> PeerRounds:
        backbone = self.target.backbone
        self.hooks = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True), backbone.register_forward_hook(self._after)
        ]  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forwards += 1
        if self.forwards == 2:
            self.first = kwargs["past_key_values"].get_seq_length() + 1 - self.prompt
        if self.forwards > 1:
            self.drafted += kwargs["input_ids"].shape[1] - 1

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.forwards == 1:
            self.prefill_end = now(self.target.device)

    def statistics(self, tokens: int, start: float, wall: float) -> Statistics:
        """Counts of the rounds after the first forward, which reads the prompt; all of their time is `other`."""
        first = self.first if self.forwards > 1 else tokens
        out = Statistics(self.forwards - 1, tokens - first, target_forwards=self.forwards)
        out.seconds["prefill"] = self.prefill_end - start
        out.seconds["other"] = wall - out.seconds["prefill"]
        return out


def make_peer(target: Target, config: PeerConfig) -> Peer:
    """Ready to run; a `UserError` where the assistant is missing, another target's, or no causal LM."""
    if config.drafter is None:
        return Peer(target, config)
    folder = find_drafter(Path(config.drafter))
    drafter = load_drafter(folder, target.fingerprint)
    if not isinstance(drafter, SmallLM):
        raise UserError(f"peer '{config.name}': the drafter in '{folder}' is a {drafter.config.name}; transformers takes a small_lm only")
    assistant = packed(in_precision(drafter.to_causal_lm(target.head), target.device, target.dtype)).eval()
    options = assistant.generation_config
    options.num_assistant_tokens, options.num_assistant_tokens_schedule = config.tokens, "constant"
    if config.confidence is not None:
        options.assistant_confidence_threshold = config.confidence
    return Peer(target, config, assistant)
