import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from drift.contract import ConfigError
from drift.models import load_policy
from drift.models.writing import companions, require_exportable, write_folder


@pytest.fixture(params=["llada", "dream"])
def source(request: pytest.FixtureRequest, golden: Path, tmp_path: Path) -> Path:
    """A recorded checkpoint with everything that hub folders have: tokenizer, template, code."""
    folder = Path(shutil.copytree(golden / "models" / f"{request.param}_tiny", tmp_path / "source"))
    for file in folder.iterdir():
        file.chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "modeling_own.py", "README.md"):
        (folder / name).write_text(f"this is {name}")
    return folder


def test_what_came_in_goes_out_byte_for_byte(source: Path, tmp_path: Path):
    write_folder(load_policy(source).state_dict(), source, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {file.name for file in source.iterdir()} - {"README.md"}
    for name in written:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name


def test_whoever_reads_the_configuration_reads_the_weights(source: Path, tmp_path: Path):
    write_folder(load_policy(source).state_dict(), source, tmp_path / "out")
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode}


def test_each_tensor_keeps_the_dtype_it_came_in(source: Path, tmp_path: Path):
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    kept = {name: value.bfloat16() if name == names[0] else value for name, value in tensors.items()}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    policy = load_policy(source, torch.float32)
    assert policy.get_parameter(names[0]).dtype == torch.float32
    write_folder(policy.state_dict(), source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == kept.keys()
    for name, value in kept.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_shards_and_another_dtype(source: Path, tmp_path: Path):
    policy, out = load_policy(source), tmp_path / "out"
    write_folder(policy.state_dict(), source, out, dtype="bfloat16", max_shard_size="150KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert set(index["weight_map"]) == set(load_file(source / "model.safetensors"))
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert after == before | {"torch_dtype": "bfloat16"}
    again = load_policy(out, torch.bfloat16).state_dict()
    assert all(torch.equal(again[name], value.bfloat16()) for name, value in policy.state_dict().items())


def test_weights_that_are_not_the_policys_stay_behind(source: Path, tmp_path: Path):
    save_file({"lora_A": torch.zeros(2)}, source / "adapter_model.safetensors")
    write_folder(load_policy(source).state_dict(), source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_a_tied_head_is_written_once(tmp_path: Path, make_policy):
    source = tmp_path / "source"
    policy = make_policy(weight_tying=True)
    policy.save_pretrained(source)
    write_folder(policy.state_dict(), source, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert names == set(load_file(source / "model.safetensors"))
    assert names == set(policy.state_dict()) - {"model.transformer.ff_out.weight"}


def test_a_tied_head_that_was_gathered_apart_is_written_once(tmp_path: Path, make_policy):
    source = tmp_path / "source"
    policy = make_policy(weight_tying=True)
    policy.save_pretrained(source)
    apart = {name: value.clone() for name, value in policy.state_dict().items()}
    write_folder(apart, source, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(
        load_file(source / "model.safetensors")
    )
    apart["model.transformer.ff_out.weight"] += 1
    with pytest.raises(ConfigError, match=r"unknown \['model\.transformer\.ff_out\.weight'\]"):
        write_folder(apart, source, tmp_path / "other")


def test_the_tokenizer_of_another_folder(source: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer.json").write_text("another")
    (other / "config.json").write_text("not this one")
    found = companions(source, other)
    assert found["tokenizer.json"] == other / "tokenizer.json"
    assert found["config.json"] == source / "config.json"
    assert "merges.txt" not in found  # half of one tokenizer and half of another is none
    assert companions(source, source) == companions(source)


def test_an_earlier_policy_is_replaced_whole(source: Path, tmp_path: Path):
    out = tmp_path / "out"
    state = load_policy(source).state_dict()
    write_folder(state, source, out, max_shard_size="150KB")
    write_folder(state, source, out)
    assert not list(out.glob("*-of-*"))
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_would_be_lost_is_refused(source: Path, tmp_path: Path):
    state = load_policy(source).state_dict()
    thesis = tmp_path / "mine"
    thesis.mkdir()
    (thesis / "config.json").write_text("{}")
    (thesis / "model.safetensors").write_text("")
    require_exportable(thesis)
    (thesis / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds \['thesis.tex'\], which would be lost; name a new"):
        write_folder(state, source, thesis)
    assert (thesis / "thesis.tex").read_text() == "years of work"
    code = tmp_path / "code"
    code.mkdir()
    (code / "main.py").write_text("")
    with pytest.raises(ConfigError, match=r"it holds \['main.py'\], which would be lost"):
        require_exportable(code)
    with pytest.raises(ConfigError, match="the policy's own; name another one"):
        write_folder(state, source, source)
    with pytest.raises(ConfigError, match="that is a file"):
        require_exportable(code / "main.py")
    require_exportable(tmp_path / "new")


def test_weights_of_another_policy_are_refused(source: Path, tmp_path: Path):
    state = load_policy(source).state_dict()
    name = sorted(state)[0]
    with pytest.raises(ConfigError, match=rf"missing \['{name}'\], unknown \['more'\]"):
        write_folder(
            {("more" if key == name else key): value for key, value in state.items()}, source, tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': choose one of"),
        ({"max_shard_size": "big"}, "max_shard_size is 'big': give a size such as 5GB"),
        ({"max_shard_size": "0GB"}, "max_shard_size is '0GB'"),
    ],
)
def test_options(source: Path, tmp_path: Path, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        write_folder({}, source, tmp_path / "out", **options)
