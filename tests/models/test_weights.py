import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drift.models import LLaDA, load_policy
from drift.models.weights import default_dtype, read_weights, weight_files

Make = Callable[..., LLaDA]
ROOT = Path(__file__).resolve().parents[2]


def test_the_files_are_the_one_or_those_of_the_index(tmp_path: Path):
    assert weight_files(tmp_path) == []
    shards = {"b": "2.safetensors", "a": "1.safetensors", "c": "2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert weight_files(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_shards_load_as_the_whole_does(make_policy: Make, tmp_path: Path):
    policy = make_policy()
    policy.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weight_files(tmp_path)) > 3
    loaded = load_policy(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in policy.state_dict().items())


def meta_model() -> torch.nn.Module:
    with torch.device("meta"):
        model = torch.nn.ModuleDict(
            {"one": torch.nn.Linear(2, 2, bias=False), "two": torch.nn.Linear(2, 2, bias=False)}
        )
    model["two"].weight = model["one"].weight
    return model


@pytest.mark.parametrize("name", ["one.weight", "two.weight"])
def test_a_tied_parameter_is_read_under_either_name_and_stays_one(tmp_path: Path, name: str):
    file, model, value = tmp_path / "model.safetensors", meta_model(), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    save_file({name: value}, file)
    assert read_weights(model, [file], torch.bfloat16) == {"missing": [], "unexpected": [], "mismatched": []}
    assert model["one"].weight is model["two"].weight
    assert torch.equal(model["one"].weight, value.bfloat16())


def test_nothing_is_read_where_something_does_not_fit(tmp_path: Path):
    file, model = tmp_path / "model.safetensors", meta_model()
    save_file({"one.weight": torch.zeros(2, 3), "three": torch.zeros(1)}, file)
    report = read_weights(model, [file], torch.float32)
    assert report == {"missing": [], "unexpected": ["three"], "mismatched": [("one.weight", [2, 3], [2, 2])]}
    save_file({"three": torch.zeros(1)}, file)
    assert read_weights(model, [file], torch.float32)["missing"] == ["one.weight"]
    assert model["one"].weight.is_meta


def test_the_weights_are_no_view_of_the_file(make_policy: Make, tmp_path: Path):
    """A folder may be written over, by an export, while its policy trains."""
    make_policy().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    before = {name: value.clone() for name, value in load_file(file).items()}
    policy = load_policy(tmp_path)
    # In place: what was mapped would change.
    with file.open("r+b") as stream:
        stream.seek(-5000, 2)
        stream.write(b"\0" * 5000)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_default_dtype_ends_with_its_context():
    with default_dtype(torch.bfloat16):
        assert torch.zeros(1).dtype == torch.bfloat16
    assert torch.zeros(1).dtype == torch.float32


PEAK = """
import sys
from pathlib import Path
import torch
from drift.models import LLaDA, LLaDAConfig, load_policy

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

folder, fresh = sys.argv[1], sys.argv[2] == "fresh"
for dtype in (torch.float32, torch.bfloat16):
    policy = None
    # From here on the high-water mark is counted anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    policy = load_policy(folder, dtype, random_init=fresh)
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    print((memory("VmHWM") - before) / size, size)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs the memory figures of Linux")
@pytest.mark.parametrize("start", ["read", "fresh"])
def test_loading_takes_the_memory_of_one_copy(make_policy: Make, tmp_path: Path, start: str):
    sizes = {"d_model": 768, "n_heads": 12, "n_layers": 10, "mlp_hidden_size": 2112, "vocab_size": 4096}
    with torch.device("meta"):
        policy = make_policy(**sizes)
    # Any numbers will do: 79 million of them.
    state = {name: torch.empty(value.shape) for name, value in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, state_dict=state)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), start],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        growth, size = map(float, line.split())
        assert size > 150e6
        assert 0.9 < growth < 1.3, f"{growth:.2f} copies"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize(("dtype", "copy", "mapped"), [(0, False, True), (0, True, False), (1, False, False)])
def test_what_is_sharded_at_once_is_not_copied_first(tmp_path: Path, dtype: int, copy: bool, mapped: bool):
    file, model = tmp_path / "model.safetensors", meta_model()
    save_file({"one.weight": torch.ones(2, 2)}, file)
    read_weights(model, [file], (torch.float32, torch.bfloat16)[dtype], copy=copy)
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    address = model["one"].weight.data_ptr()
    assert any(low <= address < high for low, high in ranges) is mapped
