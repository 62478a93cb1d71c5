"""An ordinary causal LM with the target's tokenizer, for `small_lm` drafters: whatever loads one can draft with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from drafttrain.drafters.base import Drafter, DrafterConfig
from drafttrain.drafters.small_lm import SmallLM, SmallLMConfig
from drafttrain.export.base import FormatConfig, Precision, Source, shell
from drafttrain.export.reading import ImportTarget
from drafttrain.export.tensors import read_tensors
from drafttrain.target.adapter import load_tokenizer
from drafttrain.target.files import TargetShape


class CausalLM(FormatConfig):
    """A small LM; a borrowed embedding and head are filled in."""

    name: Literal["causal_lm"] = "causal_lm"
    dtype: Precision = "auto"
    """Of the weights; `auto`: the target's."""

    def check(self, drafter: DrafterConfig, target: TargetShape) -> None:
        self.only(drafter, ["small_lm"], "it reads its target's hidden states and is no causal LM of its own")

    def write(self, source: Source, folder: Path) -> None:
        drafter = source.drafter
        assert isinstance(drafter, SmallLM)
        model = drafter.to_causal_lm(source.head)
        model.generation_config.num_assistant_tokens = self.draft_length
        model.generation_config.num_assistant_tokens_schedule = "constant"
        model.generation_config.assistant_confidence_threshold = 0.0  # 0.4 by default, which ends drafts early
        model.to(source.dtype(self.dtype)).save_pretrained(folder)
        load_tokenizer(source.home, source.target.trust_remote_code).save_pretrained(folder)

    def use(self, target: str) -> str:
        k = self.draft_length
        inline = f'{{"model": "PATH/OF/THIS/FOLDER", "method": "draft_model", "num_speculative_tokens": {k}}}'
        serve = f"python -m sglang.launch_server --model-path {target} --speculative-algorithm STANDALONE --speculative-draft-model-path"
        return f"""An ordinary causal LM with the target's tokenizer; whatever loads one can draft with it.

```python
from transformers import AutoModelForCausalLM

drafter = AutoModelForCausalLM.from_pretrained("PATH/OF/THIS/FOLDER")
# target: `{target}`, loaded as usual
target.generate(**inputs, assistant_model=drafter)
```

""" + shell(
            f"vllm serve {target} --speculative-config '{inline}'",
            f"{serve} PATH/OF/THIS/FOLDER --speculative-num-steps {k} --speculative-eagle-topk 1 --speculative-num-draft-tokens {k + 1}",
        )


def recognises(folder: Path, config: dict[str, Any]) -> bool:
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or [])


def read(folder: Path, config: dict[str, Any], target: ImportTarget) -> Drafter:
    """The causal LM in a folder as a small LM of ours, with an embedding and a head of its own."""
    read_tensors(folder)  # damage is named by file and key before transformers looks
    drafter = SmallLM(SmallLMConfig(path=str(folder)), target.shape)
    drafter.origin = None
    return drafter.eval()
