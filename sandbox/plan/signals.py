"""Names and numbers of signals, and the exit codes of processes that they end. Pure.

Numbers are Linux's for x86 and Arm. Real-time signals begin at 34, which glibc calls SIGRTMIN
(signal(7)); the C library uses the two below.
"""

from __future__ import annotations

import re

from sandbox.errors import InvalidSpec

DEFAULT = "SIGTERM"
RTMIN = 34
RTMAX = 64

_IN_ORDER = """
HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU
URG XCPU XFSZ VTALRM PROF WINCH IO PWR SYS
"""
_FIXED = tuple(_IN_ORDER.split())
_NUMBERS = {name: number for number, name in enumerate(_FIXED, start=1)} | {
    "IOT": 6,
    "CLD": 17,
    "POLL": 29,
    "UNUSED": 31,
    "RTMIN": RTMIN,
    "RTMAX": RTMAX,
}
# "SIGRTMIN+3" as people write it, "SIGRTMINPLUS3" as the CRI's enum has it
_REAL_TIME = re.compile(r"RTMIN(?:\+|PLUS)(\d{1,2})|RTMAX(?:-|MINUS)(\d{1,2})", re.ASCII)
_ACCEPTED = "a name such as SIGTERM, TERM or SIGRTMIN+3, or a number from 1 to 64"


def signal_number(name: str, field: str = "config.stop_signal") -> int:
    """Return the number for a name such as SIGTERM, TERM or SIGRTMIN+3, or for a number as text.

    Raises InvalidSpec with `field` for anything else.
    """
    bare = name.strip().upper().removeprefix("SIG")
    number = _NUMBERS.get(bare, 0)
    if bare.isascii() and bare.isdigit() and len(bare) <= 3:
        number = int(bare)
    elif real_time := _REAL_TIME.fullmatch(bare):
        above, below = real_time.groups()
        number = RTMIN + int(above) if above else RTMAX - int(below)
        if not RTMIN <= number <= RTMAX:
            number = 0
    if not (1 <= number <= len(_FIXED) or RTMIN <= number <= RTMAX):
        raise InvalidSpec(field, f"{name!r} is not a signal", _ACCEPTED)
    return number


def signal_name(number: int) -> str:
    """Return the canonical name: "SIGTERM", "SIGRTMIN+3"; the number as text where there is none."""
    if 1 <= number <= len(_FIXED):
        return f"SIG{_FIXED[number - 1]}"
    if number in (RTMIN, RTMAX):
        return "SIGRTMIN" if number == RTMIN else "SIGRTMAX"
    if RTMIN < number < RTMIN + 16:
        return f"SIGRTMIN+{number - RTMIN}"
    if number < RTMAX:
        return f"SIGRTMAX-{RTMAX - number}"
    return str(number)


def resolve_stop_signal(requested: str, image: str) -> str:
    """Return the name of the requested stop signal, else of the image's, else SIGTERM. Raises InvalidSpec."""
    if requested:
        return signal_name(signal_number(requested))
    if image:
        return signal_name(signal_number(image, "the image's StopSignal"))
    return DEFAULT


def exit_code_of(number: int) -> int:
    """Return the exit code of a process that this signal ended, as shells and the CRI count it."""
    return 128 + number


def describe_exit(code: int) -> str:
    """Return the exit code for a message: "exit code 3", "exit code 137 (SIGKILL)"."""
    ending = code - 128
    if 1 <= ending <= len(_FIXED) or RTMIN <= ending <= RTMAX:
        return f"exit code {code} ({signal_name(ending)})"
    return f"exit code {code}"
