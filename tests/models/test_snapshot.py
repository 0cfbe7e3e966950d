import torch

from drift.models import weights_digest


def test_the_digest_of_weights_is_exact(make_policy):
    assert weights_digest(make_policy(0)) == weights_digest(make_policy(0)) != weights_digest(make_policy(1))
    policy = make_policy(0)
    before = weights_digest(policy)
    with torch.no_grad():
        weight = next(policy.parameters()).view(-1)[-1:]
        weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))
    assert weights_digest(policy) != before
    half = make_policy(0).bfloat16()
    assert len({weights_digest(half), weights_digest(half.float()), before}) == 3


def test_the_digest_does_not_depend_on_its_pieces(make_policy, monkeypatch):
    whole = weights_digest(make_policy(0))
    monkeypatch.setattr("drift.models.snapshot._PIECE", 7)
    assert weights_digest(make_policy(0)) == whole
