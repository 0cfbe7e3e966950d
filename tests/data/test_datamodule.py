import json
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch

import drift.module
import drift.policy_module
from drift.callbacks import RolloutCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule, Source, benchmarks
from drift.data import datamodule as module_under_test
from drift.models.characters import MASK, character_tokenizer
from drift.module import RLDFModule
from drift.rewards import CodeReward
from drift.rollout import DenoiseConfig
from drift.tasks import CodeTask, MathTask, SudokuTask

DECODE = DenoiseConfig(block_length=16)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def questions(*texts: str) -> list[dict]:
    return [{"question": text, "ground_truth_answer": "1"} for text in texts]


@pytest.fixture
def write(tmp_path: Path):
    def run(rows: list[dict], **settings) -> Source:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path), **settings)

    return run


def data(folder: Path, **settings) -> PromptDataModule:
    return PromptDataModule(**{"task": MathTask(instruction=""), "tokenizer": str(folder)} | settings)


class Trainer:
    """As much of a trainer as the data module looks at."""

    def __init__(self, global_step: int = 0, max_steps: int = 100, num_updates: int = 1) -> None:
        self.global_step = global_step
        self.max_steps = max_steps
        self.val_check_interval = 1
        self.limit_train_batches = 1.0
        self.accumulate_grad_batches = 1
        self.lightning_module = type("Module", (), {"num_updates": num_updates})()
        self.log_dir = None
        self.default_root_dir = "/dev/null"  # nothing may be written


def training_prompts(prompts: PromptDataModule, num: int, **settings) -> list[list[str]]:
    prompts.trainer = Trainer(**settings)
    prompts.setup("fit")
    return [[p.prompt for p in batch.problems] for batch in islice(prompts.train_dataloader(), num)]


FIVE = questions("one", "two", "three", "four", "five")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("num_updates", [1, 3])
def test_training_goes_on_where_it_was(tiny_folder: Path, write, streaming: bool, num_updates: int):
    def prompts() -> PromptDataModule:
        return data(tiny_folder, train=write(FIVE, streaming=streaming), prompts_per_step=2)

    whole = training_prompts(prompts(), 12, num_updates=num_updates)
    for start in (1, 5, 7):
        late = training_prompts(prompts(), 12 - start, num_updates=num_updates, global_step=start)
        assert late == whole[start:]
    first_epoch = [prompt for batch in whole[::num_updates] for prompt in batch][:5]
    if num_updates == 1:
        assert sorted(first_epoch) == sorted(row["question"] for row in FIVE)


def test_shuffle_false_keeps_the_order(tiny_folder: Path, write):
    prompts = data(tiny_folder, train=write(FIVE), prompts_per_step=2, shuffle=False)
    assert training_prompts(prompts, 3) == [["one", "two"], ["three", "four"], ["five", "one"]]


