"""Judge Decoding (Bachmann et al., 2025, arXiv:2501.19309): a linear head on the frozen target's states says which draft tokens are good
although the target would not have written them. LOSSY.

e is the target's last hidden state AT the draft token (computed after reading it: a target that has just read a mistake begins to correct
it), s = sigmoid(w e + b). A token is accepted where the inner lossless rule accepts it OR s > threshold. The inner rule goes first. Where
it stops, the child that the judge likes best is accepted if it is above the threshold, and the inner rule goes on from there. Labels and
training are in `train/judge.py`. B rows, N nodes, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.core.disk import CONFIG, WEIGHTS, check_format, load_weights, read_json, save_configured
from drafttrain.core.errors import UserError, first_line
from drafttrain.core.rng import Rng
from drafttrain.core.sampling import Sampling
from drafttrain.core.tree import Draws, Topology, Tree
from drafttrain.core.types import Scored, Verdict
from drafttrain.target.adapter import Target
from drafttrain.verify.base import ANY, Rule, RuleConfig
from drafttrain.verify.lossy import Inner, check_inner, lossless_rule, pushed

FORMAT = 1
MEND = "train it again"


class JudgeConfig(RuleConfig):
    """A lower threshold accepts more."""

    name: Literal["judge"] = "judge"
    head: str | None = None
    """Folder of a trained judge's head."""
    threshold: float = Field(default=0.5, ge=0)
    """The judge's certainty that a token needs to be accepted. 1 or more turns the judge off: the inner rule decides alone."""
    inner: Inner = "auto"
    """The lossless rule that goes first."""


class Judge(Rule):
    """Any tree that the inner rule takes."""

    Config = JudgeConfig
    config: JudgeConfig
    lossless = False
    accepts = ANY

    def __init__(self, config: RuleConfig) -> None:
        super().__init__(config)
        self.head: JudgeHead | None = None

    @property
    def on(self) -> bool:
        return self.config.threshold < 1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"last_hidden_state"}) if self.on else frozenset()

    def check(self, topology: Topology, draws: Draws, sampling: Sampling) -> None:
        super().check(topology, draws, sampling)
        check_inner(self.config.inner, topology, draws, sampling)
        if self.on and self.config.head is None:
            raise UserError("rule 'judge' has no head; give the folder of a trained one as runtime.rule.head, or a threshold of 1 (off)")

    def prepare(self, target: Target) -> None:
        if self.on:
            assert self.config.head is not None
            self.head = JudgeHead.load(Path(self.config.head), target.fingerprint).to(target.device)

    def __call__(self, tree: Tree, scored: Scored, rng: Rng) -> Verdict:
        inner = lossless_rule(self.config.inner, tree, scored)
        if not self.on:
            return inner(tree, scored, rng)
        assert self.head is not None, "a judge judges after `prepare`"
        certainty = self.head(scored.features["last_hidden_state"][:, : tree.tokens.shape[1]]).sigmoid()  # [B, N]
        return pushed(inner, tree, scored, rng, certainty > self.config.threshold, certainty)


class JudgeHead(nn.Module):
    """w e + b: D + 1 numbers that belong to one target."""

    def __init__(self, hidden_size: int, fingerprint: str) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        self.fingerprint = fingerprint

    def forward(self, last: Tensor) -> Tensor:
        """[..., D] the target's states at drafted tokens -> [...] log odds that the token is good."""
        return self.linear(last.float())[..., 0]

    def loss(self, last: Tensor, good: Tensor, wrong_weight: float = 1.0) -> Tensor:
        """Cross-entropy, unreduced: [..., D], [...] bool -> [...]. wrong_weight: lambda, how much more a bad token counts."""
        odds = self(last)
        return torch.where(good, F.softplus(-odds), wrong_weight * F.softplus(odds))

    def save(self, folder: Path, notes: dict[str, Any] | None = None) -> Path:
        """Writes model.safetensors and config.json. notes: anything JSON can hold that readers should know (labels, AUC, task)."""
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}

        def config(digest: str) -> dict[str, Any]:
            judge = {"hidden_size": self.linear.in_features, "target": self.fingerprint, "weights": digest}
            return {"format": FORMAT, "judge": judge, "notes": notes or {}}

        return save_configured(folder, config, weights)

    @classmethod
    def load(cls, folder: Path, fingerprint: str | None = None) -> JudgeHead:
        """The head in `folder`. fingerprint: the target it is to judge.

        Raises `UserError` where it was trained on another target's states, or its files are missing or corrupt.
        """
        what, path = f"judge '{folder}'", folder / CONFIG
        if not path.exists():
            raise UserError(f"{what}: no config.json; give the folder of a head that `drafttrain judge` saved")
        config = read_json(path, what, MEND)
        check_format(config, FORMAT, what, MEND)
        try:
            options = config["judge"]
            head = cls(int(options["hidden_size"]), str(options["target"]))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{what}: config.json is not a judge's ({error!r}); {MEND}") from error
        if fingerprint is not None and head.fingerprint != fingerprint:
            raise UserError(
                f"judge '{folder}' was trained on the states of target {head.fingerprint}, but this target is {fingerprint}; "
                f"decode with its own target, or train a judge for this one"
            )
        weights = load_weights(folder, options.get("weights"), what, MEND)
        try:
            head.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(f"{what}: {WEIGHTS} is of another shape ({first_line(error)}); {MEND}") from error
        return head.eval()
