"""WWW-Authenticate headers as registries and proxies send them."""

from __future__ import annotations

import pytest

from image.budget import Limits, OverLimit
from image.registry.challenge import Challenge, parse_challenges


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", ()),
        ("Basic realm=x", (Challenge(scheme="basic", realm="x"),)),
        ("BASIC", (Challenge(scheme="basic"),)),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"',
            (Challenge(scheme="bearer", realm="https://a/t", service="s", scope="repository:a/b:pull,push"),),
        ),
        (
            'Basic realm="a \\" b", Bearer realm="r" , service=s',
            (Challenge(scheme="basic", realm='a " b'), Challenge(scheme="bearer", realm="r", service="s")),
        ),
        ("===", ()),
        ("Negotiate, Basic realm=x", (Challenge(scheme="negotiate"), Challenge(scheme="basic", realm="x"))),
        (
            "Negotiate YIIx+/=, NTLM, Basic realm=x",
            (
                Challenge(scheme="negotiate"),
                Challenge(scheme="ntlm"),
                Challenge(scheme="basic", realm="x"),
            ),
        ),
        (
            " , ,Basic realm=x,, Bearer realm=r,",
            (Challenge(scheme="basic", realm="x"), Challenge(scheme="bearer", realm="r")),
        ),
        ('Bearer realm="unended', (Challenge(scheme="bearer"), )),
    ],
)  # fmt: skip
def test_challenges_of_one_header_are_parsed(header: str, expected: tuple[Challenge, ...]) -> None:
    assert parse_challenges([header], Limits())[: len(expected)] == expected


def test_challenges_of_several_headers_are_parsed_in_order() -> None:
    found = parse_challenges(["Negotiate", 'Basic realm="x", Digest realm="y"', "Bearer realm=z"], Limits())
    assert [challenge.scheme for challenge in found] == ["negotiate", "basic", "digest", "bearer"]


def test_challenges_above_a_limit_are_rejected_with_limit_and_value() -> None:
    with pytest.raises(
        OverLimit, match=r"challenges: 33 is above the limit of 32 \(registry.limits.challenges"
    ):
        parse_challenges(["Basic realm=x"] * 1000, Limits())
    with pytest.raises(OverLimit, match="challenge bytes: 1100000 is above the limit of 16384"):
        parse_challenges(["Basic a=b, " * 100_000], Limits())
