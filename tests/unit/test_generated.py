"""The committed protobuf modules are what deploy/generate makes of the .proto files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATE = REPOSITORY / "deploy/generate"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated")
    subprocess.run([GENERATE, out], check=True, capture_output=True, timeout=120)
    return out


def test_generated_files_are_current(fresh: Path) -> None:
    made = {path.relative_to(fresh): path.read_bytes() for path in fresh.rglob("*_pb2.py*")}
    assert len(made) == 6, "guest, runtime_v1 and husk_v1, each as .py and .pyi"
    stale = [str(path) for path, content in made.items() if (REPOSITORY / path).read_bytes() != content]
    assert not stale, "run deploy/generate"


def test_generated_files_have_a_source() -> None:
    generated = [*REPOSITORY.glob("cri/proto/*_pb2.py"), *REPOSITORY.glob("sandbox/guest/*_pb2.py")]
    for path in generated:
        assert path.with_name(path.name.replace("_pb2.py", ".proto")).exists(), path
