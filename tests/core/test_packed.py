"""Few rows by the fastest kernel: the same products, of the matrix as it is now, and nothing of it in copies and files."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from drafttrain.core import kernels
from drafttrain.core import packed as module
from drafttrain.core.kernels import KERNELS, MOST_ROWS, ROWS, KernelTable, chosen, kernel_table, shape_name
from drafttrain.core.packed import PackedLinear, linear, packed, use_kernels
from drafttrain.runtime.decoder import SpeculativeDecoder
from drafttrain.target.adapter import Target
from tests.tiny import VOCAB, tiny_target

SIZE = (40, 24)


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    if not kernels.blocks_work(torch.float32):
        pytest.skip("this torch is built without oneDNN")
    monkeypatch.setattr(kernels, "SMALLEST", 1)
    monkeypatch.setenv("DRAFTTRAIN_CACHE", str(tmp_path))
    yield
    use_kernels("auto")


def fastest(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if one kernel had turned out to be the fastest in all cases."""
    times = {other: [1.0 if other == name else 2.0] * len(ROWS) for other in KERNELS}
    monkeypatch.setattr(kernels, "measured", lambda weights, end: (times, True))


@pytest.fixture(params=list(KERNELS))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    fastest(monkeypatch, request.param)
    return str(request.param)


def matrix() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(SIZE[1], SIZE[0])


def used(layer: nn.Linear) -> list[str]:
    """Kernels that are used for the matrix."""
    known = getattr(layer.weight, "_packed", None)
    names = {kernel: name for name, kernel in KERNELS.items()}
    return [] if known is None or known.kernels is None else sorted({names[kernel] for kernel in known.kernels})


