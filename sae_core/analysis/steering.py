"""Steering: changing what a model's SAE features say while it reads and writes, and seeing what that did.

    steered = steer(model, sae, "def area(", Add(311, 20.0), max_new_tokens=40)
    print(steered.side_by_side())
    steered.table()                                             # KL and features, position by position

An edit gives a feature another activation, f -> f', and the model's activations x become x + decode(f') - decode(f):
what the SAE does not explain stays as it is (as in Templeton et al., "Scaling Monosemanticity", 2024). By decoder rows
d_i, of length 1 in folders that are exported here:

    Add(i, strength)     f' = f + strength      x moves by strength * d_i, whatever f is: activation addition
    Clamp(i, value)      f' = value
    Ablate(i)            f' = 0
    Scale(i, factor)     f' = factor * f

An SAE that is attached to the model (`add_sae`) is edited where it is, otherwise the model runs as it is. Of a
transcoder the features at the hook point read are edited in what is written.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from sae_core.analysis.splicing import Splice, put_back, view_of, with_saes
from sae_core.errors import ConfigError
from sae_core.normalization import scale_tokens
from sae_core.sae import SAE

if TYPE_CHECKING:
    import pandas as pd

    from sae_core.analysis.feature_files import Features

Positions = str | slice | Sequence[int] | None
_ALONE = ("standard", "gated", "jumprelu")  # a latent's activation does not depend on the others'
_OF_A_BATCH = ("batch_topk", "matryoshka")
_LOGITS_AT_ONCE = 1 << 26  # numbers


# ---- edits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """`feature`: a latent, or several that are edited alike.

    positions: where: None is everywhere; "prompt"; "generated"; a slice, or a list of positions, counted over prompt
    and continuation, negative ones from the prompt's end (-1: its last token).
    sae: which of several SAEs: the SAE itself, or the hook point that it reads or writes.
    """

    positions: Positions = None
    sae: Any = None

    def __post_init__(self) -> None:
        _indices(self.feature)  # type: ignore[attr-defined]
        for name in ("strength", "value", "factor"):
            if name in vars(self):
                _finite(name, getattr(self, name))

    def apply(self, f: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def features(self) -> tuple[int, ...]:
        return _indices(self.feature)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Add(_Edit):
    """f' = f + strength. A negative strength pushes the other way, also where the feature is not active."""

    feature: int | Sequence[int]
    strength: float

    def apply(self, f: Tensor) -> Tensor:
        return f + self.strength


@dataclass(frozen=True)
class Clamp(_Edit):
    """f' = value."""

    feature: int | Sequence[int]
    value: float

    def apply(self, f: Tensor) -> Tensor:
        return torch.full_like(f, self.value)


@dataclass(frozen=True)
class Ablate(_Edit):
    """f' = 0."""

    feature: int | Sequence[int]

    def apply(self, f: Tensor) -> Tensor:
        return torch.zeros_like(f)


@dataclass(frozen=True)
class Scale(_Edit):
    """f' = factor * f."""

    feature: int | Sequence[int]
    factor: float

    def apply(self, f: Tensor) -> Tensor:
        return f * self.factor


def _indices(feature: Any) -> tuple[int, ...]:
    """Latents given as one index or several; an array's or a tensor's will do, as `argmax` gives it."""
    given = feature.tolist() if isinstance(feature, Tensor | np.ndarray) else feature
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not several or any(isinstance(one, bool) or not isinstance(one, int | np.integer) for one in several):
        raise ConfigError(f"feature is {feature!r}; accepted: the index of a latent, or of several")
    return tuple(map(int, several))


def _finite(name: str, value: Any) -> float:
    number = float("nan") if isinstance(value, str | None) or np.size(value) != 1 else float(value)
    if not isfinite(number):
        raise ConfigError(f"{name} is {value!r}; accepted: a finite number")
    return number


