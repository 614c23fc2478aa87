"""How many instructions a thread executes of a kernel's machine code (sm_90), without a GPU.

The first thread of the first block is walked through the text of nvdisasm. Its integers and
predicates have their values, which follow from the kernel's arguments: they count loops and choose
branches. Of floats nothing is known but that what is loaded is 1 and that no division leaves its
range. What an instruction writes whose inputs are unknown, or which is not one of those below, is
unknown, and a branch that depends on it is an error: nothing is guessed.

Counted is what a warp issues whose threads all go the same way: instructions that a predicate
switches off too, not those that a branch leaves out.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

SIZE = 16  # bytes of an instruction
ARGUMENTS = 0x210  # where those of a kernel start in c[0x0]
LIMIT = 1_000_000
MASK = 0xFFFFFFFF
ONE = {"float32": 0x3F800000, "bfloat16": 0x3F80}


class Instruction(NamedTuple):
    guard: str  # the predicate that switches it on
    base: str  # IMAD
    modifiers: tuple[str, ...]  # WIDE, U32
    outputs: tuple[str, ...]  # registers and predicates
    inputs: tuple[str, ...]


class Code(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction behind it


class Unknown(Exception):
    """A branch depends on what is not known."""


def executed(code: Code, arguments: bytes) -> int:
    """Instructions up to the first barrier, or the end."""
    return _Thread(code, arguments).run()


# ---- the text


def sections(text: str) -> dict[str, str]:
    """{function: its part} of what `nvdisasm -c` prints."""
    parts = re.split(r"^\.text\.(\S+):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse(text: str) -> Code:
    """The code of one function."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pattern = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;")
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif match := pattern.match(line):
            guard, name, operands = match.groups()
            base, *modifiers = name.split(".")
            written = _written(base, operands)
            parts = tuple(re.split(r",\s*", operands)) if operands else ()
            instructions.append(
                Instruction(guard or "PT", base, tuple(modifiers), parts[:written], parts[written:])
            )
    return Code(instructions, labels)


def _written(base: str, operands: str) -> int:
    """Outputs among the operands: predicates for carries stand on either side of a register."""
    predicates, register = r"(?:U?P[T\d](?:, |$))", r"(?:U?R(?:Z|\d+)(?:, |$))"
    pattern = f"{predicates}*{register}?{predicates}*"
    if base.endswith(("SETP", "PLOP3", "FCHK")):
        pattern = f"{predicates}{{0,2}}"
    found = re.match(pattern, operands)
    return len(re.findall(r"\w+", found[0])) if found else 0


# ---- values


def _signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (value >> bits - 1 << bits)


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits & MASK))[0]


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _next(register: str) -> str:
    """The high half of a number of 64 bits."""
    name, number = register.rstrip("0123456789"), register.lstrip("UR")
    return f"{name}{int(number) + 1}" if number.isdigit() else register


def _table(lut: int, inputs: list[bool | None]) -> bool | None:
    """A truth table's value; known where no unknown input changes it."""
    rows = {0}
    for value in inputs:
        rows = {2 * row + bit for row in rows for bit in (0, 1) if value in (None, bool(bit))}
    results = {bool(lut >> row & 1) for row in rows}
    return results.pop() if len(results) == 1 else None


