"""An exponential moving average (EMA) of the weights: kept by the optimizer, evaluated in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from drift.distributed import on_first_rank

_AVERAGE = "average"
# In a checkpoint whose weights are averages: the names of the optimizer's parameters, in their order.
_AVERAGED = "averaged"
# The average spans at most this share of the steps so far: early weights must leave it.
_LARGEST_SHARE = 0.25


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Lets every step of an optimizer move its average of the weights towards them.

    The average goes back about 1 / (1 - decay) steps, and over no more than the last quarter of all steps. It
    is float32, shaped and sharded as the parameter is. Averages of iterates are less noisy than the last of
    them (Polyak and Juditsky, SIAM J. Control Optim. 30, 1992).

    Args:
        optimizer: of the weights; its state holds `average` from the first step on.
        decay: share of the average that a step leaves, in (0, 1).
    """

    @torch.no_grad()
    def move(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter, state in optimizer.state.items():
            if parameter.grad is None:
                continue  # this step was skipped
            weights = state.get("master", parameter.detach())
            if _AVERAGE not in state:
                state[_AVERAGE] = weights.clone()
            steps = float(state["step"])
            left = min(decay, steps / (steps + 1 / _LARGEST_SHARE))
            state[_AVERAGE].lerp_(weights, 1 - left)

    optimizer.register_step_post_hook(move)


def averages(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """The average of every parameter that has one."""
    return {parameter: state[_AVERAGE] for parameter, state in optimizer.state.items() if _AVERAGE in state}


@torch.no_grad()
def show_averages(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter the value of its average, rounded to its dtype.

    The average keeps the parameter's value meanwhile, unless there is a master weight to have it from.
    """
    for parameter, average in averages(optimizer).items():
        if "master" in optimizer.state[parameter]:
            parameter.copy_(average)
        else:
            _exchange(parameter, average)


@torch.no_grad()
def hide_averages(optimizer: torch.optim.Optimizer) -> None:
    """Gives every parameter its own value back, after `show_averages`."""
    for parameter, average in averages(optimizer).items():
        master = optimizer.state[parameter].get("master")
        if master is not None:
            parameter.copy_(master)
        else:
            _exchange(parameter, average)


def _exchange(parameter: Tensor, average: Tensor) -> None:
    # One by one: a copy exists of one parameter at a time.
    weights = parameter.detach().clone()
    parameter.copy_(average)
    average.copy_(weights)


def parameter_names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of an optimizer's parameters, in the order of its groups; one that is tied has several."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def with_averages(checkpoint: dict[str, Any], names: list[list[str]], shown: bool) -> None:
    """Puts averages in the place of a checkpoint's weights, and the weights in that of the averages.

    So what is tested or exported of a checkpoint is what was evaluated in training.

    Args:
        checkpoint: about to be written, with the state of one optimizer; empty on further ranks of a sharded
            policy.
        names: of the optimizer's parameters, in their order.
        shown: whether the parameters have the value of their averages.
    """
    checkpoint[_AVERAGED] = names
    weights = checkpoint["state_dict"]
    for states, number, known in _places(checkpoint):
        average, at_hand = states[number][_AVERAGE], weights[known[0]]
        if "master" in states[number]:
            own = states[number]["master"].to(at_hand.dtype)
        else:
            own, average = (average, at_hand) if shown else (at_hand, average)
        # A state dict holds the optimizer's own states: they must stay as they are.
        states[number] = {**states[number], _AVERAGE: own}
        weights.update(dict.fromkeys(known, average))


def put_in(checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer, names: list[list[str]]) -> None:
    """Puts averages in the place of the weights of a checkpoint that holds nothing of the optimizer.

    All ranks take part where the policy is sharded.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = averages(optimizer)
    known = [(name, found[p]) for p, of in zip(parameters, names, strict=True) if p in found for name in of]
    checkpoint["state_dict"].update(on_first_rank(dict(known)))


def without_averages(checkpoint: dict[str, Any], keep: bool) -> None:
    """Gives a checkpoint that training goes on from its own weights back, where averages are in their place.

    Args:
        checkpoint: what was read.
        keep: whether the optimizer is to go on with the averages.
    """
    for states, number, known in _places(checkpoint):
        state, weights = states[number], checkpoint["state_dict"]
        state[_AVERAGE], own = weights[known[0]], state[_AVERAGE]
        weights.update(dict.fromkeys(known, own))
        if not keep:
            del state[_AVERAGE]


def _places(checkpoint: dict[str, Any]) -> Iterator[tuple[dict[int, dict[str, Any]], int, list[str]]]:
    """Where a checkpoint has averages: states of the optimizer, number in them, names in its weights."""
    for optimizer in checkpoint["optimizer_states"]:
        numbers = [number for group in optimizer.get("param_groups", ()) for number in group["params"]]
        for number, known in zip(numbers, checkpoint.get(_AVERAGED, []), strict=False):
            if _AVERAGE in optimizer["state"].get(number, {}):
                yield optimizer["state"], number, known
