"""Pulls from a registry that redirects to another one, which asks for a separate token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from image.errors import Unauthorized
from image.image_store import ImageStore
from tests.fakes.registry import FakeRegistry, Status
from tests.kit.pulls import BASE, TOP, credentials, pull_error


@pytest.fixture
def first() -> Iterator[FakeRegistry]:
    with FakeRegistry(token="first-secret").serving() as serving:
        yield serving


@pytest.fixture
def second() -> Iterator[FakeRegistry]:
    with FakeRegistry(sign_in="bearer", open_tokens=True, token="second-secret").serving() as serving:
        yield serving


def redirect_all(first: FakeRegistry, second: FakeRegistry, *kinds: str) -> None:
    """Put one image on both, and let the first redirect these kinds of requests to the second."""
    for registry in (first, second):
        registry.put_image("a", "1", [BASE, TOP])
    targets = ["manifests/1", *(f"blobs/{digest}" for digest in first.blobs)]
    for target in targets:
        if target.partition("/")[0] in kinds:
            url = f"http://{second.address}/v2/a/{target}"
            first.fail(f"/v2/a/{target}", Status(307, {"Location": url}), times=9)


def assert_no_secret_of_the_first(first: FakeRegistry, second: FakeRegistry) -> None:
    """Fail if the second was shown a password or token of the first."""
    assert second.seen
    shown = {seen.headers.get("authorization", "") for seen in second.seen}
    assert shown <= {"", "Bearer second-secret"}
    assert all(first.identity_token not in seen.body.decode() for seen in second.seen)


@pytest.mark.parametrize("kinds", [("manifests",), ("blobs",), ("manifests", "blobs")])
@pytest.mark.parametrize("form", ["none", "password", "identity"])
async def test_redirect_to_a_registry_that_asks_for_a_token_is_pulled_without_the_first_ones_password(
    first: FakeRegistry, second: FakeRegistry, store: ImageStore, kinds: tuple[str, ...], form: str
) -> None:
    redirect_all(first, second, *kinds)
    image = await store.pull(f"{first.address}/a:1", credentials(first, form))
    assert len(image.chain_ids) == 2
    assert_no_secret_of_the_first(first, second)
    await store.close()


@pytest.mark.parametrize("form", ["password", "identity", "registry"])
async def test_redirect_from_a_registry_that_asks_for_credentials_does_not_pass_them_on(
    first: FakeRegistry, second: FakeRegistry, store: ImageStore, form: str
) -> None:
    first.sign_in = "bearer"
    redirect_all(first, second, "blobs")
    assert (await store.pull(f"{first.address}/a:1", credentials(first, form))).size > 0
    assert_no_secret_of_the_first(first, second)
    await store.close()


async def test_second_redirect_within_the_other_registry_is_not_shown_the_first_ones_credentials(
    first: FakeRegistry, second: FakeRegistry, store: ImageStore
) -> None:
    redirect_all(first, second, "manifests")
    first.sign_in = "basic"
    second.sign_in = ""
    second.fail("/manifests/", Status(307, {"Location": "/v2/a/manifests/1"}))
    assert (await store.pull(f"{first.address}/a:1", credentials(first, "password"))).size > 0
    assert len(second.seen) == 2
    assert_no_secret_of_the_first(first, second)
    await store.close()


async def test_redirect_to_a_registry_that_asks_for_a_password_is_refused(
    first: FakeRegistry, second: FakeRegistry, store: ImageStore
) -> None:
    second.sign_in = "basic"
    redirect_all(first, second, "manifests")
    error = await pull_error(store, f"{first.address}/a:1", credentials(first, "password"))
    assert isinstance(error, Unauthorized)
    assert_no_secret_of_the_first(first, second)


async def test_redirect_to_a_registry_whose_token_service_refuses_is_refused(
    first: FakeRegistry, second: FakeRegistry, store: ImageStore
) -> None:
    second.open_tokens = False
    redirect_all(first, second, "manifests")
    error = await pull_error(store, f"{first.address}/a:1", credentials(first, "password"))
    assert isinstance(error, Unauthorized)
    assert_no_secret_of_the_first(first, second)
