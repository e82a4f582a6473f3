"""The layer's output, tangent blocks and input gradient against autograd on a dense Delta W in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qriemann import attach
from qriemann.geometry import FixedRankParameter
from qriemann.optim.methods import METHODS, resolve_options
from tests.models import (
    assert_blocks_match,
    dense_gradients,
    move_points,
    next_token_loss,
    relative,
    tiny_llama,
    token_batch,
    variants,
    with_lora,
)

# A chain of two to three float32 products of some 100 terms: 6e-8 sqrt(100) a product, with room for a network's depth.
FLOAT32_RTOL = 1e-5
# Unit roundoff 2^-9 on x V, on U, on the loss' gradient and on the result: four roundings, each at most 2^-9.
BFLOAT16_RTOL = 2**-7

TOKENS, ROWS, COLUMNS, RANK = (2, 5), 30, 20, 4


class One(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, *, bias: bool = False, kind: str = "linear") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Conv1D(ROWS, COLUMNS) if kind == "conv1d" else nn.Linear(COLUMNS, ROWS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Case:
    """One layer on the manifold at a random point, and the dense computation of the same."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        start: str = "zero",
        base: dict | None = None,
        core: float = 1.0,
        **options,
    ) -> None:
        settings = {"r": RANK, "lora_alpha": 6, "target_modules": ["layer"], **options}
        self.model: PeftModel = get_peft_model(One(**(base or {})).to(dtype), LoraConfig(**settings))
        (self.point,) = attach(self.model, start=start, seed=3)
        move_points([self.point])
        self.point.s.mul_(core)
        self.module = self.model.base_model.model.layer
        if settings.get("lora_bias"):
            nn.init.normal_(self.module.lora_B["default"].bias)
        rank, alpha = settings.get("rank_pattern", {}).get("layer", settings["r"]), settings["lora_alpha"]
        self.scaling = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(*TOKENS, COLUMNS, generator=generator).to(dtype).requires_grad_()
        self.c = torch.randn(*TOKENS, ROWS, generator=generator).to(dtype)
        self.mask = torch.ones(*TOKENS, COLUMNS, dtype=torch.float64)

    def drop(self, p: float, seed: int) -> None:
        """Reads the mask off what the layer answers, feature by feature, and seeds the layer to draw it once more."""
        rest = torch.zeros_like(self.x)
        with torch.no_grad():
            full = self.scaling * (
                self.point.point().dense() - (0 if self.point.offset is None else self.point.offset.dense())
            )
            for feature in range(COLUMNS):
                rest[..., feature] = 1
                torch.manual_seed(seed)
                answer = (self.model(rest) - self.module.get_base_layer()(rest)).double()
                rest[..., feature] = 0
                kept = answer @ full[:, feature] / full[:, feature].norm() ** 2
                self.mask[..., feature] = torch.where(kept > 0.5 / (1 - p), 1 / (1 - p), 0).to(kept.dtype)
                torch.testing.assert_close(kept, self.mask[..., feature].double(), rtol=0.03, atol=0.03)
        torch.manual_seed(seed)

    def dense(self, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """y, dL/dX and dL/dx."""
        base = self.module.get_base_layer()
        weight = base.weight.detach().double()
        weight = weight.mT if isinstance(base, Conv1D) else weight
        x = self.x.detach().double().requires_grad_()
        delta = self.point.point().dense().requires_grad_()
        frozen = 0 if self.point.offset is None else self.point.offset.dense()
        y = x @ weight.mT + self.scaling * (x * self.mask) @ (delta - frozen).mT
        for bias, factor in ((base.bias, 1), (self.module.lora_B["default"].bias, self.scaling)):
            if bias is not None:
                y = y + factor * bias.detach().double()
        loss(y).backward()
        return y.detach(), delta.grad, x.grad

    def loss(self, y: Tensor) -> Tensor:
        return (torch.sin(y) * self.c.to(y.dtype)).sum()

    def linear_loss(self, y: Tensor) -> Tensor:
        """Its gradient in y is c, to the bit, whatever y is rounded to."""
        return (y * self.c.to(y.dtype)).sum()


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "base bias": {"base": {"bias": True}},
    "lora_bias": {"base": {"bias": True}, "lora_bias": True},
    "offset": {"start": "offset"},
    "offset, rslora and biases": {"start": "offset", "use_rslora": True, "base": {"bias": True}, "lora_bias": True},
    "a zero core": {"core": 0.0},
    "rank one": {"r": 1},
    "r = min(m, n)": {"r": COLUMNS},
    "rank_pattern": {"r": 9, "rank_pattern": {"layer": 3}},
    "Conv1D, stored transposed": {"base": {"kind": "conv1d"}, "fan_in_fan_out": True},
}