def edited_positions(positions: Positions, length: int, prompt_length: int) -> np.ndarray:
    """Which of the first `length` positions an edit's `positions` mean, [length] bool. Raises ConfigError for what
    they cannot be."""
    chosen = np.zeros(length, dtype=bool)
    if isinstance(positions, np.ndarray | Tensor):
        positions = positions.tolist()
    if positions is None:
        chosen[:] = True
    elif positions == "prompt":
        chosen[:prompt_length] = True
    elif positions == "generated":
        chosen[prompt_length:] = True
    elif isinstance(positions, slice):
        ends = positions.start, positions.stop, positions.step
        whole = all(isinstance(end, int | np.integer | None) for end in ends)
        if not whole or (positions.step is not None and positions.step < 1):
            raise ConfigError(f"positions is {positions!r}; accepted: a slice of whole numbers with a step above 0")
        # what lies ahead of the prompt is its start, as of any slice
        start, stop = (max(end + prompt_length, 0) if end is not None and end < 0 else end for end in ends[:2])
        chosen[start : stop : positions.step] = True
    else:
        whole = not isinstance(positions, str) and isinstance(positions, Sequence)
        if not whole or not all(isinstance(one, int | np.integer) and one >= -prompt_length for one in positions):
            raise ConfigError(
                f"positions is {positions!r}; accepted: None, 'prompt', 'generated', a slice, or a list of positions "
                f"from {-prompt_length} (the prompt has {prompt_length} tokens)"
            )
        for position in positions:
            position = position + prompt_length if position < 0 else position
            if position < length:
                chosen[position] = True
    return chosen


# ---- results --------------------------------------------------------------------------------------------------------


class FeatureChange(NamedTuple):
    """One edited feature on the steered tokens, float32 [tokens] each.

    unsteered: its activation in the model without edits, on the same tokens
    before: in the steered model, ahead of its own edit (edits of earlier layers and positions count)
    wanted: what the edit made of that
    after: what the SAE sees in the edited activations; NaN of a transcoder, which reads another hook point than it
    writes. It differs from `wanted` where decoder rows overlap, where a pre-activation below 0 has to be made up for,
    and where sparsity lets another feature win.
    edited: where it was edited, bool
    """

    hook_point: str
    feature: int
    unsteered: np.ndarray
    before: np.ndarray
    wanted: np.ndarray
    after: np.ndarray
    edited: np.ndarray


@dataclass(frozen=True)
class Steered:
    """What steering did. Arrays are by position of the steered text, prompt included.

    kl: KL(unsteered || steered) of the next token's distribution, in nats, both models given the same tokens
    perplexity, unsteered_perplexity: of the two continuations, as the unsteered model sees them; NaN without one
    """

    prompt: str
    text: str
    unsteered_text: str
    tokens: np.ndarray = field(repr=False)
    unsteered_tokens: np.ndarray = field(repr=False)
    prompt_length: int
    pieces: list[str] = field(repr=False)
    kl: np.ndarray = field(repr=False)
    perplexity: float
    unsteered_perplexity: float
    features: tuple[FeatureChange, ...] = field(repr=False)

    @property
    def kl_prompt(self) -> float:
        """Mean over the prompt's positions."""
        return float(self.kl[: self.prompt_length].mean())

    @property
    def kl_generated(self) -> float:
        """Mean over the positions that were generated; NaN if none were."""
        generated = self.kl[self.prompt_length :]
        return float(generated.mean()) if len(generated) else float("nan")

    def table(self) -> "pd.DataFrame":
        """A row for each position: token, part (prompt, generated), kl, and of every edited feature its activation in
        the unsteered model, before and after the edit."""
        import pandas as pd

        of_positions: dict[str, Any] = {
            "position": np.arange(len(self.tokens)),
            "token": self.pieces,
            "part": np.where(np.arange(len(self.tokens)) < self.prompt_length, "prompt", "generated"),
            "kl": self.kl,
        }
        several = len({one.hook_point for one in self.features}) > 1
        for one in self.features:
            name = f"{one.hook_point} {one.feature}" if several else f"{one.feature}"
            values = ("unsteered", "before", "wanted", "after")
            of_positions |= {f"{name} {value}": getattr(one, value) for value in values}
        return pd.DataFrame(of_positions)

    def side_by_side(self, width: int = 100) -> str:
        """Both continuations in two columns, under the prompt, and the figures."""
        column = max((width - 3) // 2, 1)
        start = len(self.prompt)
        sides = [
            [part for line in text[start:].split("\n") for part in wrap(line, column, drop_whitespace=False) or [""]]
            for text in (self.unsteered_text, self.text)
        ]
        height = max(map(len, sides))
        left, right = (side + [""] * (height - len(side)) for side in sides)
        rows = [("unsteered", "steered"), ("-" * column, "-" * column), *zip(left, right, strict=True)]
        changes = (f"{one.feature}: {_mean(one.unsteered, one.edited):.3g} -> {_mean(one.after, one.edited):.3g}"
                   for one in self.features)  # fmt: skip
        return "\n".join([
            self.prompt,
            *(f"{a:<{column}} | {b}".rstrip() for a, b in rows),
            f"KL {self.kl_prompt:.3g} (prompt), {self.kl_generated:.3g} (generated) nats a token; perplexity "
            f"{self.unsteered_perplexity:.3g} -> {self.perplexity:.3g}; feature {'; '.join(changes)}",
        ])  # fmt: skip


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean()) if where.any() else float("nan")


