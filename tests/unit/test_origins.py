"""Which web pages may use the server."""

import pytest

from moshi_stt.origins import Origins, normal_origin


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "asr.example.org", True),  # a program
        ("http://localhost:8080", "localhost:8080", True),
        ("http://localhost:3000", "127.0.0.1:8080", True),  # another page of this machine
        ("http://app.localhost", "localhost:8080", True),
        ("http://127.0.0.2:8080", "127.0.0.2:8080", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("http://192.168.1.20:8080", "192.168.1.20:8080", True),  # the server's own page, by its address
        ("http://192.168.1.20", "192.168.1.20:80", True),
        ("http://192.168.1.21:8080", "192.168.1.20:8080", False),
        ("http://192.168.1.20:8081", "192.168.1.20:8080", False),
        ("https://192.168.1.20:8080", "192.168.1.20:8080", True),
        ("http://evil.example", "localhost:8080", False),
        ("http://evil.example:8080", "evil.example:8080", False),  # a name that was pointed at us
        ("http://localhost.evil.example", "localhost:8080", False),
        ("http://127.0.0.1.evil.example", "127.0.0.1:8080", False),
        ("http://localhost@evil.example", "localhost:8080", False),
        ("null", "localhost:8080", False),
        ("file://", "localhost:8080", False),
        ("", "localhost:8080", False),
        ("http://[::1", "localhost:8080", False),
        ("http://localhost:notaport", "localhost:8080", False),
        ("https://captions.example.org", "captions.example.org", True),  # listed
        ("HTTPS://Captions.Example.org:443", "captions.example.org", True),
        ("http://captions.example.org", "captions.example.org", False),  # listed with another scheme
    ],
)
def test_pages(origin: str | None, host: str, allowed: bool) -> None:
    assert Origins(["https://captions.example.org"]).allow(origin, host) is allowed


def test_only_listed_pages_get_cors_headers() -> None:
    origins = Origins(["https://captions.example.org"])
    assert origins.is_listed("https://captions.example.org:443")
    assert not origins.is_listed("http://localhost:3000")
    assert not origins.is_listed(None)


def test_normal_form() -> None:
    assert normal_origin("HTTP://Example.org:80/") == "http://example.org"
    assert normal_origin("https://[2001:DB8::1]:8443") == "https://[2001:db8::1]:8443"
    assert normal_origin("http://example.org/path") is None
    assert normal_origin("example.org") is None
