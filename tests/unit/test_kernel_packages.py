"""Which of the distribution's packages hold the guest's kernel and its modules."""

from __future__ import annotations

import pytest

from sandbox.guest_image import build
from sandbox.guest_image.packages import BuildFailed

DEPENDS = {
    "linux-image-cloud-amd64": "linux-image-6.1.0-57-cloud-amd64 (= 6.1.170-1)",
    "linux-image-6.1.0-57-cloud-amd64": "kmod, linux-base (>= 4.3~)",
    "linux-image-6.12-cloud-amd64": "linux-image-6.12.9+deb12-cloud-amd64 (= 6.12.9-1)",
    "linux-image-6.12.9+deb12-cloud-amd64": "kmod, linux-base (>= 4.3~)",
    "linux-image-virtual": "linux-image-6.8.0-31-generic, linux-headers-6.8.0-31-generic",
    "linux-image-6.8.0-31-generic": "kmod, linux-modules-6.8.0-31-generic",
    "linux-modules-6.8.0-31-generic": "",
    "bash": "base-files (>= 2.1.12)",
}
"""Packages that apt knows, and what each depends on."""


@pytest.fixture(autouse=True)
def apt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def show(package: str) -> str:
        known = package in DEPENDS
        return f"Package: {package}\nVersion: 1\nDepends: {DEPENDS[package]}\n" if known else ""

    monkeypatch.setattr(build, "show", show)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (build.KERNELS, ["linux-image-6.1.0-57-cloud-amd64"]),
        (("linux-image-6.12-cloud-amd64",), ["linux-image-6.12.9+deb12-cloud-amd64"]),
        (("linux-image-6.12.9+deb12-cloud-amd64",), ["linux-image-6.12.9+deb12-cloud-amd64"]),
        (("linux-image-virtual",), ["linux-image-6.8.0-31-generic", "linux-modules-6.8.0-31-generic"]),
        (
            ("absent", "linux-image-virtual"),
            ["linux-image-6.8.0-31-generic", "linux-modules-6.8.0-31-generic"],
        ),
    ],
    ids=["default", "meta-package", "package itself", "separate modules", "second"],
)
async def test_kernel_is_found_by_meta_package_or_by_package(
    names: tuple[str, ...], expected: list[str]
) -> None:
    assert [name for name, _ in await build.find_kernel_packages(names)] == expected


@pytest.mark.parametrize("name", ["absent", "bash", "--no-all-versions"])
async def test_package_that_holds_no_kernel_is_refused_by_name(name: str) -> None:
    with pytest.raises(BuildFailed) as caught:
        await build.find_kernel_packages((name,))
    assert f"known by the name {name}; run apt-get update" in str(caught.value)
