"""A tree's nodes get what each would get alone, behind its own path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.processing import NEVER, Processing, Texts, forbidden
from drafttrain.core.tree import Tree, root_only

V = 7
TEXTS = Texts([[1, 2, 3, 2], [5], [6, 6, 1]], [2, 1, 3])


def tree() -> Tree:
    """Three rows of eight nodes, up to four deep."""
    generator = torch.Generator().manual_seed(0)
    parents = torch.tensor([0, 0, 0, 1, 1, 3, 5, 2]).repeat(3, 1)
    tokens = torch.randint(0, V, (3, 8), generator=generator)
    tokens[:, 0] = torch.tensor([text[-1] for text in TEXTS.tokens])
    tokens[0, 3], tokens[0, 5] = 2, 3
    live = torch.ones(3, 8, dtype=torch.bool)
    live[1, 6] = False
    return Tree(tokens, parents, live, "deterministic", max_depth=4, max_children=2)


def last_three(ids: Tensor, scores: Tensor) -> Tensor:
    """Depends on the order of the text."""
    return scores + ids[:, -3:].sum(1, keepdim=True) * torch.arange(V) / (1 + ids[:, -1:])


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5},
    "presence": {"presence_penalty": 0.7},
    "frequency": {"frequency_penalty": -0.4},
    "bias": {"logit_bias": ((3, 1.5), (4, NEVER))},
    "words": {"bad_words": ((2, 2), (3, 2, 2, 3), (2, 2, 3, 1), (6,), (5, 1))},
    "processor": {"processors": (last_three,)},
    "all": {"repetition_penalty": 0.8, "presence_penalty": 0.3, "bad_words": ((2, 1),), "processors": (last_three,)},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_a_node_gets_what_it_gets_alone_behind_its_path(case: str) -> None:
    processing, drafted = Processing(**OPTIONS[case]).check(V), tree()
    logits = torch.randn(3, 8, V, generator=torch.Generator().manual_seed(1))
    given = logits.clone()
    found = processing(logits, drafted, TEXTS).logits
    assert torch.equal(logits, given)
    never = forbidden(drafted, found)
    for row in range(3):
        for node in range(8):
            if not drafted.live[row, node] or never[row, node]:
                continue  # a text that cannot be
            path, length = drafted.path_to(torch.full((3,), node))
            text = TEXTS.tokens[row] + drafted.tokens[row, path[row, : length[row]]].tolist()
            lone = root_only(torch.tensor(text[-1:]))
            alone = processing(logits[row : row + 1, node : node + 1], lone, Texts([text], [TEXTS.prompts[row]])).logits
            torch.testing.assert_close(found[row, node], alone[0, 0])
    assert not torch.allclose(found, logits)


def test_what_stands_below_a_forbidden_token_is_forbidden_too() -> None:
    drafted = tree()
    logits = torch.zeros(3, 8, V)
    logits[0, 1, drafted.tokens[0, 3]] = NEVER
    at = forbidden(drafted, logits)[0]
    assert at[[3, 5, 6]].all()
    assert not at[[0, 1, 2, 7]].any()


def test_options_that_change_nothing_are_not_active() -> None:
    assert not Processing().active
    assert Processing(presence_penalty=0.1).active
