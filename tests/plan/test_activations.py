"""What is counted is what a pass keeps and needs: the same pass is run, and its tensors are measured."""

from collections.abc import Callable

import pytest
import torch

from drift.contract import MaskedBatch
from drift.logprobs import token_logprobs
from drift.models import LLaDA
from drift.plan import PlanSettings, plan_memory
from drift.plan.activations import (
    Numbers,
    sampling_head,
    saved_by_block,
    saved_by_last_norm,
    saved_by_table,
)
from drift.plan.sizes import sizes_of
from drift.rollout import DenoiseConfig, denoise

NUMBERS = [
    ("float32", "32-true"),
    ("float32", "bf16-mixed"),
    ("bfloat16", "32-true"),
    ("bfloat16", "bf16-mixed"),
]
WIDE = {"d_model": 64, "mlp_hidden_size": 192, "n_layers": 3, "max_sequence_length": 4096}


@pytest.fixture
def make(make_policy) -> Callable[..., LLaDA]:
    """Makes policies in a dtype, ready to be trained."""

    def policy(dtype: str, **changes: object) -> LLaDA:
        found = make_policy(**WIDE | changes).train()
        torch.nn.Module.to(found, getattr(torch, dtype))
        return found

    return policy


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def saved_bytes(policy: LLaDA, precision: str, ids: torch.Tensor, *, padded: bool = False) -> int:
    """Bytes of the storages that autograd keeps of a pass, the policy's own and the masks left out."""
    mask = None
    if padded:
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, :5] = False
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(precision):
        policy(ids, mask)
    return sum(size for size, tensor in kept.values() if tensor.dtype != torch.bool)


@pytest.mark.parametrize(("dtype", "precision"), NUMBERS)
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "mlp_hidden_size": 88}])
@pytest.mark.parametrize("padded", [False, True])
def test_what_a_block_keeps_is_counted_to_the_byte(
    make, dtype: str, precision: str, changes: dict, padded: bool
):
    ids = torch.randint(2, 48, (2, 64))
    three, two = (make(dtype, n_layers=n, **changes) for n in (3, 2))
    settings = PlanSettings(policy=sizes_of(three, ""), dtype=dtype, precision=precision)
    numbers = Numbers.of_policy(settings)
    lower = saved_bytes(two, precision, ids, padded=padded)
    block = saved_bytes(three, precision, ids, padded=padded) - lower
    copies = 2 * settings.policy.num_linear // 3 if numbers.cast else 0
    assert block == ids.numel() * saved_by_block(settings.policy, numbers, padded=padded) + copies
    rest = lower - 2 * block
    # Beside what is saved, the result itself is there.
    result = numbers.residual * settings.policy.width
    around = saved_by_table(settings.policy) + saved_by_last_norm(settings.policy, numbers)
    assert rest == ids.numel() * (around - result)


def test_what_a_block_keeps_worked_by_hand(make):
    sizes = sizes_of(make("float32"), "")
    full = Numbers.of_policy(PlanSettings(policy=sizes))
    # float32, D = K = 64, M = 192, 4 heads. Two norms: input, 1/rms. Then the two results of norms that the
    # linear layers share, q, k, v, mixture, 4 normalisers, mask, and gate, up, product.
    assert saved_by_block(sizes, full) == 4 * (2 * (64 + 1) + 2 * 64 + 4 * 64 + 4 + 1 + 3 * 192)
    mixed = Numbers.of_policy(PlanSettings(policy=sizes, precision="bf16-mixed"))
    # The norms stay float32; each of five layers casts its own input.
    assert saved_by_block(sizes, mixed) == 8 * (64 + 1) + 2 * (5 * 64 + 4 * 64 + 1 + 3 * 192) + 16


def noisy(states: int, prompt: int, completion: int) -> MaskedBatch:
    ids = torch.randint(2, 48, (states, prompt + completion))
    attention = torch.ones_like(ids, dtype=torch.bool)
    attention[0, :3] = False
    scored = attention[:, prompt:].clone()
    ones, rows = torch.ones(states), torch.arange(states)
    return MaskedBatch(
        input_ids=ids,
        attention_mask=attention,
        targets=ids[:, prompt:].clone(),
        scored=scored,
        current=scored,
        weight=ones,
        row_share=ones,
        slot=torch.zeros_like(rows),
        row=rows,
        advantages=ones,
        num_slots=1,
    )


def recompute_blocks(policy: LLaDA) -> None:
    for block in policy.blocks:
        forward = block.forward
        block.forward = lambda *inputs, forward=forward: torch.utils.checkpoint.checkpoint(
            forward, *inputs, use_reentrant=False
        )


@pytest.mark.parametrize(("dtype", "precision"), NUMBERS)
@pytest.mark.parametrize(
    ("changes", "beta", "recomputed"),
    [({}, 0.0, False), ({}, 0.1, False), ({}, 0.1, True), ({"vocab_size": 4096}, 0.1, False)],
)
def test_an_update_needs_what_is_planned(make, meter, dtype, precision, changes, beta, recomputed):
    """Planned is never less, and at most a tenth more."""
    policy, reference = make(dtype, **changes), make(dtype, **changes).requires_grad_(False)
    settings = PlanSettings(
        policy=sizes_of(policy, ""),
        beta=beta,
        dtype=dtype,
        precision=precision,
        activation_checkpointing=recomputed,
        micro_batch_size=4,
        max_prompt_length=128,
        completion_length=64,
    )
    if recomputed:
        recompute_blocks(policy)
    # As in every micro-batch but the first, gradients are there.
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in policy.parameters()]
    with meter([*policy.parameters(), *gradients, *reference.parameters()]) as found:
        batch = noisy(4, 128, 64)
        with autocast(precision):
            scores = token_logprobs(policy, batch)
        if beta:
            with torch.no_grad(), autocast(precision):
                token_logprobs(reference, batch)
        scores.logp.sum().backward()
    plan = plan_memory(settings)
    planned = plan.cast_update + plan.activations + plan.head_update + plan.working_update
    assert 0.99 < planned / found.peak < 1.1


