"""The adapters of a checkpoint as a folder of the package peft, without the weights that they stand on.

`PeftModel.from_pretrained(model, OUT)` puts them on any model with the weights that the run began with.
"""

from pathlib import Path

from peft_pretraining.checkpoint.files import CONFIG, Checkpoint, find_checkpoint
from peft_pretraining.checkpoint.tensor_file import write_tensors
from peft_pretraining.checkpoint.weights import is_transformers_folder, open_checkpoint
from peft_pretraining.errors import UserError
from peft_pretraining.export.folder import appearing
from peft_pretraining.export.model import args_of
from peft_pretraining.model.adapters import Adapters, is_factor, lora_config
from peft_pretraining.model.build import meta_model
from peft_pretraining.model.config import read_config

PREFIX = "base_model.model."  # of peft's names
FILE = "adapter_model.safetensors"


def export_adapters(checkpoint: Path, out: Path) -> None:
    """Writes adapter_config.json and the factors, in the dtype of training. `out` is complete or absent at any moment.

    checkpoint: a checkpoint, or a run's folder, whose newest checkpoint is taken.
    Raises UserError unless the factors of LoRA are all that the run has trained.
    """
    opened = Checkpoint.open(find_checkpoint(checkpoint)).verify()
    args = args_of(opened)
    adapters = Adapters.of(args)
    if adapters is None or adapters.kind != "lora" or not adapters.only:
        raise UserError(
            f"{opened.folder}: --adapters is for runs of --peft lora --freeze_others, which train nothing else. Leave "
            "it out for a model with everything merged."
        )
    weights = open_checkpoint(opened.folder)
    base = args.get("continue_from")
    config = lora_config(
        meta_model(read_config(opened.file(CONFIG))),
        adapters,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base if base and is_transformers_folder(base) else None,
    )
    names = {PREFIX + name.replace(".default.", "."): name for name in sorted(weights.names()) if is_factor(name)}
    with appearing(out) as folder:
        config.save_pretrained(folder)
        factors = {theirs: weights.read(ours) for theirs, ours in names.items()}
        write_tensors(folder / FILE, factors, read=factors.__getitem__, metadata={"format": "pt"})
