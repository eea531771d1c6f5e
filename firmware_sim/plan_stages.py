"""What a stage keeps in memory: a ``Network`` in, stages with their peaks out.

A stage is a run of works that are computed together, ``band`` rows of the last one at a time. Between them only those rows
are kept that are still read: a 5x5 window that moves on by a row leaves four of its five rows to the next band. The kept
rows are moved to the front of their buffer before the next ones are made, so nothing is computed twice. (MCUNetV2's
patch-based inference cuts the image into patches that share nothing and computes anew what they overlap in.)

Memory is shared in three ways:

* in place: add, mul and a table's lookup write on an operand that dies, row by row; a depthwise kernel on its whole input.
* through: where such an operand is made in the same stage, it is made in the place of the result.
* behind: the stage's result is written on the rows of its input that no one reads any more.

Source: MCUNet and MCUNetV2 (Lin et al. 2020, 2021) for in-place depthwise and stages by parts; vMCU (Zheng et al. 2024) and
TFLite's diagonal memory optimisation (Blacker et al. 2021) for outputs behind inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tinyvad.firmware_sim.memory import align
from tinyvad.firmware_sim.plan_rows import Network, Value, Work

LEAD = 24  # rows above the map
STEP_COST = 256  # what a step costs besides its work, in moved bytes

Shares = dict[str, tuple[str, int]]  # value -> (value in whose place it lies, bytes from that one's start)


@dataclass(frozen=True)
class Extras:
    """Aligned bytes that the embedding takes, in the order of the taps: of each part, and scratch to make it."""

    parts: tuple[int, ...]
    scratch: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """How a value is made in a stage of n bands.

    Attributes:
        ahead: (n + 1,) int64: as ``made``, but not clipped to the map.
        made: (n + 1,) int64: rows that are there before band i.
        kept: (n + 1,) int64: the first of them that is read from band i on; 0 where all rows stay.
        capacity: rows of its buffer.
        carries: rows stay in the buffer from one band to the next.
        calls: bands in which rows of it are made.
        moved: rows that are moved in all bands together.
    """

    ahead: np.ndarray
    made: np.ndarray
    kept: np.ndarray
    capacity: int
    carries: bool
    calls: int
    moved: int


@dataclass(frozen=True, eq=False)
class Stage:
    """Works first to past - 1, ``band`` rows of the last one at a time.

    Attributes:
        rows: of every value that is made in it.
        shares: who lies in whose place.
        peak: bytes that are live at once while it runs, whatever they are for.
        cost: of its bands, in moved bytes.
    """

    first: int
    past: int
    band: int
    rows: dict[str, Rows]
    shares: Shares
    peak: int
    cost: int

    @property
    def bands(self) -> int:
        return len(next(iter(self.rows.values())).made) - 1


@dataclass(eq=False)
class _Sweep:
    """The rows of all values that the works before ``past`` make in one stage; grows towards the front."""

    net: Network
    past: int
    band: int
    rows: dict[str, Rows] = field(default_factory=dict)

    def add(self, j: int) -> bool:
        """Take work j in; False if it cannot be in one stage with those after it."""
        works, work = self.net.works, self.net.works[j]
        value = self.net.values[work.output]
        if j == self.past - 1:
            # bands above the map make nothing of the last value: in them the others get their first rows, a few at a time
            lead = -(-LEAD // self.band) if self.band < value.rows else 0
            ahead = np.minimum(np.arange(-lead, -(-value.rows // self.band) + 1) * self.band, value.rows)
            return self._whole(value, ahead)
        inside = [i for i in value.readers if i < self.past]
        if not inside or not work.by_rows:
            return False
        reads = [
            (operand, self.rows[works[i].output])
            for i in inside for operand in works[i].operands if operand.value == value.name
        ]  # fmt: skip
        ahead = np.maximum.reduce([operand.ahead(rows.ahead) for operand, rows in reads])
        if value.tap is not None or len(inside) < len(value.readers):
            return self._whole(value, ahead)
        made = self._made(value, ahead)
        kept = np.minimum.reduce([made, *(operand.start[rows.made] for operand, rows in reads)])
        capacity = int((made[1:] - kept[:-1]).max())
        stays = made - kept  # (n + 1,) rows
        moved = int(stays.sum()) if capacity < value.rows else 0
        calls = int(np.count_nonzero(made[1:] > made[:-1]))
        self.rows[value.name] = Rows(ahead, made, kept, capacity, bool(stays[1:-1].any()), calls, moved)
        return True

    def _whole(self, value: Value, ahead: np.ndarray) -> bool:
        """A value of which all rows stay."""
        made = self._made(value, ahead)
        calls = int(np.count_nonzero(made[1:] > made[:-1]))
        self.rows[value.name] = Rows(ahead, made, np.zeros_like(ahead), value.rows, True, calls, 0)
        return True

    def _made(self, value: Value, ahead: np.ndarray) -> np.ndarray:
        made = np.clip(ahead, 0, value.rows)
        made[-1] = value.rows  # rows that no one reads are made all the same
        return made


class Stages:
    """What the choice needs of a network: what is live between works, and every stage with its peak.

    Args:
        in_place: memory may be shared (the frame is always made in the place of its pixels).
    """

    def __init__(self, net: Network, extras: Extras, in_place: bool) -> None:
        self.net, self.extras, self.in_place = net, extras, in_place
        n = len(net.works)
        self.alive = [  # names of the values that are there before work i and that it or a later one reads
            [value.name for value in net.values.values() if value.maker < i <= value.last_reader] for i in range(n + 1)
        ]
        self.alive_bytes = [sum(net.values[name].nbytes for name in names) for names in self.alive]
        makers = [net.values[name].maker for name in net.taps]
        self.part_bytes = [  # of the taps made before work i
            sum(part for part, maker in zip(extras.parts, makers, strict=True) if maker < i) for i in range(n + 1)
        ]

    def single(self, i: int) -> Stage:
        """Work i alone, its whole output at once."""
        return self.one(i, i + 1, self.net.values[self.net.works[i].output].rows)

    def one(self, first: int, past: int, band: int) -> Stage:
        """A given stage."""
        sweep = _Sweep(self.net, past, band)
        for i in range(past - 1, first - 1, -1):
            sweep.add(i)
        return self._stage(first, past, band, sweep.rows)

    def ending(self, past: int, band: int, limit: int, through: int | None = None) -> Iterator[Stage]:
        """Stages of several works that end with work past - 1, ever longer ones, whose peak is at most ``limit``.

        Args:
            through: only those that hold this work.
        """
        last = self.net.works[past - 1]
        if not last.by_rows:
            return
        sweep, held = _Sweep(self.net, past, band), 0
        for first in range(past - 1, -1, -1):
            if not sweep.add(first):
                return
            held += self._buffer(sweep.rows, self.net.works[first].output, carried=True)
            if held - self.net.values[last.output].nbytes > limit:
                return  # no longer stage keeps less; only the last output may share memory with others
            if first < past - 1 and (through is None or first <= through):
                stage = self._stage(first, past, band, sweep.rows)
                if stage.peak <= limit:
                    yield stage

    def _buffer(self, rows: dict[str, Rows], name: str, carried: bool) -> int:
        """Bytes of a value's buffer if it ``carried`` rows from band to band, or if it did not; else 0."""
        if rows[name].carries != carried:
            return 0
        return align(rows[name].capacity * self.net.values[name].row_bytes)

    def _stage(self, first: int, past: int, band: int, all_rows: dict[str, Rows]) -> Stage:
        works, values = self.net.works, self.net.values
        rows = {work.output: all_rows[work.output] for work in works[first:past]}
        shares, saved = self._shares(first, past, rows)
        held = self.alive_bytes[first] + self.part_bytes[first] - saved
        busy = [align(work.scratch) for work in works[first:past]]  # live only while one work runs
        starts: dict[str, int] = {}  # a buffer is live from the first work that writes into it
        for j in range(first, past):
            starts.setdefault(_root(shares, rows, works[j].output), j)
        for name, start in starts.items():
            held += self._buffer(rows, name, carried=True)
            passing = self._buffer(rows, name, carried=False)
            for j in range(start, values[name].last_reader + 1 if passing else start):
                busy[j - first] += passing
        peak = 0
        for j in range(first, past):
            peak = max(peak, held + busy[j - first])
            tap = values[works[j].output].tap
            if tap is not None and j < past - 1:  # its part is made after its last row, and stays
                making = busy[j - first] - align(works[j].scratch) + self.extras.scratch[tap]
                held += self.extras.parts[tap]
                peak = max(peak, held + making)
        peak = max(peak, self._after(works[past - 1], past))
        moved = sum(one.moved * values[name].row_bytes for name, one in rows.items() if name not in shares)
        steps = sum(one.calls for one in rows.values())
        return Stage(first, past, band, rows, shares, peak, moved + (steps - len(rows)) * STEP_COST)

    def _after(self, last: Work, past: int) -> int:
        """Live bytes when the tap that a stage ends with is made into its part; 0 if it ends with none."""
        value = self.net.values[last.output]
        if value.tap is None:
            return 0
        own = 0 if value.name in self.alive[past] else value.nbytes
        return self.alive_bytes[past] + own + self.part_bytes[past] + self.extras.scratch[value.tap]

    def _shares(self, first: int, past: int, rows: dict[str, Rows]) -> tuple[Shares, int]:
        """Who lies in whose place, and what is saved by the result lying in the place of a value from before."""
        works, values = self.net.works, self.net.values
        result = works[past - 1].output
        if not self.in_place and works[past - 1].index >= 0:
            return {}, 0
        dying = [name for name in self.alive[first] if values[name].last_reader < past]
        shares: Shares = {}
        saved = 0
        writer = past - 1  # the first work that writes in the result's place
        settled = set()
        while True:
            work = works[writer]
            settled.add(writer)
            anchor = next((name for name in dying if self._dies_under(name, writer, first, past, rows)), None)
            if anchor is not None:
                shares[result], saved = (anchor, 0), min(values[anchor].nbytes, values[result].nbytes)
                break
            through = self._through(work, first)
            if through is None:
                break
            shares[through] = (work.output, 0)
            writer = values[through].maker
        if result not in shares:
            for name in dying:
                offset, less = self._behind(name, writer, first, past, rows)
                if less > saved:
                    shares[result], saved = (name, offset), less
        for j in range(first, past):
            through = self._through(works[j], first)
            if through is not None and j not in settled:
                shares[through] = (works[j].output, 0)
        return shares, saved

    def _dies_under(self, name: str, writer: int, first: int, past: int, rows: dict[str, Rows]) -> bool:
        """May work ``writer`` write in the place of a value from before the stage, row by row?"""
        work = self.net.works[writer]
        if name == work.whole_in_place and past - first == 1:
            return True
        if name not in work.in_place:
            return False
        written = rows[work.output].made[1:]
        needed = self._needed(name, writer + 1, first, past, rows, but=writer)
        return bool((needed >= written).all())

    def _through(self, work: Work, first: int) -> str | None:
        """An operand that may be made in the place of ``work``'s output: made in this stage, read by no one else."""
        for name in work.in_place:
            value = self.net.values[name]
            if value.maker >= first and value.tap is None and len(value.readers) == 1:
                return name
        return None

    def _behind(self, name: str, writer: int, first: int, past: int, rows: dict[str, Rows]) -> tuple[int, int]:
        """Where the stage's result may start, in bytes from a value that it is made of, and the bytes saved so."""
        x, y = self.net.values[name], self.net.values[self.net.works[past - 1].output]
        needed = self._needed(name, writer, first, past, rows)
        room = int((needed * x.row_bytes - rows[y.name].made[1:] * y.row_bytes).min())
        offset = -align(max(-room, 0))
        return offset, x.nbytes + y.nbytes - (max(x.nbytes, offset + y.nbytes) - offset)

    def _needed(
        self, name: str, writer: int, first: int, past: int, rows: dict[str, Rows], but: int | None = None
    ) -> np.ndarray:
        """(n,) int64: the first row of a value that is read in band i by works from ``writer`` on, or in later bands.

        The reads of work ``but`` do not count.
        """
        bands = len(rows[self.net.works[past - 1].output].made) - 1
        needed = np.full(bands, self.net.values[name].rows)
        for j in self.net.values[name].readers:
            if first <= j < past and j != but:
                made = rows[self.net.works[j].output].made
                for operand in self.net.works[j].operands:
                    if operand.value == name:
                        needed = np.minimum(needed, operand.start[made[:-1] if j >= writer else made[1:]])
        return needed


def _root(shares: Shares, rows: dict[str, Rows], name: str) -> str:
    """The value of the stage whose buffer holds ``name``."""
    while name in shares and shares[name][0] in rows:
        name = shares[name][0]
    return name
