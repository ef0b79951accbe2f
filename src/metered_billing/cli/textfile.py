"""Numbers for Prometheus in a file, as node_exporter's textfile collector reads them.

A run that ends before anybody could scrape it leaves its numbers there, with the time they are of.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from metered_billing.cli.failure import Failure

DIFFERENCES = "metered_billing_reconcile_differences"
ATTENTION = "metered_billing_reconcile_attention"
CHARGES = "metered_billing_reconcile_charges"
TRANSACTIONS = "metered_billing_reconcile_transactions"
TIMESTAMP = "metered_billing_reconcile_timestamp_seconds"

HELP: Mapping[str, str] = {
    DIFFERENCES: "Differences between the journal and the credits service",
    ATTENTION: "Charges for somebody to see to",
    CHARGES: "Charges that were compared",
    TRANSACTIONS: "Transactions of the credits service that were compared",
    TIMESTAMP: "When the comparison was begun",
}
"""Every metric of `reconcile`, and what it counts. All are gauges."""

JOURNAL = "metered_billing_journal"
"""The label: which journal. Two files of one directory must not have the same series."""


def write(path: Path, journal: str, values: Mapping[str, float]) -> None:
    """Write the file as a whole, or leave it as it is: a collector may read it at any moment.

    Raises:
        Failure: It cannot be written.
    """
    if not path.name:
        raise Failure("--metrics names no file.", 2)
    # What a link points to is what somebody reads.
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():  # a device, say: renamed over, /dev/null would be a file
        raise Failure(f"--metrics: {path} is no file.")
    # The collector reads what ends in `.prom`: this does not.
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(_text(journal, values), encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise Failure(f"--metrics: {path} cannot be written: {error.strerror}.") from None


def _text(journal: str, values: Mapping[str, float]) -> str:
    place = journal.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for name, value in values.items():
        lines += [f"# HELP {name} {HELP[name]}.", f"# TYPE {name} gauge", f'{name}{{{JOURNAL}="{place}"}} {value}']
    return "\n".join([*lines, ""])
