"""How a command ends after a mistake: one sentence, no traceback."""

import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], most: int = 1) -> str:
    """What ends a sentence about an unknown name: the nearest of the known ones; nothing where none is near."""
    near = get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def complain(error: Exception, code: int) -> int:
    """Prints a mistake in one sentence (MMCORE_DEBUG=1 raises it instead) and returns the exit code."""
    if os.environ.get("MMCORE_DEBUG"):
        raise error
    rank = os.environ.get("RANK", "0")
    print(f"mmcore: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
    return code
