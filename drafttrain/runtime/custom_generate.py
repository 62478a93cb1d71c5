"""`model.generate(..., custom_generate=speculative(drafter))`: transformers' own entry, with our rounds.

transformers prepares what it always does (inputs, logits processors, stopping criteria, the streamer) and hands it over. Each token is what
its own loop would have chosen: the processors are applied at every node of the tree, the criteria are asked after every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import (
    LogitNormalization,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from drafttrain.core.errors import UserError
from drafttrain.core.processing import LogitsProcessor, Processing
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.base import Drafter
from drafttrain.export.load import load_drafter
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder, found_drafter, runtime_of
from drafttrain.runtime.generate import served
from drafttrain.runtime.rows import Request
from drafttrain.target.adapter import Target
from drafttrain.target.promises import NEUTRAL

READ = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "cache_position")
"""What `generate` hands over beside the ids, and is done here in our own way."""

OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

CUTS: dict[type, Callable[[Any], tuple[str, float]]] = {
    TemperatureLogitsWarper: lambda warper: ("temperature", warper.temperature),
    TopKLogitsWarper: lambda warper: ("top_k", warper.top_k),
    TopPLogitsWarper: lambda warper: ("top_p", warper.top_p),
    MinPLogitsWarper: lambda warper: ("min_p", warper.min_p),
    TypicalLogitsWarper: lambda warper: ("typical_p", warper.mass),
}
"""Warpers that our sampling knows, in transformers' order, which is ours."""


@dataclass
class Speculative:
    """What `custom_generate` takes; one for each drafter. The target is the model that `generate` is called on."""

    drafter: str | Path | Drafter | None
    runtime: RuntimeConfig | Mapping[str, Any] | None = None
    streamer: Any = None
    """Hears prompt and tokens. transformers (5.23) does not hand the one that `generate` is given on to a function."""
    _decoders: dict[int, tuple[Any, SpeculativeDecoder]] = field(default_factory=dict, repr=False)

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any = None, stopping_criteria: Any = None, generation_config: Any = None,
        synced_gpus: bool = False, **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """[B, P] left-padded prompts -> [B, P + T] with the answers, padded at the end.

        Raises `UserError` for what rounds of drafts cannot give: beams, scores and states of every token, a cache that is not empty.
        """
        refuse(generation_config, model_kwargs)
        if self.streamer is not None and len(input_ids) > 1:
            raise UserError(f"a streamer shows one text, and there are {len(input_ids)} prompts; give one, or no streamer")
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        decoder = self._decoder(model)
        ends = generation_config.eos_token_id
        decoder.target.eos_ids = () if ends is None else tuple(ends if isinstance(ends, list) else [ends])
        sampling, processors = drawing(logits_processor or (), generation_config.do_sample)
        mask = model_kwargs.get("attention_mask")
        pads = [0] * len(input_ids) if mask is None else (mask == 0).sum(1).tolist()
        seed = int(torch.randint(2**62, ())) if generation_config.do_sample else 0  # `torch.manual_seed` sets it
        limit = generation_config.max_length - input_ids.shape[1]
        job = _Job(decoder, sampling, processors, stopping_criteria, limit, self.streamer, seed)
        answers = job.run(input_ids.to(decoder.target.device), pads)
        lengths = set(map(len, answers))
        if ends is None and len(lengths) > 1:  # `generate` pads only texts that an end token ended: the others go on beside the longest
            answers = replace(job, criteria=None, limit=max(lengths)).run(input_ids.to(decoder.target.device), pads)
        sequences = joined(input_ids, answers, _padding(generation_config))
        return GenerateDecoderOnlyOutput(sequences=sequences) if generation_config.return_dict_in_generate else sequences

    def heard_by(self, streamer: Any) -> Speculative:
        """The same, with this streamer."""
        return replace(self, streamer=streamer)

    def _decoder(self, model: Any) -> SpeculativeDecoder:
        """The decoder of this model, made once."""
        if id(model) not in self._decoders:
            drafter, runtime = self.drafter, self.runtime
            if runtime is None and isinstance(drafter, (str, Path)):
                runtime = runtime_of(Path(drafter))
            target = Target(model, ignored=tuple(NEUTRAL))  # `generate` has made processors of its options
            loaded = load_drafter(found_drafter(drafter), target=target) if isinstance(drafter, (str, Path)) else drafter
            if loaded is not None:
                target.aux_layers = loaded.target.aux_layers
            self._decoders[id(model)] = model, SpeculativeDecoder(target, loaded, runtime)
        return self._decoders[id(model)][1]


def speculative(
    drafter: str | Path | Drafter | None, runtime: RuntimeConfig | Mapping[str, Any] | None = None, streamer: Any = None
) -> Speculative:
    """For `model.generate(**inputs, custom_generate=speculative("runs/quickstart"))`.

    drafter: as `SpeculativeDecoder.from_pretrained` takes it. runtime: by default what the recipe of its run says. streamer: one
    of transformers; give it here, and not to `generate`, which keeps its own from functions.
    """
    return Speculative(drafter, runtime, streamer)


