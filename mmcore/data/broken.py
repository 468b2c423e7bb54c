"""Broken records: counted by reason, logged once each, and stopped when their share exceeds a limit."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_LOG = logging.getLogger(__name__)

MIN_SEEN = 100
"""Records that are read before their broken share is judged in the middle of an epoch."""
_MAX_LOGGED = 10_000


class BrokenRecord(Exception):
    """A record that cannot be used; `reason` is one of a few fixed phrases, so that it can be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    @classmethod
    def unless(cls, holds: bool, *arguments: str) -> None:
        """Raises it unless the contract of a record holds."""
        if not holds:
            raise cls(*arguments)


class BrokenTally:
    """Counts of the records read and of the broken ones among them.

    A record met again in a later epoch counts again, so the share is that of the records read. In the middle
    of an epoch the limit has three standard deviations of slack (a share of 1 % shows 3 in its first 100 now
    and then); at the end of an epoch it is exact.

    Args:
        max_broken: allowed share, 0 to 1; 0 stops at the first broken record.
        what: what is read, for messages.
        before: counts of an earlier stage (the lines of a table), reported along but not judged again.
    """

    def __init__(self, max_broken: float, what: str, before: Counter[str] | None = None) -> None:
        self.max_broken = max_broken
        self.what = what
        self.before = Counter(before or {})
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._first = ""

    def add(self, seen: int, broken: Iterable[tuple[str, str]] = ()) -> None:
        """Count `seen` records, with the (id, reason) of each broken one among them."""
        self.seen += seen
        for sample_id, reason in broken:
            self._first = self._first or sample_id
            self.counts[reason] += 1
            if sample_id not in self._logged and len(self._logged) < _MAX_LOGGED:
                self._logged.add(sample_id)
                _LOG.warning("skipped %s: %s", sample_id, reason)

    @contextmanager
    def record(self, sample_id: str) -> Iterator[None]:
        """Count the record that this block reads; it is broken where the block raises BrokenRecord, which ends here."""
        broken = []
        try:
            yield
        except BrokenRecord as error:
            broken.append((sample_id, error.reason))
        self.add(1, broken)

    def check(self, *, final: bool) -> None:
        """Raise a ValueError where too many were broken; `final`: all of an epoch has been read."""
        broken = self.counts.total()
        allowed = self.max_broken * self.seen
        if not final:
            if self.seen < MIN_SEEN and self.max_broken > 0:
                return
            allowed += 3 * math.sqrt(allowed)
        if broken > allowed:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.counts.items()))
            first = f"; the first is {self._first}" if self._first else ""
            what = f"{broken} of {self.seen} records of {self.what} are broken ({reasons}){first}"
            raise ValueError(f"data: {what}, more than max_broken={self.max_broken:g} allows")

    def state_dict(self) -> dict:
        return {"seen": self.seen, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.seen = int(state["seen"])
        self.counts = Counter(state["counts"])
