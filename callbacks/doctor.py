"""Has the doctor look at the policy before anything is trained or measured with it."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from drift.contract import ConfigError
from drift.doctor import Probe, examine, failures
from drift.policy_module import PolicyModule


class DoctorCallback(Callback):
    """Probes the policy with a few short forward passes, and stops the run where something is wrong.

    Checks: finite weights, mask id, shift of the head, padding, legal tokens, and that re-scoring a rollout
    gives the probabilities that were recorded. `drift doctor --path FOLDER` prints the same as a table.

    Args:
        enabled: False skips the checks, on your own responsibility.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Examines the policy before training."""
        self._examine(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Examines the policy before `drift validate`."""
        if trainer.state.fn != "fit":
            self._examine(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Examines the policy before `drift test`."""
        self._examine(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Examines the policy before `drift predict`."""
        self._examine(trainer, pl_module)

    def _examine(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.enabled or not isinstance(module, PolicyModule):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        start = time.perf_counter()
        with module.generating():
            checks = examine(module.policy, data.tokenizer, _probes(data))
        seconds = time.perf_counter() - start
        failed = failures(checks)
        if failed:
            raise ConfigError(
                f"model.policy is {str(module.policy_folder)!r}: {failed} (drift doctor --path FOLDER shows "
                "all checks; doctor.enabled: false skips them)"
            )
        unsure = [check.name for check in checks if check.status == "unsure"]
        text = f"doctor: {len(checks) - len(unsure)} checks passed in {seconds:.1f} s"
        rank_zero_info(text + (f"; no evidence either way on {', '.join(unsure)}" if unsure else ""))


def _probes(data: Any) -> list[Probe]:
    """The stage's first prompts, with their demonstrations where they have any."""
    probes = []
    for problem in data.examples:
        prompt = data.tokenizer(data.template.render(problem), add_special_tokens=False)["input_ids"]
        if problem.demonstration is None:
            probes.append(Probe(ids=prompt))
        else:
            words = data.tokenizer(problem.demonstration, add_special_tokens=False)["input_ids"]
            probes.append(Probe(ids=[*prompt, *words], start=len(prompt)))
    return probes
