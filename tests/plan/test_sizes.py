import time

import pytest

from drift.contract import ConfigError
from drift.models import LLaDA, LLaDAConfig
from drift.models.known import KNOWN
from drift.plan import policy_sizes
from drift.plan.sizes import sizes_of


def test_parameters_are_those_of_the_policy(make_policy):
    policy = make_policy()
    sizes = sizes_of(policy, "here")
    # Embedding and head 48 x 32 each; per block 4 x 32 x 32 + 3 x 32 x 64 and two norms of 32; the last norm.
    assert sizes.num_parameters == 2 * 48 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert sizes.num_parameters == sum(p.numel() for p in policy.parameters())
    assert sizes.num_linear == 2 * (4 * 32 * 32 + 3 * 32 * 64)
    assert (sizes.num_blocks, sizes.num_block_parameters) == (2, 4 * 32 * 32 + 3 * 32 * 64 + 64)
    assert (sizes.width, sizes.kv_width, sizes.head_width, sizes.mlp_width) == (32, 32, 8, 64)
    assert (sizes.num_heads, sizes.vocab_rows, sizes.max_length) == (4, 48, 128)
    # Matrices and norms are groups of their own.
    assert [len(group) for group in sizes.shapes] == [2 + 2 * 7, 2 * 2 + 1]


def test_tied_weights_count_once_and_grouped_keys_are_narrow(make_policy):
    tied = sizes_of(make_policy(weight_tying=True), "here")
    assert tied.num_parameters == sizes_of(make_policy(), "here").num_parameters - 48 * 32
    grouped = sizes_of(make_policy(n_kv_heads=2), "here")
    assert grouped.kv_width == 16
    assert grouped.num_linear == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)


def test_adapters_have_two_matrices_for_every_target(make_policy):
    sizes = sizes_of(make_policy(), "here")
    # Per block four of 32 to 32, two of 32 to 64, one of 64 to 32; rank 3.
    every = sizes.adapters(3, None)
    assert sum(a * b for a, b in every) == 2 * 3 * (4 * 64 + 3 * 96)
    assert sizes.adapters(3, ("up_proj",)) == ((3, 32), (64, 3)) * 2


def test_a_folder_is_read_and_its_weights_are_not(tiny_folder, make_policy, tmp_path):
    assert policy_sizes(tiny_folder).num_parameters == policy_sizes(str(tiny_folder)).num_parameters
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    sizes = policy_sizes(tmp_path)
    assert sizes.shapes == policy_sizes(tiny_folder).shapes
    assert sizes.source == f"config.json of {tmp_path}"


@pytest.mark.parametrize("name", [name for names in KNOWN.values() for name in names])
def test_known_checkpoints_need_no_folder_and_no_time(name: str):
    start = time.perf_counter()
    sizes = policy_sizes(name)
    assert time.perf_counter() - start < 20
    # LLaDA: 2 x 126464 x 4096 + 32 x (4 x 4096^2 + 3 x 4096 x 12288 + 2 x 4096) + 4096. Dream: 2 x 152064
    # x 3584 + 28 x (2 x 3584^2 + 2 x 512 x 3584 + 3584 + 2 x 512 + 3 x 3584 x 18944 + 2 x 3584) + 3584.
    assert sizes.num_parameters == (7_615_616_512 if "Dream" in name else 8_015_581_184)
    assert name in sizes.source
    assert "not on this machine" in sizes.source


def test_unknown_policies_are_refused():
    with pytest.raises(
        ConfigError, match=r"model.policy is 'owner/name': .* give the path of .*LLaDA-8B-Base"
    ):
        policy_sizes("owner/name")
    with pytest.raises(ConfigError, match=r"model.reference is 'nowhere': there is no such folder"):
        policy_sizes("nowhere", "model.reference")


def test_a_folder_wins_over_a_known_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "GSAI-ML" / "LLaDA-1.5"
    ids = {"mask_token_id": 1, "pad_token_id": 0}
    config = LLaDAConfig(d_model=8, n_heads=2, n_layers=1, mlp_hidden_size=8, vocab_size=16, **ids)
    LLaDA(config).save_pretrained(folder)
    assert policy_sizes("GSAI-ML/LLaDA-1.5").width == 8
