"""Pickles that were made to do harm: refused, with nothing run and no memory taken, whatever they are made of.

What they would have done is seen by a file: each that calls something would make it.
"""

from __future__ import annotations

import copyreg
import pickle
import pickletools
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing.targets import TARGETS, batch, check, examples
from hypothesis import given
from hypothesis import strategies as st

from kddp_ext.workflow.datasets.array_pickle import _INSTRUCTIONS

TARGET = TARGETS["pickled-batch"]
MARK, STOP = b"(", b"."
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
DTYPE_STATE = b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def as_data(program: bytes) -> bytes:
    """A batch whose data are what the program leaves."""
    return b"\x80\x02}(U\x04data" + program + b"U\x06labels]u" + STOP


def running(command: str) -> dict[str, bytes]:
    """Every way of calling os.system that the instructions of a pickle have."""
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
        "a name below a module": text("numpy.core") + text("multiarray._reconstruct") + b"\x93" + argument + b"\x85R",
        "another case of a module": b"cNumpy\nndarray\n" + argument + b"\x85R",
        "posix": b"cposix\nsystem\n" + argument + b"\x85R",
        "subprocess": b"csubprocess\ngetoutput\n" + argument + b"\x85R",
        "eval": b"c__builtin__\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R",
        "getattr": b"cbuiltins\ngetattr\n" + b"cos\nsystem\n" + text("__call__") + b"\x86R" + argument + b"\x85R",
        "through an admitted call": b"c_codecs\nencode\n" + name + argument + b"\x85R" + text("latin1") + b"\x86R",
        "as an array's kind": b"cnumpy.core.multiarray\n_reconstruct\n" + name + b"K\x00\x85U\x01b\x87R",
        "as a state": ARRAY + name + argument + b"\x85Rb",
        "before the data": name + argument + b"\x85R0" + ARRAY,
        "after a memo": name + b"q\x07" + argument + b"\x85" + b"h\x07" + b"R",
        "the list of an admitted name": b"cnumpy\ndtype\n" + name + argument + b"\x85RK\x00K\x01\x87R",
    }


