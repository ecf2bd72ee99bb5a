"""Warp-wide instructions: shuffles, votes, ldmatrix and mma.

Fragments of mma.m16n8kK, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma"):

- accumulators C, D: registers 0, 1 hold row g, columns 2t and 2t + 1; registers 2, 3 the same columns of row g + 8;
- 16-bit A: register 0 holds row g, columns 2t and 2t + 1; register 1 row g + 8; registers 2, 3 columns 8 further;
- 16-bit B: register 0 holds rows 2t and 2t + 1 of column g; register 1 rows 8 further;
- tf32 A: register 0 holds row g, column t; register 1 row g + 8; registers 2, 3 column t + 4;
- tf32 B: register 0 holds row t of column g; register 1 row t + 4.

Products are exact. Sums are computed in f32, in an unspecified order; the order and rounding of tensor cores are not
documented either. tf32 operands lose their low 13 bits, as in the hardware.
"""

from __future__ import annotations

import numpy as np

from .binding import Binder, Execute, instruction
from .errors import Fault
from .machine import WARP, translated


@instruction("shfl")
def _shfl(b: Binder) -> Execute:
    b.type("b32")
    b.one_of(("sync",))
    mode = b.one_of(("up", "down", "bfly", "idx"))
    machine = b.machine
    to = b.operand(0)
    to, inside = to if isinstance(to, tuple) else (to, None)
    dest = b.result(to, "b32")
    found = b.result(inside, "pred") if inside is not None else None
    value, amount, clamp, members = (b.source(i, "b32") for i in (1, 2, 3, 4))
    lane = np.arange(machine.lanes, dtype=np.int64)
    fixed = _shfl_source(mode, lane, amount, clamp) if amount.strides == clamp.strides == (0,) else None
    everyone = members.strides == (0,) and members[0] == 0xFFFFFFFF

    def execute(mask):
        if mask is not True or not everyone:
            machine.check_member_mask(mask, members, "shfl.sync")
        source, valid = fixed or _shfl_source(mode, lane, amount, clamp)
        if mask is not True:
            absent = mask & ~mask[source]
            if absent.any():
                here = int(np.flatnonzero(absent)[0])
                raise Fault(f"shfl.sync reads lane {int(source[here]) % WARP}, which does not take part", here)
        np.copyto(dest, value.take(source), where=mask)
        if found is not None:
            np.copyto(found, valid, where=mask)

    return execute


def _shfl_source(mode: str, lane: np.ndarray, amount: np.ndarray, clamp: np.ndarray):
    """The lane (of the batch) that each lane reads, and whether that lane is in its segment."""
    own, first = lane % WARP, lane - lane % WARP
    segment, bound = (clamp >> np.uint32(8)).astype(np.int64) & 31, clamp.astype(np.int64) & 31
    count = amount.astype(np.int64) & 31
    last = (own & segment) | (bound & ~segment)
    if mode == "up":
        source, valid = own - count, own - count >= last
    else:
        source = {"down": own + count, "bfly": own ^ count, "idx": (own & segment) | (count & ~segment)}[mode]
        valid = source <= last
    return first + np.where(valid, source, own), valid


@instruction("vote")
def _vote(b: Binder) -> Execute:
    kind = b.type("pred", "b32")
    b.one_of(("sync",))
    mode = b.one_of(("all", "any", "uni", "ballot"))
    if (mode == "ballot") != (kind == "b32"):
        raise b.error("vote.ballot gives .b32, the others .pred")
    machine, dest, value, members = b.machine, b.dest(0, kind), b.predicate(1), b.source(2, "b32")

    def execute(mask):
        machine.check_member_mask(mask, members, "vote.sync")
        active = np.ones(machine.lanes, bool) if mask is True else mask
        yes, no = ((x & active).reshape(-1, WARP) for x in (value(), ~value()))
        if mode == "ballot":
            result = np.packbits(yes, axis=1, bitorder="little").view(np.uint32)[:, 0]
        elif mode == "any":
            result = yes.any(1)
        else:
            result = ~no.any(1) if mode == "all" else ~(no.any(1) & yes.any(1))
        np.copyto(dest, np.repeat(result, WARP), where=mask)

    return execute


@instruction("activemask")
def _activemask(b: Binder) -> Execute:
    b.type("b32")
    dest, lanes = b.dest(0, "b32"), b.machine.lanes

    def execute(mask):
        active = np.ones(lanes, bool) if mask is True else mask
        words = np.packbits(active.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)[:, 0]
        np.copyto(dest, np.repeat(words, WARP), where=mask)

    return execute


@instruction("redux")
def _redux(b: Binder) -> Execute:
    kind = b.type("u32", "s32", "b32")
    b.one_of(("sync",))
    name = b.one_of(("add", "min", "max", "and", "or", "xor"))
    ufunc = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(name)
    ufunc = ufunc or {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name]
    machine, dest, value, members = b.machine, b.dest(0, kind), b.source(1, kind), b.source(2, "b32")
    limits = np.iinfo(value.dtype)
    neutral = {"min": limits.max, "max": limits.min, "and": -1 if limits.min else limits.max}.get(name, 0)

    def execute(mask):
        machine.check_member_mask(mask, members, "redux.sync")
        active = value if mask is True else np.where(mask, value, value.dtype.type(neutral))
        result = ufunc.reduce(np.ascontiguousarray(active).reshape(-1, WARP), axis=1, dtype=value.dtype)
        np.copyto(dest, np.repeat(result, WARP), where=mask)

    return execute


