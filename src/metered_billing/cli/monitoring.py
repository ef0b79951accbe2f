"""`monitoring`: the dashboard and the alert rules that come with the package, written out."""

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from metered_billing.cli import terminal
from metered_billing.cli.failure import Failure

FILES = ("dashboard.json", "alerts.yml")

RUNBOOK = "docs/how-to/runbook"
"""Where the alerts' pages are in this project, and what their links begin with unless told otherwise."""


def monitoring(
    directory: Annotated[Path, typer.Argument(help="Where to. It is made if need be.")],
    runbook: Annotated[
        str, typer.Option(metavar="URL", help="Where your people find the runbook: alerts link to its pages.")
    ] = RUNBOOK,
) -> None:
    """Write out the Grafana dashboard and the Prometheus alert rules."""
    # It goes into YAML as it is.
    if not runbook or any(character.isspace() or character in "\"'#{}\\" for character in runbook):
        raise Failure("--runbook: a URL, without spaces, quotes, braces or #.", 2)
    shipped = resources.files("metered_billing") / "monitoring"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            text = (shipped / name).read_text(encoding="utf-8")
            text = text.replace(f"runbook_url: {RUNBOOK}/", f"runbook_url: {runbook.rstrip('/')}/")
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}.") from None
    terminal.say(f"{directory / FILES[0]}: for Grafana (Dashboards, New, Import)")
    terminal.say(f"{directory / FILES[1]}: for Prometheus (rule_files)")
