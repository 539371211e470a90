"""What a training waits for its metrics: `python benchmarks/tracking.py`, about 4 minutes on 2 cores.

MLflow's own server in a process of its own, in three states: up, slow (a second an answer) and down. In each, by turns:

    file      a line of JSON appended to a file and no thread, every 20 ms: what the machine's mood alone costs
    raylm     run.log_metrics(), every 20 ms, 8 metrics a call: into the journal, from where a thread uploads them
    mlflow    MlflowClient.log_batch of the same, with 2 tries again of its usual 7, which would take 4 minutes a call

Prints milliseconds a call at the median, the 99th percentile and the most; how many points MLflow had in the end of
those that were told; and what share of a core the thread took, which is what a training on all cores loses.

2026-11-23, 2 cores shared with other work (load 8 to 10), mlflow 3.17, two turns, ms at the median and 99th percentile:
             file            raylm           mlflow         points in MLflow    thread
    up       0.20   0.37     0.20   4.66     61     151     3320 of 3320        0.019 of a core
             0.17   0.42     0.20   0.38     73     798     3456 of 3456        0.018
    slow     0.18   0.39     0.21   0.93     1060   1160    3472 of 3472        0.013
             0.20   0.37     0.21   0.54     1060   1220    3568 of 3568        0.016
    down     0.19   0.87     0.20   0.97     4550   4630    3832 of 3832        0.003
             0.18   0.32     0.20   0.57     4360   4640    3528 of 3528        0.004
"""

import argparse
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from raylm import tracking
from raylm.config import TrackingConfig

NAMES = [f"train/metric_{number}" for number in range(8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each way in each state and turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "DIRECTORY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(int(arguments.serve[0]), Path(arguments.serve[1]))
        return
    with tempfile.TemporaryDirectory() as root:
        server = Server(Path(root))
        section = TrackingConfig(uri=server.uri)
        for turn in range(arguments.turns):
            for state in ("up", "slow", "down"):
                directory = f"{root}/{turn}-{state}"
                bare, _ = told(arguments.seconds, appended(f"{root}/lines"), pause=0.02)
                run = tracking.start(section, experiment="benchmark", name=state, tags={}, directory=directory)
                server.become(state)
                ours, cpu = told(arguments.seconds, run.log_metrics, pause=0.02)
                theirs, _ = told(arguments.seconds, plain(server.uri, run.run_id), pause=0.02)
                server.become("up")
                is_uploaded = run.upload(60)
                points = sum(len(points) for points in series(server.uri, run.run_id).values())
                print(
                    json.dumps(
                        {
                            "server": state,
                            "file_ms": figures(bare),
                            "raylm_ms": figures(ours),
                            "mlflow_ms": figures(theirs),
                            "raylm_points": [points, len(NAMES) * len(ours)],
                            "is_uploaded": is_uploaded,
                            "thread_cores": round(cpu, 3),
                        }
                    ),
                    flush=True,
                )
        server.stop()


def told(seconds, tell, pause):
    """Milliseconds of each call, for that long; and the cores that other threads took meanwhile."""
    calls, step = [], 0
    begin, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
    while time.perf_counter() - begin < seconds:
        values = dict.fromkeys(NAMES, 1 / (step + 1))
        start = time.perf_counter()
        tell(values, step)
        calls.append(1000 * (time.perf_counter() - start))
        step += 1
        time.sleep(pause)
    others = (time.process_time() - cpu) - (time.thread_time() - own)
    return calls, others / (time.perf_counter() - begin)


def appended(path):
    def tell(values, step):
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "metrics": values}) + "\n")

    return tell


def plain(uri, run_id):
    """Straight to MLflow; a call that fails would end the training, or lose its points."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)

    def tell(values, step):
        now = int(time.time() * 1000)
        points = [Metric(f"plain/{name}", value, now, step) for name, value in values.items()]
        with contextlib.suppress(Exception):
            client.log_batch(run_id, metrics=points)

    return tell


def series(uri, run_id):
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return {name: client.get_metric_history(run_id, name) for name in NAMES}


def figures(calls):
    calls = sorted(calls)
    at = {"p50": calls[len(calls) // 2], "p99": calls[int(len(calls) * 0.99)], "most": calls[-1]}
    return {**{name: float(f"{value:.3g}") for name, value in at.items()}, "calls": len(calls)}


# The server --------------------------------------------------------------------------------------------------------


class Server:
    """MLflow's own application in a process of its own, in the state that one says."""

    def __init__(self, root):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self.state = root / "state"
        self.process = subprocess.Popen([sys.executable, __file__, "--serve", str(port), str(root)])
        self.become("up")

    def become(self, state):
        self.state.write_text(state)
        while self.answers() != (state != "down"):
            time.sleep(0.1)

    def answers(self):
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.uri}/health", timeout=60).status == 200
        return False

    def stop(self):
        self.process.kill()
        self.process.wait()


def serve(port, root):
    """On a database in `root`, for as long as the benchmark lives."""
    from werkzeug.serving import make_server

    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{root}/server.db"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = f"{root}/artifacts"
    from mlflow.server import app

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    state, server, benchmark = root / "state", None, os.getppid()

    def late(environ, respond):
        time.sleep(1.0 if state.read_text() == "slow" else 0.0)
        return app(environ, respond)

    while os.getppid() == benchmark:
        down = state.exists() and state.read_text() == "down"
        if server is None and not down:
            server = make_server("127.0.0.1", port, late, threaded=True)
            threading.Thread(target=server.serve_forever, daemon=True).start()
        elif server is not None and down:
            server.shutdown()
            server.server_close()
            server = None
        time.sleep(0.05)


if __name__ == "__main__":
    main()
