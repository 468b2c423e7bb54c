"""How what a model is measured by is written, known by its name."""

DEVIATION = "deviation of projections"
"""1 where a head spreads images evenly, 0 where it makes the same of all; see `mmcore.tasks.projection`."""


def is_share(figure: str) -> bool:
    """Whether it is of [0, 1]; an R^2 is at most 1, and below 0 where the mean is nearer."""
    return not figure.startswith("R^2")


def shown(figure: str, value: float, digits: int = 1) -> str:
    """A share in %, to `digits`; an R^2 as a number."""
    return f"{100 * value:.{digits}f} %" if is_share(figure) else f"{value:.2f}"
