"""The Python inference API: `SpeculativeDecoder` generates and streams with a target, a drafter and a rule."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, groupby
from numbers import Integral, Real
from operator import or_
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import numpy as np
import yaml
from pydantic import Field
from torch import Tensor
from typing_extensions import Unpack

from drafttrain.core.config import Config, parse
from drafttrain.core.errors import UserError, first_line, nearest, refuse_halves
from drafttrain.core.layers import in_precision
from drafttrain.core.packed import packed
from drafttrain.core.plan import Chain, Plan, Shape
from drafttrain.core.processing import LogitsProcessor, Processing
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Topology
from drafttrain.drafters import DRAFTERS
from drafttrain.drafters.base import Drafter
from drafttrain.drafters.corrupt import Corrupt
from drafttrain.drafters.hybrid import Hybrid, HybridConfig
from drafttrain.drafters.pool import DrafterPool
from drafttrain.export.load import load_drafter
from drafttrain.runtime.costs import measured_hybrid_costs
from drafttrain.runtime.generate import DecodingLoop, RoundHook, served
from drafttrain.runtime.policy import POLICIES, Fixed, Policy, PolicyConfig
from drafttrain.runtime.pool import PLAIN, Routed
from drafttrain.runtime.proposer import Drafting, Plain, Prefetching, Proposer
from drafttrain.runtime.router import ROUTERS, Router, RouterConfig, load_scores, save_scores
from drafttrain.runtime.rows import Request
from drafttrain.runtime.stats import Statistics
from drafttrain.target.adapter import Target, check_prompt_ids
from drafttrain.target.files import TargetConfig
from drafttrain.target.template import plain_ids, render, special_tokens
from drafttrain.verify import RULES, build
from drafttrain.verify.base import Rule, RuleConfig

Prompt = str | list[dict[str, str]] | list[int] | Tensor
"""A user's message (wrapped in the chat template where there is one), a conversation, or token ids as they are: a list, or [T] integers."""

Stop = str | Sequence[str] | None
"""What ends a text: a string, several, or nothing but the target's own end."""

RESOLVED = "recipe.resolved.yaml"
"""The recipe that a run was made from, in its folder."""

HALF = "\ufffd"
"""What a tokenizer shows for the bytes of a character that is not whole yet."""

REFUSED = {
    "num_beams": "a beam is not a sample of the target's distribution",
    "guidance_scale": "it reads a second forward of the target at every token",
    "penalty_alpha": "contrastive search is not a sample of the target's distribution",
    "prompt_lookup_num_tokens": "the runtime drafts itself; use an ngram drafter",
    "assistant_model": "the runtime drafts itself; use a small_lm drafter",
}


class Options(TypedDict, total=False):
    """Further options of `generate` and `stream`, all of them applied at every node of a tree along its own path. What is left out, or
    None, is as the target's own generation_config.json says."""

    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str | Sequence[int]] | None
    """Texts, or token ids as they are. A text is forbidden with and without a space before it."""
    no_repeat_ngram_size: int | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] | None
    """A function of (texts [n, T], logits [n, V]), several, or transformers' `LogitsProcessorList`; pure functions of each text and its
    logits."""


CUTS = ("min_p", "typical_p", "top_n_sigma")
"""Options of `Sampling` beside temperature, top_k and top_p."""


if TYPE_CHECKING:
    AnyRule = RuleConfig | str
    AnyPolicy = PolicyConfig | str
    AnyRouter = RouterConfig | str
else:
    AnyRule = Literal[("auto", *RULES)] | Annotated[reduce(or_, (rule.Config for rule in RULES.values())), Field(discriminator="name")]
    AnyPolicy = str | Annotated[reduce(or_, (policy.Config for policy in POLICIES.values())), Field(discriminator="name")]
    AnyRouter = (
        Literal[tuple(ROUTERS)] | Annotated[reduce(or_, (router.Config for router in ROUTERS.values())), Field(discriminator="name")]
    )


