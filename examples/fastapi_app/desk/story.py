"""A trace's story: the questions that customers and people on call ask, answered from its spans alone."""

from collections.abc import Iterator
from typing import Any

from .spans import Span
from .traces import (
    AMOUNT,
    BALANCE,
    CUT_OUT,
    ERROR,
    ITEMS,
    KEPT,
    LEDGER,
    NOT_SENT,
    OUTCOME,
    PREFIX,
    REASON,
    RECOVER,
    REFUND,
    REFUNDED,
    RESEND,
    STATE,
    STATUS,
    TRIES,
    VOID,
    Facts,
)

COST = "What did this request cost?"
FAILED = "What failed?"
CAME_BACK = "What came back?"
RETRIED = "Was it retried?"
WHOM = "Whom was it charged to?"
WHY = "Why did it get {}?"
LATER = "Was it settled by another process later?"
BELONGS = "What does this belong to?"


def story(facts: Facts) -> list[dict[str, str]]:
    """Questions and answers, in the order in which they are asked."""
    return [{"question": question, "answer": answer} for question, answer in _told(facts)]


def _told(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.charge is None and facts.deduct is None:
        yield from _of_later_work(facts) if facts.recover or facts.refunds or facts.voids else _of_no_charge(facts)
        return
    yield COST, _cost(facts)
    yield FAILED, _failed(facts)
    yield CAME_BACK, _came_back(facts)
    yield RETRIED, _retried(facts)
    yield WHOM, _whom(facts)
    if facts.status is not None and facts.status >= 400:
        yield WHY.format(facts.status), _why(facts)
    yield LATER, _settled_later(facts)


# A request without a charge, and what is done for a charge after its request.


def _of_no_charge(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.entry is None and not facts.ledger:
        unknown = "Not known: "
        yield (
            COST,
            unknown
            + ("the process died before it said." if facts.died else "it is still running, and has not said yet."),
        )
        return
    grant = next((span for span in facts.ledger if span.name == LEDGER + "grant"), None)
    if grant is not None:
        yield COST, f"Nothing: it granted {_credits(grant.get(AMOUNT))} to {_account(facts)}."
        return
    yield COST, "Nothing: it was never charged."
    if facts.status is not None and facts.status >= 400:
        why = {
            401: "It came without a token that somebody has.",
            422: "What it asked for could not be read. That is found out before anything is charged.",
        }.get(facts.status, "It was answered before the price of anything was known.")
        yield WHY.format(facts.status), why


def _of_later_work(facts: Facts) -> Iterator[tuple[str, str]]:
    first = facts.recover or (*facts.refunds, *facts.voids)[0]
    request = facts.any_of(PREFIX + "request.id")
    named = f", request {request}" if request else ""
    yield (
        BELONGS,
        f"Charge {facts.any_of(PREFIX + 'charge.id')}{named}: {_credits(facts.any_of(AMOUNT))}"
        f" of {_account(facts)}. The link leads to its deduction.",
    )
    yield CAME_BACK, _later_work(list(_work(facts)), facts) or _unfinished(facts)
    yield RETRIED, _retried(facts)
    yield LATER, f"Yes, by this one: {first.process}."


# A request with a charge.


def _cost(facts: Facts) -> str:
    charge, amount = facts.charge, facts.any_of(AMOUNT)
    if charge is None:
        if (done := _later_work(facts.later, facts)) is not None:
            return f"Nothing. {_credits(amount)} were to be deducted before the work began; later: {done}"
        return f"Not known yet: its price was {_credits(amount)}, and no outcome is on record."
    outcome = charge.get(OUTCOME)
    if outcome == "not run":
        if facts.deduct is not None and facts.deduct.get(OUTCOME) == "declined":
            return f"Nothing: its price was {_credits(amount)}, and the account did not hold that."
        return f"Nothing: its price was {_credits(amount)}, and the route did not run." + _undone(facts)
    kept, refunded = int(charge.get(KEPT) or 0), int(charge.get(REFUNDED) or 0)
    if outcome == "disputed":
        return f"{_credits(kept)}, for now: it is disputed, and a person has to look."
    if outcome in ("journal", "ownership_lost"):
        return f"Not known: its outcome could not be put on record. {_credits(amount)} were deducted."
    if refunded == 0:
        return f"{_credits(kept)}, deducted before the work began. All of it succeeded."
    return f"{_credits(kept)}: {amount} deducted before the work began, {refunded} given back."


def _failed(facts: Facts) -> str:
    pictures = {
        str(span.get("demo.image.id")): str(span.get("demo.image.error"))
        for span in facts.pictures
        if span.get("demo.image.status") == "failed"
    }
    items = [str(item) for span in facts.refunds for item in span.get(ITEMS) or ()]
    names = list(dict.fromkeys(items)) or list(pictures)
    told = [f"{name} ({pictures[name]})" if pictures.get(name) else name for name in names]
    reason = next((str(span.get(REASON)) for span in facts.refunds if span.get(REASON)), None)
    if facts.charge is not None and facts.charge.get(OUTCOME) == "not run":
        what = facts.deduct
        if what is not None and what.get(OUTCOME) == "declined":
            return "Nothing broke: the account held too little."
        return f"The deduction: {_silence(facts)}. So nothing of what was paid for was begun."
    if facts.charge is None and facts.died:
        return f"The process: {_where_it_died(facts)}"
    if facts.charge is None:
        return "Nothing so far." if not told else f"So far: {', '.join(told)}."
    parts = [", ".join(told)] if told else []
    if reason and reason != "failed items":
        parts.append(f"the whole request ({reason})")
    refunded = int(facts.charge.get(REFUNDED) or 0)
    if not parts and refunded:
        parts.append(_credits(refunded) + " worth of it")
    return f"{'; '.join(parts)}." if parts else "Nothing."


def _came_back(facts: Facts) -> str:
    charge = facts.charge
    done = [text for text in map(_refund, facts.refunds) if text]
    if charge is not None and charge.get(OUTCOME) == "not run":
        if facts.deduct is not None and facts.deduct.get(OUTCOME) == "declined":
            return "Nothing had been taken."
        later = _later_work(_work(facts), facts)
        if later is None and _nothing_sent(facts):
            return "Nothing had been taken: no attempt ever reached the service."
        return later or "Not yet: the deduction is to be voided, as soon as the service answers."
    later = _later_work(facts.later, facts)
    if done or later:
        return " ".join([*done, *([later] if later else [])])
    if charge is None:
        return _unfinished(facts)
    if not int(charge.get(REFUNDED) or 0):
        return "Nothing: there was nothing to give back."
    return (
        f"{_credits(charge.get(REFUNDED))} are due back, and on record in the journal; the refund is not through yet."
    )


def _refund(span: Span) -> str | None:
    if span.get(OUTCOME) == "ok":
        reason = span.get(REASON)
        why = f" ({reason})" if reason and reason != "failed items" else ""
        return f"{_credits(span.get(REFUNDED))}, against the same transaction{why}."
    if span.get(OUTCOME) == "unanswered":
        return f"Attempt {span.get(TRIES) or 1} at the refund got no answer ({span.message}); it is on record."
    return f"The refund ended as {span.get(OUTCOME)}: {span.message}." if span.get(OUTCOME) else None


def _retried(facts: Facts) -> str:
    attempts = facts.attempts_of(facts.deduct)
    asked_again = any(span.get(RESEND) for span in attempts)
    replayed = [span for span in facts.ledger if span.get(PREFIX + "replayed")]
    parts = []
    if asked_again:
        parts.append(f"Yes: {len(attempts)} attempts at the deduction, under one key ({_each(attempts)}).")
    for span in (*facts.refunds, *facts.voids):
        tries = int(span.get(TRIES) or 1)
        if tries > 1:
            parts.append(f"{'Yes: a' if not parts else 'A'}ttempt {tries} at the {span.name.removeprefix(PREFIX)}.")
    parts += [
        f"The {name} was asked for more than once under the same key, and took effect once."
        for name in dict.fromkeys(span.name.removeprefix(LEDGER) for span in replayed)
    ]
    if parts:
        return " ".join(parts)
    return "No: one attempt was enough." if facts.attempts else "No."


def _whom(facts: Facts) -> str:
    transaction = facts.any_of(PREFIX + "transaction.id")
    request = facts.any_of(PREFIX + "request.id")
    told = f"{_account(facts)}, {f'as transaction {transaction}' if transaction else 'without a transaction'}"
    return f"{told}; request {request}." if request else f"{told}."


def _why(facts: Facts) -> str:
    deduct, status = facts.deduct, facts.status
    price = _credits(facts.any_of(AMOUNT))
    if status == 402:
        balance = deduct.get(BALANCE) if deduct is not None else None
        held = f"the account held {balance}" if balance is not None else "the account held less"
        return f"It costs {price}, and {held}. Nothing was taken, and nothing ran."
    if deduct is not None and deduct.get(OUTCOME) not in (None, "ok"):
        return f"The deduction was not confirmed: {_silence(facts)}. Nothing ran."
    if facts.charge is not None and facts.charge.get(OUTCOME) == "not run":
        return "Its deduction could not be put on record here. Nothing ran."
    raised = facts.entry.get(ERROR) if facts.entry is not None else None
    if status is not None and status >= 500:
        return f"The route raised {raised}." if raised and not str(raised).isdecimal() else "The route answered that."
    return "The route answered that."


def _settled_later(facts: Facts) -> str:
    own = (facts.charge or facts.deduct or facts.spans[0]).process
    done = facts.later
    if not done:
        if facts.charge is None and facts.died:
            return "Not yet: the next process that recovers will do it."
        if facts.charge is not None and _pending(facts):
            return "Not yet: what is due is on record, and recovery does it."
        return f"No: {own} did all of it." if facts.charge is not None else f"No: {own} is at work on it."
    last = done[-1]
    # What the spans of one recovery share.
    by = list(dict.fromkeys(span.process for span in done))
    how = _later_work(done, facts) or "it is not through yet."
    if by == [own]:
        return f"By the same process ({own}), in the background, after the answer: {how}"
    return (
        f"Yes: by {' and '.join(by)}, while the request was served by {own}{_state(done)}: {how} ({_ago(facts, last)})"
    )


# Pieces of sentences.


def _work(facts: Facts) -> list[Span]:
    """What was done for the charge, here and in other traces."""
    return [*filter(None, (facts.recover,)), *facts.refunds, *facts.voids, *facts.later]


def _later_work(work: list[Span], facts: Facts) -> str | None:
    """What refunds and voids came to; None while none has gone through."""
    for span in work:
        if span.get(OUTCOME) != "ok":
            continue
        if span.name == REFUND:
            return f"{_credits(span.get(REFUNDED))} came back by a refund."
        if span.name == VOID:
            voided, took = span.get(PREFIX + "voided"), facts.voided() or facts.took()
            voided = took if voided is None else voided
            if voided == 0:
                return "the deduction was voided; it had not happened, and is refused should it arrive late."
            back = f", and its {_credits(voided)} came back" if voided else ""
            return f"the deduction was voided{back}."
    waiting = [span for span in work if span.name in (REFUND, VOID)]
    if waiting:
        last = waiting[-1]
        return (
            f"attempt {last.get(TRIES) or 1} at the {last.name.removeprefix(PREFIX)} got no answer"
            f" ({last.message or last.get(OUTCOME)}); it is tried again."
        )
    return "it was taken up by recovery." if any(span.name == RECOVER for span in work) else None


def _unfinished(facts: Facts) -> str:
    if facts.died:
        return "Nothing yet: what was deducted is on record in the journal, and comes back by recovery."
    return "Nothing yet: it is still running."


def _undone(facts: Facts) -> str:
    if _nothing_sent(facts):
        return " No attempt ever reached the service."
    return f" What the service may have taken: {done}" if (done := _later_work(_work(facts), facts)) else ""


def _pending(facts: Facts) -> bool:
    charge, deduct = facts.charge, facts.deduct
    if charge is None:
        return True
    if charge.get(OUTCOME) == "not run":
        if deduct is not None and deduct.get(OUTCOME) in ("declined", "notsent"):
            return False
        return not any(span.get(OUTCOME) == "ok" for span in facts.voids)
    return charge.get(OUTCOME) == "refunding" and not any(span.get(OUTCOME) == "ok" for span in facts.refunds)


def _nothing_sent(facts: Facts) -> bool:
    attempts = facts.attempts_of(facts.deduct)
    return facts.deduct is not None and not any(span.get(ERROR) not in NOT_SENT for span in attempts)


def _silence(facts: Facts) -> str:
    """Why a deduction was not confirmed, attempt by attempt."""
    deduct, attempts = facts.deduct, facts.attempts_of(facts.deduct)
    reason = (deduct.get(REASON) or deduct.message or deduct.get(OUTCOME)) if deduct is not None else "unknown"
    if not attempts:
        if deduct is not None and deduct.get(OUTCOME) == "journal":
            return "the journal could not be written, so nothing was sent"
        return f"nothing was sent ({reason})"
    said = f"{len(attempts)} attempt{'s' if len(attempts) > 1 else ''} ({_each(attempts)})"
    return f"{said}, then the circuit was open" if "circuit open" in str(reason) else said


def _each(attempts: list[Span]) -> str:
    return "; ".join(f"{number}. {_attempt(span)}" for number, span in enumerate(attempts, 1))


def _attempt(span: Span) -> str:
    status, error = span.get(STATUS), span.get(ERROR)
    if isinstance(status, int):
        return f"answered {status}"
    if error in NOT_SENT:
        return f"not sent: {error}"
    took_s = (span.end_ns - span.start_ns) / 1e9
    if "Timeout" in str(error):
        return f"no answer within {took_s:.1f} s"
    return f"answer lost: {error}" if error else "answered"


def _where_it_died(facts: Facts) -> str:
    own = (facts.deduct or facts.spans[0]).process
    pictures = len(facts.pictures)
    at_work = f", with {pictures} picture{'s' if pictures != 1 else ''} done" if pictures else ""
    return f"{own} died before the answer{at_work}. Its spans that had not ended died with it."


def _state(done: list[Span]) -> str:
    found = next((span.get(STATE) for span in done if span.name == RECOVER and span.get(STATE)), None)
    return f", which left the charge {found}" if found else ""


def _ago(facts: Facts, last: Span) -> str:
    return f"{max(last.end_ns - facts.ended_ns, 0) / 1e9:.1f} s after the last of this trace"


def _account(facts: Facts) -> str:
    tenant, user = facts.any_of(PREFIX + "tenant.id"), facts.any_of(PREFIX + "user.id")
    return f"{tenant}/{user}" if user else f"{tenant}'s shared pool"


def _credits(amount: Any) -> str:
    return f"{amount} credit" if amount == 1 else f"{amount} credits"


__all__ = ["CUT_OUT", "story"]
