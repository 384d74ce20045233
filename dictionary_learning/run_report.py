"""What a finished sweep leaves for its reader: an analysis of the dictionaries worth reading, and `report.html`.

In: the folder of a run that has been evaluated, and its model. Out: `analysis/` and `report.html` beside the summary.
The run is complete before this begins: what fails here is said, with the command that does it again, and changes
neither the run nor its exit code. An analysis that its user made is left as it is, and the report tells of it.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from dictionary_learning.config import RunConfig
from dictionary_learning.errors import UserError, plain

log = logging.getLogger("dictionary_learning")

TOKENS_AN_EVAL_TOKEN = 4  # the analysis reads more than the evaluation: rare latents need it


def again(save_dir: Path) -> str:
    """The command line that makes analysis and report of a run."""
    folder = shlex.quote(str(save_dir))
    return f"sae-factory analyze {folder} && sae-factory report {folder}"


def report_run(config: RunConfig, save_dir: Path, lm: Any, device: str) -> str:
    """Analyse the run's dictionaries that are worth reading (`summary.worth_reading`) and write its report. The name of
    the signal that ended it, else ""."""
    from dictionary_learning.analysis.folder import INFO, AnalysisFolder
    from dictionary_learning.analysis.job import Stopped, analyze
    from dictionary_learning.analysis.one_pass import Measures
    from dictionary_learning.report import write_report
    from dictionary_learning.summary import read_summary, worth_reading

    folder = shlex.quote(str(save_dir))
    try:
        there = AnalysisFolder(save_dir / "analysis")
        if (there.path / INFO).is_file() and not there.info.get("automatic"):
            print(f"The report takes the analysis that is there (another: sae-factory analyze {folder} --overwrite).")
        else:
            names = sorted(row["trainer"] for row in worth_reading(read_summary(save_dir / "summary.csv")))
            print(f"Analysing {', '.join(names)} for the report (all of them: sae-factory analyze {folder}).")
            analyze(
                save_dir,
                dictionaries=names,
                measures=Measures(tokens=TOKENS_AN_EVAL_TOKEN * config.eval_tokens),
                device=device,
                overwrite=True,
                state_every=0,
                automatic=True,
                lm=lm,
            )
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"Stopped in the analysis; the run is complete. Its report can be made with:\n  {again(save_dir)}")
        return getattr(stop, "reason", "SIGINT")
    except UserError as error:
        log.warning("The run was not analysed: %s", plain(str(error)))
    except Exception as error:  # a report must not make a finished run a failed one
        why = plain(f"{type(error).__name__}: {error}")
        log.warning("The run was not analysed (%s); again with: %s", why, again(save_dir))
    try:
        print(f"The report: {write_report(save_dir)}")
    except Exception as error:
        log.warning("The report was not written (%s); again with: sae-factory report %s", plain(str(error)), folder)
    return ""