class RuntimeConfig(Config):
    """How to draft and verify."""

    shape: Shape = Chain()
    """The tree of a round: `chain`, `static` or `dynamic`."""
    draws: Draws | Literal["auto"] = "auto"
    """How siblings are drawn. `auto`: `deterministic` at temperature 0 and in dynamic trees, `iid` in chains, `without_replacement` in
    static trees."""
    rule: AnyRule = "auto"
    """Verification rule: its name, or `name` with its options. `auto`: `greedy` at temperature 0, else `rejection` for chains and
    `recursive` for trees."""
    policy: AnyPolicy = "fixed"
    """What makes the plans of rounds: its name, or `name` with its options. `adaptive` decodes plainly while drafting loses: greedy texts
    stay the same, and sampled ones keep the target's distribution, but as it goes by measured times, the same seed may give another
    sample."""
    treat_as: Literal["deterministic"] | None = None
    """Verify as if every token had been chosen with certainty: exact for any tree, with fewer acceptances."""
    drafter_temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The drafter's own temperature; by default the target's."""
    hybrid: HybridConfig | None = None
    """Draft beside the trained drafter with a lookup that costs nothing, under one budget of nodes; None drafts with the drafter alone."""
    corrupt: float = Field(default=0.0, ge=0, le=1)
    """Share of drafted tokens that are swapped for random ones: the control that shows what a lossy rule lets through. Never of use
    otherwise."""
    prefetch: int = Field(default=0, ge=0)
    """Prefetched drafts a row on what the target will commit, drafted on while it scores; 0 places none. Only for drafters that read
    nothing of the target (`small_lm`). Reports hits and drafter calls saved; one process computes one thing at a time, so it is not faster
    for it."""
    drafters: tuple[str, ...] = ()
    """Further drafters beside the recipe's own, which is the first: folders of trained ones (a run, or the drafter inside) for the same
    target, or the name of a family without weights (`ngram`). A router chooses among them, row by row and round by round."""
    router: AnyRouter = "fixed"
    """What chooses: `fixed` (the first drafter), `task`, `ucb`, `exp3`, `halving` or `hedge`, as a name or `name` with its options."""
    prefill_chunk: int = Field(default=512, ge=1)
    """Prompt tokens read in one forward."""

    @property
    def policy_name(self) -> str:
        return self.policy if isinstance(self.policy, str) else self.policy.name

    @property
    def router_config(self) -> RouterConfig:
        """The router's options; a name alone leaves them at their defaults."""
        if not isinstance(self.router, str):
            return self.router
        kind = ROUTERS[self.router].Config
        if any(field.is_required() for field in kind.model_fields.values()):
            raise UserError(f"runtime.router '{self.router}' has options without a default; give them: {{name: {self.router}, ...}}")
        return kind(name=self.router)

    @property
    def pooled(self) -> bool:
        """Whether a router chooses who drafts."""
        return bool(self.drafters) or self.router != "fixed"

    def check_pool(self, drafters: int) -> None:
        """A `UserError` where a pool of so many drafters cannot be decoded with as asked."""
        reasons = {
            "runtime.hybrid drafts beside one drafter; leave it out, or name its lookup in runtime.drafters": self.hybrid is not None,
            "runtime.corrupt swaps the tokens of one drafter; set it to 0": self.corrupt,
            "runtime.prefetch drafts ahead with one drafter; set it to 0": self.prefetch,
            "policy 'decision' was trained for one drafter; use 'fixed', 'confidence' or 'adaptive'": self.policy_name == "decision",
        }
        for reason, holds in reasons.items():
            if holds:
                raise UserError(f"runtime.drafters {list(self.drafters)}, router '{self.router_config.name}': {reason}")
        self.router_config.check_arms(drafters)

    @property
    def topology(self) -> Topology:
        """What rules are shown: beside a lookup even a chain branches."""
        return "chain" if self.shape.shape == "chain" and self.hybrid is None else "tree"

    def fitted(self, sampling: Sampling, drafter: Drafter | type[Drafter] | None = None) -> tuple[Rule, Plan]:
        """The rule and the plan for these sampling options, or a `UserError` where they would not be exact, or the rule could not work.

        drafter: it or its family, where it is known: some can draw in one way only, or give no distributions.
        """
        rule = self._rule(sampling)
        if rule.leaves_next_open:
            self._check_open(rule, drafter)
        chosen = self.hybrid is not None or self.corrupt or rule.leaves_next_open
        able = frozenset({"deterministic"}) if chosen else (drafter or Drafter).draws
        if self.pooled:
            able = able.intersection(*(DRAFTERS[name].draws for name in self.drafters if name in DRAFTERS))
            if isinstance(drafter, type):
                self.check_pool(1 + len(self.drafters))
        draws: Draws = _auto_draws(self.shape.shape, sampling, able) if self.draws == "auto" else self.draws
        if draws not in able:
            raise UserError(f"runtime.draws '{draws}': this drafter makes {' or '.join(sorted(able))} draws only; leave draws at 'auto'")
        if self.shape.shape == "dynamic" and draws != "deterministic":
            raise UserError(f"runtime.draws '{draws}': dynamic trees drop tokens after seeing them: only 'deterministic' draws stay exact")
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            raise UserError(f"runtime.policy '{self.policy}' is unknown{nearest(self.policy, POLICIES)}; known: {', '.join(POLICIES)}")
        if not isinstance(self.policy, str):
            self.policy.check(sampling)
        rule.check(self.topology, self.treat_as or draws, sampling)
        if rule.needs_draft_probs and (self.hybrid is not None or not (drafter or Drafter).gives_draft_probs):
            what = "a tree that a lookup has a part in (runtime.hybrid)" if self.hybrid is not None else "a tree of this drafter"
            raise UserError(
                f"rule '{rule.config.name}' reads draft distributions, but {what} has none; choose another rule, or a trained drafter alone"
            )
        return rule, Plan(self.shape, draws, self.drafter_temperature, record_probs=rule.needs_draft_probs)

    def _check_open(self, rule: Rule, drafter: Drafter | type[Drafter] | None) -> None:
        """A `UserError` where nothing could be drafted below candidates of the target."""
        reasons = {
            "a dynamic shape may drop them (runtime.shape); use a static one, as {shape: static, children: [4, 1, 1, 1]}":
                self.shape.shape == "dynamic",
            "a lookup drafts under committed tokens alone; leave runtime.hybrid out": self.hybrid is not None,
            "runtime.corrupt would swap them; set it to 0": self.corrupt,
            "runtime.prefetch drafts on a guess of the next token; set it to 0": self.prefetch,
            "a router may choose a round without a draft; leave runtime.drafters and runtime.router out": self.pooled,
            "this drafter is a lookup, which drafts under committed tokens alone; use a trained one": not (drafter or Drafter).trainable,
        }  # fmt: skip
        for reason, holds in reasons.items():
            if holds:
                raise UserError(f"rule '{rule.config.name}' leaves the next token open, and the drafter goes on below candidates: {reason}")

    def check_prefetch(self, name: str, needs: frozenset[str], trainable: bool) -> None:
        """A `UserError` where no prefetched draft could be made, or one would change a text. name, needs, trainable: the drafter's."""
        reasons = {
            f"a {name} drafter reads the target's features ({', '.join(sorted(needs))}) at prefetched tokens": bool(needs),
            f"a {name} drafter takes no time to save": not trainable,
            "beside a lookup (runtime.hybrid) there are no distributions to prefetch by": self.hybrid is not None,
            "swapped tokens (runtime.corrupt) have no distribution to prefetch by": bool(self.corrupt),
            f"policy '{self.policy_name}' plans a round from the one before, which is not known yet": self.policy_name != "fixed",
        }
        for reason, holds in reasons.items():
            if holds:
                raise UserError(f"runtime.prefetch {self.prefetch}: {reason}; set it to 0, or use small_lm alone, policy fixed")

    def _rule(self, sampling: Sampling) -> Rule:
        if not isinstance(self.rule, str):
            return build(self.rule)
        name = _auto_rule(self.topology, sampling) if self.rule == "auto" else self.rule
        return build(RULES[name].Config(name=name))

    def planner(self, plan: Plan) -> Policy:
        """The policy that makes rounds' plans out of `plan`."""
        config = self.policy
        if isinstance(config, str):
            kind = POLICIES[config].Config
            if any(field.is_required() for field in kind.model_fields.values()):
                raise UserError(f"runtime.policy '{config}' has options without a default; give them: {{name: {config}, ...}}")
            config = kind(name=config)
        return POLICIES[config.name](plan, config)


