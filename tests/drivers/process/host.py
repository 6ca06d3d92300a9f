"""What the driver needs of the host: one accelerator, which is none, and no programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sandbox.errors import InvalidSpec
from sandbox.host import findings
from sandbox.host.findings import Finding, HostCheck
from sandbox.vmm import Candidate

ACCELERATOR = "none"


class ProcessHost:
    """See `sandbox.vmm.Host`."""

    def check(self, accelerator: str, options: Mapping[str, str]) -> None:
        """See Host."""
        if accelerator not in ("auto", ACCELERATOR):
            raise InvalidSpec("accelerator", f"{accelerator!r} is unknown", f"auto, {ACCELERATOR}")
        for name in options:
            raise InvalidSpec(f"options.{name}", "is not an option of this driver", "none")

    async def version(self) -> str:
        """See Host."""
        return "1"

    def candidates(self) -> Sequence[Candidate]:
        """See Host."""
        reason = "containers run on the host's kernel"
        return (Candidate(accelerator=ACCELERATOR, reason=reason, trial=False),)

    def checks(self) -> Sequence[HostCheck]:
        """See Host."""

        async def check_process() -> Finding:
            return findings.ok("process", "pods without isolation, for tests")

        return (HostCheck("process", check_process),)
