import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from drift.doctor import Check, examine, examine_folder, failures
from drift.doctor.probes import Probe, batch_of, built_in_probes
from drift.models import DiffusionLM, Dream, DreamConfig, LLaDA, LLaDAConfig, load_policy
from drift.models.characters import character_tokenizer

SIZE = 104
PAD, MASK = 0, 97  # what lies above the mask is never a token of Dream's


def taught(policy: DiffusionLM) -> DiffusionLM:
    """The policy, once it knows the built-in sentences by heart, more or less."""
    ids, mask, _ = batch_of(built_in_probes(character_tokenizer(SIZE, PAD, MASK)), PAD)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        asked = (torch.rand(ids.shape, generator=generator) < 0.4) & mask
        hidden = policy(ids.masked_fill(asked, MASK), mask)[asked]
        F.cross_entropy(policy.head(hidden), ids[asked]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.eval()


def write(policy: DiffusionLM, folder: Path) -> Path:
    policy.save_pretrained(folder)
    character_tokenizer(SIZE, PAD, MASK).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llada(tmp_path_factory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LLaDAConfig(
            d_model=64,
            n_heads=4,
            n_layers=2,
            mlp_hidden_size=128,
            vocab_size=SIZE,
            mask_token_id=MASK,
            pad_token_id=PAD,
            eos_token_id=PAD,
            include_qkv_bias=True,
            init_std=0.1,
        )
        return write(taught(LLaDA(config)), tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def dream(tmp_path_factory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = DreamConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_hidden_layers=2,
            intermediate_size=128,
            vocab_size=SIZE,
            mask_token_id=MASK,
            pad_token_id=PAD,
            eos_token_id=PAD,
            bos_token_id=PAD,
            rope_theta=500000.0,
            rms_norm_eps=1e-5,
            initializer_range=0.1,
        )
        return write(taught(Dream(config)), tmp_path_factory.mktemp("dream"))


@pytest.fixture
def copy(tmp_path: Path):
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def set_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def status(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def only_failure(checks: list[Check]) -> Check:
    (check,) = [check for check in checks if check.status == "failed"]
    return check


SOUND = ["folder", "tokenizer", "weights", "shift", "mask id", "padding", "legal tokens", "re-scoring"]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_sound_policy_passes(request: pytest.FixtureRequest, family: str):
    checks = examine_folder(request.getfixturevalue(family))
    assert status(checks) == dict.fromkeys(SOUND, "ok")
    assert failures(checks) == ""


def test_a_fresh_policy_gives_no_evidence(tmp_path: Path, make_policy):
    folder = write(make_policy(vocab_size=SIZE, mask_token_id=MASK), tmp_path / "fresh")
    found = status(examine_folder(folder))
    assert found.pop("shift") == found.pop("mask id") == "unsure"
    assert set(found.values()) == {"ok"}


# Dream's tensors under the names that a LLaDA of the same sizes has.
RENAMED = {
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ff_norm.",
    ".self_attn.o_proj.": ".attn_out.",
    ".self_attn.": ".",
    ".mlp.gate_proj.": ".ff_proj.",
    ".mlp.up_proj.": ".up_proj.",
    ".mlp.down_proj.": ".ff_out.",
}


def rename(folder: Path, pairs: list[tuple[str, str]]) -> None:
    file = folder / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        for old, new in pairs:
            name = name.replace(old, new)
        tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_shifted_head_under_a_llada_config(llada: Path, dream: Path, copy):
    folder = copy(llada)
    shutil.copy(dream / "model.safetensors", folder)
    rename(folder, list(RENAMED.items()))
    check = only_failure(examine_folder(folder))
    assert check.name == "shift"
    assert "the row before predicts masked tokens" in check.found
    assert check.fix.startswith(
        "the head looks shifted by one: this is a Dream-type checkpoint, model_type says llada"
    )


def test_an_unshifted_head_under_a_dream_config(llada: Path, dream: Path, copy):
    folder = copy(dream)
    shutil.copy(llada / "model.safetensors", folder)
    # The other way round; the block's own ff_out before the head's, which is shorter.
    back = {new: old for old, new in RENAMED.items() if new != "."}
    names = sorted(back.items(), key=lambda pair: not pair[0].startswith("model."))
    rename(folder, [*names, (".q_proj", ".self_attn.q_proj"), (".k_proj", ".self_attn.k_proj")])
    rename(folder, [(".v_proj", ".self_attn.v_proj")])
    check = only_failure(examine_folder(folder))
    assert check.name == "shift"
    assert "the row behind predicts masked tokens" in check.found
    assert "the head looks unshifted: this is a LLaDA-type checkpoint, model_type says Dream" in check.fix


@pytest.mark.parametrize(("ours", "other"), [("llada", "Dream"), ("dream", "llada")])
def test_weights_of_the_other_family(request: pytest.FixtureRequest, copy, ours: str, other: str):
    folder = copy(request.getfixturevalue(ours))
    set_config(folder, model_type=other, d_model=64, n_heads=4, n_layers=2, mlp_hidden_size=128)
    check = only_failure(examine_folder(folder))
    assert check.name == "weights"
    assert f"as in a {'Dream' if ours == 'dream' else 'llada'} checkpoint" in check.fix
    assert f"model_type: {other!r}" in check.fix


def test_a_mask_id_that_is_a_word(llada: Path, copy):
    folder = copy(llada)
    set_config(folder, mask_token_id=33)
    assert only_failure(examine_folder(folder)).name == "tokenizer"


def test_a_mask_id_that_is_a_word_to_the_policy(llada: Path, copy):
    folder = copy(llada)
    set_config(folder, mask_token_id=33)
    found = examine(load_policy(folder).eval(), character_tokenizer(SIZE, PAD, MASK), [])
    assert only_failure(found).name == "mask id"
    assert only_failure(found).fix == f"config.json has mask_token_id: 33; set it to {MASK}"


def test_a_mask_id_that_only_the_policy_can_refute(llada: Path, copy):
    """The tokenizer agrees with the wrong id, as it does where a converter wrote both."""
    folder = copy(llada)
    set_config(folder, mask_token_id=98)
    tokenizer = character_tokenizer(SIZE, PAD, 98)
    # Still a special token, but no longer called the mask.
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(MASK)]})
    tokenizer.save_pretrained(folder)
    check = only_failure(examine_folder(folder))
    assert check.name == "mask id"
    assert check.fix == f"config.json has mask_token_id: 98; set it to {MASK}"


def test_padding_that_is_not_masked(llada: Path, monkeypatch: pytest.MonkeyPatch):
    policy, whole = load_policy(llada).eval(), LLaDA.forward
    tokenizer = character_tokenizer(SIZE, PAD, MASK)
    monkeypatch.setattr(
        LLaDA, "forward", lambda self, ids, mask=None, *rest, **more: whole(self, ids, None, *rest, **more)
    )
    check = only_failure(examine(policy, tokenizer, []))
    assert check.name == "padding"
    assert "the attention reads padding" in check.fix


def test_a_rollout_that_update_and_decoding_see_differently(llada: Path, monkeypatch: pytest.MonkeyPatch):
    import drift.doctor.examination as examination

    policy, whole = load_policy(llada).eval(), examination.denoise

    def denoise(*args, **kwargs):
        rollout = whole(*args, **kwargs)
        rollout.token_probs = rollout.token_probs * 0.7
        return rollout

    monkeypatch.setattr(examination, "denoise", denoise)
    check = only_failure(examine(policy, character_tokenizer(SIZE, PAD, MASK), []))
    assert check.name == "re-scoring"
    assert "3.6e-01 nats apart" in check.found  # -log 0.7 = 0.357


def test_a_mask_that_is_emitted(make_policy, monkeypatch: pytest.MonkeyPatch):
    policy = make_policy(vocab_size=SIZE, mask_token_id=MASK, favour={MASK: 150.0})
    tokenizer = character_tokenizer(SIZE, PAD, MASK)
    assert failures(examine(policy, tokenizer, [])) == ""
    monkeypatch.setattr(LLaDA, "forbid_illegal", lambda self, logits, **_: logits)
    found = {check.name: check for check in examine(policy, tokenizer, [])}
    assert found["legal tokens"].status == "failed"


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"pad_token_id": MASK}, "tokenizer", "both 97; they must differ"),
        (
            {"mask_token_id": 98},
            "tokenizer",
            "mask token '<|mask|>' has id 97, the policy's mask_token_id is 98",
        ),
        ({"mask_token_id": None}, "tokenizer", "mask_token_id: None"),
        ({"pad_token_id": 5}, "tokenizer", "padding token '<|endoftext|>' has id 0"),
        ({"block_type": "sequential"}, "weights", "block_type: 'sequential'; supported for LLaDA: ['llama']"),
        ({"model_type": "gpt2"}, "folder", "model_type: 'gpt2'; supported: ['Dream', 'llada']"),
    ],
)
def test_configs_that_cannot_be(llada: Path, copy, changes: dict, check: str, words: str):
    folder = copy(llada)
    set_config(folder, **changes)
    failed = {c.name: c.fix for c in examine_folder(folder) if c.status == "failed"}
    assert words in failed[check]


