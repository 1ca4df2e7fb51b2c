"""The demo's data set: questions and answers about the Python standard library.

The rows are made at run time from the signatures and docstrings of the interpreter that runs the
job, so the demo needs neither a network nor a data file, and none of that text lies in the
repository. They have the shape of the guanaco data set: `### Human: ...### Assistant: ...`.

The same Python version gives the same rows in the same order, in every process.
"""

import importlib
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

# Modules that import without a side effect or a deprecation warning on Python 3.11 to 3.13. Parts
# that a small build of Python leaves out (sqlite3, lzma, curses, ...) are mostly left out here too.
_MODULES = """
abc argparse array ast asyncio base64 binascii bisect builtins calendar cmath cmd code codecs
collections compileall concurrent.futures configparser contextlib copy csv dataclasses datetime
decimal difflib dis doctest email email.header email.message email.utils enum filecmp fileinput
fnmatch fractions functools gc getpass glob graphlib gzip heapq hmac html html.parser http.cookies
http.server importlib importlib.metadata importlib.resources importlib.util inspect io ipaddress
itertools json linecache locale logging logging.handlers marshal math mimetypes operator os os.path
pathlib pickle platform plistlib pprint pstats queue quopri random re reprlib secrets select
selectors shelve shlex shutil signal smtplib socket socketserver stat statistics string struct
subprocess sys sysconfig tarfile tempfile textwrap threading time timeit tokenize traceback
tracemalloc types unicodedata unittest unittest.mock urllib.parse urllib.request urllib.robotparser
uuid warnings weakref wsgiref.util xml.etree.ElementTree xml.sax.saxutils zipapp zipfile zlib
zoneinfo
""".split()

# Classes whose methods are asked about too. All classes together would outnumber the functions.
_METHODS_OF = frozenset(
    """
asyncio.Queue asyncio.StreamReader asyncio.StreamWriter bytes collections.Counter
collections.OrderedDict collections.deque concurrent.futures.Executor concurrent.futures.Future
configparser.ConfigParser contextlib.ExitStack datetime.date datetime.datetime dict
email.message.Message float fractions.Fraction inspect.Signature int io.StringIO list
logging.Formatter logging.Logger pathlib.Path pathlib.PurePath queue.Queue re.Match re.Pattern
socket.socket statistics.NormalDist str subprocess.Popen tarfile.TarFile threading.Condition
threading.Event threading.Semaphore threading.Thread unittest.TestCase
urllib.robotparser.RobotFileParser xml.etree.ElementTree.ElementTree zipfile.ZipFile
zipfile.ZipInfo
""".split()
)

# Functions in C may begin their docstring with signatures: `reduce(f, it[, x]) -> value`. What
# follows the arrow is a type, when it is short, and otherwise the description.
_HEAD = r"""
    (?:\w+\.)? {0} (\([^\n]*?\))  # the signature to show
    (?:\ ?(?:--?>|=)\ ?(?:\([^)\n]*\)|\w[\w ]{{0,30}})(?=[.,:]|\s*$))? [.,:]* (?=\s|$)
    (?:\n(?:\w+\.)? {0} \([^\n]*)*  # further ones, left out
"""
_MAX_CHARS = 200  # of a description: with the signature and the question a row stays near 80 tokens
_ROWS_EACH = 2  # rows of one function, each of another kind

# The wordings of each kind of question. {name} is the dotted name, {noun} is function, method or
# class, {place} is where it lives and {text} is the first sentence of its description.
_WORDINGS = {
    "what": """
What does {name} do? | What does {name}() do? | What does the {noun} {name} do?
What does `{name}` do in Python? | What is {name} for? | What is `{name}` used for?
Explain {name}. | Explain the {noun} `{name}` to me. | Describe {name} in a sentence or two.
Tell me about {name}. | Can you explain what {name}() does? | When would I use {name}?
I found {name}() in a program. What does it do? | In Python, what is {name}?
""",
    "which": """
Which {noun} of {place} has this description: {text} | Which {noun} in {place} do I need? {text}
Find the {noun} of {place} that fits: {text} | I look for a {noun} of {place}. {text} Which is it?
What is the name of the {noun} in {place} for this? {text} | {text} Which {noun} of {place} is that?
""",
    "call": """
How do I call {name}? | How is {name} called? | How do I use {name}() in my code?
What is the signature of {name}? | Show me the signature of `{name}`.
What does a call of {name} look like? | What do I have to write to call {name}?
""",
    "arguments": """
What arguments does {name} take? | Which arguments does {name}() take? | What can I pass to {name}?
Which parameters does {name} have? | List the parameters of `{name}`.
""",
    "module": """
What is the module {name} for? | What is in Python's {name} module? | When would I import {name}?
Describe the standard library module `{name}`. | What does the {name} module do?
""",
}
# How often each kind comes first: descriptions are what people ask for most.
_WEIGHTS = {"what": 6, "which": 1, "call": 2, "arguments": 2}