# ---- steering -------------------------------------------------------------------------------------------------------


def steer(
    model: Any,
    saes: SAE | Sequence[SAE],
    prompt: str | Tensor | Sequence[int],
    edits: _Edit | Sequence[_Edit],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_eos: bool = True,
    prepend_bos: bool | None = None,
) -> Steered:
    """Continue a prompt with and without edits of features, and say what they did.

    model: a TransformerBridge or HookedTransformer; it is given the surface of `with_saes`.
    saes: the SAEs (or transcoders) whose features are edited, at the hook points that their metadata name.
    prompt: text, or token ids [tokens] or [1, tokens]. edits: any of Add, Clamp, Ablate, Scale, in the order in which
    they are made. temperature: 0 takes the likeliest token; above, tokens are drawn, with `seed`, in both texts from
    the same random numbers; top_k, top_p as in `generate`.

    Raises ConfigError for an edit that cannot be made, an SAE that does not belong to the model, and a text that would
    be longer than the model reads.
    """
    given = list(edits) if isinstance(edits, Sequence) else [edits]
    options = _Options(max_new_tokens, temperature, top_k, top_p, seed, stop_at_eos)
    return _steer(model, saes, prompt, [given], options, prepend_bos)[0]


def sweep_strengths(
    model: Any,
    sae: SAE,
    prompt: str | Tensor | Sequence[int],
    feature: int | Sequence[int],
    strengths: Sequence[float],
    *,
    unit: "float | str | Path | Features | None" = None,
    edit: Callable[..., _Edit] = Add,
    positions: Positions = None,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_at_eos: bool = True,
    prepend_bos: bool | None = None,
) -> "pd.DataFrame":
    """The same prompt steered with each of `strengths`, a row for each, made side by side in one batch.

    unit: what a strength of 1 is. None: an activation of 1. A number: that activation. A folder of features (see
    feature_files.py; its path, or as `read_features` gives it): the feature's largest activation on the text that was
    looked at, the unit in which strengths compare between features; of several features the mean.
    edit: Add, Clamp or Scale (whose factor has no unit). Other arguments as in `steer`.

    Columns: strength, amount (strength in activations), kl_prompt, kl_generated, unsteered, after (mean activation of
    the features at the edited positions, without edits and after), perplexity, text. `frame.attrs["unsteered_text"]`
    and `["unsteered_perplexity"]` belong to all of them.
    """
    import pandas as pd

    if edit is Ablate:
        raise ConfigError("edit is Ablate, which has no strength; accepted: Add, Clamp, Scale")
    if np.ndim(strengths) != 1 or not len(strengths):
        raise ConfigError(f"strengths is {strengths!r}; accepted: a list of one number or more")
    features = _indices(feature)
    of_one = _unit(unit, features) if edit is not Scale else 1.0
    amounts = [_finite("strengths", strength) * of_one for strength in strengths]
    options = _Options(max_new_tokens, temperature, top_k, top_p, seed, stop_at_eos)
    rows = [[edit(features, amount, positions=positions)] for amount in amounts]
    results = _steer(model, sae, prompt, rows, options, prepend_bos)
    frame = pd.DataFrame(
        {
            "strength": float(strength),
            "amount": amount,
            "kl_prompt": one.kl_prompt,
            "kl_generated": one.kl_generated,
            "unsteered": float(np.mean([_mean(change.unsteered, change.edited) for change in one.features])),
            "after": float(np.mean([_mean(change.after, change.edited) for change in one.features])),
            "perplexity": one.perplexity,
            "text": one.text,
        }
        for strength, amount, one in zip(strengths, amounts, results, strict=True)
    )
    frame.attrs["unsteered_text"] = results[0].unsteered_text
    frame.attrs["unsteered_perplexity"] = results[0].unsteered_perplexity
    return frame


