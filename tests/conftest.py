"""What every test shares: no network, few threads, and the reference data beside the repository."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

# Before torch or a Hugging Face library is imported, and inherited by every process that a test starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tiny models of the tests are slower on many threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if TYPE_CHECKING:
    from lightning import Trainer

    from drift.contract import Problem
    from drift.models import LLaDA
    from drift.tasks import Task

ROOT = Path(__file__).resolve().parent.parent


def _beside(name: str) -> Path:
    path = ROOT.parent / name
    if not path.exists():
        pytest.skip(f"needs the reference data at ../{name}, which is not beside this checkout")
    return path


@pytest.fixture(autouse=True)
def no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning keeps the seed of the last run in the environment."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; skips where it is absent."""
    return _beside("shared")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden tensors; skips where it is absent."""
    return _beside("shared/golden")


@pytest.fixture(scope="session")
def bwrap() -> None:
    """Skips where bubblewrap can make no sandbox."""
    from drift.contract import ConfigError
    from drift.rewards.sandbox import Sandbox

    try:
        Sandbox()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """tests/oracle.py: the method in plain loops. Importlib mode doesn't put tests/ on the path."""
    spec = importlib.util.spec_from_file_location("oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_policy() -> Callable[..., LLaDA]:
    """Makes small random policies (padding 0, mask 1), sure of some tokens and unsure of others.

    `favour` {token: amount} raises the token's logit everywhere: dimension 0 of the residual stream is made
    constant, so that column 0 of the head is a bias.
    """
    from drift.models import LLaDA, LLaDAConfig

    def make(seed: int = 0, favour: dict[int, float] | None = None, **changes: object) -> LLaDA:
        settings = {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "mlp_hidden_size": 64,
            "vocab_size": 48,
            "max_sequence_length": 128,
            "mask_token_id": 1,
            "pad_token_id": 0,
            "eos_token_id": 0,
            "init_std": 0.5,
        }
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            policy = LLaDA(LLaDAConfig(**settings | changes)).eval()
            if favour is not None:
                policy.get_input_embeddings().weight[:, 0] = 2.0
                policy.head.weight[:, 0] = 0.0
                for block in policy.blocks:
                    block.attn_out.weight[0] = block.ff_out.weight[0] = 0.0
                for token, amount in favour.items():
                    policy.head.weight[token, 0] = amount
        return policy

    return make


@pytest.fixture(scope="session")
def policy(make_policy: Callable[..., LLaDA]) -> LLaDA:
    """A small random policy; don't change it."""
    return make_policy()


@pytest.fixture(scope="session")
def ending_policy(make_policy: Callable[..., LLaDA]) -> LLaDA:
    """A small random policy that likes padding: some rows of a rollout end early. Don't change it."""
    return make_policy(favour={0: 150.0})


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes left-padded prompts of the given lengths, [N,P] ids and mask; the padding's ids are random."""

    def make(*lengths: int, width: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        width = width or max(lengths)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, 48, (len(lengths), width), generator=generator)
        mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
        return ids, mask

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, make_policy: Callable[..., LLaDA]) -> Path:
    """The Hugging Face folder of a small random policy and its character tokenizer; don't change it."""
    from drift.models.characters import character_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = character_tokenizer()
    make_policy(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def spread_task() -> Task:
    """Sudoku whose reward differs for nearly every completion: random policies have something to learn."""
    from drift.rewards.base import PerSampleReward
    from drift.tasks import SudokuTask

    class SpreadReward(PerSampleReward):
        def score(self, completion: str, problem: Problem) -> float:
            return sum(place * ord(letter) for place, letter in enumerate(completion, start=1)) % 97 / 97

    task = SudokuTask()
    task.reward = SpreadReward()
    return task


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes trainers that write nothing but what their callbacks do, into the test's folder."""
    from lightning import Trainer

    def make(max_steps: int = 1, **settings: object) -> Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(max_steps=max_steps, **quiet | settings)

    return make


@pytest.fixture
def fake_gym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package reasoning_gym of a few generators that misbehave on demand, for this and other processes."""
    package = tmp_path / "site" / "reasoning_gym"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_GYM)
    (package / "factory.py").write_text("from reasoning_gym import DATASETS\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.syspath_prepend(package.parent)


FAKE_GYM = '''
import os, time

class Sums:
    """Asks for number + 1. What an answer is worth is in the answer."""
    def __init__(self, seed=0, size=500, own=1, nonsense=None, listed=False):
        self.seed, self.own, self.nonsense, self.listed = seed, own, nonsense, listed
    def __getitem__(self, place):
        if self.listed and place:
            raise IndexError(place)
        number = self.seed + place
        if number == 13:
            raise ValueError("unlucky")
        if number == 14:
            os._exit(1)
        print("talk that must not be taken for an answer")
        order = "".join({"a", "b", "c", "d", "e", "f"})
        return {"question": f"{number}+1 {order}", "answer": str(number + 1), "metadata": {"tries": []}}
    def score_answer(self, answer, entry):
        entry["metadata"]["tries"].append(answer)
        assert len(entry["metadata"]["tries"]) == 1
        if answer == entry["answer"]:
            return self.own
        if self.nonsense:
            return self.nonsense
        if answer.startswith("worth "):
            return float(answer[6:])
        if answer.startswith("hang"):
            while True: pass
        if answer == "crash":
            os._exit(1)
        if answer == "raise":
            raise KeyError
        return 0.5 * bool(eval(answer))

DATASETS = {"sums": Sums}

def create_dataset(name, **settings):
    return DATASETS[name](**settings)
'''
