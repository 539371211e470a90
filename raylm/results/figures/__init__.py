"""The figures of a sweep: what each shows as plain values, and two libraries that draw them.

primitives          lines, bars, cells and axes of a figure, with their colours
data                the trials of a sweep, their scores, their settings on an axis
sweep               a sweep's data -> its six figures
matplotlib_backend  figure -> PNG
plotly_backend      figure -> what plotly.js draws
"""

from raylm.results.figures.data import SweepData, short_name
from raylm.results.figures.matplotlib_backend import png
from raylm.results.figures.plotly_backend import plotly_figure, plotly_js
from raylm.results.figures.primitives import Figure, Omitted
from raylm.results.figures.sweep import build

__all__ = ["Figure", "Omitted", "SweepData", "build", "plotly_figure", "plotly_js", "png", "short_name"]
