"""Ranks for each kind of matrix."""

import pytest
import torch
from support.runs import losses, record
from transformers import LlamaConfig, LlamaForCausalLM

import torchrun_main
from qgalore.factory import Settings, create_optimizer
from qgalore.options import complete_group
from qgalore.param_groups import read_ratios, split_by_rank, split_parameters

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
RATIOS = "q_proj=0.5,k_proj=0.5,down_proj=2"


def llama():
    return LlamaForCausalLM(CONFIG)


def test_each_matrix_has_the_rank_of_its_part():
    model = llama()
    settings = Settings(rank=8, rank_ratio=RATIOS, lr=1e-3)
    optimizer = create_optimizer("galore_adamw", groups=split_parameters(model), settings=settings)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    seen = set()
    for name, p in model.named_parameters():
        if "proj" in name:
            part = name.split(".")[-2]
            rank = {"q_proj": 4, "k_proj": 4, "down_proj": 16}.get(part, 8)
            (basis,) = (t for key, t in optimizer.state[p].items() if key in ("left", "right"))
            assert basis.shape[1] == rank and rank in optimizer.state[p]["exp_avg"].shape, name
            seen.add(part)
    assert len(seen) == 7
    together = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(together) == len(set(together)) == len(list(model.parameters()))


def test_the_last_part_that_fits_counts_and_one_that_fits_none_is_refused():
    groups = split_parameters(llama())
    split = split_by_rank(groups, read_ratios("attn=0.5,q_proj=2"))
    ratios = {name.split(".")[-2]: g.rank_ratio for g in split if g.kind == "matrix" for name in g.names}
    assert ratios["q_proj"] == 2 and ratios["k_proj"] == 0.5 and ratios["up_proj"] == 1
    with pytest.raises(
        ValueError, match="no matrix has 'w_proj' in its name. The matrices are mlp.down_proj, .*q_proj"
    ):
        split_by_rank(groups, {"w_proj": 2.0})


@pytest.mark.parametrize("text", ["q_proj", "q_proj=", "=2", "q_proj=0", "q_proj=inf", "q_proj=1,,v=2", ""])
def test_what_is_no_list_of_factors_is_refused(text):
    from qgalore.options import RATIOS as allowed

    assert not allowed.fits(text)


def test_a_rank_is_clamped_to_the_shorter_side():
    p = torch.nn.Parameter(torch.randn(6, 20))
    with pytest.warns(UserWarning, match="clamped"):
        complete_group({"params": [p], "rank": 12})


def test_as_the_user_starts_it(tiny, tmp_path, capsys):
    """The table has a row for each rank; a resumed run ends as one never stopped, and may not change the ratios."""
    chosen = dict(optimizer="q_galore_adamw8bit", rank=8, lr=0.01, rank_ratio=RATIOS, update_proj_gap=3)
    chosen |= dict(num_training_steps=8, save_every=4)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "whole", **chosen)) == 0
    middle = tmp_path / "whole" / "checkpoint-00000004"
    assert torchrun_main.command_line(tiny.flags(tmp_path / "half", continue_from=middle, **chosen)) == 0
    found = losses(tmp_path / "whole")
    assert losses(tmp_path / "half") == found[4:] and found[-1] < found[0]
    said = {row["name"]: row["trained_by"] for row in record(tmp_path / "whole", "start")[0]["groups"]}
    assert "rank 4 " in said["attention and MLP: q_proj, k_proj"]
    assert "rank 16 " in said["attention and MLP: down_proj"] and "rank 8 " in said["attention and MLP"]
    capsys.readouterr()
    other = chosen | {"rank_ratio": "q_proj=2"}
    assert torchrun_main.command_line(tiny.flags(tmp_path / "other", continue_from=middle, **other)) == 2
    assert "rank_ratio" in capsys.readouterr().err


@pytest.mark.parametrize("ratio, says", [("w_proj=2", "no matrix has 'w_proj'"), ("q_proj", "must be parts of names")])
def test_a_mistake_is_a_line(tiny, tmp_path, capsys, ratio, says):
    flags = tiny.flags(tmp_path, optimizer="galore_adamw", num_training_steps=2, rank_ratio=ratio)
    assert torchrun_main.command_line(flags) == 2
    assert says in capsys.readouterr().err
