"""Data parallel: two ranks with half of every batch are one process with the whole of it."""

import pytest
import torch
import torch.distributed as dist
from support.models import Model, batches, loss_of
from support.ranks import run_distributed, watched
from torch import nn

from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.optimizer import LowRankOptimizer
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import open_weight
from qgalore.sync import IN_FLIGHT, SMALL, GradSync
from qgalore.whole_model import WholeModelUpdates

RANK, GAP = 3, 4

# Name of the optimizer, and what else is set. Q-GaLore's weights are INT8 where "int8" is.
METHODS = {
    "adamw": {},
    "adamw, clipped": {"clip": 0.5},
    "adamw8bit": {},
    "galore_adamw": {},
    "galore_adamw, clipped": {"clip": 0.5},
    "galore_adamw_per_layer": {},
    "galore_adamw_per_layer, clipped": {"clip": 0.5},
    "galore_lion": {},
    "galore_adafactor": {},
    "galore_adamw, continuous": {"proj_type": "continuous"},
    "galore_adamw_per_layer, continuous": {"proj_type": "continuous"},
    "galore_adamw, average": {"subspace": "average"},
    "galore_adamw_per_layer, average": {"subspace": "average"},
    "galore_adamw, random": {"proj_type": "random"},
    "galore_adamw, both sides": {"proj_type": "full"},
    "galore_adamw, fira": {"lift": "fira"},
    "galore_adamw_per_layer, fira": {"lift": "fira"},
    "adamw8bit, magma": {"skip_updates": "magma"},
    "galore_adamw, magma": {"skip_updates": "magma"},
    "galore_adamw_per_layer, skip": {"skip_updates": "skip"},
    "adamw8bit, eco": {"error_feedback": "eco", "int8": True},
    "foam": {},
    "apollo": {},
    "muon": {},
    "galore_muon_per_layer, fira": {"lift": "fira"},
    "q_galore_muon8bit": {"proj_bits": 4, "int8": True},
    "q_galore_adamw8bit": {"proj_bits": 4, "int8": True},
    "q_galore_adamw8bit_per_layer": {"proj_bits": 4, "int8": True},
}


def build(method: str, model: nn.Module, *, accumulation: int) -> WholeModelUpdates | PerLayerUpdates:
    settings, name = dict(METHODS[method]), method.partition(",")[0]
    clip = settings.pop("clip", 0.0)
    if settings.pop("int8", False):
        quantize_linear_layers(model, select=lambda name: "mlp" in name, group_size=8, seed=0)
    sync = GradSync(
        at_rank_size=name != "adamw" and (name.endswith("per_layer") or not clip),
        order=reversed(list(model.parameters())),
    )
    chosen = Settings(lr=0.01, rank=RANK, update_proj_gap=GAP, **{"subspace": "svd"} | settings)
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=chosen, sync=sync)
    return create_updates(name, optimizer=optimizer, sync=sync, accumulation=accumulation, clip=clip)


def train(method: str, *, accumulation: int = 1, updates: int = 30) -> dict[str, torch.Tensor]:
    """Weights and losses. Every batch is cut into 4 parts, which go to ranks and micro-batches."""
    torch.manual_seed(0)
    model, data = Model(width=16), batches(updates)
    alone = not dist.is_initialized()
    ranks, rank = (1, 0) if alone else (dist.get_world_size(), dist.get_rank())
    driver, losses = build(method, model, accumulation=accumulation), []
    for inputs, targets in data:
        micro_batches = zip(inputs.chunk(accumulation), targets.chunk(accumulation), strict=True)
        own = [(inputs.chunk(ranks)[rank], targets.chunk(ranks)[rank]) for inputs, targets in micro_batches]
        parts = [loss_of(model, batch) / (ranks * accumulation) for batch in own]
        for loss in parts:
            loss.backward()
        losses.append(torch.stack([loss.detach() for loss in parts]).sum())
        driver.finish()
    parts = {
        f"{name}.{part}": t for name, p in model.named_parameters() for part, t in open_weight(p).tensors().items()
    }
    return {"losses": torch.stack(losses)} | {name: tensor.detach().clone() for name, tensor in parts.items()}


