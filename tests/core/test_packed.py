"""Matrices in blocks: the same products, of the matrix as it is now, and nothing of it in copies and files."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from drafttrain.core import packed as module
from drafttrain.core.packed import MOST_ROWS, PackedLinear, linear, packed
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.target.adapter import Target
from tests.tiny import VOCAB, tiny_target


@pytest.fixture(autouse=True)
def slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(module, "slow_few_rows", lambda: True)


def matrix() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 40)


def blocks(layer: nn.Linear) -> torch.Tensor | None:
    known = getattr(layer.weight, "_packed", None)
    return None if known is None else known.blocks


@pytest.mark.parametrize("rows", [1, 2, 7, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_number_of_rows_are_those_of_the_matrix(rows: int, bias: bool) -> None:
    layer, x = matrix(), torch.randn(1, rows, 24)
    added = layer.bias if bias else None
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(linear(x, layer.weight, added), F.linear(x, layer.weight, added))
    assert (blocks(layer) is not None) == (rows <= MOST_ROWS)


@pytest.mark.parametrize(
    "x",
    [torch.ones(24), torch.rand(2, 3, 4, 24), torch.rand(24, 5).t(), torch.rand(1, 1, 24).expand(2, 3, 24), torch.rand(4, 48)[:, ::2]],
    ids=lambda x: str(tuple(x.shape)),
)
def test_rows_of_any_shape_and_stride_are_multiplied(x: torch.Tensor) -> None:
    layer = matrix()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias))
    assert blocks(layer) is not None


def test_a_matrix_is_packed_at_its_second_use() -> None:
    layer, x = matrix(), torch.randn(1, 24)
    with torch.inference_mode():
        linear(x, layer.weight)
        assert blocks(layer) is None
        linear(x, layer.weight)
        assert blocks(layer) is not None


@pytest.mark.parametrize("change", ["in place", "other data"])
def test_a_matrix_that_changes_is_multiplied_as_it_is_now(change: str) -> None:
    layer, x = matrix(), torch.randn(2, 24)
    for round in range(4):
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(linear(x, layer.weight), F.linear(x, layer.weight))
            if change == "in place":
                layer.weight.mul_(-2)
            else:
                layer.weight.data = torch.randn(40, 24) * round


def test_gradients_and_other_precisions_go_the_usual_way() -> None:
    layer, x = packed(matrix()), torch.randn(2, 24)
    with torch.no_grad():
        layer(x), layer(x)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x.bfloat16(), matrix().weight).dtype == torch.bfloat16


def test_layers_keep_their_names_and_copies_hold_no_blocks() -> None:
    layer, x = packed(nn.Sequential(matrix())), torch.randn(2, 24)
    with torch.no_grad():
        said = layer(x), layer(x)
    assert isinstance(layer[0], PackedLinear) and blocks(layer[0]) is not None
    assert layer.state_dict().keys() == {"0.weight", "0.bias"}
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert blocks(other[0]) is None
        with torch.no_grad():
            torch.testing.assert_close(other(x), said[1])


def test_a_model_that_would_take_half_of_the_free_memory_again_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 24 * 40 * 4
    for free, expected in ((2 * size, PackedLinear), (2 * size - 1, nn.Linear)):
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert type(packed(nn.Sequential(matrix()))[0]) is expected


def test_decoding_is_that_of_the_model_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0)).tolist()
    plain = tiny_target(3)
    monkeypatch.setattr(module, "slow_few_rows", lambda: False)
    expected = [one.tokens for one in SpeculativeDecoder(plain).generate(prompts, max_new_tokens=24)]
    monkeypatch.setattr(module, "slow_few_rows", lambda: True)
    target = Target(packed(tiny_target(3).model), plain.tokenizer)
    found = [one.tokens for one in SpeculativeDecoder(target).generate(prompts, max_new_tokens=24)]
    assert found == expected
    assert any(isinstance(layer, PackedLinear) and blocks(layer) is not None for layer in target.model.modules())
