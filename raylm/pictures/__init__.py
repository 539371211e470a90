"""The figures of a sweep: what they show as plain values, and two ways to draw it.

marks        what a figure is made of, as plain values
trials       what is drawn: the trials of a sweep, their scores, and their settings on an axis
figures      a sweep -> figures
looks        their colours
still        figure -> PNG, by matplotlib
interactive  figure -> what plotly.js draws
"""

from raylm.pictures.figures import build
from raylm.pictures.interactive import drawn, plotly_js
from raylm.pictures.marks import Figure, Omitted
from raylm.pictures.still import png
from raylm.pictures.trials import Sweep, short

__all__ = ["Figure", "Omitted", "Sweep", "build", "drawn", "plotly_js", "png", "short"]
