import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drift.contract import ConfigError
from drift.models import (
    LLaDA,
    load_policy,
    read_config,
    require_reference,
    resolve_folder,
)


@pytest.fixture(scope="module")
def saved(make_policy: Callable[..., LLaDA], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_policy(vocab_size=128, mask_token_id=127, pad_token_id=126).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def refused(call: Callable[[], object], *words: object) -> None:
    """The message names the key, the value and what is wrong or to be done."""
    with pytest.raises(ConfigError) as caught:
        call()
    missing = [str(word) for word in words if str(word) not in str(caught.value)]
    assert not missing, f"{caught.value} does not say {missing}"


def test_a_good_folder_loads(folder: Path):
    assert load_policy(folder).training


def test_a_policy_that_comes_with_drift_is_found_by_its_name():
    assert (resolve_folder("sudoku_base") / "config.json").is_file()


def test_a_missing_folder(tmp_path: Path):
    path = tmp_path / "nowhere"
    refused(
        lambda: load_policy(path),
        "model.policy is",
        str(path),
        "no such folder; give the path",
        "sudoku_base",
    )
    refused(lambda: load_policy("no_such_name"), "'no_such_name'", "sudoku_base")
    refused(lambda: load_policy(path, key="sft.policy"), "sft.policy is")


def test_a_hub_id_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused(
        lambda: load_policy("no-such-owner/no-such-model"),
        "model.policy is 'no-such-owner/no-such-model'",
        "the hub's cache",
        "give the path of a Hugging Face folder",
    )


def test_no_config(folder: Path):
    (folder / "config.json").unlink()
    refused(
        lambda: load_policy(folder), "model.policy", str(folder), "it has no config.json", "model.safetensors"
    )


@pytest.mark.parametrize("text", [b"{", b"", b'{"model_type": "llada",}', b"\xff\xfe{}", b"PK\x03\x04"])
def test_a_config_that_is_no_json(folder: Path, text: bytes):
    (folder / "config.json").write_bytes(text)
    refused(lambda: load_policy(folder), "model.policy", str(folder), "its config.json is no JSON")


@pytest.mark.parametrize("value", [[], "llada", 3, None])
def test_a_config_that_is_no_object(folder: Path, value: object):
    (folder / "config.json").write_text(json.dumps(value))
    refused(lambda: load_policy(folder), "model.policy", str(folder), "config.json")


@pytest.mark.parametrize("model_type", ["llama", "", None, 3, ["llada"]])
def test_an_unknown_family(folder: Path, model_type: object):
    change_config(folder, model_type=model_type)
    refused(lambda: load_policy(folder), "model.policy", f"model_type: {model_type!r}", "supported:", "llada")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(lambda: load_policy(folder), "model.policy", str(folder), "no *.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_weights_that_were_cut_short(folder: Path, keep: int):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(
        lambda: load_policy(folder),
        "model.policy",
        str(folder),
        "cannot be read",
        "copy or download it again",
    )


@pytest.mark.parametrize("index", ["{", "[]", '{"metadata": {}, "weight_map": {"a": "absent.safetensors"}}'])
def test_a_damaged_index_of_shards(folder: Path, index: str):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(lambda: load_policy(folder), "model.policy", str(folder))


def test_tensors_that_do_not_fit_the_config(folder: Path):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.transformer.blocks.0.q_proj.weight"

    def save(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file, metadata={"format": "pt"})

    save({key: value for key, value in tensors.items() if key != name})
    refused(lambda: load_policy(folder), "model.policy", "1 tensors missing", name, "the same checkpoint")
    save(tensors | {"model.transformer.extra.weight": torch.zeros(2)})
    refused(lambda: load_policy(folder), "1 tensors not part of the model", "model.transformer.extra.weight")
    save(tensors | {name: torch.zeros(32, 16)})
    refused(lambda: load_policy(folder), "1 tensors of another shape", name, "[32, 16]", "[32, 32]")


def test_a_config_of_another_size(folder: Path):
    change_config(folder, n_layers=3)
    refused(lambda: load_policy(folder), "9 tensors missing", "model.transformer.blocks.2.")


@pytest.mark.parametrize(("key", "value"), [("d_model", "wide"), ("n_layers", 2.5), ("vocab_size", None)])
def test_a_config_of_another_type(folder: Path, key: str, value: object):
    change_config(folder, **{key: value})
    refused(lambda: load_policy(folder), "config.json", key, repr(value))


def test_a_reference_of_other_tokens_is_refused(folder: Path, tmp_path: Path):
    config = read_config(folder)
    require_reference(folder, config)
    refused(
        lambda: require_reference(folder, config | {"vocab_size": 512}),
        *("model.reference is", folder, "vocab_size: 128, the policy's has 512; use a reference"),
    )
    refused(lambda: require_reference("nowhere", config), "model.reference is 'nowhere': there is no such")
