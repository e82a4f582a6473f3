"""TRL's `SFTConfig` of a run: what somebody wrote, over this project's defaults, over TRL's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from typing import Any

import torch
from trl import SFTConfig

from qriemann.config.settings import FIXED, Settings
from qriemann.config.values import PUBLIC_TOKEN_KEYS, redact
from qriemann.distributed import refuse_sharding
from qriemann.errors import InputError
from qriemann.folder.private import hide_credentials

# What this project does itself. The trainer would send every save to the Hub, with training_args.bin and its own card, and
# write the token into that file in clear; the chat template is in place before the trainer sees the tokenizer.
_KEPT_BACK = ("push_to_hub", "hub_token", "chat_template_path")


def training_arguments(settings: Settings) -> SFTConfig:
    """The trainer's arguments, as far as they do not depend on the data.

    Raises:
        InputError: they disagree with each other, or name a package or file that does not exist.
    """
    # Before transformers reads the same variables, and looks for packages.
    refuse_sharding()
    written = {key: value for key, value in settings.trl.items() if key not in _KEPT_BACK}
    # YAML 1.1's words for false; transformers looks for a reporter of that name.
    if str(written.get("report_to")).lower() in ("off", "no", "false"):
        written["report_to"] = "none"
    own = {key: getattr(settings, key) for key in ("output_dir", "use_cpu", "trust_remote_code")}
    try:
        return SFTConfig(**{**_defaults(settings.written, use_cpu=settings.use_cpu), **written, **own})
    # Some values are read as the name of a file or a package.
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the training arguments do not go together: {reason:.300}") from error


def describe_settings(settings: Settings, args: SFTConfig) -> dict[str, Any]:
    """Every setting of a run as one flat JSON-ready mapping, credentials redacted; without TRL's keys that decide nothing."""
    own = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    del own["trl"], own["written"]
    # transformers masks every key that ends in "_token", vocabulary entries included.
    public = {key: getattr(args, key) for key in PUBLIC_TOKEN_KEYS if hasattr(args, key)}
    merged = {key: value for key, value in {**args.to_dict(), **public, **own}.items() if key not in FIXED}
    # A credential may be part of any other value: a name, say.
    return json.loads(hide_credentials(json.dumps(redact(merged))))


def _defaults(written: Collection[str], *, use_cpu: bool) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() and not use_cpu
    defaults: dict[str, Any] = {
        # TRL's default is bf16 everywhere; on a CPU that is slower and less exact than float32.
        "bf16": on_gpu and torch.cuda.is_bf16_supported(including_emulation=False),
        # Recomputing activations buys memory with time; a CPU run is short of time.
        "activation_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        # Every layer with an adapter takes part in every step; looking for others is a walk over the graph each step.
        "ddp_find_unused_parameters": False,
        # A hundred points on the loss curve whatever the length of the run, ten held-out losses and one at the start.
        "logging_steps": 0.01,
        "eval_strategy": "steps",
        "eval_steps": 0.1,
        "eval_on_start": True,
        # The default replaces a NaN loss by the last finite average, so nobody sees it.
        "logging_nan_inf_filter": False,
        # This project's display draws the progress.
        "disable_tqdm": True,
        "report_to": "none",
    }
    if "fp16" in written:
        del defaults["bf16"]
    if "eval_strategy" in written:
        del defaults["eval_steps"]
    return defaults
