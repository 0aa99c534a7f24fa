"""FSDP2: two ranks that hold half of the rows each are two ranks that hold all of them."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models import Model, batches, loss_of
from support.ranks import run_distributed, watched
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.memory import kept_bytes
from qgalore.param_groups import split_parameters
from qgalore.per_layer import PerLayerUpdates
from qgalore.sharding import local, shard_of
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import QuantizedWeight, open_weight
from qgalore.sync import GradSync
from qgalore.whole_model import WholeModelUpdates

METHODS = {
    "adamw": {},
    "adamw, clipped": {"clip": 0.05},
    "galore_adamw": {},
    "galore_adamw, svd": {"subspace": "svd"},
    "galore_adamw, clipped": {"clip": 0.05},
    "galore_adamw_per_layer": {},
    "galore_adamw_per_layer, clipped": {"clip": 0.05},
    "galore_lion_per_layer": {},
    "galore_adamw8bit_per_layer": {"proj_bits": 4},
    "adamw8bit": {},
    "foam": {},
    "q_galore_adamw8bit": {"proj_bits": 4, "int8": 8},
    "q_galore_adamw8bit_per_layer": {"proj_bits": 4, "int8": 8},
    "q_galore_adamw8bit_per_layer, 4 bits": {"proj_bits": 4, "int8": 4},
}


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in [*model.mlp, model]:
        fully_shard(layer)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)
    return model


def train(method: str, *, sharded: bool, accumulation: int = 1, updates: int = 16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, data, rank = Model(width=64), batches(4) * (updates * accumulation // 4), dist.get_rank()
    settings, name = dict(METHODS[method]), method.partition(",")[0]
    clip = settings.pop("clip", 0.0)
    if bits := settings.pop("int8", 0):
        quantize_linear_layers(model, select=lambda name: "mlp" in name, bits=bits, seed=0)
    if sharded:
        shard(model)
    sync = GradSync(at_rank_size=name.endswith("per_layer") or (name != "adamw" and not clip), enabled=not sharded)
    chosen = Settings(**dict(lr=0.01, rank=8, update_proj_gap=4, proj_type="right") | settings)
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=chosen, sync=sync)
    driver, losses = create_updates(name, optimizer=optimizer, sync=sync, accumulation=accumulation, clip=clip), []
    for number, (inputs, targets) in enumerate(data):
        loss = loss_of(model, (inputs.chunk(2)[rank], targets.chunk(2)[rank])) / (2 * accumulation)
        loss.backward()
        losses.append(loss.detach())
        if (number + 1) % accumulation == 0:
            outcome = driver.finish()
    return {"losses": torch.stack(losses), "norm": torch.tensor(outcome.norm)} | dict(weights_of(model))


def weights_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parts of all weights, from the rows of both ranks."""
    for name, p in model.named_parameters():
        for part, tensor in open_weight(p).tensors().items():
            rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, tensor.contiguous())
            yield f"{name}.{part}", torch.cat(rows) if shard_of(p) is not None else tensor


def both(method: str, accumulation: int) -> list[dict[str, torch.Tensor]]:
    return [train(method, sharded=sharded, accumulation=accumulation) for sharded in (False, True)]


PAIRS = [(method, 1) for method in METHODS] + [(method, 2) for method in METHODS if "per_layer" in method]


@pytest.mark.parametrize("method, accumulation", PAIRS)
def test_rows_on_two_ranks_are_the_whole_on_each(method, accumulation):
    """Sixteen updates with their refreshes. The last bit of a sum may tip the rounding of a code of 8 or 4 bits."""
    coarse = "8bit" in method
    for whole, rows in run_distributed(both, method, accumulation):
        assert torch.allclose(whole["losses"], rows["losses"], rtol=1e-3 if coarse else 1e-5, atol=0)
        assert whole["losses"][-1] < whole["losses"][0] - 0.05
        if method.endswith("per_layer"):
            assert whole["norm"].item() == pytest.approx(rows["norm"].item(), rel=1e-3 if coarse else 1e-5)
        for name in whole.keys() - {"losses", "norm"}:
            a, b = whole[name].float(), rows[name].float()
            apart = (a - b).abs() > (1e-3 if coarse else 1e-5) * a.abs().max()
            assert apart.float().mean() < (0.1 if coarse else 1e-9), name


