"""Draw how a charge flows, for README and docs/explanation/flow.md.

python docs/make_flow.py
"""

from pathlib import Path

from drawing.sequence import Synced, Tell, draw

from metered_billing.charge import State

DOCS = Path(__file__).parent

PICTURES = DOCS / "pictures"


def pictures() -> dict[str, str]:
    """Name of the file, and what is in it."""
    return {"flow.svg": _flow(), "flow-short.svg": _short()}


def _flow() -> str:
    client, middleware, decorator, route, journal, credits_ = who = (
        *("client", "middleware", "decorator", "your route"),
        *("journal", "credits"),
    )
    return draw(
        "A request of ten items, two of which fail, from its price to its refund",
        who,
        [
            Tell(client, middleware, "request"),
            Tell(middleware, decorator, "routed, validated"),
            Tell(decorator, decorator, "cost, price, account"),
            Tell(decorator, journal, f"{State.OPENED}: 10 credits"),
            Synced(journal, "synced to disk"),
            Tell(decorator, credits_, "deduct 10, key: the charge's id"),
            Tell(credits_, decorator, "confirmed", reply=True),
            Tell(decorator, route, "run"),
            Tell(decorator, journal, f"{State.DEDUCTED}, where it takes a while"),
            Tell(route, middleware, "2 of 10 failed", reply=True),
            Tell(middleware, journal, f"{State.REFUNDING} 2"),
            Synced(journal, "synced to disk"),
            Tell(middleware, client, "the last byte", reply=True),
            Tell(middleware, credits_, "refund 2, key: the charge's id + “:refund”"),
            Tell(credits_, middleware, "confirmed", reply=True),
            Tell(middleware, journal, str(State.SETTLED)),
        ],
    )


def _short() -> str:
    client, app, journal, credits_ = who = ("client", "your app", "journal", "credits")
    return draw(
        "Ten images, two of which fail",
        who,
        [
            Tell(client, app, "ten images"),
            Tell(app, journal, f"{State.OPENED}: 10 credits"),
            Tell(app, credits_, "deduct 10"),
            Tell(credits_, app, "transaction", reply=True),
            Tell(app, app, "the route runs: 8 succeed, 2 fail"),
            Tell(app, journal, "outcome: 2 to refund"),
            Tell(app, client, "200: 10 deducted, 2 refunded", reply=True),
            Tell(app, credits_, "refund 2, until it has gone through"),
        ],
    )


if __name__ == "__main__":
    for name, drawn in pictures().items():
        (PICTURES / name).write_text(drawn, encoding="utf-8")
