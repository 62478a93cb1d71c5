"""Real engines decode an exported drafter of the demo target as we do (scripts/engines.sh makes them; scripts/test.sh --engines)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.core.errors import UserError
from drafttrain.drafters.eagle3 import Eagle3, Eagle3Config
from drafttrain.drafters.files import save_drafter
from drafttrain.engines import ENGINES
from drafttrain.engines.verify import Order, verify, verify_tensors
from drafttrain.target.adapter import Target
from drafttrain.target.files import TargetConfig

pytestmark = [pytest.mark.engines, pytest.mark.demo]
TARGET = TargetConfig(model="smollm2-demo", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose eagle3 was never trained: it begins with the target's head, and is right now and then."""
    target = Target.load(TARGET)
    torch.manual_seed(0)
    drafter = Eagle3(Eagle3Config(), target.shape)
    drafter.start_from(target.head, torch.arange(target.vocab_size))
    folder = tmp_path_factory.mktemp("run")
    save_drafter(drafter, folder / "drafter")
    return folder


def served(engine: str) -> None:
    """Skips where the engine's environment was not made."""
    try:
        ENGINES[engine]().python()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("engine", ["vllm", "llamacpp", "openvino"])
def test_an_engine_drafts_and_accepts_what_we_do(request: pytest.FixtureRequest, engine: str) -> None:
    served(engine)
    run = request.getfixturevalue("run")
    found = verify(Order(run, TARGET, engine, prompts=2, max_new_tokens=16))
    assert not found.differs, found.causes
    assert all(one.theirs.rounds > 0 for one in found.comparisons)


def test_the_speculators_package_computes_our_tensors(request: pytest.FixtureRequest) -> None:
    served("speculators")
    run = request.getfixturevalue("run")
    found = verify_tensors(Order(run, TARGET, "speculators", prompts=1, max_new_tokens=12, length=4))
    assert found.first is None, found.causes
    assert len(found.gaps) > 4
