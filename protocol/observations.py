"""What agents observe and may do: compact, as it is kept and sent, and expanded, as networks see it.

A spec says of each part of an observation what it is (`specs.Part`), and of a type where its action masks come from
(`TypeSpec.mask`). Of a block of N_b agents these *columns* are kept, each only where there is something to keep:

- `own` [..., N_b, D] float32: all own parts side by side.
- `uint8`, `int16` [..., N_b, D]: the same of own parts that are such integers; as numbers they are float32, too.
- `codes` [..., N_b, C] uint8, int16 or int32: one small integer for each code.
- `shared` [..., S] float32: all shared parts side by side, once for all agents.
- `masks` [..., N_b, A] bool: which actions are allowed, for types whose masks are `own`.

An environment that says nothing has `own`, which is the observation, and `masks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import torch

from bm3il.protocol.errors import InputError, ProtocolError
from bm3il.protocol.specs import FREE, OWN_MASK, ArrayTable, EnvironmentSpec, Part, PartKind, TypeSpec

OWN_NUMBERS = {"own": "float32", "uint8": "uint8", "int16": "int16"}
"""Kinds of parts that are numbers of every agent, which are the names of their columns → dtype."""
COLUMNS = (*OWN_NUMBERS, "codes", "shared", "masks")


@dataclass(frozen=True)
class Run:
    """Neighbouring columns first..end of an observation that come from one place.

    source: where their numbers begin in the column of that kind or the constants; of a code, which one it is.
    """

    kind: PartKind
    first: int
    end: int
    source: int
    masked: bool = False

    @property
    def width(self) -> int:
        return self.end - self.first

    @property
    def columns(self) -> slice:
        return slice(self.first, self.end)

    @property
    def stored(self) -> slice:
        """Of the column of that kind, or of the constants."""
        return slice(self.source, self.source + self.width)


@dataclass(frozen=True)
class Form:
    """How the N_b agents of a block observe.

    runs: all columns of the observation, in their order.   own, uint8, int16, shared: how wide these columns are.
    code_sizes: of each of the C codes.
    constants: [N_b, W] float32, the constant parts of every agent side by side.
    table: [size + 1, A] bool, the allowed actions of every value of the code `mask_code`; with "none" all are allowed.
        None for masks that are `own` or `free`.
    """

    agents: int
    observation_dim: int
    action_dim: int
    runs: tuple[Run, ...]
    own: int
    shared: int
    code_sizes: tuple[int, ...]
    constants: np.ndarray
    own_masks: bool
    mask_code: int = 0
    table: np.ndarray | None = None
    uint8: int = 0
    int16: int = 0
    _tensors: dict[tuple[str, torch.device], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, spec: EnvironmentSpec, types: Sequence[int]) -> Form:
        """Of the block of these types."""
        kinds = [spec.types[m] for m in types]
        first = kinds[0]
        runs, widths = _runs(first)
        table = None
        if first.mask not in (OWN_MASK, FREE):
            allowed = dict(spec.tables)[first.mask]
            table = np.ones((len(allowed) + 1, first.action_dim), bool)
            for value, actions in enumerate(allowed):
                table[value] = np.isin(np.arange(first.action_dim), actions)
        return cls(
            agents=sum(kind.count for kind in kinds),
            observation_dim=first.observation_dim,
            action_dim=first.action_dim,
            runs=runs,
            own=widths["own"],
            uint8=widths["uint8"],
            int16=widths["int16"],
            shared=widths["shared"],
            code_sizes=tuple(code.size for code in first.codes),
            constants=np.concatenate([np.tile(_constants(kind), (kind.count, 1)) for kind in kinds]),
            own_masks=first.mask == OWN_MASK,
            mask_code=0 if table is None else first.code(first.mask),
            table=table,
        )

    @classmethod
    def plain(cls, agents: int, observation_dim: int, action_dim: int) -> Form:
        """Of agents of whom nothing is said: everything is their own, masks too."""
        runs = (Run("own", 0, observation_dim, 0),)
        return cls(agents, observation_dim, action_dim, runs, observation_dim, 0, (), np.zeros((agents, 0)), True)

    @property
    def is_plain(self) -> bool:
        """Whether everything is the agents' own, in float32, and their masks are."""
        return self.own == self.observation_dim and self.own_masks

    @property
    def sees_masks(self) -> bool:
        """Whether an observation cannot be expanded without its action masks."""
        return any(run.masked for run in self.runs)

    def table_of(self, *leading: int, masks: bool = True) -> ArrayTable:
        """Column → (dtype, shape), with these leading axes; masks: whether those are wanted that nobody observes."""
        shapes = {name: (dtype, (*leading, self.agents, getattr(self, name))) for name, dtype in OWN_NUMBERS.items()}
        shapes |= {
            "codes": (integers(max(self.code_sizes, default=0) + 1), (*leading, self.agents, len(self.code_sizes))),
            "shared": ("float32", (*leading, self.shared)),
        }
        table = {name: entry for name, entry in shapes.items() if entry[1][-1]}
        if self.own_masks and (masks or self.sees_masks):
            table["masks"] = ("bool", (*leading, self.agents, self.action_dim))
        return table

    @cached_property
    def near(self) -> np.ndarray:
        """[size, D] int64: the D actions, at most, that the table allows with every value of the code; padded."""
        assert self.table is not None
        allowed = self.table[:-1]
        # Stable: the allowed actions come first in their own order, on every machine.
        return np.argsort(~allowed, axis=1, kind="stable")[:, : allowed.sum(axis=1).max()]

    @cached_property
    def is_near(self) -> np.ndarray:
        """[size, D] float32: 1, or 0 where `near` is padded."""
        assert self.table is not None
        return np.take_along_axis(self.table[:-1], self.near, axis=1).astype(np.float32)

    def on(self, device: torch.device, name: Literal["constants", "table", "near", "is_near"]) -> torch.Tensor:
        """One of these on a device, to which it is copied once."""
        if (name, device) not in self._tensors:
            self._tensors[name, device] = torch.from_numpy(getattr(self, name)).to(device)
        return self._tensors[name, device]