def _unit(unit: Any, features: Sequence[int]) -> float:
    if unit is None:
        return 1.0
    if isinstance(unit, int | float):
        if not 0 < unit < float("inf"):
            raise ConfigError(f"unit is {unit}; accepted: an activation above 0, or a folder of features")
        return float(unit)
    from sae_core.analysis.feature_files import read_features

    found = read_features(unit) if isinstance(unit, str | Path) else unit
    latents, largest = (found.latents.column(name).to_numpy() for name in ("latent", "max_activation"))
    known = dict(zip(latents.tolist(), largest.tolist(), strict=True))
    for one in features:
        if not known.get(one, 0) > 0:
            raise ConfigError(f"unit: the folder of features has no activation of feature {one}; accepted: a number")
    return float(np.mean([known[one] for one in features]))


@dataclass(frozen=True)
class _Options:
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    stop_at_eos: bool

    def __post_init__(self) -> None:
        wrong = {
            "max_new_tokens": not _is_whole(self.max_new_tokens, 0) and "a whole number of 0 or more",
            "temperature": not 0 <= self.temperature < float("inf") and "a number of 0 or more",
            "top_k": self.top_k is not None and not _is_whole(self.top_k, 1) and "None, or a whole number above 0",
            "top_p": self.top_p is not None and not 0 < self.top_p <= 1 and "None, or a number above 0 and up to 1",
            "seed": not _is_whole(self.seed, None) and "a whole number",
        }
        for name, accepted in wrong.items():
            if accepted:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; accepted: {accepted}")


def _is_whole(value: Any, least: int | None) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and (least is None or value >= least)


@torch.no_grad()
def _steer(
    model: Any, saes: Any, prompt: Any, rows: Sequence[Sequence[_Edit]], options: _Options, prepend_bos: bool | None
) -> list[Steered]:
    """One result for each of `rows`: edits of a text of its own."""
    model = with_saes(model)
    given = [saes] if isinstance(saes, SAE) else list(saes)
    tokens = _tokens(model, prompt, prepend_bos)
    prompt_length = tokens.shape[1]
    limit = getattr(model.cfg, "n_ctx", None)
    if limit and prompt_length + options.max_new_tokens > limit:
        raise ConfigError(
            f"max_new_tokens {options.max_new_tokens}: with the prompt's {prompt_length} tokens more than the {limit} "
            "that the model reads"
        )
    sites = _sites(model, given, rows, prompt_length)
    with _attached(model, [site for site in sites if site.must_be_attached]):
        texts = _generate(model, tokens, sites, len(rows), options)
        clean_own = texts[0]
        steered: list[Steered] = []
        log_p = _next_log_probabilities(model, [clean_own], None)
        unsteered_perplexity = _perplexity(next(log_p), clean_own, prompt_length)
        clean_passes = _next_log_probabilities(model, texts[1:], _watching(sites, "unsteered"))
        steered_passes = _next_log_probabilities(model, texts[1:], _watching(sites, "edited"))
        for index, (own, clean, changed) in enumerate(zip(texts[1:], clean_passes, steered_passes, strict=True)):
            steered.append(
                Steered(
                    prompt=_decode(model, tokens[0]),
                    text=_decode(model, own),
                    unsteered_text=_decode(model, clean_own),
                    tokens=own.cpu().numpy(),
                    unsteered_tokens=clean_own.cpu().numpy(),
                    prompt_length=prompt_length,
                    pieces=[_decode(model, own[i : i + 1], special=True) for i in range(len(own))],
                    kl=(clean.exp() * (clean - changed)).sum(-1).clamp_min(0).double().cpu().numpy(),
                    perplexity=_perplexity(clean, own, prompt_length),
                    unsteered_perplexity=unsteered_perplexity,
                    features=tuple(change for site in sites for change in site.changes(index, len(own))),
                )
            )
    return steered


