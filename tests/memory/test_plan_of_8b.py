"""The plan of an 8B model against torch's own accounting of the same step, on fake tensors.

What the plan replaces by stand-ins runs here as it is: bitsandbytes' products with 4-bit weights and torch's attention. TRL's
loss is the plan's, because its kernels need a card. The fake tensors lie on the CPU: with fake CUDA tensors autograd asks for
the device's guard, and a CPU build of torch aborts.
"""

from unittest.mock import MagicMock

import pytest
import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from qriemann.config import settings_from
from qriemann.memory.footprint import _set_checkpointing, read_run
from qriemann.memory.meta_step import QuantizedLinear, _TiledLogProb
from qriemann.memory.plan import plan
from tests.recipes.test_cards import PUBLISHED


class FourBitLinear(nn.Linear):
    """A layer whose weight is packed as bitsandbytes packs it."""

    def pack(self):
        rows, columns = self.weight.shape
        blocks = rows * columns // 64
        scales = QuantState(torch.empty(blocks // 256), code=torch.empty(256), blocksize=256, dtype=torch.float32)
        self.state = QuantState(
            torch.empty(blocks, dtype=torch.uint8),
            shape=(rows, columns),
            code=torch.empty(16),
            blocksize=64,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=torch.empty(()),
            state2=scales,
        )
        self._parameters["weight"] = nn.Parameter(torch.empty(rows * columns // 2, 1, dtype=torch.uint8), False)

    def forward(self, x):
        # PEFT clones what a 4-bit layer returns.
        return matmul_4bit(x, self.weight.t(), quant_state=self.state).clone()

    def held(self):
        return [self.state.absmax, self.state.code, self.state.offset, self.state.state2.absmax, self.state.state2.code]


def empty(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def fill(model):
    """Gives every tensor of a model on the meta device a fake one in its place; returns what the model then holds."""
    held = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    made = empty(tensor)
                    table[name] = nn.Parameter(made, tensor.requires_grad) if table is module._parameters else made
        if isinstance(module, QuantizedLinear):
            module.__class__ = FourBitLinear
            module.pack()
            held += module.held()
    for module in model.modules():
        for variant in getattr(module, "lora_variant", {}).values():
            point = variant.point
            point.u, point.v_transposed = module.lora_B["default"].weight, module.lora_A["default"].weight
            point.s = empty(point.s)
            if point.offset is not None:
                point.offset = type(point.offset)(*(empty(t) for t in point.offset))
            # Torch counts no writes to fake tensors; as in a run, the operands are made once.
            point._versions = lambda: ((), ())
            held += [point.s, *(point.offset or ())]
    return [*held, *model.parameters(), *model.buffers()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "length", "checkpointing", "start"),
    [(8, 2048, True, "zero"), (2, 1024, False, "offset")],
)
def test_the_plan_of_8b_is_what_torch_counts(batch, length, checkpointing, start, tmp_path):
    PUBLISHED["meta-llama/Llama-3.1-8B-Instruct"].save_pretrained(tmp_path)
    settings = settings_from(
        {
            "model_name_or_path": str(tmp_path),
            "output_dir": str(tmp_path / "run"),
            "lora_r": 16,
            "lora_dropout": 0.0,
            "start": start,
            "max_length": length,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 1,
            "activation_checkpointing": checkpointing,
            "eval_strategy": "no",
        }
    )
    footprint, workload = read_run(settings)
    planned = footprint.computed(workload)[1].total()
    stored = sum(size for name, size in plan(settings).stored if "assumed" not in name and name != "optimizer state")
    model = footprint.model(workload)
    base = model.get_base_model()
    _set_checkpointing(model, checkpointing)
    base.config._attn_implementation = "sdpa"

    with FakeTensorMode():
        held = fill(model)
        tracker = MemTracker()
        # Its view of the modules, which expects that every parameter is trained.
        tracker._mod_tracker = MagicMock(is_bw=False)
        tracker.track_external(*held)
        before = total(tracker, "current")
        with tracker:
            ids = torch.empty(batch, length, dtype=torch.int64)
            # As rows of different lengths need it.
            mask = torch.empty(batch, 1, length, length, dtype=torch.bool)
            hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
            loss = _TiledLogProb.apply(flat, base.get_output_embeddings().weight, True).sum()
            del hidden, flat
            loss.backward()
    assert total(tracker, "peak") - before == pytest.approx(planned, rel=1e-3)
    assert before == pytest.approx(stored, rel=1e-3)


def total(tracker, when):
    (snapshot,) = tracker.get_tracker_snapshot(when).values()
    return snapshot["Total"]