@dataclass
class Observations:
    """What the N_b agents of a block observe and may do, compact: `form.table_of(...)` with any leading axes."""

    form: Form
    columns: dict[str, torch.Tensor]

    @classmethod
    def of_arrays(cls, form: Form, arrays: Mapping[str, np.ndarray]) -> Observations:
        """Of numpy's arrays; only those that must not be written to are copied."""
        return cls(form, {name: tensor_of(arrays[name]) for name in COLUMNS if name in arrays})

    @classmethod
    def taken(cls, form: Form, tensors: Iterator[torch.Tensor]) -> Observations:
        """Of the next of `tensors`, in the order of the columns, masks included."""
        return cls(form, {name: next(tensors) for name in form.table_of()})

    @classmethod
    def joined(cls, parts: Sequence[Observations]) -> Observations:
        """The rows of all parts along the first axis, in their order."""
        columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
        return cls(parts[0].form, columns)

    @property
    def leading(self) -> torch.Size:
        """The axes before those of agents and columns."""
        name, tensor = next(iter(self.columns.items()))
        return tensor.shape[: -1 if name == "shared" else -2]

    @property
    def device(self) -> torch.device:
        return next(iter(self.columns.values())).device

    def __len__(self) -> int:
        return self.leading[0]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Observations:
        """Every column changed in the same way, along the leading axes."""
        return Observations(self.form, {name: change(tensor) for name, tensor in self.columns.items()})

    def __getitem__(self, place: torch.Tensor | slice | tuple[torch.Tensor | slice, ...]) -> Observations:
        """Rows by their place along the leading axes."""
        return self.map(lambda tensor: tensor[place])

    def select(self, index: torch.Tensor) -> Observations:
        """Rows along the first axis, copied."""
        return self.map(lambda tensor: tensor.index_select(0, index))

    def to(self, device: torch.device) -> Observations:
        """Itself on another device, without waiting for it."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def without_masks(self) -> Observations:
        """Itself without the masks that nobody observes."""
        if self.form.sees_masks or "masks" not in self.columns:
            return self
        return Observations(self.form, {name: t for name, t in self.columns.items() if name != "masks"})

    def dense(self) -> torch.Tensor:
        """What agents see, [..., N_b, O] float32; the column itself where all of it is own."""
        form = self.form
        if form.own == form.observation_dim:
            return self.columns["own"]
        seen = torch.empty(*self.leading, form.agents, form.observation_dim, device=self.device)
        for run in form.runs:
            self._expand(run, seen[..., run.columns])
        return seen

    def masks(self) -> torch.Tensor:
        """Which actions are allowed, [..., N_b, A] bool."""
        form = self.form
        if form.own_masks:
            return self.columns["masks"]
        if form.table is None:
            return torch.ones((), dtype=torch.bool, device=self.device).expand(
                *self.leading, form.agents, form.action_dim
            )
        return form.on(self.device, "table")[self.columns["codes"][..., form.mask_code].long()]

    def check(self, whose: str) -> None:
        """Raise ProtocolError (cause `bad_value`) for numbers that are not finite and codes out of range."""
        for name in ("own", "shared"):
            # A finite sum has finite terms, and costs a tenth of looking at each of them.
            column = self.columns.get(name)
            if column is not None and not torch.isfinite(column.sum()) and not torch.isfinite(column).all():
                raise ProtocolError("bad_value", f"{whose}: an observation is not finite")
        if "codes" in self.columns:
            codes = self.columns["codes"].flatten(0, -2)
            sizes = torch.tensor(self.form.code_sizes)
            if len(codes) and bool(((codes.amin(0) < 0) | (codes.amax(0) > sizes)).any()):
                limits = list(self.form.code_sizes)
                raise ProtocolError("bad_value", f"{whose}: codes must lie in 0..{limits}, each of its own")

    def _expand(self, run: Run, target: torch.Tensor) -> None:
        match run.kind:
            case "own" | "uint8" | "int16":
                target.copy_(self.columns[run.kind][..., run.stored])
            case "code":
                code = self.columns["codes"][..., run.source, None]
                target.copy_(code == torch.arange(run.width, device=self.device))
            case "constant":
                target.copy_(self.form.on(self.device, "constants")[:, run.stored])
            case "shared":
                shared = self.columns["shared"][..., None, run.stored]
                if run.masked:
                    torch.mul(shared, self.masks(), out=target)
                else:
                    target.copy_(shared)


@lru_cache(maxsize=64)
def forms(spec: EnvironmentSpec) -> tuple[Form, ...]:
    """How the agents of each block of an environment observe."""
    return tuple(Form.of(spec, types) for types in spec.blocks)


def compacted(
    plain: EnvironmentSpec, described: EnvironmentSpec, observations: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> tuple[EnvironmentSpec, list[dict[str, np.ndarray]]] | None:
    """Expanded arrays [rows, X_m, …] of each type of a `plain` spec, as columns of each block of a spec that says what
    observations are made of, and that spec, with the counts and the name of `plain`; None if a number would change.

    What a masked part holds where nobody sees it is lost, as nobody knows it. Tables of allowed actions are those of
    the rows; of values that no row has, those of `described`.
    """
    types = tuple(replace(t, count=p.count) for t, p in zip(described.types, plain.types, strict=True))
    spec = replace(described, name=plain.name, changes=plain.changes, types=types, episode_length=plain.episode_length)
    tables = {name: list(table) for name, table in spec.tables}
    found = []
    for form, block in zip(forms(spec), spec.blocks, strict=True):
        seen, allowed = (np.concatenate([arrays[m] for m in block], axis=1) for arrays in (observations, masks))
        columns = compact(form, seen, allowed)
        found.append(columns)
        if form.table is not None:
            code, size = columns["codes"][..., form.mask_code], form.code_sizes[form.mask_code]
            # The first row with a value speaks for all of them: whether it may shows below, where all are expanded.
            for value in np.unique(code[code < size]).tolist():
                tables[spec.types[block[0]].mask][value] = tuple(np.flatnonzero(allowed[code == value][0]).tolist())
    try:
        spec = replace(spec, tables=tuple((name, tuple(table)) for name, table in tables.items()))
    except InputError:  # a row that allows nothing
        return None
    for form, block, columns in zip(forms(spec), spec.blocks, found, strict=True):
        again = Observations.of_arrays(form, columns)
        expected = (np.concatenate([arrays[m] for m in block], axis=1) for arrays in (observations, masks))
        if not all(np.array_equal(a.numpy(), b) for a, b in zip((again.dense(), again.masks()), expected, strict=True)):
            return None
    return spec, found


def compact(form: Form, seen: np.ndarray, allowed: np.ndarray) -> dict[str, np.ndarray]:
    """Columns from expanded observations [rows, N_b, O] and masks [rows, N_b, A]; right if these are as `form` says."""
    columns = {name: np.zeros(shape, dtype) for name, (dtype, shape) in form.table_of(len(seen)).items()}
    for run in form.runs:
        part = seen[..., run.columns]
        match run.kind:
            case "own" | "uint8" | "int16":
                with np.errstate(invalid="ignore"):  # what does not fit is found by whoever asked
                    columns[run.kind][..., run.stored] = part
            case "code":
                columns["codes"][..., run.source] = np.where(part.any(-1), part.argmax(-1), run.width)
            case "shared":
                there = np.where(allowed, part, -np.inf).max(axis=1) if run.masked else part[:, 0]
                columns["shared"][:, run.stored] = np.where(np.isfinite(there), there, 0)
    if form.own_masks:
        columns["masks"] = allowed
    return columns


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor, without copying it where torch may have it."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def integers(count: int) -> str:
    """The smallest dtype that holds 0..count−1, of those that torch can compare and gather."""
    return "uint8" if count <= 1 << 8 else "int16" if count <= 1 << 15 else "int32"


def _runs(kind: TypeSpec) -> tuple[tuple[Run, ...], dict[str, int]]:
    """The runs of an observation, and how many numbers of each kind there are."""
    if not kind.parts:
        width = kind.observation_dim
        return (Run("own", 0, width, 0),), dict.fromkeys(get_args(PartKind), 0) | {"own": width}
    runs, first = list[Run](), 0
    taken = dict.fromkeys(get_args(PartKind), 0)
    for (part_kind, masked, _), parts in groupby(kind.parts, _source):
        width = sum(part.width for part in parts)
        runs.append(Run(part_kind, first, first + width, taken[part_kind], masked))
        taken[part_kind] += 1 if part_kind == "code" else width
        first += width
    return tuple(runs), taken


def _source(part: Part) -> tuple[PartKind, bool, str]:
    """Equal for neighbours that make up one run."""
    return part.kind, part.masked, part.name.partition(".")[0] if part.kind == "code" else ""


def _constants(kind: TypeSpec) -> np.ndarray:
    return np.array([value for part in kind.parts for value in part.values], np.float32)
