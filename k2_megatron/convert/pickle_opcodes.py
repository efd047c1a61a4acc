"""The few opcodes of pickle's protocol 2 that torch's own files are made of, for writing such files without torch.

Names and numbers: pickletools.opcodes of the standard library.
"""

import pickle
import struct

BEGIN, END = b"\x80\x02", b"."
NONE, FALSE = b"N", b"\x89"
CALL = b"R"  # what is below with the tuple on top


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def integers(values: tuple[int, ...]) -> bytes:
    return group(*map(integer, values))


def group(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def keep(value: bytes, number: int) -> bytes:
    """Make `value`, put it under `number` (below 256) for `kept`, and leave nothing on the stack."""
    return value + b"q" + bytes([number]) + b"0"


def kept(number: int) -> bytes:
    return b"h" + bytes([number])


def pairs(*items: tuple[bytes, bytes]) -> bytes:
    """A dictionary."""
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def items(*values: bytes) -> bytes:
    """A list."""
    return b"](" + b"".join(values) + b"e"


def instance(kind: bytes, state: bytes) -> bytes:
    """An object of a class: made with no arguments, then given its state where there is one (not b"")."""
    return kind + b")\x81" + (state + b"b" if state else b"")
