"""What every test shares: no network, few threads, and the reference data beside the repository."""

import os
from pathlib import Path

# Before torch or a Hugging Face library is imported, and inherited by every process that a test starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tiny models of the tests are slower on many threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _beside(name: str) -> Path:
    path = ROOT.parent / name
    if not path.exists():
        pytest.skip(f"needs the reference data at ../{name}, which is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository; skips where it is absent."""
    return _beside("shared")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden tensors; skips where it is absent."""
    return _beside("shared/golden")
