"""Settings for every script: dataclass defaults < config file < command line.

    parsed = parse(ModelConfig, TrainConfig, words=("config",), doc=__doc__)
    model_config, train_config = parsed.make(ModelConfig), parsed.make(TrainConfig)

    python train.py config/tiny_moe.py --max_steps=200 --lr 1e-3 --overwrite

The fields of all schemas form one flat namespace. A config file is plain Python assignments; it may build on another
(`from config.tiny_moe import *`), and names that start with `_` are its own business. `--key=value`, `--key value` and,
for booleans, `--key` mean the same, and so do hyphens and underscores. A mistake is one line and exit code 2.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import textwrap
import traceback
import types
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent
UNIONS = (typing.Union, types.UnionType)
MISSING = dataclasses.MISSING


def fail(message):
    """End the program because of a user's mistake: one line on stderr, exit code 2."""
    print("error: " + str(message).replace("\n", " "), file=sys.stderr)
    sys.exit(2)


@dataclasses.dataclass
class Parsed:
    words: dict  # name of a positional word -> its text, None, or a list for a name with a star
    given: dict  # key -> value (typed), for every key that the config file or the command line sets

    def make(self, schema):
        """An instance of the dataclass `schema`; a ValueError of its __post_init__ becomes one line and exit code 2."""
        fields = [f for f in dataclasses.fields(schema) if f.init]
        for f in fields:
            if f.name not in self.given and f.default is MISSING and f.default_factory is MISSING:
                fail(f"--{f.name} is required (see --help)")
        try:
            return schema(**{f.name: self.given[f.name] for f in fields if f.name in self.given})
        except ValueError as error:
            fail(error)


def parse(*schemas, argv=None, words=(), doc=""):
    """Read the command line (`argv`, or sys.argv) and the config file it names. -> Parsed

    schemas: dataclass types.  words: names of optional positional words: "config" is executed as a config file,
    and a last name with a star ("sources*") collects all that follow.  doc: printed above the options by --help.
    """
    kinds = {}
    for schema in schemas:
        hints = typing.get_type_hints(schema)
        for f in (f for f in dataclasses.fields(schema) if f.init):
            if f.name in kinds:
                raise TypeError(f"{schema.__name__}.{f.name}: another schema has a field of this name")
            kinds[f.name] = hints[f.name]
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print_help(schemas, kinds, words, doc)
        sys.exit(0)
    positional, options = split_arguments(argv, kinds)
    words = name_words(positional, words)
    given = run_config_file(words["config"], kinds) if words.get("config") else {}
    return Parsed(words, given | {key: checked(value, kinds[key], f"--{key}") for key, value in options.items()})


# ---- the command line


def split_arguments(argv, kinds):
    """-> (positional words, {key: its text, or True for a bare flag})"""
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
            value, next_word = True, [word for word in rest[:1] if not word.startswith("--")]
            if next_word and (not accepts(True, kinds[key]) or accepts(next_word[0], kinds[key])):
                value = rest.pop(0)
            elif not accepts(True, kinds[key]):
                fail(f"--{key} needs a value: {type_name(kinds[key])}")
        options[key] = value
    return positional, options


def name_words(positional, names):
    """-> {name: word}; a word too many is an error."""
    words, rest = {}, list(positional)
    for name in names:
        words[name.rstrip("*")] = rest if name.endswith("*") else rest.pop(0) if rest else None
        rest = [] if name.endswith("*") else rest
    if rest:
        fail(f"unexpected word '{rest[0]}'; expected {' '.join([*names, '--key=value'])} (--help lists the keys)")
    return words


def nearest(key, known, prefix=""):
    """The hint that ends an error about an unknown `key`; empty if nothing is close."""
    known, initials = list(known), "".join(word[:1] for word in key.split("_"))  # learning_rate is lr
    close = [initials] if initials in known else difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f": did you mean {prefix}{close[0]}?" if close else ""


# ---- config files