def what_is_held() -> dict[str, torch.Tensor]:
    """Bytes of weights, moments and bases here and in the whole; those gathered; all-reduces of each update."""
    found = {}
    for sharded in (False, True):
        torch.manual_seed(0)
        model = Model(width=64)
        quantize_linear_layers(model, select=lambda name: "mlp" in name, seed=0)
        if sharded:
            shard(model)
        settings = Settings(lr=0.01, rank=8, update_proj_gap=5, proj_type="right", proj_bits=4)
        optimizer = create_optimizer(
            "q_galore_adamw8bit_per_layer",
            groups=split_parameters(model),
            settings=settings,
            sync=GradSync(enabled=False),
        )
        driver, events = PerLayerUpdates(optimizer), []
        with watched(events):
            for batch in batches(12):
                loss_of(model, batch).backward()
                driver.finish()
                events.append(-1)
        kept = kept_bytes(model, optimizer)
        found[str(sharded)] = torch.tensor([kept["weights"], kept["moments"], kept["bases"]])
        found[f"{sharded} events"] = torch.tensor(events)
    weight = local(model.mlp[0].weight.detach())
    assert isinstance(weight, QuantizedWeight) and weight.shape == (48, 64)
    sent, _ = weight.fsdp_pre_all_gather(None, None, None, None, None)
    found["gathered"] = torch.tensor([sum(part.nbytes for part in sent), weight.numel()])
    return found


def test_a_rank_keeps_its_share_and_gathers_a_byte_a_weight():
    for found in run_distributed(what_is_held):
        whole, rows = found["True"], found["False"]
        assert (whole[0] * 2, whole[1] * 2, whole[2]) == (rows[0], rows[1], rows[2]), "bases are on every rank"
        sent, weights = found["gathered"].tolist()
        assert sent == weights + 5 * weights // 64, "codes, and a scale and a zero point for each group of 64"


def test_between_refreshes_an_update_adds_one_sum_to_what_fsdp_sends():
    """The norms of all gradients, which tell every rank whether one was bad."""
    for found in run_distributed(what_is_held):
        updates, sent = [], []
        for numel in found["True events"].tolist():
            sent = [*sent, numel] if numel >= 0 else updates.append(sent) or []
        assert len(updates) == 12
        quiet = [sent for sent in updates if len(sent) == 1]
        assert len(quiet) == 7 and all(sent == [6] for sent in quiet), "six parameters"
        assert all(max(sent) <= 96 * 16 for sent in updates), "sketches, (n, r + 8) at most"


def refusal(method: str, settings: dict, *, width: int = 64, bits: int = 0) -> str:
    model = Model(width=width)
    if bits:
        quantize_linear_layers(model, select=lambda name: "mlp" in name, bits=bits, seed=0)
    shard(model)
    try:
        create_optimizer(method, groups=split_parameters(model), settings=Settings(**{"rank": 8} | settings))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "method, settings, said",
    [
        ("muon", {}, "cannot be updated by the rule muon"),
        ("galore_muon", {"proj_type": "right"}, "cannot be updated by the rule muon"),
        ("galore_adafactor", {"proj_type": "right"}, "cannot be updated by the rule adafactor"),
        ("galore_adamw", {"proj_type": "std"}, "can be projected on the right only: proj_type 'right', not 'std'"),
        ("galore_adamw", {"proj_type": "full"}, "can be projected on the right only"),
        ("galore_adamw", {"proj_type": "continuous"}, "cannot have a basis that learns"),
        ("galore_adamw", {"proj_type": "right", "subspace": "average"}, "cannot have bases from an average"),
        ("adamw8bit", {"skip_updates": "magma"}, "cannot be updated with skip_updates 'magma'"),
        ("adamw8bit", {"skip_updates": "skip"}, ""),
        ("galore_adamw", {"proj_type": "right", "lift": "fira"}, "cannot be updated with the lift fira"),
        ("apollo", {}, "cannot be updated with the lift apollo"),
        ("galore_adamw8bit", {"proj_type": "right", "rank": 50}, "multiple of 256. Moments in 32 bits have no blocks"),
        ("galore_adamw", {"proj_type": "auto"}, ""),
        ("galore_adamw", {"proj_type": "random"}, ""),
    ],
)
def test_what_needs_all_rows_is_refused_by_name(method, settings, said):
    for message in run_distributed(refusal, method, settings):
        assert said in message and bool(said) == bool(message)


