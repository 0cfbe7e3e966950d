"""Nothing that comes from a file is run."""

import ast
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from drift.checkpoints import CheckedCheckpointIO
from drift.contract import ConfigError

ROOT = Path(__file__).resolve().parent.parent
# Runs a command and names every class that a pickle asks for.
MONITOR = """
import sys
asked = []
sys.addaudithook(lambda name, found: asked.append(found) if name == "pickle.find_class" else None)
from drift.__main__ import main
main()
print("ASKED", sorted(set(asked)))
"""


class Evil:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("write", [torch.save, lambda content, file: file.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize("weights_only", [True, None, False])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, write, weights_only: bool | None):
    content = {"state_dict": Evil(tmp_path / "ran"), "global_step": 1, "pytorch-lightning_version": "2"}
    write(content, tmp_path / "a.ckpt")
    io = CheckedCheckpointIO(TorchCheckpointIO())
    with pytest.raises(ConfigError, match=r"could (then )?run code|it is cut short or no checkpoint"):
        io.load_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "a.ckpt", weights_only=False) if write is torch.save else pickle.loads(
        (tmp_path / "a.ckpt").read_bytes()
    )
    assert (tmp_path / "ran").exists(), "it would have run"


def unpickles(module: ast.Module) -> list[int]:
    """Lines that read a pickle, or leave open whether torch does."""
    found = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load"):
            found.append(node.lineno)
        if name == "torch.load" and arguments.get("weights_only") != "True":
            found.append(node.lineno)
        if name == "np.load" and arguments.get("allow_pickle", "False") != "False":
            found.append(node.lineno)
    return found


def test_no_line_unpickles():
    files = [*(ROOT / "drift").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    assert len(files) > 50
    assert not [f"{file}:{line}" for file in files for line in unpickles(ast.parse(file.read_text()))]


@pytest.mark.parametrize(
    "code",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "pickle.load(f)", "torch.load(f, weights_only=w)"],
)
def test_lines_that_unpickle_are_found(code: str):
    assert unpickles(ast.parse(code)) == [1]


def test_a_run_and_its_resume_unpickle_nothing(tmp_path: Path):
    common = [
        "fit",
        "--config=quickstart",
        "--resume=auto",
        "--data.prompts_per_step=2",
        "--data.num_validation=2",
        "--rollout.group_size=2",
        "--progress.refresh_rate=0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for steps in (1, 2):
        call = [sys.executable, "-c", MONITOR, *common, f"--trainer.max_steps={steps}"]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.splitlines()[-1] == "ASKED []"
    assert f"steps              1 -> {steps}" in done.stdout
