"""How one data set is dealt out to clients, as a short text: `dirichlet:0.3`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedtune.errors import ConfigError

Kind = Literal["iid", "dirichlet", "column", "shards"]

# Beyond it all shares are equal anyway, and sums of much larger numbers overflow.
MAX_ALPHA = 1e6

_FORMS = "valid are 'iid', 'dirichlet:ALPHA', 'column:NAME' and 'shards:PER_CLIENT'"


@dataclass(frozen=True)
class PartitionSpec:
    """One way to partition; only the field that belongs to `kind` is set.

    `ConfigError` for a field that is missing, out of range, or of another kind.
    """

    kind: Kind
    alpha: float | None = None
    column: str | None = None
    shards_per_client: int | None = None

    def __post_init__(self) -> None:
        given = {
            kind
            for kind, value in (
                ("dirichlet", self.alpha),
                ("column", self.column),
                ("shards", self.shards_per_client),
            )
            if value is not None
        }
        if given != {self.kind} - {"iid"}:
            raise ConfigError(f"the partition {self.kind!r} has the wrong parameters; {_FORMS}")
        # Written as `not 0 < x <= b` so that NaN is refused, too.
        if self.alpha is not None and not 0 < self.alpha <= MAX_ALPHA:
            raise ConfigError(
                f"the partition {self} needs an alpha above 0 and up to {MAX_ALPHA:,.0f}, "
                "such as dirichlet:0.3"
            )
        if self.column == "":
            raise ConfigError("the partition 'column:' needs a name, such as column:hospital")
        if self.shards_per_client is not None and self.shards_per_client < 1:
            raise ConfigError(f"the partition {self} needs one shard or more, such as shards:2")

    def __str__(self) -> str:
        parameter = {
            "iid": None,
            "dirichlet": None if self.alpha is None else f"{self.alpha:g}",
            "column": self.column,
            "shards": self.shards_per_client,
        }[self.kind]
        return self.kind if parameter is None else f"{self.kind}:{parameter}"

    @staticmethod
    def parse(text: str) -> PartitionSpec:
        """The spec that `text` names; `ConfigError` with the valid forms otherwise."""
        kind, colon, parameter = text.partition(":")
        try:
            match kind, colon:
                case "iid", "":
                    return PartitionSpec("iid")
                case "dirichlet", ":":
                    return PartitionSpec("dirichlet", alpha=float(parameter))
                case "column", ":":
                    return PartitionSpec("column", column=parameter)
                case "shards", ":":
                    return PartitionSpec("shards", shards_per_client=int(parameter))
        except ValueError:
            pass  # not a number: the same answer as for an unknown kind
        raise ConfigError(f"{text!r} is not a partition; {_FORMS}")
