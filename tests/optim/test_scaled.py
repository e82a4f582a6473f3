"""Scaled GD and scaled AdamW against dense float64 computations of the same update."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qriemann
from qriemann.optim import AdamW, Muon, ScaledAdamW, ScaledGD
from tests.models import next_token_loss, relative, same_bits, take_steps, tiny_llama, token_batch, with_lora

# Factors are float32: 6e-8 relative each, over 50 steps, through Gram matrices of condition number under 100.
STEP_RTOL = 1e-5
SHAPES = [(30, 20, 4), (20, 30, 4), (30, 20, 4), (33, 17, 1), (16, 16, 16)]


class Adapter:
    """Factors of X = B A with a loss in X whose gradients are X - target + noise."""

    def __init__(self, m: int, n: int, rank: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.shape = (m, n)
        self.a = nn.Parameter(well_conditioned(self.randn(n, rank)).mT.float().contiguous())
        self.b = nn.Parameter(well_conditioned(self.randn(m, rank)).float())
        # Leans on the starting subspaces, so that no singular value of X passes through zero on the way.
        self.target = 3 * self.x + 0.1 * self.randn(m, n)

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def named(self, name: str = "layer") -> list[tuple[str, nn.Parameter]]:
        return [(f"{name}.lora_A.default.weight", self.a), (f"{name}.lora_B.default.weight", self.b)]

    @property
    def x(self) -> Tensor:
        return self.b.data.double() @ self.a.data.double()

    def gradient(self) -> Tensor:
        return self.x - self.target + 0.1 * self.randn(*self.shape)

    def set_gradient(self, g: Tensor) -> None:
        self.a.grad = (self.b.data.double().mT @ g).float()
        self.b.grad = (g @ self.a.data.double().mT).float()


def well_conditioned(x: Tensor) -> Tensor:
    """The same subspace, singular values from 1 to 2."""
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    return left * torch.linspace(1, 2, x.shape[1], dtype=x.dtype) @ right


class Dense:
    """The update in float64 with explicit inverses, from the formulas of arXiv 2402.02347; no code of the package."""

    def __init__(self, adapter: Adapter, damping: float, damping_form: str) -> None:
        self.a, self.b = adapter.a.data.double().clone(), adapter.b.data.double().clone()
        self.damping, self.form = damping, damping_form
        self.steps = 0
        self.moments = [[torch.zeros_like(f), torch.zeros_like(f)] for f in (self.a, self.b)]

    def preconditioned(self, g: Tensor) -> tuple[Tensor, Tensor]:
        grams = self.b.mT @ self.b, self.a @ self.a.mT
        eye = torch.eye(len(self.a), dtype=torch.float64)
        damped = [
            gram + self.damping * (torch.trace(gram) / len(gram) if self.form == "relative" else 1) * eye
            for gram in grams
        ]
        return torch.linalg.inv(damped[0]) @ (self.b.mT @ g), (g @ self.a.mT) @ torch.linalg.inv(damped[1])

    def gd(self, g: Tensor, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        moved = []
        for factor, direction, moments in zip((self.a, self.b), self.preconditioned(g), self.moments, strict=True):
            moments[0] = momentum * moments[0] + direction
            moved.append((1 - lr * weight_decay) * factor - lr * moments[0])
        self.a, self.b = moved

    def adamw(self, g: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.steps += 1
        moved = []
        # Both preconditioners are read before either factor moves; the other order would end 2e-2 away.
        for factor, direction, moments in zip((self.a, self.b), self.preconditioned(g), self.moments, strict=True):
            moments[0] = betas[0] * moments[0] + (1 - betas[0]) * direction
            moments[1] = betas[1] * moments[1] + (1 - betas[1]) * direction**2
            first, second = (m / (1 - beta**self.steps) for m, beta in zip(moments, betas, strict=True))
            moved.append((1 - lr * weight_decay) * factor - lr * first / (second.sqrt() + eps))
        self.a, self.b = moved


def assert_follows(adapters: list[Adapter], dense: list[Dense]) -> None:
    for adapter, truth in zip(adapters, dense, strict=True):
        assert relative(adapter.a.data, truth.a) < STEP_RTOL
        assert relative(adapter.b.data, truth.b) < STEP_RTOL


RULES = [
    (ScaledGD, {"lr": 0.02, "weight_decay": 0.0}),
    (ScaledGD, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}),
    (ScaledGD, {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.1}),
    (ScaledAdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}),
    (ScaledAdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
]


@pytest.mark.parametrize("damping", [(1e-6, "absolute"), (0.1, "absolute"), (0.1, "relative")], ids=str)
@pytest.mark.parametrize(("method", "options"), RULES, ids=str)
def test_fifty_steps_follow_the_dense_computation(damping, method, options):
    adapters = [Adapter(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    dense = [Dense(adapter, *damping) for adapter in adapters]
    named = [pair for i, adapter in enumerate(adapters) for pair in adapter.named(f"layer{i}")]
    optimizer = method(named, damping=damping[0], damping_form=damping[1], **options)
    before = [adapter.x for adapter in adapters]
    for _ in range(50):
        for adapter, truth in zip(adapters, dense, strict=True):
            g = adapter.gradient()
            adapter.set_gradient(g)
            (truth.gd if method is ScaledGD else truth.adamw)(g, **options)
        optimizer.step()
        assert_follows(adapters, dense)
    assert all(relative(adapter.x, x) > 0.1 for adapter, x in zip(adapters, before, strict=True))


def refactored(adapter: Adapter, seed: int) -> Adapter:
    """The same X and the same gradients to come, from factors Q A and B Q^-1."""
    other = Adapter(*adapter.shape, adapter.a.shape[0])
    q = well_conditioned(
        torch.randn(len(adapter.a), len(adapter.a), generator=torch.Generator().manual_seed(seed)).double()
    )
    other.a.data = (q @ adapter.a.data.double()).float()
    other.target = adapter.target
    other.b.data = (adapter.b.data.double() @ torch.linalg.inv(q)).float()
    return other


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
def test_scaled_gd_moves_every_factorization_of_a_point_alike(options):
    first = Adapter(30, 20, 4)
    second = refactored(first, seed=5)
    assert relative(second.x, first.x) < 1e-6
    pair = [ScaledGD(adapter.named(), lr=0.02, damping=0.0, **options) for adapter in (first, second)]
    start = first.x
    for _ in range(50):
        noise = 0.1 * first.randn(30, 20)
        for adapter, optimizer in zip((first, second), pair, strict=True):
            adapter.set_gradient(adapter.x - first.target + noise)
            optimizer.step()
    assert relative(first.x, start) > 0.1
    assert relative(second.x, first.x) < 1e-4


def test_a_lora_start_moves_only_b_in_the_first_step_but_for_weight_decay():
    adapter = Adapter(30, 20, 4)
    adapter.b.data.zero_()
    before = adapter.a.data.clone()
    g = adapter.gradient()
    adapter.set_gradient(g)
    dense = Dense(adapter, 1e-6, "absolute")
    optimizer = ScaledGD(adapter.named(), lr=0.02)
    dense.gd(g, 0.02, weight_decay=0.01)
    optimizer.step()
    assert relative(adapter.a.data, (1 - 0.02 * 0.01) * before) < 1e-7
    assert relative(adapter.b.data, dense.b) < STEP_RTOL


@pytest.mark.parametrize("damping_form", ["absolute", "relative"])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("method", [ScaledGD, ScaledAdamW])
def test_singular_gram_matrices_of_any_scale_give_finite_steps(method, damping, damping_form):
    adapters = [Adapter(300, 200, 16, seed=i) for i in range(4)]
    with torch.no_grad():
        adapters[0].b.zero_()
        adapters[1].b.copy_(1e4 * adapters[1].b[:, :1].expand(-1, 16))
        adapters[2].a.copy_(1e-12 * adapters[2].a[:1].expand(16, -1))
        adapters[3].a[5:] = 0
    named = [pair for i, adapter in enumerate(adapters) for pair in adapter.named(f"layer{i}")]
    optimizer = method(named, lr=1e-3, damping=damping, damping_form=damping_form)
    before = [adapter.b.data.clone() for adapter in adapters]
    for _ in range(3):
        for adapter in adapters:
            adapter.set_gradient(adapter.randn(300, 200) * 1e-3)
        optimizer.step()
    assert all(parameter.isfinite().all() for _, parameter in named)
    assert optimizer.skipped_updates == 0
    assert all(not torch.equal(adapter.b.data, b) for adapter, b in zip(adapters, before, strict=True))


def everything(optimizer: torch.optim.Optimizer, adapter: Adapter) -> list:
    state = [optimizer.state[p] for p in (adapter.a, adapter.b)]
    values = [torch.as_tensor(value).clone() for entry in state for _, value in sorted(entry.items())]
    return [adapter.a.data.clone(), adapter.b.data.clone(), *values]


methods = pytest.mark.parametrize(
    ("method", "options"), [(ScaledGD, {"momentum": 0.9, "lr": 0.02}), (ScaledAdamW, {"lr": 0.02})], ids=["gd", "adamw"]
)


@methods
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_a_gradient_that_is_not_finite_leaves_its_pair_alone_and_is_counted(method, options, poison, factor):
    good, bad = Adapter(30, 20, 4, seed=1), Adapter(30, 20, 4, seed=2)
    alone = Adapter(30, 20, 4, seed=1)
    optimizer = method([*good.named("good"), *bad.named("bad")], **options)
    lonely = method(alone.named(), **options)
    for turn in range(4):
        for adapter in (good, bad, alone):
            adapter.set_gradient(adapter.gradient())
        if turn == 1:
            getattr(bad, factor).grad[1, 2] = poison
            before = everything(optimizer, bad)
        optimizer.step()
        lonely.step()
        if turn == 1:
            assert same_bits(everything(optimizer, bad), before)
    assert optimizer.skipped_updates == 1
    assert not same_bits(everything(optimizer, bad), before)
    assert relative(good.x, alone.x) < 1e-6


@methods
def test_a_pair_without_gradient_rests_and_counts_its_own_steps(method, options):
    moving, resting = Adapter(30, 20, 4, seed=1), Adapter(30, 20, 4, seed=2)
    dense = Dense(resting, 1e-6, "absolute")
    optimizer = method([*moving.named("moving"), *resting.named("resting")], **options)
    before = everything(optimizer, resting)
    for turn in range(6):
        for adapter in (moving, resting):
            g = adapter.gradient()
            adapter.set_gradient(g)
        if turn < 3:
            resting.a.grad = resting.b.grad = None
        elif method is ScaledGD:
            dense.gd(g, 0.02, 0.9, weight_decay=0.01)
        else:
            dense.adamw(g, lr=0.02, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        optimizer.step()
        if turn == 2:
            assert same_bits(everything(optimizer, resting), before)
    assert_follows([resting], [dense])
    assert optimizer.skipped_updates == 0


@methods
def test_factors_that_were_replaced_since_the_last_step_are_the_ones_that_move(method, options):
    adapter, replaced = Adapter(30, 20, 4), Adapter(30, 20, 4)
    optimizers = [method(a.named(), **options) for a in (adapter, replaced)]
    for turn in range(4):
        for each, optimizer in zip((adapter, replaced), optimizers, strict=True):
            each.set_gradient(each.gradient())
            if turn == 2 and each is replaced:
                for parameter in (each.a, each.b):
                    parameter.data = parameter.data.clone()
            optimizer.step()
    assert same_bits(everything(optimizers[0], adapter), everything(optimizers[1], replaced))


@methods
def test_a_loaded_state_goes_on_bit_for_bit_whatever_the_factors_were(method, options, tmp_path):
    whole, resumed = Adapter(30, 20, 4), Adapter(30, 20, 4)
    first = method(whole.named(), **options)
    gradients = [whole.randn(30, 20) for _ in range(6)]
    for g in gradients[:3]:
        whole.set_gradient(g)
        first.step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    # What a trainer leaves that cast the adapter to bf16 before it loaded the checkpoint.
    resumed.a.data, resumed.b.data = (f.data.bfloat16().float() for f in (whole.a, whole.b))
    second = method(resumed.named(), **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for g in gradients[3:]:
        for adapter, optimizer in ((whole, first), (resumed, second)):
            adapter.set_gradient(g)
            optimizer.step()
    assert same_bits(everything(first, whole), everything(second, resumed))


def assert_the_head_follows_adamw(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Three steps, the head of `modules_to_save` beside torch's AdamW on the same gradients."""
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    copy = nn.Parameter(head.detach().clone())
    reference = torch.optim.AdamW([copy], **RATES)
    for seed in range(3):
        optimizer.zero_grad()
        next_token_loss(model, token_batch(seed)).backward()
        copy.grad = head.grad.clone()
        optimizer.step()
        reference.step()
    assert relative(head.detach(), copy.detach()) < 1e-6


