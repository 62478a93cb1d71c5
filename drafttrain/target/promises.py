"""What a checkpoint asks of whoever decodes it, and whether we can keep it: what cannot be served exactly is refused by name.

Read from the configurations alone, so that `doctor` and recipes can refuse before any weight is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from drafttrain.core.errors import UserError
from drafttrain.core.processing import LogitsProcessor, Processing

STEADY_ROPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Rotary scalings that give a position the same angles whatever else is in the forward."""

SWITCHING_ROPES = ("longrope", "dynamic")
"""Those whose angles depend on the largest position of a forward: steady up to the original context, where transformers switches."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None, []), "sequence_bias": (None, {}, []), "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,), "min_length": (None, 0),
    "min_new_tokens": (None, 0), "exponential_decay_length_penalty": (None,), "guidance_scale": (None, 1.0), "num_beams": (None, 1),
    "num_beam_groups": (None, 1), "penalty_alpha": (None, 0.0), "dola_layers": (None,), "watermarking_config": (None,),
    "remove_invalid_values": (None, False), "min_p": (None, 0.0), "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0), "top_h": (None,), "constraints": (None,), "force_words_ids": (None,),
}  # fmt: skip
"""Options of a generation configuration that change what `generate` writes, with the values that change nothing. (temperature, top_k and
top_p are the caller's own here, and `do_sample` follows from them.)"""


HONOURED = (
    "sequence_bias", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length", "suppress_tokens", "min_p", "typical_p",
)  # fmt: skip
"""Those that decoding here applies as `generate` does: the last two where tokens are drawn, the others always, in this order."""


def steady_context(config: Any) -> int | None:
    """Positions up to which a forward depends on position, token and mask alone; None where that holds for the whole context.

    Raises `UserError` for a rotary kind that nobody has looked at.
    """
    steady: list[int] = []
    for kind, parameters in _ropes(config):
        if kind in STEADY_ROPES:
            continue
        if kind not in SWITCHING_ROPES:
            raise UserError(
                f"a '{config.model_type}' target turns positions by rope_type '{kind}', not known to depend on the position alone; "
                f"known: {', '.join(STEADY_ROPES + SWITCHING_ROPES)}"
            )
        if kind == "longrope" and parameters.get("short_factor") == parameters.get("long_factor"):
            continue
        original = parameters.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        steady.append(int(original or config.max_position_embeddings))
    return min(steady, default=None)


def served_context(config: Any, stated: int, asked: int | None, name: str) -> int:
    """Positions that are decoded at most. stated: what the configuration was made for; asked: `target.max_context`.

    Raises `UserError` where the target would not be exact up to there.
    """
    if asked is not None and asked > stated:
        raise UserError(f"target.max_context {asked:,}: target '{name}' was made for {stated:,} positions; give at most that")
    context = asked or stated
    steady = steady_context(config)
    if steady is not None and steady < context:
        raise UserError(
            f"target '{name}': its rotary factors change for every position once a text grows past {steady:,} tokens (longrope or dynamic "
            f"scaling), so a tree of drafts, a batch or packed rows would not give its own texts; set target.max_context={steady} to serve "
            f"it exactly up to there"
        )
    return context


def refuse_generation_options(generation: GenerationConfig | None, ignored: Sequence[str], name: str) -> None:
    """A `UserError` where the checkpoint's generation_config.json asks for more than decoding here does. ignored: the options that the
    caller wants left out (`target.ignore_generation_options`)."""
    for option in ignored:
        if option not in NEUTRAL:
            raise UserError(f"target.ignore_generation_options '{option}' is no option that changes texts; known: {', '.join(NEUTRAL)}")
    if generation is None:
        return
    for option, neutral in NEUTRAL.items():
        value = getattr(generation, option, None)
        if value in neutral or option in ignored or option in HONOURED:
            continue
        raise UserError(
            f"target '{name}': its generation_config.json asks for {option}={value!r}, which is not applied here: texts would not be those "
            f"of its own `generate`; set target.ignore_generation_options=[{option}] to decode without it"
        )


def own_options(generation: GenerationConfig | None, ignored: Sequence[str]) -> dict[str, Any]:
    """What the checkpoint's generation_config.json asks for of what is honoured here."""
    asked = {option: getattr(generation, option, None) for option in HONOURED if option not in ignored}
    return {option: value for option, value in asked.items() if value not in NEUTRAL[option]}


def processing_of(options: dict[str, Any], ends: Sequence[int], device: str) -> Processing:
    """How logits are changed for these options of a generation configuration. ends: the end tokens.

    A repetition penalty alone is computed for whole trees at once; anything else goes through transformers' own processors.
    """
    changing = {option: options[option] for option in HONOURED[:-2] if options.get(option) not in NEUTRAL[option]}
    if set(changing) <= {"repetition_penalty"}:
        return Processing(**changing)
    eos = list(ends)
    made: dict[str, Any] = {
        "sequence_bias": SequenceBiasLogitsProcessor, "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, eos_token_id=eos or None),
        "min_length": lambda least: MinLengthLogitsProcessor(least, eos, device=device) if eos else None,
        "suppress_tokens": lambda tokens: SuppressTokensLogitsProcessor(tokens, device=device),
    }  # fmt: skip
    processors: list[LogitsProcessor | None] = [make(changing[option]) for option, make in made.items() if option in changing]
    return Processing(processors=tuple(processor for processor in processors if processor is not None))


def check_end_ids(eos_ids: Sequence[int], vocab_size: int, name: str) -> None:
    """A `UserError` where a text is to end with a token that the model cannot write."""
    for token in eos_ids:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"target '{name}': its end token {token} is none of its {vocab_size:,} tokens; mend eos_token_id in generation_config.json "
                f"or in the tokenizer's files"
            )


def _ropes(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """(kind, parameters) of each rotary embedding; layer types may have their own."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    ropes = []
    for rope in nested or [parameters]:
        ropes.append((str(rope.get("rope_type") or rope.get("type") or "default"), rope))
    return ropes
