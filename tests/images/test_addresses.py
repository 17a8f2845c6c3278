"""However an address of a private network is written, it is known as one before a connection."""

import asyncio

import pytest

pytest.importorskip("httpx2", reason='needs the extra "vision"')

from xmc_jax.images import download


@pytest.mark.parametrize(
    "host",
    ["0177.0.0.2", "017700000002", "127.1", "0x7f000002", "0x7f.0.0.2", "2130706434", "127.0.2"]
    + ["10.0x101", "0xa9fea9fe", "[::ffff:7f00:2]", "[0:0:0:0:0:ffff:127.0.0.2]", "[::7f00:2]"],
)
def test_spellings(host):
    try:
        url = download._parse(f"http://{host}/")
        found = asyncio.run(download._resolve(url.host, 80, 30))
    except download.Failure as failure:
        assert failure.kind in ("url", "dns")
        return
    assert found and not [address for address in found if download.is_public(address)]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.com/a",
        "gopher://a/",
        "data:image/png;base64,AA",
        "a.png",
    ]
    + [
        "http:///x",
        "http://a:0/",
        "http://a:99999/",
        "//example.com/",
        "jar:http://a!/b",
        "http://",
    ],
)
def test_other_schemes_and_no_hosts(url):
    with pytest.raises(download.Failure) as refused:
        download._parse(url)
    assert refused.value.kind == "url"
