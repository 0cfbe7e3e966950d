import pytest

from drift.contract import ConfigError
from drift.models import LLaDA, LLaDAConfig, known
from drift.models.known import KNOWN, find_config
from drift.models.loading import FAMILIES


def test_known_checkpoints_are_of_families_that_there_are():
    assert set(KNOWN) <= set(FAMILIES)
    for model_type, names in KNOWN.items():
        FAMILIES[model_type].config_class().require_supported()  # pyright: ignore
        assert all(name.count("/") == 1 for name in names)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr("drift.models.loading.snapshot_download", refuse)
    family, config, source = find_config("GSAI-ML/LLaDA-8B-Base")
    assert family is LLaDA
    assert isinstance(config, LLaDAConfig)
    assert (config.d_model, config.n_layers, config.vocab_size) == (4096, 32, 126464)
    assert source == "the known sizes of GSAI-ML/LLaDA-8B-Base, which is not on this machine"
    with pytest.raises(ConfigError, match="not in the hub's cache, and its sizes are not known"):
        find_config("GSAI-ML/LLaDA-9B")


def test_the_hubs_cache_wins_over_the_known_sizes(tiny_folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "try_to_load_from_cache", lambda *_: str(tiny_folder / "config.json"))
    _, config, source = find_config("GSAI-ML/LLaDA-8B-Base")
    assert config.d_model == 32
    assert source == "config.json of GSAI-ML/LLaDA-8B-Base"


def test_shipped_policies_are_found_by_name():
    _, config, source = find_config("sudoku_base")
    assert config.n_layers > 0
    assert source == "config.json of sudoku_base"
