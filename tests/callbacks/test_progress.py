from pathlib import Path

from drift.callbacks import ProgressCallback, RolloutCallback
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig

DECODE = DenoiseConfig(block_length=8, threshold=0.5, temperature=1.0)


class Spy(ProgressCallback):
    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.shown, self.starts, self.totals, self.names = [], [], [], set()

    def _show_stage(self, stage, done, total):
        super()._show_stage(stage, done, total)
        self.shown.append(self.train_progress_bar.desc)

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.starts.append(self.train_progress_bar.n)
        self.totals.append(self.train_progress_bar.total)
        self.names |= set(self.get_metrics(args[0], args[1]))


def train(
    folder, task, make_trainer, spy: ProgressCallback, steps: int, ckpt_path: str | None = None, **settings
):
    rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
    trainer = make_trainer(steps, callbacks=[rollout, spy], enable_progress_bar=True)
    module = RLDFModule(str(folder), **settings)
    trainer.fit(module, datamodule=PromptDataModule(task, prompts_per_step=2), ckpt_path=ckpt_path)
    return trainer


def test_one_bar_counts_steps_and_shows_the_stage(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    spy = Spy()
    trainer = train(tiny_folder, spread_task, make_trainer, spy, 2, micro_batch_size=12)
    rollouts = [stage for stage in spy.shown if stage.startswith("rollout")]
    starts = [i for i, stage in enumerate(rollouts) if stage == "rollout   0%: "]
    assert len(starts) == 2  # one a step, and each goes up to the end
    for stages in (rollouts[: starts[1]], rollouts[starts[1] :]):
        assert stages == sorted(stages)
        assert stages[-1] == "rollout 100%: "
        assert len(stages) > 2
    # 2 prompts x 2 completions x 4 timesteps = 16 noisy states, 8 and 8.
    rest = ["reward   0%: ", "reward 100%: ", "update  50%: ", "update 100%: "]
    assert [stage for stage in spy.shown if stage not in rollouts] == rest * 2
    assert spy.starts == [1, 2]
    assert spy.totals == [2, 2]
    assert {"reward/mean", "rollout/timesteps", "loss/total"} <= spy.names
    assert "v_num" not in spy.names
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = Spy()
    train(tiny_folder, spread_task, make_trainer, resumed, 4, ckpt_path=str(tmp_path / "two.ckpt"))
    assert resumed.starts == [3, 4]
    assert resumed.totals == [4, 4]


def test_a_refresh_rate_of_0_draws_nothing(tiny_folder, spread_task, make_trainer, capsys):
    spy = Spy(refresh_rate=0)
    train(tiny_folder, spread_task, make_trainer, ProgressCallback(refresh_rate=0), 1)
    found = capsys.readouterr()
    assert spy.shown == []
    assert "rollout" not in found.out + found.err
