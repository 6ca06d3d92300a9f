"""The services driven by the real crictl (marked `node`, as it has to be built)."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from tests.contract.cri.runtime import (
    Runtime,
)
from tests.kit.gotools import tool


@pytest.fixture
def crictl() -> str:
    """The path of the real client."""
    return str(tool("crictl"))


@pytest.mark.node
async def test_crictl_runs_a_pod(runtime: Runtime, crictl: str, tmp_path: Path) -> None:
    pod, container, config = (tmp_path / name for name in ("pod.json", "container.json", "crictl.yaml"))
    pod.write_text(json.dumps({"metadata": {"name": "p", "namespace": "d", "uid": "u"}, "linux": {}}))
    container.write_text(
        json.dumps({"metadata": {"name": "c"}, "image": {"image": "busybox"}, "command": ["sh"]})
    )
    endpoint = f"unix://{runtime.socket}"
    config.write_text(f"runtime-endpoint: {endpoint}\nimage-endpoint: {endpoint}\ntimeout: 10\n")

    async def run(*words: object) -> str:
        argv = [crictl, "--config", str(config), *map(str, words)]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert "RuntimeName:  husk" in await run("version")
    assert json.loads(await run("info"))["runtimeHandlers"][1]["name"] == "small"
    assert "runtime-config" not in await run("runtime-config")
    pod_id = await run("runp", pod)
    assert pod_id[:13] in await run("pods")
    assert await run("pods", "-q", "--id", pod_id[:13]) == pod_id
    assert json.loads(await run("inspectp", pod_id[:13]))["status"]["network"]["ip"] == "10.9.0.2"
    await run("pull", "busybox")
    assert "busybox" in await run("images")
    assert json.loads(await run("inspecti", "busybox"))["status"]["uid"]["value"] == "1003"
    assert "imagefsinfo" not in await run("imagefsinfo")
    id = await run("create", pod_id[:13], container, pod)
    await run("start", id[:13])
    assert await run("ps", "-q") == id
    assert json.loads(await run("inspect", id[:13]))["status"]["state"] == "CONTAINER_RUNNING"
    assert id[:13] in await run("stats", id[:13])
    await run("update", "--memory", "1000000", id[:13])
    assert runtime.containers.find(id).resources.memory_limit == 1000000
    await run("stop", id[:13])
    await run("rm", id[:13])
    await run("stopp", pod_id[:13])
    await run("rmp", pod_id[:13])
    await run("rmi", "busybox")
    assert await run("pods", "-q") == ""
