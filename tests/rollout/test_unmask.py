import pytest
import torch
from torch import Tensor

from drift.models.base import ILLEGAL_LOGIT
from drift.rollout import DenoiseConfig
from drift.rollout.config import DRAWN_FACTOR
from drift.rollout.unmask import candidates, commits, sample

PROBS = [0.05, 0.4, 0.02, 0.3, 0.08, 0.15]


def filtered(temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """The distribution that tokens must follow, token by token."""
    mass = {token: p ** (1 / temperature) for token, p in enumerate(PROBS)}
    order = sorted(mass, key=mass.__getitem__, reverse=True)[:top_k]
    total = sum(mass[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        if top_p is not None and reached >= top_p:
            break
        kept.append(token)
        reached += mass[token] / total
    total = sum(mass[token] for token in kept)
    return [mass[token] / total if token in kept else 0.0 for token in range(len(PROBS))]


CASES = [
    (1.0, None, None),
    (0.5, None, None),
    (2.0, None, None),
    (1.0, 3, None),
    (1.0, 1, None),
    (1.0, 99, None),
    (1.0, None, 0.6),  # 0.4, then 0.3 crosses
    (1.0, None, 0.01),
    (1.0, None, 1.0),
    (0.7, 4, 0.8),
    (1.5, 5, 0.9),
]


def draw(uniforms: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    config = DenoiseConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = torch.tensor(PROBS).log().expand(len(uniforms), -1)
    return sample(logits, uniforms, config)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_tokens_follow_the_filtered_distribution(temperature: float, top_k: int | None, top_p: float | None):
    expected = torch.tensor(filtered(temperature, top_k, top_p), dtype=torch.float64)
    # Evenly spaced uniforms: inversion gives every token its share to within one or two of them.
    num = 20_000
    even = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    found = draw(even, temperature, top_k, top_p).bincount(minlength=6) / num
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3 / num)
    # Chi-square with random ones: 5 degrees of freedom at most, 0.999 quantile 20.5.
    random = torch.rand(num, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = draw(random, temperature, top_k, top_p).bincount(minlength=6).double()
    assert (counts[expected == 0] == 0).all()
    likely = expected > 0
    assert ((counts - num * expected).square()[likely] / (num * expected[likely])).sum() < 20.5


def test_top_p_takes_the_smallest_set_that_reaches_it():
    # 0.4 + 0.3 = 0.7 >= 0.69: two tokens; 0.71 needs the third (0.15).
    even = (torch.arange(100, dtype=torch.float64) + 0.5) / 100
    assert set(draw(even, 1.0, None, 0.69).tolist()) == {1, 3}
    assert set(draw(even, 1.0, None, 0.71).tolist()) == {1, 3, 5}


@pytest.mark.parametrize("uniform", [0.0, 2.0**-54, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53, 1.0])
@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"top_p": 0.999}, {"top_k": 7, "top_p": 1.0}])
@pytest.mark.parametrize("illegal", [[0], [7], [0, 1, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float, settings: dict, illegal: list[int]):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 8, generator=generator)
    logits[:, illegal] = ILLEGAL_LOGIT
    config = DenoiseConfig(temperature=0.9, **settings)
    drawn = sample(logits, torch.full((64,), uniform, dtype=torch.float64), config)
    assert not torch.isin(drawn, torch.tensor(illegal)).any()


def test_a_wide_vocabulary_keeps_its_tail():
    """100 000 equal tokens in float32: every tenth of the vocabulary gets a tenth of the draws."""
    even = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    drawn = sample(torch.zeros(1, 100_000).expand(200, -1), even, DenoiseConfig(temperature=1.0))
    assert (drawn // 10_000).bincount(minlength=10).tolist() == [20] * 10


# Three tokens of 0.5, 0.3 and 0.2.
LOGITS = torch.tensor([[0.5, 0.3, 0.2]]).log() + 4.0


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("confidence", 0.5),
        ("margin", 0.2),  # 0.5 - 0.3
        # 0.5 ln 0.5 + 0.3 ln 0.3 + 0.2 ln 0.2 = -0.3466 - 0.3612 - 0.3219
        ("neg_entropy", -1.0297),
        ("random", 0.125),
    ],
)
def test_scores_at_temperature_zero(score: str, expected: float):
    found = candidates(
        LOGITS, DenoiseConfig(score=score, threshold=None, steps=1), torch.tensor([[0.9, 0.125]])
    )
    assert found.token.tolist() == [0]
    assert found.prob.item() == pytest.approx(0.5, abs=1e-6)
    assert found.score.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("settings", [{"temperature": 3.0}, {"temperature": 1.0, "top_k": 2}])
def test_probability_and_scores_are_untempered_and_unfiltered(settings: dict):
    # A uniform of 0.9 draws the last token that the filters leave: 0.2, or 0.3 of the best two.
    uniforms = torch.tensor([[0.9, 0.5]], dtype=torch.float64)
    token, prob = (1, 0.3) if "top_k" in settings else (2, 0.2)
    found = candidates(LOGITS, DenoiseConfig(**settings), uniforms)
    assert found.token.tolist() == [token]
    assert found.prob.item() == pytest.approx(prob, abs=1e-6)
    assert found.score.item() == pytest.approx(prob, abs=1e-6)
    margin = candidates(LOGITS, DenoiseConfig(**settings, score="margin"), uniforms)
    assert margin.score.item() == pytest.approx(0.2, abs=1e-6)


def test_illegal_tokens_leave_the_scores_finite():
    logits = torch.cat((LOGITS, torch.full((1, 2), ILLEGAL_LOGIT)), dim=1)
    config = DenoiseConfig(score="neg_entropy", threshold=-1.0)
    assert candidates(logits, config, torch.full((1, 2), 0.5)).score.item() == pytest.approx(
        -1.0297, abs=1e-4
    )


def grid(*rows: str) -> Tensor:
    return torch.tensor([[cell == "x" for cell in row] for row in rows])


SCORES = torch.tensor([[0.9, 0.2, 0.95, 0.5], [0.3, 0.4, 0.99, 0.4]])


@pytest.mark.parametrize(
    ("masked", "threshold", "quota", "expected"),
    [
        (["xxxx", "xxxx"], 0.5, 0, ["x-xx", "--x-"]),
        (["xxxx", "xx-x"], 0.9, 0, ["x-x-", "-x--"]),  # row 2: its best masked one, the first of two equals
        (["-x-x", "x---"], 0.6, 0, ["---x", "x---"]),
        (["xxxx", "xx-x"], None, 2, ["x-x-", "-x-x"]),
        (["xxxx", "xx-x"], None, 1, ["--x-", "-x--"]),
        (["-x--", "xx-x"], None, 3, ["-x--", "xx-x"]),  # more than are left: all of them
    ],
)
def test_commits(masked: list[str], threshold: float | None, quota: int, expected: list[str]):
    assert torch.equal(commits(SCORES, grid(*masked), threshold, quota), grid(*expected))


def test_the_threshold_itself_is_reached():
    score = torch.tensor([[0.5, 0.5 - 2.0**-25]])  # the float32 just below one half
    assert score[0, 1] < 0.5
    assert commits(score, torch.ones(1, 2, dtype=torch.bool), 0.5, 0).tolist() == [[True, False]]


def test_draws_commit_as_often_as_the_likeliest_token_is_above_the_threshold():
    """0.4 is the highest probability: q = sigmoid((0.4 - 0.35) / 0.05) = sigmoid(1) = 0.7311."""
    config = DenoiseConfig(threshold=0.35, width=0.05, commit="stochastic", temperature=1.0)
    num = 10_000
    even = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    # The token's draw takes the least likely token, 0.02: the commit does not look at it.
    uniforms = torch.stack((torch.full_like(even, 0.46), even), dim=1)
    found = candidates(torch.tensor(PROBS).log().expand(num, -1), config, uniforms)
    assert set(found.token.tolist()) == {2}
    assert found.prob[0].item() == pytest.approx(0.02)
    assert (found.score > 1).float().mean().item() == pytest.approx(0.7311, abs=2 / num)
    assert found.score[found.score <= 1].unique().tolist() == pytest.approx([0.4])
    # Those that draws commit compare as exactly as the others.
    drawn = found.score[found.score > 1]
    assert (drawn / DRAWN_FACTOR).unique().tolist() == found.score[found.score <= 1].unique().tolist()
    assert config.least_score is not None
    assert 1 < config.least_score < DRAWN_FACTOR / 2**18


def test_the_top_probability_scores_a_position_whatever_its_candidate_is():
    logits, uniforms = torch.tensor([PROBS]).log(), torch.tensor([[0.46, 0.5]], dtype=torch.float64)
    by_top = candidates(logits, DenoiseConfig(temperature=1.0, commit_by="top"), uniforms)
    by_candidate = candidates(logits, DenoiseConfig(temperature=1.0), uniforms)
    assert by_top.score.tolist() == pytest.approx([0.4])
    assert by_candidate.score.tolist() == pytest.approx([0.02])
    assert by_top.prob.tolist() == by_candidate.prob.tolist() == pytest.approx([0.02])
