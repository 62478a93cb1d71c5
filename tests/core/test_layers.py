"""Norms and gates keep their inputs alone for the backward pass: the same values and gradients, fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from drafttrain.core import layers
from drafttrain.core.layers import GatedMLP, RMSNorm
from tests.contract.test_drafters import PROMPTS, own_texts, target
from tests.families import tiny_drafter
from tests.tiny import packed

PARTS = {"norm": lambda: RMSNorm(24, 1e-5), "mlp": lambda: GatedMLP(24, 40)}


class Kept(TorchDispatchMode):
    """Bytes of what was computed under it and still lives; views of what was there before are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {StorageWeakRef(one.untyped_storage()) for one in args if isinstance(one, Tensor)}
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor) and (storage := StorageWeakRef(one.untyped_storage())) not in known:
                self.sizes[storage] = one.untyped_storage().nbytes()
        return out

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.sizes.items() if not storage.expired())


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on everything is kept."""
    monkeypatch.setattr(layers, "again", lambda function, *given: function(*given))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_value_and_gradient_are_those_of_keeping_everything(part: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, given, outside = PARTS[part](), torch.randn(3, 5, 24), torch.randn(3, 5, 24)

    def computed() -> list[Tensor]:
        x = given.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = module(x)
        return [out, *torch.autograd.grad(out, [x, *module.parameters()], outside.to(out.dtype))]

    fast = computed()
    plain(monkeypatch)
    for one, other in zip(fast, computed(), strict=True):
        assert torch.equal(one, other)


def kept(work: Callable[[], Any]) -> int:
    with Kept() as mode:
        held = work()
    size = mode.bytes
    del held
    return size


def test_a_norm_keeps_nothing_of_its_own_and_a_gate_two_of_its_four(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 24, requires_grad=True)
    norm, mlp = PARTS["norm"](), PARTS["mlp"]()
    assert kept(lambda: norm(x)) == 64 * 24 * 4  # what it returns
    assert kept(lambda: mlp(x)) == 64 * (24 + 2 * 40) * 4  # what it returns, gate and up
    plain(monkeypatch)
    assert kept(lambda: norm(x)) > 64 * 24 * 4
    assert kept(lambda: mlp(x)) == 64 * (24 + 4 * 40) * 4


def test_eagle3_keeps_a_third_less_for_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = tiny_drafter("eagle3", target(), ttt_steps=7).train()
    batch = packed(target(), [prompt + own for prompt, own in zip(PROMPTS, own_texts(), strict=True)], [4, 1, 3])

    def work() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return drafter.loss(batch, target().head)

    fewer = kept(work)
    plain(monkeypatch)
    assert fewer < 0.67 * kept(work)


@pytest.mark.parametrize("length", [5, 8, 11])
def test_an_aligned_bias_is_the_same_with_rows_as_fused_attention_wants_them(length: int) -> None:
    bias = layers.document_bias(torch.tensor([[0] * 3 + [1] * (length - 3), [0] * length]), torch.bfloat16)
    wide = layers.aligned(bias).expand(2, 3, length, length)
    assert torch.equal(wide, bias.expand(2, 3, length, length))
    assert wide.stride(-1) == 1 and wide.stride(-2) % 8 == 0


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"), ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"), ({"neon": True, "bf16": True}, "bfloat16"), ({}, "float32"),
    ],
)  # fmt: skip
def test_a_processor_without_bfloat16_instructions_is_given_float32(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], said: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert layers.native_dtype(torch.device("cpu")) == said
