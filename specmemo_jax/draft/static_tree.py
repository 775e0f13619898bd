"""The best tree of a fixed shape for measured chances of acceptance."""

from specmemo_jax.errors import ConfigError

Chances = tuple[tuple[float, ...], ...]


def best_tree(
    chances: Chances, nodes: int, max_depth: int | None = None, branches: int | None = None
) -> tuple[int, ...]:
    """The tree of ``nodes`` nodes, root included, that is expected to bring most, as its parents.

    ``chances[depth - 1][rank]``: how often a candidate there is accepted, given that its parent was.
    ``max_depth`` limits the levels below the root, ``branches`` the children of a node. Fewer nodes come
    back where the limits hold no more, or where more would add nothing. Dynamic programming over (depth,
    nodes left, rank), exact for any chances: Sequoia (arXiv 2402.12374, section 4.1) with chances that
    depend on the depth too. Raises ConfigError for sizes below 1.
    """
    for name, value in (("nodes", nodes), ("max_depth", max_depth), ("branches", branches)):
        if value is not None and value < 1:
            raise ConfigError(f"best tree: {name} must be at least 1, found {value}")
    ranks = min(len(chances[0]) if chances else 0, nodes if branches is None else branches)
    depths = min(nodes - 1, len(chances), nodes if max_depth is None else max_depth)
    # below[n]: the most that n nodes bring below an accepted node; picks[d][r][n]: nodes of child r then.
    below = [0.0] * nodes
    picks: list[list[list[int]]] = []
    for depth in range(depths, 0, -1):
        row = chances[depth - 1]
        later, levels = [0.0] * nodes, []
        for rank in range(ranks - 1, -1, -1):
            best, pick = [0.0] * nodes, [0] * nodes
            for n in range(1, nodes):
                for mine in range(1, n + 1):
                    value = row[rank] * (1.0 + below[mine - 1]) + later[n - mine]
                    if value > best[n]:
                        best[n], pick[n] = value, mine
            later = best
            levels.append(pick)
        below = later
        picks.append(levels[::-1])
    picks.reverse()
    parents, stack = [0], [(0, 1, nodes - 1)]
    while stack:
        at, depth, left = stack.pop()
        for rank in range(ranks if depth <= depths else 0):
            mine = picks[depth - 1][rank][left]
            if not mine:
                break
            parents.append(at)
            stack.append((len(parents) - 1, depth + 1, mine - 1))
            left -= mine
    return tuple(parents)
