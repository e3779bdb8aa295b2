"""Settings of every script: dataclass defaults < config file < command line.

    parsed = parse(ModelConfig, TrainConfig, words=("config",), doc=__doc__)
    model_config, train_config = parsed.make(ModelConfig), parsed.make(TrainConfig)

    python train.py config/tiny_moe.py --max_steps=200 --lr 1e-3 --overwrite

The fields of all schemas form one flat namespace. A config file is plain Python assignments; it may
build on another (`from config.tiny_moe import *`), and names that start with `_` are its own
business. `--key=value`, `--key value` and, for booleans, `--key` mean the same, and so do hyphens
and underscores. A mistake is one line and exit code 2.
"""
import ast
import dataclasses
import difflib
import inspect
import itertools
import re
import shutil
import sys
import textwrap
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
NONE, UNIONS = type(None), (typing.Union, types.UnionType)
MISSING = dataclasses.MISSING


def fail(message):
    """End the program because of a user's mistake: one line on stderr, exit code 2."""
    print("error: " + str(message).replace("\n", " "), file=sys.stderr)
    sys.exit(2)


@dataclasses.dataclass
class Parsed:
    words: dict  # name of a positional word -> its text, None, or a list for a name with a star
    given: dict  # key -> value (typed), for every key that config file or command line sets

    def make(self, schema):
        """A `schema` of what was given; a ValueError of its __post_init__ is the user's mistake."""
        for f in dataclasses.fields(schema):
            if f.name not in self.given and f.default is f.default_factory is MISSING:
                fail(f"--{f.name} is required (see --help)")
        mine = {f.name for f in dataclasses.fields(schema)} & self.given.keys()
        try:
            return schema(**{key: self.given[key] for key in mine})
        except ValueError as error:
            fail(error)


def parse(*schemas, argv=None, words=(), doc="") -> Parsed:
    """Read the command line (`argv`, or sys.argv) and the config file it names.

    schemas: dataclasses. words: names of optional positional words: "config" is run as a config
    file, and a last name with a star ("sources*") takes all that follow. doc: printed by --help.
    """
    kinds = {}
    for schema in schemas:
        for key, kind in typing.get_type_hints(schema).items():
            if key in kinds:
                raise TypeError(f"{schema.__name__}.{key}: another schema has a field of this name")
            kinds[key] = kind
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print_help(schemas, kinds, words, doc)
        sys.exit(0)
    positional, options = split_arguments(argv, kinds)
    words = name_words(positional, words)
    given = run_config_file(words["config"], kinds) if words.get("config") else {}
    for key, value in options.items():
        given[key] = checked(value, kinds[key], f"--{key}")
    return Parsed(words, given)


# ---- the command line

def split_arguments(argv, kinds):
    """-> positional words, {key: its text, or True for a bare flag}"""
    positional, options, rest = [], {}, list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        key = name.lstrip("-").replace("-", "_")
        if not name.startswith("--") and key in kinds and (name.startswith("-") or equals):
            fail(f"'{argument}': an option starts with two hyphens: --{argument.lstrip('-')}")
        if not name.startswith("-"):
            positional.append(argument)
            continue
        if key not in kinds:
            fail(f"unknown option {name}{nearest(key, kinds, '--') or ' (--help lists them)'}")
        if not equals:  # a flag takes the next word only if it reads as its value
            flag, follows = accepts(True, kinds[key]), rest and not rest[0].startswith("--")
            value = True
            if follows and (not flag or accepts(rest[0], kinds[key])):
                value = rest.pop(0)
            elif not flag:
                fail(f"--{key} needs a value: {type_name(kinds[key])}")
        options[key] = value
    return positional, options


def name_words(rest, names):
    """-> {name: word, or None, or a list}"""
    words = {}
    for name in names:
        if name.endswith("*"):
            words[name[:-1]], rest = rest, []
        else:
            words[name], rest = next(iter(rest), None), rest[1:]
    if rest:
        fail(f"unexpected word '{rest[0]}'; expected {' '.join([*names, '--key=value'])} "
             "(--help lists the keys)")
    return words


def nearest(key, known, prefix=""):
    """The hint that ends an error about an unknown key; empty if nothing is close."""
    known, initials = list(known), "".join(w[:1] for w in key.split("_"))  # learning_rate is lr
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    close = [initials] if initials in known else close
    return f": did you mean {prefix}{close[0]}?" if close else ""


