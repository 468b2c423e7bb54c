"""How a command ends after a mistake: one sentence, no traceback."""

import os
import sys


def complain(error: Exception, code: int) -> int:
    """Prints a mistake in one sentence (MMCORE_DEBUG=1 raises it instead) and returns the exit code."""
    if os.environ.get("MMCORE_DEBUG"):
        raise error
    rank = os.environ.get("RANK", "0")
    print(f"mmcore: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr)
    return code
