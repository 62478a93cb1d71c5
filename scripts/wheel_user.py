"""What a user of the installed package writes: run by scripts/check_wheel.sh in an environment that has the wheel alone, and read by mypy.

    python wheel_user.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from drafttrain import Chain, Generation, RuntimeConfig, SpeculativeDecoder, Target, TargetConfig, load_drafter, save_drafter
from drafttrain.drafters.medusa import Medusa, MedusaConfig
from drafttrain.export import FORMATS, write_format
from drafttrain.export.base import Source
from drafttrain.target.files import resolve


def main(folder: Path) -> None:
    """Decodes the demo target plainly and with a drafter, and exports the drafter."""
    config = TargetConfig(model="smollm2-demo", dtype="float32", device="cpu")
    target = Target.load(config)
    drafter = Medusa(MedusaConfig(heads=2), target.shape)
    drafter.start_from(target.head, torch.arange(target.vocab_size))
    save_drafter(drafter, folder / "drafter")
    runtime = RuntimeConfig(shape=Chain(length=2))
    decoder = SpeculativeDecoder.from_pretrained(target, folder / "drafter", runtime)
    drafted: list[Generation] = decoder.generate("Say hello.", max_new_tokens=8, repetition_penalty=1.1)
    plain: list[Generation] = SpeculativeDecoder(target).generate("Say hello.", max_new_tokens=8, repetition_penalty=1.1)
    assert drafted[0].tokens == plain[0].tokens, (drafted[0].text, plain[0].text)
    source = Source(load_drafter(folder / "drafter"), folder / "drafter", resolve(config), config)
    for name in ("native", "medusa"):
        print(write_format(FORMATS[name].model_validate({"name": name}), source, folder / name))
    text: str = drafted[0].text
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
