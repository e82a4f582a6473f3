"""`export`: a smaller plain adapter, the best approximation of each layer's change at a lower rank."""

import copy
import math
import tempfile
from pathlib import Path

from peft import LoraConfig
from peft.utils import load_peft_weights
from rich.console import Console
from safetensors.torch import save_file

from qriemann.adapters.saved import read_adapter
from qriemann.adapters.saved_tensors import LoraFactors
from qriemann.adapters.spectrum import factored_svd
from qriemann.errors import InputError
from qriemann.evaluation import proof, reload
from qriemann.folder.files import check_output
from qriemann.folder.records import TRAINED_ON, recorded_base, write_json
from qriemann.release.atomic_folder import Released, move_into_place, written_or_nothing
from qriemann.upstream import quiet

REPORT = "export_report.json"

# Accepted by default: a tenth of the divergence between the untrained base and the trained model, or what float32 rounds.
_KL_SHARE, _KL_FLOOR = 0.1, 1e-5


def truncate(layer: LoraFactors, rank: int) -> tuple[LoraFactors, float, float]:
    """The best approximation of scaling B A at the rank, and the Frobenius norms of what is lost and of the whole.

    The scaling goes into the factors, which are balanced: B^T B = A A^T.

    Cost: O((m + n) r^2); scaling B A itself is never formed.
    """
    u, sigma, v = factored_svd(layer.scaling * layer.b.double(), layer.a)
    b, a = ((factor[:, :rank] * sigma[:rank].sqrt()).float() for factor in (u, v))
    bias = None if layer.bias is None else layer.scaling * layer.bias
    return LoraFactors(b, a.mT, 1.0, bias), math.hypot(*sigma[rank:]), math.hypot(*sigma)


def export(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int,
    base: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    data: str | None = None,
    max_kl: float | None = None,
    console: Console | None = None,
) -> Released:
    """Writes the adapter at a lower rank and compares it with the whole one on the base of training.

    Args:
        adapter: a folder with a plain LoRA adapter.
        out: a folder that is empty or does not exist.
        rank: of every layer that has more.
        base, revision, quantize, data, console: as in `merge`.
        max_kl: largest mean KL to the whole adapter that is accepted, nats a token; None is a tenth of the untrained
            base's.

    Raises:
        InputError: as in `merge`, or for a rank below 1 or not below the adapter's.
    """
    console = console or Console(quiet=True)
    out = Path(out).expanduser()
    check_output(out)
    saved = read_adapter(adapter, "export")
    largest = max(layer.a.shape[0] for layer in saved.layers.values())
    if not 1 <= rank < largest:
        raise InputError(f"rank must be from 1 to {largest - 1}, below the adapter's {largest}, got {rank}")
    if max_kl is not None and not max_kl >= 0:
        raise InputError(f"max_kl must be a number of nats >= 0, got {max_kl}")
    truncated = {name: truncate(layer, rank) for name, layer in saved.layers.items()}
    lost = {name: error / max(norm, 1e-30) for name, (_, error, norm) in truncated.items()}
    total = math.sqrt(
        sum(e**2 for _, e, _ in truncated.values()) / max(sum(n**2 for *_, n in truncated.values()), 1e-60)
    )
    worst = max(lost, key=lambda name: lost[name])
    console.print(
        f"Rank {rank} instead of {largest}: the change of the weights loses {total:.2%} of its norm, at most "
        f"{lost[worst]:.2%} in a layer ({worst})",
        highlight=False,
    )

    with quiet(), written_or_nothing(out) as partial:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            path = Path(scratch) / "recorded.safetensors"
            trained, rows, recording = proof.load_and_record(saved, base, revision, quantize, data, path, console)
            _write(partial, saved.folder, _config(saved.config, truncated, rank), truncated)
            if recorded := recorded_base(saved.folder):
                write_json(partial / TRAINED_ON, recorded)
            trained.tokenizer.save_pretrained(partial)
            # From the files just written, by PEFT.
            smaller = read_adapter(partial, "export").put_on(trained.peft.unload(), trained.base)
            found = reload.differences(smaller, rows.rows, recording.path)
        bound = max(_KL_FLOOR, _KL_SHARE * recording.untrained["mean_kl"]) if max_kl is None else max_kl
        candidate = proof.Candidate(partial, f"rank {rank}", "float32", (total, "all layers"), bound)
        verdict = proof.Verdict(candidate, found, proof.far_from_trained(found, bound, "the whole adapter"))
        content = {
            **proof.describe(trained, rows, recording.untrained),
            "merged": [verdict.as_dict()],
            "relative_error": {"total": total, "layers": lost},
            "accepted": verdict.accepted,
        }
        write_json(partial / REPORT, content)
        folder = move_into_place(partial, out, accepted=verdict.accepted)
    console.print(proof.table(content))
    for reason in verdict.reasons:
        console.print(f"rejected: {reason}; a higher --rank loses less", highlight=False)
    return Released(folder, verdict.accepted, [verdict], content)


def _config(config: LoraConfig, truncated: dict[str, tuple[LoraFactors, float, float]], rank: int) -> LoraConfig:
    """alpha = r everywhere, because the scaling is in the factors; layers that had a lower rank keep it."""
    lower = {name: layer.a.shape[0] for name, (layer, *_) in truncated.items() if layer.a.shape[0] < rank}
    config = copy.deepcopy(config)
    config.r, config.lora_alpha, config.use_rslora = rank, rank, False
    config.rank_pattern, config.alpha_pattern = dict(lower), dict(lower)
    return config


def _write(
    folder: Path, source: Path, config: LoraConfig, truncated: dict[str, tuple[LoraFactors, float, float]]
) -> None:
    tensors = load_peft_weights(str(source), device="cpu")
    for name, (layer, *_) in truncated.items():
        for side, factor in (("A", layer.a), ("B", layer.b)):
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = factor
        if layer.bias is not None:
            tensors[f"base_model.model.{name}.lora_B.bias"] = layer.bias
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    config.inference_mode = True
    config.save_pretrained(str(folder))