class _Thread:
    def __init__(self, code: Code, arguments: bytes) -> None:
        self.code = code
        self.constants = bytes(ARGUMENTS) + arguments
        self.registers: dict[str, tuple[int, int]] = {}  # values, and which of their bits are known
        self.predicates: dict[str, bool | None] = {}

    def run(self) -> int:
        at = 0
        for count in range(1, LIMIT):
            each = self.code.instructions[at]
            at += 1
            match each.base:
                case "EXIT" | "BAR":
                    if self.goes(each):
                        return count
                case "BRA":
                    if self.goes(each):
                        at = self.code.labels[each.inputs[-1].strip("`()")]
                case "BRX" | "CALL" | "RET":
                    if self.goes(each):
                        raise Unknown(f"where it goes: {each}")
                case _:
                    self.step(each)
        raise Unknown(f"no end within {LIMIT} instructions")

    def goes(self, each: Instruction) -> bool:
        if "DIV" in each.modifiers:  # only where threads go different ways
            return False
        conditions = [self.predicate(each.guard)]
        conditions += [self.predicate(p) for p in (*each.outputs, *each.inputs) if "P" in p]
        taken = _table(1 << (1 << len(conditions)) - 1, conditions)  # and
        if taken is None:
            raise Unknown(f"whether it goes: {each}")
        return taken

    def predicate(self, text: str) -> bool | None:
        name = text.lstrip("!")
        value = True if name in ("PT", "UPT") else self.predicates.get(name)
        return value if value is None or text[0] != "!" else not value

    def value(self, text: str, bits: int = 32) -> int | None:
        """A negative is 2^bits - x, 2^bits for 0: it carries as in hardware."""
        text = text.replace(".reuse", "")
        name, top = text.lstrip("-~"), (1 << bits) - 1
        found: int | None
        if name in ("RZ", "URZ"):
            found = 0
        elif constant := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", name):
            start = int(constant[1], 16)
            data = self.constants[start : start + bits // 8]
            found = int.from_bytes(data, "little") if start >= ARGUMENTS else None
        elif name.startswith("0x"):
            found = int(name, 16)
            return -found & top if text[0] == "-" else found
        elif re.fullmatch(r"U?R\d+", name):
            (found, low), (high, up) = (self.bits(each) for each in (name, _next(name)))
            if low & (up if bits == 64 else MASK) != MASK:
                return None
            found |= high << 32 if bits == 64 else 0
        else:
            found = None
        if found is None or text == name:
            return found
        return (1 << bits) - found if text[0] == "-" else found ^ top

    def bits(self, text: str) -> tuple[int, int]:
        """A value of 32 bits, and which of them are known."""
        name = text.replace(".reuse", "")
        if re.fullmatch(r"U?R\d+", name):
            # what was never written the compiler reads only where it plays no part
            return self.registers.get(name, (0, MASK))
        value = self.value(text)
        return (0, 0) if value is None else (value & MASK, MASK)

    def write(self, name: str, value: int | None, words: int = 1, known: int = MASK) -> None:
        for word in range(words):
            self.registers[name] = (0, 0) if value is None else (value >> 32 * word & MASK, known)
            name = _next(name)

    # ---- instructions

    def step(self, each: Instruction) -> None:
        active = self.predicate(each.guard)
        if active is not False and not (active and self.compute(each)):
            self.forget(each)

    def forget(self, each: Instruction) -> None:
        """All that it may have written."""
        if each.base == "R2P":
            self.predicates.clear()
        long = {"64", "U64", "S64", "F64", "WIDE"}
        double = each.base[0] == "D" or long & {*each.modifiers}
        words = 4 if "128" in each.modifiers else 2 if double else 1
        for name in each.outputs:
            if "P" in name:
                self.predicates[name] = None
            else:
                self.write(name, None, words)

    def compute(self, each: Instruction) -> bool:
        """False where it is not known what is written."""
        base = each.base.removeprefix("U")
        if base == "FCHK":  # would the division leave its range?
            self.predicates[each.outputs[0]] = False
            return True
        if base == "ISETP":
            return self.compare(each)
        if base == "PLOP3":
            values = [self.predicate(text) for text in each.inputs[:3]]
            for name, lut in zip(each.outputs, each.inputs[3:], strict=True):
                self.predicates[name] = _table(int(lut, 16), values)
            return True
        registers = [name for name in each.outputs if "R" in name]
        if not registers:
            return False
        if base in ("LDG", "LDC", "S2R", "S2UR", "CS2R"):
            self.load(base, each.modifiers, registers[0], each.inputs[0])
            return True
        if base in ("LOP3", "PRMT"):
            return self.combine(each, registers[0])
        wide = "WIDE" in each.modifiers
        result = self.result(base, each)
        if result is None:
            return False
        self.write(registers[0], result, 2 if wide else 1)
        for i, name in enumerate(name for name in each.outputs if "P" in name):
            self.predicates[name] = result >> (64 if wide else 32) > i
        return True

    def combine(self, each: Instruction, to: str) -> bool:
        """Bits of words, some of which are known: the compiler keeps predicates in them."""
        words = [self.bits(text) for text in each.inputs[:3]]
        if each.base == "PRMT":
            (low, known_low), (selector, _), (high, known_high) = words
            half = MASK >> 16
            if selector == 0x7610:
                known = known_low & half | known_high & ~half
                self.write(to, low & half | high & ~half, known=known)
            return selector == 0x7610
        can_be = [0, 0]
        for row in range(8):  # of its truth table
            at = MASK
            for shift, (value, known) in zip((2, 1, 0), words, strict=True):
                at &= (value if row >> shift & 1 else ~value) | ~known
            can_be[int(each.inputs[3], 16) >> row & 1] |= at
        known = can_be[0] ^ can_be[1]
        value = can_be[1] & known
        self.write(to, value, known=known)
        for name in (name for name in each.outputs if "P" in name):
            found = True if value else False if known == MASK else None
            self.predicates[name] = _table(0b1110, [found, self.predicate(each.inputs[4])])
        return True

    def load(self, base: str, modifiers: tuple[str, ...], to: str, source: str) -> None:
        words = 4 if "128" in modifiers else 2 if "64" in modifiers or base == "CS2R" else 1
        if base == "LDG":
            one = ONE["bfloat16" if "U16" in modifiers else "float32"]
            self.write(to, sum(one << 32 * word for word in range(words)), words)
        elif base == "LDC":
            self.write(to, self.value(source, 8 if "U8" in modifiers else 32 * words), words)
        else:
            zero = source.startswith(("SR_TID", "SR_CTAID", "SRZ"))
            self.write(to, 0 if zero else None, words)

    def compare(self, each: Instruction) -> bool:
        a, b = (self.value(text) for text in each.inputs[:2])
        others = [self.predicate(text) for text in each.inputs[2:]]
        found: bool | None = None
        if a is not None and b is not None:
            a, b = (x & MASK if "U32" in each.modifiers else _signed(x) for x in (a, b))
            signs = {
                "EQ": a == b,
                "NE": a != b,
                "LT": a < b,
                "LE": a <= b,
                "GT": a > b,
                "GE": a >= b,
            }
            found = signs[each.modifiers[0]]
            if "EX" in each.modifiers and a == b:  # of high words; others[1]: of the low ones
                found = others[1]
        lut = 0b1000 if "AND" in each.modifiers else 0b1110
        both = found, None if found is None else not found
        for name, value in zip(each.outputs, both, strict=True):
            self.predicates[name] = _table(lut, [value, others[0]])
        return "AND" in each.modifiers or "OR" in each.modifiers

    def result(self, base: str, each: Instruction) -> int | None:
        """What is written, not cut to its bits where the rest is carried."""
        has = {*each.modifiers}.__contains__
        sources = [text for text in each.inputs if "P" not in text]
        if base == "HFMA2" and sources[:2] == ["-RZ", "RZ"]:  # a constant, of two halves
            high, low = (struct.pack("<e", float(text)) for text in sources[2:])
            return int.from_bytes(low + high, "little")
        if base == "P2R" and not each.modifiers:
            return self.saved(*sources)
        predicates = [self.predicate(text) for text in each.inputs if "P" in text]
        long = base == "IMAD" and (has("WIDE") or has("HI"))
        known = [self.value(text, 64 if long and i == 2 else 32) for i, text in enumerate(sources)]
        if base == "IMAD" and 0 in known[:2]:  # whatever the other factor is
            known[:2] = 0, 0
        if base == "SEL" and predicates[0] is not None:
            known = [known[0 if predicates[0] else 1]]
        v = [x for x in known if x is not None]
        if len(v) < len(known) or None in predicates:
            return None
        carry = sum(map(bool, predicates))
        match base:
            case "MOV" | "SEL" | "R2UR":
                return v[0]
            case "IADD3":
                return sum(v) + carry
            case "VIADD":
                return sum(v) & MASK
            case "IABS":
                return abs(_signed(v[0]))
            case "IMAD":
                a, b = (x & MASK if has("U32") else _signed(x) for x in v[:2])
                if has("HI"):
                    return a * b + v[2] >> 32 & MASK
                if has("WIDE"):
                    return a * b % (1 << 64) + v[2] + carry
                return a * b + v[2] + carry & MASK
            case "LEA":
                if not has("HI"):
                    return (v[0] << v[-1] & MASK) + v[1] + carry
                high_word = (MASK if _signed(v[0]) < 0 else 0) if has("SX32") else v[2]
                return ((high_word << 32 | v[0]) << v[-1] >> 32 & MASK) + v[1] + carry
            case "SHF" if has("U64") or has("S64"):
                pair = v[2] << 32 | v[0]
                pair = _signed(pair, 64) if has("S64") else pair
                moved = pair << v[1] if has("L") else pair >> v[1]
                return (moved >> 32 if has("HI") else moved) & MASK
            case "SHF" if has("L") and not has("HI"):
                return v[0] << v[1] & MASK
            case "SHF" if has("R") and has("HI"):
                return (_signed(v[2]) if has("S32") else v[2]) >> v[1] & MASK
            case "I2F" if has("RP") and not (has("S64") or has("U64")):
                return _bits(v[0])
            case "MUFU" if each.modifiers == ("RCP",) and v[0]:
                return _bits(1 / _float(v[0]))
            case "F2I" if has("TRUNC"):
                return int(_float(v[0])) & MASK
        return None

    def saved(self, base: str, mask: str) -> int | None:
        """Predicates as the bits of a number."""
        value, bits = self.value(base), int(mask, 16)
        for i in (i for i in range(7) if bits >> i & 1):
            predicate = self.predicates.get(f"P{i}")
            if value is None or predicate is None:
                return None
            value = value & ~(1 << i) | predicate << i
        return value
