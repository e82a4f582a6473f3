"""What a run will need on its card, said before anything is downloaded: from the model's configuration alone.

footprint.py counts; this file asks it what fits, and what to change where something does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table

from qriemann.config.settings import RunConfig
from qriemann.errors import InputError
from qriemann.memory.footprint import CONTEXT, GIB, Footprint, Load

CARDS_GIB = (8, 12, 16, 24, 32)

# Half the width of the band around the peak: what CPU runs were tested to keep to, and what an allocator's gaps are given.
_BAND = 0.10

_LENGTH_GRID, _MOST_ROWS = 128, 1024


@dataclass
class Plan:
    """What a run needs.

    Attributes:
        stored: (what, bytes) of everything that stays for the whole run.
        computed: the same for what comes and goes, at its peak.
        phase: when that peak is: "training", "evaluation" or "optimizer step".
        peak: stored + computed, in bytes; `low` and `high` are its error band, a share of what is not simply stored.
        vram_gib: the card, or None.
        longest: most tokens a row at this batch that fit the card; None without a card.
        largest_batch: most rows at this length that fit the card.
        remedy: the settings whose change makes it fit at the least cost; empty where it fits, or where nothing does.
        assumptions: what was not counted but assumed.
    """

    model: str
    load: Load
    accumulation: int
    stored: list[tuple[str, int]]
    computed: list[tuple[str, int]]
    phase: str
    vram_gib: float | None = None
    longest: int | None = None
    largest_batch: int | None = None
    remedy: dict[str, Any] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return sum(size for _, size in self.stored + self.computed)

    @property
    def low(self) -> int:
        return self.peak - self._band

    @property
    def high(self) -> int:
        return self.peak + self._band

    @property
    def _band(self) -> int:
        return round(_BAND * (sum(size for _, size in self.computed) + self.stored[-1][1]))

    @property
    def fits(self) -> bool:
        """Whether the upper end of the band is within the card."""
        return self.vram_gib is None or self.high <= self.vram_gib * GIB


def plan(config: RunConfig, vram_gib: float | None = None) -> Plan:
    """What the run of a configuration needs, and how it fits a card.

    Args:
        config: from `load_config`; it is planned for a GPU unless it sets use_cpu, whatever machine this is.
        vram_gib: memory of the card.

    Raises:
        InputError: for a model that cannot be planned, or a card that does not even hold what is stored.

    Cost: seconds, most of them for the search of what fits; memory for the Python objects alone.
    """
    if vram_gib is not None and not 0 < vram_gib < float("inf"):
        raise InputError(f"vram must be a size in GiB above 0, got {vram_gib:g}; write --vram 12")
    return _Search(config).plan(vram_gib)


def plan_cards(config: RunConfig) -> list[Plan]:
    """The plan for each of the usual card sizes that holds what is stored.

    Raises:
        InputError: as `plan`; if no such card does.
    """
    search = _Search(config)
    stored = sum(size for _, size in search.footprint.stored())
    cards = [card for card in CARDS_GIB if stored < card * GIB]
    return [search.plan(card) for card in cards or CARDS_GIB[-1:]]


class _Search:
    """What fits, asked of one run's footprint."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.footprint = config, Footprint(config)
        self.load = self.footprint.load

    def plan(self, vram_gib: float | None) -> Plan:
        footprint, stored = self.footprint, self.footprint.stored()
        total = sum(size for _, size in stored)
        if vram_gib is not None and total >= vram_gib * GIB:
            remedy = "take a smaller model or a larger card" if self.config.quantize else "set quantize: nf4"
            raise InputError(
                f"the card must hold more than what is stored, got {vram_gib:g} GiB for {footprint.name}, whose weights, "
                f"adapter and optimizer state take {total / GIB:.1f} GiB; {remedy}"
            )
        phase, parts = footprint.computed(self.load)
        computed = sorted(((name, size) for name, size in parts.items() if size), key=lambda row: -row[1])
        result = Plan(
            model=footprint.name,
            load=self.load,
            accumulation=self.config.sft.gradient_accumulation_steps,
            stored=stored,
            computed=computed,
            phase=phase,
            vram_gib=vram_gib,
            assumptions=self._assumptions(),
        )
        if vram_gib is not None:
            room = int((vram_gib * GIB - total - _BAND * stored[-1][1]) / (1 + _BAND))
            result.longest = self._longest(room, self.load)
            result.largest_batch = self._largest_batch(room, self.load)
            if not result.fits:
                result.remedy = self._remedy(vram_gib, room, phase, result.largest_batch)
        return result

    def _assumptions(self) -> list[str]:
        notes = [f"the allocator's gaps stay within the band, {_BAND:.0%} of what comes and goes"]
        if self.footprint.on_gpu:
            eager = self.footprint.attention == "eager"
            notes += [
                f"CUDA context and libraries: {CONTEXT / GIB:.1f} GiB; a desktop on the same card comes on top",
                f"attention: {'the matrix of tokens by tokens, kept' if eager else 'fused kernels'}",
                "no run on a GPU has confirmed these numbers; `qriemann check` measures on the card itself",
            ]
        if self.footprint.offloads_embeddings and (size := self.footprint.embedding_bytes):
            notes.append(f"the input embeddings take {size / GIB:.2f} GiB of host memory in place of the card's")
        if self.config.sft.activation_offloading:
            notes.append("activation_offloading is not counted: the run needs less")
        return notes

    def _longest(self, room: int, load: Load) -> int:
        limit = getattr(self.footprint.shape, "max_position_embeddings", None) or 2**17
        grid = min(_LENGTH_GRID, limit)
        return grid * _largest(limit // grid, room, lambda n: self._bytes(replace(load, length=n * grid)))

    def _largest_batch(self, room: int, load: Load) -> int:
        return _largest(_MOST_ROWS, room, lambda n: self._bytes(replace(load, batch=n)))

    def _bytes(self, load: Load) -> int:
        return self.footprint.computed(load)[1].total()

    def _remedy(self, vram_gib: float, room: int, phase: str, largest_batch: int) -> dict[str, Any]:
        """The first change that fits, from those that cost nothing but time to those that change what is learned."""
        load = self.load
        movable = 0 if self.footprint.offloads_embeddings else self.footprint.embedding_bytes
        if movable and self._bytes(load) <= room + int(movable / (1 + _BAND)):
            return {"offload_embeddings": True}
        if phase == "evaluation":
            rows = _largest(load.eval_batch, room, lambda n: self._bytes(replace(load, eval_batch=n)))
            if rows:
                return {"per_device_eval_batch_size": rows}
            load = replace(load, eval_batch=1)
        smaller_evaluation = {} if load == self.load else {"per_device_eval_batch_size": 1}
        if load != self.load:
            largest_batch = self._largest_batch(room, load)
        if largest_batch:
            return self._same_effective_batch(largest_batch) | smaller_evaluation
        load = replace(load, checkpointing=True)
        if most := self._largest_batch(room, load):
            return {"activation_checkpointing": True, **self._same_effective_batch(most), **smaller_evaluation}
        if self.config.quantize is None:
            quantized = replace(self.config, qriemann=replace(self.config.qriemann, quantize="nf4"))
            return {"quantize": "nf4", **_Search(quantized).plan(vram_gib).remedy}
        if movable:
            offloaded = replace(self.config, qriemann=replace(self.config.qriemann, offload_embeddings=True))
            if further := _Search(offloaded).plan(vram_gib).remedy:
                return {"offload_embeddings": True, **further}
        if longest := self._longest(room, replace(load, batch=1, eval_batch=1)):
            return {
                "activation_checkpointing": True,
                **self._same_effective_batch(1),
                "per_device_eval_batch_size": 1,
                "max_length": longest,
            }
        return {}

    def _same_effective_batch(self, most: int) -> dict[str, Any]:
        """As many rows as fit in a batch, and the accumulation that keeps the rows of a step."""
        effective = self.load.batch * self.config.sft.gradient_accumulation_steps
        rows = max(n for n in range(1, min(most, self.load.batch) + 1) if effective % n == 0)
        return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": effective // rows}


def describe(result: Plan) -> Table:
    """The plan as a table for a terminal."""
    load = result.load
    table = Table(
        title=f"{result.model}: batch {load.batch} x {load.length} tokens, checkpointing "
        f"{'on' if load.checkpointing else 'off'}",
        title_justify="left",
        caption="\n".join([*_verdict(result), *(f"assumed: {note}" for note in result.assumptions)]),
        caption_justify="left",
    )
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in result.stored:
        table.add_row(name, f"{size / GIB:.2f}")
    table.add_section()
    for name, size in result.computed:
        if size >= 0.005 * GIB:
            table.add_row(f"{result.phase}, at its peak: {name}", f"{size / GIB:.2f}")
    table.add_section()
    table.add_row("peak", f"{result.peak / GIB:.2f}", style="bold")
    table.add_row("between", f"{result.low / GIB:.2f} and {result.high / GIB:.2f}")
    return table


def describe_cards(results: list[Plan]) -> Table:
    """One row for each card."""
    table = Table(title=f"{results[0].model}: peak {results[0].peak / GIB:.1f} GiB", title_justify="left")
    for name in ("card", "fits", "longest row", "largest batch", "otherwise"):
        table.add_column(name, overflow="fold")
    for result in results:
        table.add_row(
            f"{result.vram_gib:g} GiB",
            "yes" if result.fits else "no",
            str(result.longest or "none"),
            str(result.largest_batch or "none"),
            "" if result.fits else _settings(result.remedy) or "nothing does",
        )
    return table


def _verdict(result: Plan) -> list[str]:
    if result.vram_gib is None:
        return []
    load = result.load
    lines = [
        f"{'fits' if result.fits else 'does not fit'} {result.vram_gib:g} GiB; at batch {load.batch} the longest row is "
        f"{result.longest or 'none'}, at {load.length} tokens the largest batch is {result.largest_batch or 'none'}"
    ]
    if not result.fits:
        lines.append(f"cheapest change that fits: {_settings(result.remedy) or 'none; take a smaller model'}")
    return lines


def _settings(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {str(value).lower()}" for key, value in changes.items())


def _largest(limit: int, room: int, size: Callable[[int], int]) -> int:
    """The largest n of 0..limit whose size, which grows with n, is within the room."""
    low, high, probe = 0, limit + 1, 1
    sizes = {0: 0}
    while high - low > 1:
        sizes[probe] = size(probe)
        low, high = (probe, high) if sizes[probe] <= room else (low, probe)
        # Sizes are nearly straight in n: the line through the last two that are known ends near the answer.
        other = high if high in sizes else max((n for n in sizes if n < low), default=0)
        slope = max((sizes[other] - sizes[low]) / (other - low), 1.0) if other != low else room
        probe = min(max(low + int((room - sizes[low]) / slope), low + 1), high - 1)
    return low
