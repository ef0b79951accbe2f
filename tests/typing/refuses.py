"""Wrong uses, each refused by a type checker. Checked by `mypy --strict`, never run.

An ignore that is not needed is an error, so every one of these lines proves that it is.
"""

from metered_billing import (
    Account,
    HttpCredits,
    MeteredBillingMiddleware,
    Settings,
    SqlCredits,
    current_charge,
    metered,
)
from metered_billing.testing import Billing


@metered(cost=1)
async def endpoint(n: int) -> str:
    return str(n)


async def app() -> None: ...


# Prices.
metered()  # type: ignore[call-arg]
metered(cost="1")  # type: ignore[arg-type]
metered(cost=1.5)  # type: ignore[arg-type]
metered(cost=None)  # type: ignore[arg-type]
metered(cost=lambda: "x")  # type: ignore[arg-type, return-value]
metered(cost=lambda: {"a": "x"})  # type: ignore[arg-type, return-value]
metered(cost=1, price=lambda: None)  # type: ignore[arg-type, return-value]
metered(cost=1, account=lambda: "acme")  # type: ignore[arg-type, return-value]
metered(cost=1, price="2")  # type: ignore[arg-type]
metered(cost=1, price=0.5)  # type: ignore[arg-type]
metered(cost={"a": 1})  # type: ignore[arg-type]
metered(1, 2)  # type: ignore[call-arg]
metered(cost=1, max_units="10")  # type: ignore[arg-type]

# Words.
metered(cost=1, on_disconnect="forget")  # type: ignore[arg-type]
metered(cost=1, on_unavailable="allow")  # type: ignore[arg-type]
metered(cost=1, outcome="$.results[*]")  # type: ignore[call-arg]
metered(cost=1, outcomes=5)  # type: ignore[arg-type]
metered(cost=1, account=Account("acme"))  # type: ignore[arg-type]

# What is no endpoint.
metered(cost=1)(5)  # type: ignore[call-overload]


# The endpoint's own parameters.
async def result() -> int:
    await endpoint("1")  # type: ignore[arg-type]
    await endpoint()  # type: ignore[call-arg]
    await endpoint(m=1)  # type: ignore[call-arg]
    endpoint(1)  # type: ignore[unused-coroutine]
    return await endpoint(1)  # type: ignore[return-value]


# Accounts.
Account(5)  # type: ignore[arg-type]
Account()  # type: ignore[call-arg]
Account("acme", 5)  # type: ignore[arg-type]
Account("acme", user="ann")  # type: ignore[call-arg]
Account("acme").tenant_id = "other"  # type: ignore[misc]

# The charge.
current_charge().fail(2)  # type: ignore[arg-type]
current_charge().fail(units="2")  # type: ignore[arg-type]
amount = current_charge().amount  # type: ignore[attr-defined]
current_charge().transaction_id = "x"  # type: ignore[misc]
current_charge().transaction_id.upper()  # type: ignore[union-attr]

# The middleware and the clients.
MeteredBillingMiddleware()  # type: ignore[call-arg]
MeteredBillingMiddleware(app)  # type: ignore[arg-type]
MeteredBillingMiddleware(app, credits=5)  # type: ignore[arg-type]
HttpCredits()  # type: ignore[call-arg]
HttpCredits("https://credits.internal", "token")  # type: ignore[call-arg]
HttpCredits("https://credits.internal", token=5)  # type: ignore[arg-type]
HttpCredits("https://credits.internal", timeout="5")  # type: ignore[call-arg]
SqlCredits(5)  # type: ignore[arg-type]
Settings(credits=5)  # type: ignore[arg-type]


# The test kit.
def test_route(billing: Billing) -> None:
    billing.fail_next("deduct", "lost replay")  # type: ignore[arg-type]
    billing.fail_next("grant", "503")  # type: ignore[arg-type]
    billing.grant("acme")  # type: ignore[call-arg]
    billing.assert_charged("acme")  # type: ignore[call-arg]
    billing.assert_charged("acme", 8, 2)  # type: ignore[call-arg, arg-type]
    billing.settled()  # type: ignore[unused-coroutine]
