import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from drift.contract import ConfigError
from drift.models import LLaDA, load_tokenizer, require_matching_tokenizer
from drift.models.characters import character_tokenizer

# A byte-level vocabulary of 256 bytes and these merges; "Ġ" stands for a space and "Ċ" for a line break.
MERGES = ["t h", "th e", "Ġ the", "a t", "Ġ c", "Ġc at", "1 2", "Ċ Ċ", "Ã ©", "Ġ Ġ"]
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<|beginoftext|>", "<|mask|>"]
TEXTS = [
    "the cat\n\n  the  cat's hat",
    "12 + 12 = 24; 1999",
    "def f(x: int) -> int:\n    return x ** 2\t# done\r\n",
    "café, cafe\u0301, Übung, Ω\u2126, ﬁ",
    "猫は 12 匹 🐈‍⬛\u00a0\u200b",
    "<|im_start|>user\nthe<|im_end|>\n<tool_call> the <|mask|><|endoftext|>",
    " \n \t ",
    "",
]


def vocabulary() -> dict[str, int]:
    names = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    return {name: number for number, name in enumerate(names)}


def added(first: int) -> dict[str, dict]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        str(first + i): {"content": name, "special": name != "<tool_call>", **flags}
        for i, name in enumerate(ADDED)
    }


