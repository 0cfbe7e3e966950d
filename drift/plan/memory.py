"""The memory plan: bytes on each GPU in the three moments of a step, from settings alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from drift.plan.activations import (
    FULL,
    Numbers,
    block_backward,
    forward_work,
    norm_backward,
    sampling_head,
    saved_after_mixing,
    saved_before_mixing,
    saved_by_last_norm,
    saved_by_table,
    scoring_head,
    training_head,
)
from drift.plan.settings import PlanSettings
from drift.plan.sizes import PolicySizes, Shape
from drift.rollout import DenoiseConfig
from drift.rollout.denoise import CHUNK_SIZE as ROLLOUT_CHUNK_SIZE

GIB = 1024**3
# The device's context and the ranks' channels; and what the allocator cannot use because it is in pieces.
CONTEXT_BYTES = GIB
FRAGMENTED_SHARE = 0.05


def usable_bytes(gpu_memory: int) -> int:
    """Bytes of a GPU's memory that tensors can have, after the reserve.

    Args:
        gpu_memory: bytes of the GPU.
    """
    return int(gpu_memory * (1 - FRAGMENTED_SHARE)) - CONTEXT_BYTES


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes on each GPU; what is there in a moment adds up to the moment's peak."""

    settings: PlanSettings
    parameters: int  # the policy's, adapters included
    gradients: int  # of all trained parameters, kept from the first micro-batch to the step
    gradient_buckets: int  # their copies for communication, where each rank has the whole policy
    optimizer: int  # two moments, master weights and average; the step counters are on the host
    reference: int
    old_weights: int  # the weights that made the rollout, where it is trained on several times
    cast_update: int  # bfloat16 copies of weights that the graph of an update keeps
    cast_rollout: int  # the same during a rollout
    gathered_update: int  # whole blocks and head, where each rank has a part of the policy
    gathered_rollout: int  # the whole policy, or two blocks and what is outside them
    activations: int  # saved for backward, of one micro-batch
    head_update: int  # what the head needs in the backward pass: a tile of logits, and its gradient
    working_update: int  # what another moment of the update needs beyond that
    step_temporaries: int  # of the optimizer
    cache: int  # keys and values, of the longest prefix
    head_rollout: int  # the chunk of logits
    working_rollout: int  # what a rollout needs beyond the chunk of logits

    @property
    def resident(self) -> int:
        """What is there at all times."""
        return self.parameters + self.gradient_buckets + self.optimizer + self.reference + self.old_weights

    @property
    def update_peak(self) -> int:
        """Peak of forward and backward passes."""
        graph = self.cast_update + self.gathered_update + self.activations
        return self.resident + self.gradients + graph + self.head_update + self.working_update

    @property
    def step_peak(self) -> int:
        """Peak of the optimizer's step."""
        return self.resident + self.gradients + self.step_temporaries

    @property
    def rollout_peak(self) -> int:
        """Peak of a rollout; there are no gradients then."""
        weights = self.resident + self.cast_rollout + self.gathered_rollout
        return weights + self.cache + self.head_rollout + self.working_rollout

    @property
    def peak(self) -> int:
        """The largest of the three."""
        return max(self.update_peak, self.step_peak, self.rollout_peak)

    def fits(self, gpu_memory: int) -> bool:
        """Whether it fits, the reserve left free.

        Args:
            gpu_memory: bytes of the GPU.
        """
        return self.peak <= usable_bytes(gpu_memory)


