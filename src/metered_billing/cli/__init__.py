"""The command line: `metered-billing serve`, `grant`, `balance`, `transactions`. Needs extra `service`."""

import sys

EXTRA = ("typer", "rich", "fastapi", "uvicorn")


def main() -> None:
    """Run a command and leave: 0 it is done, 1 it failed or was refused, 2 it was asked for wrongly."""
    try:
        from metered_billing.cli.commands import app
        from metered_billing.cli.failure import Failure
        from metered_billing.cli.terminal import complain
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in EXTRA:
            raise
        sys.stderr.write(
            f"The command line needs {error.name}, which is not installed. "
            "Install it with: pip install 'metered-billing[service]'\n"
        )
        sys.exit(1)
    try:
        app()
    except Failure as failure:
        complain(str(failure))
        sys.exit(failure.exit_code)
