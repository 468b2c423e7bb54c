"""Splitting pairs into training and held-out ones without a leak."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from mmcore.ops import require


def split_pairs(
    images: Sequence[Hashable], captions: Sequence[Hashable], val_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Indices of training and held-out pairs, as `split_linked`; no image and no caption is on both sides."""
    keys = [(("image", i), ("caption", c)) for i, c in zip(images, captions, strict=True)]
    return split_linked(keys, val_fraction, seed)


def split_linked(keys: Sequence[Sequence[Hashable]], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of training and held-out samples, ascending; no key is on both sides.

    Samples that share a key, directly or through other samples, form a group, and groups are dealt out whole in an
    order drawn from `seed` until `val_fraction` of the samples, in [0, 1), is held out; raises ValueError where the
    groups are too large for it. `keys` are any number of each sample, such as its image and its caption.
    """
    n = len(keys)
    if val_fraction == 0:
        return list(range(n)), []
    groups = _connected(keys)
    target = max(1, round(val_fraction * n))
    held_out: list[int] = []
    for g in np.random.default_rng([seed, 0x5B117]).permutation(len(groups)):
        group = groups[int(g)]
        if len(held_out) + len(group) <= target:
            held_out += group
    what = (
        "val_fraction={:g} must leave room for a group of pairs with a common image or caption, but the smallest has "
    )
    what += "{} of {} pairs; set val_fraction=0 or give other held-out data"
    require("data", bool(held_out), what, val_fraction, min(map(len, groups)), n)
    return sorted(set(range(n)) - set(held_out)), sorted(held_out)


def split_stratified(classes: Sequence[int], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Ascending training and held-out indices; of each class, `val_fraction` is held out (rounded)."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for i, c in enumerate(classes):
        by_class[c].append(i)
    held_out: list[int] = []
    for c, members in sorted(by_class.items()):
        order = np.random.default_rng([seed, 0x5B117, c]).permutation(len(members))
        held_out += [members[int(j)] for j in order[: round(val_fraction * len(members))]]
    return sorted(set(range(len(classes))) - set(held_out)), sorted(held_out)


def _connected(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Groups of samples connected by a common key, by union-find."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, of_one in enumerate(keys):
        for key in of_one:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(keys)):
        groups[root(i)].append(i)
    return list(groups.values())
