"""Hostile pickles are refused: nothing that they name is called, and they take no memory. A file is the canary."""

from __future__ import annotations

import copyreg
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
from fuzzing.targets import TARGETS, batch, check, examples
from hypothesis import given
from hypothesis import strategies as st

TARGET = TARGETS["pickled-batch"]
MARK, STOP = b"(", b"."
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
ARRAY = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
DTYPE_STATE = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def as_data(program: bytes) -> bytes:
    """A batch whose data are the result of the program."""
    return b"\x80\x02}(U\x04data" + program + b"U\x06labels]u" + STOP


def calls(command: str) -> dict[str, bytes]:
    """Every way in which the opcodes of a pickle can call os.system."""
    argument = text(command)
    name = b"cos\nsystem\n"
    return {
        "REDUCE": name + argument + b"\x85R",
        "REDUCE with a mark": name + MARK + argument + b"tR",
        "INST": MARK + argument + b"ios\nsystem\n",
        "OBJ": MARK + name + argument + b"o",
        "NEWOBJ": name + argument + b"\x85\x81",
        "NEWOBJ_EX": name + argument + b"\x85}\x92",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + argument + b"\x85R",
        "nested names": b"\x80\x04" + text("numpy") + text("core.multiarray.os.system") + b"\x93" + argument + b"\x85R",
        "a name below a module": text("numpy.core") + text("multiarray.os.system") + b"\x93" + argument + b"\x85R",
        "another case of a module": b"cNumpy\nndarray\n" + argument + b"\x85R",
        "posix": b"cposix\nsystem\n" + argument + b"\x85R",
        "subprocess": b"csubprocess\ngetoutput\n" + argument + b"\x85R",
        "eval": b"c__builtin__\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\n" + b"cos\nsystem\n" + text("__call__") + b"\x86R" + argument + b"\x85R",
        "codecs": b"c_codecs\nencode\n" + name + argument + b"\x85R" + text("latin1") + b"\x86R",
        "the type of an array": RECONSTRUCT + name + b"K\x00\x85U\x01b\x87R",
        "the state of an array": ARRAY + name + argument + b"\x85Rb",
        "before the data": name + argument + b"\x85R0" + ARRAY,
        "through the memo": name + b"q\x07" + argument + b"\x85" + b"h\x07" + b"R",
        "the argument of a dtype": b"cnumpy\ndtype\n" + name + argument + b"\x85RK\x00K\x01\x87R",
    }


@pytest.mark.parametrize("way", calls(""))
def test_nothing_is_called(way: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    program = calls(f"touch {made}")[way]
    for content in (program + STOP, as_data(program)):
        assert check(TARGET, content, tmp_path) == "refused"
    assert not made.exists()


def test_the_canary_works(tmp_path: Path) -> None:
    made = tmp_path / "made"
    pickle.loads(calls(f"touch {made}")["REDUCE"] + STOP)
    assert made.exists()


def test_registered_extensions_are_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    copyreg.add_extension("os", "mkdir", 200)
    try:
        for code in (b"\x82\xc8", b"\x83\xc8\x00", b"\x84\xc8\x00\x00\x00"):
            assert check(TARGET, code + text(str(made)) + b"\x85R" + STOP, tmp_path) == "refused"
    finally:
        copyreg.remove_extension("os", "mkdir", 200)
    assert not made.exists()


SHAPE = b"(K\x01K\x03M\x00\x0c\x86"
HOSTILE = {
    "PERSID": b"Psomething\n.",
    "LONG4 of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
    "INT of many digits": b"I" + b"9" * 5000 + b"\n.",
    "BINUNICODE8 of 2**62 bytes": b"\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "BYTEARRAY8 of 2**34 bytes": b"\x96" + struct.pack("<Q", 2**34) + b"a.",
    "FRAME that lies": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "PUT at 2**31": b"Np2147483648\n.",
    "PUT at a negative index": b"Np-1\n.",
    "LONG_BINPUT at 2**32 - 1": b"Nr\xff\xff\xff\xff.",
    "GET of nothing": b"g5\n.",
    "NEXT_BUFFER": b"\x97.",
    "POP of nothing": b"0.",
    "marks": MARK * 50_000,
    "lists in lists": b"]" * 50_000 + b"a" * 49_999 + STOP,
    "tuples in tuples, as a key": b"})" + b"\x85" * 200_000 + b"Ns.",
    "a billion laughs, as a key": b"})" + b"q\x00h\x00\x86" * 150 + b"Ns.",
    "a list in itself": b"]q\x00h\x00a.",
    "an array in its own state": ARRAY + b"q\x00h\x00b.",
    "a list as a key": b"}]Ns.",
    "an unknown opcode": b"\xfe.",
    "no STOP": b"}",
    "protocol 255": b"\x80\xff}.",
    "GLOBAL of no text": b"c\xff\xfe\n\xff\n.",
    "a name with half a surrogate pair": b"V\\ud800\nVa\n\x93.",
    "a state of another length": as_data(ARRAY + SHAPE + DTYPE + DTYPE_STATE + b"\x89U\x01atb"),
    "a state with a list": as_data(ARRAY + b"(K\x01K\x01\x85" + DTYPE + DTYPE_STATE + b"\x89]tb"),
    "a huge shape": as_data(ARRAY + b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86" + DTYPE + b"\x89U\x01atb"),
    "a negative shape": as_data(ARRAY + b"(K\x01J\xff\xff\xff\xffK\x01\x86" + DTYPE + b"\x89U\x01atb"),
    "an array of objects": as_data(ARRAY + b"(K\x01K\x01\x85cnumpy\ndtype\nU\x01OK\x00K\x01\x87R\x89U\x01atb"),
    "an array that starts huge": as_data(RECONSTRUCT + b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R"),
    "an array without bytes": as_data(ARRAY),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_content_is_refused(content: bytes, tmp_path: Path) -> None:
    assert check(TARGET, content, tmp_path) == "refused"


def test_a_dtypes_state_does_not_change_numpys_dtype(tmp_path: Path) -> None:
    changed = DTYPE + b"(K\x03U\x01<NNNK\x08K\x08K\x3ftb"
    check(TARGET, as_data(ARRAY + SHAPE + changed + b"\x89U\x01atb"), tmp_path)
    dtype = np.dtype(np.uint8)
    assert (dtype.itemsize, dtype.alignment, dtype.flags, dtype.byteorder) == (1, 1, 0, "|")


PIECES = [
    *(opcode.code.encode("latin1") for opcode in pickletools.opcodes),
    *(ARRAY, DTYPE, DTYPE + DTYPE_STATE, MARK, STOP, b"K\x01", b"K\x08", b"U\x04data", b"U\x06labels"),
    *(text("numpy"), text("dtype"), b"q\x00", b"h\x00", b"U\x18" + bytes(24), batch()[b"data"].tobytes()[:16]),
]


@examples(150)
@given(program=st.lists(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=2), max_size=30))
def test_any_program_is_read_or_refused(program: list[bytes], tmp_path: Path) -> None:
    for content in (b"".join(program) + STOP, as_data(b"".join(program))):
        check(TARGET, content, tmp_path)
