"""Tables (Markdown) and plots (SVG and PNG) from folders of results; the README's are made by it.

Writes report.md and, with matplotlib (pip install 'quest-compile[plots]'), plots into each folder.
With --accuracy, results of quest-compile eval (its --out folder or the results.json in it): right
answers too, against budgets and times.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from quest_compile.bench import parsers
from quest_compile.bench.report.document import document, with_tables
from quest_compile.bench.results import load_results

EVAL_RESULTS = "results.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Write reports; print them too."""
    parser = parsers.report()
    args = parser.parse_args(argv)
    if not args.folders and args.readme is None:
        parser.error("expected folders of results, or --readme")
    accuracy = args.accuracy
    if accuracy is not None and accuracy.is_dir():
        accuracy /= EVAL_RESULTS
    if accuracy is not None and not (args.folders and accuracy.is_file()):
        parser.error(
            "--accuracy takes a results.json of quest-compile eval, or the folder that has it, "
            f"beside folders of bench results; got {args.accuracy}"
        )
    for folder in args.folders:
        _check_folder(folder)
        plots = [] if args.no_plots else _plots(folder, accuracy)
        text = document(folder, plots, accuracy)
        (folder / "report.md").write_text(text, encoding="utf-8")
        print(text)
    if args.readme is not None:
        text = args.readme.read_text(encoding="utf-8")
        args.readme.write_text(with_tables(text), encoding="utf-8")
        print(f"wrote the tables of {args.readme}")
    return 0


def _check_folder(folder: Path) -> None:
    """
    Raises:
        ValueError: no folder of bench results.
    """
    expected = "expected a folder of bench results (made with --output or --record)"
    if (folder / EVAL_RESULTS).is_file():
        raise ValueError(
            f"{expected}, got {folder}, which quest-compile eval wrote: its report is results.md "
            f"there; plots of its answers beside times: bench report DIR --accuracy {folder}"
        )
    if not folder.is_dir():
        raise ValueError(f"{expected}, got {folder}, which is no folder")


def _plots(folder: Path, accuracy: Path | None) -> list[str]:
    try:
        from quest_compile.bench.report.accuracy import load_answers, write_accuracy_plots
        from quest_compile.bench.report.plots import write_plots
    except ImportError as error:
        print(
            f"no plots: {error} (pip install 'quest-compile[plots]', or --no-plots)",
            file=sys.stderr,
        )
        return []
    results = load_results(folder)
    plots = write_plots(results, folder)
    if accuracy is not None:
        plots += write_accuracy_plots(load_answers(accuracy), results, folder)
    return plots
