"""What became of a call to MLflow, and what of an address may be shown when that is told."""

from __future__ import annotations

import re

from raylm.redaction import redacted
from raylm.tracking import models

WRONG_HOST = "Invalid Host header"
"""What `mlflow server` says to a name that is not among its --allowed-hosts, with the status of a missing password."""

CUT_OFF = ("unreachable", "denied", "wrong host")
"""Kinds of failure that every other call would have, too."""


class Unusable(Exception):
    """A tracking URI that will never work."""


class Busy(Exception):
    """Another process ships this journal."""


class Deleted(Exception):
    """The run was deleted in MLflow."""


class NotStored(Exception):
    """The artifact store, which is another service, did not take an artifact."""

    remedy = ""

    def __init__(self, name: str, error: Exception):
        # boto3 begins with the paths on both sides, of 200 characters and more.
        super().__init__(f"{name}: {re.sub('^Failed to upload .+? to .+?: ', '', str(error))}")
        if isinstance(error, ModuleNotFoundError):
            self.remedy = f": pip install {error.name}"
        elif type(error).__module__.startswith("boto"):  # it is S3, and this process writes to it
            self.remedy = "; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL in the environment"


def kind(error: Exception) -> str:
    """What became of a call to MLflow.

    Only what is `unreachable`, `denied`, the `wrong host` or `not stored` is worth another try.
    """
    if isinstance(error, Deleted | NotStored | models.Unfit):
        return {Deleted: "deleted", NotStored: "not stored", models.Unfit: "refused"}[type(error)]
    if WRONG_HOST in str(error):
        return "wrong host"
    code = getattr(error, "error_code", None)
    answer = str(getattr(error, "json", ""))  # a proxy's own, of which MLflow knows no code
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED") or re.search(
        r"\b40[13]\b|unauthori[sz]ed|forbidden", answer, re.IGNORECASE
    ):
        return "denied"
    if code == "RESOURCE_DOES_NOT_EXIST":
        return "missing"
    if code in ("INVALID_PARAMETER_VALUE", "INVALID_STATE") or "error code 413" in str(error):
        return "refused"
    return "unreachable"


def shown(uri: str) -> str:
    """A tracking URI as it is named to people: without a password, and without options."""
    return uri if uri.startswith("sqlite") else redacted(uri).partition("?")[0]