HEAD = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "down_proj"]}
RATES = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
OWN_RATES = {f"adamw_{key}": value for key, value in RATES.items()}


@pytest.mark.parametrize(
    ("method", "options"), [(ScaledGD, OWN_RATES), (Muon, OWN_RATES), (ScaledAdamW, RATES)], ids=["gd", "muon", "adamw"]
)
def test_other_trainable_parameters_are_trained_by_torchs_adamw(method, options):
    model = with_lora(tiny_llama(), **HEAD)
    assert_the_head_follows_adamw(model, method(model, **options))


def test_a_state_loaded_to_the_cpu_goes_on_where_the_parameters_are():
    # A trainer on one GPU loads optimizer.pt to the CPU. Fake tensors stand for a card: they have a device and no numbers.
    def make() -> tuple[list[tuple[str, nn.Parameter]], AdamW]:
        shapes = {"layer.lora_A.default.weight": (2, 8), "layer.lora_B.default.weight": (8, 2)}
        named = [(name, nn.Parameter(torch.zeros(shape, device="cuda"))) for name, shape in shapes.items()]
        return named, AdamW(named)

    def step(named: list[tuple[str, nn.Parameter]], optimizer: AdamW) -> None:
        for _, parameter in named:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    with FakeTensorMode():
        named, optimizer = make()
        step(named, optimizer)
        saved = torch.optim.Optimizer.state_dict(optimizer)
        saved["state"] = {i: {key: value.cpu() for key, value in e.items()} for i, e in saved["state"].items()}
        named, optimizer = make()
        torch.optim.Optimizer.load_state_dict(optimizer, saved)
        step(named, optimizer)
        devices = {value.device.type for _, p in named for value in optimizer.state[p].values()}
        assert devices == {"cuda"}


