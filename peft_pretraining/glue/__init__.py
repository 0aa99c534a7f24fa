"""Fine-tuning for classification: `python -m peft_pretraining.run_glue`, with the flags of GaLore's script."""
