"""Which clients mask with which, and how many colluders the survivors' graph withstands.

Masking with everyone costs each client one expanded mask per other client (Bonawitz et al.
2017). Masking with `neighbours` others is enough (Bell et al. 2020) as long as the clients that
survive hang together: if the honest survivors fall apart into groups, the server learns the
sum of each group. Bell et al. draw the graph at random and bound the probability of that,
which trusts whoever draws. Here the graph is fixed: clients stand in a ring in the order of their
names and each masks with the `neighbours / 2` next on either side. Whether it holds is then no
matter of luck: every client computes, for the survivor set that it is asked to sign, how many
colluding clients would be needed to tear it apart, and refuses if these are too few.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MaskGraph:
    """Places 0 … `clients` - 1 in a ring, each linked to `half` others on either side.

    `half` = `clients` or more is the complete graph.
    """

    clients: int
    half: int

    @property
    def complete(self) -> bool:
        """Whether everyone masks with everyone."""
        return 2 * self.half + 1 >= self.clients

    def neighbours(self, place: int) -> Iterator[int]:
        """Places that `place` masks with, ascending."""
        if self.complete:
            yield from (other for other in range(self.clients) if other != place)
        else:
            around = (*range(-self.half, 0), *range(1, self.half + 1))
            yield from sorted((place + step) % self.clients for step in around)

    def colluders_withstood(self, survivors: Collection[int]) -> int:
        """The largest c such that no c of the `survivors` can split the others into groups.

        That is the vertex connectivity of the survivors' graph, less one. In a ring, a split
        needs two gaps; a gap is `half` places in a row without anyone left, and costs as many
        colluders as survivors stand there. The cheapest two gaps with somebody on both sides
        between them are the minimum cut. In the complete graph nothing splits: all but one
        survivor may collude, and that one's masks still cover it as far as any can.
        """
        alive = sorted(set(survivors))
        if len(alive) < 2:
            return 0
        if self.complete:
            return len(alive) - 2
        return min(self._cheapest_split(alive), len(alive) - 1) - 1

    def _cheapest_split(self, alive: list[int]) -> int:
        """Fewest survivors whose removal splits the others; len(alive) if none does.

        Best gaps start just behind a survivor: then each window begins after a survivor that
        stays. Two windows split the ring if a survivor remains in both arcs between them.
        """
        count = len(alive)
        unrolled = np.array(alive * 2) + np.repeat([0, self.clients], count)
        # hidden[i]: how many survivors a gap behind alive[i] hides; end[i]: whom it hides not.
        hidden = np.searchsorted(unrolled, unrolled + self.half, side="right")
        hidden = (hidden - np.arange(2 * count) - 1)[:count]
        hidden = np.concatenate([hidden, hidden])
        end = np.arange(2 * count) + hidden + 1
        best = count
        for first in range(count):
            # The second gap begins at or behind the end of the first, and ends before `first`.
            second = slice(end[first], first + count)
            fits = end[second] <= first + count
            if fits.any():
                best = min(best, int(hidden[first] + hidden[second][fits].min()))
        return best
