"""What the engine asks of a drafter. A new drafter is one file with one subclass of `Drafter`."""

import abc
import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int

from specmemo_jax.draft.tree import Tree
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.buffers import Buffer, Cost
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.kv import Caches, Groups, RowAt
from specmemo_jax.llama.live_sets import ForwardShape, LiveSet
from specmemo_jax.llama.model import Llama
from specmemo_jax.llama.packing import Target

State = Any  # a pytree of device arrays that lead with the batch axis, the drafter's own


@dataclasses.dataclass(frozen=True)
class View:
    """What a drafter may look at while it is traced.

    ``weights``: what its `Drafter.weights` gave. ``model`` and ``caches``: the target's, a group's
    cache ``[B_g, K, S_g, D]`` a layer as committed; both are read and never written. ``group``: the one that
    the row observed is of, where a prompt is read; None where it is all rows. ``features`` ``[R, C, F]``: of
    the tokens observed, the target's hidden states at the drafter's `Drafter.taps` side by side, in the
    weights' dtype; None where it has no taps or proposes.
    """

    weights: Any
    model: Llama
    caches: Caches
    group: int | None = None
    features: Array | None = None


class Drafter(abc.ABC):
    """Proposes a tree of at most ``num_nodes`` candidates a row and a step.

    Three methods are needed: `init`, `observe` and `propose`; the rest has defaults. `observe`
    and `propose` are pure and traced inside the engine's programs; the engine owns the state
    and donates it. A drafter is an argument of compiled programs' caches: make it a frozen
    dataclass, so that equal ones share programs.
    """

    name: str = "drafter"
    num_nodes: int  # T, root included

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's hidden states that it reads (`forward_with_taps`). One that has any observes plain
        steps, too, since what it would miss cannot be told from tokens alone.
        """
        return ()

    @property
    def most_waiting(self) -> int:
        """Plain steps whose positions can wait in its state until `settle` reads them; 0 where none does,
        since the drafter has read all that it was told. A drafter that lets any wait reads a position
        together with the token after it: a prompt that begins as another did is read from one token earlier.
        """
        return 0

    @property
    def max_depth(self) -> int:
        """Levels below the root."""
        return self.num_nodes - 1

    @property
    def is_chain(self) -> bool:
        """Every tree is one path in node order, so that accepted nodes need no gathering."""
        return False

    @property
    def max_leaves(self) -> int:
        """The most leaves a tree can have."""
        return 1 if self.is_chain else self.num_nodes - 1

    @property
    def verify_buckets(self) -> tuple[int, ...]:
        """Numbers of nodes that verification is compiled for, rising to ``num_nodes``.

        A step takes the first that covers the filled nodes of every row's tree, so a drafter
        that fills few nodes when it knows little saves the rest of the work.
        """
        return (self.num_nodes,)

    @property
    def tree_sizes(self) -> tuple[int, ...]:
        """Sizes of tree worth moving between while generating, rising to ``num_nodes``."""
        return (self.num_nodes,)

    def limited(self, num_nodes: int) -> "Drafter":
        """The same drafter on the same state and weights, with trees of at most ``num_nodes``.

        Needed for every size in `tree_sizes` but its own.
        """
        if num_nodes == self.num_nodes:
            return self
        raise ConfigError(f"{self.name} has trees of {self.num_nodes} nodes only, {num_nodes} were asked for")

    @abc.abstractmethod
    def init(self, groups: Groups) -> State:
        """Allocate the state for ``groups.rows`` rows of at most ``groups.most`` positions, of which a row
        never holds more than its group's.
        """

    @abc.abstractmethod
    def observe(
        self,
        view: View,
        state: State,
        rows: Int[Array, " R"],
        tokens: Int[Array, "R C"],
        starts: Int[Array, " R"],
        counts: Int[Array, " R"],
    ) -> State:
        """Learn committed tokens: ``tokens[r, :counts[r]]`` of row ``rows[r]``, from position ``starts[r]``.

        Leave ``view.caches`` alone here: it has just been written, and reading it would copy it.
        Chunks of any width; a row's tokens come in order, and a position may be told again
        (a row that starts anew is told from position 0).
        """

    @abc.abstractmethod
    def propose(
        self, view: View, state: State, pending: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> tuple[Tree, State]:
        """A tree rooted in ``pending``, the token at position ``lengths[b]`` (after all observed ones)."""

    def settle(self, view: View, state: State, lengths: Int[Array, " B"]) -> State:
        """Read what waits of plain steps, `most_waiting` at most; rows hold ``lengths`` positions. Run by a
        program of its own, before trees are proposed again or more would wait.
        """
        return state

    def grow(self, state: State, groups: Groups) -> State:
        """The same rows with room for the positions of ``groups``; called by the host between steps."""
        return state

    def move(
        self,
        state: State,
        source: RowAt,
        target: RowAt,
        platform: str,
    ) -> State:
        """Copy a row's state to another row, both as ``(group, row)``; here every leaf's first axis."""
        return jax.tree.map(lambda x: x.at[target[1]].set(x[source[1]]), state)

    def truncate(self, state: State, lengths: Int[Array, " B"]) -> State:
        """Forget everything from position ``lengths[b]`` on. Nothing to do where it is never read."""
        return state

    def weights(self, target: Target) -> Any:
        """Device arrays that the programs take as an argument; called once, after the plan is made."""
        return ()

    def weight_shapes(self, target: Target) -> Any:
        """Shapes and dtypes of `weights`, without loading them."""
        return jax.eval_shape(lambda: self.weights(target))

    def work(self, config: LlamaConfig, itemsize: int, batch: int, length: int) -> Cost:
        """What drafting a step costs with ``length`` tokens a row, for a target of ``config`` whose
        weights take ``itemsize`` bytes each.

        None by default: drafting that is small beside the target's pass.
        """
        return Cost()

    def buffers(self, groups: Groups) -> tuple[Buffer, ...]:
        """Every device buffer of `init` and `weights`, for the memory model; here those of `init`."""
        leaves = jax.tree.leaves_with_path(jax.eval_shape(lambda: self.init(groups)))
        return tuple(
            Buffer(
                f"{self.name} state{jax.tree_util.keystr(path)}",
                leaf.shape,
                leaf.dtype.name,
                leaf.size * leaf.dtype.itemsize,
            )
            for path, leaf in leaves
        )

    def temporary_bytes(self, config: LlamaConfig, batch: int, capacity: int) -> int:
        """A bound on what `observe` and `propose` need beside their arguments, for a target of ``config``."""
        return 0

    def live_sets(self, target: ForwardShape, chunk: int | None) -> tuple[LiveSet, ...]:
        """Sets of buffers that live at once while it drafts beside a target whose verification is ``target``:
        those of `propose` (``chunk`` None), or of `observe` for a prompt's ``chunk``; for `settle` as for
        a chunk of no tokens.
        """
        size = self.temporary_bytes(target.config, target.rows, target.widest)
        return ((Buffer(f"{self.name} drafting", (size,), "bytes", size),),)


@dataclasses.dataclass(frozen=True)
class TreeLimits:
    """What is known of a drafter's trees before they are drafted; the fields are `Drafter`'s. As it stands,
    the tree of plain decoding: the root alone.
    """

    num_nodes: int = 1
    max_depth: int = 0
    max_leaves: int = 1
    is_chain: bool = True
    verify_buckets: tuple[int, ...] = (1,)
    tree_sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, drafter: Drafter | None) -> "TreeLimits":
        """The drafter's."""
        if drafter is None:
            return cls()
        return cls(**{field.name: getattr(drafter, field.name) for field in dataclasses.fields(cls)})
