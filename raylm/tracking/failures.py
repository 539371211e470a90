"""The ways in which a call to MLflow fails, and its address without secrets."""

from __future__ import annotations

import re

from raylm.redaction import redacted
from raylm.tracking import models

WRONG_HOST = "Invalid Host header"
"""What `mlflow server` answers to a host name that is not in its --allowed-hosts, with the status of a login error."""

CONNECTION_FAILURES = ("unreachable", "denied", "wrong host")
"""Kinds of failure that affect all calls."""


class Unusable(Exception):
    """A tracking URI that will never work."""


class Busy(Exception):
    """Another process uploads this journal."""


class Deleted(Exception):
    """The run was deleted in MLflow."""


class NotStored(Exception):
    """The artifact store, which may be another service, did not store an artifact."""

    remedy = ""

    def __init__(self, name: str, error: Exception):
        # boto3's message starts with the paths on both sides, 200 characters and more.
        super().__init__(f"{name}: {re.sub('^Failed to upload .+? to .+?: ', '', str(error))}")
        if isinstance(error, ModuleNotFoundError):
            self.remedy = f": pip install {error.name}"
        elif type(error).__module__.startswith("boto"):  # this process writes to S3 itself
            self.remedy = "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL in the environment"


def kind(error: Exception) -> str:
    """The kind of a failure.

    Only `unreachable`, `denied`, `wrong host` and `not stored` are worth a retry.
    """
    if isinstance(error, Deleted | NotStored | models.InvalidModel):
        return {Deleted: "deleted", NotStored: "not stored", models.InvalidModel: "refused"}[type(error)]
    if WRONG_HOST in str(error):
        return "wrong host"
    code = getattr(error, "error_code", None)
    answer = str(getattr(error, "json", ""))  # from a proxy, without a code of MLflow's
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED") or re.search(
        r"\b40[13]\b|unauthori[sz]ed|forbidden", answer, re.IGNORECASE
    ):
        return "denied"
    if code == "RESOURCE_DOES_NOT_EXIST":
        return "missing"
    if code in ("INVALID_PARAMETER_VALUE", "INVALID_STATE") or "error code 413" in str(error):
        return "refused"
    return "unreachable"


def display_uri(uri: str) -> str:
    """A tracking URI as raylm shows and records it: without a password, and without options."""
    return uri if uri.startswith("sqlite") else redacted(uri).partition("?")[0]
