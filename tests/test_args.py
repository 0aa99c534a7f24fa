import pytest
from support.command_line import flags_refusal, parse
from support.runs import ROOT

from peft_pretraining.cli.args import parse_args, schedule_of
from peft_pretraining.cli.flags import FLAGS, parse_count, reference_page
from peft_pretraining.errors import UserError

# Every flag of the three reference scripts.
REFERENCE = """
model_config use_hf_model continue_from batch_size gradient_accumulation total_batch_size max_length optimizer lr
scheduler min_lr_ratio activation_checkpointing weight_decay warmup_steps eval_every num_training_steps max_train_tokens
save_every save_dir tags name dtype workers seed project unset_wandb grad_clipping beta1 beta2 rank update_proj_gap
galore_scale proj_type proj_quant proj_bits proj_group_size weight_quant weight_bits weight_group_size stochastic_round
simulation cos_threshold gamma_proj queue_size single_gpu log_details""".split()


def test_every_flag_of_the_references_is_known():
    assert set(REFERENCE) <= FLAGS.keys()


@pytest.mark.parametrize("text, count", [("5000", 5000), ("100K", 10**5), ("1.5m", 1_500_000), ("2B", 2 * 10**9)])
def test_counts_take_suffixes(text, count):
    assert parse_count(text) == count
    assert parse("--eval_tokens", text).eval_tokens == count


@pytest.mark.parametrize("text", ["many", "1.5", "K", "inf", "1e400", ""])
def test_what_is_no_count_is_refused(text):
    assert "--eval_tokens" in flags_refusal("--eval_tokens", text)


def test_accumulation_and_total_batch_complete_each_other():
    assert (parse().gradient_accumulation, parse().total_batch_size) == (1, 16)
    assert parse("--total_batch_size", 64).gradient_accumulation == 4
    assert parse("--gradient_accumulation", 3, world_size=2).total_batch_size == 96
    assert parse("--total_batch_size", 64, "--gradient_accumulation", 2, world_size=2).gradient_accumulation == 2


def test_a_total_batch_that_does_not_divide_is_refused():
    expected = "--total_batch_size 500 is not a multiple of --batch_size 16 x 1 process. Try 496 or 512."
    assert flags_refusal("--total_batch_size", 500) == expected
    assert flags_refusal("--total_batch_size", 8).endswith("Try 16.")
    assert "x 2 processes. Try 32 or 64." in flags_refusal("--total_batch_size", 48, world_size=2)
    assert "it is 4" in flags_refusal("--total_batch_size", 64, "--gradient_accumulation", 3)


def test_single_gpu_means_one_process():
    assert parse("--single_gpu").single_gpu
    assert "--nproc_per_node 1" in flags_refusal("--single_gpu", world_size=2)


def test_training_tokens_are_counted_in_tokens():
    """The reference divides tokens by sequences. 1M tokens are 15 updates of 256 x 256, the rest is left."""
    args = parse("--max_train_tokens", "1M", "--total_batch_size", 256, "--max_length", 256)
    assert args.num_training_steps == 1_000_000 // (256 * 256) == 15
    assert "one update alone takes 4096 tokens" in flags_refusal("--max_train_tokens", "4K")


def test_the_schedule_is_completed_and_checked():
    assert parse("--num_training_steps", 50).warmup_steps == 5
    assert parse("--num_training_steps", 100_000).warmup_steps == 1000
    assert schedule_of(parse("--warmup_steps", 7))["warmup_steps"] == 7
    assert "--warmup_steps" in flags_refusal("--num_training_steps", 5, "--warmup_steps", 6)
    assert "--cycle_length" in flags_refusal("--scheduler", "cosine_restarts")


