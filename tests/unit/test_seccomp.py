"""Seccomp filters: compiled, and then each tried in a new process."""

from __future__ import annotations

import errno
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import capabilities
from sandbox.capabilities import mask_of
from sandbox.errors import InvalidSpec, MissingProgram
from sandbox.seccomp import Filter, compile_profile, default_profile, libseccomp, parse_profile, seccomp_for
from sandbox.spec import Seccomp, SeccompKind, SecuritySpec

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86-64 system calls")

# Loads the filter given on stdin, then makes each system call of argv ("number:arg:arg") and prints
# its errno, 0 for success.
TRY = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
code = sys.stdin.buffer.read()
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
buffer = ctypes.create_string_buffer(code, len(code))
program = Program(len(code) // 8, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.syscall(317, 1, int(sys.argv[1]), ctypes.byref(program)) == 0, ctypes.get_errno()
answers = []
for call in sys.argv[2:]:
    ctypes.set_errno(0)
    result = libc.syscall(*(ctypes.c_long(int(word, 0)) for word in call.split(":")))
    answers.append(str(ctypes.get_errno() if result == -1 else 0))
print(" ".join(answers))
"""

GETPID, PTRACE, MOUNT, PERSONALITY, SOCKET, CLONE, CLONE3, UNSHARE = 39, 101, 165, 135, 41, 56, 435, 272
SETHOSTNAME, CHMOD, KEYCTL, REBOOT, IO_URING_SETUP = 170, 90, 250, 169, 425
NEWER = 9999


def attempt(filter: Filter, *calls: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(filter.flags), *calls],
        input=filter.bpf,
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr.decode()
    return [int(word) for word in done.stdout.split()]


def default(granted: int = capabilities.DEFAULT) -> Filter:
    return compile_profile(default_profile(), granted, kernel=(6, 1))


def localhost(
    profile: object, granted: int = capabilities.DEFAULT, kernel: tuple[int, int] = (6, 1)
) -> Filter:
    return compile_profile(parse_profile(json.dumps(profile).encode(), "/p.json"), granted, kernel=kernel)


def test_default_profile_allows_ordinary_calls_and_denies_management() -> None:
    calls = {
        f"{GETPID}": 0,
        f"{MOUNT}:0:0:0:0:0": errno.EPERM,
        f"{UNSHARE}:0x10000000": errno.EPERM,
        f"{CLONE}:0x10000011:0:0:0:0": errno.EPERM,  # CLONE_NEWUSER
        f"{CLONE3}:0:0": errno.ENOSYS,
        f"{PERSONALITY}:0xffffffff": 0,
        f"{PERSONALITY}:0x40000": errno.EPERM,  # ADDR_NO_RANDOMIZE
        f"{SOCKET}:1:1:0": 0,
        f"{SOCKET}:40:1:0": errno.EPERM,  # AF_VSOCK
        f"{KEYCTL}:0:0:0:0:0": errno.EPERM,
        f"{IO_URING_SETUP}:1:0": errno.EPERM,
        f"{SETHOSTNAME}:0:0": errno.EPERM,
        f"{NEWER}": errno.ENOSYS,
    }
    assert attempt(default(), *calls) == list(calls.values())


def test_capability_allows_its_calls() -> None:
    granted = capabilities.DEFAULT | mask_of(["SYS_ADMIN"])
    # EFAULT, EINVAL: they reached the kernel
    answers = attempt(
        default(granted), f"{MOUNT}:0:1:0:0:0", f"{CLONE3}:0:0", f"{SETHOSTNAME}:0:-1", f"{REBOOT}:0:0:0"
    )
    assert errno.EPERM not in answers[:3]
    assert errno.ENOSYS not in answers[:3]
    assert answers[3] == errno.EPERM


def test_process_under_default_profile_is_in_filter_mode() -> None:
    script = TRY.replace(
        "answers = []", "print([l for l in open('/proc/self/status') if l[:8] == 'Seccomp:'])\nanswers = []"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "0"], input=default().bpf, capture_output=True, timeout=30
    )
    assert b"Seccomp:\\t2" in done.stdout


def test_python_with_threads_and_children_runs_under_default_profile() -> None:
    script = (
        TRY
        + "import threading, subprocess, tempfile, socket\n"
        + "t = threading.Thread(target=tempfile.TemporaryFile); t.start(); t.join()\n"
        + "print(subprocess.run(['/bin/echo', 'fine'], capture_output=True).stdout)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "0"], input=default().bpf, capture_output=True, timeout=30
    )
    assert b"fine" in done.stdout, done.stderr.decode()


def test_profile_that_denies_one_call_allows_the_others() -> None:
    filter = localhost(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": ["chmod", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
                {"name": "sethostname", "action": "SCMP_ACT_ERRNO", "errnoRet": 71, "args": None},
            ],
        }
    )
    assert attempt(filter, f"{CHMOD}:0:0", f"{SETHOSTNAME}:0:0", f"{GETPID}") == [1, 71, 0]


@pytest.mark.parametrize(
    ("op", "value", "two", "denied", "allowed"),
    [
        ("SCMP_CMP_EQ", 5, 0, 5, 6),
        ("SCMP_CMP_NE", 5, 0, 6, 5),
        ("SCMP_CMP_LT", 5, 0, 4, 5),
        ("SCMP_CMP_LE", 5, 0, 5, 6),
        ("SCMP_CMP_GE", 5, 0, 5, 4),
        ("SCMP_CMP_GT", 5, 0, 6, 5),
        ("SCMP_CMP_MASKED_EQ", 0xF0, 0x20, 0x2F, 0x3F),
    ],
)
def test_every_comparison_operator_is_applied(
    op: str, value: int, two: int, denied: int, allowed: int
) -> None:
    rule = {
        "names": ["getpriority"],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": 71,
        "args": [{"index": 0, "value": value, "valueTwo": two, "op": op}],
    }
    filter = localhost({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})
    answers = attempt(filter, f"140:{denied}:0", f"140:{allowed}:0")
    assert answers[0] == 71
    assert answers[1] != 71


def test_conditions_on_one_argument_are_alternatives() -> None:
    args = [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"} for value in (4, 5)]
    rule = {"names": ["getpriority"], "action": "SCMP_ACT_ERRNO", "errnoRet": 71, "args": args}
    filter = localhost({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})
    assert [answer == 71 for answer in attempt(filter, "140:4:0", "140:5:0", "140:6:0")] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("condition", "granted", "kernel", "applies"),
    [
        ({"includes": {"caps": ["CAP_SYS_ADMIN"]}}, 0, (6, 1), False),
        ({"includes": {"caps": ["CAP_SYS_ADMIN"]}}, capabilities.ALL, (6, 1), True),
        ({"includes": {"caps": ["CAP_OF_THE_FUTURE"]}}, capabilities.ALL, (6, 1), False),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN"]}}, capabilities.ALL, (6, 1), False),
        ({"excludes": {"caps": ["CAP_SYS_ADMIN"]}}, 0, (6, 1), True),
        ({"includes": {"arches": ["s390x"]}}, 0, (6, 1), False),
        ({"includes": {"arches": ["arm64", "amd64"]}}, 0, (6, 1), True),
        ({"excludes": {"arches": ["amd64"]}}, 0, (6, 1), False),
        ({"includes": {"minKernel": "4.8"}}, 0, (6, 1), True),
        ({"includes": {"minKernel": "6.2"}}, 0, (6, 1), False),
        ({"includes": None, "excludes": {}}, 0, (6, 1), True),
    ],
)
def test_includes_and_excludes_select_rules(
    condition: dict[str, object], granted: int, kernel: tuple[int, int], applies: bool
) -> None:
    rule = {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", **condition}
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    plain = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule] if applies else []}
    plain["syscalls"] = [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}] if applies else []
    assert localhost(profile, granted, kernel).bpf == localhost(plain).bpf


def test_architectures_of_both_dialects_are_compiled() -> None:
    rule = {"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}
    body = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    oci = localhost({**body, "architectures": ["SCMP_ARCH_X86", "SCMP_ARCH_S390X"]})
    docker = localhost(
        {
            **body,
            "archMap": [
                {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
                {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
            ],
        }
    )
    assert oci.bpf == docker.bpf != localhost(body).bpf


def test_flags_of_profile_are_kept() -> None:
    assert localhost({"defaultAction": "SCMP_ACT_ALLOW"}).flags == 4
    assert localhost({"defaultAction": "SCMP_ACT_ALLOW", "flags": []}).flags == 0
    assert localhost({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_LOG"]}).flags == 2


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"", "truncated"),
        (b"[]", "object"),
        (b"[" * 100_000, ""),
        (b"{}", "defaultAction"),
        (b'{"defaultAction": "SCMP_ACT_MAYBE"}', "$.defaultAction"),
        (b'{"defaultAction": "SCMP_ACT_NOTIFY"}', "$.defaultAction"),
        (b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["a"]}]}', "$.syscalls[0]"),
        (
            b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG"}]}',
            "$.syscalls[0].names",
        ),
        (
            b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG", "names": ["a"],'
            b' "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]}',
            "$.syscalls[0].args[0].index",
        ),
        (
            b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG", "names": ["a"],'
            b' "args": [{"index": 1, "value": 18446744073709551616, "op": "SCMP_CMP_EQ"}]}]}',
            "$.syscalls[0].args[0]",
        ),
        (
            b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_ERRNO", "names": ["a"],'
            b' "errnoRet": 5000}]}',
            "$.syscalls[0].errnoRet",
        ),
        (
            b'{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_LOG", "names": ["a"],'
            b' "includes": {"minKernel": "new"}}]}',
            "$.syscalls[0].includes.minKernel",
        ),
        (b'{"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s"}', "$.listenerPath"),
    ],
)
def test_malformed_profile_is_rejected_with_json_path(content: bytes, place: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_profile(content, "/p.json")
    assert "/p.json" in str(caught.value)
    assert place in str(caught.value)


@given(st.binary() | st.text().map(str.encode))
def test_arbitrary_bytes_are_a_profile_or_rejected(content: bytes) -> None:
    with pytest.raises(InvalidSpec):
        parse_profile(content, "/p.json")


arguments = st.fixed_dictionaries(
    {
        "index": st.integers(0, 5),
        "value": st.integers(0, (1 << 64) - 1),
        "op": st.sampled_from(["SCMP_CMP_NE", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_MASKED_EQ"]),
    }
)
some_rules = st.fixed_dictionaries(
    {
        "names": st.lists(
            st.sampled_from(["chmod", "socket", "read", "socketcall", "nonsense", ""]), min_size=1, max_size=3
        ),
        "action": st.sampled_from(
            ["SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_LOG"]
        ),
        "args": st.lists(arguments, max_size=3),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", "SCMP_ACT_TRAP", "SCMP_ACT_TRACE"]),
    st.lists(some_rules, max_size=4),
)
def test_any_well_formed_profile_compiles_or_is_rejected(action: str, rules: list[object]) -> None:
    try:
        filter = localhost({"defaultAction": action, "architectures": ["SCMP_ARCH_X86"], "syscalls": rules})
    except InvalidSpec as error:
        assert "libseccomp" in str(error)
        return
    assert filter.bpf
    assert len(filter.bpf) % 8 == 0


# ----------------------------------------------------------------------- what a client asks for


def security(kind: SeccompKind, path: str = "", *, privileged: bool = False) -> SecuritySpec:
    return SecuritySpec(seccomp=Seccomp(kind=kind, path=path), privileged=privileged)


def test_unconfined_and_privileged_containers_have_no_filter(tmp_path: Path) -> None:
    assert seccomp_for(security(SeccompKind.UNCONFINED)) == Filter()
    assert seccomp_for(security(SeccompKind.RUNTIME_DEFAULT, privileged=True)) == Filter()
    assert seccomp_for(security(SeccompKind.LOCALHOST, "/nowhere", privileged=True)) == Filter()


def test_runtime_default_depends_on_capabilities() -> None:
    assert seccomp_for(security(SeccompKind.RUNTIME_DEFAULT)) == default()
    admin = SecuritySpec(seccomp=Seccomp(kind=SeccompKind.RUNTIME_DEFAULT), add_capabilities=("SYS_ADMIN",))
    assert seccomp_for(admin) != default()


def test_localhost_profile_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert seccomp_for(security(SeccompKind.LOCALHOST, str(file))) == localhost(
        {"defaultAction": "SCMP_ACT_ALLOW"}
    )


@pytest.mark.parametrize("path", ["", "profiles/p.json", "/no/such/file", "/dev/zero", "/", "/a\0b"])
def test_unreadable_localhost_profile_is_rejected(path: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        seccomp_for(security(SeccompKind.LOCALHOST, path))
    assert caught.value.field.endswith("seccomp.localhost_ref")


def test_same_profile_is_compiled_once() -> None:
    assert default() is default()


def test_missing_libseccomp_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    libseccomp._library.cache_clear()
    monkeypatch.setattr(libseccomp, "LIBRARY", "libseccomp-is-not-here.so")
    try:
        with pytest.raises(MissingProgram, match="libseccomp2"):
            compile_profile(default_profile(), 1, kernel=(5, 99))
    finally:
        libseccomp._library.cache_clear()