@pytest.mark.parametrize("method", [ScaledGD, ScaledAdamW, AdamW, Muon])
@pytest.mark.parametrize("lora", [{}, {"rank_pattern": {"q_proj": 7}}, {"use_dora": True}], ids=str)
def test_a_bf16_adapter_becomes_float32_and_trains(method, lora):
    model = bf16(with_lora(tiny_llama(), **lora))
    # Small for everything but a step that divides by the scale of the loss.
    optimizer = method(model, lr=0.1 if method is ScaledGD else 0.01)
    assert {p.dtype for name, p in model.named_parameters() if ".lora_" in name} == {torch.float32}
    losses = take_steps(model, optimizer, [4] * 8)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("method", [ScaledGD, Muon])
def test_a_group_sets_adamw_by_the_names_of_the_constructor(method):
    model = with_lora(tiny_llama(), **HEAD)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors, others = ([(n, p) for n, p in trained if (".lora_" in n) is wanted] for wanted in (True, False))
    assert_the_head_follows_adamw(model, method([{"params": factors}, {"params": others} | OWN_RATES]))


def test_each_param_group_has_its_own_rates():
    still, moving = Adapter(30, 20, 4, seed=1), Adapter(30, 20, 4, seed=2)
    optimizer = ScaledAdamW(
        [{"params": still.named("still"), "lr": 0.0}, {"params": moving.named("moving"), "lr": 0.02}], weight_decay=0.0
    )
    before = still.x, moving.x
    for adapter in (still, moving):
        adapter.set_gradient(adapter.gradient())
    optimizer.step()
    assert torch.equal(still.x, before[0])
    assert relative(moving.x, before[1]) > 1e-3


