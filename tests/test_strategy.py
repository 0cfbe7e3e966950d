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