@dataclass
class _Job:
    """How the prompts are decoded."""

    decoder: SpeculativeDecoder
    sampling: Sampling
    processors: Sequence[LogitsProcessor]
    criteria: Any
    limit: int
    streamer: Any
    seed: int

    def run(self, prompts: Tensor, pads: Sequence[int]) -> list[list[int]]:
        """[B, P] with so many pads before each -> the answers. Prompts with equally many are decoded together."""
        answers: list[list[int]] = [[] for _ in pads]
        for pad, group in groupby(sorted(range(len(pads)), key=pads.__getitem__), key=pads.__getitem__):
            numbers = list(group)
            for number, answer in zip(numbers, self._together(prompts[numbers], pad, numbers), strict=True):
                answers[number] = answer
        return answers

    def _together(self, prompts: Tensor, pad: int, numbers: Sequence[int]) -> list[list[int]]:
        padding = prompts[:1, :pad]
        texts = prompts[:, pad:].tolist()
        processors = tuple(behind(padding, processor) for processor in self.processors)
        processing = Processing(processors=processors).check(self.decoder.target.vocab_size)
        loop = self.decoder.batch(self.sampling, self.seed, processing=processing)
        loop.stopper = Stops(prompts, self.criteria)
        requests = [Request(text, number, self.limit) for text, number in zip(texts, numbers, strict=True)]
        for gained in served(loop, requests, len(requests)):
            for emission in gained:
                for token in emission.tokens if self.streamer else ():
                    self.streamer.put(torch.tensor([token]))
        if self.streamer is not None:
            self.streamer.end()
        return loop.written


class Stops:
    """Asks the criteria after each token, once."""

    def __init__(self, prompts: Tensor, criteria: Any) -> None:
        self.prompts, self.criteria = prompts, criteria
        self.asked: dict[int, int] = {}  # tokens of each request that they let pass
        self.stopped: dict[int, int] = {}  # tokens that it keeps

    def __call__(self, request: int, tokens: list[int]) -> int:
        if request in self.stopped or not self.criteria:
            return self.stopped.get(request, len(tokens))
        text = torch.cat([self.prompts[request], self.prompts.new_tensor(tokens)])
        for count in range(self.asked.get(request, 0) + 1, len(tokens) + 1):
            shown = text[None, : self.prompts.shape[1] + count]
            if bool(self.criteria(shown, None).all()):
                self.stopped[request] = count
                return count
        self.asked[request] = len(tokens)
        return len(tokens)


def drawing(processors: Sequence[LogitsProcessor], do_sample: bool) -> tuple[Sampling, list[LogitsProcessor]]:
    """The warpers at the end of the list as sampling, which the drafter shares, and the processors before them."""
    left = [processor for processor in processors if not isinstance(processor, LogitNormalization)]  # changes no distribution
    if not do_sample:
        return Sampling(), left
    options: dict[str, float] = {}
    kinds = list(CUTS)
    while left and type(left[-1]) in kinds:
        kind = type(left[-1])
        name, value = CUTS[kind](left.pop())
        options[name] = value
        kinds = kinds[: kinds.index(kind)]  # what stands before it must come before it in our order
    return Sampling(**{"temperature": 1.0, **options}).check(), left  # type: ignore[arg-type]


def behind(padding: Tensor, processor: LogitsProcessor) -> LogitsProcessor:
    """The processor as it would see the padded texts; padding: [1, pads]."""
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(processor.prompt_ignore_length, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty)  # it is told each row's pads, and here there are none
    if not padding.shape[1]:
        return processor
    return lambda ids, scores: processor(torch.cat([padding.expand(len(ids), -1), ids], 1), scores)


def joined(input_ids: Tensor, answers: Sequence[Sequence[int]], padding: int) -> Tensor:
    """[B, P] and answers of T tokens at most -> [B, P + T]."""
    longest = max(map(len, answers))
    filled = [[*answer, *[padding] * (longest - len(answer))] for answer in answers]
    return torch.cat([input_ids, input_ids.new_tensor(filled)], 1)


def _padding(config: Any) -> int:
    pad = config.pad_token_id
    ends = config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return int(pad if pad is not None else first or 0)


def refuse(config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """A `UserError` for what cannot be given."""
    if config.num_beams > 1:
        raise UserError(f"num_beams {config.num_beams}: a beam is not a sample of the target's distribution; use 1")
    for name in OUTPUTS:
        if getattr(config, name, None):
            raise UserError(f"{name}: rounds of drafts keep nothing of single tokens; leave it out, or use SpeculativeDecoder's on_round")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError("past_key_values is not empty: rounds keep a cache of their own; give the whole text as input_ids")
    for name, value in model_kwargs.items():
        if name not in READ and value is not None:
            raise UserError(f"option '{name}' of generate is unknown to speculative decoding; leave it out")
