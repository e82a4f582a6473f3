"""TRL's `SFTConfig` of a run: what somebody wrote, over this project's defaults, over TRL's."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SaveStrategy, SchedulerType
from trl import SFTConfig

from qriemann.config.settings import FIXED, Settings
from qriemann.device import compute_dtype, prefer_expandable_segments
from qriemann.distributed import refuse_sharding
from qriemann.errors import InputError, MissingExtraError
from qriemann.folder.private import PUBLIC_TOKEN_KEYS, hide_credentials, redact

# What this project does itself. The trainer would send every save to the Hub, with training_args.bin and its own card, and
# write the token into that file in clear; the chat template is in place before the trainer sees the tokenizer.
_KEPT_BACK = ("push_to_hub", "hub_token", "chat_template_path")
# What an evaluation measures that a model can be chosen by.
_METRICS = ("loss", "entropy", "mean_token_accuracy")
# Trackers that transformers detects by more than their package.
_UNLISTED = ("azure_ml", "flyte", "kubeflow")


def training_arguments(settings: Settings) -> SFTConfig:
    """The trainer's arguments, as far as they do not depend on the data."""
    # Before transformers reads the same variables, and looks for packages.
    refuse_sharding()
    written = {key: value for key, value in settings.trl.items() if key not in _KEPT_BACK}
    # YAML 1.1's words for false; transformers looks for a reporter of that name.
    if str(written.get("report_to")).lower() in ("off", "no", "false"):
        written["report_to"] = "none"
    if settings.measures_rate:
        written.pop("learning_rate", None)
    own = {key: getattr(settings, key) for key in ("output_dir", "use_cpu", "trust_remote_code")}
    try:
        args = SFTConfig(**{**_defaults(settings, written), **written, **own})
    # Some values are read as the name of a file or a package.
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the training arguments do not go together: {reason:.300}") from error
    _check_packages(args)
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in _METRICS:
        raise InputError(f"metric_for_best_model must be one of {', '.join(_METRICS)}, got {metric!r}")
    return args


def check_schedule(args: SFTConfig, rate: float) -> None:
    """Raises InputError where lr_scheduler_type and lr_scheduler_kwargs make no schedule of the rate."""
    steps = args.max_steps if args.max_steps > 0 else 1000
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1)], lr=rate),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"lr_scheduler_type {args.lr_scheduler_type.value} cannot use lr_scheduler_kwargs {args.lr_scheduler_kwargs}: "
            f"{reason:.300}"
        ) from error


def idle_without_rows(args: SFTConfig) -> str | None:
    """A line about the settings that go by held-out losses, for a run without held-out rows; None without any."""
    idle = {
        "load_best_model_at_end": args.load_best_model_at_end,
        "save_strategy best": args.save_strategy == SaveStrategy.BEST,
        f"lr_scheduler_type {args.lr_scheduler_type.value}": args.lr_scheduler_type
        in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY),
    }
    names = [name for name, chosen in idle.items() if chosen]
    if not names:
        return None
    return (
        f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} no effect without held-out rows, and the last step is "
        "kept; set eval_size, dataset_test_split or dataset_eval_name to hold some out"
    )


def _check_packages(args: SFTConfig) -> None:
    """Raises InputError for a tracker that does not exist, and for a package that is not installed."""
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"report_to must be none, all or among {', '.join(INTEGRATION_TO_CALLBACK)}, got {name!r}")
        if name not in (*get_available_reporting_integrations(), *_UNLISTED):
            package = name.replace("_", "-")
            raise MissingExtraError(f"report_to {name} needs {package}; pip install {package}, or set report_to: none")
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise MissingExtraError("use_liger_kernel needs liger-kernel; pip install liger-kernel, or leave the key out")


def describe_settings(settings: Settings, args: SFTConfig) -> dict[str, Any]:
    """Every setting of a run as one flat JSON-ready mapping, credentials redacted; without TRL's keys that decide nothing."""
    own = {item.name: getattr(settings, item.name) for item in dataclasses.fields(settings)}
    del own["trl"], own["written"]
    # transformers masks every key that ends in "_token", vocabulary entries included.
    public = {key: getattr(args, key) for key in PUBLIC_TOKEN_KEYS if hasattr(args, key)}
    if settings.measures_rate:
        own["learning_rate"] = "auto"
    merged = {key: value for key, value in {**args.to_dict(), **public, **own}.items() if key not in FIXED}
    # A credential may be part of any other value: a name, say.
    return json.loads(hide_credentials(json.dumps(redact(merged))))


def run_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype that a run's model computes in on the device."""
    fp16 = settings.trl.get("fp16") and device.type == "cuda"
    return compute_dtype(device, settings.dtype or ("float16" if fp16 else None))


def _defaults(settings: Settings, written: Mapping[str, Any]) -> dict[str, Any]:
    prefer_expandable_segments()
    on_gpu = torch.cuda.is_available() and not settings.use_cpu
    dtype = run_dtype(settings, torch.device("cuda" if on_gpu else "cpu"))
    defaults: dict[str, Any] = {
        # TRL's default is bf16 everywhere; on a CPU that is slower and less exact than float32.
        "bf16": on_gpu and dtype == torch.bfloat16,
        "fp16": on_gpu and dtype == torch.float16,
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
    for key, other in (("fp16", "bf16"), ("bf16", "fp16")):
        if key in written:
            defaults.pop(other)
    if "eval_strategy" in written:
        del defaults["eval_steps"]
    strategy = written.get("eval_strategy", "steps")
    if written.get("load_best_model_at_end") and strategy != "no" and not {"save_strategy", "save_steps"} & {*written}:
        # The trainer chooses among what is saved. Without eval_steps, it evaluates at every log.
        known = {**defaults, **written}
        defaults |= {"save_strategy": strategy, "save_steps": known.get("eval_steps", known["logging_steps"])}
    return defaults
