import os
import subprocess
import sys
from pathlib import Path

import pytest

from drift.contract import SampleError
from drift.distributed import failing_together

ROOT = Path(__file__).resolve().parent.parent


def test_one_process_fails_alone():
    with failing_together():
        pass
    with pytest.raises(SampleError, match=r"^no number$"), failing_together():
        raise SampleError("no number", {})


HANGING = """
import time
from lightning import Trainer
from drift.callbacks import RescueCallback, RolloutCallback
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

class SlowReward(PerSampleReward):
    def score(self, completion, problem):
        if trainer.global_step == 1 and trainer.global_rank == 1:
            time.sleep(600)
        return 0.0

task = SudokuTask()
task.reward = SlowReward()
decode = DenoiseConfig(block_length=16)
rollout = RolloutCallback(
    group_size=2, completion_length=16, decode=decode, evaluation=decode, reward_timeout_seconds=3.0
)
trainer = Trainer(
    max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, use_distributed_sampler=False, limit_val_batches=0,
    callbacks=[rollout, RescueCallback()],
)
trainer.fit(RLDFModule("sudoku_base"), PromptDataModule(task, prompts_per_step=2))
"""


@pytest.mark.two_ranks
def test_where_the_reward_of_one_rank_hangs_all_stop_and_the_weights_are_kept(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(HANGING, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "SampleError: rank 1: SlowReward did not come back within 3 s" in done.stderr
    assert (tmp_path / "rescue.ckpt").exists()
    assert (tmp_path / "rescue.rank1.json").exists()
