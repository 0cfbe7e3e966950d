from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from drift.models import LLaDA, LoRAConfig, add_adapters

Make = Callable[..., LLaDA]
IDS = torch.arange(2, 26).view(2, 12)


def count_blocks(policy: LLaDA) -> list[int]:
    """How often a block was computed, in the first and only element."""
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1

    for block in policy.blocks:
        block.register_forward_pre_hook(count)
    return calls


def gradients(policy: LLaDA) -> tuple[Tensor, dict[str, Tensor], int]:
    calls = count_blocks(policy)
    mask = torch.ones_like(IDS, dtype=torch.bool)
    mask[0, :3] = False
    loss = policy.logits(IDS, mask).log_softmax(dim=-1)[..., 7].mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}, calls[0]


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)], ids=["weights", "adapters"])
def test_recomputed_blocks_give_the_same_bits(make_policy: Make, lora: LoRAConfig | None):
    results = []
    for recompute in (False, True):
        policy = make_policy().train()
        if lora is not None:
            add_adapters(policy, lora, seed=0)
        policy.activation_checkpointing = recompute
        results.append(gradients(policy))
    (plain, expected, once), (loss, found, twice) = results
    assert (once, twice) == (2, 4)
    assert torch.equal(loss, plain)
    assert found.keys() == expected.keys()
    assert any(value.any() for value in found.values())
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_what_is_kept_for_backward_is_less(make_policy: Make):
    def kept(recompute: bool) -> int:
        sizes = []
        policy = make_policy().train()
        policy.activation_checkpointing = recompute
        parameters = {p.data_ptr() for p in policy.parameters()}

        def pack(value: Tensor) -> Tensor:
            if value.data_ptr() not in parameters:
                sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            policy(IDS)
        return sum(sizes)

    assert kept(True) < kept(False) / 3


def test_nothing_is_recomputed_outside_training(make_policy: Make, monkeypatch: pytest.MonkeyPatch):
    def must_not(*_: object, **__: object) -> None:
        pytest.fail("a block was to be recomputed")

    monkeypatch.setattr("drift.models.base.checkpoint", must_not)
    policy = make_policy()
    policy.activation_checkpointing = True
    policy.eval()(IDS)
    policy.train()
    with torch.no_grad():
        policy(IDS)
    policy(IDS, cache=FakeCache())
    policy.activation_checkpointing = False
    policy(IDS)


class FakeCache:
    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values
