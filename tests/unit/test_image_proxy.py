"""Which proxy a URL is reached through, by Go's rules."""

from __future__ import annotations

import pytest

from image.registry.proxy import ProxyRules

PROXY = "http://proxy.test:3128"


def rules(no_proxy: str = "") -> ProxyRules:
    return ProxyRules({"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy})


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("", "https://registry.test/v2/", False),
        ("*", "https://registry.test/v2/", True),
        ("registry.test", "https://registry.test/v2/", True),
        ("REGISTRY.test", "https://Registry.Test/v2/", True),
        ("registry.test", "https://sub.registry.test/v2/", True),
        ("registry.test", "https://otherregistry.test/v2/", False),
        (".registry.test", "https://registry.test/v2/", False),
        (".registry.test", "https://sub.registry.test/v2/", True),
        ("*.registry.test", "https://sub.registry.test/v2/", True),
        ("*.registry.test", "https://registry.test/v2/", False),
        ("registry.test:443", "https://registry.test/v2/", True),
        ("registry.test:443", "http://registry.test/v2/", False),
        ("registry.test:5000", "https://registry.test:5000/v2/", True),
        ("registry.test:5000", "https://registry.test:5001/v2/", False),
        (" a.test , registry.test ,", "https://registry.test/v2/", True),
        ("10.0.0.0/8", "https://10.1.2.3:5000/v2/", True),
        ("10.0.0.0/8", "https://11.1.2.3/v2/", False),
        ("10.0.0.0/8", "https://registry.test/v2/", False),
        ("10.1.2.3", "https://10.1.2.3/v2/", True),
        ("10.1.2.3:5000", "https://10.1.2.3:5000/v2/", True),
        ("10.1.2.3:5000", "https://10.1.2.3/v2/", False),
        ("2.3", "https://10.1.2.3/v2/", False),
        ("fd00::/8", "https://[fd00::1]:5000/v2/", True),
        ("fd00::1", "https://[fd00::1]/v2/", True),
        ("[fd00::1]", "https://[fd00::1]/v2/", True),
        ("[fd00::1]:5000", "https://[fd00::1]:5000/v2/", True),
        ("[fd00::1]:5000", "https://[fd00::1]:5001/v2/", False),
        ("10.0.0.0/33,:,/,[,:80", "https://10.1.2.3/v2/", False),
        ("", "http://localhost:5000/v2/", True),
        ("", "http://127.9.9.9/v2/", True),
        ("", "https://[::1]:5000/v2/", True),
    ],
)
def test_no_proxy_is_matched_as_go_does(no_proxy: str, url: str, direct: bool) -> None:
    assert rules(no_proxy).find(url) == ("" if direct else PROXY)


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "https://a.test/", ""),
        ({"HTTP_PROXY": "p.test:1"}, "https://a.test/", ""),
        ({"HTTP_PROXY": "p.test:1"}, "http://a.test/", "http://p.test:1"),
        ({"https_proxy": "https://p.test"}, "https://a.test/", "https://p.test"),
        ({"HTTPS_PROXY": "http://upper.test", "https_proxy": "http://lower.test"}, "https://a.test/",
         "http://upper.test"),
        ({"ALL_PROXY": "http://all.test"}, "https://a.test/", "http://all.test"),
        ({"ALL_PROXY": "http://all.test", "HTTPS_PROXY": "http://p.test"}, "https://a.test/", "http://p.test"),
        ({"HTTPS_PROXY": "http://p.test", "no_proxy": "a.test"}, "https://a.test/", ""),
    ],
)  # fmt: skip
def test_proxy_variables_are_read_as_go_does(environment: dict[str, str], url: str, proxy: str) -> None:
    assert ProxyRules(environment).find(url) == proxy
