"""OpenVINO: an EAGLE-3 drafter as an IR, made by optimum-intel from the SGLang layout."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from drafttrain.core.errors import UserError
from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.eagle3 import Eagle3, Eagle3Config
from drafttrain.export.base import FormatConfig, Source
from drafttrain.export.eagle3 import check_eagle3, check_three_layers
from drafttrain.export.environments import engine_python
from drafttrain.export.reading import ImportTarget
from drafttrain.export.sglang import SGLang
from drafttrain.target.files import TargetShape

MODEL, SETTINGS = "openvino_model.xml", "sglang_config.json"


class OpenVINO(FormatConfig):
    """EAGLE-3 with three captured layers; the target is exported by `optimum-cli` as any model is."""

    name: Literal["openvino"] = "openvino"
    weights: Literal["fp32", "fp16"] = "fp16"
    """Precision that optimum-intel stores."""

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        config: Eagle3Config = check_eagle3(self, drafter)
        check_three_layers(self, config, target, "OpenVINO GenAI")

    def write(self, source: Source, folder: Path) -> None:
        drafter = source.drafter
        assert isinstance(drafter, Eagle3)
        with tempfile.TemporaryDirectory() as name:
            layout = Path(name) / "sglang"
            layout.mkdir()
            SGLang(dtype="float32").write(source, layout)
            export_ir(layout, folder, self.weights)
            shutil.copy(layout / "config.json", folder / SETTINGS)
        write_layers(folder / MODEL, drafter.target.aux_layers)

    def use(self, target: str) -> str:
        drafting = f"num_assistant_tokens={self.draft_length}, assistant_confidence_threshold=0"
        return f"""```python
import openvino_genai as ov

draft = ov.draft_model("PATH/OF/THIS/FOLDER", "CPU")
pipeline = ov.LLMPipeline("TARGET_IR", "CPU", scheduler_config=ov.SchedulerConfig(), draft_model=draft)  # {target} as an IR
print(pipeline.generate("Why is the sky blue?", max_new_tokens=128, {drafting}))
```"""


def export_ir(model: Path, folder: Path, weights: str) -> None:
    """optimum-intel's own export, in the environment that has it."""
    python = engine_python("openvino")
    command = [
        str(python.with_name("optimum-cli")), "export", "openvino", "-m", str(model), "--task", "text-generation-with-past",
        "--weight-format", weights, "--trust-remote-code", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise UserError(f"export format 'openvino': optimum-cli failed ({lines[-1] if lines else done.returncode})")


def write_layers(path: Path, aux_layers: tuple[int, ...]) -> None:
    """Says which layers the target hands over, as HS ids - 1: GenAI's own default is one layer later than everybody's."""
    tree = ElementTree.parse(path)
    info = tree.getroot().find("rt_info")
    if info is None:
        info = ElementTree.SubElement(tree.getroot(), "rt_info")
    for name, value in {"eagle3_mode": "True", "hidden_layers_list": " ".join(str(layer - 1) for layer in aux_layers)}.items():
        entry = info.find(name)
        (entry if entry is not None else ElementTree.SubElement(info, name)).set("value", value)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def copy_tokenizer(target: Path, folder: Path) -> None:
    """GenAI looks for the tokenizer beside the drafter too; it is the target's."""
    for path in target.glob("openvino_*tokenizer.*"):
        shutil.copy(path, folder / path.name)


def recognises(folder: Path, config: dict[str, Any]) -> bool:
    return (folder / MODEL).exists()


def read(folder: Path, config: dict[str, Any], target: ImportTarget) -> Drafter:
    raise UserError(f"drafter '{folder}': an OpenVINO IR is a compiled graph; give the folder that it was made from")