def plan_memory(settings: PlanSettings) -> MemoryPlan:
    """The memory that a run needs on each GPU at worst: longest prompts, every row still decoding.

    The weights that score a rollout again before its further updates are no peak of their own: they are there
    when there is neither gradient nor graph.
    """
    policy, numbers = settings.policy, Numbers.of_policy(settings)
    groups = _trained(settings)
    base = [shape for group in policy.shapes for shape in group]
    trained = [shape for group in groups for shape in group]
    num_trained = _held(trained, settings)
    adapters = 0 if settings.lora_rank is None else settings.trained_bytes * num_trained
    gradients = settings.trained_bytes * num_trained
    kept = settings.kept_reference
    reference = [] if kept is None else [shape for group in kept.shapes for shape in group]
    blocks = _cast_blocks(policy, numbers)
    activations, head, working = _update(settings, numbers)
    cache, head_rollout, working_rollout = _rollout(settings, numbers)
    return MemoryPlan(
        settings=settings,
        parameters=settings.weight_bytes * _held(base, settings) + adapters,
        gradients=gradients,
        gradient_buckets=gradients if settings.num_gpus > 1 and not settings.sharded else 0,
        optimizer=_state_bytes(settings) * num_trained,
        reference=settings.weight_bytes * _held(reference, settings),
        old_weights=gradients if settings.num_updates > 1 else 0,
        cast_update=0 if settings.activation_checkpointing else blocks,
        # Copies of frozen weights do not outlive the layer they are made for.
        cast_rollout=blocks + 2 * policy.num_head * numbers.cast if numbers.adapter is None else 0,
        gathered_update=_gathered(settings),
        gathered_rollout=_gathered_rollout(settings),
        activations=activations,
        head_update=head,
        working_update=working,
        step_temporaries=_step_temporaries(settings, groups),
        cache=cache,
        head_rollout=head_rollout,
        working_rollout=working_rollout,
    )


def _trained(settings: PlanSettings) -> tuple[tuple[Shape, ...], ...]:
    """Shapes of what is trained, by parameter group of the optimizer."""
    if settings.lora_rank is None:
        return settings.policy.shapes
    return (settings.policy.adapters(settings.lora_rank, settings.lora_targets),)