# ---- config files

def run_config_file(path, kinds):
    """Execute a config file with the project root importable. -> {key: value}, typed"""
    path = Path(path)
    if not path.is_file():
        others = map(str, [*path.parent.glob("*.py"), *Path().glob("config/*.py")])
        fail(f"no config file '{path}'{nearest(str(path), list(others))}")
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
    given = {}
    for key, value in scope.items():
        if key in kinds:
            given[key] = checked(value, kinds[key], f"{path}: {key}")
        elif not (key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)):
            fail(f"{path}: unknown key {key}{nearest(key, kinds)} (your own names start with _)")
    return given


# ---- values: text of the command line and objects of a config file go the same way

ORDER = (NONE, int, float, bool, tuple, typing.Literal, str)  # a union takes the first that fits


def convert(value, kind):
    """`value` as a `kind`, or ValueError. 1 is a float, 1e3 is an int, 2.5 is none."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    text = str(value).strip()
    if origin in UNIONS:
        for option in sorted(arguments, key=lambda a: ORDER.index(typing.get_origin(a) or a)):
            if accepts(value, option):
                return convert(value, option)
    if origin is NONE and text == "None":
        return None
    words = {"true": True, "1": True, "false": False, "0": False} if origin is bool else {}
    if origin is typing.Literal:
        words = {str(a).lower(): a for a in arguments}
    if text.lower() in words:
        return words[text.lower()]
    if origin is int and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    if origin in (int, float) and not isinstance(value, bool):
        number = float(text)
        if number == number and (origin is float or number.is_integer()):  # nan is never meant
            return origin(number)
    if origin is tuple:
        items = text.strip("()[]").split(",") if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        item = arguments[0] if arguments else int | float | None
        return tuple(convert(i, item) for i in items if i != "")
    if origin is str and isinstance(value, str):
        return value
    raise ValueError(value)


def accepts(value, kind):
    try:
        convert(value, kind)
        return True
    except ValueError:
        return False


def checked(value, kind, where):
    if not accepts(value, kind):
        fail(f"{where}: expected {type_name(kind)}, got {value!r:.80}")
    return convert(value, kind)


def type_name(kind):
    if typing.get_origin(kind) in (*UNIONS, typing.Literal):
        return "|".join(a if isinstance(a, str) else type_name(a) for a in typing.get_args(kind))
    return "None" if kind is NONE else kind.__name__


# ---- help

def print_help(schemas, kinds, words, doc):
    """One option a line, as wide as the terminal: name, type, default, comment in the source."""
    usage = [f"[{word.replace('*', ' ...')}]" for word in words] + ["[--key=value ...]"]
    width = max(50, shutil.get_terminal_size().columns - 1)
    lines = [f"usage: python {Path(sys.argv[0]).name} {' '.join(usage)}", "", (doc or "").strip()]
    for schema in schemas:
        lines += ["", schema.__name__]
        comments = field_comments(schema)
        for f in dataclasses.fields(schema):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            default = "required" if default is MISSING else repr(default)
            option = f"  --{f.name}={type_name(kinds[f.name])}"
            lines += textwrap.wrap(f"{option:36}  {default:8}  {comments.get(f.name, '')}", width,
                                   subsequent_indent=" " * min(48, width // 3),
                                   break_on_hyphens=False)
    print("\n".join(lines), flush=True)  # in one piece: `--help | head` is no broken pipe


def field_comments(schema):
    """{field: the comment behind it, with the comment lines right below it}, base classes first"""
    comments = {}
    for cls in (c for c in reversed(schema.__mro__) if dataclasses.is_dataclass(c)):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError):  # no file holds it
            continue
        lines = source.splitlines()
        for node in (n for n in ast.parse(source).body[0].body if isinstance(n, ast.AnnAssign)):
            tail = lines[node.end_lineno - 1].encode()[node.end_col_offset:]  # ast counts bytes
            parts = [tail.decode().partition("#")[2]]
            for line in itertools.takewhile(re.compile(r"\s*#").match, lines[node.end_lineno:]):
                parts.append(line.strip()[1:])
            comments[node.target.id] = " ".join(part.strip() for part in parts)
    return comments