@instruction("bar", "barrier")
def _warp_barrier(b: Binder) -> Execute:
    """bar.warp.sync. In lock-step there is nothing to wait for, but the mask is checked."""
    b.one_of(("warp",))
    b.one_of(("sync",))
    machine, members = b.machine, b.source(0, "b32")
    return lambda mask: machine.check_member_mask(mask, members, "bar.warp.sync")


@instruction("ldmatrix")
def _ldmatrix(b: Binder) -> Execute:
    b.type("b16")
    for name in ("sync", "aligned", "m8n8"):
        b.one_of((name,))
    count = int(b.one_of(("x1", "x2", "x4"))[1])
    transposed = b.flag("trans")
    b.one_of(("shared", "shared::cta"))
    machine = b.machine
    dests = [b.result(item, "u32") for item in b.vector(0, count)]
    address = b.address(1, "shared")

    def execute(mask):
        warps = machine.whole_warps(mask, "ldmatrix")
        # Lane 8 i + r of a warp gives the address of row r of matrix i.
        lanes = np.arange(machine.lanes).reshape(-1, WARP)[warps, : 8 * count].reshape(-1)
        rows = translated(lanes, machine.shared.read, address(lanes), lanes, 16)
        if transposed:
            words = rows.view(np.uint16).reshape(-1, count, 8, 8).transpose(0, 1, 3, 2)
            words = np.ascontiguousarray(words).view(np.uint32).reshape(-1, count, WARP)
        else:
            words = rows.view(np.uint32).reshape(-1, count, WARP)
        for i, dest in enumerate(dests):
            dest.reshape(-1, WARP)[warps] = words[:, i]

    return execute


_HALF_SHAPES = {"m16n8k16": 16, "m16n8k8": 8}
_TF32_SHAPES = {"m16n8k8": 8, "m16n8k4": 4}


@instruction("mma")
def _mma(b: Binder) -> Execute:
    for name in ("sync", "aligned"):
        b.one_of((name,))
    types = b.modifiers[-4:]
    del b.modifiers[-4:]
    if types not in (["f32", kind, kind, "f32"] for kind in ("bf16", "f16", "tf32")):
        raise b.error(f"unsupported types .{'.'.join(types)}")
    kind = types[1]
    shapes = _TF32_SHAPES if kind == "tf32" else _HALF_SHAPES
    k = shapes[b.one_of(tuple(shapes))]
    for name in ("row", "col"):
        b.one_of((name,))
    halves = 1 if kind == "tf32" else 2  # elements in a register
    steps = k // (4 * halves)  # registers along k
    d = [b.result(item, "f32") for item in b.vector(0, 4)]
    c = [b.value(item, "f32") for item in b.vector(3, 4)]
    a = [_Elements(b.value(item, "u32"), kind) for item in b.vector(1, 2 * steps)]
    columns = [_Elements(b.value(item, "u32"), kind) for item in b.vector(2, steps)]
    machine = b.machine
    count = machine.lanes // WARP
    # Only the high halves of bfloat16 elements are written, so zeros stay in their low halves.
    buffers = machine.buffers("mma." + kind, (count, 2, 8, steps, 4, halves), (count, 8, steps, 4, halves))
    sums = machine.buffers("mma", (count, 2, 8, 4, 2))[0]

    def execute(mask):
        warps = machine.whole_warps(mask, "mma.sync")
        n = count if mask is True else warps.size
        left, right, total = buffers[0][:n], buffers[1][:n], sums[:n]
        for i, elements in enumerate(a):
            elements.put(left[:, i & 1, :, i >> 1], warps)
        for i, elements in enumerate(columns):
            elements.put(right[:, :, i], warps)
        np.matmul(left.reshape(n, 16, k), right.reshape(n, 8, k).transpose(0, 2, 1), out=total.reshape(n, 16, 8))
        for i, (to, addend) in enumerate(zip(d, c, strict=True)):
            part = total[:, i >> 1, :, :, i & 1]
            to.reshape(-1, 8, 4)[warps] = part + addend.reshape(-1, 8, 4)[warps]

    return execute


class _Elements:
    """The matrix elements in one operand register, as f32."""

    def __init__(self, register: np.ndarray, kind: str):
        self.kind = kind
        if kind == "tf32":
            self.source = register.reshape(-1, 8, 4, 1)
        else:
            self.source = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 8, 4, 2)
            self.source = self.source.view(np.float16) if kind == "f16" else self.source

    def put(self, into: np.ndarray, warps) -> None:
        """Writes (warps, 8, 4, elements) into a part of a matrix."""
        source = self.source[warps]
        if self.kind == "f16":
            into[...] = source
        elif self.kind == "bf16":
            into.view(np.uint16)[..., 1::2] = source
        else:
            into.view(np.uint32)[...] = source & np.uint32(0xFFFFE000)
