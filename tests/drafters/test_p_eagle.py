"""P-EAGLE: training and drafting give what its pairs and masks give as one plain causal text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drafttrain.core.config import parse
from drafttrain.core.errors import UserError
from drafttrain.core.plan import Chain, Plan
from drafttrain.core.rng import SeededRng
from drafttrain.core.sampling import Sampling
from drafttrain.drafters.block import every_anchor
from drafttrain.drafters.p_eagle import PEagleConfig, finish, read
from tests.families import tiny_drafter
from tests.tiny import packed, tiny_target

DOCUMENTS = [[5, 9, 11, 30, 7, 8, 3, 2], [40, 41, 42, 43, 44, 45]]


def unsure(**options: Any) -> Any:
    drafter = tiny_drafter("p_eagle", tiny_target(), **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return drafter


def plain(drafter: Any, text: list[int], aux: Tensor, root: int) -> Tensor:
    """[K, D]: the pairs before `root` and the masks behind them, one layer after the other, every score written out."""
    head, masks = tiny_target().head, drafter.config.block - 1
    features = torch.cat([aux[:root], drafter.mask_hidden.expand(masks, -1)])
    hidden = drafter.fc(features)[None]
    embedded = torch.cat([head.embed(torch.tensor(text[1 : root + 1])), drafter.mask_embedding.expand(masks, -1)])[None]
    length = root + masks
    turned = drafter.rotary(torch.arange(length)[None])
    for layer in drafter.layers:
        query, keys, values = read(layer, hidden, embedded, *turned)
        keys, values = keys.repeat_interleave(drafter.groups, 1), values.repeat_interleave(drafter.groups, 1)
        scores = query @ keys.transpose(-1, -2) * drafter.head_dim**-0.5
        hidden = finish(layer, hidden, scores.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf")).softmax(-1) @ values)
    return drafter.norm(hidden)[0, root - 1 :]  # type: ignore[no-any-return]


@torch.no_grad()
def test_all_blocks_of_a_row_give_what_each_gives_as_a_plain_text() -> None:
    drafter, target = unsure(), tiny_target()
    batch = packed(target, DOCUMENTS, [0, 0])
    anchors = every_anchor(batch)
    hidden = drafter._hidden_of_text(batch, anchors, target.head)
    starts = [0, len(DOCUMENTS[0])]
    assert len(anchors.row) == sum(map(len, DOCUMENTS)) - 2
    for found, place in zip(hidden, anchors.place.tolist(), strict=True):
        number = int(batch.document[0, place])
        aux = batch.features["aux_hidden_states"][0, starts[number] :]
        torch.testing.assert_close(found, plain(drafter, DOCUMENTS[number], aux, place - starts[number]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_drafting_gives_the_same() -> None:
    drafter, target, text = unsure(), tiny_target(), DOCUMENTS[0]
    aux = packed(target, [text], [0]).features["aux_hidden_states"]
    prompts = torch.tensor([text[:5]])
    state = drafter.begin(prompts, torch.tensor([5]), {"aux_hidden_states": aux[:, :5]}, target.head, 64)
    tree = drafter.propose(
        state, torch.tensor([text[5]]), Plan(Chain(length=4), keep_states=True), Sampling(), SeededRng(0, torch.arange(1))
    )
    assert tree.draft_states is not None
    torch.testing.assert_close(tree.draft_states[0], plain(drafter, text, aux[0], 5), rtol=1e-4, atol=1e-4)


def test_options_of_other_blocks_are_refused() -> None:
    for option in ({"causal": False}, {"anchor_predicts": False}, {"qk_norm": True}, {"conv_group": 8}):
        with pytest.raises(UserError, match=next(iter(option))):
            parse(PEagleConfig, option, "recipe")