def bad_rows() -> list[bool]:
    """A gradient that is not finite in the rows of one rank only."""
    torch.manual_seed(0)
    model, rank = shard(Model(width=64)), dist.get_rank()
    settings = Settings(lr=0.01, rank=8, proj_type="right")
    optimizer = create_optimizer("galore_adamw", groups=split_parameters(model), settings=settings)
    driver = WholeModelUpdates(optimizer, sync=GradSync(enabled=False))
    before = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    loss_of(model, batches(1)[0]).backward()
    if rank == 1:
        local(model.mlp[0].weight.grad)[0, 0] = float("nan")
    outcome = driver.finish()
    same = all(torch.equal(before[name], local(p.detach())) for name, p in model.named_parameters())
    return [len(outcome.bad) == 1 and outcome.bad[0] is model.mlp[0].weight, same]


def test_a_bad_gradient_on_one_rank_stops_the_update_on_all():
    assert run_distributed(bad_rows) == [[True, True], [True, True]]


def test_a_parameter_that_is_no_dtensor_has_no_shard():
    p = torch.ones(3, 2)
    assert shard_of(p) is None and local(p) is p


def saved_and_loaded(folder: str, name: str, bits: int) -> list[bool]:
    """torch.distributed.checkpoint, from a sharded model into another and into one that is not."""

    def build(sharded: bool):
        torch.manual_seed(0)
        model = Model(width=64)
        if bits:
            quantize_linear_layers(model, select=lambda name: "mlp" in name, bits=bits, seed=0)
        if sharded:
            shard(model)
        settings = Settings(lr=0.01, rank=8, update_proj_gap=3, proj_type="right", proj_bits=4)
        optimizer = create_optimizer(name, groups=split_parameters(model), settings=settings)
        return model, optimizer, WholeModelUpdates(optimizer, sync=GradSync(enabled=False))

    def advance(driver, model, data, *, sharded: bool):
        for batch in data:  # the same on both ranks, so that one model by itself may go on, too
            (loss_of(model, batch) / (2 if sharded else 1)).backward()
            driver.finish()

    data = batches(8)
    model, optimizer, driver = build(True)
    advance(driver, model, data[:4], sharded=True)
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    advance(driver, model, data[4:], sharded=True)
    found = []
    for sharded in (True, False):
        other, restored, going_on = build(sharded)
        weights, states = get_state_dict(other, restored)
        loaded = {"model": weights, "optimizer": states}
        dcp.load(loaded, checkpoint_id=folder)
        set_state_dict(other, restored, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        advance(going_on, other, data[4:], sharded=sharded)
        pairs = zip(weights_of(model), weights_of(other), strict=True)
        found.append(all(torch.allclose(a.float(), b.float(), atol=0 if sharded else 1e-5) for (_, a), (_, b) in pairs))
    return found


@pytest.mark.parametrize("name, bits", [("galore_adamw8bit", 0), ("q_galore_adamw8bit", 8), ("adamw", 0)])
def test_distributed_checkpoints_share_it_out_anew(tmp_path, name, bits):
    assert run_distributed(saved_and_loaded, str(tmp_path), name, bits) == [[True, True], [True, True]]


def uneven_state() -> str:
    model = Model(width=64)
    model.head = nn.Linear(64, 135, bias=False)  # 68 and 67 rows
    shard(model)
    optimizer = create_optimizer("adamw8bit", groups=split_parameters(model), settings=Settings(lr=0.01))
    model(torch.randint(16, (4, 3))).square().sum().backward()
    optimizer.step()
    try:
        optimizer.state_dict()
    except ValueError as error:
        return str(error)
    return ""


def test_moments_in_few_bits_of_uneven_rows_are_no_dtensors():
    for said in run_distributed(uneven_state):
        assert "the 135 rows of a parameter of shape (135, 64) do not divide evenly over 2 ranks" in said
