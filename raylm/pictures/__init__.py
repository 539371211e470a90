"""The figures of a sweep: what they show as plain values, and two ways to draw it.

figures      a sweep -> figures, as plain values
looks        their colours
still        figure -> PNG, by matplotlib
interactive  figure -> what plotly.js draws
"""

from raylm.pictures.figures import Figure, Omitted, Sweep, of, short
from raylm.pictures.interactive import drawn, plotly_js
from raylm.pictures.still import png

__all__ = ["Figure", "Omitted", "Sweep", "drawn", "of", "plotly_js", "png", "short"]