def _held(shapes: list[Shape] | tuple[Shape, ...], settings: PlanSettings) -> int:
    """Numbers that the fullest rank holds: all, or its rows of every tensor."""
    ranks = settings.num_gpus if settings.sharded else 1
    return sum(-(-shape[0] // ranks) * prod(shape[1:]) for shape in shapes)


def _state_bytes(settings: PlanSettings) -> int:
    """Bytes of optimizer state for each trained parameter: two moments, the master weight, the average."""
    moments = 3 * FULL if settings.master_weights else 2 * settings.trained_bytes
    return moments + FULL * settings.average


def _step_temporaries(settings: PlanSettings, groups: tuple[tuple[Shape, ...], ...]) -> int:
    if settings.master_weights:
        # One parameter at a time: its gradient in float32, and the denominator, made in two steps.
        return 3 * FULL * max(_held([shape], settings) for group in groups for shape in group)
    # All denominators of a group at once.
    return settings.trained_bytes * max(_held(group, settings) for group in groups)


def _cast_blocks(sizes: PolicySizes, numbers: Numbers) -> int:
    return 2 * sizes.num_linear if numbers.cast else 0


def _gathered(settings: PlanSettings) -> int:
    """What is outside the blocks; weights of two blocks, one fetched ahead; the gradient of one."""
    if not settings.sharded:
        return 0
    policy, kept, size = settings.policy, settings.kept_reference, settings.gathered_bytes
    total = size * (_outside(policy) + 3 * policy.num_block_parameters)
    if size < FULL:
        # Gradients are reduced in float32.
        total += FULL * policy.num_block_parameters
    if kept is not None:
        total += min(settings.weight_bytes, settings.compute_bytes) * _outside(kept)
    return total


def _gathered_rollout(settings: PlanSettings) -> int:
    if not settings.sharded:
        return 0
    policy = settings.policy
    passing = _outside(policy) + 2 * policy.num_block_parameters
    return settings.gathered_bytes * (policy.num_parameters if settings.gather_for_rollout else passing)


def _outside(sizes: PolicySizes) -> int:
    """Parameters of embedding, head and last norm."""
    return sizes.num_parameters - sizes.num_blocks * sizes.num_block_parameters


def _update(settings: PlanSettings, numbers: Numbers) -> tuple[int, int, int]:
    """Saved activations; what the head needs; what another moment needs beyond it."""
    policy = settings.policy
    positions = settings.num_states * settings.length
    scored = settings.num_states * min(settings.completion_length, settings.length)
    rank = settings.lora_rank or 0
    before = positions * saved_before_mixing(policy, numbers, rank, padded=True)
    block = before + positions * saved_after_mixing(policy, numbers, rank)
    # In the last block only scored positions are looked at after attention; their mixture is a copy.
    last = before + scored * (saved_after_mixing(policy, numbers, rank) + numbers.compute * policy.width + 8)
    norm = scored * saved_by_last_norm(policy, numbers)
    scored_states = 2 * scored * numbers.residual * policy.width  # and their gradients
    around = positions * saved_by_table(policy) + norm + scored_states
    # The noisy states, and the copy that is fed: ids, targets and masks.
    around += 2 * (positions * (8 + 1) + scored * (8 + 2))
    entropy = settings.entropy_coeff != 0
    head = training_head(policy, numbers, scored, entropy=entropy)
    gradient = numbers.compute + (FULL if numbers.cast else 0)
    weight = gradient * policy.width * policy.mlp_width if numbers.adapter is None else 0
    work = block_backward(policy, numbers)
    states = positions * numbers.residual * policy.width
    saved = (policy.num_blocks - 1) * block + last + around
    # Backward in the last block, and in the one before it, when what came after that is gone.
    in_last, in_other = scored * work + weight, positions * work + weight - last
    moments = [scored * norm_backward(policy)]
    if settings.activation_checkpointing:
        saved = policy.num_blocks * states + around
        copies = _cast_blocks(policy, numbers)
        again = copies // policy.num_blocks
        # By then what the last norm kept is gone, and a gradient has come in.
        in_last = scored * work + weight + last + again - (norm - scored * numbers.residual * policy.width)
        in_other = positions * work + weight + block + again - norm - scored_states
        if numbers.adapter is None:
            # The copies of all weights are there until the forward pass ends.
            moments.append(copies + scoring_head(policy, numbers, scored, entropy=entropy))
    moments += [in_last, in_other]
    if settings.beta > 0:
        moments.append(_reference_pass(settings, numbers, positions, scored))
    return saved, head, max(0, max(moments) - head)


def _reference_pass(settings: PlanSettings, numbers: Numbers, positions: int, scored: int) -> int:
    """What the frozen reference needs to score the micro-batch, beside its weights."""
    sizes = settings.kept_reference or settings.reference or settings.policy
    if settings.kept_reference is not None:
        numbers = Numbers.of_reference(settings)
    layer = 2 * sizes.width * sizes.mlp_width if numbers.cast else 0
    body = positions * forward_work(sizes, numbers) + layer
    states = positions * numbers.residual * sizes.width
    # Entropies of the policy are compared with the reference's.
    entropy = settings.entropy_coeff != 0
    return max(body, states + scoring_head(sizes, numbers, scored, entropy=entropy))


def _rollout(settings: PlanSettings, numbers: Numbers) -> tuple[int, int, int]:
    """Cache, head's chunk and what is needed beyond it, of training or evaluation, whichever needs more."""
    # Further rounds of a step (rollout.refill_rounds) are no larger than the first.
    rows = settings.prompts_per_step // settings.num_gpus * settings.group_size
    length = settings.evaluation_length or settings.completion_length
    return max(
        _decoding(settings, numbers, settings.decode, rows, settings.completion_length),
        _decoding(settings, numbers, settings.evaluation, settings.evaluation_batch_size, length),
        key=sum,
    )


def _decoding(
    settings: PlanSettings, numbers: Numbers, config: DenoiseConfig, rows: int, length: int
) -> tuple[int, int, int]:
    policy = settings.policy
    rows = min(rows, settings.rollout_batch_size or rows)
    total = min(settings.max_prompt_length + length, policy.max_length)
    # Prefix and window are longest in the last block.
    prefix = total if config.use_cache else 0
    cache = 2 * policy.num_blocks * policy.kv_width * prefix * rows * numbers.compute
    # The copy of a frozen weight is there while its layer computes; those of trained ones are counted apart.
    copied = numbers.cast and numbers.adapter is not None
    head = sampling_head(policy, config, rows, ROLLOUT_CHUNK_SIZE) + 2 * policy.num_head * copied
    layer = 2 * policy.width * policy.mlp_width * copied
    body = rows * total * forward_work(policy, numbers) + layer
    states = rows * total * numbers.residual * policy.width
    # Without a cache the states of one pass are there until the next one ends.
    body += 0 if config.use_cache else states
    return cache, head, max(states, body - head)