def all_methods(accumulation: int) -> dict[str, dict[str, torch.Tensor]]:
    return {method: train(method, accumulation=accumulation) for method in METHODS}


@pytest.mark.filterwarnings("ignore:a row of")  # of weights, which are few here
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_ranks_are_one_process(accumulation):
    """Thirty updates with their refreshes. The ranks agree to the last bit; one process only adds in another order.

    The second basis of a matrix that is projected on both sides comes from few directions that are nearly equal."""
    one, two = run_distributed(all_methods, accumulation)
    for method in METHODS:
        for name, tensor in one[method].items():
            assert name == "losses" or torch.equal(tensor, two[method][name]), (method, name)
        alone = train(method, accumulation=accumulation)["losses"]
        both = one[method]["losses"] + two[method]["losses"]
        bound = 1e-3 if "both sides" in method else 1e-5
        assert ((both - alone).abs() / alone).max() < bound, method
        assert alone[-1] < alone[0] - 0.05, method


# What is sent, and when


class Two(nn.Module):
    """Two branches, a wide matrix and a tall one in each, and two vectors; some of it stays without a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("a", "b", "unused"):
            wide, tall = nn.Linear(200, 100, bias=False), nn.Linear(100, 200)
            self.add_module(name, nn.Sequential(wide, nn.Tanh(), tall))

    def parameters_of(self, *names):
        return [p for name, p in self.named_parameters() if name.split(".")[0] in names]


def optimizer_of(model: nn.Module, *, gap: int = 5) -> LowRankOptimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": matrices, "rank": 8, "update_proj_gap": gap, "subspace": "svd"}]
    groups.append({"params": [p for p in model.parameters() if p.ndim == 1]})
    return LowRankOptimizer(groups, lr=0.01, sync=GradSync(order=reversed(list(model.parameters()))))


def drive(model: nn.Module, *, per_layer: bool, accumulation: int, gap: int = 5) -> PerLayerUpdates | WholeModelUpdates:
    optimizer = optimizer_of(model, gap=gap)
    if per_layer:
        return PerLayerUpdates(optimizer, accumulation=accumulation)
    return WholeModelUpdates(optimizer, sync=optimizer.sync, accumulation=accumulation)


def traffic(per_layer: bool) -> list[list]:
    """For eight updates of two micro-batches, the elements that were sent and "backward" at each one's end."""
    model, updates = Two(), []
    driver = drive(model, per_layer=per_layer, accumulation=2, gap=12)
    for _ in range(8):
        events: list = []
        with watched(events):
            for _ in range(2):
                x = torch.randn(32, 200)
                (model.a(x) + model.b(x)).square().sum().backward()
                events.append(-1)
            driver.finish()
        updates.append(events)
    return updates


@pytest.mark.parametrize("per_layer", [False, True])
def test_only_projections_travel_between_refreshes_and_while_backward_goes_on(per_layer):
    """Matrices of 20,000 elements and rank 8 travel alone, vectors together and last. Two matrices never have a
    gradient: from the second update on they come last, too."""
    bucket = 3 * 200 + 9
    for updates in run_distributed(traffic, per_layer):
        steady = 0
        for number, events in enumerate(updates):
            first, second = events.index(-1), len(events) - 1 - events[::-1].index(-1)
            if not (per_layer and number == 0):
                assert first == 0, "nothing before the last micro-batch"
            if number > 0:
                assert len(events[first + 1 : second]) == 4, "those with gradients, while backward goes on"
            sent = [event for event in events if event >= 0]
            assert sent.count(bucket) == 1
            matrices = [numel for numel in sent if numel > 1000][: 4 if number else None]
            if number == 0:
                assert sorted(set(matrices)) == ([1600, 20000] if per_layer else [20000])
            elif 20000 not in matrices:
                steady += 1
                assert matrices == [8 * 200] * 4, "r / min(m, n) of what data parallel sends elsewhere"
            assert set(matrices) <= {1600, 20000}
        assert steady >= 3


