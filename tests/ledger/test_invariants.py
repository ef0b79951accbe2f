"""Whatever is asked of the ledger, in whatever order: its books add up, and it keeps its word."""

import asyncio
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from metered_billing.ledger import Answer, Command, Deduct, Grant, Ledger, Refund, Void
from tests.postgres import no_tables

pytestmark = pytest.mark.no_cover

TENANTS = st.sampled_from(["acme", "globex"])
USERS = st.sampled_from([None, "alice", "bob"])
KEYS = st.sampled_from([f"key-{number}" for number in range(12)])
AMOUNTS = st.integers(1, 40)

grants = st.builds(
    Grant, idempotency_key=KEYS, tenant_id=TENANTS, user_id=USERS, amount=AMOUNTS, reason=st.just("test")
)
deductions = st.builds(Deduct, idempotency_key=KEYS, tenant_id=TENANTS, user_id=USERS, amount=AMOUNTS)
voids = st.builds(Void, idempotency_key=KEYS, tenant_id=TENANTS, user_id=USERS)


class Books(RuleBasedStateMachine):
    """Random commands, singly, together and repeated, over few keys so that they collide."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.ledger = Ledger(self.place())
        self.transactions: list[str] = ["unknown"]
        self.answered: list[tuple[Command, Answer]] = []

    def place(self) -> str:
        """Where an empty ledger is to be."""
        return f"sqlite:///{self.directory}/credits.db"

    def teardown(self) -> None:
        self.loop.run_until_complete(self.ledger.close())
        self.loop.close()
        shutil.rmtree(self.directory)

    def note(self, command: Command, answer: Answer) -> None:
        assert answer.status in (200, 201, 402, 404, 409, 422)
        if isinstance(command, Deduct) and answer.status == 201:
            self.transactions.append(answer.body["transaction_id"])
        if answer.status in (200, 201, 402):
            self.answered.append((command, answer))

    def ask(self, command: Command) -> None:
        self.note(command, self.loop.run_until_complete(self.ledger.decide(command)))

    @rule(command=grants | deductions | voids)
    def one(self, command: Command) -> None:
        self.ask(command)

    @rule(data=st.data(), key=KEYS, amount=AMOUNTS)
    def refund(self, data: st.DataObject, key: str, amount: int) -> None:
        transaction = data.draw(st.sampled_from(self.transactions))
        self.ask(Refund(idempotency_key=key, transaction_id=transaction, amount=amount, reason="test"))

    @rule(commands=st.lists(grants | deductions | voids, max_size=6))
    def batch(self, commands: list[Command]) -> None:
        answers = self.loop.run_until_complete(self.ledger.batch(commands))
        for command, answer in zip(commands, answers, strict=True):
            assert isinstance(answer, Answer)
            self.note(command, answer)

    @rule(commands=st.lists(deductions | voids, max_size=6))
    def together(self, commands: list[Command]) -> None:
        async def ask() -> list[Answer]:
            return await asyncio.gather(*(self.ledger.decide(command) for command in commands))

        for command, answer in zip(commands, self.loop.run_until_complete(ask()), strict=True):
            self.note(command, answer)

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        """What was answered is answered the same for ever."""
        if self.answered:
            command, answer = data.draw(st.sampled_from(self.answered))
            again = self.loop.run_until_complete(self.ledger.decide(command))
            assert again.body == answer.body
            assert again.status == (402 if answer.status == 402 else 200)
            assert again.replayed or isinstance(command, Void)

    @rule()
    def reopen(self) -> None:
        self.loop.run_until_complete(self.ledger.close())

    @invariant()
    def adds_up(self) -> None:
        """The entries' sum is the balance, and no deduction gave back more than it took."""
        for tenant in ("acme", "globex"):
            page = self.loop.run_until_complete(self.ledger.transactions(tenant, limit=1000))
            sums: dict[str | None, int] = defaultdict(int)
            left: dict[str, int] = defaultdict(int)
            for entry in reversed(page.items):
                sums[entry["user_id"]] += entry["amount"]
                assert entry["balance"] == sums[entry["user_id"]] >= 0
                if entry["kind"] != "grant":
                    left[entry["transaction_id"]] += entry["amount"]
                    assert left[entry["transaction_id"]] <= 0
            for user in (None, "alice", "bob"):
                assert self.loop.run_until_complete(self.ledger.balance(tenant, user)) == sums[user]


TestBooks = Books.TestCase
TestBooks.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.slow
def test_books_on_postgresql(pg_shared: str) -> None:
    """The same there."""

    class PostgresBooks(Books):
        def place(self) -> str:
            no_tables(pg_shared)
            return pg_shared

    run_state_machine_as_test(PostgresBooks, settings=settings(TestBooks.settings, max_examples=10))