@pytest.fixture
def dream(tmp_path: Path) -> Path:
    """A folder like Dream's: vocabulary and merges, and a tokenizer class that is code."""
    folder = tmp_path / "dream"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    (folder / "tokenization_dream.py").write_text("raise SystemExit('code of a model folder was run')")
    change(
        folder,
        added_tokens_decoder=added(len(vocabulary())),
        additional_special_tokens=["<|beginoftext|>", "<|mask|>"],
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        tokenizer_class="DreamTokenizer",
        bos_token="<|beginoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    return folder


def change(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    character_tokenizer(128, 126, 127).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def refused(call: Callable[[], object], *words: object) -> None:
    """The message names the key, the value and what is wrong or to be done."""
    with pytest.raises(ConfigError) as caught:
        call()
    missing = [str(word) for word in words if str(word) not in str(caught.value)]
    assert not missing, f"{caught.value} does not say {missing}"


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_good_folder_loads(folder: Path):
    good = {"mask_token_id": 127, "pad_token_id": 126, "eos_token_id": 126, "vocab_size": 128}
    require_matching_tokenizer(good, load_tokenizer(folder))


def test_a_policy_and_its_tokenizer_match(tiny_folder: Path):
    require_matching_tokenizer(
        LLaDA.config_class.from_pretrained(tiny_folder).to_dict(), load_tokenizer(tiny_folder)
    )


def test_a_missing_folder(tmp_path: Path):
    path = tmp_path / "nowhere"
    refused(lambda: load_tokenizer(path), "data.tokenizer is", str(path), "no such folder")
    refused(lambda: load_tokenizer(path, "other.key"), "other.key is")


def test_dreams_tokenizer_has_the_ids_of_its_files(dream: Path):
    tokenizer, words = load_tokenizer(dream), vocabulary()
    special = {name: len(words) + i for i, name in enumerate(ADDED)}
    assert tokenizer.get_vocab() == words | special
    assert tokenizer.convert_ids_to_tokens([266, 271]) == [
        "<|endoftext|>",
        "<|mask|>",
    ]  # 256 bytes, 10 merges
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (266, 266)
    assert (tokenizer.bos_token_id, tokenizer.mask_token_id) == (270, 271)
    shown = tokenizer.decode([words["the"], *special.values()], skip_special_tokens=True)
    assert shown == "the<tool_call>"  # an added token, but no special one


def test_dreams_tokenizer_splits_and_merges_as_qwen2(dream: Path):
    tokenizer = load_tokenizer(dream)
    # Digits stand alone although "1 2" is a merge, "e" and a combining accent become one letter, and of
    # two spaces before a word one is the word's.
    assert tokenizer.tokenize("the  cat 12e\u0301\n\n") == ["the", "Ġ", "Ġcat", "Ġ", "1", "2", "Ã©", "ĊĊ"]
    assert tokenizer.tokenize("<|mask|>the") == ["<|mask|>", "the"]


@pytest.mark.parametrize("text", TEXTS)
def test_dreams_tokenizer_is_that_of_qwen2(dream: Path, tmp_path: Path, text: str):
    """As loaded, and as loaded from what was saved of it."""
    tokenizer = load_tokenizer(dream)
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    plain = Qwen2Tokenizer(vocab=vocabulary(), merges=merges)
    plain.add_tokens([token for _, token in sorted(tokenizer.added_tokens_decoder.items())])
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert ids(tokenizer, text) == ids(plain, text) == ids(again, text)
    assert tokenizer.decode(ids(tokenizer, text)) == again.decode(ids(again, text))


def test_what_is_saved_holds_everything_but_the_code(dream: Path, tmp_path: Path):
    change(dream, chat_template="{{ messages[0].content }}")
    tokenizer = load_tokenizer(dream)
    tokenizer.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert "auto_map" not in written
    assert written["tokenizer_class"] == "Qwen2Tokenizer"
    again = load_tokenizer(tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert {n: str(t) for n, t in again.added_tokens_decoder.items()} == {
        266 + i: t for i, t in enumerate(ADDED)
    }
    assert again.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_found_in_either_place(dream: Path, folder: Path, where: str):
    for one in (dream, folder):
        change(one, chat_template="of the config")
        if where == "chat_template.jinja":
            (one / where).write_text("of the file")
        expected = "of the file" if where == "chat_template.jinja" else "of the config"
        assert load_tokenizer(one).chat_template == expected


def test_added_tokens_of_older_folders(dream: Path):
    config = json.loads((dream / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (dream / "tokenizer_config.json").write_text(json.dumps(config))
    (dream / "added_tokens.json").write_text(json.dumps({name: 266 + i for i, name in enumerate(ADDED)}))
    assert load_tokenizer(dream).mask_token_id == 271


def test_special_tokens_whose_ids_cannot_be_kept(dream: Path):
    declared = added(266)
    cases = {
        "a gap": {"400": declared["271"]} | {k: v for k, v in declared.items() if k != "271"},
        "undeclared": {k: v for k, v in declared.items() if k != "271"},
        "an id of the vocabulary": {"3": declared["271"]} | {k: v for k, v in declared.items() if k != "271"},
    }
    for decoder in cases.values():
        change(dream, added_tokens_decoder=decoder)
        refused(
            lambda: load_tokenizer(dream),
            "data.tokenizer is",
            dream,
            "cannot be kept",
            "added_tokens_decoder",
        )


def test_a_tokenizer_that_is_only_code(dream: Path):
    change(dream, tokenizer_class="OtherTokenizer")
    refused(
        lambda: load_tokenizer(dream),
        *(
            "data.tokenizer is",
            dream,
            "only as code",
            "tokenization_dream.DreamTokenizer",
            "never runs",
            "set ",
        ),
    )
    (dream / "vocab.json").unlink()
    change(dream, auto_map=["tokenization_dream.DreamTokenizer", None])
    refused(lambda: load_tokenizer(dream), "only as code", "tokenization_dream.DreamTokenizer")


def test_a_vocabulary_of_an_unknown_kind(dream: Path):
    change(dream, auto_map=None, tokenizer_class="GPT2Tokenizer")
    refused(lambda: load_tokenizer(dream), "tokenizer_class: 'GPT2Tokenizer'", "data.tokenizer", "Qwen2")
    (dream / "tokenizer_config.json").unlink()
    refused(lambda: load_tokenizer(dream), "tokenizer_class: None")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_a_vocabulary(dream: Path, name: str):
    (dream / name).unlink()
    refused(
        lambda: load_tokenizer(dream), "no tokenizer.json, only", "tokenizer_config.json", "merges.txt of"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[]"),
        ("merges.txt", "#version: 0.2\nabc\n"),
        ("merges.txt", "#version: 0.2\nxyz zyx\n"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_vocabulary(dream: Path, name: str, text: str):
    (dream / name).write_text(text)
    refused(lambda: load_tokenizer(dream), "data.tokenizer", dream, "its tokenizer files cannot be read")


def test_no_tokenizer(folder: Path):
    (folder / "tokenizer.json").unlink()
    refused(
        lambda: load_tokenizer(folder),
        "data.tokenizer",
        str(folder),
        "no tokenizer.json",
        "config.json",
        "set ",
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("tokenizer.json", text) for text in ("{", "", "{}", '{"model": 3}', "[]")),
        *(("tokenizer_config.json", text) for text in ("{", "")),
    ],
)
def test_a_damaged_tokenizer(folder: Path, name: str, text: str):
    (folder / name).write_text(text)
    refused(
        lambda: load_tokenizer(folder), "data.tokenizer", str(folder), "its tokenizer files cannot be read"
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"mask_token_id": 200},
            ["no token for the policy's mask_token_id 200 (128 tokens)", "use the tokenizer"],
        ),
        (
            {"pad_token_id": 128},
            ["no token for the policy's pad_token_id 128 (128 tokens)", "use the tokenizer"],
        ),
        ({"mask_token_id": None}, ["config.json has mask_token_id: None", "must be a token id"]),
        ({"pad_token_id": "x"}, ["config.json has pad_token_id: 'x'", "must be a token id"]),
        ({"mask_token_id": -1}, ["mask_token_id", "-1"]),
        ({"mask_token_id": 126}, ["mask_token_id and pad_token_id both 126", "must differ"]),
        (
            {"mask_token_id": 5},
            ["mask token '<|mask|>' has id 127", "mask_token_id is 5", "use the tokenizer"],
        ),
        (
            {"pad_token_id": 5},
            ["padding token '<|endoftext|>' has id 126", "pad_token_id is 5", "use the tokenizer"],
        ),
        ({"vocab_size": 127}, ["it has 128 tokens, the policy only 127", "use the tokenizer"]),
        ({"embedding_size": 127}, ["it has 128 tokens, the policy only 127", "use the tokenizer"]),
    ],
)
def test_a_tokenizer_of_another_policy(folder: Path, config: dict, words: list[str]):
    tokenizer = load_tokenizer(folder)
    good = {"mask_token_id": 127, "pad_token_id": 126, "vocab_size": 128, "embedding_size": None}
    require_matching_tokenizer(good, tokenizer)
    key = "data.tokenizer is" if "use the tokenizer" in words else "config.json"
    refused(lambda: require_matching_tokenizer(good | config, tokenizer), key, *words)


def test_a_tokenizer_without_a_mask_token_is_judged_by_its_ids(folder: Path):
    """The hub's tokenizers don't always declare the mask token; its id must still be one of theirs."""
    declared = json.loads((folder / "tokenizer_config.json").read_text())
    del declared["mask_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(folder)
    good = {"mask_token_id": 127, "pad_token_id": 126, "vocab_size": 128}
    require_matching_tokenizer(good, tokenizer)
    refused(lambda: require_matching_tokenizer(good | {"mask_token_id": 128}, tokenizer), "mask_token_id 128")


DREAM = {"mask_token_id": 271, "pad_token_id": 266, "eos_token_id": 266, "vocab_size": 320}


def test_dreams_tokenizer_fits_a_policy_with_rows_to_spare(dream: Path):
    tokenizer = load_tokenizer(dream)
    require_matching_tokenizer(DREAM, tokenizer)
    require_matching_tokenizer(DREAM | {"eos_token_id": None}, tokenizer)
    require_matching_tokenizer(DREAM | {"eos_token_id": [266, 268]}, tokenizer)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mask_token_id": 1}, ["mask", "1", "use the tokenizer"]),
        ({"mask_token_id": 267}, ["mask", "267", "<|mask|>", "271", "use the tokenizer"]),
        ({"mask_token_id": 272}, ["no token for the policy's mask_token_id 272", "272 tokens"]),
        ({"eos_token_id": 300}, ["no token for the policy's eos_token_id 300", "use the tokenizer"]),
        ({"eos_token_id": [266, 300]}, ["no token for the policy's eos_token_id 300"]),
        ({"eos_token_id": 256}, ["the policy's eos_token_id 256 is 'th' there, an ordinary word"]),
        ({"eos_token_id": "x"}, ["config.json has eos_token_id: 'x'", "must be a token id"]),
        ({"eos_token_id": 271}, ["mask_token_id and eos_token_id both 271", "must differ"]),
        ({"pad_token_id": 271}, ["mask_token_id and pad_token_id both 271", "must differ"]),
        ({"pad_token_id": 256}, ["padding token '<|endoftext|>' has id 266", "pad_token_id is 256"]),
        ({"vocab_size": 271}, ["it has 272 tokens, the policy only 271"]),
    ],
)
def test_a_tokenizer_of_another_policy_whether_it_declares_its_mask_or_not(
    dream: Path, declared: bool, config: dict, words: list[str]
):
    if not declared:
        change(dream, mask_token=None)
    tokenizer = load_tokenizer(dream)
    assert (tokenizer.mask_token is not None) == declared
    refused(lambda: require_matching_tokenizer(DREAM | config, tokenizer), *words)


def test_a_mask_that_is_an_ordinary_word(dream: Path):
    change(dream, mask_token=None)
    tokenizer = load_tokenizer(dream)
    refused(
        lambda: require_matching_tokenizer(DREAM | {"mask_token_id": 257}, tokenizer),
        *(
            "data.tokenizer is",
            dream,
            "mask_token_id 257 is 'the' there, an ordinary word",
            "use the tokenizer",
        ),
    )


@pytest.mark.parametrize("name", ["<|mdm_mask|>", "<|mask|>", "[MASK]", "<mask>"])
def test_the_mask_token_is_known_by_its_name(name: str):
    tokenizer = character_tokenizer(128, 126, 127)
    tokenizer.add_special_tokens({"mask_token": "<|other|>", "additional_special_tokens": [name]})
    number = tokenizer.convert_tokens_to_ids(name)
    tokenizer.mask_token = None
    good = {"mask_token_id": number, "pad_token_id": 126, "vocab_size": 200}
    require_matching_tokenizer(good, tokenizer)
    other = tokenizer.convert_tokens_to_ids("<|other|>")
    refused(
        lambda: require_matching_tokenizer(good | {"mask_token_id": other}, tokenizer),
        *(f"mask_token_id {other} is '<|other|>' there", f"{name} ({number})", "use the tokenizer"),
    )