@pytest.mark.parametrize("way", running(""))
def test_nothing_is_run(way: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    command = f"touch {made}"
    for content in (running(command)[way] + STOP, as_data(running(command)[way])):
        assert check(TARGET, content, tmp_path) == "refused"
    assert not made.exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    made = tmp_path / "made"
    pickle.loads(running(f"touch {made}")["REDUCE"] + STOP)
    assert made.exists()


def test_registered_extensions_are_not_looked_up(tmp_path: Path) -> None:
    made = tmp_path / "made"
    copyreg.add_extension("os", "mkdir", 200)
    try:
        for code in (b"\x82\xc8", b"\x83\xc8\x00", b"\x84\xc8\x00\x00\x00"):
            content = code + text(str(made)) + b"\x85R" + STOP
            assert check(TARGET, content, tmp_path) == "refused"
    finally:
        copyreg.remove_extension("os", "mkdir", 200)
    assert not made.exists()


HOSTILE = {
    "PERSID": b"Psomething\n.",
    "BINPERSID": b"K\x01Q.",
    "LONG4 of 2 GB": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01.",
    "LONG4 of negative length": b"\x8b" + struct.pack("<i", -1) + b".",
    "LONG of many digits": b"L" + b"9" * 5000 + b"L\n.",
    "INT of many digits": b"I" + b"9" * 5000 + b"\n.",
    "BINUNICODE8 of 2**62 bytes": b"\x8d" + struct.pack("<Q", 2**62) + b"a.",
    "BINBYTES8 of 2**40 bytes": b"\x8e" + struct.pack("<Q", 2**40) + b"a.",
    "BYTEARRAY8 of 2**34 bytes": b"\x96" + struct.pack("<Q", 2**34) + b"a.",
    "BYTEARRAY8 of 2**63 bytes": b"\x96" + struct.pack("<Q", 2**63) + b"a.",
    "BINSTRING of 2 GB": b"T" + struct.pack("<I", 2**31 - 1) + b"a.",
    "FRAME that lies": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"}.",
    "FRAME that is cut off": b"\x80\x04\x95\xff",
    "PUT at 2**31": b"Np2147483648\n.",
    "PUT at a negative place": b"Np-1\n.",
    "LONG_BINPUT at 2**32 - 1": b"Nr\xff\xff\xff\xff.",
    "GET of nothing": b"g5\n.",
    "BINGET of nothing": b"h\x05.",
    "NEXT_BUFFER": b"\x97.",
    "READONLY_BUFFER": b"N\x98.",
    "DUP without a stack": b"2.",
    "POP": b"0.",
    "POP_MARK": b"1.",
    "marks alone": MARK * 500 + STOP,
    "more marks than steps": MARK * 5000,
    "lists in lists": b"]" * 500 + b"a" * 499 + STOP,
    "more lists than steps": b"]" * 100_000,
    "tuples in tuples, as a key": b"})" + b"\x85" * 500 + b"Ns.",
    "tuples in tuples, more than steps": b"})" + b"\x85" * 200_000 + b"Ns.",
    "a billion laughs": b"])" + b"q\x00h\x00h\x00\x86" * 150 + b"a.",
    "a billion laughs, as a key": b"})" + b"q\x00h\x00\x86" * 150 + b"Ns.",
    "a billion laughs, as a dtype": b"cnumpy\ndtype\n)" + b"q\x00h\x00\x86" * 150 + b"K\x00K\x01\x87R.",
    "a list in itself": b"]q\x00h\x00a.",
    "a dict in itself": b"}q\x00U\x01ah\x00s.",
    "an array in its own state": ARRAY + b"q\x00h\x00b.",
    "SETITEMS of an odd number": b"}(U\x01au.",
    "SETITEM on a list": b"]U\x01aNs.",
    "APPEND to a dict": b"}Na.",
    "a list as a key": b"}]Ns.",
    "TUPLE3 of two": b"NN\x87.",
    "an unknown instruction": b"\xfe.",
    "no STOP": b"}",
    "no value": b".",
    "protocol 255": b"\x80\xff}.",
    "GLOBAL without its name": b"cnumpy\n",
    "GLOBAL of no text": b"c\xff\xfe\n\xff\n.",
    "STACK_GLOBAL of numbers": b"K\x01K\x02\x93.",
    "STRING without quotes": b"Sabc\n.",
    "STRING of one quote": b"S'\n.",
    "UNICODE of half a pair as a name": b"V\\ud800\nVa\n\x93.",
    "a surrogate in UTF-8": b"X\x03\x00\x00\x00\xed\xa0\x80.",
}
STATES = {
    "too short": b"(K\x01K\x03K\x08\x86" + DTYPE + DTYPE_STATE + b"\x89t",
    "too long": b"(K\x01K\x03K\x08\x86" + DTYPE + DTYPE_STATE + b"\x89U\x00Nt",
    "none": b"N",
    "a dict": b"}U\x07__array__Ns",
    "dict and slots": b"}}U\x01aNs\x86",
    "a text of five": b"U\x05abcde",
    "a list as content": b"(K\x01K\x01\x85" + DTYPE + DTYPE_STATE + b"\x89]t",
    "less content": b"(K\x01K\x03K\x08\x86" + DTYPE + DTYPE_STATE + b"\x89U\x01at",
    "a huge shape": b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86" + DTYPE + DTYPE_STATE + b"\x89U\x01at",
    "a negative shape": b"(K\x01J\xff\xff\xff\xffK\x01\x86" + DTYPE + DTYPE_STATE + b"\x89U\x01at",
    "a shape of bools": b"(K\x01\x88\x88\x86" + DTYPE + DTYPE_STATE + b"\x89U\x01at",
    "many dimensions": b"(K\x01(" + b"K\x01" * 40 + b"t" + DTYPE + DTYPE_STATE + b"\x89U\x01at",
    "no dtype": b"(K\x01K\x01\x85N\x89U\x01at",
    "twice": b"(K\x01K\x01\x85" + DTYPE + b"\x89U\x01atb(K\x01K\x01\x85" + DTYPE + b"\x89U\x01at",
}
DTYPES = {
    "object": b"cnumpy\ndtype\nU\x01OK\x00K\x01\x87R",
    "eight bytes": b"cnumpy\ndtype\nU\x02u8K\x00K\x01\x87R",
    "with a state of its own": DTYPE + b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb",
    "with metadata": DTYPE + b"(K\x04U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00}tb",
    "with a dict as state": DTYPE + b"}b",
    "without flags": b"cnumpy\ndtype\nU\x02u1\x85R",
    "of a list": b"cnumpy\ndtype\n]K\x00K\x01\x87R",
}
KINDS = {
    "a subtype": b"cnumpy\nmemmap\n",
    "a matrix": b"cnumpy\nmatrix\n",
    "recarray": b"cnumpy.core.records\nrecarray\n",
    "dtype": b"cnumpy\ndtype\n",
    "none": b"N",
}


def corpus() -> dict[str, bytes]:
    content = b"(K\x01K\x03K\x08\x86"
    return {
        **HOSTILE,
        **{f"state {name}": as_data(ARRAY + state + b"b") for name, state in STATES.items()},
        **{f"dtype {name}": as_data(ARRAY + content + dtype + b"\x89U\x18" + bytes(24) + b"tb")
           for name, dtype in DTYPES.items()},
        **{f"kind {name}": as_data(b"cnumpy.core.multiarray\n_reconstruct\n" + kind + b"K\x00\x85U\x01b\x87R")
           for name, kind in KINDS.items()},
        "an array that starts huge": as_data(
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nJ\xff\xff\xff\x7f\x85U\x01b\x87R"
        ),
        "an array that never gets its bytes": as_data(ARRAY),
        "frombuffer of a huge shape": as_data(
            b"cnumpy.core.numeric\n_frombuffer\n(U\x01a" + DTYPE + b"J\xff\xff\xff\x7f\x85U\x01CtR"
        ),
        "frombuffer of a number": as_data(b"cnumpy.core.numeric\n_frombuffer\n(K\x09" + DTYPE + b"K\x01\x85U\x01CtR"),
        "encode in another encoding": as_data(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf-8\x86R"),
        "encode a number": as_data(b"c_codecs\nencode\nK\x01X\x06\x00\x00\x00latin1\x86R"),
        "an array of objects": pickle.dumps({b"data": np.array([[os_like()]], object), b"labels": [1]}, 2),
    }  # fmt: skip


def os_like() -> Any:
    return {"a": 1}


@pytest.mark.parametrize("content", corpus().values(), ids=corpus())
def test_the_corpus_is_refused(content: bytes, tmp_path: Path) -> None:
    assert check(TARGET, content, tmp_path) == "refused"


def test_only_these_instructions_are_known() -> None:
    refused = {code.name for code in pickletools.opcodes if code.code.encode("latin1") not in _INSTRUCTIONS}
    assert refused == {
        "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER",
        "READONLY_BUFFER", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "DUP", "POP", "POP_MARK", "EMPTY_SET",
        "ADDITEMS", "FROZENSET", "STOP",
    }  # fmt: skip


def test_an_array_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / TARGET.file
    pixels = np.asfortranarray(batch()[b"data"])
    for protocol in range(6):
        path.write_bytes(pickle.dumps(batch() | {b"data": pixels}, protocol))
        read: Any = TARGET.read(path)
        np.testing.assert_array_equal(read[0], pixels)


PIECES = [
    *(bytes([code]) for code in range(256) if bytes([code]) in _INSTRUCTIONS),
    *(ARRAY, DTYPE, DTYPE + DTYPE_STATE, MARK, STOP, b"K\x01", b"K\x08", b"U\x04data", b"U\x06labels"),
    *(text("numpy"), text("dtype"), b"q\x00", b"h\x00", b"c_codecs\nencode\n", text("latin1"), b"U\x18" + bytes(24)),
]


@examples(150)
@given(program=st.lists(st.sampled_from(PIECES) | st.binary(min_size=1, max_size=2), max_size=30))
def test_any_program_is_read_or_refused(program: list[bytes], tmp_path: Path) -> None:
    for content in (b"".join(program) + STOP, as_data(b"".join(program))):
        check(TARGET, content, tmp_path)


MEMORY = """
import resource, sys
from pathlib import Path
from kddp_ext.workflow.datasets.cifar10_pickle import read_pickled_batch
from kddp_ext.workflow.errors import DataFileError
resource.setrlimit(resource.RLIMIT_STACK, (2**20, 2**20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_pickled_batch(path, 10_000, 3072)
    except DataFileError:
        continue
    sys.exit(f"{path} was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_what_is_refused_took_no_memory_of_the_process(tmp_path: Path) -> None:
    # Measured from outside, with the bounds of real batches: 30 MB may come, and 200,000 instructions.
    large = {
        "keys": b"})" + b"\x85" * 190_000 + b"Ns.",
        "lists": b"]" * 199_000 + b".",
        "marks": MARK * 199_000 + b".",
        "laughs": b"})" + b"q\x00h\x00\x86" * 60_000 + b"Ns.",
        "memo": b"N" + b"".join(b"r" + struct.pack("<I", 20_000 * n) for n in range(190_000)) + b".",
    }
    for name, content in {**HOSTILE, **large}.items():
        (tmp_path / name.replace("/", "")).write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 80_000  # KiB
