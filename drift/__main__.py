"""The `drift` command; what needs no torch is answered before torch is imported."""

from __future__ import annotations

import sys
from difflib import SequenceMatcher

from drift import __version__

_COMMANDS = {
    "fit": "train a policy with RLDF",
    "sft": "fine-tune a base policy on demonstrations",
    "validate": "evaluate a policy on the validation prompts",
    "test": "evaluate a policy on the test prompts",
    "predict": "write answers to the test prompts",
    "doctor": "check a policy before anything is trained with it",
    "export": "write a checkpoint's policy as a Hugging Face folder",
    "compare": "compare the results of two tests, and say whether they may be compared",
    "plan": "say how much memory a training run needs, before it is started",
}


def usage() -> str:
    """What `drift --help` prints."""
    commands = "\n".join(f"  {name:<10}{what}" for name, what in _COMMANDS.items())
    return f"""usage: drift COMMAND [--config NAME_OR_FILE ...] [--KEY VALUE ...]

Reinforcement learning for masked diffusion language models.

commands:
{commands}

  drift fit --config quickstart          a shipped config's name, or a file; of several, the later one wins
  drift fit --config quickstart --model.sampler Uniform --model.sampler.k 4
  drift fit --config quickstart --print_config
  drift COMMAND --help                   every setting, with its default
  drift --version
"""


def _hint(command: str) -> str:
    # max, not get_close_matches: of equally near commands the first is the one most used.
    near = max(_COMMANDS, key=lambda name: SequenceMatcher(None, command, name).ratio())
    return f"; did you mean {near!r}?" if SequenceMatcher(None, command, near).ratio() >= 0.6 else ""


def main() -> None:
    """Runs the command line."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
    elif arguments[0] in ("--version", "-V"):
        print(f"drift {__version__}")
    elif arguments[0] not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        sys.exit(
            f"drift: error: there is no command {arguments[0]!r}{_hint(arguments[0])} (commands: {known})"
        )
    else:
        from drift.commands import run

        run(arguments)


if __name__ == "__main__":
    main()
