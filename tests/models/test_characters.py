import pytest

from drift.contract import ConfigError
from drift.models.characters import character_tokenizer


@pytest.mark.parametrize(("size", "pad", "mask"), [(None, 0, 1), (98, 0, 1), (128, 126, 127), (None, 5, 99)])
def test_every_character_is_one_token_and_comes_back(size: int | None, pad: int, mask: int):
    tokenizer = character_tokenizer(size, pad, mask)
    text = "1 + 2 = 3;\n{'a': \"Z\"} ~"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (pad, pad, mask)
    assert tokenizer.decode([pad, *ids, mask], skip_special_tokens=True) == text
    assert size is None or len(tokenizer) == size


@pytest.mark.parametrize(("size", "pad", "mask"), [(50, 0, 1), (97, 0, 1), (128, 3, 3), (128, 0, 128)])
def test_ids_that_do_not_fit_are_refused(size: int, pad: int, mask: int):
    with pytest.raises(ConfigError, match=f"size is {size}, pad_token_id {pad}, mask_token_id {mask}"):
        character_tokenizer(size, pad, mask)
