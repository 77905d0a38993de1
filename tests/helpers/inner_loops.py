"""The instructions that a thread executes in one turn of an inner loop, counted in the machine code of a kernel.

A loop has several paths: for the ends of a row, for the label, for logits of another type. The path of whole, aligned
vectors is known by its 16-byte accesses, its exponentials and the least arithmetic that its formula takes. Of the paths
that have them, the shortest one counts. Where a kernel asks at run time what a call wants, it may be shorter than any
real one: the count is a lower bound then.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from machine_code import cuobjdump

# What identifies a path, by predicate, name and modifiers. Exponentials under a predicate are those of other calls.
MARKS = {
    "LDG": r"LDG\..*128",
    "STG": r"STG\..*128",
    "LDS": r"LDS\..*128",
    "STS": r"STS\..*128",
    "EX2": r"^MUFU\.EX2",
    "LG2": r"^MUFU\.LG2",
}
ARITHMETIC = r"(FADD|FMUL|FFMA)\b"
MOST_UNROLLED = 4  # turns of a loop that the compiler makes one

_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


class Block(NamedTuple):
    """Instructions that are executed one after the other, and the addresses of the blocks that may follow."""

    length: int
    arithmetic: int
    marks: tuple[int, ...]
    successors: list[int]


Graph = Mapping[int, Block]  # by the address of the first instruction
Loop = tuple[int, Graph]  # its first block, and all of its blocks


def inner_loops(path: Path, architecture: str, symbol: str) -> list[Loop]:
    """The loops without a loop inside of one kernel of a module or cubin.

    Raises:
        MissingError: cuobjdump or nvdisasm is missing.
    """
    text = cuobjdump("-sass", "-arch", architecture, "-fun", symbol, str(path))
    return list(
        _inner_loops(_graph([match.groups("") for match in map(_INSTRUCTION.match, text.splitlines()) if match]))
    )


def instructions_per_turn(loops: list[Loop], arithmetic: int, **marks: int) -> float | None:
    """The instructions of the shortest path through a loop that has exactly these marks and at least this number of
    float additions and multiplications. None: there is no such path."""
    found = []
    for times in range(1, MOST_UNROLLED + 1):
        wanted = tuple(times * marks.get(name, 0) for name in MARKS)
        paths = [_shortest_path(*loop, times * arithmetic, wanted) for loop in loops]
        found += [length / times for length in paths if length is not None]
    return min(found, default=None)


def _graph(instructions: list[tuple[str, ...]]) -> Graph:
    """The control flow of a kernel."""
    addresses = [int(address, 16) for address, *_ in instructions]
    after = dict(itertools.pairwise(addresses))
    targets, ends = {}, {}  # by address: where a branch leads, and whether it always does
    for at, (_, predicate, name, operands) in zip(addresses, instructions, strict=True):
        kind = name.split(".")[0]
        if kind in ("BRA", "BRX", "EXIT", "RET"):
            is_conditional = bool(predicate) or (kind == "BRA" and "," in operands)
            ends[at] = not is_conditional
            if kind == "BRA":
                targets[at] = int(operands.split("0x")[-1], 16)
    starts = {addresses[0], *targets.values(), *(after[at] for at in ends if at in after)}
    graph, names, start = {}, Counter[str](), addresses[0]
    for at, (_, predicate, name, _) in zip(addresses, instructions, strict=True):
        names[f"{predicate}{name}"] += 1
        following = after.get(at)
        if at in ends or following in starts or following is None:
            successors = [targets[at]] if at in targets else []
            if following is not None and not ends.get(at, False):
                successors.append(following)
            marks = tuple(sum(names[name] for name in names if re.search(mark, name)) for mark in MARKS.values())
            arithmetic = sum(names[name] for name in names if re.search(ARITHMETIC, name))
            graph[start] = Block(names.total(), arithmetic, marks, successors)
            names, start = Counter(), following
    return graph


def _ordered(graph: Graph) -> tuple[list[int], list[tuple[int, int]]]:
    """The blocks in an order in which only the edges of loops lead back, and these edges."""
    finished: list[int] = []
    is_open: dict[int, bool] = {}
    back = []
    for root in graph:
        stack = [] if root in is_open else [(root, iter(graph[root].successors))]
        is_open.setdefault(root, bool(stack))
        while stack:
            start, successors = stack[-1]
            following = next(successors, None)
            if following is None:
                is_open[start] = False
                finished.append(start)
                stack.pop()
            elif following not in is_open:
                is_open[following] = True
                stack.append((following, iter(graph[following].successors)))
            elif is_open[following]:
                back.append((start, following))
    return finished[::-1], back


def _inner_loops(graph: Graph) -> Iterator[Loop]:
    """The loops without a loop inside."""
    before = defaultdict(list)
    for start, block in graph.items():
        for following in block.successors:
            before[following].append(start)
    loops: dict[int, set[int]] = {}
    for last, first in _ordered(graph)[1]:
        inside, left = loops.setdefault(first, {first}), [last]
        while left:
            start = left.pop()
            if start not in inside:
                inside.add(start)
                left += before[start]
    for first, inside in loops.items():
        if inside & loops.keys() == {first}:
            yield first, {start: graph[start] for start in inside}


def _shortest_path(first: int, loop: Graph, arithmetic: int, marks: tuple[int, ...]) -> int | None:
    """The instructions of the shortest path from the first block back to it with these marks, if there is one."""
    totals = [sum(block.marks[i] for block in loop.values()) for i in range(len(marks))]
    if any(total < mark for total, mark in zip(totals, marks, strict=True)):
        return None
    within = {at: block._replace(successors=[x for x in block.successors if x in loop]) for at, block in loop.items()}
    # By block: the lengths of the paths that reach it, by what they have executed. More arithmetic than needed counts
    # as what is needed.
    reached: dict[int, dict[tuple[int, ...], int]] = defaultdict(dict)
    reached[first] = {(0,) * (1 + len(marks)): 0}
    turns: dict[tuple[int, ...], int] = {}
    for at in _ordered({first: within[first], **within})[0]:
        block = within[at]
        for executed, length in reached[at].items():
            counts = tuple(a + b for a, b in zip(executed[1:], block.marks, strict=True))
            if any(a > b for a, b in zip(counts, marks, strict=True)):
                continue
            key = (min(executed[0] + block.arithmetic, arithmetic), *counts)
            for following in block.successors:
                paths = turns if following == first else reached[following]
                paths[key] = min(paths.get(key, length + block.length), length + block.length)
    return turns.get((arithmetic, *marks))
