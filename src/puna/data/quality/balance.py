"""Rebalancing: from target shares of domains to the probability with which documents are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from puna.core.errors import PunaError


def keep_probabilities(
    amounts: Mapping[str, float], shares: Mapping[str, float]
) -> dict[str, float]:
    """Return the keep probabilities that give domains their target shares and lose the least.

    The domain that is scarcest for its target is kept whole, the others are thinned out to fit it.

    Args:
        amounts: Documents or bytes of each domain.
        shares: Target shares. What they leave to 1 goes to the domains that are not named, in
            proportion to their amounts; shares that add up to 1 leave nothing to them.

    Raises:
        PunaError: A named domain has no document, or the shares leave a rest that no domain takes.
    """
    absent = sorted(name for name, share in shares.items() if share > 0 and not amounts.get(name))
    if absent:
        raise PunaError(
            f"the domain {absent[0]!r} has a target share, but no document",
            f"domains here: {', '.join(sorted(name for name, n in amounts.items() if n))}",
        )
    rest = 1.0 - sum(shares.values())
    unnamed = {name: n for name, n in amounts.items() if name not in shares and n > 0}
    if rest > 1e-9 and not unnamed:
        raise PunaError(
            f"the target shares add up to {1 - rest:g}, and there is no other domain",
            "let them add up to 1",
        )
    others = sum(unnamed.values())
    targets = {name: max(rest, 0.0) * n / others for name, n in unnamed.items()}
    targets |= {name: share for name, share in shares.items() if amounts.get(name)}
    wanted = {name: share / amounts[name] for name, share in targets.items()}
    most = max(wanted.values(), default=0.0)
    return {name: value / most if most > 0 else 0.0 for name, value in sorted(wanted.items())}


def draws(ids: Sequence[str], name: str, seed: int) -> np.ndarray:
    """Return one number in [0, 1) per id, float64 [n]: a hash, so neither order nor shards matter.

    Args:
        ids: Document ids.
        name: What is drawn for; other names give independent numbers.
        seed: Seed.
    """
    prefix = f"{seed}:{name}:"
    hashes = [xxhash.xxh3_64_intdigest(f"{prefix}{one}".encode()) >> 11 for one in ids]
    return np.array(hashes, np.float64) / 2.0**53
