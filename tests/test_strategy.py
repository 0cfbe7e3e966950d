import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from drift.arguments import shipped_configs
from drift.cli import parsed
from drift.contract import ConfigError
from drift.strategy import ShardedStrategy, require_strategy


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_shard_in_a_way_of_their_own_are_refused(kind: type):
    strategy = kind.__new__(kind)  # two of them can't be made without an accelerator
    with pytest.raises(ConfigError, match=f"trainer.strategy is {kind.__name__}: .* --config strategy/fsdp"):
        require_strategy(strategy)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy(), ShardedStrategy()])
def test_the_others_are_not(strategy):
    require_strategy(strategy)


def test_a_checkpoint_is_read_without_running_anything(tmp_path: Path):
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.arange(3.0)}, "global_step": 2}, file)
    found = ShardedStrategy().load_checkpoint(file, weights_only=True)
    assert torch.equal(found["state_dict"]["weight"], torch.arange(3.0))
    torch.save({"state_dict": SimpleNamespace()}, file)
    for asked in (True, None):
        with pytest.raises(Exception, match="Weights only load failed"):
            ShardedStrategy().load_checkpoint(file, weights_only=asked)


@pytest.mark.parametrize(
    ("statuses", "starts", "status"),
    [([0], 1, 0), ([1, 0], 2, 0), ([1, 138], 2, 138), ([143], 1, 143), ([1, 9, 1, 1], 4, 1)],
)
def test_the_batch_script_starts_again_what_was_not_told_to_stop(
    tmp_path: Path, statuses: list[int], starts: int, status: int
):
    srun, calls = tmp_path / "srun", tmp_path / "calls"
    srun.write_text(
        "#!/usr/bin/env python3\n"
        "import json, pathlib, sys\n"
        f"calls = pathlib.Path({str(calls)!r})\n"
        "done = calls.read_text().splitlines() if calls.exists() else []\n"
        "calls.write_text('\\n'.join([*done, json.dumps(sys.argv[1:])]))\n"
        f"sys.exit({statuses!r}[len(done)])\n"
    )
    srun.chmod(0o755)
    slurm = {"SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = shipped_configs()["base"].parent / "strategy" / "slurm.sh"
    call = ["bash", str(script), "--data.train.path", "a b.json"]
    done = subprocess.run(call, env={**os.environ, **slurm, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    lines = [json.loads(line) for line in calls.read_text().splitlines()]
    assert len(lines) == starts
    options, arguments = lines[0][: lines[0].index("drift")], lines[0][lines[0].index("drift") + 1 :]
    assert options == ["--kill-on-bad-exit=1", "--cpus-per-task=12"]
    assert arguments[0] == "fit"
    settings = parsed(arguments[1:])
    assert (settings.trainer.devices, settings.trainer.num_nodes) == ("8", 2)
    assert settings.resume == "auto"
    assert settings.data.train.path == "a b.json"
