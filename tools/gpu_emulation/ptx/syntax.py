"""Parses PTX text into kernels: declarations, labels, and instructions with parsed operands. It executes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .errors import PtxError

SCALAR_BYTES = {f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64)}
_IGNORED_DIRECTIVES = ("loc", "file", "pragma", "version", "target", "address_size")
_LINE_DIRECTIVE = re.compile(r"^[ \t]*\.(?:loc|file|version|target|address_size)\b[^\n]*$", re.M)
_VARIABLE = re.compile(
    r"(?P<link>(?:\.(?:extern|visible|weak|common)\s+)*)\.(?P<space>shared|local|const|global)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?P<array>\s*\[\s*(?P<count>\d*)\s*\])?(?:\s*=\s*(?P<value>.*))?$",
    re.S,
)
_OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


@dataclass(frozen=True, eq=False)
class Register:
    """A declared register. `width` is in bits, and 1 for predicates."""

    name: str
    width: int


@dataclass(frozen=True)
class Address:
    """`[base + offset]`. The base is a register, the name of a variable or parameter, or empty."""

    base: Register | str
    offset: int


@dataclass(frozen=True)
class Inverted:
    """`!p` as an operand."""

    register: Register


@dataclass
class Instruction:
    text: str
    opcode: tuple[str, ...]
    operands: list
    predicate: Register | None = None
    negated: bool = False
    scope: tuple[int, ...] = ()
    target: int | None = None  # index of the instruction that a branch goes to
    reads: frozenset = frozenset()
    writes: frozenset = frozenset()
    unproven: tuple = ()  # registers that it reads although some path has not written them


@dataclass
class Variable:
    """A variable in some state space. `data` is its initial value, if it has one."""

    name: str
    space: str
    align: int
    size: int
    external: bool
    data: np.ndarray | None = None


@dataclass
class Kernel:
    """One `.entry`. `parameters` lists (name, type), such as ("k_param_0", "u64"). The type of a structure is
    "b8[size]"."""

    name: str
    parameters: list[tuple[str, str]]
    instructions: list[Instruction]
    variables: dict[str, Variable]
    required_threads: tuple[int, ...] | None
    max_threads: int | None
    static_shared: dict[str, int] = field(default_factory=dict)
    static_shared_bytes: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    granule: int = 16  # bytes: the narrowest access to shared memory
    tracked: tuple = ()  # registers whose writes have to be recorded at run time


def strip_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", " ", text, flags=re.S))


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError(f"a brace is not closed: {text[start : start + 60]!r}")


def kernels_of(text: str) -> list[Kernel]:
    """All `.entry` functions of a PTX module, with their module's variables."""
    text = _LINE_DIRECTIVE.sub("", strip_comments(text))
    module_variables: dict[str, Variable] = {}
    found, position = [], 0
    head = re.compile(r"\.entry\s+([\w$.]+)\s*(?:\(([^)]*)\))?([^{;]*)\{|\.func\b[^{;]*\{|\.section\b[^{]*\{|;")
    while match := head.search(text, position):
        if match.group() == ";":
            statement = text[position : match.start()].strip()
            # The braces of an initial value are no blocks and contain no semicolon.
            if variable := _VARIABLE.search(statement):
                declared = _variable(variable)
                module_variables[declared.name] = declared
            position = match.end()
            continue
        end = _matching_brace(text, match.end() - 1)
        if match.group(1):
            found.append((match.group(1), match.group(2) or "", match.group(3), text[match.end() : end]))
        position = end + 1
    if not found:
        raise PtxError("the text holds no .entry function")
    return [_Body(body, module_variables).kernel(name, params, hints) for name, params, hints, body in found]


def _variable(match: re.Match) -> Variable:
    kind, external = match["type"], "extern" in match["link"]
    if kind not in SCALAR_BYTES:
        raise PtxError(f"unsupported type of a variable: {match.group().strip()}")
    width = SCALAR_BYTES[kind]
    count = 1 if match["array"] is None else int(match["count"] or 0)
    data = None
    if match["space"] in ("const", "global"):
        data = np.zeros(count * width, np.uint8)
        if match["value"] is not None:
            values = [
                literal(item.strip(), kind) for item in match["value"].strip(" \t\n{}").split(",") if item.strip()
            ]
            if None not in values:
                raw = np.array(values, np.uint64).astype(np.dtype(f"u{width}")).view(np.uint8)
                data[: raw.size] = raw
            else:
                data = None  # addresses of other variables, which are an error only if the variable is used
    return Variable(match["name"], match["space"], int(match["align"] or width), count * width, external, data)


