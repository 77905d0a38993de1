"""Pickled arrays of bytes in lists and dicts, read as data: nothing that a pickle names is looked up or called.

A pickle is a program for a small stack machine. Python's own unpicklers run what it names, reserve what it asks for
(a memo of 2**31 places, a text of 2**62 bytes) and hash what it nests until the stack overflows, before one can
look. This machine has only the instructions that NumPy's arrays of bytes, lists, dicts, texts and small numbers are
written with, by Python 2 and 3 in every protocol. Its memory and time are bounded by the length of the content.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_DIGITS = 20  # of a number that is written as text
_GLOBALS = {
    **dict.fromkeys(["numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct"], "reconstruct"),
    **dict.fromkeys(["numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"], "frombuffer"),
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",
}


class PickleError(ValueError):
    """A pickle that is damaged, or that holds something else. The message says what was found."""


@dataclass(frozen=True)
class _Global:
    """Stands for something of NumPy or Python that was named."""

    name: str


class _Array:
    """An array whose bytes come later, as NumPy writes them."""

    values: NDArray[np.uint8] | None = None


_BYTES = _Global("dtype u1")  # the only dtype
_BYTES_STATES = [(3, order, None, None, None, -1, -1, 0) for order in ("|", b"|")]


def read_array_pickle(content: bytes, steps: int) -> Any:
    """What a pickle holds: dicts by text or bytes, lists, tuples, bytes (Python 2's str), str, numbers, and arrays.

    Args:
        content: of the file.
        steps: more instructions than this are refused, for each takes up to a hundred bytes.

    Raises:
        PickleError: it is damaged, or needs an instruction, name or number that such data do not need.
    """
    machine = _Machine(content, steps)
    try:
        return _arrays_in(machine.run())
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PickleError):
            raise
        raise PickleError(f"damaged content ({type(error).__name__} near byte {machine.position})") from error


def _arrays_in(value: Any) -> Any:
    """Arrays are few and lie in the outermost dict."""
    if isinstance(value, dict):
        return {key: _finished(each) for key, each in value.items()}
    return _finished(value)


def _finished(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.values is None:
            raise PickleError("an array without its bytes")
        return value.values
    return value


class _Machine:
    def __init__(self, content: bytes, steps: int) -> None:
        self.position = 0
        self._content = content
        self._steps = steps
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks put aside by a mark
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(self._steps):
            code = self._take(1)
            if code == b".":
                return self._stack.pop()
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise PickleError(f"the pickle instruction {code!r} at byte {self.position - 1}")
            instruction(self)
        raise PickleError(f"more than {self._steps} pickle instructions")

    # Reading the content

    def _take(self, count: int) -> bytes:
        taken = self._content[self.position : self.position + count]
        if len(taken) < count:
            raise PickleError(f"damaged content (its end, {count} bytes after byte {self.position} were announced)")
        self.position += count
        return taken

    def _counted(self, width: int) -> bytes:
        return self._take(int.from_bytes(self._take(width), "little"))

    def _line(self) -> bytes:
        end = self._content.index(b"\n", self.position)
        line = self._content[self.position : end]
        self.position = end + 1
        return line

    def _number(self) -> int:
        line = self._line()
        if len(line) > _MOST_DIGITS:
            raise PickleError(f"a number of {len(line)} digits")
        return int(line)

    # Instructions

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        marked, self._stack = self._stack, self._below.pop()
        return marked

    def integer(self) -> None:
        line = self._content[self.position : self.position + 3]
        number = self._number()
        self.push(bool(number) if line in (b"00\n", b"01\n") else number)  # how protocols 0 and 1 write a bool

    def quoted(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
            raise PickleError(f"damaged content (a text without quotes before byte {self.position})")
        self.push(codecs.escape_decode(line[1:-1])[0])  # as pickle does

    def global_by_lines(self) -> None:
        self._push_global(self._line(), self._line())

    def global_by_stack(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("a global whose name is no text")
        self._push_global(module.encode(), name.encode())

    def _push_global(self, module: bytes, name: bytes) -> None:
        text = f"{module[:80].decode()}.{name[:80].decode()}"
        found = _GLOBALS.get(f"{module[:80].decode()} {name[:80].decode()}")
        if found is None:
            raise PickleError(f"the global {text}")
        self.push(_Global(found))

    def put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def get(self, place: int) -> None:
        self.push(self._memo[place])

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise PickleError("damaged content (a tuple of more than there is)")
        values = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self.push(values)

    def append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleError(f"an append to a {type(target).__name__}")
        target.extend(values)

    def set_items(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        keys, values = flat[::2], flat[1::2]
        if type(target) is not dict or len(keys) != len(values):
            raise PickleError(f"items for a {type(target).__name__}")
        if not all(isinstance(key, str | bytes) for key in keys):  # a nested tuple takes forever to hash
            raise PickleError("a dict by something else than texts")
        target.update(zip(keys, values, strict=True))

    def make_dict(self) -> None:
        flat = self._marked()
        self.push({})
        self.set_items(flat)

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise PickleError(f"a call of a {type(function).__name__}")
        called = _CALLS.get(function.name)
        if called is None:
            raise PickleError(f"a call of {function.name}")
        self.push(called(*arguments))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, _Array):
            _, shape, dtype, fortran, content = state
            if target.values is not None or dtype is not _BYTES:
                raise PickleError("an array with an unusual state")
            target.values = _array(content, shape, "F" if fortran is True else "C")
        elif target is not _BYTES or state not in _BYTES_STATES:
            raise PickleError(f"a state for a {type(target).__name__}")


def _array(content: Any, shape: Any, order: Any) -> NDArray[np.uint8]:
    if not isinstance(content, bytes) or not isinstance(shape, tuple) or order not in ("C", "F"):
        raise PickleError("an array made of something else than bytes and a shape")
    if len(shape) > 2 or not all(type(size) is int and 0 <= size <= len(content) for size in shape):
        raise PickleError("an array of an unusual shape")
    return np.frombuffer(content, np.uint8).reshape(shape, order=order)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    # NumPy pickles an array as an empty one whose state then follows.
    if kind != _Global("ndarray") or shape != (0,) or code not in (b"b", "b"):
        raise PickleError("an array that starts in an unusual way")
    return _Array()


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    if dtype is not _BYTES:
        raise PickleError("an array of another dtype")
    array = _Array()
    array.values = _array(content, shape, order)
    return array


def _dtype(code: Any, *flags: Any) -> _Global:
    if code not in ("u1", b"u1") or len(flags) != 2:
        raise PickleError(f"an array of dtype {code[:20]!r}" if isinstance(code, str | bytes) else "an unusual dtype")
    return _BYTES


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in protocols 0 to 2.
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise PickleError("a text in an unusual encoding")
    return text.encode("latin1")


_CALLS: dict[str, Callable[..., Any]] = {
    "reconstruct": _reconstruct,
    "frombuffer": _frombuffer,
    "dtype": _dtype,
    "encode": _encode,
}


def _skip(count: int) -> Callable[[_Machine], Any]:
    return lambda machine: machine._take(count)


def _constant(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(make())


def _integer(width: int, signed: bool = False) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(int.from_bytes(machine._take(width), "little", signed=signed))


def _raw(width: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine._counted(width))


def _text(width: int) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine._counted(width).decode("utf-8"))


# What pickletools calls them is behind each.
_INSTRUCTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _skip(1),  # PROTO
    b"\x95": _skip(8),  # FRAME: a hint for reading from a pipe
    b"(": _Machine.mark,  # MARK
    b"N": _constant(lambda: None),  # NONE
    b"\x88": _constant(lambda: True),  # NEWTRUE
    b"\x89": _constant(lambda: False),  # NEWFALSE
    b"I": _Machine.integer,  # INT
    b"K": _integer(1),  # BININT1
    b"M": _integer(2),  # BININT2
    b"J": _integer(4, signed=True),  # BININT
    b"S": _Machine.quoted,  # STRING
    b"T": _raw(4),  # BINSTRING
    b"U": _raw(1),  # SHORT_BINSTRING
    b"B": _raw(4),  # BINBYTES
    b"C": _raw(1),  # SHORT_BINBYTES
    b"\x8e": _raw(8),  # BINBYTES8
    b"\x96": _raw(8),  # BYTEARRAY8
    b"V": lambda machine: machine.push(machine._line().decode("raw-unicode-escape")),  # UNICODE
    b"X": _text(4),  # BINUNICODE
    b"\x8c": _text(1),  # SHORT_BINUNICODE
    b"\x8d": _text(8),  # BINUNICODE8
    b"]": _constant(list),  # EMPTY_LIST
    b"l": lambda machine: machine.push(machine._marked()),  # LIST
    b"a": lambda machine: machine.append([machine._stack.pop()]),  # APPEND
    b"e": lambda machine: machine.append(machine._marked()),  # APPENDS
    b"}": _constant(dict),  # EMPTY_DICT
    b"d": _Machine.make_dict,  # DICT
    b"s": lambda machine: machine.set_items([machine._stack.pop(-2), machine._stack.pop()]),  # SETITEM
    b"u": lambda machine: machine.set_items(machine._marked()),  # SETITEMS
    b")": _constant(tuple),  # EMPTY_TUPLE
    b"t": lambda machine: machine.push(tuple(machine._marked())),  # TUPLE
    b"\x85": lambda machine: machine.tuple_of(1),  # TUPLE1
    b"\x86": lambda machine: machine.tuple_of(2),  # TUPLE2
    b"\x87": lambda machine: machine.tuple_of(3),  # TUPLE3
    b"p": lambda machine: machine.put(machine._number()),  # PUT
    b"q": lambda machine: machine.put(machine._take(1)[0]),  # BINPUT
    b"r": lambda machine: machine.put(int.from_bytes(machine._take(4), "little")),  # LONG_BINPUT
    b"\x94": lambda machine: machine.put(len(machine._memo)),  # MEMOIZE
    b"g": lambda machine: machine.get(machine._number()),  # GET
    b"h": lambda machine: machine.get(machine._take(1)[0]),  # BINGET
    b"j": lambda machine: machine.get(int.from_bytes(machine._take(4), "little")),  # LONG_BINGET
    b"c": _Machine.global_by_lines,  # GLOBAL
    b"\x93": _Machine.global_by_stack,  # STACK_GLOBAL
    b"R": _Machine.call,  # REDUCE
    b"b": _Machine.build,  # BUILD
}
