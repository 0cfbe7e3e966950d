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


BROKEN = """
import sys, time
from lightning import Trainer
from drift.callbacks import RescueCallback, RolloutCallback
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.rewards.base import PerSampleReward
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

in_validation = sys.argv[1] == "validation"

class BrokenReward(PerSampleReward):
    def score(self, completion, problem):
        if trainer.global_step == 1 and trainer.global_rank == 1 and trainer.validating == in_validation:
            if in_validation:
                raise ZeroDivisionError("oh")
            time.sleep(600)
        return 0.0

task = SudokuTask()
task.reward = BrokenReward()
decode = DenoiseConfig(block_length=16)
rollout = RolloutCallback(
    group_size=2, completion_length=16, decode=decode, evaluation=decode, reward_timeout_seconds=3.0
)
trainer = Trainer(
    max_steps=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    limit_val_batches=1.0 if in_validation else 0, val_check_interval=1, check_val_every_n_epoch=None,
    callbacks=[rollout, RescueCallback()],
)
data = PromptDataModule(task, prompts_per_step=2, num_validation=4, evaluation_batch_size=1)
trainer.fit(RLDFModule("sudoku_base"), data)
"""


def run_broken(folder: Path, where: str) -> str:
    """What two ranks say, one of which has a reward that breaks."""
    script = folder / "train.py"
    script.write_text(BROKEN, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), where],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr


@pytest.mark.two_ranks
def test_where_the_reward_of_one_rank_hangs_all_stop_and_the_weights_are_kept(tmp_path: Path):
    said = run_broken(tmp_path, "training")
    assert "SampleError: rank 1: BrokenReward did not come back within 3 s" in said
    assert (tmp_path / "rescue.ckpt").exists()
    assert (tmp_path / "rescue.rank1.json").exists()


@pytest.mark.two_ranks
def test_where_the_reward_of_one_rank_breaks_in_validation_the_run_ends_and_says_why(tmp_path: Path):
    # There the ranks go each their own way: nobody waits with this one to write a checkpoint.
    said = run_broken(tmp_path, "validation")
    assert "BrokenReward raised ZeroDivisionError: oh" in said
    assert not (tmp_path / "rescue.ckpt").exists()
    assert (tmp_path / "rescue.rank1.json").exists()