def test_shuffling_depends_on_the_seed(tiny_folder: Path, write):
    orders = {
        str(training_prompts(data(tiny_folder, train=write(FIVE), prompts_per_step=5, seed=seed), 2))
        for seed in (0, 0, 50, 90)
    }
    assert len(orders) >= 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_prompts(tiny_folder: Path, write, monkeypatch, world_size: int):
    alone = training_prompts(data(tiny_folder, train=write(FIVE), prompts_per_step=4), 3)
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr("drift.distributed.world_size", lambda: world_size)
        monkeypatch.setattr("drift.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr(module_under_test, "require_agreement", lambda name, value: None)
        ranks.append(training_prompts(data(tiny_folder, train=write(FIVE), prompts_per_step=4), 3))
    assert [[prompt for rank in ranks for prompt in rank[step]] for step in range(3)] == alone


def test_prompts_that_cannot_be_shared_evenly_are_an_error(tiny_folder: Path, write, monkeypatch):
    monkeypatch.setattr("drift.distributed.world_size", lambda: 3)
    monkeypatch.setattr(module_under_test, "require_agreement", lambda name, value: None)
    with pytest.raises(ConfigError, match=r"data\.prompts_per_step is 4: .*multiple of the 3 ranks"):
        training_prompts(data(tiny_folder, train=write(FIVE), prompts_per_step=4), 1)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_evaluation_sees_every_row_once(tiny_folder: Path, write, monkeypatch, world_size: int):
    seen = []
    monkeypatch.setattr(module_under_test, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(module_under_test, "rank", lambda rank=rank: rank)
        prompts = data(tiny_folder, validation=write(FIVE), test=write(FIVE[:3]), evaluation_batch_size=2)
        for stage, loader, num in (("validate", "val", 5), ("test", "test", 3), ("predict", "predict", 3)):
            prompts.setup(stage)
            batches = list(getattr(prompts, f"{loader}_dataloader")())
            assert all(len(batch.problems) <= 2 for batch in batches)
            seen += [(stage, num, i) for batch in batches for i in batch.positions.tolist()]
    assert sorted(seen) == sorted(
        (stage, num, i) for stage, num in (("validate", 5), ("test", 3), ("predict", 3)) for i in range(num)
    )


def test_procedural_tasks_make_the_evaluation_rows(tiny_folder: Path):
    prompts = data(tiny_folder, task=SudokuTask(), num_validation=5, num_test=4, evaluation_batch_size=3)
    prompts.setup("fit")
    found = [problem.prompt for batch in prompts.val_dataloader() for problem in batch.problems]
    assert found == [row["puzzle"] for row in SudokuTask().rows("validation", 5)]
    prompts.setup("test")
    assert sum(len(batch.problems) for batch in prompts.test_dataloader()) == 4


def test_training_without_validation_rows_is_fine_and_validation_without_is_not(tiny_folder: Path, write):
    prompts = data(tiny_folder, train=write(FIVE))
    prompts.trainer = Trainer()
    prompts.setup("fit")
    assert list(prompts.val_dataloader()) == []
    for stage, split in (("validate", "validation"), ("test", "test"), ("predict", "test")):
        with pytest.raises(ConfigError, match=rf"data\.{split} is None: MathTask .*; set data\.{split}"):
            prompts.setup(stage)
    with pytest.raises(ConfigError, match=r"data\.train is None: MathTask .*; set data\.train"):
        data(tiny_folder).setup("fit")


LONG = questions("short", "much too long", "brief")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_long_prompt_stops_before_training(tiny_folder: Path, write, split: str):
    sources = {"train": write(FIVE)} | {split: write(LONG)}
    prompts = data(tiny_folder, max_prompt_length=6, **sources)
    with pytest.raises(ConfigError) as caught:
        prompts.setup("fit")
    message = str(caught.value)
    assert message.startswith(f"data.{split} ({sources[split].path}) row 1: its prompt has 13 tokens")
    assert "data.max_prompt_length is 6; raise it, or set data.long_prompts: drop" in message


@pytest.mark.parametrize("streaming", [False, True])
def test_drop_drops_long_prompts(tiny_folder: Path, write, streaming: bool, monkeypatch):
    said = []
    monkeypatch.setattr(benchmarks, "rank_zero_info", said.append)
    prompts = data(
        tiny_folder,
        train=write(LONG, streaming=streaming),
        validation=write(questions("far too long", "other")),
        max_prompt_length=6,
        long_prompts="drop",
        prompts_per_step=2,
        shuffle=False,
    )
    assert training_prompts(prompts, 2) == [["short", "brief"]] * 2
    assert [p.prompt for batch in prompts.val_dataloader() for p in batch.problems] == ["other"]
    # Another set of rows is another benchmark: it must not become one in silence.
    (message,) = said
    assert message.startswith("data.validation (")
    assert message.endswith("): 1 of 2 rows are left out: too long")


def test_dropping_everything_is_an_error(tiny_folder: Path, write):
    prompts = data(tiny_folder, train=write(LONG), max_prompt_length=2, long_prompts="drop")
    with pytest.raises(
        ConfigError, match=r"data\.train .*none of the rows.*max_prompt_length \(2\).*raise it"
    ):
        prompts.setup("fit")


def test_a_prompt_with_the_mask_token_stops_before_training(tiny_folder: Path, write):
    prompts = data(tiny_folder, train=write(questions("fine", f"not {MASK} fine")))
    with pytest.raises(ConfigError, match=r"row 1: its prompt holds the mask token '<\|mask\|>'"):
        prompts.setup("fit")


def test_the_mask_token_is_found_where_the_tokenizer_does_not_declare_it(
    tiny_folder: Path, write, make_trainer, tmp_path: Path
):
    """As in LLaDA's own tokenizer: the policy's mask id is a token like any other there."""
    tokenizer = character_tokenizer()
    tokenizer.mask_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": [MASK]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert tokenizer.mask_token_id is None
    assert tokenizer(MASK)["input_ids"] == [1]
    prompts = data(
        tmp_path / "tokenizer", train=write(questions("fine", f"not {MASK} fine")), prompts_per_step=2
    )
    rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
    with pytest.raises(ConfigError, match="row 1: its prompt holds the mask token"):
        make_trainer(callbacks=[rollout]).fit(RLDFModule(str(tiny_folder)), datamodule=prompts)


def test_an_empty_file_is_an_error(tiny_folder: Path, write):
    with pytest.raises(ConfigError, match=r"data\.train\.path=.* is empty or cannot be read"):
        data(tiny_folder, train=write([])).setup("fit")


def test_a_missing_field_is_an_error(tiny_folder: Path, write):
    prompts = data(tiny_folder, train=write([{"question": "1+1?"}]))
    with pytest.raises(ConfigError, match=r"no field 'ground_truth_answer'.*set data\.task\.answer_field"):
        prompts.setup("fit")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_tests_that_never_end_stop_before_training(tiny_folder: Path, write, bwrap: None, split: str):
    row = {
        "question": "f",
        "test_method": "function",
        "test_time_limit": 1,
        "test_list": ["assert f(1) == 1"],
    }
    good, endless = (
        write([row]),
        write([row, {**row, "test_list": [*row["test_list"], "for _ in iter(int, 1): f\nassert f"]}]),
    )
    task = CodeTask(reward=CodeReward(timeout_seconds=0.5))
    sources = {"train": good, "validation": good, split: endless}
    message = rf"data\.{split} \(.*, row 1\): field 'test_list' cannot be used: it does not end within 0\.5 s"
    prompts = data(tiny_folder, task=task, **sources)
    prompts.trainer = Trainer()
    with pytest.raises(ConfigError, match=message):
        prompts.setup("fit")


def test_a_long_demonstration_stops_before_training(tiny_folder: Path, write):
    class Demonstrated(MathTask):
        def problem(self, row):
            problem = super().problem(row)
            problem.demonstration = row["question"]
            return problem

    task = Demonstrated(instruction="")
    prompts = data(tiny_folder, task=task, train=write(questions("ab", "abcde")), demonstration_length=4)
    with pytest.raises(ConfigError, match=r"row 1: its demonstration has 5 tokens, .*_length is 4"):
        prompts.setup("fit")


def test_system_prompt_reaches_the_policy(tiny_folder: Path, write):
    prompts = data(tiny_folder, validation=write(questions("hi")), system_prompt="Count.")
    prompts.setup("validate")
    (batch,) = prompts.val_dataloader()
    assert prompts.tokenizer.decode(batch.prompt_ids[0]) == "Count.\nhi"


def test_max_steps_of_minus_1_is_an_error(tiny_folder: Path, make_trainer):
    with pytest.raises(ConfigError, match=r"trainer\.max_steps is -1: .*set the "):
        make_trainer(-1).fit(RLDFModule(str(tiny_folder)), datamodule=PromptDataModule(SudokuTask()))


@pytest.mark.parametrize(
    "settings", [{"limit_train_batches": 2}, {"limit_train_batches": 1}, {"overfit_batches": 1}]
)
def test_a_stream_that_is_cut_would_begin_anew(tiny_folder: Path, make_trainer, settings: dict):
    with pytest.raises(ConfigError, match=r"limit_train_batches is \d: .*set trainer\.max_steps"):
        make_trainer(4, **settings).fit(
            RLDFModule(str(tiny_folder)), datamodule=PromptDataModule(SudokuTask())
        )


def test_without_policy_the_tokenizer_must_be_set():
    with pytest.raises(ConfigError, match=r"data\.tokenizer is None"):
        PromptDataModule(SudokuTask()).setup("fit")


def test_teardown_ends_the_reward(tiny_folder: Path, monkeypatch):
    task, closed = SudokuTask(), []
    monkeypatch.setattr(task.reward, "close", lambda: closed.append(True), raising=False)
    PromptDataModule(task).teardown("fit")
    assert closed == [True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts_per_step": 0}, r"data\.prompts_per_step is 0"),
        ({"evaluation_batch_size": 0}, r"data\.evaluation_batch_size is 0"),
        ({"num_validation": -1}, r"data\.num_validation is -1"),
        ({"num_test": 0}, r"data\.num_test is 0"),
        ({"max_prompt_length": 0}, r"data\.max_prompt_length is 0"),
        ({"demonstration_length": 0}, r"data\.demonstration_length is 0"),
        ({"long_prompts": "cut"}, r"data\.long_prompts is 'cut': choose one of \['error', 'drop'\]"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PromptDataModule(SudokuTask(), **settings)


def without_mask(folder: Path) -> None:
    """A tokenizer of whose tokens none has the policy's mask id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel({"<pad>": 0, "a": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>").save_pretrained(folder)


def other_mask(folder: Path) -> None:
    character_tokenizer(98, pad_token_id=0, mask_token_id=7).save_pretrained(folder)


def other_padding(folder: Path) -> None:
    character_tokenizer(98, pad_token_id=2, mask_token_id=1).save_pretrained(folder)


def too_many(folder: Path) -> None:
    character_tokenizer(120).save_pretrained(folder)


def no_padding(folder: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_mask, r"it has no token for the policy's mask_token_id 1 .*use the tokenizer that"),
        (other_mask, r"its mask token '<\|mask\|>' has id 7, the policy's mask_token_id is 1"),
        (other_padding, r"its padding token '<\|endoftext\|>' has id 2, the policy's pad_token_id is 0"),
        (too_many, r"it has 120 tokens, the policy only 98"),
        (no_padding, r"it has no padding token; add pad_token"),
    ],
)
def test_a_tokenizer_of_another_policy_stops_before_weights_are_loaded(
    tiny_folder: Path, make_trainer, tmp_path: Path, monkeypatch, spoil, message: str
):
    def must_not_load(*args, **settings):
        pytest.fail("weights were loaded before the tokenizer was checked")

    monkeypatch.setattr(drift.policy_module, "load_policy", must_not_load)
    spoil(tmp_path / "tokenizer")
    prompts = PromptDataModule(SudokuTask(), tokenizer=str(tmp_path / "tokenizer"))
    rollout = RolloutCallback(completion_length=16, decode=DECODE, evaluation=DECODE)
    with pytest.raises(ConfigError, match=rf"data\.tokenizer is .*{message}"):
        make_trainer(callbacks=[rollout]).fit(RLDFModule(str(tiny_folder)), datamodule=prompts)


def test_batches_reach_training_as_they_left_the_stream(tiny_folder: Path, make_trainer, spread_task):
    seen = []

    class Keep(RolloutCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch)

    rollout = Keep(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
    prompts = PromptDataModule(spread_task, prompts_per_step=2)
    make_trainer(3, callbacks=[rollout]).fit(RLDFModule(str(tiny_folder)), datamodule=prompts)
    assert [batch.positions.tolist() for batch in seen] == [[0, 1], [2, 3], [4, 5]]
    assert all(torch.equal(batch.rollout.prompt_ids[::2], batch.prompt_ids) for batch in seen)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_example_is_the_first_prompt_of_the_stage(tiny_folder: Path, write, shuffle: bool):
    evaluation = questions("1st", "2nd")
    settings = {"train": write(FIVE), "validation": write(evaluation), "test": write(evaluation[1:])}
    prompts = data(tiny_folder, **settings, prompts_per_step=2, shuffle=shuffle)
    ((first, _),) = training_prompts(prompts, 1)
    assert prompts.examples[0].prompt == first
    for stage, expected in (("validate", "1st"), ("test", "2nd"), ("predict", "2nd")):
        prompts.setup(stage)
        assert prompts.examples[0].prompt == expected
    prompts = PromptDataModule(SudokuTask(), tokenizer=str(tiny_folder), prompts_per_step=2)
    ((first, _),) = training_prompts(prompts, 1)
    assert prompts.examples[0].prompt == first


def test_the_example_of_a_streaming_dataset_is_its_first_usable_row(tiny_folder: Path, write, monkeypatch):
    rows = [*questions("x" * 30), *FIVE]
    source = write(rows, streaming=True)
    prompts = data(tiny_folder, train=source, long_prompts="drop", max_prompt_length=10, prompts_per_step=2)
    # Reading on to shuffle would take thousands of rows.
    monkeypatch.setattr(module_under_test.StreamedRows, "starting_at", None)
    prompts.trainer = Trainer()
    prompts.setup("fit")
    assert prompts.examples[0].prompt == "one"


CHATML = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}[assistant]"


def chat_folder(folder: Path, special: list[str], chat_template: str | None = None) -> Path:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["Dream", "llada", None])
@pytest.mark.parametrize("own", [CHATML, None])
@pytest.mark.parametrize("setting", ["auto", "none", CHATML.replace("[", "<")])
def test_the_chat_template_that_prompts_is_the_one_that_is_exported(
    tmp_path: Path, write, family: str | None, own: str | None, setting: str
):
    folder = chat_folder(tmp_path / "tokenizer", ["<|im_start|>", "<|im_end|>"], own)
    prompts = data(folder, train=write(FIVE), shuffle=False, chat_template=setting)
    prompts.trainer = Trainer()
    prompts.trainer.lightning_module.policy_config = {"model_type": family, "mask_token_id": 1}
    prompts.setup("fit")
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    dream = f"{system}<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    automatic = "[user]one[assistant]" if own else dream if family == "Dream" else "one"
    expected = {"auto": automatic, "none": "one"}.get(setting, "<user]one<assistant]")
    assert prompts.template.render(prompts.examples[0]) == expected
    if expected != "one":
        turns, added = [{"role": "user", "content": "one"}], prompts.template.added_chat_template
        assert (added is None) is (setting == "auto" and own is not None)
        exported = prompts.tokenizer.apply_chat_template(
            turns, chat_template=added, tokenize=False, add_generation_prompt=True
        )
        assert exported == expected


def test_a_bad_chat_template_stops_before_rows_are_read(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "mine.jinja").write_text("{% for turn in messages %}")
    prompts = data(tiny_folder, train=Source(path="absent.json"), chat_template=str(tmp_path / "mine.jinja"))
    prompts.trainer = Trainer()
    with pytest.raises(ConfigError, match=r"data\.chat_template is .*mine\.jinja'.*TemplateSyntaxError"):
        prompts.setup("fit")


class Ragged(SudokuTask):
    """Every other puzzle comes with a long story."""

    def problem(self, row):
        problem = super().problem(row)
        if sum(map(ord, problem.prompt)) % 2:
            problem.prompt *= 20
        return problem


def test_prompts_that_a_task_makes_too_long_are_made_anew_or_named(tiny_folder: Path):
    settings = {"max_prompt_length": 100, "num_validation": 40}
    prompts = PromptDataModule(Ragged(), str(tiny_folder), long_prompts="drop", **settings)
    found = training_prompts(prompts, 6)
    assert all(len(prompt) <= 100 for batch in found for prompt in batch)
    assert training_prompts(prompts, 3, global_step=3) == found[3:]
    (kept,) = prompts.evaluation_sets["validation"]
    assert 5 < len(kept.rows) < 35
    # Of an endless stream nothing is known before; of the rest all of it.
    with pytest.raises(ConfigError, match=r"validation .* row \d+: .*set data\.long_prompts: drop"):
        PromptDataModule(Ragged(), str(tiny_folder), **settings).setup("validate")
    never = PromptDataModule(Ragged(), str(tiny_folder), long_prompts="drop", max_prompt_length=4)
    with pytest.raises(ConfigError, match="none of the rows has a prompt of at most"):
        never.setup("validate")
