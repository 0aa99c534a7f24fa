"""A page after a run: `python -m peft_pretraining.report RUN [RUN ...] -o report.html`, and SAVE_DIR/report.html."""
