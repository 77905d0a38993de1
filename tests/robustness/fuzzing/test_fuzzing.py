"""Readers read any bytes or refuse them with their documented errors, within bounded memory.

KDDP_FUZZ_EXAMPLES=1000 sets the number of examples of each test.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from fuzzing.targets import HOSTILE_JSON, IDX_SHAPE, TARGETS, Target, check, examples, hostile_safetensors, students
from hypothesis import given
from hypothesis import strategies as st

from kddp_ext.pruning.history import PruningHistory

STRICT = ("history", "config")


every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


@every_target
def test_valid_inputs_are_read(target: Target, tmp_path: Path) -> None:
    for content in target.seeds():
        assert check(target, content, tmp_path) == "read"


@every_target
@examples(15)
@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_read_or_refused(target: Target, tmp_path: Path, content: bytes) -> None:
    check(target, content, tmp_path)


@st.composite
def mutations(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid input with a few bytes changed, removed, doubled, inserted, or taken from another input."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, min(16, len(content) - place)) | st.integers(0, len(content) - place))
        part = bytes(content[place : place + length])
        other = draw(st.sampled_from(seeds))
        replacement = draw(
            st.sampled_from([b"", part + part, part[::-1], other[place:], b"\0" * length, b"\xff" * length])
            | st.binary(max_size=8)
            | st.sampled_from([struct.pack(code, value) for code in ["<I", "<Q", ">I"] for value in (0, 1, 2**31)])
        )
        content[place : place + length] = replacement
    return bytes(content)


@every_target
def test_changed_inputs_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    @examples(8 if target.slow else 40)
    @given(content=mutations(target.seeds()))
    def each(content: bytes) -> None:
        check(target, content, tmp_path)

    each()


@pytest.mark.parametrize("name", STRICT)
@pytest.mark.parametrize("content", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_hostile_json_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    assert check(TARGETS[name], content, tmp_path) == "refused"


ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([10**400, -(2**63), 2**63, 0, -1]),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(-2, 3) | st.text(max_size=2), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(-2, 9), max_size=3),
)


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """The value with one part replaced by an odd value, removed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        changed = dict(value)
        action = draw(st.sampled_from(["inside"] * 6 + ["missing", "more"]))
        if action == "missing":
            del changed[key]
        elif action == "more":
            changed[draw(st.text(max_size=4))] = draw(ODD_VALUES)
        else:
            changed[key] = draw(changed_json(value[key]))
        return changed
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed_json(value[place])), *value[place + 1 :]]
    return draw(ODD_VALUES)


@pytest.mark.parametrize("name", STRICT)
@examples(60)
@given(data=st.data())
def test_json_with_odd_values_is_read_or_refused(name: str, tmp_path: Path, data: st.DataObject) -> None:
    value = data.draw(changed_json(json.loads(TARGETS[name].seeds()[0])))
    check(TARGETS[name], json.dumps(value).encode(), tmp_path)


@pytest.mark.parametrize("name", ["student-header", "student", "teacher-cache"])
@pytest.mark.parametrize("content", hostile_safetensors().values(), ids=hostile_safetensors())
def test_hostile_safetensors_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    outcome = check(TARGETS[name], content, tmp_path)
    assert outcome == ("read" if name == "teacher-cache" else "refused")  # the cache ignores it


@pytest.mark.parametrize("name", ["student-header", "teacher-cache"])
@examples(25)
@given(data=st.data(), lie=st.sampled_from([0, 0, 0, 1, -1, 8, 2**20]))
def test_safetensors_with_another_header_are_read_or_refused(
    name: str, tmp_path: Path, data: st.DataObject, lie: int
) -> None:
    content = TARGETS[name].seeds()[0]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    inside = header["__metadata__"]
    if data.draw(st.booleans()) and "history" in inside:  # JSON inside of JSON
        key = data.draw(st.sampled_from(["history", "metadata"]))
        inside[key] = json.dumps(data.draw(changed_json(json.loads(inside[key]))))
    else:
        header = data.draw(changed_json(header))
    text = json.dumps(header).encode()
    check(TARGETS[name], max(0, len(text) + lie).to_bytes(8, "little") + text + content[8 + length :], tmp_path)


@examples(100)
@given(
    numbers=st.lists(st.sampled_from([0x0803, 0x0D03, 0x0801, *IDX_SHAPE, 2**31, 2**32 - 1, 0]), max_size=6),
    values=st.binary(max_size=40),
    compressed=st.booleans(),
)
def test_idx_files_with_another_header_are_read_or_refused(
    tmp_path: Path, numbers: list[int], values: bytes, compressed: bool
) -> None:
    content = struct.pack(f">{len(numbers)}I", *numbers) + values
    check(TARGETS["idx-gz" if compressed else "idx"], gzip.compress(content) if compressed else content, tmp_path)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    target = TARGETS["idx-gz"]
    assert check(target, gzip.compress(bytes(900_000)), tmp_path) == "refused"
    assert check(target, gzip.compress(gzip.compress(bytes(10_000_000))), tmp_path) == "refused"
    members = gzip.compress(b"") * 40
    assert check(target, members, tmp_path) == "refused"


@pytest.mark.parametrize(
    "name",
    ["pickled-batch", "binary-batch", "idx", "idx-gz", "student-header", "student", "config"],
)
def test_pipes_and_folders_are_refused_at_once(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    path = tmp_path / target.file
    for make in (os.mkfifo, os.mkdir):
        make(path)
        with pytest.raises(target.errors, match=r"regular file|it has no config\.json"):
            target.read(path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_history_is_read_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("this would take time for every step, or for the width")

    for name in ("pruned", "kept"):
        monkeypatch.setattr(PruningHistory, name, fail)
    widths = {"a": 2**62, "b": 10**300}
    steps = [{"a": [number]} for number in range(500)]
    text = {"format": "kddp_ext.pruning_history", "version": 1, "original_widths": widths, "steps": steps}
    assert check(TARGETS["history"], json.dumps(text).encode(), tmp_path) == "read"


def test_a_student_with_foreign_metadata_is_refused(tmp_path: Path) -> None:
    content = students()[0]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for metadata in ("[]", '{"a": 1}', "[" * 5000, "NaN"):
        header["__metadata__"]["metadata"] = metadata
        text = json.dumps(header).encode()
        changed = len(text).to_bytes(8, "little") + text + content[8 + length :]
        for name in ("student-header", "student"):
            assert check(TARGETS[name], changed, tmp_path) == "refused"


def test_the_check_finds_broken_readers(tmp_path: Path) -> None:
    def reader(read: Any, **changes: Any) -> Target:
        return Target("made up", "file", lambda: [b""], read, (ValueError,), **changes)

    def fail(error: Exception) -> Any:
        def read(_path: Path) -> None:
            raise error

        return read

    with contextlib.suppress(ValueError):
        assert check(reader(fail(ValueError("file: bad"))), b"", tmp_path) == "refused"
    for target in (
        reader(fail(KeyError("file"))),
        reader(fail(ValueError("something is wrong"))),
        reader(lambda _path: bytes(2**20)),
    ):
        with pytest.raises(AssertionError, match="made up"):
            check(target, b"", tmp_path)
