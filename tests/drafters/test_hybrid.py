"""Two proposers in one tree: what is merged, what is kept, and when the trained one is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.core.nodes import Nodes
from drafttrain.core.plan import Chain, Dynamic, Static
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Tree
from drafttrain.core.types import Committed
from drafttrain.drafters.hybrid import FREE, TRAINED, Hybrid, HybridConfig, HybridState, Worth, believed, merged, part_of
from drafttrain.runtime.decoder import RuntimeConfig, SpeculativeDecoder
from drafttrain.target.adapter import Target
from tests.families import tiny_drafter, trained_drafter
from tests.tiny import tiny_target

PROMPT = [5, 9, 11, 30, 2, 7]
SHAPE = Dynamic(depth=3, beam=2, top_k=2, nodes=8)


def hybrid(target: Target, **options: float) -> Hybrid:
    return Hybrid(HybridConfig(**options), tiny_drafter("eagle3", target))  # type: ignore[arg-type]


def chain(tokens: list[int], path_prob: list[float], proposer: int) -> Nodes:
    return Nodes(tokens, list(range(len(tokens))), path_prob, [proposer] * len(tokens))


def test_a_shared_prefix_stands_once_and_keeps_the_first_origin_and_the_better_chance() -> None:
    both = merged(chain([4, 5, 6], [0.9, 0.5, 0.2], TRAINED), chain([4, 5, 7], [0.7, 0.6, 0.5], FREE))
    assert both.tokens == [4, 5, 6, 7]
    assert both.parents == [0, 1, 2, 2]
    assert both.proposer == [TRAINED, TRAINED, TRAINED, FREE]
    assert both.path_prob == [0.9, 0.6, 0.2, 0.5]


def test_nodes_stay_while_their_chance_is_worth_their_cost_and_never_without_their_parent() -> None:
    drafter = hybrid(tiny_target(), node_cost=0.1)
    kept = drafter.worth(Nodes([1, 2, 3, 4], [0, 0, 1, 3], [0.9, 0.05, 0.8, 0.7], [FREE] * 4), False, 8)
    assert (kept.tokens, kept.parents) == ([1, 3, 4], [0, 1, 2])  # 0.05 is worth less than 0.1 of the 3.4 tokens a forward
    assert drafter.worth(kept, False, 2).tokens == [1, 3]  # the budget


def test_a_node_stays_just_above_its_cost_and_goes_just_below_it() -> None:
    """The second node, of chance c, adds c tokens to 1.9 and 0.1 to a cost of 1.1: it is worth it from 0.1 * 1.9 / 1.1 on."""
    drafter, edge = hybrid(tiny_target(), node_cost=0.1), 0.1 * 1.9 / 1.1
    for path_prob, stays in ((edge + 1e-3, 2), (edge - 1e-3, 1)):
        nodes = Nodes([1, 2], [0, 0], [0.9, path_prob], [FREE] * 2)
        assert len(drafter.worth(nodes, False, 8).tokens) == stays


def test_the_trained_drafter_is_run_just_above_its_cost_and_not_just_below_it() -> None:
    """Nothing is found: its tokens a cost of 1 + 0.4 + 8 / 2 nodes of 0.05 must be more than 1."""
    drafter, edge = hybrid(tiny_target(), draft_cost=0.4, node_cost=0.05), 0.6
    for gain, runs in ((edge + 1e-3, True), (edge - 1e-3, False)):
        assert drafter.wants_head(chain([], [], FREE), gain, budget=8) is runs


def test_the_trained_drafter_is_run_just_below_what_was_found_costs_and_not_just_above_it() -> None:
    """A node of chance .5 at .05 gives 1.5 / 1.05 alone, and (1.5 + gain / 2) / 1.625 beside the drafter."""
    drafter, edge = hybrid(tiny_target(), draft_cost=0.4, node_cost=0.05), 2 * (1.5 / 1.05 * 1.625 - 1.5)
    for gain, runs in ((edge + 1e-3, True), (edge - 1e-3, False)):
        assert drafter.wants_head(chain([1], [0.5], FREE), gain, budget=8) is runs


def test_the_trained_drafter_is_run_where_nothing_is_found_and_not_where_the_lookup_is_sure() -> None:
    drafter = hybrid(tiny_target(), draft_cost=0.4, node_cost=0.01)
    sure, nothing = chain([1] * 8, [0.95**k for k in range(1, 9)], FREE), chain([], [], FREE)
    assert drafter.wants_head(nothing, gain=1.0, budget=8)
    assert not drafter.wants_head(sure, gain=1.0, budget=8)
    assert not drafter.wants_head(nothing, gain=0.1, budget=8)  # it adds less than it costs: plain decoding


def test_the_trained_drafter_adds_less_where_the_lookup_is_half_sure_of_the_first_token() -> None:
    drafter = hybrid(tiny_target(), draft_cost=0.4, node_cost=0.0)
    assert drafter.wants_head(chain([1], [0.1], FREE), gain=0.6, budget=8)
    assert not drafter.wants_head(chain([1], [0.5], FREE), gain=0.6, budget=8)


def test_chances_are_believed_as_far_as_they_came_true_and_never_above_their_parents() -> None:
    said = Nodes([1, 2, 3], [0, 1, 0], [0.8, 0.4, 0.1], [TRAINED] * 3)
    assert believed(said, 1.0).path_prob == pytest.approx(said.path_prob)
    assert believed(said, 0.5).path_prob == pytest.approx([0.4, 0.1, 0.05])
    assert believed(said, 1.6).path_prob == pytest.approx([1.0, 0.8, 0.16])


def test_what_came_true_is_counted_where_it_could_and_the_lookups_tokens_are_not_the_drafters() -> None:
    drafted = chain([4, 5, 6], [0.5, 0.4, 0.1], TRAINED)
    tree = merged(drafted, chain([4, 9], [0.9, 0.6], FREE))  # 4 is both's, 9 hangs from it
    part = part_of(tree, drafted)
    assert part.chances == pytest.approx([0.0, 0.5, 0.8, 0.25, 0.0])
    assert part.outcome([]) == (pytest.approx(0.5), 0)
    assert part.outcome([1, 4]) == (pytest.approx(1.3), 1)  # below 9 nothing was drafted
    assert part.outcome([1, 2, 3]) == (pytest.approx(1.55), 3)
    assert (part.gained([1, 4]), part.gained([4])) == (1, 0)
    assert Worth(1.0).trust == 1.0 and Worth(1.0, said=8.0, stood=0.0).trust == 0.5


def watched(drafter: Hybrid, rounds: int) -> HybridState:
    """The state after so many rounds of one row."""
    states: list[HybridState] = []
    observe = drafter.observe

    def keep(state: Any, committed: Any) -> None:
        observe(state, committed)
        states.append(state)

    drafter.observe = keep  # type: ignore[method-assign]
    decoder = SpeculativeDecoder(tiny_target(), None, RuntimeConfig(shape=SHAPE))
    decoder.drafter = drafter
    decoder.generate([PROMPT], max_new_tokens=rounds)
    return states[-1]


def test_an_overconfident_drafter_is_believed_less_and_one_that_is_right_is_not() -> None:
    target = tiny_target()
    wrong = tiny_drafter("eagle3", target)
    torch.nn.init.normal_(wrong.lm_head.weight, std=3.0)  # sure of anything
    dear = HybridConfig(draft_cost=0.0, node_cost=0.0)
    assert watched(Hybrid(dear, wrong), 40).worth[0].trust < 0.5
    assert watched(Hybrid(dear, trained_drafter("eagle3", target, [PROMPT])), 24).worth[0].trust > 0.9


def test_what_a_drafter_is_thought_to_add_comes_back_while_it_is_not_run() -> None:
    target = tiny_target()
    drafter = hybrid(target, draft_cost=1e6, draft_gain=2.0)  # never worth its price
    state = watched(drafter, 3)
    state.worth[0] = Worth(0.5, 3.0, 1.0)
    nothing = torch.zeros(1, 1, dtype=torch.long)
    features = {"aux_hidden_states": torch.zeros(1, 1, 3 * 32)}
    drafter.observe(state, Committed(nothing, torch.ones(1, dtype=torch.long), features))
    assert state.worth[0] == Worth(pytest.approx(0.5 + 0.03 * 1.5), 3.0, 1.0)  # type: ignore[arg-type]


def test_a_drafter_that_is_never_right_is_soon_left_alone() -> None:
    target = tiny_target()
    drafter = tiny_drafter("eagle3", target)
    torch.nn.init.normal_(drafter.lm_head.weight, std=1.0)
    decoder = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=SHAPE, hybrid=HybridConfig(draft_cost=0.5)))
    (out,) = decoder.generate([PROMPT], max_new_tokens=60)
    alone = SpeculativeDecoder(target, drafter, RuntimeConfig(shape=SHAPE)).generate([PROMPT], max_new_tokens=60)[0]
    assert out.statistics.drafter_calls < alone.statistics.drafter_calls / 2
    assert out.tokens == alone.tokens


@pytest.mark.parametrize("shape", [SHAPE, Chain(length=5), Static(children=(2, 2, 1))], ids=lambda shape: shape.shape)
def test_what_the_lookup_finds_stands_beside_what_the_trained_drafter_finds(shape: Any) -> None:
    target, prompt = tiny_target(), PROMPT * 2
    drafter = trained_drafter("eagle3", target, [prompt])
    if shape.shape == "static":  # a trained one finds all that the lookup does
        drafter = tiny_drafter("eagle3", target)
    trees: list[Tree] = []
    runtime = RuntimeConfig(shape=shape, hybrid=HybridConfig(draft_cost=0.01, node_cost=0.0))
    SpeculativeDecoder(target, drafter, runtime).generate([prompt], 24, on_round=lambda record: trees.append(record.tree))
    proposers = [set(tree.proposer[tree.live].tolist()) for tree in trees if tree.proposer is not None]
    assert any({TRAINED, FREE} <= proposer for proposer in proposers)
    assert all(int(tree.live.sum()) - 1 <= shape.nodes for tree in trees)


@pytest.mark.parametrize("given", [{"draft_cost": "auto", "node_cost": "auto"}, {"draft_cost": 0.25, "node_cost": "auto"}], ids=str)
def test_prices_that_are_asked_for_are_measured_before_the_first_round(given: dict[str, Any]) -> None:
    target = tiny_target()
    trained = trained_drafter("eagle3", target, [PROMPT])
    target.forwards, trained.calls = 0, 0
    decoder = SpeculativeDecoder(target, trained, RuntimeConfig(shape=SHAPE, hybrid=HybridConfig(**given)))
    drafter = decoder.drafter
    assert isinstance(drafter, Hybrid)
    assert drafter.draft_cost == given["draft_cost"] if given["draft_cost"] != "auto" else 0.01 < drafter.draft_cost < 100
    assert drafter.node_cost != HybridConfig().node_cost and 0 <= drafter.node_cost < 1
    assert decoder.hybrid_costs == {name: getattr(drafter, name) for name, price in given.items() if price == "auto"}
    assert (target.forwards, trained.calls) == (0, 0)  # what was measured with counts nowhere
    assert decoder.generate([PROMPT], 24)[0].tokens == SpeculativeDecoder(target).generate([PROMPT], 24)[0].tokens


def test_any_draws_but_deterministic_are_refused_beside_a_lookup() -> None:
    with pytest.raises(Exception, match="deterministic draws only"):
        RuntimeConfig(shape=Chain(), draws="iid", hybrid=HybridConfig()).fitted(Sampling(1.0))




def test_a_chain_beside_a_lookup_is_verified_as_the_tree_it_may_become() -> None:
    """Rejection would take a node for the child of the one before it, whichever it hangs from."""
    beside = HybridConfig()
    rule, _ = RuntimeConfig(shape=Chain(length=3), hybrid=beside).fitted(Sampling(0.8))
    assert rule.config.name == "recursive"
    with pytest.raises(UserError, match="rule 'rejection' is not exact for deterministic draws in a tree"):
        RuntimeConfig(shape=Chain(length=3), hybrid=beside, rule="rejection").fitted(Sampling(0.8))
