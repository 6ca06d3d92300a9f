"""CNI results of every version, in one shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from network.result import VERSIONS, Result, parse_result, render_result, version_key

FULL: dict[str, Any] = {
    "cniVersion": "1.1.0",
    "interfaces": [
        {"name": "cni0", "mac": "aa:aa:aa:aa:aa:aa"},
        {
            "name": "eth0",
            "mac": "bb:bb:bb:bb:bb:bb",
            "mtu": 1400,
            "sandbox": "/ns",
            "pciID": "1:2",
            "socketPath": "/s",
        },
    ],
    "ips": [
        {"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 1},
        {"address": "fd00::5/64", "interface": 1},
    ],
    "routes": [
        {
            "dst": "0.0.0.0/0",
            "gw": "10.1.0.1",
            "mtu": 1300,
            "advmss": 1200,
            "priority": 5,
            "table": 100,
            "scope": 0,
        }
    ],
    "dns": {"nameservers": ["10.1.0.1"], "domain": "a", "search": ["b"], "options": ["ndots:2"]},
}


def parse(content: object, default: str = "1.0.0") -> Result:
    return parse_result(json.dumps(content).encode(), default)


def test_newest_version_is_rendered_without_loss() -> None:
    assert json.loads(render_result(parse(FULL), "1.1.0")) == FULL


def test_older_version_is_rendered_without_newer_fields() -> None:
    older = json.loads(render_result(parse(FULL), "1.0.0"))
    assert older["interfaces"][1] == {"name": "eth0", "mac": "bb:bb:bb:bb:bb:bb", "sandbox": "/ns"}
    assert older["routes"] == [{"dst": "0.0.0.0/0", "gw": "10.1.0.1"}]
    assert older["ips"] == FULL["ips"]


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_addresses_before_1_0_have_their_family(version: str) -> None:
    older = json.loads(render_result(parse(FULL), version))
    assert [each["version"] for each in older["ips"]] == ["4", "6"]
    assert older["cniVersion"] == version


def test_oldest_shape_is_parsed() -> None:
    result = parse(
        {
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.1.0.5/24", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
        }
    )
    assert result.ips is not None and result.routes is not None
    assert (result.ips[0].address, result.routes[0].dst) == ("10.1.0.5/24", "0.0.0.0/0")


def test_missing_version_is_that_of_the_configuration() -> None:
    assert parse({"ips": []}, "0.4.0").version == "0.4.0"


def test_null_lists_are_parsed_as_empty() -> None:
    result = parse({"cniVersion": "1.0.0", "interfaces": None, "ips": None, "routes": None})
    assert json.loads(render_result(result, "1.0.0"))["ips"] == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"ok",
        b"[]",
        b'{"cniVersion":"9.0.0"}',
        b'{"cniVersion":"one"}',
        b'{"ips":[{"address":"10.0.0.300/24"}]}',
        b'{"ips":[{"address":"10.0.0.3/24","interface":0}]}',
        b'{"ips":[{"address":"10.0.0.3/24","interface":-1}],"interfaces":[{"name":"a"}]}',
        b'{"ips":{}}',
    ],
)
def test_malformed_result_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_result(content, "1.0.0")


@given(
    st.binary()
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["cniVersion", "ips", "interfaces", "address", "interface", "ip4", "ip"]), x
            )
        ),
    )
)
def test_any_output_is_a_result_or_a_value_error(content: object) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        result = parse_result(data, "1.0.0")
    except ValueError:
        return
    for version in VERSIONS:
        assert parse_result(render_result(result, version), version).version == version


def test_versions_are_ordered_by_number() -> None:
    assert sorted(["1.10.0", "1.9.0", "0.3.1", "0.3"], key=version_key) == ["0.3", "0.3.1", "1.9.0", "1.10.0"]
