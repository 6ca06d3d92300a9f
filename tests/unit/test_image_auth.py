"""Which part of an AuthConfig is sent to which registry."""

from __future__ import annotations

import base64

import pytest

from image.auth import ANONYMOUS, Auth, Credential, find_credential

PAIR = base64.b64encode(b"user:pa:ss").decode()


@pytest.mark.parametrize(
    ("auth", "expected"),
    [
        (None, ANONYMOUS),
        (Auth(), ANONYMOUS),
        (Auth(username="u", password="p"), Credential(username="u", password="p")),
        (Auth(auth=PAIR), Credential(username="user", password="pa:ss")),
        (Auth(auth="not base64!"), ANONYMOUS),
        (Auth(auth="é"), ANONYMOUS),
        (Auth(identity_token="t"), Credential(identity_token="t")),
        (Auth(registry_token="t"), Credential(registry_token="t")),
        (Auth(username="u", password="p", auth=PAIR), Credential(username="u", password="p")),
    ],
)
def test_credential_form_is_chosen_in_containerds_order(auth: Auth | None, expected: Credential) -> None:
    assert find_credential(auth, hosts=("host",)) == expected


@pytest.mark.parametrize(
    ("address", "hosts", "fits"),
    [
        ("host", ("host",), True),
        ("https://host/v1/", ("host",), True),
        ("HOST:5000", ("host:5000",), True),
        ("https://index.docker.io/v1/", ("registry-1.docker.io", "docker.io"), True),
        ("docker.io", ("registry-1.docker.io",), True),
        ("other", ("host",), False),
        ("host", ("host:5000",), False),
        ("https://host.evil.com", ("host",), False),
    ],
)
def test_credential_is_for_the_named_server_only(address: str, hosts: tuple[str, ...], fits: bool) -> None:
    found = find_credential(Auth(username="u", password="p", server_address=address), hosts=hosts)
    assert (found != ANONYMOUS) is fits


def test_repr_hides_secrets() -> None:
    auth = Auth(username="u", password="secret", registry_token="secret", identity_token="secret")
    shown = f"{auth} {auth!r} {find_credential(auth, hosts=())!r} {[auth]}"
    assert "secret" not in shown
