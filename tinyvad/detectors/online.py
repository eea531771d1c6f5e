"""Online PatchCore in integers, one image at a time: which of its patch vectors a bank takes, and what threshold follows.

Flows in: the rows of one task and the int8 vectors of one good image. Flows out: the cells whose vectors are appended, in
order, and how new the image was before. A microcontroller does the same with the same integers (``tvad_learn_image``).

    D_p = squared distance of patch p to the nearest row          2**31 - 1 while there are none
    novelty of the image = max D_p                                what the image would have scored
    repeat: j = the lowest p with the largest D_p                 so an empty bank begins with cell 0
            stop if D_j <= tau2, or per_image or capacity is reached
            append z_j;  D_p = min(D_p, |z_p - z_j|**2)

Source: incremental k-center (Charikar et al. 1997, here with a limit instead of doubling) as online PatchCore uses it;
scoring an image before learning it is Dawid's prequential principle (1984).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tinyvad.detectors.coreset import MAX_DEPTH
from tinyvad.detectors.distances import nearest
from tinyvad.errors import InputError

NO_ROWS = 2**31 - 1  # squared distance to the nearest of no rows
RECENT = 64  # novelties that are kept, at most


class Update(NamedTuple):
    """What one image did to a bank.

    Attributes:
        added: (k,) int64 cells whose vectors are appended, in this order.
        novelty: largest squared distance before; ``NO_ROWS`` if there was no row.
        radius: largest squared distance afterwards.
    """

    added: np.ndarray
    novelty: int
    radius: int


def online_update(rows: np.ndarray, patches: np.ndarray, limit: int, tau2: int, capacity: int) -> Update:
    """Choose what one image adds to a bank.

    Args:
        rows: (K, D) int8, K >= 0. patches: (P, D) int8, P > 0.
        limit: at most so many vectors of one image.
        tau2: squared distance up to which a vector is not new; it has no say over the first row of an empty bank.
        capacity: rows that the bank may have; at or above it, nothing is added any more.

    Raises:
        InputError: wrong shapes or dtypes.
    """
    _check(rows, patches)
    distance = np.full(len(patches), NO_ROWS, np.int64)
    if len(rows):
        distance = nearest(patches, rows)[0].astype(np.int64)  # exact
    novelty = int(distance.max())
    added: list[int] = []
    wide = patches.astype(np.int32)
    while len(added) < limit and len(rows) + len(added) < capacity:
        j = int(distance.argmax())
        if distance[j] <= tau2 and len(rows) + len(added) > 0:
            break
        added.append(j)
        difference = wide - wide[j]  # (P, D), below 2**8; its square sum below 2**31
        np.minimum(distance, np.einsum("pd,pd->p", difference, difference), out=distance)
    return Update(np.array(added, np.int64), novelty, int(distance.max()))


def online_update_reference(
    rows: np.ndarray, patches: np.ndarray, limit: int, tau2: int, capacity: int
) -> Update:
    """The same as it is written down, every distance to every row computed anew in int64."""
    _check(rows, patches)
    bank, novelty = rows.astype(np.int64), None
    added: list[int] = []
    while True:
        difference = patches[:, None].astype(np.int64) - bank[None]  # (P, K, D)
        distance = (difference * difference).sum(2).min(1, initial=NO_ROWS)  # (P,)
        novelty = int(distance.max()) if novelty is None else novelty
        j = int(distance.argmax())
        if (len(bank) and distance[j] <= tau2) or len(added) == limit or len(bank) >= capacity:
            return Update(np.array(added, np.int64), novelty, int(distance.max()))
        added.append(j)
        bank = np.concatenate([bank, patches[j : j + 1].astype(np.int64)])


def prequential_threshold(novelties: Sequence[int]) -> int:
    """The threshold that a session's images give: 1 + the largest novelty of the later half of them.

    Each was scored before it was learnt, so all are held out. The first half met a bank that was still growing. Of the
    later ceil(n / 2) images, at most the last ``RECENT`` count.

    Args:
        novelties: of the images learnt, in order, at least one; none of the later half ``NO_ROWS``.
    """
    count = min((len(novelties) + 1) // 2, RECENT)
    return 1 + max(novelties[-count:])


def single_image_threshold(spread: int, radius: int, tau2: int) -> int:
    """The threshold of a task of which one image is known: 1 + the largest of half its spread, its radius and tau2.

    Nothing is held out, so how much images differ is unknown, and is guessed from how much the parts of this one differ. Of
    six products' training images at least nine of ten stayed below; a second image replaces the guess.

    Args:
        spread: squared distance from cell 0 to the cell farthest from it. radius: as in ``Update``.
    """
    return min(1 + max(spread // 2, radius, tau2), 2**32 - 1)


def _check(rows: np.ndarray, patches: np.ndarray) -> None:
    if rows.dtype != np.int8 or patches.dtype != np.int8 or rows.ndim != 2 or patches.ndim != 2 or len(patches) == 0:
        found = f"{rows.dtype}{rows.shape} and {patches.dtype}{patches.shape}"
        raise InputError(f"online update of rows and patches {found}; give int8 (K, D) and (P, D), P > 0")
    if rows.shape[1] != patches.shape[1] or not 1 <= rows.shape[1] <= MAX_DEPTH:
        found = f"{rows.shape[1]} and {patches.shape[1]}"
        raise InputError(f"online update of rows and patches of {found} values; give the same number, 1 to {MAX_DEPTH}")