def test_the_tokenizer_of_another_model(llada: Path, copy):
    folder = copy(llada)
    character_tokenizer(SIZE + 20, 110, 111).save_pretrained(folder)
    check = only_failure(examine_folder(folder))
    assert check.name == "tokenizer"
    assert "use the tokenizer that the policy was trained with" in check.fix


def test_no_tokenizer_at_all_leaves_the_other_checks(llada: Path, copy):
    folder = copy(llada)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink(missing_ok=True)
    checks = examine_folder(folder)
    assert only_failure(checks).name == "tokenizer"
    assert {"padding", "legal tokens", "re-scoring"} <= status(checks).keys()


def test_truncated_weights(llada: Path, copy):
    folder = copy(llada)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    check = only_failure(examine_folder(folder))
    assert check.name == "weights"
    assert "damaged or cut short" in check.fix


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(llada: Path, copy, value: float):
    folder = copy(llada)
    tensors = load_file(folder / "model.safetensors")
    name = "model.transformer.blocks.1.ff_proj.weight"
    tensors[name][3, 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check = only_failure(examine_folder(folder))
    assert (check.name, check.found) == ("weights", f"1 tensors hold NaN or infinity, such as {name}")


def test_probes_of_the_task_are_asked_for_their_demonstration_alone(llada: Path):
    probe = Probe(ids=list(range(2, 12)), start=6)
    _, mask, asked = batch_of([probe, Probe(ids=list(range(2, 16)))], PAD)
    assert mask.sum(dim=1).tolist() == [10, 14]
    # 14 columns: the first row begins at column 4, its demonstration at 10.
    assert asked[0].nonzero()[:, 0].tolist() == [10, 13]
    assert asked[1].nonzero()[:, 0].tolist() == [2, 5, 8, 11]


def test_in_bfloat16_rounding_is_allowed_for(llada: Path):
    checks = examine_folder(llada, dtype=torch.bfloat16)
    assert failures(checks) == ""
    assert status(checks)["re-scoring"] == "ok"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_logits_round_more_and_are_no_alarm(dtype: torch.dtype, make_policy):
    """Deep and peaked: in bfloat16 its padded rows are further apart than those of an unpeaked policy."""
    policy = make_policy(vocab_size=SIZE, mask_token_id=MASK, d_model=64, n_layers=8, init_std=0.3)
    with torch.no_grad():
        policy.head.weight.mul_(4)
    torch.nn.Module.to(policy, dtype)
    assert failures(examine(policy, character_tokenizer(SIZE, PAD, MASK), [])) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init_std", [0.02, 0.1, 0.5])
def test_padding_is_seen_at_any_size_of_logits(
    dtype: torch.dtype, init_std: float, make_policy, monkeypatch: pytest.MonkeyPatch
):
    policy = make_policy(vocab_size=SIZE, mask_token_id=MASK, d_model=64, n_layers=4, init_std=init_std)
    torch.nn.Module.to(policy, dtype)
    whole = LLaDA.forward
    monkeypatch.setattr(
        LLaDA, "forward", lambda self, ids, mask=None, *rest, **more: whole(self, ids, None, *rest, **more)
    )
    found = {check.name: check for check in examine(policy, character_tokenizer(SIZE, PAD, MASK), [])}
    assert found["padding"].status == "failed", found["padding"].found
