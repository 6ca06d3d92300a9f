"""Lint, types, layers and the rules of this repository, as ordinary tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

import grimp
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.kit import house_rules

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cri", "sandbox", "network", "image")
TEXT = {".py", ".c", ".h", ".md", ".toml", ".txt", ".yaml", ".sh", ".proto", ".service", ".conflist"}


@cache
def files() -> tuple[Path, ...]:
    """Return every file that is or would be committed."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    return tuple(ROOT / name for name in sorted(set(names)) if name and (ROOT / name).is_file())


def run(*command: str) -> None:
    """Run a tool and fail with its output if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"


def tool(name: str) -> str:
    """Return the path of a program, of our environment or else of the machine."""
    own = Path(sys.executable).parent / name
    found = str(own) if own.exists() else shutil.which(name)
    assert found, f"{name} is not installed (deploy/install-packages tests/packages.txt)"
    return found


def shell_scripts() -> list[str]:
    scripts = []
    for path in files():
        with path.open("rb") as file:
            first = file.readline(80)
        if re.match(rb"#!.*\b(ba)?sh\b", first):
            scripts.append(str(path.relative_to(ROOT)))
    return scripts


def c_sources() -> list[str]:
    return [str(path.relative_to(ROOT)) for path in files() if path.suffix in (".c", ".h")]


# ------------------------------------------------------------------------------------ tools


def test_ruff_finds_nothing() -> None:
    run(tool("ruff"), "check", "--quiet", ".")


def test_python_is_formatted() -> None:
    run(tool("ruff"), "format", "--quiet", "--check", ".")


def test_types_are_consistent() -> None:
    run(tool("mypy"))


def test_layers_are_respected() -> None:
    run(tool("lint-imports"), "--no-cache")


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = shell_scripts()
    assert "tests/run" in scripts
    run(tool("shellcheck"), *scripts)


def test_c_is_formatted() -> None:
    assert c_sources()
    style = "--style=file:sandbox/agent/.clang-format"
    run(tool("clang-format"), style, "--dry-run", "--Werror", *c_sources())


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_agent_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    run("make", "-s", "-C", "sandbox/agent", f"CC={compiler}", f"OUT={tmp_path}/agent")


# ----------------------------------------------------------------------------------- layers


@cache
def imports() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, include_external_packages=True, cache_dir=None)


def imported_by(prefix: str) -> dict[str, set[str]]:
    """What each module at or beneath `prefix` imports itself."""
    graph = imports()
    modules = (each for each in graph.modules if each == prefix or each.startswith(f"{prefix}."))
    return {each: set(graph.find_modules_directly_imported_by(each)) for each in modules}


@pytest.mark.parametrize("seam", ["sandbox.vmm", "sandbox.guest"])
def test_hypervisor_and_guest_see_only_values(seam: str) -> None:
    """Plans and processes in, handles out: a backend must not know pods, containers or records."""
    known = {"spec", "session", "host", "errors"}
    for module, found in imported_by(seam).items():
        others = {each for each in found if each.startswith("sandbox.") and not each.startswith(seam)}
        assert {each.split(".")[1] for each in others} <= known, module


def test_every_module_of_pods_and_containers_is_in_the_contracts() -> None:
    """Those directly in sandbox/ are listed one by one, as import-linter has no name for them together."""
    modules = {f"sandbox.{path.stem}" for path in (ROOT / "sandbox").glob("*.py")} - {"sandbox.__init__"}
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = [
        set(each["source_modules"]) | set(each["forbidden_modules"])
        for each in contracts
        if "sandbox.pods" in each.get("source_modules", []) + each.get("forbidden_modules", [])
    ]
    assert len(listed) >= 6
    missing = [modules - each - {"sandbox.errors"} for each in listed if "cri.streaming" not in each]
    # hypervisors may see the specification, the conversation with the agent sessions too
    assert [each - {"sandbox.spec", "sandbox.session"} for each in missing] == [set()] * len(missing)


def cycles(imports_of: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or not (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    open_modules: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        open_modules.append(module)
        for each in sorted(imports_of.get(module, ())):
            if each not in order:
                visit(each)
                lowest[module] = min(lowest[module], lowest[each])
            elif each in open_modules:
                lowest[module] = min(lowest[module], order[each])
        if lowest[module] == order[module]:
            group = open_modules[open_modules.index(module) :]
            del open_modules[len(open_modules) - len(group) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in sorted(imports_of):
        if module not in order:
            visit(module)
    return found


def test_import_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set()}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_import_cycle_in_the_tree() -> None:
    """Imports for types alone (TYPE_CHECKING) count: they hide a cycle from Python, not from a reader."""
    graph = grimp.build_graph(*PACKAGES, "tests", cache_dir=None)
    direct = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    assert "tests.test_repo" in direct
    assert cycles(direct) == []


# Where the agent's messages are made and read; all else speaks values (sandbox/plan/values.py, engine.py).
SPEAKS_TO_AGENT = ("sandbox.guest.", "sandbox.vm_pods.", "sandbox.plan.encode")


def test_messages_of_the_agent_are_known_to_its_callers_alone() -> None:
    messages = "sandbox.guest.guest_pb2"
    importers = imports().find_modules_that_directly_import(messages)
    assert "sandbox.plan.encode" in importers
    assert {each for each in importers if not each.startswith(SPEAKS_TO_AGENT)} == set()


# system calls, bpf(2), libseccomp, liblz4
FOREIGN_CALLS = {
    "sandbox.host.syscalls",
    "sandbox.host.bpf",
    "sandbox.seccomp.libseccomp",
    "sandbox.guest_image.vmlinux",
}


def test_foreign_functions_are_called_in_few_modules() -> None:
    assert imports().find_modules_that_directly_import("ctypes") == FOREIGN_CALLS


PURE = (
    "cri.translate",
    "sandbox.plan",
    "sandbox.spec",
    "sandbox.stats.kernel_files",
    "sandbox.stats.parse",
    "sandbox.usage",
    "sandbox.vm_pods.usage",
    "image.auth",
    "image.manifest",
    "image.platforms",
    "image.reference",
    "image.registry.challenge",
    "image.registry.proxy",
    "image.rootfs",
    "image.tar",
    "sandbox.guest.frames",
)
IMPURE = {
    "asyncio", "ctypes", "fcntl", "glob", "io", "os", "select", "shutil", "signal", "socket", "subprocess",
    "tempfile", "threading", "time",
}  # fmt: skip


@pytest.mark.parametrize("module", PURE)
def test_pure_files_know_no_clock_files_or_loop(module: str) -> None:
    found = imported_by(module)
    assert found, f"{module} does not exist"
    for each, names in found.items():
        assert not names & IMPURE, each


def test_plan_depends_on_nothing_that_reads_clock_files_or_loop() -> None:
    """Nor does anything that it imports; `sandbox.vmm` is entered for the values of its seam alone."""
    graph, seen = imports(), {"sandbox.vmm"}
    waiting = {each for each in graph.modules if each.split(".")[:2] == ["sandbox", "plan"]}
    while waiting:
        module = waiting.pop()
        found = set(graph.find_modules_directly_imported_by(module))
        assert not found & (IMPURE | {"pathlib"}), module
        seen.add(module)
        waiting |= {each for each in found - seen if each.split(".")[0] in PACKAGES}


# ------------------------------------------------------------------------------ small rules


def test_text_is_about_the_project_alone() -> None:
    """No path of a machine, no place outside of this tree, no word about how it was written."""
    words = ["/work/" + "main", "/work/" + "shared", "../" + "shared", "/tmp/" + "w/"]
    found = []
    for path in files():
        if path.suffix in TEXT or path.suffix == "":
            text = path.read_text(errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {word}" for word in words if word in text]
    assert found == []


def texts(*suffixes: str, within: Collection[str] = ()) -> dict[str, str]:
    """Return the texts of files written by us with these suffixes, by path; `within` are top directories."""
    found = {}
    for path in files():
        name = str(path.relative_to(ROOT))
        if (
            path.suffix in suffixes
            and "_pb2." not in name
            and (not within or path.parts[len(ROOT.parts)] in within)
        ):
            found[name] = path.read_text()
    return found


def test_files_have_at_most_600_lines() -> None:
    sources = texts(".py", ".c", ".h").items()
    found = [each for path, text in sources for each in house_rules.long_files(path, text)]
    assert [str(each) for each in sorted(found)] == []


def test_tests_are_named_in_words() -> None:
    sources = texts(".py", within=["tests"]).items()
    found = [each for path, text in sources for each in house_rules.bad_test_names(path, text)]
    assert [str(each) for each in sorted(found)] == []


def test_public_names_have_docstrings() -> None:
    found = house_rules.missing_docstrings(texts(".py", within=PACKAGES))
    assert [str(each) for each in sorted(found)] == []


def test_words_are_those_of_the_field() -> None:
    sources = texts(".py", ".c", ".h", ".md", ".proto", ".sh").items()
    exempt = ("tests/kit/house_rules.py", "tests/unit/test_house_rules.py", "cri/proto/runtime_v1.proto")
    found = [each for path, text in sources if path not in exempt for each in house_rules.dialect(path, text)]
    assert [str(each) for each in sorted(found)] == []


def test_modules_say_what_they_own() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in files()
        if path.suffix == ".py"
        and path.parts[len(ROOT.parts)] in PACKAGES
        and not path.name.endswith("_pb2.py")
        and path.read_text().strip()
        and not path.read_text().lstrip().startswith(('"""', 'r"""', "# "))
    ]
    assert silent == []


def test_packages_of_doctor_are_installed_by_quickstart() -> None:
    """Each Debian package that an error message names is in a list that the set-up scripts read."""
    listed = re.findall(r"[a-z0-9.+-]+", (ROOT / "deploy/packages.txt").read_text())
    named: set[str] = set()
    for path in files():
        if path.suffix == ".py" and path.parts[len(ROOT.parts)] in PACKAGES:
            named |= set(re.findall(r"apt(?:-get)? install ([a-z0-9.+-]+)", path.read_text()))
    assert named <= set(listed)


@pytest.mark.parametrize("name, extras", [("requirements.txt", False), ("requirements-test.txt", True)])
def test_locked_packages_fit_the_project_and_have_hashes(name: str, extras: bool) -> None:
    text = (ROOT / "deploy" / name).read_text().replace("\\\n", " ")
    locked = {}
    for line in text.splitlines():
        package, *hashes = re.split(r"\s--hash=", line.strip())
        requirement = Requirement(package)
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes), line
        (exact,) = requirement.specifier
        assert exact.operator == "==", line
        locked[canonicalize_name(requirement.name)] = exact.version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(one for all in project["optional-dependencies"].values() for one in all if extras),
    ]
    for each in map(Requirement, wanted):
        version = locked.get(canonicalize_name(each.name))
        assert version and each.specifier.contains(version), f"{each} is not locked; run deploy/lock"


def test_both_lists_of_locked_packages_have_the_same_versions() -> None:
    of_husk, of_tests = (
        (ROOT / "deploy" / name).read_text() for name in ("requirements.txt", "requirements-test.txt")
    )
    pins = re.findall(r"^(\S+==\S+)", of_husk, re.MULTILINE)
    assert pins
    assert not [pin for pin in pins if pin not in of_tests], "run deploy/lock"
