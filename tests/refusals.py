"""Input that is refused, one line a case."""

from collections.abc import Callable
from typing import Any

import pytest


def refuses(message: str, call: Callable[..., object], /, *arguments: Any, **options: Any) -> None:
    """The call ends with a ValueError of one line in which the pattern is found."""
    with pytest.raises(ValueError, match=message) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
