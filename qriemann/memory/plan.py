"""What a run needs on its card, what fits, and what to change if something does not; footprint.py counts the bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qriemann.errors import InputError
from qriemann.memory.footprint import Footprint, Workload, read_run
from qriemann.memory.live_bytes import CONTEXT, GIB

if TYPE_CHECKING:
    from qriemann.config import Settings

CARDS_GIB = (8, 12, 16, 24, 32)

# Half the width of the band around the peak: tests hold CPU runs to it, and it leaves room for an allocator's gaps.
_BAND = 0.10

_LENGTH_GRID, _MOST_ROWS = 128, 1024


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        stored: (what, bytes) of everything that stays for the whole run.
        computed: the same for what a step allocates, at its peak.
        phase: when that peak is: "training", "evaluation" or "optimizer step".
        left_out: a line about the experts of the model, which are neither quantized nor adapted.
        longest: most tokens a row that fit the card at this batch; None without a card.
        largest_batch: most rows that fit the card at this length.
        remedy: the settings to change so that it fits, at the least cost; empty if it fits, or if nothing helps.
    """

    model: str
    workload: Workload
    stored: list[tuple[str, int]]
    computed: list[tuple[str, int]]
    phase: str
    assumptions: list[str]
    left_out: str | None = None
    vram_gib: float | None = None
    longest: int | None = None
    largest_batch: int | None = None
    remedy: dict[str, Any] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes; `low` and `high` are its error band, a share of what is not simply stored."""
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


def plan(settings: Settings, vram_gib: float | None = None, *, dense_copies: bool = True) -> Plan:
    """What the run of a configuration needs, and how it fits a card.

    Args:
        settings: of the run; it is planned for a GPU unless it sets use_cpu, whatever machine this is.
        vram_gib: memory of the card.
        dense_copies: a run on a CPU holds its 4-bit weights dequantized as well, if `vram_gib` has room for them.

    Raises:
        InputError: for a model that cannot be planned, or a card that does not even hold what is stored.

    Cost: seconds, most of them to find what fits; no weights are loaded.
    """
    if vram_gib is not None and not 0 < vram_gib < float("inf"):
        raise InputError(f"vram must be a size in GiB above 0, got {vram_gib:g}; write --vram 12")
    footprint, workload = read_run(settings, dense_copies=dense_copies)
    result = _plan(footprint, workload)
    if vram_gib is None:
        return result
    if workload.holds_dense_copies and result.high > vram_gib * GIB:
        result = _plan(footprint, replace(workload, dense_copies=False))
    return _on_card(result, footprint, vram_gib)


def plan_cards(settings: Settings) -> list[Plan]:
    """The plan for each of the usual card sizes that holds what is stored."""
    footprint, workload = read_run(settings)
    result = _plan(footprint, workload)
    cards = [card for card in CARDS_GIB if sum(size for _, size in result.stored) < card * GIB]
    return [_on_card(result, footprint, card) for card in cards or CARDS_GIB[-1:]]


def _plan(footprint: Footprint, workload: Workload) -> Plan:
    phase, parts = footprint.computed(workload)
    computed = sorted(((name, size) for name, size in parts.items() if size), key=lambda row: -row[1])
    notes = [f"the allocator's gaps stay within the band, {_BAND:.0%} of what a step allocates"]
    if workload.on_gpu:
        kept = "the matrix of tokens by tokens is kept" if workload.attn_implementation == "eager" else "fused kernels"
        notes += [
            f"CUDA context and libraries: {CONTEXT / GIB:.1f} GiB; a desktop on the same card comes on top",
            f"attention: {kept}",
            "no run on a GPU has confirmed these numbers; `qriemann check` measures on the card itself",
        ]
        if workload.quantized:
            recorded, merged = (size / GIB for size in footprint.merge_bytes(workload))
            notes.append(
                f"merge: {recorded:.1f} GiB of weights to record the trained model and then {merged:.1f} GiB to prove the "
                "merged one, each on the card if it is free there, else on the CPU"
            )
    elif workload.quantized and not workload.dense_copies:
        notes.append("the 4-bit weights are not held dequantized as well: the run needs less and takes longer")
    if workload.offload_embeddings and (size := footprint.embedding_bytes(workload)):
        notes.append(f"the input embeddings take {size / GIB:.2f} GiB of host memory instead of the card's")
    if workload.activation_offloading:
        notes.append("activation_offloading is not counted: the run needs less")
    stored = footprint.stored(workload)
    return Plan(footprint.name, workload, stored, computed, phase, notes, footprint.left_out)


def _on_card(result: Plan, footprint: Footprint, vram_gib: float) -> Plan:
    """The plan with what fits a card, and what to change if it does not."""
    workload, stored = result.workload, sum(size for _, size in result.stored)
    if stored >= vram_gib * GIB:
        remedy = "take a smaller model or a larger card" if workload.quantized else "set quantize: nf4"
        raise InputError(
            f"{footprint.name} does not fit {vram_gib:g} GiB: its weights, adapter and optimizer state alone take "
            f"{stored / GIB:.1f} GiB; {remedy}"
        )
    card = _Card(footprint, vram_gib)
    result = replace(
        result,
        vram_gib=vram_gib,
        longest=card.longest(workload),
        largest_batch=card.most(_MOST_ROWS, workload, "per_device_train_batch_size"),
    )
    return result if result.fits else replace(result, remedy=card.remedy(workload))


class _Card:
    """Finds what fits one card."""

    def __init__(self, footprint: Footprint, vram_gib: float) -> None:
        self.footprint, self.bytes = footprint, vram_gib * GIB

    def room(self, workload: Workload) -> int:
        """Bytes that a step may allocate."""
        stored = self.footprint.stored(workload)
        return int((self.bytes - sum(size for _, size in stored) - _BAND * stored[-1][1]) / (1 + _BAND))

    def size(self, workload: Workload) -> int:
        return self.footprint.computed(workload)[1].total()

    def most(self, limit: int, workload: Workload, key: str, unit: int = 1) -> int:
        """The largest n of 0..limit for which the workload fits with n units of `key`."""

        def size(n: int) -> int:
            change: dict[str, Any] = {key: n * unit}
            return self.size(replace(workload, **change))

        return _largest(limit, self.room(workload), size)

    def longest(self, workload: Workload) -> int:
        limit = getattr(self.footprint.shape, "max_position_embeddings", None) or 2**17
        grid = min(_LENGTH_GRID, limit)
        return grid * self.most(limit // grid, workload, "max_length", grid)

    def remedy(self, workload: Workload) -> dict[str, Any]:
        """The first change that fits, from those that cost nothing but time to those that change what is learned."""
        offload: dict[str, Any] = {"offload_embeddings": True} if self.footprint.embedding_bytes(workload) else {}
        moved = replace(workload, **offload)
        if moved != workload and self.size(moved) <= self.room(moved):
            return offload
        steps: list[dict[str, Any]] = [{"quantize": "nf4"}, offload, {"activation_checkpointing": True}]
        options: list[tuple[dict[str, Any], ...]] = [
            ({}, step) for step in steps if any(getattr(workload, key) != value for key, value in step.items())
        ]
        changes: dict[str, Any] = {}
        for chosen in itertools.product(*options):
            changes = {key: value for step in chosen for key, value in step.items()}
            batches = self.smaller_batches(replace(workload, **changes))
            if batches is not None:
                return changes | batches
        changes |= _same_rows_a_step(workload, 1)
        if workload.per_device_eval_batch_size:
            changes["per_device_eval_batch_size"] = 1
        longest = self.longest(replace(workload, **changes))
        return {**changes, "max_length": longest} if longest else {}

    def smaller_batches(self, workload: Workload) -> dict[str, Any] | None:
        """The batch sizes that fit, as far as they must change; None if not even one row does."""
        changes: dict[str, Any] = {}
        if wanted := workload.per_device_eval_batch_size:
            one_row = replace(workload, per_device_train_batch_size=1)
            rows = self.most(wanted, one_row, "per_device_eval_batch_size")
            if not rows:
                return None
            if rows < wanted:
                changes = {"per_device_eval_batch_size": rows}
        wanted = workload.per_device_train_batch_size
        rows = self.most(wanted, replace(workload, **changes), "per_device_train_batch_size")
        if not rows:
            return None
        return changes if rows == wanted else _same_rows_a_step(workload, rows) | changes


def _same_rows_a_step(workload: Workload, most: int) -> dict[str, Any]:
    """The largest batch of at most `most` rows whose accumulation keeps the number of rows of a step."""
    rows_a_step = workload.per_device_train_batch_size * workload.gradient_accumulation_steps
    rows = max(n for n in range(1, most + 1) if rows_a_step % n == 0)
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": rows_a_step // rows}


def describe(result: Plan) -> Table:
    """The plan as a table for a terminal."""
    load = result.workload
    table = Table(
        title=f"{result.model}: batch {load.per_device_train_batch_size} x {load.max_length} tokens, checkpointing "
        f"{'on' if load.activation_checkpointing else 'off'}",
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
            "" if result.fits else _settings(result.remedy) or "nothing helps",
        )
    return table


def _verdict(result: Plan) -> list[str]:
    lines = [] if result.left_out is None else [result.left_out]
    if result.vram_gib is None:
        return lines
    load = result.workload
    lines += [
        f"{'fits' if result.fits else 'does not fit'} {result.vram_gib:g} GiB; at batch {load.per_device_train_batch_size} "
        f"the longest row is {result.longest or 'none'}, at {load.max_length} tokens the largest batch is "
        f"{result.largest_batch or 'none'}"
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
        # Sizes are nearly linear in n: the line through the last two known sizes ends near the answer.
        other = high if high in sizes else max((n for n in sizes if n < low), default=0)
        slope = max((sizes[other] - sizes[low]) / (other - low), 1.0) if other != low else room
        probe = min(max(low + int((room - sizes[low]) / slope), low + 1), high - 1)
    return low
