"""The `mmcore` command: verbs alone, each of which imports what it is asked for."""

import importlib
import sys

from mmcore.errors import complain, did_you_mean

USAGE = """usage: mmcore VERB ...

  mmcore train RECIPE [options]    train; without a recipe, all of them with a line each
  mmcore eval TASK RUN [options]   measure a run on its held-out data; without a task, all of them
  mmcore chat RUN --image FILE     ask a model about images, question after question
  mmcore export RUN --out FOLDER   write a run's weights for transformers or open_clip
  mmcore plan RECIPE [options]     memory, FLOP, transfers and time of a run, before it is started
  mmcore prove RECIPE|all|--list   train the tiny recipe and compare it with what cannot know
  mmcore capfilt [options]         write captions for pictures, and keep those that match
"""


VERBS = {
    "train": "mmcore.launch",
    "eval": "mmcore.tasks.command",
    "chat": "mmcore.tasks.terminal",
    "export": "mmcore.export",
    "plan": "mmcore.plan.command",
    "prove": "mmcore.prove",
    "capfilt": "mmcore.capfilt",
}
"""The modules whose `main` they are."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 2 and one sentence for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    try:
        if arguments[0] not in VERBS:
            hint = did_you_mean(arguments[0], VERBS)
            raise ValueError(f"the verb must be one of {', '.join(VERBS)}, got {arguments[0]!r}{hint}")
        importlib.import_module(VERBS[arguments[0]]).main(arguments[1:])
    except (ValueError, OSError) as error:
        sys.exit(complain(error, 2))
