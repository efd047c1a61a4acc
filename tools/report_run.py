"""Write the report of a run as one HTML page that needs no network: what it is, how it went, where its time went.

    python tools/report_run.py runs/toy                                    # writes runs/toy/report.html
    python tools/report_run.py runs/a runs/b --output comparison.html      # several runs beside each other
    python tools/report_run.py runs/toy --text                             # facts, time and events on the console

The run may be at work, killed or finished; nothing of it is changed. docs/report.md says what each figure means.
Exit code 2: a folder that is no run's, or a file that cannot be written.
"""

import argparse
import sys
from pathlib import Path

from k2_megatron.runtime.tool import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (RUN/report.html; of several, comparison.html here)"
    )
    parser.add_argument("--text", action="store_true", help="print facts, time and events, and write no page")
    options = parser.parse_args()
    return run_tool("report_run", lambda: report(options))


def report(options: argparse.Namespace) -> int:
    from k2_megatron.report.write import report_text, write_report

    if options.text:
        if options.output:
            raise ValueError("--text writes no page: leave out --output, or redirect what is printed")
        print(report_text(options.runs))
        return 0
    print(write_report(options.runs, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