def _generate(
    model: Any, tokens: Tensor, sites: "Sequence[_Site]", n_rows: int, options: _Options
) -> list[Tensor]:
    """The unsteered text, and that of each row of edits: token ids [tokens], prompt included, up to an EOS.

    In one batch, which costs little more than one text; drawn tokens one text after the other, so that all are drawn
    from the same random numbers.
    """
    if options.max_new_tokens == 0:
        return [tokens[0]] * (n_rows + 1)
    eos = getattr(model.tokenizer, "eos_token_id", None) if options.stop_at_eos else None
    kwargs: dict[str, Any] = {
        "max_new_tokens": options.max_new_tokens, "stop_at_eos": eos is not None, "eos_token_id": eos,
        "do_sample": options.temperature > 0, "temperature": options.temperature or 1.0, "top_k": options.top_k,
        "top_p": options.top_p, "verbose": False, "return_type": "tokens",
        # TransformerLens 3.9's HookedTransformer counts positions twice when it uses its cache without a tokenizer
        "use_past_kv_cache": model.tokenizer is not None or hasattr(model, "original_model"),
    }  # fmt: skip
    batches = [[index] for index in range(-1, n_rows)] if options.temperature > 0 else [list(range(-1, n_rows))]
    texts: list[Tensor] = []
    device = tokens.device
    for batch in batches:
        hooks = [hook for site in sites for hook in site.hooks(batch)]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(options.seed)
            made = model.generate(tokens.repeat(len(batch), 1), fwd_hooks=hooks, **kwargs)
        for row in made.to(device):
            ends = (row[tokens.shape[1] :] == eos).nonzero() if eos is not None else []
            texts.append(row[: tokens.shape[1] + int(ends[0]) + 1] if len(ends) else row)
    return texts