class _Entry(NamedTuple):
    """One documented thing: a function, a method, a class or a module."""

    name: str  # dotted, as one writes it after `import`
    noun: str
    place: str  # the module, or for a method the class
    module: str  # what to import, empty for a built-in
    signature: str  # with its parentheses
    parameters: list[str] | None  # as written in the signature; None when they are not known
    text: str


def rows() -> Iterator[dict[str, str]]:
    """Yield the rows, in an order of which any first part is a varied sample.

    The first row of every function comes before the second row of any: while there are fewer rows
    than functions, no two are about the same one, and so a held-out row asks about a function that
    the training rows do not mention. Every draw is seeded with the function's own name, so a
    module that is missing takes its rows away and changes no others.
    """
    drawn = [
        (turn, rng.random(), row)
        for entry in _entries()
        for rng in [random.Random(f"sample {entry.name}")]
        for turn, row in enumerate(_rows_of(entry, rng))
    ]
    seen: set[str] = set()
    for _turn, _place, text in sorted(drawn):
        if text not in seen:
            seen.add(text)
            yield {"text": text}


def _rows_of(entry: _Entry, rng: random.Random) -> list[str]:
    """Give the rows of one entry, each of another kind of question."""
    if entry.noun == "module":
        kinds = ["module"]
    else:
        fitting = [k for k in _WEIGHTS if k != "arguments" or entry.parameters is not None]
        # Weighted draws without replacement: the keys u ** (1 / weight) in falling order.
        keys = {kind: rng.random() ** (1 / _WEIGHTS[kind]) for kind in fitting}
        kinds = sorted(fitting, key=lambda kind: -keys[kind])[:_ROWS_EACH]
    result = []
    for kind in kinds:
        wording = rng.choice(re.split(r"\s*[|\n]\s*", _WORDINGS[kind].strip()))
        question = wording.format(
            name=entry.name, noun=entry.noun, place=entry.place, text=_sentences(entry.text)[0]
        )
        result.append(f"### Human: {question}### Assistant: {_answer(kind, entry)}")
    return result


def _answer(kind: str, entry: _Entry) -> str:
    """Word the answer to one kind of question: one form for each, for a short training to learn."""
    call = f"`{entry.name}{entry.signature}`"
    if kind == "which":
        return f"Use {call}."
    if kind == "call":
        return f"After `import {entry.module}`: {call}." if entry.module else f"Write {call}."
    if kind == "arguments":
        names = [f"`{p}`" for p in entry.parameters or []] or ["no arguments"]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        return f"`{entry.name}` takes {listed}."
    return f"{call}: {entry.text}"


def _entries() -> Iterator[_Entry]:
    """Find what is documented in the modules; of several with one description, the first stays.

    The same words under another name (an alias, a method that another class has too)
    would put the answer to a held-out row into the training rows.
    """
    seen: set[str] = set()
    for module_name in _MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # a Python that was built without it
            continue
        for entry in _entries_of(module_name, module):
            if entry.text not in seen:
                seen.add(entry.text)
                yield entry


def _entries_of(module_name: str, module: Any) -> Iterator[_Entry]:
    """Give the module itself, then its public functions and classes with their methods."""
    text = _description(module.__doc__ or "")
    if text:
        yield _Entry(module_name, "module", "", module_name, "", None, text)
    built_in = module_name == "builtins"
    imported, prefix = ("", "") if built_in else (module_name, f"{module_name}.")
    place = "the built-ins" if built_in else module_name
    for name, value in _public(module_name, module):
        noun = "class" if inspect.isclass(value) else "function"
        entry = _entry(prefix + name, noun, place, imported, value)
        if entry:
            yield entry
        if prefix + name not in _METHODS_OF:
            continue
        for method_name, method in sorted(vars(value).items()):
            bound = isinstance(method, classmethod | staticmethod)
            if not method_name.startswith("_") and (bound or inspect.isroutine(method)):
                full = f"{prefix}{name}.{method_name}"
                method = getattr(value, method_name) if bound else method
                entry = _entry(full, "method", prefix + name, imported, method, not bound)
                if entry:
                    yield entry


