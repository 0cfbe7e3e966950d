import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from drift.contract import ConfigError
from drift.models import load_policy
from drift.models.inspection import require_weights, tensor_names


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "policy"))


def test_names_are_those_of_all_shards(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for part in (0, 1):
        save_file({n: tensors[n] for n in names[part::2]}, folder / f"model-{part}.safetensors")
    (folder / "model.safetensors").unlink()
    assert sorted(tensor_names(folder)) == names


def test_pickled_weights_are_never_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*.safetensors weights.*pytorch_model.bin: pickled"):
        load_policy(folder)


@pytest.mark.parametrize("code", [True, False])
def test_a_folder_whose_model_is_only_code(folder: Path, code: bool):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mystery", "auto_map": {"AutoModel": "modeling_mystery.Mystery"}}
    (folder / "config.json").write_text(json.dumps(config))
    if code:
        (folder / "modeling_mystery.py").write_text("raise SystemExit('this code was run')")
    name = r"modeling_mystery.py" if code else r"\{'AutoModel': 'modeling_mystery.Mystery'\}"
    with pytest.raises(
        ConfigError, match=rf"supported: \['Dream', 'llada'\]; .*only as code.*\({name}\).*never run"
    ):
        load_policy(folder)


def test_code_beside_a_known_model_type_is_left_alone(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_llada.py").write_text("raise SystemExit('this code was run')")
    load_policy(folder)


@pytest.mark.parametrize(("ours", "other"), [("llada", "Dream"), ("dream", "llada")])
def test_tensors_of_the_other_family(golden: Path, ours: str, other: str):
    folder = golden / "models" / f"{ours}_tiny"
    with pytest.raises(
        ConfigError, match=f"its tensors are named as in a .* checkpoint.*model_type: '{other}'"
    ):
        require_weights(folder, other, "model.policy")
    require_weights(folder, {"llada": "llada", "dream": "Dream"}[ours], "model.policy")


def test_tensors_of_no_family_are_left_to_the_loader(folder: Path):
    tensors = {f"x.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    require_weights(folder, "llada", "model.policy")
    with pytest.raises(ConfigError, match=r"tensors missing, such as .*tensors not part of the model"):
        load_policy(folder)
