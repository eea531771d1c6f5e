"""The steps of chosen stages and what they keep in memory when: stages in, steps and buffers without places out."""

from __future__ import annotations

from dataclasses import dataclass, field

from tinyvad.firmware_sim.plan_rows import Network
from tinyvad.firmware_sim.plan_stages import Stage
from tinyvad.graph.schedule import EMBED, FRAME, INPUT_PIXELS, MAP, MOVE, NODE, SCORE, Step, Window, part_name

NO_STAGE = -1


@dataclass(eq=False)
class Piece:
    """A buffer that has no place yet.

    Attributes:
        nbytes: not aligned.
        rows: of its value that it holds, 0 where it is no map.
        first_use, last_use: steps, both included.
        stage, first_work, last_work: a piece that is idle between the bands of a stage is live only while these works run.
        base, shift: the piece in whose place it lies, and bytes from that one's start.
        inside: it lies in ``base`` for as long as it lives.
        network: it holds a tensor, the input or a kernel's scratch: nothing of the embedding or the scorer.
    """

    name: str
    nbytes: int
    rows: int = 0
    first_use: int = -1
    last_use: int = -1
    stage: int = NO_STAGE
    first_work: int = 0
    last_work: int = 0
    base: str = ""
    shift: int = 0
    inside: bool = False
    network: bool = True

    def use(self, step: int) -> None:
        self.first_use = step if self.first_use < 0 else self.first_use
        self.last_use = step


@dataclass(eq=False)
class Program:
    """Steps in order; which scratch piece each has; for each the number of its stage and work."""

    steps: list[Step] = field(default_factory=list)
    scratch: list[str] = field(default_factory=list)
    at: list[tuple[int, int]] = field(default_factory=list)
    pieces: dict[str, Piece] = field(default_factory=dict)


@dataclass(frozen=True)
class Scorer:
    """Bytes of the embedding's parts, of scratch to make each (in the order of the taps), of the map and its scratch."""

    parts: tuple[int, ...]
    embed_scratch: tuple[int, ...]
    map_bytes: int
    scratch: int


def make_program(net: Network, stages: list[Stage], scorer: Scorer) -> Program:
    """Every step of an image, from the camera's pixels to the score map."""
    writer = _Writer(net, scorer)
    for number, stage in enumerate(stages):
        writer.stage(number, stage)
    parts = tuple(Window(part_name(tap)) for tap in net.taps)
    writer.new_piece(Piece(MAP, scorer.map_bytes, network=False))
    writer.step(Step(SCORE, 0, 0, 0, parts, Window(MAP)), ("scratch of the scorer", scorer.scratch, False))
    return writer.program


class _Writer:
    """Appends steps; knows of every buffer which row lies first in it."""

    def __init__(self, net: Network, scorer: Scorer) -> None:
        self.net, self.scorer = net, scorer
        self.program = Program()
        self.first_row: dict[str, int] = {}  # of the buffer that a value lies in
        self.holder: dict[str, str] = {}  # value -> the value whose buffer it lies in, row on row
        self.number, self.work = NO_STAGE, 0
        if INPUT_PIXELS in net.values:
            self.whole(INPUT_PIXELS)
            self.program.pieces[INPUT_PIXELS].use(0)

    def new_piece(self, piece: Piece) -> None:
        self.program.pieces[piece.name] = piece

    def whole(self, name: str) -> None:
        value = self.net.values[name]
        self.new_piece(Piece(name, value.rows * value.row_bytes, value.rows if value.is_map else 0))
        self.holder[name], self.first_row[name] = name, 0

    def step(self, step: Step, scratch: tuple[str, int, bool]) -> None:
        """Append a step that has (name, bytes, is the network's) scratch, none if the bytes are 0."""
        program, now = self.program, len(self.program.steps)
        name, nbytes, network = scratch
        for window in (*step.inputs, step.output):
            for piece in {window.tensor, self.holder.get(window.tensor, window.tensor)}:
                program.pieces[piece].use(now)
        if nbytes:
            if name not in program.pieces:
                program.pieces[name] = Piece(name, nbytes, network=network)
                program.pieces[name].stage = self.number
                program.pieces[name].first_work = program.pieces[name].last_work = self.work
            program.pieces[name].use(now)
        program.steps.append(step)
        program.scratch.append(name if nbytes else "")
        program.at.append((self.number, self.work))

    def window(self, name: str) -> Window:
        return Window(name, self.first_row[self.holder[name]])

    def stage(self, number: int, stage: Stage) -> None:
        works, values = self.net.works, self.net.values
        for j in range(stage.past - 1, stage.first - 1, -1):  # later ones first: others lie in their place
            self._buffer(number, stage, j)
        for band in range(stage.bands):
            for j in range(stage.first, stage.past):
                work = works[j]
                rows = stage.rows[work.output]
                row, past = int(rows.made[band]), int(rows.made[band + 1])
                if past == row:
                    continue
                self.number, self.work = number, j
                self._make_room(stage, self.holder[work.output], band)
                self._make(j, row, past - row)
                if past == values[work.output].rows and values[work.output].tap is not None:
                    self._embed(work.output)
        self.number = NO_STAGE

    def _buffer(self, number: int, stage: Stage, j: int) -> None:
        name = self.net.works[j].output
        value, rows = self.net.values[name], stage.rows[name]
        base, shift = stage.shares.get(name, ("", 0))
        if base in stage.rows:  # made through the place of a later value of this stage
            holder = self.holder[name] = self.holder[base]
            outer = self.program.pieces[holder]
            outer.first_work = min(outer.first_work, j)
            self.new_piece(Piece(name, outer.nbytes, outer.rows, base=holder, inside=True))
        else:
            self.holder[name], self.first_row[name] = name, 0
            nbytes = rows.capacity * value.row_bytes
            self.new_piece(Piece(name, nbytes, rows.capacity if value.is_map else 0, base=base, shift=shift))
            if not rows.carries and stage.bands > 1:
                piece = self.program.pieces[name]
                piece.stage, piece.first_work, piece.last_work = number, j, value.last_reader

    def _make_room(self, stage: Stage, name: str, band: int) -> None:
        """Move the rows that are still read to the front of a buffer, if the next ones would not fit behind them."""
        rows, first = stage.rows[name], self.first_row[name]
        if int(rows.made[band + 1]) - first <= rows.capacity:
            return
        kept = int(rows.kept[band])
        held = int(rows.made[band]) - kept
        self.first_row[name] = kept
        if held:
            self.step(Step(MOVE, 0, kept, held, (Window(name, kept),), Window(name, first)), ("", 0, True))

    def _make(self, j: int, row: int, rows: int) -> None:
        work = self.net.works[j]
        kind, index = (FRAME, 0) if work.index < 0 else (NODE, work.index)
        inputs = tuple(self.window(operand.value) for operand in work.operands)
        scratch = (f"scratch of {work.output}", work.scratch, True)
        if work.op != "concat":
            self.step(Step(kind, index, row, rows, inputs, self.window(work.output)), scratch)
            return
        for operand, window in zip(work.positions, inputs, strict=True):
            self.step(Step(kind, index, row, rows, (window,), self.window(work.output), operand=operand), scratch)

    def _embed(self, tap: str) -> None:
        number = self.net.taps.index(tap)
        self.new_piece(Piece(part_name(tap), self.scorer.parts[number], network=False))
        stage, self.number = self.number, NO_STAGE
        step = Step(EMBED, number, 0, self.net.values[tap].rows, (self.window(tap),), Window(part_name(tap)))
        self.step(step, (f"scratch of the embedding of {tap}", self.scorer.embed_scratch[number], False))
        self.number = stage
