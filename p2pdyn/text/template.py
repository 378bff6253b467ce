"""Chat templates, rendered as Hugging Face does but from an untrusted source.

A template comes with the model card from a peer and runs on the event loop, so it must neither reach Python nor hold
the loop.  jinja2's ImmutableSandboxedEnvironment does the first; for the second, each render has its Allowance:

* each loop step, call, filter and operator spends :data:`STEP`, and each string or list made spends its length, before
  it is made where the size can be told (``*``, ``+``, ``~``, replace, join);
* each such point also looks at the clock, so pure computing ends at :data:`RENDER_S`;
* filters, globals and string methods are white lists: what is left cannot turn a small input into a large output by
  itself (no center, ljust, zfill, format widths, lipsum, recursive loops, imports);
* a list may hold another many times over, so whatever walks into containers (text, JSON, comparing, sorting) spends
  their flat size first (:func:`_flat`); tuples, whose hash would walk too, are made as lists;
* integers stay within 64 bits, and the template's syntax tree within :data:`MAX_NODES`.

What is not bounded by count is bounded by size: one operation works on at most :data:`MAX_TEXT` characters.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS as DEFAULT_FILTERS
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT = 16 * 2**20
"""Characters: the longest prompt; a 4 Mi token prompt fits."""
WORK = 128 * 2**20
"""What one render may spend: about a second of the slowest that is allowed; usually the clock comes first."""
STEP = 64
RENDER_S = 0.5
"""Longest render. A common one takes 50 us; 0.5 s delays a heartbeat (0.25 s) but makes no worker suspect (1 s)."""
MAX_NODES = 20_000
"""Syntax nodes of a template; the largest in the field has about 3000."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILTERS = _words(
    """abs capitalize count d default dictsort e escape first float groupby indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim unique
    upper wordcount"""
)
SHALLOW = _words(
    """abs count d default first float int items last length list map reject rejectattr reverse round select
    selectattr"""
)
"""The filters that do not look into the elements of what they are given."""
STRING_METHODS = _words(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
    istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip
    split splitlines startswith strip swapcase title upper"""
)
PLAIN_FORMAT = re.compile(r"(?:[^%]|%[sdifr%])*")


class TemplateError(ValueError):
    """A template that cannot be used, or that refuses these messages; the message is one sentence."""


class Exhausted(Exception):
    """The render's allowance is spent."""


class Allowance:
    """What one render may still spend, and until when."""

    __slots__ = ("deadline", "left")

    def __init__(self) -> None:
        self.left = WORK
        self.deadline = time.monotonic() + RENDER_S

    def spend(self, size: int = 0) -> None:
        if size > MAX_TEXT:
            raise Exhausted("its output is too long")
        self.left -= STEP + size
        if self.left < 0 or time.monotonic() > self.deadline:
            raise Exhausted("it takes too long")


_current = threading.local()


def _spend(size: int = 0) -> None:
    allowance: Allowance = _current.allowance
    allowance.spend(size)


def _size(value: object) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _flat(*values: Any) -> None:
    """Spend the size that the values have as text or when compared, shared parts counted as often as they show."""
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            _spend(len(value))
        elif isinstance(value, list | tuple):
            _spend(len(value))
            stack.extend(value)
        elif isinstance(value, dict):
            _spend(len(value))
            stack.extend(value.keys())
            stack.extend(value.values())
        elif not (value is None or isinstance(value, int | float | Undefined | range)):
            raise SecurityError(f"a {type(value).__name__} is neither text nor comparable here")


def _flattened(value: Any) -> Any:
    if type(value) is not str:
        _flat(value)
    return value


def _counted(items: Any) -> Iterator[Any]:
    """Each step of a for loop spends; put around every loop's iterable."""
    for item in items:
        _spend()
        yield item


def _joined(parts: Iterable[Any]) -> str:
    """``~``, block sets, macros and the whole output, without building what is too long."""
    texts = [part if isinstance(part, str) else str(_flattened(part)) for part in parts]
    _spend(sum(map(len, texts)))
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's tojson: no HTML escapes."""
    indent = min(int(indent), 16) if indent is not None else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    by = width[:64] if isinstance(width, str) else min(int(width), 64)
    _spend(len(text) + (text.count("\n") + 1) * 64)
    indented: str = do_indent(text, by, first, blank)
    return indented


def _replaced_size(text: str, old: str, new: str) -> int:
    return len(text) + text.count(old) * max(0, len(new) - len(old))


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _spend(_replaced_size(text, old, new))
    replaced: str = text.replace(old, new, -1 if count is None else count)
    return replaced


def _join(parts: Any, separator: Any = "", attribute: str | None = None) -> str:
    items = parts if attribute is None else (part[attribute] for part in parts)
    texts, between = [str(_flattened(item)) for item in _counted(items)], str(separator)
    _spend(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


def _wrapped(function: Any, deep: bool) -> Callable[..., Any]:
    """A filter or test of jinja2 that spends for what it is given and for what it returns."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    def filtered(*args: Any, **kwargs: Any) -> Any:
        for value in args[first:]:
            _flat(value) if deep and type(value) in (list, tuple, dict) else _spend(_size(value))
        result = function(*args, **kwargs)
        _spend(_size(result))
        return result

    if first:  # "pass me the environment", or the context
        filtered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return filtered


def _filters() -> dict[str, Callable[..., Any]]:
    own = {"tojson": _to_json, "indent": _indent, "replace": _replace, "join": _join}
    found = {name: _wrapped(own.get(name) or DEFAULT_FILTERS[name], name not in SHALLOW) for name in FILTERS}
    return {**found, "(counted)": _counted, "(joined)": _joined, "(flattened)": _flattened}


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message)[:512])


def _strftime_now(form: object) -> str:
    return time.strftime(str(form)[:64])[:256]


def _range(*args: int) -> range:
    found = range(*args)
    if len(found) > 100_000:
        raise SecurityError("range is too long")
    return found


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's part for training; here only its body matters."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bound(NodeTransformer):
    """Puts the counters into the syntax tree."""

    def __init__(self) -> None:
        self.nodes = 0

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise TemplateError(f"it has more than {MAX_NODES} nodes")
        return super().visit(node, *args, **kwargs)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateError("recursive loops are not allowed")
        self.generic_visit(node)
        node.iter = _filter(node.iter, "(counted)")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "(joined)")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return nodes.List(node.items, lineno=node.lineno) if node.ctx == "load" else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        operands = [node.expr, *(operand.expr for operand in node.ops)]
        if not any(isinstance(operand, nodes.Const) for operand in operands):
            node.expr = _filter(node.expr, "(flattened)")
            for operand in node.ops:
                operand.expr = _filter(operand.expr, "(flattened)")
        return node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "**", "%", "/", "//"})
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_flattened,
            extensions=[loopcontrols, _Generation],
        )
        self.filters.clear()
        self.filters.update(_filters())
        self.tests.update({name: _wrapped(test, deep=True) for name, test in self.tests.items()})
        self.globals.clear()
        self.globals.update(
            range=_range, dict=dict, namespace=Namespace, raise_exception=_raise_exception, strftime_now=_strftime_now
        )

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bound().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No sandboxed str.format: its widths are unbounded."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            args = __self._string_call(text, __obj.__name__, args)
        _spend(_size(text))
        if not isinstance(__obj, Macro) and __obj is not dict and __obj is not Namespace:
            _flat(*args, *([text] if isinstance(text, list | tuple) and args else []))
        result = super().call(__context, __obj, *args, **kwargs)
        _spend(_size(result))
        return result

    def _string_call(self, text: str, method: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if method == "replace" and len(args) >= 2:
            _spend(_replaced_size(text, str(args[0]), str(args[1])))
        elif method == "join" and len(args) == 1:
            parts = list(_counted(args[0]))
            _spend(sum(map(_size, parts)) + len(text) * len(parts))
            return (parts,)
        elif method in ("split", "rsplit", "splitlines"):
            _spend(8 * len(text))
        return args

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and (_size(left) or _size(right)):
            _spend(max(0, right if isinstance(right, int) else 1) * _size(left))
            _spend(max(0, left if isinstance(left, int) else 1) * _size(right))
        elif operator == "%" and isinstance(left, str):
            if not PLAIN_FORMAT.fullmatch(left):
                raise SecurityError("only plain %s and %d formats are allowed")
            _flat(left, right)
            right = tuple(right) if isinstance(right, list) else right
        elif operator == "**" and max(abs(left), abs(right)) > 1000:
            raise SecurityError("the power is too large")
        else:
            _spend(_size(left) + _size(right))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) >= 2**63:
            raise SecurityError("the number is too large")
        return result


class ChatTemplate:
    """One compiled chat template. Compiling a large one takes tens of milliseconds: do it in a thread."""

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        """Raises TemplateError when the source does not compile within the bounds."""
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        _current.allowance = Allowance()
        try:
            self._template = _Environment().from_string(source)
        except (JinjaError, TemplateError, Exhausted) as error:
            raise TemplateError(f"the model's chat template cannot be used: {_brief(error)}") from error
        except Exception as error:  # SyntaxError of the generated code, RecursionError, MemoryError, OverflowError
            raise TemplateError(f"the model's chat template cannot be used: {_brief(error)}") from error

    def render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. Raises TemplateError with the template's own words when it refuses the messages."""
        _current.allowance = Allowance()
        values = {
            "tools": None,
            "documents": None,
            **(extra or {}),
            **self._tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._render(values)
        except TemplateError as error:
            raise TemplateError(f"the model's chat template refuses these messages: {error}") from error
        except Exhausted as error:
            raise TemplateError(f"the model's chat template is stopped: {error}") from error
        except Exception as error:  # a template can fail like any program
            raise TemplateError(f"the model's chat template fails on these messages: {_brief(error)}") from error

    def _render(self, values: dict[str, Any]) -> str:
        template = self._template
        # What Template.new_context does, without its walk over a ChainMap of the globals.
        context = Context(template.environment, {**template.environment.globals, **values}, None, template.blocks)
        pieces: list[str] = []
        total = 0
        for piece in template.root_render_func(context):
            total += len(piece)
            if total > MAX_TEXT:
                raise Exhausted("its output is too long")
            pieces.append(piece)
        _spend(total)
        return "".join(pieces)


def _brief(error: BaseException) -> str:
    return (str(error) or type(error).__name__).replace("\n", " ")[:256]
