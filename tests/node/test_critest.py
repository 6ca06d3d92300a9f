"""All of critest, the CRI's own test suite, and the page with its results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Site
from tests.kit import conformance, critest_images, gotools
from tests.kit.conformance import Spec, State
from tests.kit.critest import Critest
from tests.kit.daemon import Daemon
from tests.node.conformance_reasons import FAILED, SKIPPED, reason_in

pytestmark = [pytest.mark.node, pytest.mark.timeout(2400)]

PAGE = Path(__file__).resolve().parents[2] / "docs/conformance.md"
WEBSOCKET = tuple(f"-websocket-{kind}" for kind in ("exec", "attach", "portforward"))


@pytest.fixture(scope="module")
def daemon(site: Site) -> Iterator[Daemon]:
    """Start a daemon whose mirrors serve the image names in critest's constants."""
    mirrors = site.registry.write_mirrors(site.mirrors.parent / "critest.d", critest_images.HOSTS)
    made = Daemon(site.namespace, site.cni, mirrors, leases=site.leases)
    made.start()
    yield made
    made.close()


def reason_for(spec: Spec) -> str:
    return reason_in(FAILED if spec.state is State.FAILED else SKIPPED, spec.title)


@dataclass(frozen=True)
class Results:
    """Specs over SPDY, the streaming ones over WebSocket, and what the daemon held after them."""

    specs: list[Spec]
    websocket: list[Spec]
    left: list[str]


@pytest.fixture(scope="module")
def results(site: Site, daemon: Daemon) -> Results:
    """Run critest once, and write the page."""
    digest = critest_images.push_all(site.registry)
    programs = gotools.tool("critest"), gotools.tool("ginkgo")
    critest = Critest.prepare(site.namespace, daemon.socket, *programs, digest)
    before = daemon.census()
    specs = critest.run("spdy")
    websocket = critest.run("websocket", *WEBSOCKET, focus="Streaming")
    daemon.remove_all()  # what failed specs leave is not the daemon's leak
    left = [each for each in daemon.leaks_since(before) if "links: " not in each]
    found = Results(specs, websocket, left)
    PAGE.write_text(conformance.page(gotools.version("critest"), specs, websocket, reason_for))
    return found


def test_every_spec_passes_or_has_a_reason(results: Results) -> None:
    """Both ways: a reason without a spec that needs it fails too."""
    specs = [*results.specs, *results.websocket]
    assert len(results.specs) >= 137
    others = [spec for spec in specs if spec.state is not State.PASSED]
    assert [f"{spec.state}: {spec.title}: {spec.why}" for spec in others if not reason_for(spec)] == []
    for state, reasons in ((State.FAILED, FAILED), (State.SKIPPED, SKIPPED)):
        titles = [spec.title for spec in conformance.in_state(specs, state)]
        assert [begin for begin in reasons if not any(each.startswith(begin) for each in titles)] == []


def test_critest_leaves_nothing(results: Results) -> None:
    assert results.left == []
