"""What --help prints: the usage, and every option with its type, default and comment."""
import inspect
import re
import shutil
import sys
import textwrap
import types
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent


def print_help(schemas, kinds, words, doc):
    """One option a line, as wide as the terminal; kinds: {option: type}."""
    width = max(50, shutil.get_terminal_size().columns - 1)
    usage = [f"[{word.replace('*', ' ...')}]" for word in words] + ["[--key=value ...]"]
    lines = [f"usage: python {program()} {' '.join(usage)}", "", (doc or "").strip()]
    for schema in schemas:
        lines += ["", schema.__name__]
        comments = field_comments(schema)
        for f in fields(schema):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            default = "required" if default is MISSING else repr(default)
            option = f"  --{f.name}={type_name(kinds[f.name])}"
            lines += textwrap.wrap(f"{option:36}  {default:8}  {comments.get(f.name, '')}", width,
                                   subsequent_indent=" " * min(48, width // 3),
                                   break_on_hyphens=False)
    print("\n".join(lines), flush=True)  # in one piece: `--help | head` is no broken pipe


def program():
    """What the user typed after `python`: train.py, or -m lab.bench."""
    script = Path(sys.argv[0]).resolve()
    if script.parent.parent != ROOT:
        return script.name
    return f"-m {script.parent.name}.{script.stem}"


def type_name(kind):
    if get_origin(kind) in (Union, types.UnionType, Literal):
        return "|".join(a if isinstance(a, str) else type_name(a) for a in get_args(kind))
    return "None" if kind is types.NoneType else kind.__name__


def field_comments(schema):
    """{field: the comment behind it, with the comment lines right below it}, base classes first"""
    comments = {}
    for cls in filter(is_dataclass, reversed(schema.__mro__)):
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # no file holds it
            continue
        for name, comment in re.findall(r"^ +(\w+): .*?  # (.*(?:\n +#.*)*)", source, re.M):
            comments[name] = re.sub(r"\s*\n +#", "", comment)
    return comments
