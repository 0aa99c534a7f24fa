"""How pictures are drawn: matplotlib's SVG, without its colours and fonts, which are the page's.

A picture is drawn once, in colours that stand for CSS variables. They are put in the place of these colours
afterwards, so that the page shows one picture on light and on dark paper. All pictures have about the width of a narrow
column and grow with theirs: letters that can be read on a phone can be read everywhere.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from matplotlib import style
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.0, 3.1  # inches of 72 units; the page scales them
FONT = 10.5  # points
COLOURS = 7
# What stands for a CSS variable while matplotlib draws: no other thing in a picture has these colours.
VARIABLES = {
    "ink": "#010203",
    "muted": "#010204",
    "grid": "#010205",
    **{f"c{i}": f"#0102{0x10 + i:02x}" for i in range(COLOURS)},
}
# Lines that can be told apart in black and white.
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1.5)))
MARKERS = "os^DvP"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.size": FONT,
    "font.family": "sans-serif",
    "axes.edgecolor": VARIABLES["muted"],
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelcolor": VARIABLES["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": VARIABLES["grid"],
    "grid.linewidth": 0.7,
    "text.color": VARIABLES["ink"],
    "xtick.color": VARIABLES["muted"],
    "ytick.color": VARIABLES["muted"],
    "xtick.labelcolor": VARIABLES["ink"],
    "ytick.labelcolor": VARIABLES["ink"],
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": False,
    "text.parse_math": False,
}


def colour(number: int) -> str:
    """The colour of group `number` while matplotlib draws."""
    return VARIABLES[f"c{number % COLOURS}"]


def dashes(number: int) -> Any:
    """The dashes of the line of group `number`: with the colour, there are 35 pairs."""
    return DASHES[number % len(DASHES)]


@contextmanager
def drawing() -> Iterator[None]:
    """Within it, matplotlib has the style of the page, whatever the user's own matplotlibrc says."""
    with style.context(["default", STYLE]):
        yield


class Picture:
    """One picture: draw on `axes` inside `drawing`, then ask for `svg`.

    name: prefix of every id in the SVG; no two pictures of a page have the same.
    title: what the picture shows, for those who cannot see it.
    """

    def __init__(self, name: str, *, title: str, height: float = HEIGHT, margins: tuple[float, ...] = ()) -> None:
        self.name, self.title = name, title
        left, right, bottom, top = margins or (0.84, 0.12, 0.52, 0.2)  # inches
        with drawing():
            self.figure = Figure(figsize=(WIDTH, height))
            self.axes: Axes = self.figure.add_axes(
                (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
            )

    def svg(self) -> str:
        """The picture as an SVG element without a size of its own."""
        buffer = io.StringIO()
        with drawing():
            self.figure.patch.set_visible(False)
            for axes in self.figure.axes:
                axes.patch.set_visible(False)
            FigureCanvasSVG(self.figure).print_svg(buffer, metadata={"Date": None})
        return _of_the_page(buffer.getvalue(), name=self.name, title=self.title)


def _of_the_page(svg: str, *, name: str, title: str) -> str:
    """matplotlib's SVG as an element of the page: its colours, its fonts, ids of its own, no more digits than seen."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    body = svg[svg.index(">", box.start()) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r'\b(id="|href="#)', rf"\1{name}-", body).replace("url(#", f"url(#{name}-")
    body = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)  # before matplotlib 3.11
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    for variable, stand_in in VARIABLES.items():
        body = body.replace(stand_in, f"var(--{variable})")
    body = re.sub(r"\s*\n\s*", " ", body).rstrip()
    return f'<svg role="img" aria-label="{escape(title)}" {box[0]}>{body}'


def plain_number(value: float, _: Any = None) -> str:
    """A number in at most six letters or so: 1,500, 15k, 2.5M, 0.025, 2.5e-4."""
    if 0 < abs(value) < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


NUMBERS = FuncFormatter(plain_number)


def whole_numbers(axes: "Axes") -> None:
    """An axis of updates or tokens: few ticks, as short as can be."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(NUMBERS)