def _next_log_probabilities(
    model: Any, texts: Sequence[Tensor], hooks: Callable[[Sequence[int]], list[tuple]] | None
) -> Iterator[Tensor]:
    """log p of the next token at each position of each text, [tokens, vocabulary] float32; texts of one length share a
    pass as far as memory allows."""
    start = 0
    while start < len(texts):
        length = len(texts[start])
        at_once = max(1, _LOGITS_AT_ONCE // (length * model.cfg.d_vocab))
        end = start + 1
        while end < len(texts) and end - start < at_once and len(texts[end]) == length:
            end += 1
        batch = torch.stack(list(texts[start:end]))
        fwd_hooks = [] if hooks is None else hooks(range(start, end))
        logits = model.run_with_hooks(batch, return_type="logits", fwd_hooks=fwd_hooks)
        for row in logits:
            yield log_softmax(row.float(), dim=-1)
        start = end


def _perplexity(log_p: Tensor, tokens: Tensor, prompt_length: int) -> float:
    if len(tokens) == prompt_length:
        return float("nan")
    own = log_p[prompt_length - 1 : -1].gather(1, tokens[prompt_length:, None])
    return float((-own.double().mean()).exp())


def _tokens(model: Any, prompt: Any, prepend_bos: bool | None) -> Tensor:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ConfigError("prompt is text, and the model has no tokenizer; accepted: token ids")
        tokens = model.to_tokens(prompt, **({} if prepend_bos is None else {"prepend_bos": prepend_bos}))
    else:
        try:
            tokens = torch.as_tensor(prompt)
        except (TypeError, ValueError):
            raise ConfigError(f"prompt is {prompt!r}; accepted: one text, or the token ids of one") from None
        tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] == 0 or tokens.is_floating_point():
        raise ConfigError(
            f"prompt has tokens of shape {list(tokens.shape)}; accepted: text, or the token ids of one, [tokens]"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.cfg.d_vocab:
        raise ConfigError(
            f"prompt has token ids from {int(tokens.min())} to {int(tokens.max())}; accepted: 0 to "
            f"{model.cfg.d_vocab - 1}"
        )
    return tokens.to(next(model.parameters()).device).long()


def _decode(model: Any, tokens: Tensor, special: bool = False) -> str:
    if model.tokenizer is None:
        return " ".join(str(token) for token in tokens.tolist())
    return model.tokenizer.decode(tokens.tolist(), skip_special_tokens=not special)


# ---- where features are edited --------------------------------------------------------------------------------------


def _sites(
    model: Any, saes: Sequence[SAE], rows: Sequence[Sequence[_Edit]], prompt_length: int
) -> "list[_Site]":
    if not saes:
        raise ConfigError("saes is empty; accepted: an SAE, or several")
    by_sae: dict[int, list[list[_Edit]]] = {}
    for index, edits in enumerate(rows):
        if not edits:
            raise ConfigError("edits is empty; accepted: Add, Clamp, Ablate or Scale, one or more")
        for edit in edits:
            if not isinstance(edit, _Edit):
                raise ConfigError(f"edits has a {type(edit).__name__}; accepted: Add, Clamp, Ablate, Scale")
            which = _which(saes, edit)
            by_sae.setdefault(which, [[] for _ in rows])[index].append(edit)
    return [_Site(model, saes[which], of_rows, prompt_length) for which, of_rows in by_sae.items()]


def _which(saes: Sequence[SAE], edit: _Edit) -> int:
    if edit.sae is None:
        if len(saes) == 1:
            return 0
        raise ConfigError(
            f"{edit}: sae is not given, and there are {len(saes)}; accepted: one of them, or its hook point"
        )
    for index, sae in enumerate(saes):
        about = sae.cfg.metadata
        named = isinstance(edit.sae, str) and edit.sae in (about.get("hook_name"), about.get("hook_name_out"))
        if edit.sae is sae or named:
            return index
    known = ", ".join(repr(sae.cfg.metadata.get("hook_name")) for sae in saes)
    asked = edit.sae if isinstance(edit.sae, str) else type(edit.sae).__name__
    raise ConfigError(f"edit: sae is {asked!r}, none of those given; accepted: one of them, or a hook point of {known}")


class _Site:
    """The edited features of one SAE, in the texts of all rows. Row -1 is the unsteered text."""

    def __init__(self, model: Any, sae: SAE, rows: Sequence[Sequence[_Edit]], prompt_length: int):
        if not isinstance(sae, SAE):
            raise ConfigError(f"saes has a {type(sae).__name__}; accepted: SAEs of sae_core")
        if sae.cfg.architecture in _OF_A_BATCH:
            raise ConfigError(
                f"the SAE is a {sae.cfg.architecture} as in training, whose activations depend on the other tokens of "
                "a batch; accepted: the jumprelu SAE that it is exported as (SAETrainer.export)"
            )
        self.sae, self.rows, self.prompt_length = sae, rows, prompt_length
        self.features = sorted({feature for edits in rows for edit in edits for feature in edit.features})
        for feature in self.features:
            if not 0 <= feature < sae.d_sae:
                raise ConfigError(f"feature is {feature!r}; accepted: 0 to {sae.d_sae - 1}")
        self.columns = {feature: column for column, feature in enumerate(self.features)}
        for edits in rows:
            for edit in edits:
                edited_positions(edit.positions, 0, prompt_length)
        place = Splice(model, sae, True, False, model.hook_dict)  # checks that the SAE belongs to the model
        self.reads, self.writes, self.is_transcoder = place.reads, place.writes, place.is_transcoder
        self.is_attached = any(one is sae for one in model.acts_to_saes.values())
        self.must_be_attached = not self.is_attached and place.off_the_stream
        self.is_attached |= self.must_be_attached
        index = torch.tensor(self.features, device=sae.W_dec.device)
        rows_of_decoder = sae.W_dec[index]
        if sae.cfg.rescale_acts_by_decoder_norm:
            rows_of_decoder = rows_of_decoder / rows_of_decoder.norm(dim=1, keepdim=True).clamp_min(1e-12)
        self.directions = rows_of_decoder  # [features, d_out], what an activation of 1 adds, before denormalising
        self.index = index
        self.alone = _narrowed(sae, index) if sae.cfg.architecture in _ALONE else None
        self.must_encode = any(not isinstance(edit, Add) for edits in rows for edit in edits)
        self.seen: dict[int, dict[str, Tensor]] = {row: {} for row in range(len(rows))}

    # ---- hooks ----

    def hooks(self, batch: Sequence[int], watch: str | None = None) -> list[tuple[str, Callable]]:
        """Hooks that edit a pass over these rows; with `watch`, "edited" or "unsteered", they note activations, and
        edit nothing if "unsteered"."""
        if self.is_attached:
            hooks: list[tuple[str, Callable]] = [
                (f"{self.writes}.hook_sae_acts_post", lambda f, hook: self._edit_latents(f, hook, batch, watch))
            ]
            if watch == "edited" and not self.is_transcoder:
                hooks.append((self.writes, lambda x, hook: self._note_after(x, batch)))
            return hooks
        if not self.is_transcoder:
            return [(self.writes, lambda x, hook: self._edit_stream(x, x, hook, batch, watch))]
        read: list[Tensor] = []
        return [
            (self.reads, lambda x, hook: read.append(x)),
            (self.writes, lambda y, hook: self._edit_stream(read.pop(), y, hook, batch, watch)),
        ]

    def _edit_latents(self, f: Tensor, hook: Any, batch: Sequence[int], watch: str | None) -> Tensor | None:
        own = f[..., self.index]
        wanted, where = self._edited(own, hook, batch)
        self._note(batch, watch, own, wanted, where)
        if watch == "unsteered" or not where.any():
            return None
        f = f.clone()
        f[..., self.index] = wanted
        return f

    def _edit_stream(self, x: Tensor, y: Tensor, hook: Any, batch: Sequence[int], watch: str | None) -> Tensor | None:
        """y with the edits made that the features of x ask for; x is y unless the SAE is a transcoder."""
        sae = self.sae
        n_positions = x.shape[1]
        if watch is None and not self._mask(hook, n_positions, batch).any():
            return None
        seen = view_of(sae, x, self.reads).to(sae.W_enc.device, sae.W_enc.dtype)
        if watch is None and not self.must_encode:
            own = seen.new_zeros(*seen.shape[:-1], len(self.features))
        else:
            own = self._encode(seen)
        wanted, where = self._edited(own, hook, batch)
        self._note(batch, watch, own, wanted, where)
        if watch == "unsteered" or not where.any():
            return None
        moved = torch.where(where, wanted - own, torch.zeros_like(own)) @ self.directions
        scaling = None if self.is_transcoder else scale_tokens(seen, sae.cfg.normalize_activations)[1]
        if scaling is not None:
            moved = moved * scaling.scale
        head = sae.cfg.metadata.get("hook_head_index")
        target = view_of(sae, y, self.writes, written=True)
        result = put_back(target + moved.reshape(target.shape).to(y.device, y.dtype), y, head)
        if watch == "edited" and not self.is_transcoder:
            self._note_after(result, batch)
        return result

    def _encode(self, x: Tensor) -> Tensor:
        """Activations of the edited features, [..., features]."""
        return self.sae.encode(x)[..., self.index] if self.alone is None else self.alone.encode(x)

    def _mask(self, hook: Any, n_positions: int, batch: Sequence[int]) -> Tensor:
        """Whether each of the features is edited, [rows, positions, features] bool."""
        start = hook.ctx.get("start", 0)
        mask = np.zeros((len(batch), n_positions, len(self.features)), dtype=bool)
        for slot, row in enumerate(batch):
            for edit in self.rows[row] if row >= 0 else ():
                chosen = edited_positions(edit.positions, start + n_positions, self.prompt_length)[start:]
                mask[slot][np.ix_(chosen, [self.columns[feature] for feature in edit.features])] = True
        return torch.from_numpy(mask)

    def _edited(self, own: Tensor, hook: Any, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The activations that edits make of `own` [rows, positions, features], and where they do."""
        start, n_positions = hook.ctx.get("start", 0), own.shape[1]
        wanted = own.clone()
        for slot, row in enumerate(batch):
            for edit in self.rows[row] if row >= 0 else ():
                chosen = edited_positions(edit.positions, start + n_positions, self.prompt_length)[start:]
                at = torch.from_numpy(np.flatnonzero(chosen)).to(own.device)
                columns = torch.tensor([self.columns[feature] for feature in edit.features], device=own.device)
                place = (slot, at[:, None], columns[None, :])
                wanted[place] = edit.apply(wanted[place])
        return wanted, self._mask(hook, n_positions, batch).to(own.device)

    # ---- notes ----

    def _note(self, batch: Sequence[int], watch: str | None, own: Tensor, wanted: Tensor, where: Tensor) -> None:
        if watch is None:
            return
        named = {"unsteered": own} if watch == "unsteered" else {"before": own, "wanted": wanted, "edited": where}
        if watch == "edited":  # until it is seen, where something is edited
            named["after"] = torch.full_like(own, float("nan")) if self.is_transcoder else own
        for slot, row in enumerate(batch):
            self.seen[row].update({name: values[slot].cpu() for name, values in named.items()})

    def _note_after(self, x: Tensor, batch: Sequence[int]) -> None:
        seen = view_of(self.sae, x, self.writes).to(self.sae.W_enc.device, self.sae.W_enc.dtype)
        after = self._encode(seen).cpu()
        for slot, row in enumerate(batch):
            self.seen[row]["after"] = after[slot]

    def changes(self, row: int, length: int) -> Iterator[FeatureChange]:
        """Of each feature that the edits of a row name."""
        named = {feature for edit in self.rows[row] for feature in edit.features}
        for feature in sorted(named):
            of_feature = {name: values[:length, self.columns[feature]] for name, values in self.seen[row].items()}
            edited = of_feature.pop("edited").numpy()
            yield FeatureChange(
                self.writes, int(feature), edited=edited,
                **{name: values.float().numpy() for name, values in of_feature.items()},
            )  # fmt: skip


def _watching(sites: "Sequence[_Site]", watch: str) -> Callable[[Sequence[int]], list[tuple]]:
    return lambda batch: [hook for site in sites for hook in site.hooks(batch, watch)]


def _attached(model: Any, sites: "Sequence[_Site]") -> AbstractContextManager:
    return model.saes([site.sae for site in sites], use_error_term=True) if sites else nullcontext()


def _narrowed(sae: SAE, index: Tensor) -> SAE:
    """An SAE of some latents alone, where a latent does not depend on the others."""
    cfg = sae.cfg.model_copy(update={"d_sae": len(index)})
    shapes: Mapping[str, tuple[int, ...]] = type(sae).shapes(cfg)
    weights = {}
    for name in shapes:
        weight = getattr(sae, name)
        if name == "W_enc":
            weights[name] = weight[:, index].contiguous()
        elif name == "W_dec" or name in type(sae).encoder_biases:
            weights[name] = weight[index]
        else:
            weights[name] = weight
    return type(sae)(cfg, weights)
