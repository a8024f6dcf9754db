"""What a hook point's activations consist of by an SAE: features and errors, at their positions.

    a = const + sum_i f_i d_i + error        const = decode(0), d_i: what the decoder makes of a 1 at latent i

The nodes are the active features (row, position, latent) and the error at each position, what the SAE does not explain
of `a`. What belongs to no node: b_dec, a transcoder's skip connection, and the mean that a normalisation of each token
gives back. A transcoder reads one hook point; its nodes are of the other one, that it writes.

Positions that an SAE's training left out (`exclude.first_positions` in its metadata: where a model has its attention
sink, an SAE explains nothing) have no nodes, unless asked for: there the model goes on as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_core.errors import ConfigError
from sae_core.sae import SAE

ERROR = -1
"""Stands for the error term in place of a latent."""

SAEs = SAE | Sequence[SAE] | Mapping[str, SAE]
Positions = int | slice | Sequence[int] | Tensor | None
_ENTRIES_AT_ONCE = 1 << 24  # of dense latents: 64 MB in float32


@dataclass(frozen=True)
class Place:
    """An SAE at the hook points that it reads and writes, under the name by which results are given."""

    name: str
    sae: SAE
    reads: str
    writes: str
    head: int | None

    def of_head(self, x: Tensor, width: int) -> Tensor:
        """This SAE's share of activations [..., heads side by side]: all, or one head's."""
        if self.head is None:
            return x
        return x[..., self.head * width : (self.head + 1) * width]

    def default_first(self) -> int:
        """How many positions at a row's beginning the SAE's training left out."""
        excluded = self.sae.cfg.metadata.get("exclude") or {}
        first = excluded.get("first_positions") if isinstance(excluded, Mapping) else 0
        return first if isinstance(first, int) else 0


def places_of(saes: SAEs) -> list[Place]:
    """The places of `saes`: one, several, or several by a name. Hook points are those of the SAE's metadata (hook_name,
    hook_name_out); where those name none, the name that is given is the hook point."""
    if isinstance(saes, SAE):
        saes = [saes]
    given: list[tuple[str | None, SAE]] = list(saes.items() if isinstance(saes, Mapping) else ((None, s) for s in saes))
    places: dict[str, Place] = {}
    for name, sae in given:
        if not isinstance(sae, SAE):
            raise ConfigError(f"saes: {name or 'one of them'} is a {type(sae).__name__}; accepted: SAEs of sae_core")
        metadata = sae.cfg.metadata
        reads = metadata.get("hook_name") or (None if sae.cfg.is_transcoder else name)
        writes = (metadata.get("hook_name_out") if sae.cfg.is_transcoder else None) or reads
        if reads is None or (sae.cfg.is_transcoder and not metadata.get("hook_name_out")):
            wanted = "hook_name and hook_name_out" if sae.cfg.is_transcoder else "hook_name"
            raise ConfigError(f"saes: the metadata of {name or 'an SAE'} lack {wanted}; accepted: an SAE whose "
                              "sae.cfg.metadata name its hook points, or {hook point: sae}")  # fmt: skip
        if name is not None and name.startswith("blocks.") and name not in (reads, writes):
            raise ConfigError(f"saes[{name!r}]: by its metadata this SAE belongs to {writes!r}; accepted: that name, "
                              "or one that is no hook point")  # fmt: skip
        place = Place(name or writes, sae, reads, writes, metadata.get("hook_head_index"))
        if place.name in places:
            raise ConfigError(f"saes: two of them belong to {place.name!r}; accepted: names for them, {{name: sae}}")
        places[place.name] = place
    if not places:
        raise ConfigError("saes: none are given; accepted: one or more")
    return list(places.values())


def mask_of(positions: Positions, context: int, first: int) -> Tensor:
    """Which of `context` positions have nodes: [context] bool. None: all but the `first`."""
    mask = torch.zeros(context, dtype=torch.bool)
    if positions is None:
        mask[first:] = True
        return mask
    try:
        mask[torch.as_tensor(positions) if isinstance(positions, Sequence | Tensor) else positions] = True
    except (IndexError, TypeError, ValueError):
        raise ConfigError(
            f"positions {positions!r}; accepted: None, a number, a slice or a list of numbers below {context}"
        ) from None
    return mask


def nodes_of(place: Place, read: Tensor, written: Tensor, positions: Positions) -> "Nodes":
    """The nodes of `place`, given all that its hook points have, [rows, context, heads side by side] each."""
    return Nodes(place, place.of_head(read, place.sae.d_in), place.of_head(written, place.sae.d_out), positions)


class Nodes:
    """The nodes of one place over rows of tokens, sparse.

    row, position, latent: [n] int64, features first, in that order, then the errors (latent ERROR); activation [n]: a
    feature's activation, an error's norm. read, written: [rows, context, d_in] and [rows, context, d_out] activations.
    """

    def __init__(self, place: Place, read: Tensor, written: Tensor, positions: Positions = None):
        sae = place.sae
        self.place, self.device = place, written.device
        own = sae.W_dec.device
        self.read, written = (given.detach().to(own) for given in (read, written))
        written = written.to(sae.W_dec.dtype)
        if written.shape[-1] != sae.d_out:
            raise ConfigError(
                f"SAE {place.name!r} reconstructs {sae.d_out} dimensions, and {place.writes!r} has {written.shape[-1]}"
            )
        self.context = written.shape[1]
        self.mask = mask_of(positions, self.context, place.default_first()).to(own)
        rows, places = torch.nonzero(self.mask.expand(written.shape[:2]), as_tuple=True)
        self.error = torch.zeros_like(written)
        self.const = torch.zeros_like(written)
        found: list[tuple[Tensor, ...]] = []
        for part in self._parts(rows):
            r, p = rows[part], places[part]
            x = self.read[r, p]
            f = sae.encode(x)
            self.const[r, p] = self._decode(torch.zeros_like(f), x)
            self.error[r, p] = written[r, p] - self._decode(f, x)
            token, latent = torch.nonzero(f, as_tuple=True)
            found.append((r[token], p[token], latent, f[token, latent]))
        if not found:
            raise ConfigError(f"positions {positions!r}: rows of {self.context} tokens have none of them")
        row, position, latent, activation = (torch.cat(one) for one in zip(*found, strict=True))
        self.n_features = len(row)
        self.row, self.position = torch.cat([row, rows]), torch.cat([position, places])
        self.latent = torch.cat([latent, torch.full_like(rows, ERROR)])
        self.activation = torch.cat([activation, self.error[rows, places].norm(dim=-1)])

    def _decode(self, f: Tensor, x: Tensor) -> Tensor:
        return self.place.sae.decode(f, x).reshape(len(f), -1)

    def _parts(self, of: Tensor) -> Iterator[slice]:
        at_once = max(1, _ENTRIES_AT_ONCE // self.place.sae.d_sae)
        return (slice(start, start + at_once) for start in range(0, len(of), at_once))

    def __len__(self) -> int:
        return len(self.row)

    def vectors(self, index: Tensor) -> Tensor:
        """What nodes `index` [n] add to the activations at their positions: [n, d_out]."""
        parts = []
        for part in self._parts(index):
            chosen = index[part]
            row, position, latent = self.row[chosen], self.position[chosen], self.latent[chosen]
            f = torch.zeros(len(chosen), self.place.sae.d_sae, dtype=self.error.dtype, device=self.error.device)
            is_feature = latent != ERROR
            f[is_feature, latent[is_feature]] = self.activation[chosen][is_feature]
            made = self._decode(f, self.read[row, position]) - self.const[row, position]
            parts.append(torch.where(is_feature[:, None], made, self.error[row, position]))
        return torch.cat(parts) if parts else self.error.new_zeros(0, self.error.shape[-1])

    def placed(self, index: Tensor, vectors: Tensor) -> Tensor:
        """`vectors` [n, d_out] of nodes `index` [n], added up at their positions: [rows, context, d_out]."""
        at = self.row[index], self.position[index]
        return torch.zeros_like(self.error).index_put_(at, vectors, accumulate=True)

    def dots(self, gradient: Tensor) -> Tensor:
        """The scalar product of each node's vector with `gradient` [rows, context, d_out] at its position: [n] float64.

        A decoder is affine in the latents, so that its Jacobian at any of them, transposed, gives all of them at once.
        """
        gradient = gradient.to(self.error)
        row, position = self.row[self.n_features :], self.position[self.n_features :]  # one error a position
        of_errors = (self.error[row, position].double() * gradient[row, position].double()).sum(-1)
        slots = torch.full(self.error.shape[:2], -1, device=row.device)
        slots[row, position] = torch.arange(len(row), device=row.device)
        slot = slots[self.row[: self.n_features], self.position[: self.n_features]]
        of_features = torch.zeros(self.n_features, dtype=torch.float64, device=row.device)
        for part in self._parts(row):
            r, p = row[part], position[part]
            with torch.enable_grad():
                f = gradient.new_zeros(len(r), self.place.sae.d_sae).requires_grad_()
                made = self._decode(f, self.read[r, p])
            (per_latent,) = torch.autograd.grad(made, f, gradient[r, p])
            mine = torch.nonzero((slot >= part.start) & (slot < part.stop))[:, 0]
            of_features[mine] = per_latent[slot[mine] - part.start, self.latent[mine]].double()
        return torch.cat([of_features * self.activation[: self.n_features].double(), of_errors])
