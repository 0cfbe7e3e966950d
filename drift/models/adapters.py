"""Low-rank adapters: what is trained in place of the weights, and how it is switched off and merged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drift.contract import ConfigError, require
from drift.distributed import is_sharded, on_first_rank

if TYPE_CHECKING:
    from drift.models.base import DiffusionLM


# Elements of each tensor that a fingerprint looks at.
_SAMPLES = 1024


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (Hu et al., arXiv 2106.09685): W + alpha / rank * B A; only A and B are trained.

    The adapters are float32 whatever the policy's dtype, so that small updates are not lost.

    Args:
        rank: rows of A and columns of B, >= 1.
        alpha: strength, > 0; the adapters count alpha / rank.
        targets: names of linear layers inside the transformer blocks, such as `q_proj`; None: all of them.

    Raises:
        ConfigError: where a value is outside its range.
    """

    rank: int = 16
    alpha: float = 32
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        require(self, self.rank >= 1, "rank", "set it to 1 or more")
        require(self, 0 < self.alpha < math.inf, "alpha", "set it to a positive number")
        require(self, self.targets is None or len(self.targets) > 0, "targets", "name one, or null for all")


def require_adapters(policy: DiffusionLM, config: LoRAConfig) -> list[str]:
    """The names of the linear layers in the blocks that adapters go to, sorted.

    Args:
        policy: of the family and size to be trained; no weights are needed.
        config: settings of the adapters.

    Raises:
        ConfigError: where the package that makes adapters is missing, or a target is no linear layer.
    """
    _peft()
    linear = {name.rpartition(".")[2] for name in _linear_layers(policy)}
    unknown = sorted(set(config.targets or ()) - linear)
    if unknown:
        raise ConfigError(
            f"model.lora.targets is {config.targets}: the policy's blocks have no linear layer "
            f"{unknown[0]!r}; choose among {sorted(linear)}"
        )
    return sorted(config.targets or linear)


def add_adapters(policy: DiffusionLM, config: LoRAConfig, seed: int) -> None:
    """Freezes a policy and gives it adapters, in place; it computes what it did before.

    Args:
        policy: the policy.
        config: settings of the adapters.
        seed: of A; B starts at 0.
    """
    peft, targets = _peft(), set(require_adapters(policy, config))
    prefix = next(name for name, module in policy.named_modules() if module is policy.blocks)
    names = [name for name in _linear_layers(policy) if name.rpartition(".")[2] in targets]
    # Exact names: the head, too, may be called as a layer of the blocks is.
    pattern = "|".join(f"{prefix}.{name}".replace(".", r"\.") for name in names)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - it divides, so any number serves
        target_modules=pattern,
    )
    # Its own draws would depend on everything drawn before, and move what is drawn next.
    with torch.random.fork_rng():
        peft.inject_adapter_in_model(settings, policy)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in _adapted_layers(policy):
        down, up = (part["default"].to(torch.float32) for part in (layer.lora_A, layer.lora_B))
        # The uniform start of a linear layer.
        bound = 1 / math.sqrt(down.in_features)
        start = torch.empty(down.weight.shape, dtype=torch.float32).uniform_(
            -bound, bound, generator=generator
        )
        with torch.no_grad():
            down.weight.copy_(start)
            up.weight.zero_()


@contextmanager
def adapters_off(policy: DiffusionLM) -> Iterator[DiffusionLM]:
    """A context in which the policy computes without its adapters: what it was before any training."""
    layers = [layer for _, layer in _adapted_layers(policy)]
    trained = [p for p in policy.parameters() if p.requires_grad]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        # Switching off also freezes, which what gathers or reduces gradients must not see.
        for parameter in trained:
            parameter.requires_grad_(True)
        yield policy
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def reference_of(policy: DiffusionLM, copy: DiffusionLM | None) -> Iterator[DiffusionLM]:
    """A context that gives the frozen reference.

    Args:
        policy: the policy in training.
        copy: a second policy; None: the policy itself without its adapters.
    """
    if copy is not None:
        yield copy
        return
    with adapters_off(policy) as reference:
        yield reference


@torch.no_grad()
def merged_state_dict(policy: DiffusionLM) -> dict[str, Tensor]:
    """The policy's weights under the hub's names, adapters merged in; the policy itself stays as it is.

    What has no adapter is the policy's own storage, as in `state_dict`. Of a sharded policy all ranks must
    ask for them; rank 0 gets them, on the CPU, and the others nothing.
    """
    state: dict[str, Tensor] = policy.state_dict()
    layers = dict(_adapted_layers(policy))
    merged = {}
    for name, value in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        place = name.replace(".base_layer.", ".")
        layer = layers.get(place.rpartition(".")[0])
        if layer is not None and place.endswith(".weight"):
            # One rounding, of the sum.
            value = (value.float() + layer.get_delta_weight("default").float()).to(value.dtype)
        # One by one, so that what has been gathered is not on the device all at once.
        merged |= on_first_rank({place: value}) if is_sharded(policy) else {place: value}
    return merged


def fingerprint(policy: DiffusionLM) -> str:
    """A name for the policy's weights, the same in whatever dtype: adapters fit one set of weights only."""
    digest = hashlib.sha256()
    for parameter in policy.parameters():
        flat = parameter.detach().flatten()
        # Rounded alike: bfloat16 weights are found again in float32 and the reverse.
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.bfloat16)
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _linear_layers(policy: DiffusionLM) -> list[str]:
    return [name for name, module in policy.blocks.named_modules() if isinstance(module, nn.Linear)]


def _adapted_layers(policy: DiffusionLM) -> list[tuple[str, Any]]:
    if not hasattr(policy, "peft_config"):
        return []
    layer = _peft().tuners.lora.LoraLayer
    return [(name, module) for name, module in policy.named_modules() if isinstance(module, layer)]


def _peft() -> Any:
    # Here, not above: it is an optional part of the installation.
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"model.lora is set: adapters need the package peft ({error}); pip install drift[lora], or set "
            "model.lora to null"
        ) from error
    return peft
