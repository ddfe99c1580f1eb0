"""The progress of a training run: a live panel on a terminal, a line now and then anywhere else."""

from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from jaxllm.cli.display import count, duration

_BARS = "▁▂▃▄▅▆▇█"
# Shares of the run after which a line is printed where nothing can be redrawn.
_LINES = 20


def sparkline(values: list[float], width: int = 40) -> str:
    """The course of ``values`` in one line of text, the mean of each of ``width`` equal stretches a bar."""
    if not values:
        return ""
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


@dataclass
class Figures:
    """The last figures of a run.

    Attributes:
        step: steps done.
        progress: share of the run that is over, in [0, 1].
        elapsed: seconds of training so far, compilation not included.
        remaining: seconds to go, or None while unknown.
        loss: training loss in nats per token, a running mean.
        validation: last validation loss in nats per token.
        tokens_per_second: training speed.
        losses: every training loss, for the sparkline.
    """

    step: int = 0
    progress: float = 0.0
    elapsed: float = 0.0
    remaining: float | None = None
    loss: float | None = None
    validation: float | None = None
    tokens_per_second: float | None = None
    losses: list[float] = field(default_factory=list)


class TrainingDisplay:
    """A context manager that shows :class:`Figures` as they come.

    With ``Live``, the panel is drawn over and over; without a terminal, about twenty lines tell the whole run.
    """

    def __init__(self, console: Console, bits_per_nat: float | None = None):
        """Shows nothing yet.

        Args:
            console: where to.
            bits_per_nat: bits per byte of one nat per token, on the validation text; None leaves bits per byte out.
        """
        self.console, self.bits_per_nat = console, bits_per_nat
        self.figures = Figures()
        self._printed = -1
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[clock]}"),
            console=console,
            auto_refresh=False,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("training", total=1.0, clock="compiling")
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._draw)

    def __enter__(self) -> "TrainingDisplay":
        if self.console.is_interactive:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def update(self, figures: Figures) -> None:
        """Show these figures."""
        self.figures = figures
        self._progress.update(self._task, completed=figures.progress, clock=self._clock())
        part = int(figures.progress * _LINES)
        if not self._live.is_started and part > self._printed and figures.loss is not None:
            if self._printed < 0:
                self.console.print(_HEADER, soft_wrap=True)
            self._printed = part
            self.console.print(self._line(), soft_wrap=True)

    def note(self, text: str) -> None:
        """A line that stays, above the panel."""
        self.console.print(text)

    def loss_text(self, nats: float | None) -> str:
        """A loss in nats per token and, where known, bits per byte."""
        if nats is None:
            return "-"
        bits = "" if self.bits_per_nat is None else f" ({nats * self.bits_per_nat:.3f} bits/byte)"
        return f"{nats:.3f} nats{bits}"

    def _clock(self) -> str:
        figures = self.figures
        left = f", {duration(figures.remaining)} to go" if figures.remaining is not None else ""
        return f"{duration(figures.elapsed)}{left}"

    def _speed(self) -> str:
        speed = self.figures.tokens_per_second
        return "-" if speed is None else f"{count(speed)} tokens/s"

    def _draw(self) -> Group:
        figures = self.figures
        grid = Table.grid(padding=(0, 3))
        for name, value in (
            ("step", count(figures.step)),
            ("training loss", self.loss_text(figures.loss)),
            ("validation loss", self.loss_text(figures.validation)),
            ("speed", self._speed()),
        ):
            grid.add_row(Text(f"  {name}", style="dim"), value)
        if len(figures.losses) > 1:
            grid.add_row(Text("  course", style="dim"), Text(sparkline(figures.losses), style="cyan"))
        return Group(self._progress, grid)

    def _line(self) -> str:
        figures = self.figures
        left = "-" if figures.remaining is None else _clock(figures.remaining)
        train, validation = self._both(figures.loss), self._both(figures.validation)
        speed = "-" if figures.tokens_per_second is None else count(figures.tokens_per_second)
        return (
            f"{figures.progress:5.0%} {_clock(figures.elapsed):>8} {left:>8} {figures.step:>7,} "
            f"{train[0]:>8} {train[1]:>10} {validation[0]:>8} {validation[1]:>10} {speed:>10}"
        )

    def _both(self, nats: float | None) -> tuple[str, str]:
        if nats is None:
            return "-", "-"
        return f"{nats:.3f}", "-" if self.bits_per_nat is None else f"{nats * self.bits_per_nat:.3f}"


def _clock(seconds: int | float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


_HEADER = (
    f"{'done':>5} {'time':>8} {'to go':>8} {'step':>7} {'training':>8} {'bits/byte':>10} {'valid.':>8} {'bits/byte':>10} "
    f"{'tokens/s':>10}"
)
