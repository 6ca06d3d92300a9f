"""Run critest against a daemon of the tests, without the internet."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kit.conformance import Spec, read_report
from tests.kit.critest_images import FIXED_DIGEST
from tests.kit.namespace import Namespace
from tests.kit.scratch import scratch_dir

PARALLEL = 4  # more than there are processors, as specs mostly wait
SEED = 1  # of the random order of specs, so that it is the same each time


@dataclass(frozen=True)
class Critest:
    """critest and ginkgo, prepared for one daemon."""

    namespace: Namespace
    socket: Path
    program: Path
    ginkgo: Path
    directory: Path

    @classmethod
    def prepare(cls, namespace: Namespace, socket: Path, critest: Path, ginkgo: Path, digest: str) -> Critest:
        """Copy the programs, with `digest` in place of the one that a spec of critest has as a constant."""
        directory = scratch_dir("critest")
        program = directory / "critest"
        text = critest.read_bytes()
        assert text.count(FIXED_DIGEST.encode()) == 1, f"{critest} does not contain {FIXED_DIGEST}"
        program.write_bytes(text.replace(FIXED_DIGEST.encode(), digest.encode()))
        program.chmod(0o755)
        shutil.copy(ginkgo, directory / "ginkgo")  # critest finds it in PATH by this name
        (directory / "tmp").mkdir()
        (directory / "crictl.yaml").touch()  # in place of the machine's configuration
        return cls(namespace, socket, program, directory / "ginkgo", directory)

    def run(self, name: str, *flags: str, focus: str = "", timeout_s: float = 1800) -> list[Spec]:
        """Run every spec, or those in focus. Raises RuntimeError when critest wrote no report."""
        report = self.directory / f"{name}.json"
        log = self.directory / f"{name}.log"
        with log.open("wb") as output:
            subprocess.run(
                self.namespace.command(self.command(report, flags, focus, timeout_s)),
                env=self.environment(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=timeout_s + 60,
                check=False,  # the report has the results
            )
        if not report.exists():
            raise RuntimeError(f"critest wrote no report:\n{log.read_text(errors='replace')[-6000:]}")
        return read_report(report)

    def command(self, report: Path, flags: Sequence[str], focus: str, timeout_s: float) -> list[str]:
        end_points = [f"-{kind}-endpoint=unix://{self.socket}" for kind in ("runtime", "image")]
        return [
            str(self.program),
            f"-config={self.directory / 'crictl.yaml'}",
            *end_points,
            f"-parallel={PARALLEL}",
            "-ginkgo.no-color",
            f"-ginkgo.seed={SEED}",
            f"-ginkgo.timeout={timeout_s:g}s",
            f"-ginkgo.json-report={report}",
            *([f"-ginkgo.focus={focus}"] if focus else []),
            *flags,
        ]

    def environment(self) -> Mapping[str, str]:
        return os.environ | {
            "PATH": f"{self.directory}:{os.environ['PATH']}",
            "TMPDIR": str(self.directory / "tmp"),
        }