def literal(token: str, kind: str) -> int | None:
    """The bits of a constant of type `kind`. None if `token` is no constant."""
    width = 8 * SCALAR_BYTES.get(kind, 2)
    sign, digits = (-1, token[1:]) if token[:1] == "-" else (1, token)
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", digits):
        bits = int(match[1] or match[2], 16)
        bits ^= (sign < 0) << (31 if match[1] else 63)
        if match[1] and width == 64:
            return int(np.array([bits], np.uint32).view(np.float32).astype(np.float64).view(np.uint64)[0])
        if match[2] and width == 32:
            return int(np.array([bits], np.uint64).view(np.float64).astype(np.float32).view(np.uint32)[0])
        return bits
    if match := re.fullmatch(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", digits):
        digits = match[1]
        octal = re.fullmatch(r"0[0-7]+", digits)
        return (sign * int(digits, 8 if octal else 0)) & ((1 << width) - 1)
    if re.fullmatch(r"\d+\.\d*(?:[eE][-+]?\d+)?", digits):
        value = np.array([sign * float(digits)])
        return int(value.view(np.uint64)[0] if width == 64 else value.astype(np.float32).view(np.uint32)[0])
    return None


class _Body:
    """Parses the statements of one function, block by block: `{ ... }` opens a scope for registers and labels."""

    def __init__(self, text: str, module_variables: dict[str, Variable]):
        self.text, self.variables = text, dict(module_variables)
        self.own: list[Variable] = []
        self.instructions: list[Instruction] = []
        self.registers: dict[tuple, Register] = {}
        self.labels: dict[tuple, int] = {}
        self.scope, self.scopes = (), 0

    def kernel(self, name: str, params: str, hints: str) -> Kernel:
        parameters = [_parameter(item) for item in params.split(",") if item.strip()]
        self._statements()
        self._resolve_branches()
        limits = {
            key: tuple(int(n) for n in numbers.split(","))
            for key, numbers in re.findall(r"\.(reqntid|maxntid)\s+([\d,\s]+)", hints)
        }
        maximum = int(np.prod(limits["maxntid"])) if "maxntid" in limits else None
        kernel = Kernel(name, parameters, self.instructions, self.variables, limits.get("reqntid"), maximum)
        self._layout(kernel)
        return kernel

    def _statements(self) -> None:
        text, position = self.text, 0
        space, label = re.compile(r"[\s;]*"), re.compile(r"([\w$%.]+)\s*:(?!:)")
        while True:
            position = space.match(text, position).end()
            if position == len(text):
                return
            if text[position] == "{":
                self.scopes += 1
                self.scope += (self.scopes,)
                position += 1
            elif text[position] == "}":
                self.scope = self.scope[:-1]
                position += 1
            elif match := label.match(text, position):
                self.labels[self.scope, match[1]] = len(self.instructions)
                position = match.end()
            else:
                end = text.find(";", position)
                if end < 0:
                    raise PtxError(f"a statement does not end: {text[position : position + 60]!r}")
                self._statement(" ".join(text[position:end].split()))
                position = end + 1

    def _statement(self, statement: str) -> None:
        if not statement.startswith("."):
            self.instructions.append(self._instruction(statement))
        elif statement.startswith(".reg"):
            self._declare(statement)
        elif match := _VARIABLE.fullmatch(statement):
            variable = _variable(match)
            self.variables[variable.name] = variable
            self.own.append(variable)
        elif statement[1:].split(None, 1)[0] not in _IGNORED_DIRECTIVES:
            raise PtxError(f"unsupported directive: {statement}")

    def _declare(self, statement: str) -> None:
        match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement)
        kind = match[1] if match else ""
        if kind != "pred" and kind not in SCALAR_BYTES:
            raise PtxError(f"unsupported register type: {statement}")
        width = 1 if kind == "pred" else 8 * SCALAR_BYTES[kind]
        for item in match[2].split(","):
            item = item.strip()
            many = re.fullmatch(r"([\w$%]+)<(\d+)>", item)
            for name in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item]:
                unique = name if not self.scope else f"{name}@{self.scope[-1]}"
                self.registers[self.scope, name] = Register(unique, width)

    def _lookup(self, table: dict, name: str, scope: tuple):
        for depth in range(len(scope), -1, -1):
            if (scope[:depth], name) in table:
                return table[scope[:depth], name]
        return None

    def _instruction(self, statement: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
        if match is None:
            raise PtxError(f"not an instruction: {statement}")
        negated, predicate, opcode, rest = match.groups()
        guard = None
        if predicate is not None:
            guard = self._lookup(self.registers, predicate, self.scope)
            if guard is None or guard.width != 1:
                raise PtxError(f"{predicate} is no predicate register: {statement}")
        # "::" binds tighter than ".": L1::evict_last is one modifier.
        operands = [self._operand(item, statement) for item in _split_operands(rest)]
        return Instruction(statement, tuple(opcode.split(".")), operands, guard, bool(negated), self.scope)

    def _operand(self, token: str, statement: str):
        if token.startswith("{"):
            return tuple(self._operand(item, statement) for item in _split_operands(token[1:-1]))
        if token.startswith("["):
            return self._address(token[1:-1].strip(), statement)
        if token.startswith("!"):
            return Inverted(self._operand(token[1:].strip(), statement))
        if "|" in token:
            return tuple(self._operand(item.strip(), statement) for item in token.split("|"))
        register = self._lookup(self.registers, token, self.scope)
        return token if register is None else register

    def _address(self, token: str, statement: str) -> Address:
        match = re.fullmatch(r"([\w$%.]+)?\s*(?:\+?\s*(-?\s*(?:0x[0-9a-fA-F]+|\d+)))?", token)
        if match is None:
            raise PtxError(f"unsupported address [{token}]: {statement}")
        base, offset = match[1] or "", int((match[2] or "0").replace(" ", ""), 0)
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", base):
            base, offset = "", int(base, 0) + offset
        register = self._lookup(self.registers, base, self.scope)
        return Address(base if register is None else register, offset)

    def _resolve_branches(self) -> None:
        for instruction in self.instructions:
            if instruction.opcode[0] == "bra":
                if len(instruction.operands) != 1 or not isinstance(instruction.operands[0], str):
                    raise PtxError(f"unsupported branch: {instruction.text}")
                instruction.target = self._lookup(self.labels, instruction.operands[0], instruction.scope)
                if instruction.target is None:
                    raise PtxError(f"unknown label: {instruction.text}")

    def _layout(self, kernel: Kernel) -> None:
        """Offsets of static shared variables and of local memory, in the order of their declaration."""
        used = {token for instruction in self.instructions for token in _symbols(instruction.operands)}
        declared = {variable.name for variable in self.own}
        for variable in self.variables.values():
            if variable.name in used or variable.name in declared:
                if variable.space == "shared" and not variable.external:
                    start = -(-kernel.static_shared_bytes // variable.align) * variable.align
                    kernel.static_shared[variable.name] = start
                    kernel.static_shared_bytes = start + variable.size
                elif variable.space == "local":
                    start = -(-kernel.local_bytes // variable.align) * variable.align
                    kernel.local[variable.name] = start
                    kernel.local_bytes = start + variable.size


def _parameter(item: str) -> tuple[str, str]:
    pattern = r"\s*\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b.*?([\w$]+)\s*(\[\d+\])?\s*"
    match = re.fullmatch(pattern, item, re.S)
    if match is None or match[1] not in SCALAR_BYTES or (match[3] and match[1] != "b8"):
        raise PtxError(f"unsupported kernel parameter: {item.strip()}")
    return match[2], match[1] + (match[3] or "")


def parameter_bytes(kind: str) -> int:
    """The size of a parameter of a scalar type, or of a structure passed by value: "b8[24]"."""
    return int(kind[3:-1]) if kind.endswith("]") else SCALAR_BYTES[kind]


def _symbols(operands):
    for operand in operands:
        if isinstance(operand, tuple):
            yield from _symbols(operand)
        elif isinstance(operand, Address) and isinstance(operand.base, str):
            yield operand.base
        elif isinstance(operand, str):
            yield operand


def _split_operands(text: str) -> list[str]:
    """Splits at the commas outside braces and brackets."""
    items = [item.strip() for item in _OPERAND.findall(text)]
    return [item for item in items if item]
