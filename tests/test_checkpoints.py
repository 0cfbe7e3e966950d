from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from drift.checkpoints import (
    CheckedCheckpointIO,
    require_adapters_of,
    require_checkpoint_file,
    require_resumable,
    require_weights_of,
)
from drift.contract import ConfigError

WHOLE = {"state_dict": {}, "global_step": 3, "pytorch-lightning_version": "2.6"}


def read(path: Path) -> dict:
    return CheckedCheckpointIO(TorchCheckpointIO()).load_checkpoint(path, weights_only=True)


def test_a_whole_checkpoint_is_read(tmp_path: Path):
    torch.save(WHOLE, tmp_path / "a.ckpt")
    assert read(tmp_path / "a.ckpt") == WHOLE


@pytest.mark.parametrize("content", [b"", b"hello\n", None])
def test_what_cannot_be_read_is_named_without_bad_advice(tmp_path: Path, content: bytes | None):
    file = tmp_path / "a.ckpt"
    torch.save(WHOLE | {"state_dict": {"w": torch.zeros(1000)}}, file)
    file.write_bytes(file.read_bytes()[:-500] if content is None else content)
    with pytest.raises(ConfigError, match=r"a\.ckpt': it cannot be read: .* give the path of") as caught:
        read(file)
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("content", [{"w": torch.zeros(1)}, [1, 2]])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=r"it has no \['global_step', 'pytorch-lightning_version', 'state"):
        read(tmp_path / "a.ckpt")


def test_only_a_file_is_a_checkpoint(tmp_path: Path):
    (tmp_path / "a.ckpt").touch()
    require_checkpoint_file(None)
    require_checkpoint_file(str(tmp_path / "a.ckpt"))
    with pytest.raises(ConfigError, match="ckpt_path is 'last': there is no such file; give the path of a"):
        require_checkpoint_file("last")
    with pytest.raises(ConfigError, match=r"it is a folder; .*weights alone are given as model.policy"):
        require_checkpoint_file(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": None}, "1 tensors missing, such as bias"),
        ({"extra": torch.zeros(1)}, "1 tensors not part of the model, such as extra"),
        ({"bias": torch.zeros(3)}, "1 tensors of another shape, such as bias"),
        ({"weight": torch.full((2, 2), torch.nan)}, "1 tensors not finite, such as weight"),
    ],
)
def test_weights_of_another_model_are_named(changes: dict, words: str):
    module = nn.Linear(2, 2)
    state = module.state_dict()
    require_weights_of(module, {"state_dict": state})
    state = {name: value for name, value in (dict(state) | changes).items() if value is not None}
    with pytest.raises(ConfigError, match=f"do not fit model.policy: {words}; give the checkpoint"):
        require_weights_of(module, {"state_dict": state})


def test_training_goes_on_only_where_something_is_left_to_do():
    whole = {"optimizer_states": [{}], "global_step": 3}
    require_resumable(whole, 4)
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is 3: the checkpoint is already at step 3"):
        require_resumable(whole, 3)
    with pytest.raises(ConfigError, match="weights but no optimizer"):
        require_resumable({"optimizer_states": [], "global_step": 3}, 4)


def test_an_optimizer_of_another_kind_is_refused():
    def written(*names: str) -> dict:
        state = {0: dict.fromkeys(names, torch.zeros(1))} if names else {}
        return {"optimizer_states": [{"state": state}], "global_step": 3}

    for good, masters in ((("exp_avg",), False), (("exp_avg", "master"), True), ((), True), ((), False)):
        require_resumable(written(*good), 4, masters)
    with pytest.raises(ConfigError, match="master_weights is True: the checkpoint was written with False;"):
        require_resumable(written("exp_avg"), 4, True)
    with pytest.raises(ConfigError, match="master_weights is False: the checkpoint was written with True;"):
        require_resumable(written("exp_avg", "master"), 4, False)


def test_adapters_of_another_kind_are_refused():
    settings = {"rank": 2, "alpha": 4.0, "targets": ["q_proj"], "weights": "a1"}
    require_adapters_of(None, None)
    require_adapters_of(dict(settings), settings)
    with pytest.raises(ConfigError, match=r"ckpt_path: it holds a whole policy .*; set model\.lora to null"):
        require_adapters_of(None, settings)
    with pytest.raises(
        ConfigError, match=r"adapters of model\.lora .*'rank': 2.* is None; .* the same"
    ) as caught:
        require_adapters_of(settings, None)
    assert "a1" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"adapters of model\.lora .*'rank': 3.* is .*'rank': 2"):
        require_adapters_of(settings | {"rank": 3, "weights": "b2"}, settings)
    with pytest.raises(ConfigError, match=r"trained on other weights .*; set it to what they"):
        require_adapters_of(settings | {"weights": "b2"}, settings)
