"""PTX text, as nvcc -ptx writes it, to kernels: parameters, shared arrays, registers, instructions with their lines.

Only what nvcc makes of this project's kernels is understood; a directive or an operand that is not is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64} | {f"{k}{b}": b for k in "suf" for b in (8, 16, 32, 64)}
ENDS_BLOCK = ("bra", "ret", "exit")
SYNCHRONISING = ("bar", "barrier", "shfl")


class PtxError(Exception):
    """What a GPU would have done wrong, or what this interpreter does not know; of the active threads the lane-th."""

    def __init__(self, problem: str, lane: int = 0) -> None:
        super().__init__(problem)
        self.lane = lane


@dataclass(frozen=True)
class Instruction:
    guard: str  # the predicate's register, or ""
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    ptx_line: int
    source: str  # file:line of the CUDA source, and of where it was inlined; "" without -lineinfo

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{self.source or 'PTX line ' + str(self.ptx_line)} ({guard}{self.opcode} {', '.join(self.operands)})"


@dataclass(frozen=True)
class Variable:
    name: str
    align: int
    size: int  # bytes; 0 for dynamic shared memory


@dataclass
class Kernel:
    name: str
    parameters: list[Variable] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)  # name: bits
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name: index of an instruction
    most_threads: int = 1024

    def blocks(self) -> list[range]:
        """Instructions that are executed one after another; one that threads wait at is a block of its own."""
        starts = {0, *self.labels.values()}
        for i, instruction in enumerate(self.instructions):
            if instruction.base in ENDS_BLOCK:
                starts.add(i + 1)
            elif instruction.base in SYNCHRONISING:
                starts |= {i, i + 1}
        bounds = sorted(start for start in starts if start < len(self.instructions))
        return [range(a, b) for a, b in zip(bounds, [*bounds[1:], len(self.instructions)], strict=True)]


def _variable(text: str) -> Variable:
    """`.align 16 .b8 name[48]`, `.u64 name` or `.align 16 .b8 name[]`"""
    found = re.fullmatch(r"(?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d*)\])?", " ".join(text.split()))
    if not found:
        raise PtxError(f"a variable that is not understood: {text!r}")
    align, kind, name, count = found.groups()
    size = BITS[kind] // 8
    return Variable(name, int(align or size), size * int(count or 0) if count is not None else size)


def _operands(text: str) -> tuple[str, ...]:
    """Split at the commas outside of braces and brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts) if text.strip() else ()


class _Body:
    """Reads one kernel's body; registers of inner scopes get names of their own."""

    TOKEN = re.compile(r"\s*(?:([{}])|([\w$]+):|(\.loc[^\n]*)|([^;{}]*(?:\{[^;{}]*\}[^;{}]*)*;))")

    def __init__(self, kernel: Kernel, files: dict[str, str], line: int) -> None:
        self.kernel, self.files, self.line = kernel, files, line
        self.scopes: list[dict[str, str]] = [{}]
        self.source = ""

    def read(self, text: str) -> None:
        """From behind the body's opening brace to its closing one."""
        position = 0
        while True:
            found = self.TOKEN.match(text, position)
            if not found:
                raise PtxError(f"PTX that is not understood: {text[position : position + 80]!r}")
            brace, label, location, statement = found.groups()
            self.line += text.count("\n", position, found.end())
            position = found.end()
            if brace == "{":
                self.scopes.append({})
            elif brace == "}":
                self.scopes.pop()
                if not self.scopes:
                    return
            elif label:
                self.kernel.labels[label] = len(self.kernel.instructions)
            elif location:
                self.source = " of ".join(
                    f"{self.files.get(number, number)}:{row}"
                    for number, row in re.findall(r"(?:\.loc|inlined_at) (\d+) (\d+)", " ".join(location.split()))
                )
            else:
                self.statement(" ".join(statement[:-1].split()))

    def statement(self, text: str) -> None:
        if text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            return self.registers(text)
        if text.startswith(".shared"):
            self.kernel.shared.append(_variable(text.removeprefix(".shared ")))
            return
        found = re.fullmatch(r"(?:@(!?)([\w%]+) )?([a-z][\w.:]*)(?: (.*))?", text)
        if not found:
            raise PtxError(f"PTX line {self.line}: not understood: {text!r}")
        negated, guard, opcode, rest = found.groups()
        operands = _operands(re.sub(r"%?[A-Za-z_$][\w$]*(?:\.[xyz])?", lambda word: self.known(word[0]), rest or ""))
        instruction = Instruction(self.known(guard or ""), bool(negated), opcode, operands, self.line, self.source)
        self.kernel.instructions.append(instruction)

    def registers(self, text: str) -> None:
        """`.reg .b32 %r<7>` or, inside of a scope, `.reg .f16 low,high`"""
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()  # type: ignore[union-attr]
        for name in _operands(names):
            many = re.fullmatch(r"(%\w+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = one if len(self.scopes) == 1 else f"{one}@{len(self.kernel.registers)}"
                self.scopes[-1][one] = unique
                self.kernel.registers[unique] = BITS[kind]

    def known(self, word: str) -> str:
        for scope in reversed(self.scopes):
            if word in scope:
                return scope[word]
        return word


class Module(Mapping[str, Kernel]):
    """The kernels of a PTX file by their mangled names, each read when it is first asked for."""

    ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*", "", text)
        if wrong := re.search(r"^\s*\.(?:visible )?(?:global|const|func)\b[^\n]*", text, re.M):
            raise PtxError(f"a directive that is not understood: {wrong[0].strip()!r}")
        files = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
        self.files = {number: path.rpartition("/")[2] for number, path in files}
        self.dynamic = [_variable(found) for found in re.findall(r"^\.extern \.shared ([^;]+);", text, re.M)]
        self.text = text
        self.entries = {found[1]: found for found in self.ENTRY.finditer(text)}
        self.read: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self.read:
            self.read[name] = self._read(self.entries[name])
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _read(self, entry: re.Match[str]) -> Kernel:
        name, parameters, directives = entry.groups()
        kernel = Kernel(name, shared=list(self.dynamic))
        for parameter in filter(None, map(str.strip, parameters.split(","))):
            kernel.parameters.append(_variable(parameter.removeprefix(".param ")))
        if limit := re.search(r"\.maxntid (\d+)(?:, (\d+), (\d+))?", directives):
            kernel.most_threads = int(limit[1]) * int(limit[2] or 1) * int(limit[3] or 1)
        following = self.text.find(".entry", entry.end())
        body = self.text[entry.end() : following if following >= 0 else None]
        _Body(kernel, self.files, self.text.count("\n", 0, entry.end()) + 1).read(body)
        return kernel