@dataclass
class Generation:
    """One sample of one prompt."""

    tokens: list[int]
    text: str
    origins: list[int]  # of each token: 1 the drafter's, 0 the target's
    finish: Literal["eos", "stop", "length"]
    statistics: Statistics


@dataclass
class Piece:
    """A stretch of streamed text from one origin."""

    text: str
    origin: int


class Stream(Iterator[Piece]):
    """One answer as it is written, piece by piece, and what it took so far."""

    def __init__(self, pieces: Generator[Piece, None, None], loop: DecodingLoop) -> None:
        self._pieces, self._loop = pieces, loop

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the decoding early and lets go of what it holds; what was measured so far stays."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def statistics(self) -> Statistics:
        """Of the rounds so far (waits for the device)."""
        return self._loop.statistics()[0]

    @property
    def round_seconds(self) -> list[dict[str, float]]:
        """Each round's seconds a phase."""
        return self._loop.clock.runs()[1:]


class SpeculativeDecoder:
    """Decodes a target's own text faster, with a drafter; without one, plainly and by the same loop."""

    def __init__(
        self, target: Target, drafter: Drafter | None = None, runtime: RuntimeConfig | Mapping[str, Any] | None = None
    ) -> None:
        """runtime: a configuration, or what a recipe's `runtime` section would hold."""
        self.target = target
        if isinstance(target, (str, Path, TargetConfig, type(None))):
            raise UserError(f"target {shortened(target)}: expected a loaded target; from_pretrained loads one by its name")
        if isinstance(drafter, (str, Path)):
            raise UserError(f"drafter {shortened(drafter)}: expected a loaded drafter, or none; from_pretrained loads one from its folder")
        if not isinstance(runtime, (RuntimeConfig, Mapping, type(None))):
            raise UserError(f"runtime {shortened(runtime)}: expected a RuntimeConfig, or a mapping of what a recipe's section would hold")
        self.runtime = runtime if isinstance(runtime, RuntimeConfig) else parse(RuntimeConfig, dict(runtime or {}), "runtime")
        if drafter is not None:
            drafter.check_layers(target.aux_layers)
            if isinstance(self.runtime.policy, PolicyConfig):
                self.runtime.policy.check_drafter(drafter)
        if drafter is not None and self.runtime.prefetch:
            self.runtime.check_prefetch(drafter.config.name, drafter.needs, drafter.trainable)
        if self.runtime.pooled:
            drafter = self._pool(drafter)
        self.hybrid_costs: dict[str, float] = {}
        """What `auto` costs of `runtime.hybrid` turned out to be here."""
        if drafter is not None and self.runtime.hybrid is not None:
            drafter = Hybrid(self._priced(self.runtime.hybrid, drafter), drafter)
        if drafter is not None and self.runtime.corrupt:
            drafter = Corrupt(self.runtime.corrupt, drafter)
        self._policies: dict[Plan, Policy] = {}  # they learn from batch to batch
        self.drafter = None if drafter is None else packed(in_precision(drafter, target.device, target.dtype)).eval()
        if drafter is not None and drafter.max_depth is not None and self.runtime.shape.depth > drafter.max_depth:
            raise UserError(
                f"runtime.shape drafts {self.runtime.shape.depth} tokens deep, but this {drafter.config.name} drafter has "
                f"{drafter.max_depth} heads; choose a shallower shape, or train more heads"
            )

        self.router_costs = self._router_costs()
        """What a round of each of the router's arms takes, in plain target forwards."""
        self._shared_router = self._remembered() if isinstance(self.drafter, DrafterPool) else None

    # -- several drafters -------------------------------------------------------------------------------------------------------------

    def _pool(self, own: Drafter | None) -> DrafterPool:
        """The drafter, if there is one, and those that `runtime.drafters` names."""
        members = [] if own is None else [own]
        members += [self._member(name) for name in self.runtime.drafters]
        if not members:
            name = self.runtime.router_config.name
            raise UserError(f"runtime.router '{name}': there is no drafter to choose; name some in runtime.drafters")
        self.runtime.check_pool(len(members))
        pool = DrafterPool(members)
        self.runtime.router_config.check_target(self.target.fingerprint)
        pool.check_layers(self.target.aux_layers)
        return pool

    def _member(self, name: str) -> Drafter:
        if name in DRAFTERS and not Path(name).exists():
            family = DRAFTERS[name]
            if family.trainable:
                raise UserError(f"runtime.drafters '{name}' is a family that is trained; give the folder of a trained one")
            return family(family.Config(name=name), self.target.shape)
        return load_drafter(found_drafter(name), target=self.target)

    def _router_costs(self) -> list[float]:
        if not isinstance(self.drafter, DrafterPool):
            return []
        config = self.runtime.router_config
        if config.costs == "auto":
            bare, nodes = RuntimeConfig(shape=self.runtime.shape, prefill_chunk=self.runtime.prefill_chunk), self.runtime.shape.nodes
            measured = [measured_hybrid_costs(SpeculativeDecoder(self.target, one, bare), nodes) for one in self.drafter.members]
            costs = [1 + found["draft_cost"] + nodes * found["node_cost"] for found in measured]
        else:
            costs = [1.0] * len(self.drafter.members) if config.costs is None else list(config.costs)
        return costs + [1.0] * config.plain

    def _new_router(self, *seed: int) -> Router:
        config = self.runtime.router_config
        return ROUTERS[config.name](config, self.router_costs, self.runtime.shape.depth, np.random.default_rng(seed))

    def _remembered(self) -> Router | None:
        """The one router of all requests, where it remembers."""
        config = self.runtime.router_config
        if not config.remember:
            return None
        router = self._new_router(0)
        if config.scores is not None and Path(config.scores).exists():
            load_scores(router, self._arm_labels, Path(config.scores))
        return router

    @property
    def _arm_labels(self) -> list[str]:
        assert isinstance(self.drafter, DrafterPool)
        return [*self.drafter.labels, *[PLAIN] * self.runtime.router_config.plain]

    def _keep_scores(self) -> None:
        """After each decoding, where a file was named."""
        if self._shared_router is not None and self.runtime.router_config.scores is not None:
            self.save_scores()

    def save_scores(self, path: Path | None = None) -> None:
        """Writes what the router has learnt; by default to `runtime.router.scores`."""
        path = Path(self.runtime.router_config.scores or "") if path is None else path
        if self._shared_router is None or not path.name:
            raise UserError("there are no scores to save: set runtime.router.remember, and runtime.router.scores or a path")
        save_scores(self._shared_router, self._arm_labels, path)

    def _priced(self, options: HybridConfig, drafter: Drafter) -> HybridConfig:
        """The same with this device's prices where they are `auto`."""
        if not options.unmeasured:
            return options
        bare = RuntimeConfig(shape=self.runtime.shape, prefill_chunk=self.runtime.prefill_chunk)
        found = measured_hybrid_costs(SpeculativeDecoder(self.target, drafter, bare), self.runtime.shape.nodes)
        self.hybrid_costs = {name: found[name] for name in options.unmeasured}
        return options.model_copy(update=self.hybrid_costs)

    @classmethod
    def from_pretrained(
        cls, target: str | Path | TargetConfig | Target, drafter: str | Path | Drafter | None = None,
        runtime: RuntimeConfig | Mapping[str, Any] | None = None, **options: Any,
    ) -> SpeculativeDecoder:
        """Loads both.

        target: a Hub id, a folder, `smollm2-demo`, a configuration, or a loaded target. drafter: the folder of a trained drafter, of the
        run that trained it, or a published head (a folder, a GGUF file, a Hub id: see `load_drafter`). runtime: by default what the
        recipe of that run says. options: fields of `TargetConfig`, such as `dtype="float32"`, which go before the configuration's own;
        without `aux_layers`, the target hands over the layers that the drafter was trained on. Raises `UserError` for unknown options, and
        where the drafter was trained on another target, or on other layers.
        """
        if not isinstance(target, (str, Path, TargetConfig, Target)):
            raise UserError(f"target {shortened(target)}: expected a Hub id, a folder, `smollm2-demo`, a TargetConfig or a loaded target")
        if not isinstance(drafter, (str, Path, Drafter, type(None))):
            raise UserError(f"drafter {shortened(drafter)}: expected the folder of a trained drafter or of its run, or a loaded drafter")
        if runtime is None and isinstance(drafter, (str, Path)):
            runtime = runtime_of(Path(drafter))
        if isinstance(target, (str, Path)):
            target = TargetConfig(model=str(target))
        if isinstance(target, TargetConfig):
            target = parse(TargetConfig, {**target.model_dump(), **options}, "SpeculativeDecoder.from_pretrained")
        elif options:
            raise UserError(f"option '{next(iter(options))}' beside a target that is loaded already: it is of loading; give it there")
        loaded = Target.load(target) if isinstance(target, TargetConfig) else target
        made = load_drafter(found_drafter(drafter), target=loaded) if isinstance(drafter, (str, Path)) else drafter
        if made is not None and isinstance(target, TargetConfig) and target.aux_layers is None:
            loaded.aux_layers = made.target.aux_layers
        return cls(loaded, made, runtime)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 0, stop: Stop = None, n: int = 1, batch_size: int = 16, on_round: RoundHook | None = None,
        **options: Unpack[Options],
    ) -> list[Generation]:
        """`n` samples of each prompt, prompt after prompt.

        The same seed gives the same texts, whatever the batch size. batch_size: rows decoded at a time; a finished one makes room for the
        next prompt, and the samples of one prompt are decoded together, even where they are more. stop: a string, or several, that end a
        text, themselves left out. options: see `Options`. Raises
        `UserError` for an empty or too long prompt, and for options out of range, unknown, or not to be kept exactly.
        """
        sampling, processing = self._drawing(Sampling(temperature, top_k, top_p), options)
        _check_count("batch_size", batch_size, "at least one row is decoded at a time")
        stops = self._stops(stop)
        requests = self.requests(_as_list(prompts), max_new_tokens, n)
        loop = self.batch(sampling, seed, stops, on_round, processing)
        origins: list[list[int]] = [[] for _ in requests]
        for gained in chain.from_iterable(served(loop, requests, batch_size)):
            origins[gained.row] += gained.origins
        self._keep_scores()
        finished = zip(loop.written, origins, loop.statistics(), strict=True)
        return [self._generation(written, origin, stops, max_new_tokens, counts) for written, origin, counts in finished]

    def stream(
        self, prompt: Prompt, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
        stop: Stop = None, on_round: RoundHook | None = None, **options: Unpack[Options],
    ) -> Stream:
        """One sample as it is written: what may yet become a stop string, or half a character, waits."""
        sampling, processing = self._drawing(Sampling(temperature, top_k, top_p), options)
        stops, request = self._stops(stop), self.requests([prompt], max_new_tokens, 1)
        loop = self.batch(sampling, seed, stops, on_round, processing)
        return Stream(self._written(loop, request, stops), loop)

    def _written(self, loop: DecodingLoop, request: list[Request], stops: tuple[str, ...]) -> Generator[Piece, None, None]:
        tokens: list[int] = []
        origins: list[int] = []  # of each whole character
        text = shown = ""
        for gained in chain.from_iterable(served(loop, request, 1)):
            for token, origin in zip(gained.tokens, gained.origins, strict=True):
                tokens.append(token)
                text = self._text(tokens, stops)
                whole = text.rstrip(HALF)
                origins += [origin] * (len(whole) - len(origins))
                sure = whole[: len(whole) - _undecided(whole, stops)]
                if sure.startswith(shown):
                    yield from _pieces(sure, origins, len(shown))
                    shown = sure
        self._keep_scores()
        yield from _pieces(text, origins + [0] * len(text), len(shown))

    def _stops(self, stop: Stop) -> tuple[str, ...]:
        given: Any = () if stop is None else (stop,) if isinstance(stop, str) else stop
        if not _all_are(str, given):
            raise UserError(f"stop {stop!r}: expected a string or a list of strings; leave it out to end at no text")
        stops = tuple(given)
        if "" in stops:
            raise UserError("stop '': an empty string stands everywhere and would end every text; leave it out")
        if stops and self.target.tokenizer is None:
            raise UserError(f"stop {stops[0]!r}: this target has no tokenizer to read texts with; leave stop out")
        special = {} if self.target.tokenizer is None else special_tokens(self.target.tokenizer)
        for word in stops:
            inside = next((token for token in special if token and token in word and token != word), None)
            if inside is not None:
                raise UserError(f"stop {word!r} holds the special token {inside!r}, which texts leave out; give {inside!r} alone")
        return stops

    def _stop_ids(self, stops: tuple[str, ...]) -> set[int]:
        """Stop strings that are special tokens: no text shows them, so that they are looked for among the ids."""
        if not stops or self.target.tokenizer is None:
            return set()
        special = special_tokens(self.target.tokenizer)
        return {special[word] for word in stops if word in special}

    def requests(self, prompts: Sequence[Prompt], max_new_tokens: int, n: int) -> list[Request]:
        """`n` rows for each prompt. Raises `UserError` for one that is empty, too long, or no prompt."""
        _check_count("max_new_tokens", max_new_tokens, "an answer has at least one token")
        _check_count("n", n, "at least one sample is drawn of a prompt")
        tokenized = [self.tokenize(prompt) for prompt in prompts]
        room = self.target.max_context - max_new_tokens
        for prompt in tokenized:
            if len(prompt) > room:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the target's context of "
                    f"{self.target.max_context}; shorten the prompt or lower max_new_tokens"
                )
        requests = []
        for index, prompt in enumerate(tokenized):
            requests += [Request(prompt, index * n + sample, max_new_tokens, index) for sample in range(n)]
        return requests

    def tokenize(self, prompt: Prompt) -> list[int]:
        """The ids that stand in the cache before the first new token."""
        tokenizer, vocab_size = self.target.tokenizer, self.target.vocab_size
        given: Any = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if isinstance(given, (str, list, tuple)) and not (given.strip() if isinstance(given, str) else given):
            raise UserError("an empty prompt: give a message, a conversation or token ids")
        if _all_are(Integral, given):
            check_prompt_ids(given, vocab_size, "a prompt")
            return [int(token) for token in given]
        if not isinstance(given, str) and not _all_are(dict, given):
            raise UserError(
                f"prompt {shortened(given)}: expected a message's text, a conversation such as "
                f'[{{"role": "user", "content": "..."}}], or a list of token ids'
            )
        if tokenizer is None:
            raise UserError("this target has no tokenizer: give prompts as token ids")
        refuse_halves(given, "prompt")
        if isinstance(given, str) and not tokenizer.chat_template:
            ids = plain_ids(tokenizer, given)
        else:
            messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
            ids = list(tokenizer(render(tokenizer, messages, "prompt"), add_special_tokens=False)["input_ids"])
        check_prompt_ids(ids, vocab_size, "a prompt")
        return ids

    def _drawing(self, sampling: Sampling, options: Options) -> tuple[Sampling, Processing]:
        """How tokens are drawn, and how logits are changed before; a `UserError` for an option out of range or unknown."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        for name in options:
            if name not in Options.__annotations__:
                reason = f"is refused: {REFUSED[name]}" if name in REFUSED else f"is unknown{nearest(name, Options.__annotations__)}"
                raise UserError(f"option '{name}' {reason}; known: {', '.join(Options.__annotations__)}")
        sampling = self.target.sampling(sampling.check())._replace(**{name: given[name] for name in CUTS if name in given}).check()
        ngram = given.get("no_repeat_ngram_size")
        if ngram is not None and not (_is_whole(ngram) and ngram >= 0):
            raise UserError(f"no_repeat_ngram_size {ngram!r}: expected a whole number from 0 up; 0 repeats freely")
        penalty = given.get("repetition_penalty")
        numbers: dict[str, Any] = {name: _as_number(name, given[name]) for name in PENALTIES if name in given}
        Processing(**numbers).check(self.target.vocab_size)
        own = self.target.processing(repetition_penalty=penalty, no_repeat_ngram_size=ngram)
        asked = replace(
            own, presence_penalty=given.get("presence_penalty", 0.0), frequency_penalty=given.get("frequency_penalty", 0.0),
            logit_bias=_as_bias(given.get("logit_bias", {})), bad_words=self._bad_words(given.get("bad_words", ())),
            processors=own.processors + _as_processors(given.get("logits_processor", ())),
        )  # fmt: skip
        return sampling, asked.check(self.target.vocab_size)

    def _bad_words(self, words: Any) -> tuple[tuple[int, ...], ...]:
        """As token ids."""
        if isinstance(words, str) or not isinstance(words, Sequence):
            raise UserError(f"bad_words {words!r}: expected a list of texts, or of lists of token ids")
        out: list[tuple[int, ...]] = []
        for word in words:
            if not isinstance(word, str):
                if not _all_are(Integral, word):
                    raise UserError(f"bad_words {word!r}: expected a text, or a list of token ids")
                out.append(tuple(map(int, word)))
                continue
            if self.target.tokenizer is None:
                raise UserError(f"bad_words {word!r}: this target has no tokenizer; give token ids")
            for text in (word, " " + word.lstrip()):
                out.append(tuple(self.target.tokenizer(text, add_special_tokens=False)["input_ids"]))
        return tuple(dict.fromkeys(out))

    def batch(
        self, sampling: Sampling, seed: int = 0, stop: tuple[str, ...] = (), on_round: RoundHook | None = None,
        processing: Processing | None = None,
    ) -> DecodingLoop:
        """The loop itself, ready to `start` on requests and to `step` round by round, for whoever needs to stand between rounds.

        processing: what changes the target's logits, sampling being all there is; None: both are joined by what the target's own
        configuration asks for.
        """
        if not (_is_whole(seed) and 0 <= seed < 2**63):
            raise UserError(f"seed {seed!r}: expected a whole number from 0 to 2^63 - 1; take another one")
        if not (on_round is None or callable(on_round)):
            raise UserError(f"on_round {on_round!r}: expected a function of a `RoundRecord`")
        if processing is None:
            sampling, processing = self.target.sampling(sampling.check()), self.target.processing()
        rule, plan = self.runtime.fitted(sampling.check(), self.drafter)
        if self.drafter is None:  # a lone root is a chain of deterministic draws, whatever the drafted trees would be
            lone = RuntimeConfig(shape=Chain(length=1), draws="deterministic", rule="auto" if sampling.greedy else "recursive")
            rule, plan = lone.fitted(sampling)
        if plan not in self._policies:
            self._policies[plan] = Fixed(plan) if self.drafter is None else self.runtime.planner(plan)
        stopper = None if not stop else lambda request, tokens: self._keep(tokens, stop)
        proposer, chunk = self._proposer(rule, seed), self.runtime.prefill_chunk
        return DecodingLoop(
            self.target, proposer, rule, self._policies[plan], sampling, seed, stopper, on_round, chunk, processing=processing
        )

    def _proposer(self, rule: Rule, seed: int) -> Proposer:
        """Who drafts for one loop."""
        runtime, drafter = self.runtime, self.drafter
        if drafter is None:
            return Plain()
        if isinstance(drafter, DrafterPool):
            reads = ROUTERS[runtime.router_config.name].reads_prompt
            return Routed(drafter, lambda stream: self._shared_router or self._new_router(seed, stream), runtime.treat_as, reads)
        if runtime.prefetch:
            return Prefetching(drafter, self.target.head, runtime.prefetch, runtime.treat_as)
        return Drafting(drafter, runtime.treat_as, rule.leaves_next_open)

    def _keep(self, tokens: list[int], stop: tuple[str, ...]) -> int:
        """The fewest tokens that hold a stop string, or all."""
        stop_ids = self._stop_ids(stop)
        for count, token in enumerate(tokens, 1):
            if token in stop_ids:
                tokens = tokens[:count]
                break
        if self._stop_at(self._decode(tokens), stop) < 0:
            return len(tokens)
        return next(count for count in range(1, len(tokens) + 1) if self._stop_at(self._decode(tokens[:count]), stop) >= 0)

    def _generation(
        self, tokens: list[int], origins: list[int], stop: tuple[str, ...], limit: int, statistics: Statistics
    ) -> Generation:
        finish: Literal["eos", "stop", "length"] = "length"
        if tokens and tokens[-1] in self.target.eos_ids:
            finish = "eos"
        elif stop and ((tokens[-1:] and tokens[-1] in self._stop_ids(stop)) or self._stop_at(self._decode(tokens), stop) >= 0):
            finish = "stop"
        return Generation(tokens, self._text(tokens, stop), origins, finish, statistics)

    def _text(self, tokens: list[int], stop: tuple[str, ...]) -> str:
        text = self._decode(tokens)
        cut = self._stop_at(text, stop)
        return text if cut < 0 else text[:cut]

    def _decode(self, tokens: list[int]) -> str:
        tokenizer = self.target.tokenizer
        return "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)

    @staticmethod
    def _stop_at(text: str, stop: tuple[str, ...]) -> int:
        """Where the earliest stop string begins; -1 for nowhere."""
        return min((at for at in (text.find(word) for word in stop) if at >= 0), default=-1)


def found_drafter(drafter: str | Path) -> str | Path:
    """A folder, or what may be a Hub id as it is."""
    return find_drafter(Path(drafter)) if Path(drafter).exists() else drafter


def find_drafter(folder: Path) -> Path:
    """The drafter's folder, given it or the run that trained it."""
    inner = folder / "drafter"
    return inner if (inner / "config.json").exists() else folder


