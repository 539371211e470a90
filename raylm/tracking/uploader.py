"""The thread that uploads journals to one MLflow in the background, and pauses while it cannot be reached."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence

from raylm.tracking import journal
from raylm.tracking.failures import CONNECTION_FAILURES, Busy, Unusable, display_uri, kind
from raylm.tracking.server import Server
from raylm.tracking.upload import Upload

TIMEOUT_SECONDS = 5.0
"""How long a command waits for a server before it continues without it."""
EXIT_TIMEOUT_SECONDS = 3.0
"""How long a process that exits waits for a server."""
POLL_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0


class Uploader:
    """The uploads of this process to one MLflow, and their thread."""

    def __init__(self, server: Server):
        self.server = server
        self.has_answered = False
        """Whether MLflow has answered `connect`."""
        self.failure: Exception | None = None
        """First failure of the last round, since a caller started to wait."""
        self._request: Callable[[], object] | None = None
        """A call to MLflow that comes before any upload."""
        self._request_failure: Exception | None = None
        self._uploads: dict[str, Upload] = {}
        self._changed = threading.Condition()
        self._urgent = self._closing = False
        self._thread = threading.Thread(target=self._work, name="raylm-upload", daemon=True)
        self._thread.start()

    # Called by other threads ---------------------------------------------------------------------------------------

    def connect(self, experiment: str, metric: str, timeout_seconds: float) -> bool:
        """Look up or create the experiment; whether MLflow answers in time. Unusable if it never will."""
        self.server.check_file()
        failure = self._try(lambda: self.server.experiment_id(experiment, metric), timeout_seconds)
        if failure is None:
            self.has_answered = True
            return True
        if self.server.is_permanent(failure):
            raise Unusable(self.server.reason(failure)) from failure
        self.server.warn(failure)  # the uploads look it up again, and warn of what else goes wrong
        return False

    def problem(self, timeout_seconds: float) -> str | None:
        """Why MLflow does not answer in time, and the way out; None if it does."""
        failure = self._try(lambda: self.server.client.search_experiments(max_results=1), timeout_seconds)
        return None if failure is None else self.server.message(failure)

    def add(self, directory: str) -> None:
        """Upload this journal from now on, and all that will be added to it."""
        with self._changed:
            if directory not in self._uploads:
                self._uploads[directory] = self._upload(directory)
            self._uploads[directory].check_soon()

    def upload(self, directories: Sequence[str], timeout_seconds: float) -> bool:
        """Wait until these journals are uploaded, at most so long; whether they are."""
        for directory in directories:
            self.add(directory)
        with self._changed:
            self.failure = None  # an earlier failure may be over
        return self._wait_for(lambda: not any(self.pending(each) for each in directories), timeout_seconds)

    def pending(self, directory: str) -> int:
        """Number of entries of a journal that are not uploaded, as far as is recorded beside it."""
        return journal.pending(directory, journal.uploaded_offsets(directory, display_uri(self.server.uri)))

    def close(self, timeout_seconds: float) -> None:
        """Upload what can be uploaded at once, and stop the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _try(self, request: Callable[[], object], timeout_seconds: float) -> Exception | None:
        """Why MLflow does not answer a request in time; None if it does."""
        with self._changed:
            self._request, self._request_failure = request, None
        self._wait_for(lambda: self._request is None or self._request_failure is not None, timeout_seconds)
        if self._request is None:
            return None
        self._request = None
        return self._request_failure or TimeoutError(f"no answer within {timeout_seconds:g} s")

    def _wait_for(self, is_done: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait until it is done; whether it is in time. Meanwhile the thread pauses for a second at most."""
        next_urge = time.monotonic()
        deadline = next_urge + timeout_seconds
        with self._changed:
            while not is_done():
                now = time.monotonic()
                if now >= deadline or self._closing:
                    return False
                if now >= next_urge:
                    next_urge = now + POLL_SECONDS
                    self._urgent = True
                    self._changed.notify_all()
                self._changed.wait(min(next_urge, deadline) - now)
        return True

    # Run by the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause = POLL_SECONDS
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._closing, pause)
                closing, self._urgent = self._closing, False
            failure = self._upload_all()
            pause = min(2 * pause, MAX_PAUSE_SECONDS) if failure else POLL_SECONDS
            with self._changed:
                self.failure = failure
                self._changed.notify_all()

    def _upload_all(self) -> Exception | None:
        """Upload whatever is pending; the first failure, if any."""
        failure: Exception | None = None
        if (request := self._request) is not None:
            try:
                request()
                self._request = None
            except Exception as error:
                self._request_failure = error  # the thread that waits for the request reports it
                return error
        with self._changed:
            uploads = [upload for upload in self._uploads.values() if upload.is_due]
        for upload in uploads:
            try:
                upload.run()
            except Busy:
                continue
            except Exception as error:
                self.server.warn(error)
                failure = failure or error
                if kind(error) in CONNECTION_FAILURES:
                    break
            if upload.is_finished:
                with self._changed:
                    self._uploads.pop(upload.directory, None)
        return failure

    def _upload(self, directory: str) -> Upload:
        return Upload(directory, self.server, self._run_id)

    def _run_id(self, directory: str) -> str:
        """MLflow's id of the run that has its journal in this directory: the parent of another upload's run."""
        return (self._uploads.get(directory) or self._upload(directory)).run_id()


_uploaders: dict[tuple[int, str], Uploader] = {}


def get(uri: str) -> Uploader:
    """The uploader of this process for an MLflow. A forked process has one of its own, because threads do not fork."""
    key = os.getpid(), uri
    if key not in _uploaders:
        _uploaders[key] = Uploader(Server(uri))
    return _uploaders[key]


@atexit.register
def _close_all() -> None:
    for (process, _), uploader in _uploaders.items():
        if process == os.getpid():
            uploader.close(EXIT_TIMEOUT_SECONDS)
