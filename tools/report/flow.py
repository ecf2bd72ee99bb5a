"""The loops among the instructions of a kernel, for both SASS and AMDGCN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

_TRIVIAL = 16  # a loop of fewer instructions only waits for something, so the code around it is no outer loop
# How often a loop is assumed to run in each pass of the loop around it, since the code does not say it. Wu and Larus
# found that a loop's branch goes back with probability 0.88 in programs in general, which is about eight passes.
_PASSES = 8


class Instruction(NamedTuple):
    """`successors` are positions in the list of instructions. None means the next instruction only."""

    opcode: str
    successors: tuple[int, ...] | None = None


def main_loop(
    instructions: Sequence[Instruction], weight: Callable[[list[str]], float]
) -> list[str] | None:
    """The opcodes of the loop in which the kernel is expected to spend its time; None if there is no loop.

    Each loop is weighed by the instructions that are in it but in no loop inside it, times eight for each loop around
    it. The weights are compared by `weight` first, and if those are equal by the number of instructions. So a short
    inner loop does not hide the outer loop that does the work, and an inner loop that does the work comes before the
    outer one. All paths through the chosen body count, so conditional parts are included. Loops inside it count with
    one pass.
    """
    bodies = [body for body in _loops(instructions) if len(body) >= _TRIVIAL]

    def opcodes(positions: Iterable[int]) -> list[str]:
        return [instructions[i].opcode for i in sorted(positions)]

    def time(body: frozenset[int]) -> tuple[float, int]:
        own = opcodes(body.difference(*(other for other in bodies if other < body)))
        passes = _PASSES ** sum(body < other for other in bodies)
        return passes * weight(own), passes * len(own)

    chosen = max(bodies, key=time, default=None)
    return None if chosen is None else opcodes(chosen)


def _loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """The natural loops, as sets of positions. Loops with the same header are one loop."""
    starts, successors = _blocks(instructions)
    dominators = _dominators(successors)
    predecessors: dict[int, set[int]] = {block: set() for block in dominators}
    for block in dominators:
        for successor in successors[block]:
            predecessors[successor].add(block)
    ends = {start: end for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True)}
    bodies: dict[int, set[int]] = {}
    for block in dominators:
        for header in successors[block] & dominators[block]:
            bodies.setdefault(header, {header}).update(_reaching(block, header, predecessors))
    return [frozenset(i for block in body for i in range(block, ends[block])) for body in bodies.values()]


def _blocks(instructions: Sequence[Instruction]) -> tuple[list[int], dict[int, set[int]]]:
    """The basic blocks, named by their first position, and the successors of each."""
    count = len(instructions)
    leaders = {0}
    for position, instruction in enumerate(instructions):
        if instruction.successors is not None:
            leaders.update(instruction.successors)
            leaders.add(position + 1)
    starts = sorted(leader for leader in leaders if leader < count)
    successors = {}
    for start, end in zip(starts, [*starts[1:], count], strict=True):
        following = instructions[end - 1].successors
        following = (end,) if following is None else following
        successors[start] = {target for target in following if target < count}
    return starts, successors


def _dominators(successors: dict[int, set[int]]) -> dict[int, set[int]]:
    """For every block that can be reached from the first one: the blocks on all paths to it, including itself."""
    order = _reverse_postorder(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            predecessors[successor].append(block)
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = set.intersection(*(dominators[p] for p in predecessors[block])) | {block}
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def _reverse_postorder(successors: dict[int, set[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack: list[tuple[int, Iterable[int]]] = [(0, iter(sorted(successors[0])))]
    while stack:
        block, following = stack[-1]
        for successor in following:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(sorted(successors[successor]))))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def _reaching(block: int, header: int, predecessors: dict[int, set[int]]) -> set[int]:
    """The blocks from which `block` can be reached without passing `header`."""
    found, todo = set(), [block]
    while todo:
        current = todo.pop()
        if current != header and current not in found:
            found.add(current)
            todo.extend(predecessors[current])
    return found