def uneven(per_layer: bool, accumulation: int) -> dict[str, torch.Tensor]:
    """Rank 0 has gradients of a, rank 1 of b, and of both at times; in another order; nobody has those of the third."""
    alone = not dist.is_initialized()
    model, rank = Two(), 0 if alone else dist.get_rank()
    driver = drive(model, per_layer=per_layer, accumulation=accumulation)
    used = [("a", "b"), ("a", "b")] if alone else [("a", "b"), ("b", "a")]
    generator = torch.Generator().manual_seed(1)
    for update in range(12):
        for _ in range(accumulation):
            x = torch.randn(32, 200, generator=generator)
            if alone or update % 3 == 2:
                outputs = [getattr(model, name)(x) for name in used[rank]]
                losses = [output.square().sum() / (1 if alone else 2) for output in outputs]
                if update % 3 != 2:
                    losses = losses[:2]
            else:
                losses = [getattr(model, used[rank][0])(x).square().sum()]
            sum(losses).backward()
        driver.finish()
    state = driver.optimizer.state
    assert not any(state[p].get("step") for p in model.parameters_of("unused"))
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("per_layer", [False, True])
def test_ranks_may_miss_gradients_and_finish_them_in_another_order(per_layer, accumulation):
    """What one rank misses counts as zeros; what all miss stays as it was."""
    one, two = run_distributed(uneven, per_layer, accumulation)
    alone = uneven(per_layer, accumulation)
    for name, p in Two().named_parameters():
        assert torch.equal(one[name], two[name]), name
        assert torch.allclose(one[name], alone[name], atol=2e-5), name
        assert torch.equal(one[name], p) == name.startswith("unused"), name


def plain_loop() -> dict[str, torch.Tensor]:
    """A loop that knows backward and step only."""
    alone = not dist.is_initialized()
    model, rank = Two(), 0 if alone else dist.get_rank()
    optimizer = optimizer_of(model)
    for _ in range(7):
        x = torch.randn(32, 200)
        own = x if alone else x.chunk(2)[rank]
        (model.a(own) + model.b(own)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_a_loop_with_step_alone():
    one, two = run_distributed(plain_loop)
    torch.manual_seed(0)
    alone = plain_loop()
    for name in alone:
        assert torch.equal(one[name], two[name]) and torch.allclose(one[name], alone[name], atol=2e-5), name


def default_optimizer() -> list[int]:
    p = nn.Parameter(torch.ones(300, 100))
    optimizer = LowRankOptimizer([{"params": [p], "rank": 4}])
    events: list = []
    with watched(events):
        p.grad = torch.full_like(p, float(dist.get_rank()))
        optimizer.step()
    return events


def test_without_a_sync_an_optimizer_sends_nothing():
    """So that DistributedDataParallel, which has summed everything, works as usual."""
    assert run_distributed(default_optimizer) == [[], []]


def sent_long_before_the_end() -> list[int]:
    """The order of the parameters after an exchange in which none is missing, and each sum's first number."""
    parameters = [nn.Parameter(torch.zeros(SMALL + 1)) for _ in range(IN_FLIGHT + 3)]
    exchange = GradSync().exchange(parameters, inside=True)
    arrived = {}
    for p in parameters:
        arrived |= dict(exchange.send(p, torch.ones(SMALL + 1)))
    arrived |= dict(exchange.finish(missing=lambda p: pytest.fail("none is")))
    number = {p: number for number, p in enumerate(parameters)}
    return [number[p] for p in exchange._order] + [int(arrived[p][0]) for p in parameters]


def test_what_has_arrived_during_backward_is_not_missing_at_its_end():
    """It was once, and zeros of every such gradient were made at the end of each update."""
    assert run_distributed(sent_long_before_the_end) == [[0, 1, 2, 3, 4, 2, 2, 2, 2, 2]] * 2


def test_one_process_sends_nothing():
    sync, (p, G) = GradSync(), (nn.Parameter(torch.zeros(3)), torch.randn(3))
    exchange = sync.exchange([p], inside=True)
    assert [total is G for _, total in exchange.send(p, G)] == [True]
    assert list(exchange.finish(lambda p: pytest.fail("nothing is missing"))) == [] and not sync.at_rank_size