@pytest.mark.parametrize("rows", [1, 2, 7, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_number_of_rows_are_those_of_the_matrix(kernel: str, rows: int, bias: bool) -> None:
    layer, x = matrix(), torch.randn(1, rows, 24)
    added = layer.bias if bias else None
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(linear(x, layer.weight, added), F.linear(x, layer.weight, added))
    assert used(layer) == ([kernel] if rows <= MOST_ROWS else [])


@pytest.mark.parametrize(
    "x",
    [torch.ones(24), torch.rand(2, 3, 4, 24), torch.rand(24, 5).t(), torch.rand(1, 1, 24).expand(2, 3, 24), torch.rand(4, 48)[:, ::2]],
    ids=lambda x: str(tuple(x.shape)),
)
def test_rows_of_any_shape_and_stride_are_multiplied(kernel: str, x: torch.Tensor) -> None:
    layer = matrix()
    with torch.no_grad():
        for _ in range(3):
            product = linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(product, F.linear(x, layer.weight, layer.bias))
            assert product.is_contiguous()
    assert used(layer) == [kernel]


def test_kernels_in_bfloat16_give_its_products() -> None:
    layer, x = matrix().bfloat16(), torch.randn(3, 24).bfloat16()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(linear(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias), atol=0.02, rtol=0.02)
    assert used(layer)


def test_a_matrix_is_prepared_at_its_second_use(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest(monkeypatch, "blocks")
    layer, x = matrix(), torch.randn(1, 24)
    with torch.inference_mode():
        linear(x, layer.weight)
        assert not used(layer)
        linear(x, layer.weight)
        assert used(layer) == ["blocks"]


@pytest.mark.parametrize("change", ["in place", "other data"])
def test_a_matrix_that_changes_is_multiplied_as_it_is_now(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    fastest(monkeypatch, "blocks")
    layer, x = matrix(), torch.randn(2, 24)
    for round in range(4):
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(linear(x, layer.weight), F.linear(x, layer.weight))
            if change == "in place":
                layer.weight.mul_(-2)
            else:
                layer.weight.data = torch.randn(40, 24) * round


def test_gradients_and_autocast_go_the_usual_way() -> None:
    layer, x = packed(matrix()), torch.randn(2, 24)
    with torch.no_grad():
        layer(x), layer(x)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x.bfloat16(), matrix().weight).dtype == layer(x).dtype == torch.bfloat16


def test_layers_keep_their_names_and_copies_hold_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest(monkeypatch, "blocks")
    layer, x = packed(nn.Sequential(matrix())), torch.randn(2, 24)
    with torch.no_grad():
        said = layer(x), layer(x)
    assert isinstance(layer[0], PackedLinear) and used(layer[0]) == ["blocks"]
    assert layer.state_dict().keys() == {"0.weight", "0.bias"}
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert not used(other[0])
        with torch.no_grad():
            torch.testing.assert_close(other(x), said[1])


def test_a_model_that_would_take_half_of_the_free_memory_again_is_not_kept_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest(monkeypatch, "blocks")
    size = 24 * 40 * 4
    for free, expected in ((2 * size, "blocks"), (2 * size - 1, "linear")):
        monkeypatch.setattr(module.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        layer = packed(nn.Sequential(matrix()))[0]
        with torch.no_grad():
            layer(torch.ones(24)), layer(torch.ones(24))
        assert used(layer) == [expected]


def test_a_process_that_asks_for_linear_measures_nothing_and_multiplies_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measured", lambda weights, end: pytest.fail("measured"))
    use_kernels("linear")
    layer, x = packed(matrix()), torch.randn(2, 24)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not used(layer)


def test_decoding_is_that_of_the_model_as_it_came(kernel: str) -> None:
    prompts = torch.randint(0, VOCAB, (3, 5), generator=torch.Generator().manual_seed(0)).tolist()
    use_kernels("linear")
    expected = [one.tokens for one in SpeculativeDecoder(tiny_target(3)).generate(prompts, max_new_tokens=24)]
    use_kernels("auto")
    target = Target(packed(tiny_target(3).model), tiny_target(3).tokenizer)
    found = [one.tokens for one in SpeculativeDecoder(target).generate(prompts, max_new_tokens=24)]
    assert found == expected
    assert any(isinstance(layer, PackedLinear) and used(layer) == [kernel] for layer in target.model.modules())


# -- measuring ------------------------------------------------------------------------------------------------------------------------


def seconds(**times: float | list[float]) -> kernels.Times:
    return {name: value if isinstance(value, list) else [value] * len(ROWS) for name, value in times.items()}


def named(choice: tuple[kernels.Kernel, ...]) -> list[str]:
    return [next(name for name, kernel in KERNELS.items() if kernel is chosen_one) for chosen_one in choice]


def test_each_number_of_rows_gets_its_fastest_kernel_where_it_is_clearly_faster() -> None:
    slightly, clearly = [0.95, *[2.0] * 6], [0.5, *[2.0] * 6]
    assert named(chosen(seconds(linear=1.0, transposed=slightly), True)) == ["linear"] * 7
    assert named(chosen(seconds(linear=1.0, transposed=clearly), True)) == ["transposed", *["linear"] * 6]


def test_blocks_are_not_chosen_without_memory_for_them() -> None:
    assert named(chosen(seconds(linear=1.0, blocks=0.1), copies=False)) == ["linear"] * 7


def test_what_was_measured_is_remembered_and_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CALM", float("inf"))
    monkeypatch.setattr(kernels, "busy", lambda: False)
    weight = matrix().weight
    first = KernelTable("some")
    first.measure([[weight]])
    assert set(first.times[shape_name(weight)]) == set(KERNELS)
    monkeypatch.setattr(kernels, "measured", lambda weights, end: pytest.fail("measured again"))
    second = KernelTable("some")
    second.measure([[weight]])
    assert second.times == first.times


@pytest.mark.parametrize("text", ["", "{", "[]", '{"40x24 float32": {"linear": [1.0]}}', '{"40x24 float32": 3}'])
def test_a_damaged_table_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setattr(kernels, "CALM", float("inf"))
    monkeypatch.setattr(kernels, "busy", lambda: False)
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "some.json").write_text(text)
    table = KernelTable("some")
    table.measure([[matrix().weight]])
    assert KernelTable("some").times == table.times != {}


@pytest.mark.parametrize(("time", "calm"), [(0.0, float("inf")), (9.0, 0.0)], ids=["few samples", "a busy machine"])
def test_times_that_say_little_are_used_but_not_remembered(monkeypatch: pytest.MonkeyPatch, time: float, calm: float) -> None:
    monkeypatch.setattr(kernels, "CALM", calm)
    table, weight = KernelTable("some"), matrix().weight
    table.measure([[weight]], seconds=time)
    assert table.kernels(weight, True) and not KernelTable("some").times


def test_times_of_a_machine_on_which_others_work_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CALM", float("inf"))
    for load, remembered in ((100.0 * (psutil.cpu_count() or 1), False), (0.0, True)):
        monkeypatch.setattr(psutil, "getloadavg", lambda load=load: (load, load, load))
        table = KernelTable("some")
        table.measure([[matrix().weight]])
        assert table.times
        assert bool(KernelTable("some").times) == remembered


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "CALM", float("inf"))
    (tmp_path / "measured").write_text("a file in its place")
    table = KernelTable("some")
    table.measure([[matrix().weight]])
    assert table.times


def test_tables_of_other_thread_counts_are_others() -> None:
    threads = torch.get_num_threads()
    try:
        names = []
        for count in (1, 2):
            torch.set_num_threads(count)
            names.append(kernel_table().name)
    finally:
        torch.set_num_threads(threads)
    assert names[0] != names[1]


def test_a_kernel_with_other_products_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: Any) -> torch.Tensor:
        return F.linear(*given[:2]) * 1.5

    monkeypatch.setitem(KERNELS, "blocks", wrong)
    times, _ = kernels.measured([matrix().weight], float("inf"))
    assert set(times) == {"linear", "transposed"}


def test_small_matrices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALLEST", 24 * 40 + 1)
    layer = packed(matrix())
    with torch.no_grad():
        layer(torch.ones(24)), layer(torch.ones(24))
    assert type(layer) is nn.Linear and not used(layer)
