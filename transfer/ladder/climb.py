"""The ladder of truth: its rungs by name, run in order, and the table of what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aligners.base import Aligner
from transfer.alignment.methods import make_aligner
from transfer.core.errors import TransferError
from transfer.ladder.across import across, causal, steady, stitched
from transfer.ladder.copies import evidence, rotated_copy, seeds
from transfer.ladder.negatives import negatives
from transfer.ladder.planted import identity, planted
from transfer.ladder.row import VERDICT, Row
from transfer.ladder.zoo import Zoo

RUNGS = {
    "G0": "identity: a permuted, rescaled, rotated copy",
    "G1": "planted truth: overlap, noise, children, splits",
    "G2": "two SAEs of one model",
    "G3": "activations against decoders",
    "G4": "across families, held out and unseen",
    "G5": "steering along matches, and running on from a mapped residual stream",
    "G6": "negatives",
}
METHODS = ("activation", "map", "unembedding", "sinkhorn", "relative", "fused")
"""Beside each other in G4. ``crosscoder`` takes a minute a pair and ``gromov`` minutes; name them to add them."""


@dataclass(frozen=True)
class Plan:
    """What to run, how large."""

    rungs: tuple[str, ...] = tuple(RUNGS)
    method: str = "fused"
    """Judged in every rung."""
    methods: tuple[str, ...] = METHODS
    """In G4."""
    sizes: tuple[int, ...] = (4096,)
    """Planted spaces of G0, in features."""
    draws: int = 3
    """Of each cell of G1."""
    stress: float = 1.0
    """Share of the stress setting's full size in G1."""
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [r for r in self.rungs if r not in RUNGS]
        if unknown or not self.rungs:
            raise TransferError(
                f"Unknown rung {unknown[0]!r}." if unknown else "No rung is named.", f"There is: {', '.join(RUNGS)}."
            )
        if self.draws < 2:
            raise TransferError(f"{self.draws} draws a cell; an interval needs two.")
        if not 0 < self.stress <= 1:
            raise TransferError(f"The stress setting's share is {self.stress}; it must lie above 0 and at most at 1.")
        if not self.sizes or min(self.sizes) < 100:
            raise TransferError(f"Sizes are {list(self.sizes)}; a planted space needs 100 features.")


def climb(plan: Plan, zoo: Zoo) -> Iterator[Row]:
    """Run the rungs in order; a case that the suite refuses becomes a failed row and does not stop the next.

    Yields:
        The rows, rung by rung.

    Raises:
        TransferError: For an unknown method, too few models, or models that cannot be loaded.
    """
    across_models = [r for r in plan.rungs if r in ("G3", "G4", "G5", "G6")]
    if across_models and len(zoo.models) < 2:
        raise TransferError(
            f"{', '.join(across_models)} compare two models, and one is named.",
            "Name more with --model, or fewer rungs with --rungs.",
        )
    make = _maker(plan.method, plan.seed)
    makers = [_maker(name, plan.seed) for name in plan.methods]
    plain = [_maker("activation", plan.seed)] if plan.method != "activation" else []
    work: dict[str, Callable[[], list[Row]]] = {
        "G0": lambda: identity(make, plan.sizes, plan.seed) + rotated_copy(make, zoo),
        "G1": lambda: planted(make, plan.draws, plan.seed, plan.stress),
        "G2": lambda: seeds(make, plain, zoo),
        "G3": lambda: evidence(zoo),
        "G4": lambda: across(makers, zoo) + steady(make, zoo),
        "G5": lambda: causal(make, zoo) + stitched(zoo),
        "G6": lambda: negatives(make, plain, zoo),
    }
    for rung in RUNGS:
        if rung in plan.rungs:
            yield from work[rung]()


def _maker(method: str, seed: int) -> Callable[[], Aligner]:
    make_aligner(method, [], seed)  # an unknown name is refused before any work
    return lambda: make_aligner(method, [], seed)


def table(rows: Sequence[Row], width: int | None = None) -> str:
    """The rows as a table: drawn for a terminal of this width, one plain line a row without one."""
    if width is None:
        lines = [
            f"{r.rung}  {VERDICT[r.passed]:4}  {r.case}  [{r.method}]  {r.text()}"
            f"  (expected: {r.expected}; {r.seconds:.1f} s)"
            for r in rows
        ]
        return "\n".join([*lines, summary(rows)])
    drawn = Table(title="Ladder of truth", caption=summary(rows))
    for name in ("rung", "case", "method", "measured", "expected", "passed"):
        drawn.add_column(name, overflow="fold")
    drawn.add_column("s", justify="right")
    colours = {True: "[green]pass", False: "[red]FAIL", None: "-"}
    for r in rows:
        cells = (r.rung, r.case, r.method, r.text(), r.expected)
        drawn.add_row(*(escape(c) for c in cells), colours[r.passed], f"{r.seconds:.1f}")
    file = StringIO()
    Console(file=file, width=width, force_terminal=True).print(drawn)
    return file.getvalue().rstrip("\n")


def summary(rows: Sequence[Row]) -> str:
    """How many rows passed, failed, and are context."""
    count = {verdict: sum(r.passed is verdict for r in rows) for verdict in (True, False, None)}
    return (
        f"{count[True]} passed, {count[False]} failed, {count[None]} are context; {sum(r.seconds for r in rows):.0f} s"
    )
