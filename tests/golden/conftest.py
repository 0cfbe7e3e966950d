"""Numbers recorded from the paper's own code on a tiny LLaDA and a tiny Dream, and what reads them."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drift.models import load_policy

FAMILIES = ("llada", "dream")
GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"


@cache
def read_record(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")


def case_names(name: str) -> list[str]:
    """The recorded cases; without the recordings one placeholder, whose test skips."""
    return [c["name"] for c in read_record(name)[0]["cases"]] if GOLDEN.exists() else ["no recordings"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`recorded("rollouts")` marks a test of every recorded case of both families, as (family, name)."""
    for mark in metafunc.definition.iter_markers("recorded"):
        (folder,) = mark.args
        cases = [(family, name) for family in FAMILIES for name in case_names(f"{folder}/{family}")]
        metafunc.parametrize(("family", "name"), cases, ids=["-".join(case) for case in cases])


@pytest.fixture
def record(golden: Path) -> Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]:
    """Reads `FOLDER/NAME.json` and its tensors."""
    return read_record


@cache
def load_models(family: str) -> SimpleNamespace:
    folder = GOLDEN / "models"
    current, reference, old = (load_policy(folder / f"{family}_tiny").eval() for _ in range(3))
    overrides = load_file(folder / f"{family}_ref_overrides.safetensors")
    with torch.no_grad():
        for name, value in overrides.items():
            start = current.get_parameter(name)
            reference.get_parameter(name).copy_(value)
            old.get_parameter(name).copy_(start + 0.5 * (value - start))
    return SimpleNamespace(current=current, reference=reference, old=old)


@pytest.fixture
def models_of(golden: Path) -> Callable[[str], SimpleNamespace]:
    """A family's policy, frozen reference and old policy, half-way between the two; don't change them."""
    return load_models


@pytest.fixture
def close() -> Callable[..., None]:
    """Compares to relative 1e-3, absolute 1e-5: the recorder's tolerance of loss metrics and gradients."""

    def compare(ours: Any, theirs: Any, what: str = "") -> None:
        torch.testing.assert_close(
            torch.as_tensor(ours).double(),
            torch.as_tensor(theirs).double(),
            rtol=1e-3,
            atol=1e-5,
            msg=lambda report: f"{what}: {report}",
        )

    return compare
