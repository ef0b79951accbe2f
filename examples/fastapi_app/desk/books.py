"""The books: what the service's ledger and the app's journal say, read past the faults, and whether they balance."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from .untraced import untraced

TENANT = "demo"

PAGE = 200
MAX_ENTRIES = 200_000
"""Of a ledger longer than that the books are not read."""

FRESH_S = 0.25
"""Who asks within that long gets what was read just now."""

TIMEOUT_S = 3.0

Entry = Mapping[str, Any]


class Unreadable(Exception):
    """The service gives no answer, or the journal cannot be read."""


class Books:
    """Reads the ledger by the service's API, and the journal as `metered-billing charges` does.

    Args:
        url: The service's own, not the proxy's.
        token: An admin's.
        journal: The app's journal.
        transport: Instead of the network.
    """

    def __init__(
        self, url: str, token: str, journal: Path, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._client = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=TIMEOUT_S,
            trust_env=False,
            transport=transport,
        )
        self._journal = journal
        self._entries: list[Entry] = []
        self._turn = asyncio.Lock()
        self._read: tuple[float, dict[str, Any] | None] = (float("-inf"), None)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def now(self) -> dict[str, Any] | None:
        """The books of all users; None while the service is not running."""
        async with self._turn:
            read_at, books = self._read
            if time.monotonic() - read_at < FRESH_S:
                return books
            try:
                entries, balances = await self._consistent()
                charges = await asyncio.to_thread(count_charges, self._journal)
            except Unreadable:
                books = None
            else:
                books = {"tenant": TENANT, **balance_of(entries, balances), **charges}
            self._read = (time.monotonic(), books)
            return books

    async def statement(self, user_id: str) -> dict[str, Any]:
        """Every entry of a user's account, the newest first.

        Raises:
            Unreadable: The service gives no answer.
        """
        async with self._turn:
            entries = await self._refresh()
            own = [entry for entry in entries if entry["user_id"] == user_id]
            return {"user_id": user_id, "balance": await self._balance(user_id), "entries": own}

    async def _consistent(self) -> tuple[Sequence[Entry], dict[str, int]]:
        """The entries, and balances that were asked for while none was added."""
        for _ in range(3):
            entries = list(await self._refresh())
            users = dict.fromkeys(str(entry["user_id"] or "") for entry in reversed(entries))
            balances = {user: await self._balance(user) for user in users}
            if len(await self._refresh()) == len(entries):
                return entries, balances
        # They keep coming: what the ledger wrote into the last entry of each is as of that entry.
        newest = {str(entry["user_id"] or ""): int(entry["balance"]) for entry in reversed(entries)}
        return entries, newest

    async def _refresh(self) -> Sequence[Entry]:
        """All entries; a ledger only grows, so no more is fetched than was added."""
        known = self._entries[0]["id"] if self._entries else None
        new: list[Entry] = []
        cursor: dict[str, str] = {}
        while True:
            page = await self._get("/v1/transactions", {"tenant_id": TENANT, "limit": str(PAGE), **cursor})
            for entry in page["items"]:
                if entry["id"] == known:
                    self._entries[:0] = new
                    return self._entries
                new.append(entry)
            if page["next_cursor"] is None:
                self._entries = new  # another ledger, if there had been one
                return self._entries
            if len(new) > MAX_ENTRIES:
                raise Unreadable("the ledger is too long to be shown")
            cursor = {"cursor": page["next_cursor"]}

    async def _balance(self, user_id: str) -> int:
        return int((await self._get("/v1/balance", {"tenant_id": TENANT, "user_id": user_id}))["balance"])

    async def _get(self, path: str, params: dict[str, str]) -> dict[str, Any]:
        try:
            answer = await self._client.get(path, params=params, headers=untraced())
            answer.raise_for_status()
            body: dict[str, Any] = answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise Unreadable("the credits service gives no answer") from error
        return body


def balance_of(entries: Iterable[Entry], balances: Mapping[str, int]) -> dict[str, Any]:
    """What was granted, deducted and returned, by user, and whether that is what they have.

    Args:
        entries: All there are.
        balances: By user, as the service says by itself.
    """
    moved: dict[str, Counter[str]] = {user: Counter() for user in balances}
    left: Counter[str] = Counter()
    for entry in entries:
        kind, amount = entry["kind"], int(entry["amount"])
        of_user = moved.setdefault(str(entry["user_id"] or ""), Counter())
        if kind == "grant":
            of_user["granted"] += amount
        elif kind == "deduction":
            of_user["deducted"] -= amount
            left[entry["id"]] -= amount
        else:
            of_user["returned"] += amount
            left[entry["transaction_id"]] -= amount
    overdrawn = {transaction for transaction, amount in left.items() if amount < 0}
    too_much = {str(entry["user_id"] or "") for entry in entries if entry["transaction_id"] in overdrawn}
    users = [
        {
            "user_id": user,
            "balance": balances.get(user, 0),
            **{word: counts[word] for word in ("granted", "deducted", "returned")},
            "balanced": user not in too_much
            and counts["granted"] - counts["deducted"] + counts["returned"] == balances.get(user, 0),
        }
        for user, counts in moved.items()
    ]
    return {"users": users, "balanced": all(user["balanced"] for user in users)}


def count_charges(journal: Path) -> dict[str, Any]:
    """How many charges in a journal are not final, by their state, and how many are disputed.

    Raises:
        Unreadable: It cannot be read.
    """
    from metered_billing.charge import State  # only here: it takes half a second, and nobody has asked before
    from metered_billing.journal import JournalError
    from metered_billing.journal.reading import SqliteReader, Wanted

    if not journal.is_dir():
        return {"unsettled": {}, "disputed": 0}
    try:
        with SqliteReader(journal) as reader:
            states = Counter(str(seen.record.state) for seen in reader.charges(Wanted(unsettled=True)))
            disputed = sum(1 for _ in reader.charges(Wanted(states=frozenset({State.DISPUTED}))))
    except JournalError as error:
        raise Unreadable(str(error)) from error
    return {"unsettled": dict(states), "disputed": disputed}