def bf16(model: nn.Module) -> nn.Module:
    """What TRL leaves of the adapter of a 4-bit model."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16()
    return model


def attached() -> nn.Module:
    model = with_lora(tiny_llama())
    qriemann.attach(model)
    return model


def without_b() -> nn.Module:
    model = with_lora(tiny_llama())
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.requires_grad_(False)
    return model


REFUSED = {
    "a model on the manifold": (attached, r"must be plain LoRA.*q_proj\.lora_A"),
    "parameters without names": (lambda: list(with_lora(tiny_llama()).parameters()), "must come with their names"),
    "a factor without its partner": (without_b, r"both factors.*q_proj\.lora_A\.default\.weight without"),
    "a frozen model": (lambda: tiny_llama().requires_grad_(False), "at least one trainable parameter"),
    "an embedding": (
        lambda: with_lora(tiny_llama(), target_modules=["q_proj", "embed_tokens"]),
        r"must be linear.*embed_tokens\.lora_embedding_A",
    ),
    "a convolution": (
        lambda: get_peft_model(nn.Sequential(nn.Conv2d(3, 8, 3)), LoraConfig(r=2, target_modules=["0"])),
        r"must be linear.*0\.lora_A",
    ),
    "a model without adapter": (tiny_llama, "at least one linear layer"),
    "bf16 parameters": (lambda: [("x.lora_A.weight", nn.Parameter(torch.zeros(2, 3).bfloat16()))], "must be float32"),
}


@pytest.mark.parametrize("method", [ScaledGD, ScaledAdamW, Muon])
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_in_one_line_and_left_as_it_was(method, make, message):
    given = make()
    model = bf16(given) if isinstance(given, nn.Module) else nn.Module()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(qriemann.InputError, match=message) as caught:
        method(given)
    assert "\n" not in str(caught.value)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])
