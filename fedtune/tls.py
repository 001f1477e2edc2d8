"""TLS to the federation's server."""

from __future__ import annotations

import ssl


def tls_context(authority: bytes) -> ssl.SSLContext:
    """TLS 1.3 with a server that the PEM certificate `authority` vouches for, and no other.

    Raises `ssl.SSLError` or `ValueError` if `authority` is no certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=authority.decode("ascii"))
    return context
