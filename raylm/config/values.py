"""Types of values that settings have: what is accepted, and what is said of anything else."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _class_names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError(f"must be package.module:Class, got {value}")
    return values


def _name(value: str) -> str:
    if re.fullmatch(_NAME, value):
        return value
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    near = re.sub(r"[^A-Za-z0-9._]+", "-", plain).strip("-._")
    raise ValueError(
        f"must be letters, digits, dashes, dots and underscores, with a letter or digit first; got {value!r}"
        + (f"; try {near}" if near else "")
    )


def _registered_name(value: str) -> str:
    if not value or re.search(r"[/:'\"]", value):
        raise ValueError(f"must be a name without slashes, colons and quotes, got {value!r}")
    return value


def _named_paths(value: Any) -> Any:
    """Paths, or a mapping of the user's own names to paths; checked here so that an error names the setting."""
    if isinstance(value, Mapping):
        for name, paths in value.items():
            if not isinstance(name, str) or not re.fullmatch(_NAME, name):
                raise ValueError(f"must have names of letters, digits, dots, dashes, underscores; got {name!r}")
            if not _listed(paths) or not _are_texts(_listed(paths)):
                raise ValueError(f"must have text or a list of texts for {name}, got {paths!r}")
        return {name: tuple(_listed(paths)) for name, paths in value.items()}
    if not _are_texts(_listed(value)):
        raise ValueError(f"must be text, a list of texts or a mapping of names to them, got {value!r}")
    return tuple(_listed(value))


def _metric(value: Any) -> Any:
    """A score or a mapping of weights; checked here so that an error names all that is accepted."""
    if isinstance(value, Mapping):
        if not value:
            raise ValueError("must have a weight for at least one source or set, got {}")
        for name, weight in value.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ValueError(f"must have a weight above 0 for {name}, got {weight!r}")
        return {name: float(weight) for name, weight in value.items()}
    if value not in ("perplexity", "bits_per_byte"):
        raise ValueError(
            f"must be perplexity, bits_per_byte or weights of sources and sets, {{a: 1, b: 2}}; got {value!r}"
        )
    return value


def _points(value: Any) -> Any:
    """Settings to try first; checked here so that an error names all that is accepted."""
    if value == "suggested":
        return value
    if not isinstance(value, (list, tuple)) or not all(
        isinstance(point, Mapping) and all(isinstance(key, str) for key in point) for point in value
    ):
        raise ValueError(f"must be suggested or a list of settings to try, [{{train.seed: 1}}], got {value!r}")
    return tuple(dict(point) for point in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression, got {value!r}: {error}") from None
    return value


def _unescaped(value: str) -> str:
    r"""Text in which \n, \r, \t and \f stand for the characters, even where YAML or a shell did not replace them."""
    return re.sub(r"\\([nrtf])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "f": "\f"}[match[1]], value)


def _encoding(value: str) -> str:
    try:
        "".encode(value)
    except LookupError:
        raise ValueError(f"must be an encoding that Python knows, such as cp1252 or utf-16; got {value!r}") from None
    return value


def _template(value: str) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"must be a column or a template of columns in braces, got {value!r}: {error}") from None
    if "" in names:
        raise ValueError(f"must name the column between its braces, got {value!r}")
    return value


def _exact(value: Any) -> Any:
    return "exact" if value is True else value


def _range(value: Any) -> Any:
    """A number, or (fewest, most)."""
    if not isinstance(value, (list, tuple)):
        return _whole(value)
    pair = tuple(_whole(each) for each in value)
    if len(pair) != 2 or not all(isinstance(each, int) and not isinstance(each, bool) for each in pair):
        raise ValueError(f"must be a number of workers or [fewest, most], got {list(value)}")
    if not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"must be [fewest, most] with 1 <= fewest <= most, got {list(value)}")
    return pair


def _switch(value: Any) -> Any:
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _amount_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf):
        return value
    raise ValueError(f"must be auto or a number more than 0, got {value!r}")


def _other_kinds(value: Mapping[str, float]) -> Mapping[str, float]:
    for kind in {"CPU", "GPU"} & value.keys():
        raise ValueError(f"must not have {kind}: that is cluster.{kind.lower()}s_per_worker")
    return value


# What stands before a check may take more than the type says: `json_schema_input_type` is all of it, for `schema`.
Count = Annotated[int, BeforeValidator(_whole)]  # 1e6 is a float in YAML and a fine number of tokens
Positive = Annotated[float, Field(gt=0)]
Escaped = Annotated[str, AfterValidator(_unescaped)]
Numbers = Annotated[tuple[int | float, ...], Strict(False)]
Strings = Annotated[
    tuple[str, ...], BeforeValidator(_listed, json_schema_input_type=str | tuple[str, ...]), Strict(False)
]
Name = Annotated[str, AfterValidator(_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME}$"})]
RegisteredName = Annotated[str, AfterValidator(_registered_name)]
ClassNames = Annotated[Strings, AfterValidator(_class_names)]
NamedPaths = Annotated[
    tuple[str, ...] | dict[str, tuple[str, ...]],
    BeforeValidator(_named_paths, json_schema_input_type=str | tuple[str, ...] | dict[Name, str | tuple[str, ...]]),
]
Column = Annotated[Escaped, AfterValidator(_template)]
Encoding = Annotated[str, AfterValidator(_encoding)]
RegularExpression = Annotated[str, AfterValidator(_regular_expression)]
Duplicates = Annotated[
    Literal[False, "exact", "near"],
    BeforeValidator(_exact, json_schema_input_type=Literal[False, True, "exact", "near"]),
]
Workers = Annotated[
    Annotated[int, Field(ge=1)] | tuple[int, int],
    BeforeValidator(
        _range,
        json_schema_input_type=Annotated[int, Field(ge=1)]
        | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)],
    ),
]
Switch = Annotated[
    Literal["off", "on", "auto"],
    BeforeValidator(_switch, json_schema_input_type=bool | Literal["off", "on", "auto"]),
]
AmountOrAuto = Annotated[
    float | Literal["auto"],
    BeforeValidator(_amount_or_auto, json_schema_input_type=Positive | Literal["auto"]),
]
OtherResources = Annotated[Mapping[str, Positive], AfterValidator(_other_kinds)]
Metric = Annotated[
    Literal["perplexity", "bits_per_byte"] | dict[str, float],
    BeforeValidator(
        _metric,
        json_schema_input_type=Literal["perplexity", "bits_per_byte"]
        | Annotated[dict[str, Positive], Field(min_length=1)],
    ),
]
Points = Annotated[
    Literal["suggested"] | tuple[dict[str, Any], ...],
    BeforeValidator(_points, json_schema_input_type=Literal["suggested"] | tuple[dict[str, Any], ...]),
]