@pytest.mark.parametrize(("dtype", "precision"), NUMBERS)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("tile", [2**17, 2**26])
def test_a_large_vocabulary_needs_what_is_planned(make, meter, monkeypatch, dtype, precision, entropy, tile):
    """In one tile, and in several: none of them is there any more when the next one is."""
    monkeypatch.setattr("drift.token_scores._TILE_ON_CPU", tile)
    monkeypatch.setattr("drift.token_scores._TILE_ELSEWHERE", tile)
    policy = make(dtype, n_layers=1, vocab_size=8192)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with meter([*policy.parameters(), *(p.grad for p in policy.parameters())]) as found:
        with autocast(precision):
            scores = token_logprobs(policy, noisy(4, 16, 32), entropy=entropy)
        (scores.logp.sum() + (scores.entropy.sum() if entropy else 0)).backward()
    settings = PlanSettings(
        policy=sizes_of(policy, ""),
        dtype=dtype,
        precision=precision,
        entropy_coeff=0.1 * entropy,
        micro_batch_size=4,
        max_prompt_length=16,
        completion_length=32,
    )
    plan = plan_memory(settings)
    planned = plan.cast_update + plan.activations + plan.head_update + plan.working_update
    assert 0.97 < planned / found.peak < 1.1


@pytest.mark.parametrize(("dtype", "precision"), NUMBERS)
@pytest.mark.parametrize("recomputed", [False, True])
def test_an_update_of_adapters_needs_what_is_planned(make, meter, dtype, precision, recomputed):
    peft = pytest.importorskip("peft")
    policy = make(dtype)
    sizes = sizes_of(policy, "")
    targets = "|".join(sorted({name for name, _, _ in sizes.linears}))
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=rf".*blocks.*\.({targets})"), policy)
    if recomputed:
        recompute_blocks(policy)
    trained = [p for p in policy.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.grad = torch.zeros_like(parameter)
    with meter([*policy.parameters(), *(p.grad for p in trained)]) as found:
        with autocast(precision):
            scores = token_logprobs(policy, noisy(4, 128, 64))
        scores.logp.sum().backward()
    settings = PlanSettings(
        policy=sizes,
        dtype=dtype,
        precision=precision,
        activation_checkpointing=recomputed,
        lora_rank=4,
        micro_batch_size=4,
        max_prompt_length=128,
        completion_length=64,
    )
    plan = plan_memory(settings)
    planned = plan.cast_update + plan.activations + plan.head_update + plan.working_update
    assert plan.gradients == sum(p.numel() * 4 for p in trained)
    assert plan.parameters == sum(p.numel() * p.element_size() for p in policy.parameters())
    assert 0.95 < planned / found.peak < 1.1


@pytest.mark.parametrize(("dtype", "precision"), NUMBERS)
@pytest.mark.parametrize(
    ("changes", "decode"),
    [
        ({}, {"temperature": 1.0, "use_cache": True}),
        ({}, {"temperature": 0.0}),
        ({"vocab_size": 2048}, {"temperature": 1.0, "use_cache": True}),
        ({"vocab_size": 2048}, {"temperature": 1.0, "top_k": 5}),
        ({"vocab_size": 2048}, {"temperature": 1.0, "top_p": 0.9}),
        ({"vocab_size": 2048}, {"temperature": 0.5}),
        ({"vocab_size": 2048}, {"temperature": 0.0, "score": "neg_entropy"}),
    ],
)
def test_a_rollout_needs_what_is_planned(make, make_prompts, meter, dtype, precision, changes, decode):
    policy = make(dtype, **changes)
    config = DenoiseConfig(block_length=16, threshold=None, steps=4, stop_at_padding=False, **decode)
    ids, mask = make_prompts(60, 64, 64, 64)
    with meter([*policy.parameters(), ids, mask]) as found, torch.no_grad(), autocast(precision):
        denoise(policy, ids, mask, 32, config)
    settings = PlanSettings(
        policy=sizes_of(policy, ""),
        dtype=dtype,
        precision=precision,
        max_prompt_length=64,
        completion_length=32,
        prompts_per_step=2,
        group_size=2,
        evaluation_batch_size=1,
        decode=config,
        evaluation=config,
    )
    plan = plan_memory(settings)
    planned = plan.cast_rollout + plan.cache + plan.head_rollout + plan.working_rollout
    assert 0.96 < planned / found.peak < 1.1


def test_the_heads_chunk_by_what_sampling_makes_of_it(make):
    sizes = sizes_of(make("float32"), "")

    def copies(chunk: int = 4096, rows: int = 2, **config) -> float:
        # Two rows with a block of 16: 32 positions.
        decode = DenoiseConfig(block_length=16, **config)
        return sampling_head(sizes, decode, rows, chunk) / (32 * 48 * 4)

    assert copies() == 1.5
    assert copies(temperature=1.0) == 1.5
    assert copies(temperature=0.5) == 4.25
    assert copies(temperature=1.0, top_k=4) == 3
    assert copies(temperature=1.0, top_p=0.9) == 8
    assert copies(score="neg_entropy", threshold=-0.1) == 2
    # A chunk bounds it.
    assert copies(chunk=16) == 0.75
    assert copies(rows=4) == 3