def run_config_file(path, kinds):
    """Execute a config file with the project root importable. -> {key: value}, typed."""
    path = Path(path)
    if not path.is_file():
        others = [*path.parent.glob("*.py"), *Path().glob("config/*.py")]
        fail(f"no config file '{path}'{nearest(str(path), map(str, others))}")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    scope = {"__name__": "__config__", "__file__": str(path)}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), scope)
    except SyntaxError as error:
        fail(f"{error.filename or path}:{error.lineno or 1}: syntax error: {error.msg}")
    except (Exception, SystemExit) as error:  # whatever a config file does wrong is its author's to mend
        frames = [f for f in traceback.extract_tb(error.__traceback__)[1:] if not f.filename.startswith("<frozen")]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else path
        fail(f"{where}: {type(error).__name__}: {error}")
    given = {}
    for key, value in scope.items():
        if key in kinds:
            given[key] = checked(value, kinds[key], f"{path}: {key}")
        elif not (key.startswith("_") or isinstance(value, types.ModuleType) or callable(value)):
            fail(f"{path}: unknown key {key}{nearest(key, kinds)} (names of your own start with _)")
    return given


# ---- values: text from the command line and objects from a config file go the same way

ORDER = (type(None), int, float, bool, tuple, typing.Literal, str)  # a union takes the first of these that fits


def convert(value, kind):
    """`value` as a `kind`; ValueError if it is none. 1 is a float and 1e3 an int, but not 2.5; "None" is None."""
    origin, options = typing.get_origin(kind) or kind, typing.get_args(kind)
    text = str(value).strip()
    if origin in UNIONS:
        ordered = sorted(options, key=lambda option: ORDER.index(typing.get_origin(option) or option))
        return convert(value, next((option for option in ordered if accepts(value, option)), options[0]))
    if origin is type(None) and text == "None":
        return None
    if origin is typing.Literal:
        return {str(option).lower(): option for option in options}[text.lower()]
    if origin is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if origin is int and re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    if origin in (int, float) and not isinstance(value, bool):
        number = float(text)
        if number == number and (origin is float or number.is_integer()):  # nan is never meant
            return origin(number)
    if origin is tuple:
        items = text.strip("()[]").split(",") if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        return tuple(convert(item, options[0] if options else int | float | None) for item in items if item != "")
    if origin is str and isinstance(value, str):
        return value
    raise ValueError(value)


def accepts(value, kind):
    try:
        convert(value, kind)
        return True
    except (ValueError, KeyError):
        return False


def checked(value, kind, where):
    if not accepts(value, kind):
        fail(f"{where}: expected {type_name(kind)}, got {value!r:.80}")
    return convert(value, kind)


def type_name(kind):
    if typing.get_origin(kind) in (*UNIONS, typing.Literal):
        return "|".join(a if isinstance(a, str) else type_name(a) for a in typing.get_args(kind))
    return "None" if kind is type(None) else kind.__name__


# ---- help


def print_help(schemas, kinds, words, doc):
    """One line an option: name, type, default, and the comment that trails the field in the source."""
    usage = [f"[{word.replace('*', ' ...')}]" for word in words] + ["[--key=value ...]"]
    lines = [f"usage: python {Path(sys.argv[0]).name} {' '.join(usage)}", "", (doc or "").strip()]
    width = min(40, max((len(f"  --{key}={type_name(kind)}") for key, kind in kinds.items()), default=0))
    for schema in schemas:
        lines += ["", schema.__name__]
        comments = field_comments(schema)
        for f in (f for f in dataclasses.fields(schema) if f.init):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            default = "required" if default is MISSING else repr(default)
            option = f"  --{f.name}={type_name(kinds[f.name])}"
            lines.append(f"{option:{width}}  {default:12}  {comments.get(f.name, '')}".rstrip())
    print("\n".join(lines), flush=True)  # in one piece, so that `--help | head` is no broken pipe


def field_comments(schema):
    """{field: the comment behind it in the source}, base classes first; empty where there is no source to read."""
    comments = {}
    for cls in (c for c in reversed(schema.__mro__) if dataclasses.is_dataclass(c)):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError):
            continue
        lines = source.splitlines()
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                tail = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()  # ast counts bytes
                comments[node.target.id] = tail.partition("#")[2].strip()
    return comments
