"""Text without the passwords that are in its addresses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET = re.compile(r"(token|secret|password|key)$")
"""The end of the name of a setting whose value may be a secret."""

_OF_THE_WEB = re.compile(r"(https?://)[^\s/'\"]*@", re.IGNORECASE)
"""A name in front of a web address may itself be a token."""

_OF_A_STORE = re.compile(
    r"((?:postgres(?:ql)?|mysql|mariadb|mssql|oracle|s3[an]?|gc?s|abfss?|wasbs?|az)(?:\+\w+)?://[^\s/@:'\"]*):(?:[^\s/'\"]*|[^\s@'\"]*)@"
)
"""Its password may have a slash: SQLAlchemy takes it, and half of the secret keys of AWS have one. A bucket has no port
that could be taken for the beginning of one."""

_OF_ANOTHER = re.compile(r"(://[^\s/@:'\"]*):[^\s/'\"]*@")

_OPTION = re.compile(
    r"([?&](?:[\w-]*(?:signature|credential|token|secret|password|api_?key|access_?key|secret_?key)|sig)=)[^\s&#'\"]+",
    re.IGNORECASE,
)


def redacted(value: Any) -> Any:
    """A text, or the texts in a tree of settings, without what opens an address: its password, in a web address the
    name too, and the values of options such as token, password and X-Amz-Signature. Other values as they are."""
    if isinstance(value, Mapping):
        return {key: redacted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(redacted, value))
    if not isinstance(value, str) or "://" not in value:
        return value
    text = _OF_THE_WEB.sub(r"\1", value)
    text = _OF_ANOTHER.sub(r"\1@", _OF_A_STORE.sub(r"\1@", text))
    return _OPTION.sub(r"\1…", text)
