"""A saved LoRA adapter, trained by any tool: what it adds to each weight of its base.

Every command that puts an adapter on its base reads it here; `saved_tensors` and `saved_config` say what is refused.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qriemann.adapters.saved_config import CONFIG, check_config
from qriemann.adapters.saved_tensors import Content, adapter_folder, name_in_base, read_content
from qriemann.base.checks import load_tokenizer
from qriemann.errors import InputError, first_line
from qriemann.upstream import quiet

_OTHER_BASE = "name the base that the adapter was trained on with --base"


@dataclass(frozen=True)
class SavedAdapter(Content):
    """The content of an adapter's folder, with its configuration."""

    folder: Path
    config: LoraConfig

    def replacement(self, name: str, stored: Tensor) -> Tensor:
        """The trained value of a tensor of the base; `stored` itself where it was not trained."""
        tensor = self.replaced.get(name, stored)
        if name in self.rows:
            indices, values = self.rows[name]
            tensor = tensor.index_copy(0, torch.tensor(indices, device=tensor.device), values.to(tensor))
        return tensor

    def grow_vocabulary(self, model: PreTrainedModel) -> str | None:
        """Gives the base the rows for added tokens that the adapter's embeddings have; a line about it, or None."""
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        name, own_head = names[id(embeddings)], names.get(id(head))
        if own_head in self.replaced and head.weight is embeddings.weight and not self.config.modules_to_save:
            # PEFT loads it into the one tensor of the two.
            self.replaced.setdefault(name, self.replaced[own_head])
        before, trained = embeddings.weight.shape, self.replaced.get(name)
        if trained is None or trained.shape[1:] != before[1:] or trained.shape[0] <= before[0]:
            return None
        model.resize_token_embeddings(trained.shape[0], mean_resizing=False)
        return f"the adapter has {trained.shape[0] - before[0]} tokens more than the base, which gets their embeddings"

    def base(self, override: str | None) -> str:
        """The base to load: `override`, or the one that the configuration names."""
        name = override or self.config.base_model_name_or_path
        if not name:
            raise InputError(f"{self.folder / CONFIG} names no base model; name it with --base")
        return name

    def put_on(self, model: PreTrainedModel, base: str) -> PeftModel:
        """The model with the adapter, in eval mode, computed by PEFT."""
        self.grow_vocabulary(model)
        ends = {id(layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
        ends_named = {f"{name}.weight" for name, module in model.named_modules() if id(module) in ends}
        config = copy.copy(self.config)
        # The trained factors replace whatever a start would draw or compute.
        config.init_lora_weights = True
        try:
            with quiet():
                peft = PeftModel.from_pretrained(model, str(self.folder), config=config).eval()
        except (RuntimeError, ValueError, OSError, LookupError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise InputError(
                f"{self.folder} does not fit {base}: {' '.join(lines[:2]).rstrip('.')}; {_OTHER_BASE}"
            ) from error
        # PEFT ignores tensors that are missing or additional. It saves embeddings and head where the vocabulary has grown.
        asked = get_peft_model_state_dict(peft, save_embedding_layers=False).keys()
        added = {key for key in self.keys - asked if name_in_base(key) not in ends_named}
        if differing := sorted(asked - self.keys) or sorted(added):
            got = "none for" if differing[0] in asked else "also"
            raise InputError(
                f"{self.folder} must hold the tensors that its {CONFIG} asks for in {base}, got {got} {differing[0]}; "
                f"copy it again, or {_OTHER_BASE}"
            )
        return peft


def read_adapter(path: str | os.PathLike[str], command: str = "merge") -> SavedAdapter:
    """The plain LoRA adapter in a folder, in float32.

    Args:
        path: the folder, or the `adapter_model.bin` in it: a pickle is read only when it is named, by an unpickler that makes
            tensors and nothing else.
        command: that reads it, one of `saved_config.COMMANDS`.

    Raises:
        InputError: there is no adapter, or it is of a kind that the command does not read; the message says why.
    """
    path, folder = Path(path).expanduser(), adapter_folder(path)
    content = read_content(path, check_config(folder, command))
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT does not check the types of most values.
        raise InputError(f"PEFT cannot read {folder / CONFIG}: {first_line(error)}; check the file") from error
    return SavedAdapter(**vars(content), folder=folder, config=config)


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the adapter, which has the template and end token of the training; None without one."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        # Without the argument transformers asks at the terminal whether to run code that tokenizer_config.json names.
        return load_tokenizer(str(folder), trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # Broken files make transformers raise exceptions of any type.
        raise InputError(
            f"{folder}: the tokenizer cannot be loaded: {first_line(error)}; without tokenizer_config.json the base's is used"
        ) from error
