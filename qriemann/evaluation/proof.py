"""The proof that what was written is what was trained.

Two independent looks at the files. Weights: each tensor read back must be the base's plus what PEFT says the adapter adds,
rounded as the files are. Behaviour: a fresh process loads the folder with transformers alone, and its next-token
distributions are compared with those that the 4-bit base with the adapter gave before.

The first finds any damage, however small its effect. The second says what it costs to leave the base that the adapter was
trained on, which no check of weights can: quantization moved that base by more than many an adapter does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from qriemann.evaluation import reload
from qriemann.evaluation.reload import Differences, Row
from qriemann.evaluation.rows import Rows
from qriemann.release.trained import Trained

# Largest relative difference of a tensor that only rounding explains. Measured on the embedded model: 1e-7 at float32; at
# half precision and in 4 bit a float32 sum taken in another order moves a few weights to the neighbouring value.
_WEIGHT_RTOL = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 1e-4, "nf4": 1e-3}


@dataclass(frozen=True)
class Verdict:
    """What the proof of one folder found.

    Attributes:
        found: the comparison with the trained model; None if the weights are wrong or the folder did not load.
        weights: the largest relative difference of a tensor from base plus adapter, and that tensor's name.
        reasons: why it is rejected; empty if it is accepted.
    """

    into: str
    dtype: str
    max_kl: float
    found: Differences | None
    weights: tuple[float, str]
    reasons: list[str]

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "into": self.into,
            "dtype": self.dtype,
            "accepted": self.accepted,
            "reasons": self.reasons,
            "max_kl": self.max_kl,
            "weights": {"largest_relative_difference": self.weights[0], "tensor": self.weights[1]},
            **(self.found or {}),
        }


@dataclass(frozen=True)
class Recording:
    """Logits of the trained model on the rows, in a file, and how far the untrained base is from them."""

    path: Path
    rows: list[Row]
    untrained: Differences


def record(trained: Trained, rows: Rows, path: Path) -> Recording:
    """Writes the trained model's logits to the file."""
    save_file(
        {str(index): logits.contiguous() for index, logits in reload.logits_of_rows(trained.peft, rows.rows)}, path
    )
    with trained.untrained() as model:
        return Recording(path, rows.rows, reload.differences(model, rows.rows, path))


def worst_weight(
    expected: Callable[[str], Tensor], names: Mapping[str, Any], read: Callable[[str], Tensor | None]
) -> tuple[float, str]:
    """The largest relative Frobenius difference of a tensor that was read back, and its name; infinite if one is missing.

    Args:
        expected: what the tensor of a name should be, in the precision of the files.
        names: of all tensors.
        read: the tensor as it is in the files; None if it is not there.
    """
    worst = (0.0, next(iter(names)))
    for name in names:
        right, found = expected(name).float(), read(name)
        if found is None or found.shape != right.shape:
            return float("inf"), name
        difference = (found.float() - right).norm().item() / max(right.norm().item(), 1e-30)
        # Written so that a NaN counts as the worst.
        if not difference <= worst[0]:
            worst = (difference, name)
    return worst


@dataclass(frozen=True)
class Written:
    """A folder to be judged.

    Attributes:
        into, dtype: what it holds.
        weights: from `worst_weight`.
        max_kl: largest mean KL to the trained model, nats a token.
    """

    folder: Path
    into: str
    dtype: str
    weights: tuple[float, str]
    max_kl: float

    @property
    def weights_bound(self) -> float:
        """Of the relative difference of a tensor."""
        return _WEIGHT_RTOL["nf4" if self.into == "nf4" else self.dtype]

    @property
    def weights_are_right(self) -> bool:
        return self.weights[0] <= self.weights_bound


def judge(written: list[Written], recording: Recording) -> list[Verdict]:
    """The verdict on each folder; those whose weights are right are loaded in a fresh process."""
    found = iter(_reload([one for one in written if one.weights_are_right], recording))
    return [_verdict(one, next(found) if one.weights_are_right else None) for one in written]


def _verdict(written: Written, found: dict[str, Any] | None) -> Verdict:
    difference, tensor = written.weights
    reasons = []
    if found is None:
        reasons = [
            f"{tensor} is not the base's plus the adapter's: relative difference {difference:.1e}, above "
            f"{written.weights_bound:.0e}"
        ]
    elif "failure" in found:
        reasons, found = [found["failure"]], None
    elif not found["mean_kl"] <= written.max_kl:
        reasons = [f"mean KL to the trained model is {found['mean_kl']:.2e} nats a token, above {written.max_kl:.0e}"]
    return Verdict(written.into, written.dtype, written.max_kl, found, written.weights, reasons)  # type: ignore[arg-type]


def _reload(written: list[Written], recording: Recording) -> list[dict[str, Any]]:
    """What a fresh process finds in each folder."""
    if not written:
        return []
    request, result = recording.path.with_name("request.json"), recording.path.with_name("result.json")
    content = {
        "models": [(str(one.folder.resolve()), _compute_dtype(one.folder)) for one in written],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "rows": recording.rows,
        "recorded": str(recording.path),
        "result": str(result),
    }
    request.write_text(json.dumps(content), "utf-8")
    # -P: the script's own folder, which is inside this package, is not where the process looks for modules.
    done = subprocess.run(
        [sys.executable, "-P", reload.__file__, str(request)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        # Killed for memory, most likely: the script reports what is wrong with a folder.
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else "no message"
        return [{"failure": f"the fresh process ended with status {done.returncode}: {why}"}] * len(written)
    return json.loads(result.read_text("utf-8"))


def _compute_dtype(folder: Path) -> str:
    """float32, or half of it where that does not fit into memory."""
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    dtype = json.loads((folder / "config.json").read_text("utf-8")).get("dtype", "float32")
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    # Twice the files for half precision; 4-bit weights stay as they are. A third for logits and activations.
    return dtype if dtype != "float32" and 2 * stored > free * 2 / 3 else "float32"
