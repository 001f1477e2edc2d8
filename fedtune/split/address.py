"""Where the service is found."""

from __future__ import annotations

import ipaddress

from fedtune.wire.v1 import split_pb2

SERVICE: str = split_pb2.DESCRIPTOR.services_by_name["SplitBase"].full_name


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
