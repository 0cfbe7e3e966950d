import torch
from safetensors.torch import load_file

ATOL = 1e-3  # float32 against float64 differs by up to 2e-4 there


@torch.no_grad()
def test_llada(golden, models_of):
    tensors = load_file(golden / "logits/llada.safetensors")
    ours = models_of("llada").current.logits(tensors["plain.input_ids"].long())
    torch.testing.assert_close(ours, tensors["plain.logits"], rtol=0, atol=ATOL)


@torch.no_grad()
def test_dream(golden, models_of):
    """Theirs are recorded before the shift: their row i - 1 is our row i, and row 0 is its own."""
    tensors = load_file(golden / "logits/dream.safetensors")
    ours, theirs = (
        models_of("dream").current.logits(tensors["plain.input_ids"].long()),
        tensors["plain.logits"],
    )
    torch.testing.assert_close(ours[:, 1:], theirs[:, :-1], rtol=0, atol=ATOL)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=0, atol=ATOL)


@torch.no_grad()
def test_dream_with_left_padding(golden, models_of):
    tensors = load_file(golden / "logits/dream.safetensors")
    ids, mask = tensors["leftpad.input_ids"].long(), tensors["leftpad.attention_mask"].bool()
    ours, theirs = models_of("dream").current.logits(ids, mask), tensors["leftpad.logits"]
    lengths = mask.sum(dim=1).tolist()
    assert lengths == [20, 13, 7]
    for row, length in enumerate(lengths):
        start = ids.shape[1] - length
        torch.testing.assert_close(ours[row, start + 1 :], theirs[row, start:-1], rtol=0, atol=ATOL)
        torch.testing.assert_close(ours[row, start], theirs[row, start], rtol=0, atol=ATOL)
