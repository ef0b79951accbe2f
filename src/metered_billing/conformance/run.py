"""Running the checks: an account to run them on, one after the other, and everything given back."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import httpx

from metered_billing.bounds import HOUR_S, number
from metered_billing.charge import Account
from metered_billing.conformance.bench import Bench, Broken, Lost, Misread, NotTried, Prevented, Silent
from metered_billing.conformance.checks import CHECKS, NEEDED, Check
from metered_billing.conformance.mapped import MappedBench
from metered_billing.conformance.mapped_checks import checks_of
from metered_billing.conformance.report import Outcome, Report, Result
from metered_billing.credits.contract import Contract
from metered_billing.runtime import new_uuid7

AT_MOST = 10_000
"""The most that an account of one's own may hold: a customer's is no place to try things."""

MAX_SILENT = 3
"""After so many checks in a row without an answer the rest is not tried: a service that hangs costs no hours."""

MEND = (
    "This is the mapping's, not the service's: mend it, and check again. In an app it is logged as "
    "`billing.misconfigured`, and nothing is confirmed by it."
)
"""What stands in place of a check's own words where the mapping raised, or read what is no answer."""

SHOWN = 12
"""How many calls of a check a report shows: the last ones."""


class CannotCheck(Exception):
    """The checks cannot begin: why, in a sentence. `asked_wrongly`: for what was asked, not for what was answered."""

    def __init__(self, sentence: str, *, asked_wrongly: bool = False) -> None:
        super().__init__(sentence)
        self.asked_wrongly = asked_wrongly


async def check_service(
    url: str,
    *,
    token: str,
    admin_token: str | None = None,
    tenant_id: str | None = None,
    user_id: str | None = None,
    foreign_token: str | None = None,
    timeout_s: float = 5.0,
    transport: httpx.AsyncBaseTransport | None = None,
    on_start: Callable[[str, int], None] = lambda account, held: None,
    on_result: Callable[[Result], None] = lambda result: None,
    checks: Sequence[Check] | None = None,
    contract: Contract | None = None,
) -> Report:
    """Hold the service at `url` to the credits API.

    With an admin token the checks get a fresh account, and a grant for it: of a fresh tenant, or of a fresh
    user where `tenant_id` is given. Without one they use the account that is given, and give everything back.

    Args:
        token: The app's.
        foreign_token: One of another tenant, which must not reach the account.
        timeout_s: What one call may take in all.
        on_start: Hears whose credits are used, and how many the account holds.
        on_result: Hears of each check as it ends.
        contract: A user's own, for a service of another shape: all goes through it. It grants nothing.

    Raises:
        CannotCheck: There is no account to run them on, or no answer.
        ValueError: `timeout_s` cannot be right.
    """
    number("timeout_s", timeout_s, most=HOUR_S)
    run_id = f"conformance-{new_uuid7()}"
    if contract is not None and (admin_token is not None or tenant_id is None):
        raise CannotCheck(
            "a mapping cannot grant: give a tenant that holds credits, and no admin token", asked_wrongly=True
        )
    if tenant_id is None:
        if admin_token is None:
            raise CannotCheck("there is no account: give an admin token, or a tenant", asked_wrongly=True)
        if user_id is not None:
            raise CannotCheck("a user belongs to a tenant: give both", asked_wrongly=True)
        account = Account(run_id)
    else:
        try:
            account = Account(tenant_id, run_id if admin_token is not None and user_id is None else user_id)
        except ValueError as error:
            raise CannotCheck(str(error), asked_wrongly=True) from None
    async with _client(url, transport) as client:
        if contract is None:
            bench = Bench(
                client,
                account,
                prefix=run_id,
                token=token,
                admin_token=admin_token,
                foreign_token=foreign_token,
                timeout_s=timeout_s,
            )
        else:
            bench = _mapped(client, account, contract, run_id, token, foreign_token, timeout_s)
        if checks is None:
            checks = CHECKS if contract is None else checks_of(contract)
        held = await _prepare(bench)
        on_start(in_words(account), held)
        results = await _run_all(bench, checks, held, on_result)
        kept: int | None = None
        with contextlib.suppress(Broken):
            kept = held - await bench.balance()
    return Report(url, in_words(account), results, kept, contract is not None)


def _mapped(
    client: httpx.AsyncClient,
    account: Account,
    contract: Contract,
    prefix: str,
    token: str,
    foreign_token: str | None,
    timeout_s: float,
) -> MappedBench:
    try:
        return MappedBench(
            client, account, contract, prefix=prefix, token=token, foreign_token=foreign_token, timeout_s=timeout_s
        )
    except Broken as error:
        raise CannotCheck(str(error), asked_wrongly=True) from None


