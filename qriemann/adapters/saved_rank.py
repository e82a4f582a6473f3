"""The rank in an adapter's saved configuration: twice that of the layers where a frozen offset is saved with the point."""

import copy
import logging
from typing import Any

from torch import nn

from qriemann.adapters.layer import FixedRankVariant
from qriemann.distributed import is_main_process
from qriemann.geometry.parameter import FixedRankParameter

logger = logging.getLogger(__name__)


def describe_saved_rank(model: nn.Module, points: list[FixedRankParameter]) -> None:
    """Doubles r and lora_alpha in the saved config of each adapter whose `points` have an offset, and only there."""
    own = {id(point) for point in points}
    for owner in config_owners(model):
        with_offset: dict[str, bool] = {}
        for module in owner.modules():
            for adapter, variant in getattr(module, "lora_variant", {}).items():
                if adapter in owner.peft_config and isinstance(variant, FixedRankVariant) and id(variant.point) in own:
                    with_offset[adapter] = with_offset.get(adapter, False) or variant.point.offset is not None
        for adapter, doubled in with_offset.items():
            _set_saved_rank(owner, adapter, doubled=doubled)


def config_owners(model: nn.Module) -> list[Any]:
    """The modules whose `peft_config` is saved: a PeftModel's base, or a model that an adapter was injected into."""
    # A PeftModel, its tuner and its base share one dict; the base is the last of them, whichever module `model` is.
    owners = {id(m.peft_config): m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)}
    return list(owners.values())


def _set_saved_rank(owner: Any, adapter: str, *, doubled: bool) -> None:
    # By adapter: the config with twice the rank, and the one that it replaces.
    kept = owner.__dict__.setdefault("_qriemann_doubled_configs", {})
    config = owner.peft_config[adapter]
    is_doubled = adapter in kept and kept[adapter][0] is config
    if doubled and not is_doubled:
        # A copy: the user may build more models from this LoraConfig, and other adapters may share it (DPO's reference).
        twice = copy.deepcopy(config)
        twice.r, twice.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        twice.rank_pattern = {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()}
        twice.alpha_pattern = {key: 2 * alpha for key, alpha in (config.alpha_pattern or {}).items()}
        kept[adapter], owner.peft_config[adapter] = (twice, config), twice
        if is_main_process():
            logger.warning(
                "the adapter %r will be saved with r = %d, a point of r = %d and its offset; qriemann.truncate_ or "
                "`qriemann export --rank` lowers it after training, and start='zero' has no offset",
                adapter,
                twice.r,
                config.r,
            )
    elif is_doubled and not doubled:
        owner.peft_config[adapter] = kept.pop(adapter)[1]


def forget_own_rank(model: nn.Module, adapters: set[str]) -> None:
    """Keeps the doubled rank in the configuration of adapters whose layers now have it."""
    for owner in config_owners(model):
        for adapter in adapters:
            vars(owner).get("_qriemann_doubled_configs", {}).pop(adapter, None)
