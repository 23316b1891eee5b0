"""A small evaluator of classic BPF, as the kernel runs it over struct seccomp_data."""

from __future__ import annotations

import struct


def verdict(program: bytes, *, arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the filter answers to one system call. Raises on anything the kernel's checker would refuse."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *padded)
    code = list(struct.iter_unpack("<HBBI", program))
    assert 0 < len(code) <= 4096
    at, accumulator = 0, 0
    while True:
        operation, if_true, if_false, constant = code[at]
        at += 1
        match operation:
            case 0x20:
                assert constant % 4 == 0
                accumulator = struct.unpack_from("<I", data, constant)[0]
            case 0x15:
                at += if_true if accumulator == constant else if_false
            case 0x35:
                at += if_true if accumulator >= constant else if_false
            case 0x45:
                at += if_true if accumulator & constant else if_false
            case 0x06:
                return int(constant)
            case _:
                raise AssertionError(f"unknown opcode {operation:#x}")
