"""A deployed federation over a slow network that loses packets, and that is cut in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from deployed import MASKED, SITES, Federation
from e2e_helpers import adapter_bytes
from impaired_link import SERVER_ADDRESS, ImpairedLink, Impairment, LinkRefused
from process_changes import enter_namespace

from fedtune.flower.network import HEARTBEAT_SECONDS

# A poor mobile connection: 100 ms ± 20 ms each way, 3 % lost, 2 Mbit/s.
MOBILE = Impairment(delay=0.1, jitter=0.02, loss=0.03, rate=250_000.0)

CUT_SECONDS = 2.2 * HEARTBEAT_SECONDS  # Flower takes a site for offline after two


@pytest.fixture
def link() -> Iterator[ImpairedLink]:
    try:
        made = ImpairedLink(MOBILE, seed=5)
    except (LinkRefused, OSError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    with made:
        yield made


def test_a_slow_network_that_loses_packets_and_is_cut_in_a_round(
    make_federation: Callable[..., Federation], link: ImpairedLink, tmp_path: Path
) -> None:
    """In the end the adapter is that of a run on one machine, bit for bit."""
    federation = make_federation(
        listen={"host": SERVER_ADDRESS}, tables={"rounds": {"count": 2, "timeout": 200.0}}
    )
    server = federation.server([partial(enter_namespace, link.server)])
    outside = [partial(enter_namespace, link.sites)]
    for name in SITES:
        federation.warm_client(name, outside)
    federation.await_commit(1)

    # The link goes down while a round waits for the values of one site.
    with federation.held(SITES[0], MASKED) as number:
        federation.await_stage(SITES[1:], number, MASKED)
        link.up = False
    time.sleep(CUT_SECONDS)
    assert federation.committed() == number - 1
    link.up = True

    assert server.wait() == 0, server.stderr
    records = federation.check_finished()
    assert all(record["clients"] == list(SITES) for record in records)
    assert adapter_bytes(federation.run) == adapter_bytes(federation.simulate(tmp_path))
    assert records[number - 1]["seconds"] > CUT_SECONDS
    assert link.lost > link.carried * MOBILE.loss / 2
