"""What a program says to its user: --help, and every mistake in one line."""
import contextlib
import importlib
import inspect
import os
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
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `--help | head`; what Python flushes at its end goes nowhere, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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


def fail(message):
    """End the program because of a user's mistake: one line on stderr, exit code 2."""
    words = str(message).replace("\n", " ")
    words = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)
    print(f"error: {words}", file=sys.stderr)
    sys.exit(2)


def optional(module, extra, error=ImportError):
    """A module that an extra brings; where it is missing, the error says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.removeprefix("torch.utils.").partition(".")[0]
        raise error(f'{name} is not installed: pip install -e ".[{extra}]"') from None


@contextlib.contextmanager
def one_line(stopped="stopped by Ctrl-C", memory="a smaller model or batch fits"):
    """Around a program: what a user, a disk or a small machine did wrong is one line on stderr and
    exit code 2, Ctrl-C is 130. Any other error is ours, with its traceback.

    stopped, memory: what to say after Ctrl-C, and of a way out where memory ends.
    """
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        fail(f"{rank}{error}")
    except (MemoryError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no memory left"])[0]
        if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", reason):
            fail(f"{rank}out of memory; {memory}: {reason}")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"{rank}torch.compile failed, --compile=false does without: {reason}")
        raise