def assert_matches(case: Case, y: Tensor, truth: tuple[Tensor, Tensor, Tensor], rtol: float) -> None:
    dense_y, g, grad_x = truth
    u, _, v = (part.double() for part in case.point.point())
    assert relative(y, dense_y) < rtol
    assert relative(case.point.u.grad, g @ v) < rtol
    assert relative(case.point.v_transposed.grad.mT, g.mT @ u) < rtol
    assert relative(case.x.grad, grad_x) < rtol


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, FLOAT32_RTOL), (torch.bfloat16, BFLOAT16_RTOL)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_gradients_are_the_tangent_blocks_of_the_dense_gradient(options, dtype, rtol):
    case = Case(dtype, **options)
    loss = case.loss if dtype == torch.float32 else case.linear_loss
    y = case.model(case.x)
    loss(y).backward()
    assert y.dtype == dtype
    assert case.point.u.grad.dtype == case.point.v_transposed.grad.dtype == torch.float32
    assert_matches(case, y, case.dense(loss), rtol)


def test_the_lora_bias_gets_its_partial_derivative():
    case = Case(base={"bias": True}, lora_bias=True)
    case.loss(case.model(case.x)).backward()
    y = case.dense(case.loss)[0].requires_grad_()
    case.loss(y).backward()
    expected = case.scaling * y.grad.sum((0, 1))
    assert relative(case.module.lora_B["default"].bias.grad, expected) < FLOAT32_RTOL


@pytest.mark.parametrize("start", ["zero", "offset"])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, FLOAT32_RTOL), (torch.bfloat16, BFLOAT16_RTOL)], ids=["float32", "bfloat16"]
)
def test_dropout_acts_on_the_adapters_input_alone(dtype, rtol, start):
    # A rate that 16 random bits hit exactly; others are off by less than 1e-5.
    case = Case(dtype, start, lora_dropout=0.375)
    loss = case.loss if dtype == torch.float32 else case.linear_loss
    case.drop(0.375, seed=5)
    y = case.model(case.x)
    loss(y).backward()
    # 200 draws of a coin of 0.375: five standard deviations are 0.17.
    assert abs((case.mask == 0).double().mean() - 0.375) < 0.17
    assert_matches(case, y, case.dense(loss), rtol)


def test_autocast_computes_in_its_dtype_and_leaves_float32_blocks():
    case = Case(base={"bias": True})
    # Values that autocast's own rounding leaves as they are, so that what is compared is the layer.
    case.x = case.x.detach().bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = case.model(case.x)
    case.linear_loss(y.float()).backward()
    assert y.dtype == torch.bfloat16
    assert case.point.u.grad.dtype == torch.float32
    assert_matches(case, y, case.dense(case.linear_loss), BFLOAT16_RTOL)


def kept_bytes(run: Callable[[], Tensor], own: nn.Module) -> int:
    """Bytes of the distinct storages that autograd keeps for backward, those of the model's own tensors aside."""
    held = {p.untyped_storage().data_ptr() for p in own.parameters()}
    held |= {s.data_ptr() for point in points_of(own) for s in (point.s.untyped_storage(),)}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = run()
        # While the graph lives: an address that was freed may be handed out again.
        total = sum(size for address, size in kept.items() if address not in held)
    assert result.requires_grad
    return total


def points_of(model: nn.Module) -> list[FixedRankParameter]:
    return [point for _, point in variants(model).values()]


