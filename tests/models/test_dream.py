import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drift.contract import ConfigError
from drift.models import Dream, DreamConfig, load_policy
from drift.models.dream import shifted
from drift.rollout import DenoiseConfig, PrefixCache, denoise

IDS = torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def make(seed: int = 0, **changes: object) -> Dream:
    settings = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": 48,
        "mask_token_id": 40,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": 0,
        "initializer_range": 0.5,
    }
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        policy = Dream(DreamConfig(**settings | changes)).eval()
        for name, parameter in policy.named_parameters():
            if name.endswith(".bias"):  # initialised to 0, which would hide them
                nn.init.normal_(parameter)
    return policy


@pytest.fixture(scope="module")
def dream() -> Dream:
    return make()


def by_hand(policy: Dream, ids: Tensor) -> Tensor:
    """Raw logits [L,V] of one row, head by head, in float64, from the weights alone."""
    w = {name: value.double() for name, value in policy.state_dict().items()}
    config = policy.config
    width = config.hidden_size // config.num_attention_heads
    share = config.num_attention_heads // config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return w[name] * x / (x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def turn(x: Tensor) -> Tensor:
        half = width // 2
        out = torch.empty_like(x)
        for place, row in enumerate(x):
            for i in range(half):
                angle = torch.tensor(place * config.rope_theta ** (-2 * i / width), dtype=torch.float64)
                out[place, i] = row[i] * angle.cos() - row[i + half] * angle.sin()
                out[place, i + half] = row[i + half] * angle.cos() + row[i] * angle.sin()
        return out

    x = w["model.embed_tokens.weight"][ids]
    for n in range(config.num_hidden_layers):
        at = f"model.layers.{n}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (
            h @ w[f"{at}self_attn.{p}_proj.weight"].T + w[f"{at}self_attn.{p}_proj.bias"] for p in "qkv"
        )
        heads = []
        for i in range(config.num_attention_heads):
            own, group = slice(i * width, (i + 1) * width), i // share
            other = slice(group * width, (group + 1) * width)
            scores = turn(q[:, own]) @ turn(k[:, other]).T / width**0.5
            heads.append(scores.softmax(dim=-1) @ v[:, other])
        x = x + torch.cat(heads, dim=1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = F.silu(h @ w[at + "mlp.gate_proj.weight"].T) * (h @ w[at + "mlp.up_proj.weight"].T)
        x = x + gate @ w[at + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


@torch.no_grad()
def test_logits_are_those_of_the_formulas_moved_by_one(dream: Dream):
    ours = dream.logits(IDS)
    for row, ids in zip(ours, IDS, strict=True):
        raw = by_hand(dream, ids)
        torch.testing.assert_close(row[1:], raw[:-1].float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(row[0], raw[0].float(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_padding_changes_nothing(dream: Dream):
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[:, :5] = False
    padded = torch.cat((torch.randint(2, 40, (2, 5)), IDS), dim=1)
    torch.testing.assert_close(dream.logits(padded, mask)[:, 5:], dream.logits(IDS), rtol=0, atol=1e-4)


def test_the_shift_by_hand():
    raw = torch.arange(10.0).reshape(2, 5, 1)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])  # row 1: two of padding, then three tokens
    # Row 1: padding and the first token (5, 6, 7) keep their own, then 7 and 8 move up.
    assert shifted(raw, positions, None)[..., 0].tolist() == [[0, 0, 1, 2, 3], [5, 6, 7, 7, 8]]
    before = torch.tensor([[20.0], [21.0]])
    assert shifted(raw, positions + 3, before)[..., 0].tolist() == [[20, 0, 1, 2, 3], [21, 5, 6, 7, 8]]


@torch.no_grad()
@pytest.mark.parametrize("start", [1, 4, 8])
def test_a_window_behind_the_cache_sees_the_position_before_it(dream: Dream, start: int):
    """The same ids in the window as in the opening pass: then nothing in the cache is stale."""
    cache = PrefixCache(start)
    whole = dream(IDS, cache=cache)
    positions = torch.arange(9).expand(2, 9)
    window = dream(IDS[:, start:], None, positions[:, start:], cache)
    torch.testing.assert_close(window, whole[:, start:], rtol=0, atol=1e-5)
    cache.keep(torch.tensor([1]))
    window = dream(IDS[1:, start:], None, positions[1:, start:], cache)
    torch.testing.assert_close(window, whole[1:, start:], rtol=0, atol=1e-5)


def test_ids_from_the_mask_on_are_never_emitted():
    policy = make()
    assert policy.illegal_token_ids == list(range(40, 48))
    with torch.no_grad():
        # The head's rows of illegal tokens answer loudest to whatever the body says.
        policy.head.weight[40:] = 20 * policy.head.weight[2:10]
    prompt = IDS[:, :5]
    for temperature in (0.0, 1.0):
        config = DenoiseConfig(block_length=4, temperature=temperature, block_opening="first_token")
        rollout = denoise(policy, prompt, torch.ones_like(prompt, dtype=torch.bool), 16, config)
        assert rollout.completion_ids.max() < 40
        assert rollout.token_probs is not None
        assert rollout.token_probs.min() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_saves_under_the_hubs_names_and_loads_bit_for_bit(tmp_path, tied: bool):
    policy = make(tie_word_embeddings=tied)
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path).eval()
    assert type(again) is Dream
    assert (again.head.weight is again.get_input_embeddings().weight) is tied
    for (name, ours), (other, theirs) in zip(
        policy.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    assert again.config.architectures == ["DreamModel"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act: 'gelu'; supported for Dream: \['silu'\]"),
        ({"use_sliding_window": True}, "use_sliding_window: True; supported"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1; supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: .*yarn.*supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3; .*multiple"),
        ({"num_key_value_heads": 0}, "num_kv_heads: 0; it must be a positive"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide'; it must be a positive"),
        ({"mask_token_id": None}, "mask_token_id: None; it must be a token id"),
        ({"mask_token_id": 48}, "mask_token_id: 48; it must be a token id below vocab_size 48"),
        ({"pad_token_id": -1}, "pad_token_id: -1; it must be a token id"),
    ],
)
def test_what_it_does_not_compute_is_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_the_defaults_are_the_7b():
    with torch.device("meta"):
        policy = Dream(DreamConfig())
    # 28 x (3584 x (3584 + 512 + 512 + 3584) + 4608 + 3 x 3584 x 18944 + 7168) + 2 x 152064 x 3584 + 3584
    assert sum(p.numel() for p in policy.parameters()) == 7_615_616_512