def in_words(account: Account) -> str:
    """An account for people."""
    return f"{account.tenant_id} / {account.user_id}" if account.user_id else f"{account.tenant_id} (shared pool)"


@contextlib.asynccontextmanager
async def _client(url: str, transport: httpx.AsyncBaseTransport | None) -> AsyncIterator[httpx.AsyncClient]:
    try:
        # Credits do not travel through whatever proxy the environment names. Each call has its own time limit.
        client = httpx.AsyncClient(base_url=url, timeout=None, trust_env=False, transport=transport)  # noqa: S113
    except httpx.InvalidURL:
        raise CannotCheck("the URL is none", asked_wrongly=True) from None
    if client.base_url.scheme not in ("http", "https") or not client.base_url.host:
        raise CannotCheck("the URL must begin with http:// or https:// and name a host", asked_wrongly=True)
    if client.base_url.userinfo or client.base_url.fragment or "?" in url:
        # The report shows the URL.
        raise CannotCheck("the URL must have no user, no query and no fragment", asked_wrongly=True)
    async with client:
        yield client


async def _prepare(bench: Bench) -> int:
    """See to it that the account holds what is needed. Returns what it holds."""
    try:
        if bench.admin_token is not None:
            reply = await bench.grant(NEEDED)
            if reply.status not in (200, 201):
                raise CannotCheck(
                    f"the grant was answered {reply}: an admin token is needed, or an account that exists"
                )
        held = await bench.balance()
    except Broken as error:
        raise CannotCheck(str(error)) from None
    if held < NEEDED:
        raise CannotCheck(f"the account {in_words(bench.account)} holds {held} credits, and {NEEDED} are needed")
    if held > AT_MOST:
        raise CannotCheck(
            f"the account {in_words(bench.account)} holds {held:,} credits, which the checks would use for moments: "
            f"give them an account of at most {AT_MOST:,} that nobody else uses",
            asked_wrongly=True,
        )
    return held


async def _run_all(
    bench: Bench, checks: Sequence[Check], held: int, on_result: Callable[[Result], None]
) -> list[Result]:
    results: list[Result] = []
    silent, stopped = 0, ""
    for check in checks:
        if check.needs and getattr(bench, check.needs) is None:
            continue
        if stopped:
            result = Result(check, Outcome.NOT_TRIED, stopped, prevented=True)
        else:
            await _top_up(bench, held)
            result, heard = await run_check(check, bench)
            silent = 0 if heard else silent + 1
            if silent >= MAX_SILENT:
                stopped = "the service has stopped answering"
            elif (
                result.outcome is Outcome.BROKEN
                and result.kept > 0
                and not bench.gives_back
                and bench.admin_token is None
            ):
                # Others take all that the account holds.
                stopped = "nothing that was taken came back"
        results.append(result)
        on_result(result)
    return results


async def _top_up(bench: Bench, held: int) -> None:
    """Make good what a broken service has kept, lest one breakage hide behind another."""
    if bench.admin_token is None:
        return
    with contextlib.suppress(Broken):
        short = held - await bench.balance()
        if short > 0:
            await bench.grant(short)


async def run_check(check: Check, bench: Bench) -> tuple[Result, bool]:
    """Run one check, and give back what it took. Returns its result, and whether the service answered."""
    bench.exchanges.clear()
    heard, prevented, kept = True, False, 0
    before: int | None = None
    try:
        before = await bench.balance()
        if before < NEEDED:
            raise Prevented(f"the account holds {before} credits by now, and {NEEDED} are needed")
        await check.run(bench)
        outcome, came = Outcome.HELD, ""
    except NotTried as why:
        outcome, came, prevented = Outcome.NOT_TRIED, str(why), isinstance(why, Prevented)
    except Broken as what:
        outcome, came, heard = Outcome.BROKEN, str(what), not isinstance(what, Silent)
        check = replace(
            check,
            fatal=check.fatal or isinstance(what, Lost),
            without=MEND if isinstance(what, Misread) else check.without,
        )
    finally:
        exchanges = tuple(bench.exchanges[-SHOWN:])
        if before is not None:
            with contextlib.suppress(Broken):
                kept = -await bench.give_back(before)
    return Result(check, outcome, came, exchanges, prevented, kept), heard
