"""Settings of every script: dataclass defaults < config file < command line.

    python train.py config/tiny_moe.py --max_steps=200 --lr 1e-3 --overwrite

The fields of all schemas form one flat namespace. A config file is plain Python assignments; it may
build on another (`from config.tiny_moe import *`), and names that start with `_` are its own
business. `--key=value`, `--key value` and, for booleans, `--key` mean the same, and so do hyphens
and underscores. A mistake is one line and exit code 2.
"""
import difflib
import signal
import sys
import traceback
import types
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from support.convert import convert
from support.usage import fail, print_help, type_name

ROOT = Path(__file__).resolve().parent


@dataclass
class Parsed:
    words: dict  # name of a positional word -> its text, None, or a list for a name with a star
    given: dict  # key -> value (typed), for every key that config file or command line sets

    def make(self, schema):
        """A `schema` of what was given; a ValueError of its __post_init__ is the user's mistake."""
        mine = {f.name: self.given[f.name] for f in fields(schema) if f.name in self.given}
        for f in fields(schema):
            if f.name not in mine and f.default is f.default_factory is MISSING:
                fail(f"--{f.name} is required (see --help)")
        try:
            return schema(**mine)
        except ValueError as error:
            fail(error)


def parse(*schemas, argv=None, words=(), doc="") -> Parsed:
    """Read the command line (`argv`, or sys.argv) and the config file it names.

    schemas: dataclasses. words: names of optional positional words: "config" is run as a config
    file, and a last name with a star ("sources*") takes all that follow. doc: printed by --help.
    """
    kinds, named = {}, {}
    for schema in schemas:
        for key in kinds.keys() & get_type_hints(schema):
            raise TypeError(f"{schema.__name__}.{key}: another schema has a field of this name")
        kinds |= get_type_hints(schema)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # a script's, while it was loading
        signal.signal(signal.SIGINT, signal.default_int_handler)
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print_help(schemas, kinds, words, doc)
        sys.exit(0)
    rest, options = split_arguments(argv, kinds)
    for name in words:
        if name.endswith("*"):  # takes all that follow
            named[name.rstrip("*")], rest = rest, []
        else:
            named[name] = rest.pop(0) if rest else None
    if rest:
        fail(f"unexpected word '{rest[0]}'; expected {' '.join([*words, '--key=value'])} "
             "(--help lists the keys)")
    given = run_config_file(named["config"], kinds) if named.get("config") else {}
    given |= {key: convert(value, kinds[key], f"--{key}") for key, value in options.items()}
    return Parsed(named, given)


def split_arguments(argv, kinds):
    """-> positional words, {key: its text, or True for a bare flag}"""
    positional, options = [], {}
    while argv:
        argument, *argv = argv
        name, equals, value = argument.partition("=")
        key = name.lstrip("-").replace("-", "_")
        hyphens = len(name) - len(name.lstrip("-"))
        if key in kinds and hyphens < 2 and (hyphens or equals):
            fail(f"'{argument}': an option starts with two hyphens: --{argument.lstrip('-')}")
        kind = kinds.get(key)
        flag = convert(True, kind) is not MISSING
        value_follows = argv and not argv[0].startswith("--")
        if flag and value_follows:  # a flag takes the next word only if it reads as its value
            value_follows = convert(argv[0], kind) is not MISSING
        if not hyphens:
            positional.append(argument)
        elif key not in kinds:
            fail(f"unknown option {name}{nearest(key, kinds, '--') or ' (--help lists them)'}")
        elif equals:
            options[key] = value
        elif value_follows:
            options[key], *argv = argv
        elif flag:
            options[key] = True
        else:
            fail(f"--{key} needs a value: {type_name(kind)}")
    return positional, options


def nearest(key, known, prefix=""):
    """The hint that ends an error about an unknown key; empty if nothing is close."""
    known, initials = list(known), "".join(w[:1] for w in key.split("_"))  # learning_rate is lr
    close = [initials] * (initials in known) or difflib.get_close_matches(key, known, 1, 0.5)
    return f": did you mean {prefix}{close[0]}?" if close else ""


def run_config_file(path, kinds):
    """Execute a config file with the project root importable. -> {key: value}, typed"""
    path, given = Path(path), {}
    if not path.is_file():
        others = map(str, [*path.parent.glob("*.py"), *Path().glob("config/*.py")])
        fail(f"no config file '{path}'{nearest(str(path), others)}")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    scope = {"__name__": "__config__", "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), scope)
    except SyntaxError as error:
        fail(f"{error.filename or path}:{error.lineno or 1}: syntax error: {error.msg}")
    except (Exception, SystemExit) as error:  # whatever it does wrong is its author's to mend
        frames = traceback.extract_tb(error.__traceback__)[1:]
        lines = [f"{f.filename}:{f.lineno}" for f in frames if not f.filename.startswith("<frozen")]
        fail(f"{lines[-1] if lines else path}: {type(error).__name__}: {error}")
    for key, value in scope.items():
        if key in kinds:
            given[key] = convert(value, kinds[key], f"{path}: {key}")
        elif not (key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)):
            fail(f"{path}: unknown key {key}{nearest(key, kinds)} (your own names start with _)")
    return given
