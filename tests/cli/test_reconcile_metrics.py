"""`reconcile --metrics`: numbers for node_exporter's textfile collector."""

import os
import re
import stat
import time
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from metered_billing.cli import textfile
from tests.cli.test_reconcile import JOURNAL, LEDGER, tampered, used
from tests.docs.pages import DOCS

FILE = Path("metered_billing.prom")


def numbers() -> dict[str, float]:
    """What a collector reads in it."""
    families = list(text_string_to_metric_families(FILE.read_text(encoding="utf-8")))
    assert all(family.type == "gauge" for family in families)
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["metered_billing_journal"] for sample in samples} == {str(JOURNAL.absolute())}
    return {sample.name: sample.value for sample in samples}


def test_numbers_of_books_that_agree(run: Any) -> None:
    """All of them, and no draft is left beside the file; whoever collects may read it."""
    used()
    before = time.time()
    assert run("reconcile", "--metrics", str(FILE), CREDITS=LEDGER).code == 0
    found = numbers()
    assert before - 1 < found.pop(textfile.TIMESTAMP) < time.time()
    assert found == {
        textfile.DIFFERENCES: 0,
        textfile.ATTENTION: 0,
        textfile.CHARGES: 3,
        textfile.TRANSACTIONS: 3,
    }
    assert [path.name for path in Path().glob("*.prom*")] == [FILE.name]
    assert not list(Path().glob(".*.tmp"))
    assert stat.S_IMODE(FILE.stat().st_mode) & 0o400


def test_differences_are_written_before_the_command_complains(run: Any) -> None:
    """Exit code 3 keeps no number from its file."""
    used()
    tampered("DELETE FROM entries WHERE kind = 'refund'")
    done = run("reconcile", "--metrics", str(FILE), CREDITS=LEDGER)
    assert done.code == 3
    assert numbers()[textfile.DIFFERENCES] == 1


def test_what_cannot_be_read_leaves_the_file_to_grow_old(run: Any) -> None:
    """Neither a service that does not answer nor a corrupt file of the journal makes fresh numbers."""
    used()
    FILE.write_text("as it was")
    assert run("reconcile", "--metrics", str(FILE), CREDITS="http://127.0.0.1:1").code == 1
    (JOURNAL / "charges-1.db").write_bytes(b"rubbish" * 1_000)
    assert run("reconcile", "--metrics", str(FILE), CREDITS=LEDGER).code == 3
    assert FILE.read_text() == "as it was"


def test_file_that_cannot_be_written_is_a_sentence(run: Any) -> None:
    """Cron hears of it; what was found has been shown."""
    used()
    done = run("reconcile", "--metrics", "nowhere/x.prom", CREDITS=LEDGER)
    assert (done.code, done.out[:13]) == (1, "0 differences")
    assert done.err == "metered-billing: --metrics: nowhere/x.prom cannot be written: No such file or directory.\n"


def test_device_is_left_alone(run: Any) -> None:
    """Renamed over by root, /dev/null would be a file from then on."""
    used()
    os.mkfifo("pipe")
    done = run("reconcile", "--metrics", "pipe", CREDITS=LEDGER)
    assert (done.code, done.err) == (1, "metered-billing: --metrics: pipe is no file.\n")
    assert Path("pipe").is_fifo()


def test_link_is_followed(run: Any) -> None:
    """What it points to is what is collected."""
    used()
    FILE.symlink_to("real.prom")
    assert run("reconcile", "--metrics", str(FILE), CREDITS=LEDGER).code == 0
    assert FILE.is_symlink()
    assert numbers()[textfile.CHARGES] == 3


def test_empty_name_is_refused(run: Any) -> None:
    """It comes of a variable that is not set."""
    used()
    done = run("reconcile", "--metrics", "", CREDITS=LEDGER)
    assert (done.code, done.err) == (2, "metered-billing: --metrics names no file.\n")


def test_journal_with_quotes_in_its_name_is_still_a_label(tmp_path: Path) -> None:
    """As Prometheus' text format escapes it."""
    textfile.write(tmp_path / "x.prom", 'a"b\\c\nd', {textfile.CHARGES: 1})
    [family] = text_string_to_metric_families((tmp_path / "x.prom").read_text())
    assert family.samples[0].labels == {"metered_billing_journal": 'a"b\\c\nd'}


def test_metrics_are_on_the_page() -> None:
    """All of them, and no others."""
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(metered_billing_reconcile_\w+)` ", page, re.M)) == set(textfile.HELP)
