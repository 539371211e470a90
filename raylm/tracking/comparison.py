"""The page of MLflow that compares the trials of a sweep: their score against the swept settings, and nothing else.

MLflow's own comparison of chosen runs draws the metric that was logged first against the first three parameters in
alphabetical order. Its page of runs draws a view: a tag of the experiment that holds the page's state as JSON, which
"Share view" sets (MLflow 3.17). A server that does not know such a tag shows all runs of the experiment.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

VIEW_TAG = "mlflow.sharedViewState."
"""MLflow's own tag of an experiment; the name of the view follows."""

LINK = "#comparison"
"""In a description, the link to the comparison; its address replaces it once the run is in MLflow."""

ML_PAGES = "workflowType=machine_learning"
"""Without this MLflow 3 shows its pages about agents."""


def run_path(experiment_id: str, run_id: str) -> str:
    """The path of a run's page below the address of MLflow."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{ML_PAGES}"


def comparison_path(experiment_id: str, view: str) -> str:
    """The path of the page that shows a view, below the address of MLflow."""
    return f"#/experiments/{experiment_id}/runs?{ML_PAGES}&compareRunsMode=CHART&viewStateShareKey={view}"


def view_state(*, trials: str, score: str, history: str, settings: Sequence[str]) -> str:
    """The value of the tag of a view, compressed as by MLflow itself, because a tag takes 5000 characters.

    `trials` is the filter that finds the trials, `score` the metric that ranks them, `history` the metric of every
    evaluation, `settings` the swept parameters.
    """
    one = _section("one", f"{score} against all settings", columns=1)
    each = _section("each", f"{score} against each setting", columns=2)
    during = _section("during", f"{history} during training", columns=1)
    charts = [
        _chart("PARALLEL", one, selectedParams=list(settings), selectedMetrics=[score], showAllRuns=True),
        *(
            _chart("SCATTER", each, xaxis={"key": key, "type": "PARAM"}, yaxis={"key": score, "type": "METRIC"})
            for key in settings
        ),
        _chart("LINE", during, **_LINE, metricKey=history, selectedMetricKeys=[history]),
    ]
    state = {
        "searchFilter": trials,
        "orderByKey": f"metrics.`{score}`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [f"metrics.`{score}`", *(f"params.`{key}`" for key in settings)],
        "runsHiddenMode": "SHOW_ALL",
        "runListHidden": True,  # beside the list, names of axes overlap at 1200 pixels
        "hideEmptyCharts": True,
        "isAccordionReordered": True,  # charts of other metrics follow these
        "compareRunCharts": charts,
        "compareRunSections": [one, each, during],
    }
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()


_LINE = {
    "lineSmoothness": 0,
    "xAxisScaleType": "linear",
    "scaleType": "log",
    "range": {},
    "xAxisKey": "metric",
    "selectedXAxisMetricKey": "train/tokens",
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "ignoreOutliers": False,
    "useGlobalXaxisKey": False,
    "useGlobalLineSmoothing": True,
}


def _section(uuid: str, name: str, columns: int) -> dict[str, Any]:
    flags = {"display": True, "isReordered": True, "deleted": False, "isGenerated": False}
    return {"uuid": uuid, "name": name, "columns": columns, "cardHeight": 430, **flags}


def _chart(kind: str, section: dict[str, Any], **settings: Any) -> dict[str, Any]:
    uuid = f"{section['uuid']}-{settings.get('xaxis', {}).get('key', '')}"
    flags = {"deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    return {"type": kind, "uuid": uuid, "metricSectionId": section["uuid"], **flags, **settings}