class Wide(nn.Module):
    """Three layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self.layers)


def test_layers_that_read_one_input_keep_it_once_and_as_it_is():
    x = torch.randn(2, 64, 512, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    for dropout in (0.0, 0.1):
        config = LoraConfig(r=16, target_modules=["0", "1", "2"], lora_dropout=dropout)
        model = get_peft_model(Wide().to(torch.bfloat16), config)
        attach(model, start="offset", seed=0)
        # The input itself, and for each layer its products with the bases of the point and of the offset.
        products = 3 * x.shape[0] * x.shape[1] * 2 * 16 * x.element_size()
        assert kept_bytes(lambda model=model: model.train()(x), model) == x.untyped_storage().nbytes() + products


# Whole models.


def llama(
    start: str = "zero", *, bias: bool = False, **options
) -> tuple[nn.Module, PeftModel, list[FixedRankParameter]]:
    reference = tiny_llama(bias=bias)
    model = with_lora(copy.deepcopy(reference), **options)
    points = attach(model, start=start, seed=3)
    move_points(points, scale=0.1)
    return reference, model, points


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_redraws_the_same_dropout(reentrant):
    blocks = []
    for checkpointing in (False, True):
        _, model, points = llama(lora_dropout=0.3)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(11)
        next_token_loss(model, token_batch(), use_cache=False).backward()
        blocks.append([block for p in points for block in (p.u.grad, p.v_transposed.grad)])
    for plain, checkpointed in zip(*blocks, strict=True):
        # The same operations on the same numbers.
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("start", ["zero", "offset"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.on_manifold])
def test_after_each_step_checkpointed_microbatches_leave_the_dense_blocks(name, start, reentrant):
    reference, model, _ = llama(start, alpha_pattern={"down_proj": 3})
    optimizer = METHODS[name].optimizer(model, **resolve_options(name, {"lr": 0.1}))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    for step in range(3):
        batches = [token_batch(2 * step + microbatch) for microbatch in range(2)]
        for ids in batches:
            next_token_loss(model, ids, use_cache=False).backward()
        assert_blocks_match(model, dense_gradients(reference, model, batches), FLOAT32_RTOL)
        optimizer.step()
        optimizer.zero_grad()


def test_a_pass_in_eval_mode_leaves_the_backward_of_one_in_train_mode_as_it_was():
    blocks = []
    for evaluate in (False, True):
        case = Case(start="offset", lora_dropout=0.375)
        torch.manual_seed(5)
        y = case.model(case.x)
        if evaluate:
            with torch.no_grad():
                case.model.eval()(case.x)
        case.loss(y).backward()
        blocks.append(case.point.u.grad)
    assert torch.equal(*blocks)


def test_a_backward_whose_factors_are_gone_is_refused():
    case = Case()
    y = case.model(case.x)
    with torch.no_grad():
        case.point.u.mul_(2)
        case.model(case.x)
    with pytest.raises(RuntimeError, match="factors changed between"):
        case.loss(y).backward()


def test_the_outputs_of_the_base_can_be_views_or_rounded_otherwise():
    """The sum is made in the base's own output only where autograd lets a function do so."""
    for change in (lambda y: y.view_as(y), lambda y: y.double(), lambda y: y.mT.contiguous().mT, lambda y: y):
        case = Case()
        case.module.get_base_layer().register_forward_hook(lambda *found, change=change: change(found[-1]))
        y = case.model(case.x)
        case.loss(y).backward()
        assert_matches(case, y, case.dense(case.loss), FLOAT32_RTOL)


# The PEFT model stays a PEFT model.


@pytest.mark.parametrize("start", ["zero", "offset"])
def test_a_disabled_adapter_leaves_the_base_model(start):
    reference, model, _ = llama(start)
    ids = token_batch()
    with torch.no_grad():
        expected, adapted = reference(ids).logits, model(ids).logits
        with model.disable_adapter():
            # The base layers alone: the same kernels on the same weights.
            assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model(ids).logits, adapted)
    assert relative(adapted, expected) > 1e-2


@pytest.mark.parametrize("safe", [True, False])
def test_merging_into_a_transposed_weight_keeps_the_function_and_unmerging_restores_it(safe):
    case = Case(**CASES["Conv1D, stored transposed"])
    base = case.module.get_base_layer()
    weight = base.weight.detach().clone()
    with torch.no_grad():
        before = case.model(case.x)
        case.model.merge_adapter(safe_merge=safe)
        merged = case.model(case.x)
        assert relative(base.weight, weight) > 1e-2
        assert relative(merged, before) < FLOAT32_RTOL
        case.model.unmerge_adapter()
        assert relative(base.weight, weight) < 1e-6  # added and subtracted again in float32
        assert relative(case.model(case.x), before) < FLOAT32_RTOL


def test_rows_of_one_batch_can_use_the_adapter_or_not():
    reference, model, _ = llama("offset")
    model.eval()
    ids = token_batch(rows=3)
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["default", "__base__", "default"]).logits
        adapted, base = model(ids).logits, reference(ids).logits
    for row, expected in enumerate((adapted, base, adapted)):
        assert relative(mixed[row], expected[row]) < FLOAT32_RTOL
