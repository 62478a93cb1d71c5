"""Trees that end early are the beginnings of whole ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.plan import Chain, Dynamic, Plan, Static
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.grow import Frontier, Growth, grow

V, B = 12, 3
BEST: dict[str, int] = {"beam": 3, "top_k": 3, "nodes": 40}
PAIRS: dict[str, tuple[Any, dict[int, Any]]] = {
    "chain": (Chain(length=4), {1: Chain(length=1), 3: Chain(length=3)}),
    "static": (Static(children=(3, 2, 2)), {1: Static(children=(3,)), 2: Static(children=(3, 2))}),
    "ragged": (Static(choices=((0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0))), {2: Static(choices=((0,), (1,), (0, 0), (1, 0), (1, 1)))}),
    "dynamic": (Dynamic(depth=4, **BEST), {1: Dynamic(depth=1, **BEST), 3: Dynamic(depth=3, **BEST)}),
}
CASES = [
    (name, draws, levels)
    for name, (shape, parts) in PAIRS.items()
    for draws in ("deterministic", "iid", "without_replacement")
    for levels in parts
    if shape.shape != "dynamic" or draws == "deterministic"
]
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 2


def grown(shape: Any, draws: Any, calls: list[int], enough: Any = None) -> Growth:
    states: list[Tensor] = []

    def step(frontier: Frontier) -> Tensor:
        calls.append(frontier.level)
        states.append(frontier.tokens[..., None].float())
        return TABLE[frontier.tokens] + frontier.level

    plan = Plan(shape, draws, enough=enough, keep_states=True)
    return grow(step, torch.tensor([1, 5, 7]), plan, Sampling(0.9), SeededRng(3, torch.arange(B)), states=states)


def always_at(level: int) -> Any:
    return lambda here, logits, states: torch.full((B,), here + 1 >= level)


@pytest.mark.parametrize(("name", "draws", "levels"), CASES)
def test_a_tree_that_every_row_ends_is_the_tree_of_the_shallower_shape(name: str, draws: str, levels: int) -> None:
    shape, parts = PAIRS[name]
    calls, fewer = list[int](), list[int]()
    ended, whole = grown(shape, draws, calls, always_at(levels)), grown(parts[levels], draws, fewer)
    assert calls == fewer == list(range(levels))  # the levels below are not even fed
    assert ended.tree.max_depth == levels
    for field in ("tokens", "parents", "live", "probs_row", "draft_probs", "draft_states"):
        ours, theirs = vars(ended.tree)[field], vars(whole.tree)[field]
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), field
    assert torch.equal(ended.fed, whole.fed)
    assert torch.equal(ended.tree.ancestors, whole.tree.ancestors)


def test_siblings_beyond_the_draft_vocabulary_are_dead() -> None:
    tree = grown(Static(children=(V + 2, 1)), "deterministic", []).tree
    assert tree.tokens[:, 1 : V + 1].sort().values.tolist() == [list(range(V))] * B
    assert tree.live[:, 1 : V + 1].all() and not tree.live[:, V + 1 : V + 3].any()


@pytest.mark.parametrize("draws", ["deterministic", "iid", "without_replacement"])
def test_the_mask_of_a_tree_that_ended_is_a_corner_of_the_whole_shapes_mask(draws: str) -> None:
    shape = Static(children=(3, 2, 2))
    corner = grown(shape, draws, [], always_at(2)).tree.layout()
    whole = grown(shape, draws, []).tree.layout()
    n = corner.tokens.shape[1]
    assert n == 1 + 3 + 6 < whole.tokens.shape[1]
    assert torch.equal(corner.mask, whole.mask[:, :n, :n])
    assert torch.equal(corner.tokens, whole.tokens[:, :n])


@pytest.mark.parametrize("name", ["chain", "static", "ragged"])
def test_slices_of_a_fixed_shapes_mask_are_the_masks_built_level_by_level(name: str) -> None:
    fed: list[Frontier] = []

    def step(frontier: Frontier) -> Tensor:
        fed.append(frontier)
        return TABLE[frontier.tokens]

    tree = grow(step, torch.tensor([1, 5, 7]), Plan(PAIRS[name][0]), Sampling(), SeededRng(3, torch.arange(B))).tree
    assert torch.equal(tree.ancestors, replace(tree, skeleton=None).ancestors)
    built = Frontier.of(tree.tokens[:, 0])
    for sliced in fed:
        built = built.below(sliced.tokens, sliced.parent) if sliced.level else built
        assert torch.equal(sliced.mask, built.mask)
    assert all(frontier.sliced is not None for frontier in fed[1:])


def test_tokens_that_the_target_named_are_the_first_level_whatever_a_policy_thinks_of_it() -> None:
    first = torch.tensor([[9, 3], [0, 1], [2, 2]])
    shape, calls = Static(children=(3, 2)), list[int]()
    plan = Plan(
        shape, target_candidates=first, stop=lambda level, logits: torch.ones(B, dtype=torch.bool) if level == 0 else torch.zeros(B).bool()
    )

    def step(frontier: Frontier) -> Tensor:
        calls.append(frontier.level)
        return TABLE[frontier.tokens]

    tree = grow(step, torch.tensor([1, 5, 7]), plan, Sampling(), SeededRng(3, torch.arange(B))).tree
    assert tree.from_target and calls == [0, 1]
    assert torch.equal(tree.tokens[:, 1:3], first)
    assert tree.live[:, 1:4].tolist() == [[True, True, False]] * B  # the shape has room for three
    assert torch.equal(tree.tokens[:, 4:6], TABLE[first[:, 0]].topk(2).indices)


@pytest.mark.parametrize("shape", [Chain(length=3), Static(children=(2, 2, 1)), Dynamic(depth=3, beam=2, top_k=2, nodes=20)])
def test_rows_end_one_by_one_and_the_others_go_on(shape: Any) -> None:
    stops = torch.tensor([1, 3, 2])  # levels each row draws
    tree = grown(shape, "deterministic", [], lambda here, logits, states: here + 1 >= stops).tree
    for row, levels in enumerate(stops.tolist()):
        alive = tree.live[row].clone()
        alive[0] = False
        assert int(tree.depth[row][alive].max()) == levels
    alone = grown(shape, "deterministic", []).tree
    assert torch.equal(tree.tokens[1][tree.live[1]], alone.tokens[1][alone.live[1]])


@pytest.mark.parametrize("shape", [Chain(length=3), Dynamic(depth=3, beam=2, top_k=2, nodes=20)])
def test_a_row_that_ended_stays_ended_whatever_is_said_of_later_levels(shape: Any) -> None:
    tree = grown(shape, "deterministic", [], lambda here, logits, states: torch.tensor([here == 0, False, False])).tree
    deepest = [int(tree.depth[row][tree.live[row]].max()) for row in range(B)]
    assert deepest == [1, 3, 3]


def test_what_is_asked_is_what_stands_at_the_nodes_a_level_hangs_from() -> None:
    seen: list[tuple[int, Tensor, Tensor]] = []

    def enough(level: int, logits: Tensor, states: Tensor) -> Tensor:
        seen.append((level, logits, states))
        return torch.zeros(B, dtype=torch.bool)

    tree = grown(Static(children=(2, 2)), "iid", [], enough).tree
    assert [level for level, *_ in seen] == [0, 1]
    assert torch.equal(seen[1][2][..., 0].long(), tree.tokens[:, 1:3])
    assert torch.equal(seen[1][1], TABLE[tree.tokens[:, 1:3]] + 1)
