import pytest

from drift.messages import explain, nearest

KEYS = ["model.sampler", "model.loss.tau", "trainer.max_steps", "rollout.group_size"]


def no_class(key: str, value: str) -> None:
    """Nothing is the short name of a class."""


def test_an_argument_that_a_class_does_not_have():
    message = """Parser key "model.sampler":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'drift.samplers.base.TimestepSampler'>, <class 'NoneType'>]
      Errors:
        - Problem with given class_path 'drift.samplers.WeightedSampler':
            Option 'temprature' is not accepted
        - Expected a <class 'NoneType'>
      Given value: NestedArg(key='temprature', val='3')"""
    assert explain(message, KEYS, no_class) == (
        "model.sampler.temprature: WeightedSampler has no such setting (it has k, temperature, "
        "importance_correction); did you mean 'model.sampler.temperature'?"
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            """Parser key "model.sampler":
      Does not validate against any of the Union subtypes
      Errors:
        - Problem with given class_path 'drift.samplers.WeightedSampler':
            Parser key "k":
              Expected a <class 'int'>. Got value: 1.5
        - Expected a <class 'NoneType'>
      Given value type: <class 'jsonargparse._util.NestedArg'>
      Given value: NestedArg(key='k', val='1.5')""",
            "model.sampler.k is 1.5: it must be int",
        ),
        (
            """Parser key "rollout.decode.threshold":
      Does not validate against any of the Union subtypes
      Subtypes: [<class 'float'>, <class 'NoneType'>]
      Errors:
        - Expected a <class 'float'>
        - Expected a <class 'NoneType'>
      Given value type: <class 'str'>
      Given value: x""",
            "rollout.decode.threshold is x: it must be float or null",
        ),
        (
            """Parser key "model.loss.kl":
      Expected a typing.Literal['k1', 'k2']. Got value: k4""",
            "model.loss.kl is k4: it must be one of 'k1', 'k2'",
        ),
        (
            """Parser key "model.sampler":
      - Expected a path but no.X either not accessible or invalid
      - Does not validate against any of the Union subtypes
      Errors:
        - Problem with given class_path 'no.X':
            No module named 'no'
        - Expected a <class 'NoneType'>
      Given value: no.X""",
            "model.sampler is no.X: No module named 'no'",
        ),
        (
            """Parser key "data.task":
      Parser key "reward":
        - Expected a path but SudokuReward either not accessible or invalid
        Subtypes: [<class 'drift.rewards.math.MathReward'>, <class 'NoneType'>]
        Errors:
          - Expected a dot import path string: SudokuReward
          - Expected a <class 'NoneType'>
        Given value: SudokuReward""",
            "data.task.reward is SudokuReward: it must be MathReward or null",
        ),
        (
            "unrecognized arguments: --trainer.max_step 5",
            "unrecognized arguments: --trainer.max_step 5; did you mean 'trainer.max_steps'?",
        ),
        ("something\n  else", "something else"),
        (
            """Parser key "data.task":
  Problem with given class_path 'drift.tasks.SudokuTask':
    Parser key "blanks":
      Does not validate against any of the Union subtypes
      Subtypes: [tuple[int, int], list[a.b.Reward], <class 'NoneType'>]
      Errors:
        - Expected a <class 'tuple'>
        - Expected a <class 'NoneType'>
      Given value type: <class 'str'>
      Given value: 6""",
            "data.task.blanks is 6: it must be tuple[int, int] or list[Reward] or null",
        ),
        (
            """Parser key "rollout.extra_rewards":
  Does not validate against any of the Union subtypes
  Subtypes: [list[drift.tasks.scoring.ExtraReward], <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'drift.tasks.ExtraReward':
        Parser key "reward":
          Problem with given class_path 'drift.rewards.FormatReward':
            the following arguments are required: pattern
    - Expected a <class 'NoneType'>
  Given value: [Namespace(class_path='drift.tasks.ExtraReward')]""",
            "rollout.extra_rewards.reward: FormatReward cannot do without pattern; set it",
        ),
        (
            """Parser key "rollout.extra_rewards":
  Does not validate against any of the Union subtypes
  Subtypes: [list[drift.tasks.scoring.ExtraReward], <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'drift.tasks.ExtraReward':
        Parser key "reward":

          - Expected a path but NoSuchReward either not accessible or invalid
          - Expected a dot import path string: NoSuchReward
    - Expected a <class 'NoneType'>
  Given value: [{'reward': 'NoSuchReward', 'weight': 0.1}]""",
            "rollout.extra_rewards.reward is 'NoSuchReward': there is no such class; give the name of one of "
            "drift's, or the path of your own",
        ),
        (
            "the following arguments are required: fit.model.policy, fit.data.task",
            "required, and not given: model.policy, data.task; start from a recipe, such as --config "
            "quickstart, or set them",
        ),
        ("the following arguments are required: path", "required, and not given: path"),
        (
            "argument --model.optimizer.lr: expected one argument",
            "argument --model.optimizer.lr: expected one argument; give a value that begins with '-' as "
            "--KEY=VALUE",
        ),
    ],
)
def test_messages_are_one_line_with_key_and_value(message: str, expected: str):
    assert explain(message, KEYS, no_class) == expected


def test_a_key_that_is_near_nothing_gets_no_hint():
    assert nearest("lr", KEYS) == ""
    assert nearest("model.los.tau", KEYS) == "; did you mean 'model.loss.tau'?"