def _public(module_name: str, module: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Give the functions and classes that belong to a module, by name."""
    listed = getattr(module, "__all__", None)
    # No getattr: it would wake deprecated names. Short names first: of `walk` and `fwalk`, which
    # share a description, `walk` is the one to keep.
    for name, value in sorted(vars(module).items(), key=lambda item: (len(item[0]), item[0])):
        if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        if name.endswith("hook") or (module_name, name) == ("inspect", "getfile"):
            continue  # programs put their own in these places, and so does torch in the last
        if inspect.isclass(value) and issubclass(value, BaseException):
            continue
        owner = getattr(value, "__module__", None) or ""
        if name in listed if listed is not None else owner.lstrip("_") == module_name:
            yield name, value


def _entry(
    name: str, noun: str, place: str, module: str, value: Any, has_self: bool = False
) -> _Entry | None:
    """Describe one function, class or method; None when it says too little about itself.

    None also when it is not Python's own: `transformers` for one adds methods to `logging.Logger`,
    and the rows are not to depend on what else the process has imported.
    """
    owner = getattr(value, "__module__", None)
    if owner and owner.partition(".")[0] not in sys.stdlib_module_names:
        return None
    doc = value.__doc__ if isinstance(value.__doc__, str) else ""
    short = name.rpartition(".")[2]
    head = re.match(_HEAD.format(short), doc, re.VERBOSE | re.MULTILINE)
    if head:
        doc = doc[head.end() :].lstrip(" \n->")
    parameters = _parameters(value, has_self)
    if parameters is not None:
        signature = f"({', '.join(parameters)})"
        parameters = [p for p in parameters if p not in ("/", "*")]
    else:
        signature = head.group(1) if head else ""
    text = _description(doc)
    if not text or not signature or len(signature) > 120:
        return None
    return _Entry(name, noun, place, module, signature, parameters, text)


def _parameters(value: Any, has_self: bool) -> list[str] | None:
    """Give a callable's parameters as code, without annotations; None when it does not tell them.

    Defaults other than plain values are written `...`: their repr can hold a memory address.
    """
    try:
        found = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError, AttributeError):  # the last by a defect of inspect in 3.13
        return None
    found = found[1:] if has_self else found
    result: list[str] = []
    for number, p in enumerate(found):
        if p.kind is p.KEYWORD_ONLY and not any(q.startswith("*") for q in result):
            result.append("*")
        star = "*" * ((p.kind is p.VAR_POSITIONAL) + 2 * (p.kind is p.VAR_KEYWORD))
        plain = p.default is None or type(p.default) in (bool, int, float, str, bytes)
        default = "" if p.default is p.empty else f"={p.default!r}" if plain else "=..."
        result.append(star + p.name + default)
        following = found[number + 1].kind if number + 1 < len(found) else None
        if p.kind is p.POSITIONAL_ONLY and following is not p.POSITIONAL_ONLY:
            result.append("/")
    return result


def _sentences(text: str) -> list[str]:
    """Split at the ends of sentences; `e.g. this` and `i.e. that` go on in lower case."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text)


def _description(doc: str) -> str:
    """Give the first paragraph of a docstring as plain text, or as many sentences as are short.

    It is empty where the paragraph is no prose: a table, a list, a signature.
    """
    paragraph = re.split(r"\n\s*\n|\n\s*(?:>>>|[-*=:] )", inspect.cleandoc(doc))[0]
    text = re.sub(r":[\w:]+:`[~!]?([^`]*)`", r"\1", paragraph)  # :class:`Name`
    text = re.sub(r"``?([^`']*)(?:``?|''?)", r"\1", text)  # ``name`` and `name'
    text = re.sub(r"(?<![\w*])\*(\w[\w ]*)\*(?![\w*])", r"\1", text)  # *name*
    kept = ""
    for sentence in _sentences(" ".join(text.split())):
        if len(kept) + len(sentence) > _MAX_CHARS:
            break
        kept = f"{kept} {sentence}".strip()
    kept = kept[:1].upper() + kept[1:]
    kept += "" if re.search(r"[.!?][)'\"]?$", kept) else "."
    prose = kept.isascii() and kept[0].isalpha() and len(kept.split()) > 2
    whole = len(re.findall(r"[(\[]", kept)) == len(re.findall(r"[)\]]", kept))
    odd = re.search(r"0x|#|>>>|[:;,]\.$|\w\(.*\) ->|\s[-=]{2,}|`", kept)
    return kept if prose and whole and not odd else ""
