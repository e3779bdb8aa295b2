"""A setting's text (or a config file's object) as a value of its field's type."""
import contextlib
import re
import types
from dataclasses import MISSING
from typing import Literal, Union, get_args, get_origin

from support.usage import fail, type_name

BOOLS = {"true": True, "1": True, "false": False, "0": False}


def number(text, kind):
    """1 is a float, 1e3 is an int; 2.5 and inf are no int, and nan is never meant."""
    if kind is int and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    value = float(text)
    return kind(value) if value == value and (kind is float or value.is_integer()) else MISSING


def several(value, kinds):
    items = value.strip(" ()[]").split(",") if isinstance(value, str) else value
    items = items if isinstance(items, (list, tuple)) else [items]
    kind = kinds[0] if kinds else int | float | None
    converted = tuple(convert(item, kind) for item in items if item != "")
    return MISSING if MISSING in converted else converted


CONVERTERS = {  # of a value, its text and the type's arguments; a union takes the first that fits
    types.NoneType: lambda value, text, _: None if text == "None" else MISSING,
    int: lambda value, text, _: number(text, int),
    float: lambda value, text, _: number(text, float),
    bool: lambda value, text, _: BOOLS[text.lower()],
    tuple: lambda value, text, kinds: several(value, kinds),
    Literal: lambda value, text, words: {str(w).lower(): w for w in words}[text.lower()],
    str: lambda value, text, _: value if isinstance(value, str) else MISSING,
}


def convert(value, kind, where=None):
    """`value` (text, or a config file's object) as a `kind`; else MISSING, or fail naming where."""
    union = get_origin(kind) in (Union, types.UnionType)
    kinds = {get_origin(k) or k: get_args(k) for k in (get_args(kind) if union else [kind])}
    for origin in [o for o in CONVERTERS if o in kinds]:
        with contextlib.suppress(KeyError, ValueError):
            converted = CONVERTERS[origin](value, str(value).strip(), kinds[origin])
            if converted is not MISSING:
                return converted
    if where is None:
        return MISSING
    too_long = isinstance(value, int) and abs(value) >= 10**80  # Python refuses to print 10**5000
    got = "a number of over 80 digits" if too_long else f"{value!r:.80}"
    return fail(f"{where}: expected {type_name(kind)}, got {got}")
