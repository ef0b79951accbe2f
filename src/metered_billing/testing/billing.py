"""What a test of a metered app has in its hands: a credits service, what goes wrong with it, and what came of it."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import httpx

from metered_billing.charge import Account
from metered_billing.testing.apps import Apps, run
from metered_billing.testing.client import App, client_of, needs_asyncio
from metered_billing.testing.door import Door, Switch
from metered_billing.testing.entries import Entry, entry_of, totals_of
from metered_billing.testing.faults import Fault, Operation
from metered_billing.testing.story import differences, story, told
from metered_billing.testing.wire import Call, Request, Wire


class Billing:
    """A credits service for one test, and every metered app of this process billed at it.

    The fixtures `billing`, `billing_service` and `billing_server` are this, and `metered_billing.testing.in_memory()`
    and its like make one where there are no fixtures.

    Whatever asserts waits until refunds and voids have gone through. On a running event loop it cannot: there it
    says so, and `await billing.settled()` comes first.

    Attributes:
        url: The service's.
        token: The app's: it moves credits of all tenants.
        admin_token: Grants.
    """

    def __init__(
        self, url: str, token: str, admin_token: str, *, wire: Wire, door: Door, apps: Apps, switch: Switch
    ) -> None:
        self.url = url
        self.token = token
        self.admin_token = admin_token
        self._wire = wire
        self._door = door
        self._apps = apps
        self._switch = switch
        self._tenants: dict[str, None] = {}
        self._settled_after: int | None = None

    # Accounts.

    def grant(self, tenant_id: str, amount: int, *, user_id: str | None = None) -> None:
        """Put credits into an account: of a user, or the tenant's shared pool."""
        self._tenants[tenant_id] = None
        body = {**_account(tenant_id, user_id), "amount": amount, "reason": "test"}
        self._ask("POST", "/v1/grants", body)

    def balance(self, tenant_id: str, user_id: str | None = None) -> int:
        """What an account holds at this moment, in credits."""
        balance: int = self._ask("GET", "/v1/balance?" + urlencode(_account(tenant_id, user_id)))["balance"]
        return balance

    def entries(self, tenant_id: str, user_id: str | None = None) -> list[Entry]:
        """What has happened to an account so far, oldest first, in the service's ledger."""
        account = Account(tenant_id, user_id)  # or it says what is wrong with them
        return [entry for entry in self._all_entries([account.tenant_id]) if entry.user_id == account.user_id]

    @property
    def calls(self) -> Sequence[Call]:
        """The deductions, refunds and voids that were asked for, in their order, and what was answered."""
        return self._wire.calls

    # What goes wrong.

    def fail_next(self, operation: Operation, fault: Fault, times: int = 1, *, optional: bool = False) -> None:
        """Let something go wrong with the next operations of this kind, behind what is planned already.

        An operation that comes in a batch meets it too. One that nobody meets fails the test at its end.

        Args:
            operation: `deduct`, `refund` or `void`.
            fault: One of `metered_billing.testing.FAULTS`.
            optional: Nobody has to meet it.

        Raises:
            ValueError: There is no such operation or fault, or it cannot happen to this one, or here.
        """
        __tracebackhide__ = True
        self._switch.check(fault)
        self._wire.plan.add(operation, fault, times, optional=optional)

    def fail_always(self, operation: Operation, fault: Fault, *, optional: bool = False) -> None:
        """Let it go wrong with all operations of this kind, until `up()`."""
        __tracebackhide__ = True
        self._switch.check(fault)
        self._wire.plan.add(operation, fault, None, optional=optional)

    def down(self) -> None:
        """Let no call get through, until `up()`."""
        self._switch.down()

    def up(self) -> None:
        """Let calls get through again: what `down()` and `fail_always()` began is over."""
        self._wire.plan.come_up()
        self._switch.up()

    # Waiting.

    async def settled(self) -> None:
        """Return when all is settled that can be: refunds and voids have gone through, and late copies have arrived.

        What waits for its next attempt does not wait here. What cannot go through (the service is down, say) is left.
        """
        needs_asyncio()
        await self._apps.settle(self._wire.plan)
        while late := self._wire.late():
            for fate in late:
                if fate.request is not None:
                    fate.answer(await self._door.answer_soon(fate.request))
            await self._apps.settle(self._wire.plan)
        self._settled_after = len(self._wire.calls)

    def client(
        self,
        app: App,
        *,
        base_url: str = "http://testserver",
        headers: Mapping[str, str] | None = None,
        raise_app_exceptions: bool = True,
    ) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        """A client of an app, between its start-up and its shutdown; after each answer it waits for `settled()`.

        Args:
            raise_app_exceptions: What the app raises, raise here; else it is answered 500, as a server would.
        """
        return client_of(
            app, self.settled, base_url=base_url, headers=headers, raise_app_exceptions=raise_app_exceptions
        )

    # What came of it.

    def assert_charged(
        self, tenant_id: str, user_id: str | None = None, *, kept: int, refunded: int = 0, charges: int = 1
    ) -> None:
        """The account was charged so often, and of what was deducted so much was kept and so much came back.

        A deduction that was voided is a charge of which everything came back.
        """
        __tracebackhide__ = True
        self._settle("assert_charged")
        totals = totals_of(self._entries_of_known(tenant_id, user_id))
        if (totals.kept, totals.refunded, totals.charges) != (kept, refunded, charges):
            self._fail(
                f"{told(tenant_id, user_id)} should have been charged {charges} x, {kept} kept and {refunded} refunded;"
                f" it was charged {totals.charges} x, {totals.kept} kept and {totals.refunded} refunded",
                tenant_id,
            )

    def assert_not_charged(self, tenant_id: str, user_id: str | None = None) -> None:
        """Nothing was kept of the account's credits: nothing was deducted, or everything has come back.

        It fails for an account that was neither granted credits nor asked for any: nobody could have charged it.
        """
        __tracebackhide__ = True
        self._settle("assert_not_charged")
        totals = totals_of(self._entries_of_known(tenant_id, user_id))
        if totals.kept:
            self._fail(f"{told(tenant_id, user_id)} should not have paid; {totals.kept} credits were kept", tenant_id)

    def assert_balanced(self) -> None:
        """Every credit is where it belongs, in all accounts.

        Balances add up; no more came back than was deducted; no key was used twice; nothing is pending; and each charge
        has in the service's ledger just what the app has on record.
        """
        __tracebackhide__ = True
        self._settle("assert_balanced")
        wrong = differences(self._all_entries(), self._apps.records())
        if wrong:
            self._fail("the books are not balanced:" + "".join(f"\n  - {each}" for each in wrong))

    def assert_all_met(self) -> None:
        """Everything that was to go wrong has gone wrong. The fixtures ask for it at the end of a test that passed."""
        __tracebackhide__ = True
        self._settle("assert_all_met")
        left = self._wire.plan.left()
        if left:
            self._fail("nobody met what was to go wrong:" + "".join(f"\n  - {each}" for each in left))

    def story(self, tenant_id: str | None = None) -> str:
        """What there is to tell of a tenant's accounts, or of all: entries, calls, and what is unsettled.

        Of a tenant without entries there is nothing to tell: it may be another that was meant.
        """
        entries = (self._all_entries([tenant_id]) if tenant_id is not None else []) or self._all_entries()
        return story(entries, self._wire.calls, self._apps.records(unsettled=True), self._wire.plan.remaining())

    async def aclose(self) -> None:
        """Let go of what is on this event loop; an `async with` block does it at its end."""
        await self._apps.aclose()

    # Below.

    def _fail(self, what: str, tenant_id: str | None = None) -> None:
        __tracebackhide__ = True
        raise AssertionError(f"{what}\n\n{self.story(tenant_id)}")

    def _entries_of_known(self, tenant_id: str, user_id: str | None) -> list[Entry]:
        """An account's entries. One without any must at least have been asked for credits: else its name is wrong."""
        __tracebackhide__ = True
        if entries := self.entries(tenant_id, user_id):
            return entries
        known = [(entry.tenant_id, entry.user_id) for entry in self._all_entries()]
        known += [(call.tenant_id, call.user_id) for call in self._wire.calls if call.tenant_id is not None]
        known += [(record.account.tenant_id, record.account.user_id) for record in self._apps.records()]
        if (tenant_id, user_id) not in known:
            others = ", ".join(told(*account) for account in dict.fromkeys(known)) or "none"
            self._fail(
                f"{told(tenant_id, user_id)} was neither granted credits nor asked for any; the accounts that were:"
                f" {others}",
                tenant_id,
            )
        return entries

    def _settle(self, wanted: str) -> None:
        __tracebackhide__ = True
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._apps.settle_idle(self._wire.plan)
            run(self.settled())
            return
        tried = self._settled_after == len(self._wire.calls)
        if self._apps.in_flight or self._wire.has_late or (not tried and self._apps.records(unsettled=True)):
            raise AssertionError(
                f"refunds are still under way, and {wanted} cannot wait for them on a running event loop:"
                " write `await billing.settled()` before it"
            )

    def _all_entries(self, tenants: Sequence[str] | None = None) -> list[Entry]:
        """The entries of these tenants, or of all that were ever mentioned, oldest first."""
        if tenants is None:
            named = (call.tenant_id for call in self._wire.calls if call.tenant_id is not None)
            tenants = list(self._tenants | dict.fromkeys(named))
        entries: list[Entry] = []
        for tenant_id in tenants:
            query = {"tenant_id": tenant_id, "limit": "1000"}
            while True:
                page = self._ask("GET", "/v1/transactions?" + urlencode(query))
                entries += map(entry_of, page["items"])
                if page["next_cursor"] is None:
                    break
                query["cursor"] = page["next_cursor"]
        return sorted(entries, key=lambda entry: entry.id)

    def _ask(self, method: str, target: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"authorization": f"Bearer {self.admin_token}"}
        if body is not None:
            headers |= {"content-type": "application/json", "idempotency-key": f"test-{uuid4()}"}
        content = b"" if body is None else json.dumps(body).encode()
        response = self._door.answer(Request(method, target, headers, content))
        answer = json.loads(response.body)
        if response.status >= 400:
            raise ValueError(answer["detail"])
        return answer


def _account(tenant_id: str, user_id: str | None) -> dict[str, str]:
    Account(tenant_id, user_id)  # or it says what is wrong with them
    return {"tenant_id": tenant_id} | ({} if user_id is None else {"user_id": user_id})