@pytest.mark.parametrize(
    "flag, value",
    [
        ("rank", 0),
        ("rank", -4),
        ("lr", -0.1),
        ("lr", 0),
        ("lr", "nan"),
        ("batch_size", 0),
        ("max_length", 0),
        ("num_training_steps", 0),
        ("update_proj_gap", 0),
        ("galore_scale", "inf"),
        ("matrix_lr_ratio", 0),
        ("weight_decay", -1),
        ("grad_clipping", "nan"),
        ("beta1", 1.0),
        ("workers", -1),
        ("eval_every", 0),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range_are_refused(flag, value):
    assert flags_refusal(f"--{flag}", value).startswith(f"--{flag} {value if value != 0 else ''}".rstrip())


def test_unknown_names_are_refused_with_the_known_ones():
    assert "Did you mean galore_adamw? Known: adam, adamw" in flags_refusal("--optimizer", "galore_adam")
    assert "std" in flags_refusal("--proj_type", "middle")
    assert "--learning_rate" in flags_refusal("--learning_rate", 1)
    assert "--lr" in flags_refusal("--lr", "fast")
    with pytest.raises(UserError, match="--batch_size"):
        parse_args(["--model_config", "x.json"])


def ignored(*flags) -> list[str]:
    return [f"{flag} {why}" for flag, why in sorted(parse("--optimizer", *flags).ignored.items())]


def test_flags_without_effect_are_known_with_what_is_in_their_way():
    assert ignored("adamw", "--rank", 4, "--beta2", 0.9) == ["--rank with --optimizer adamw"]
    assert ignored("adam8bit", "--log_details") == ["--log_details with --optimizer adam8bit"]
    assert ignored("sgd", "--beta1", 0.9, "--beta2", 0.9) == ["--beta2 with --optimizer sgd"]
    assert ignored("GaLore_AdamW", "--rank", 4) == []
    assert ignored("adamw", "--proj_bits", 4, "--proj_reg", 0) == [
        "--proj_bits with --optimizer adamw",
        "--proj_reg with --optimizer adamw",
    ]
    assert ignored("galore_adamw", "--proj_bits", 4, "--queue_size", 3) == [
        "--proj_bits without --proj_quant",
        "--queue_size without --cos_threshold",
    ]
    online = ("galore_lion", "--proj_type", "continuous_lion", "--proj_lr", 0.01, "--proj_reg", 0)
    assert ignored(*online) == [], "--proj_reg 0 is the reference's"
    assert ignored("galore_lion", *online[3:]) == ["--proj_lr with --proj_type std", "--proj_reg with --proj_type std"]
    assert ignored(*online, "--moments_on_refresh", "keep", "--cos_threshold", 0.4) == [
        "--cos_threshold with --proj_type continuous_lion",
        "--moments_on_refresh with --proj_type continuous_lion",
    ]
    assert ignored("q_galore_adamw8bit", "--proj_type", "random", "--subspace", "svd", "--gamma_proj", 3) == [
        "--gamma_proj with --proj_type random",
        "--subspace with --proj_type random",
    ]
    reference = "--proj_quant --proj_bits 4 --weight_quant --weight_bits 8 --stochastic_round --queue_size 5".split()
    assert ignored("q_galore_adamw8bit_per_layer", *reference) == []
    assert ignored("q_galore_adamw8bit", "--stochastic_round") == ["--stochastic_round without --weight_quant"]


def test_quantization_is_completed_and_checked():
    args = parse("--optimizer", "q_galore_adamw8bit", "--proj_quant")
    assert (args.proj_bits, args.cos_threshold, args.queue_size) == (4, 0.6, 5)
    assert parse("--optimizer", "q_galore_adamw8bit", "--cos_threshold", 0.4).cos_threshold == 0.4
    plain = parse("--optimizer", "galore_adamw")
    assert plain.proj_bits is None and plain.cos_threshold is None, "plain GaLore is never lazy unasked"
    assert "must be 4 or 8" in flags_refusal("--weight_bits", 6)
    assert "must be 4 or 8" in flags_refusal("--proj_bits", 3)
    assert "above 0, or -1" in flags_refusal("--weight_group_size", 0)
    assert "float32" in flags_refusal("--accumulation_dtype", "float16"), "not silently the model's"
    int8 = ("--optimizer", "q_galore_adamw8bit", "--weight_quant", "--int8_matmul", "all")
    assert parse(*int8).weight_group_size == -1
    assert "leave out --weight_group_size 64" in flags_refusal(*int8, "--weight_group_size", 64)
    assert "8-bit codes" in flags_refusal(*int8, "--weight_bits", 4)
    assert "8-bit codes" in flags_refusal(*int8, "--simulation")
    assert "torch's own optimizers cannot write quantized weights" in flags_refusal(
        "--weight_quant", "--optimizer", "adamw"
    )


def test_a_residual_is_recovered_only_where_that_is_possible():
    fira = ("--residual", "fira", "--optimizer")
    assert parse(*fira, "q_galore_adamw8bit_per_layer").residual == "fira"
    assert parse(*fira, "adamw").ignored == {"--residual": "with --optimizer adamw"}
    assert "only *galore_adamw* and *galore_muon* can" in flags_refusal(*fira, "galore_lion")
    assert "--proj_type full" in flags_refusal(*fira, "galore_adamw", "--proj_type", "full")
    accumulated = (*fira, "galore_adamw_per_layer", "--gradient_accumulation", 4)
    assert "Take --accumulate_on host, --optimizer galore_adamw, or one micro-batch" in flags_refusal(*accumulated)


def test_names_follow_from_the_rest():
    assert (parse().tokenizer, parse("--dataset", "pydocs").tokenizer) == ("t5-base", "pydocs")
    assert parse("--dataset", "pydocs", "--tokenizer", "x.model").tokenizer == "x.model"
    assert parse("--unset_wandb").wandb_mode == "disabled"
    assert parse("--optimizer", "adamw").name == "llama_9m-adamw"


def test_flags_that_may_change_are_named_with_blanks_or_without():
    assert parse("--allow_changed", "lr, seed").allow_changed == "lr,seed"
    assert flags_refusal("--allow_changed", "lr, sed").startswith("--allow_changed sed: there is no flag")


def test_resume_auto_needs_a_folder_to_look_into():
    assert "--resume auto needs --save_dir" in flags_refusal("--resume", "auto")
    assert parse("--resume", "auto", "--save_dir", "runs/x").resume == "auto"


def test_the_page_of_all_flags_is_fresh():
    """docs/flags.md is what `python -m peft_pretraining.cli.flags` prints."""
    assert (ROOT / "docs" / "flags.md").read_text() == reference_page()


@pytest.mark.parametrize("flag", ["continue_from", "validation", "save_dir", "tokenizer"])
def test_an_empty_path_is_a_slip(flag):
    """As by --continue_from "$FORGOTTEN", which must not begin a new run."""
    assert flags_refusal(f"--{flag}", "") == f"--{flag} is empty: give it a value, or leave it out."
