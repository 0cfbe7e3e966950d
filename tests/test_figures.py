import pytest
import torch

from drift.contract import LossOutput, MaskedBatch, Mismatch
from drift.figures import update_figures


def output(
    loss: float, kl: float, kept: int, mismatch: Mismatch | None = None, share: float = 0.5
) -> LossOutput:
    return LossOutput(
        loss=torch.tensor(loss, requires_grad=True),
        parts={"policy": torch.tensor(loss - kl), "kl": torch.tensor(kl), "ratio": torch.tensor(1.0)},
        share=torch.tensor(share),
        num_kept=torch.tensor(kept),
        num_scored=torch.tensor(2 * kept),
        mismatch=mismatch,
    )


def mismatch(num: int, kl: float, weight: float, capped: int, ratio: float) -> Mismatch:
    return Mismatch(
        num_tokens=torch.tensor(num),
        kl=torch.tensor(kl),
        weight=torch.tensor(weight),
        num_capped=torch.tensor(capped),
        max_ratio=torch.tensor(ratio),
    )


def noisy(num: int, *, known: bool) -> MaskedBatch:
    blank = torch.zeros(num, 2)
    return MaskedBatch(
        input_ids=blank.long(),
        attention_mask=blank.bool(),
        targets=blank.long(),
        scored=blank.bool(),
        current=blank.bool(),
        weight=torch.ones(num),
        row_share=torch.ones(num),
        slot=torch.zeros(num, dtype=torch.int64),
        row=torch.arange(num),
        advantages=torch.ones(num),
        num_slots=1,
        commit_logp=blank if known else None,
    )


def figures(outputs: list[LossOutput], *, known: bool = True, weighted: bool = True) -> dict[str, float]:
    parts = ["policy", "kl", "ratio"]
    found = update_figures(outputs, noisy(5, known=known), parts, weighted=weighted)
    assert not any(value.requires_grad for value in found.values())
    return {name: value.item() for name, value in found.items()}


MISMATCH = ("mismatch/kl", "mismatch/max_ratio")
WEIGHTS = ("mismatch/weight", "mismatch/capped_share")


def test_micro_batches_are_summed_and_divided_once():
    first = output(0.5, 0.1, 3, mismatch(3, 0.6, 2.0, 1, 1.5))
    second = output(0.25, 0.05, 1, mismatch(1, 0.2, 1.2, 0, 4.0))
    # kl 0.8 / 4 tokens and not (0.2 + 0.2) / 2; weight 3.2 / 4; capped 1 / 4; the larger of 1.5 and 4.
    assert figures([first, second]) == pytest.approx(
        {
            "loss/total": 0.75,
            "loss/policy": 0.6,
            "loss/kl": 0.15,
            "loss/ratio": 2.0,
            "loss/kept_share": 0.5,
            "update/noisy_states": 5,
            "mismatch/kl": 0.2,
            "mismatch/max_ratio": 4.0,
            "mismatch/weight": 0.8,
            "mismatch/capped_share": 0.25,
        }
    )


def test_only_what_was_asked_for_and_is_known():
    measured = [output(0.5, 0.1, 3, mismatch(3, 0.6, 3.0, 0, 1.5))]
    assert not figures(measured, weighted=False).keys() & set(WEIGHTS)
    assert figures(measured, weighted=False).keys() >= set(MISMATCH)
    assert not [name for name in figures([output(0.5, 0.1, 3)], known=False) if name.startswith("mismatch")]


def test_without_micro_batches_all_figures_are_there():
    found = figures([])
    assert found.keys() == figures([output(0.5, 0.1, 3, mismatch(3, 0.6, 3.0, 0, 1.5))]).keys()
    assert found["mismatch/max_ratio"] == 1
    assert found["loss/total"] == found["mismatch/kl"] == found["mismatch/weight"] == 0
