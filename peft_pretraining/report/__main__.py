"""`python -m peft_pretraining.report RUN [RUN ...] -o report.html`: the page of a run, or a comparison of several."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from peft_pretraining.errors import Parser, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2, after one line on stderr, for what the user can repair."""
    parser = Parser(prog="python -m peft_pretraining.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --save_dir of a run, or its metrics.jsonl")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    try:
        args = parser.parse_args(argv)
        _write([Path(run) for run in args.runs], Path(args.output))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(runs: list[Path], out: Path) -> None:
    if find_spec("matplotlib") is None:
        raise UserError("the pictures need matplotlib, which is not installed. Try: pip install matplotlib")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: there is no such folder. Make it, or give another -o FILE.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Give -o the name of a file, such as {out / 'report.html'}.")
    if out.resolve() in [(run / "metrics.jsonl" if run.is_dir() else run).resolve() for run in runs]:
        raise UserError(f"{out} is the record of a run. Give -o another name, such as {out.parent / 'report.html'}.")
    from peft_pretraining.report.page import write_report

    try:
        write_report(runs, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Give another -o FILE.") from None
    print(out)


if __name__ == "__main__":
    sys.exit(main())