def runtime_of(run: Path) -> RuntimeConfig | None:
    """How the recipe of a run decodes; None where the folder is no run's."""
    path = run / RESOLVED
    if not path.exists():
        return None
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"'{path}': damaged ({first_line(error)}); give the folder of the drafter inside, and a runtime") from error
    return parse(RuntimeConfig, recipe.get("runtime", {}) if isinstance(recipe, dict) else recipe, str(path))


PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def _as_number(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise UserError(f"{name} {value!r}: expected a number")
    return float(value)


def _as_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(bias, Mapping):
        raise UserError(f"logit_bias {shortened(bias)}: expected a mapping of token ids to numbers, such as {{13: -2.5}}")
    out = []
    for token, value in bias.items():
        if not _is_whole(token):
            raise UserError(f"logit_bias: token {token!r} is no token id; give whole numbers")
        out.append((int(token), _as_number(f"logit_bias of token {token}", value)))
    return tuple(sorted(out))


def _as_processors(given: Any) -> tuple[LogitsProcessor, ...]:
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _undecided(text: str, stops: tuple[str, ...]) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    starts = (word[:size] for word in stops for size in range(1, len(word)))
    return max((len(start) for start in starts if text.endswith(start)), default=0)


def _pieces(text: str, origins: list[int], start: int) -> Iterator[Piece]:
    """`text` from `start` on, cut where the origin of its characters changes."""
    for origin, places in groupby(range(start, len(text)), key=lambda place: origins[place]):
        yield Piece("".join(text[place] for place in places), origin)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a lone conversation or a lone list of ids is one prompt, and what is neither is left to `tokenize`."""
    given: Any = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    lone = not isinstance(given, (list, tuple)) or (len(given) > 0 and isinstance(given[0], (dict, Integral)))
    return [given] if lone else list(given)


def _all_are(kind: type, given: Any) -> bool:
    """Whether it is a list of nothing else."""
    return isinstance(given, (list, tuple)) and all(isinstance(one, kind) for one in given)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_count(name: str, value: Any, reason: str) -> None:
    if not _is_whole(value) or value < 1:
        raise UserError(f"{name} {value!r}: {reason}; give a whole number from 1 up")


def _auto_draws(shape: str, sampling: Sampling, able: frozenset[str]) -> Draws:
    if sampling.greedy or shape == "dynamic" or able == {"deterministic"}:
        return "deterministic"
    return "iid" if shape == "chain" else "without_replacement"


def _auto_rule(topology: Topology, sampling: Sampling) -> str:
    if sampling.greedy:
        return "greedy"
    return "rejection" if topology == "chain" else "recursive"
