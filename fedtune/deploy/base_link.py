"""A site's way to the base model at its server. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.deploy.site_files import SiteFiles
from fedtune.split.client import GrpcBase
from fedtune.train.channel import Meter
from fedtune.types import digest_of
from fedtune.wire.split import Terms


def connect_base(
    files: SiteFiles, base_digest: str, answer_tokens: Sequence[int], width: int
) -> GrpcBase:
    """The base model at the server, as this site; it connects when it is asked.

    `answer_tokens` are those with which the answers begin, `width` is an embedding's length.
    """
    config = files.federation
    terms = Terms(
        config.digest,
        base_digest,
        digest_of(list(answer_tokens)),
        width,
        len(answer_tokens),
        config.split.activations,
        config.rungs,
    )
    authority = files.find(files.config.site.certificate).read_bytes()
    identity, roster = files.keys().identity, files.members().roster
    return GrpcBase(files.base_server, authority, identity, roster, terms, Meter())
