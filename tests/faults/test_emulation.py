"""A pod in an emulated VM is shown as such: in Status, and by a metric."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from sandbox.spec import PodSpec
from tests.fakes.daemon import FakeHost, RestartableDaemon


async def test_emulated_pod_is_counted_until_it_is_stopped() -> None:
    root = Path(tempfile.mkdtemp(prefix="husk-faults-"))  # short, for the sockets in it
    daemon = RestartableDaemon(FakeHost(root))
    emulated = daemon.built.metric_sources.sources().emulated
    assert emulated() == 0
    pod = await daemon.pods.run(PodSpec(name="a", namespace="n", uid="u"))
    assert emulated() == 1
    assert (await daemon.built.node.describe())["emulated"] is True
    await daemon.pods.stop(pod)
    assert emulated() == 0
    await daemon.pods.remove(pod)
    await daemon.kill()
    shutil.rmtree(root)
