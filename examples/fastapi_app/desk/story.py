"""A trace's story: the questions that customers and people on call ask, answered from its spans alone."""

from collections.abc import Iterator, Sequence
from typing import Any

from .spans import Span
from .traces import (
    AMOUNT,
    BALANCE,
    CHARGE_ID,
    DEDUCT,
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
    REPLAYED,
    REQUEST_ID,
    RESEND,
    STATE,
    STATUS,
    TENANT_ID,
    TRANSACTION_ID,
    TRIES,
    USER_ID,
    VOID,
    Facts,
)

HOW_MANY = "How many requests are these?"
COST = "What did this request cost?"
FAILED = "What failed?"
CAME_BACK = "What came back?"
RETRIED = "Was it retried?"
WHOM = "Whom was it charged to?"
WHY = "Why did it get {}?"
LATER = "Was it settled by another process later?"
BELONGS = "What does this belong to?"

SHOWN_ITEMS = 20


def story(facts: Facts) -> list[dict[str, str]]:
    """Questions and answers, in the order in which they are asked."""
    return [{"question": question, "answer": answer} for question, answer in _told(facts)]


def _told(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.charge is None and facts.deduct is None and not facts.later:
        if facts.recover or facts.refunds or facts.voids:
            yield from _of_later_work(facts)
        else:
            yield from _of_no_charge(facts)
        return
    if (charges := len(facts.named(DEDUCT))) > 1:
        yield HOW_MANY, f"{charges}: their callers gave them one trace id. What follows is of the first."
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
    grant = next((span for span in facts.ledger if span.name == LEDGER + "grant"), None)
    if grant is not None:
        yield COST, f"Nothing: it granted {_credits(grant.get(AMOUNT))} to {_account(facts)}."
    elif facts.entry is None:
        why = "its process died before it said." if facts.died else "it is still running, and has not said yet."
        yield COST, f"Not known: {why}"
    else:
        yield COST, "Nothing: it was never charged."
    if facts.status is not None and facts.status >= 400:
        why = {
            401: "It came without a token that somebody has.",
            422: "What it asked for could not be read. That is found out before anything is charged.",
        }.get(facts.status, "It was answered before the price of anything was known.")
        yield WHY.format(facts.status), why


def _of_later_work(facts: Facts) -> Iterator[tuple[str, str]]:
    request = facts.any_of(REQUEST_ID)
    named = f" of request {request}" if request else ""
    yield (
        BELONGS,
        f"Charge {facts.any_of(CHARGE_ID)}{named}: {_credits(facts.any_of(AMOUNT))} of {_account(facts)}."
        " The link leads to its deduction.",
    )
    yield CAME_BACK, _came_of(_work(facts)) or "Nothing."
    yield RETRIED, _retried(facts)
    yield LATER, f"Yes, here: by {facts.own}{_found_in(_work(facts))}."


# A request with a charge.


def _cost(facts: Facts) -> str:
    charge, amount = facts.charge, facts.any_of(AMOUNT)
    if charge is None:
        if _is_back(facts.later):
            return f"Nothing: its price was {_credits(amount)}. {_came_of(facts.later)}"
        return f"Not known yet: its price is {_credits(amount)}, and no outcome is on record."
    outcome = charge.get(OUTCOME)
    if outcome == "not run":
        if _declined(facts):
            return f"Nothing: its price was {_credits(amount)}, and the account did not hold that."
        return f"Nothing: its price was {_credits(amount)}, and the route did not run."
    kept, refunded = int(charge.get(KEPT) or 0), int(charge.get(REFUNDED) or 0)
    if outcome == "disputed":
        return f"{_credits(kept)} for now: it is disputed, and a person has to look."
    if outcome in ("journal", "ownership_lost"):
        return f"Not known: {_credits(amount)} were deducted, and its outcome could not be put on record."
    if not kept:
        return f"Nothing: the {_credits(refunded)} that were deducted before the work began are given back."
    if not refunded:
        return f"{_credits(kept)}, deducted before the work began. All of it succeeded."
    return f"{_credits(kept)}: {amount} deducted before the work began, {refunded} given back."


def _failed(facts: Facts) -> str:
    charge = facts.charge
    if charge is not None and charge.get(OUTCOME) == "not run":
        if _declined(facts):
            return "Nothing broke: the account held too little."
        return f"The deduction: {_silence(facts)}. So nothing of what was paid for was begun."
    items = _failed_items(facts)
    if charge is None and facts.died:
        done = f" with {_count(len(facts.pictures), 'picture')} done" if facts.pictures else ""
        return f"Its process: {facts.own} died before the answer{done}. What had not ended left no span."
    if charge is None:
        return f"So far: {items}." if items else "Nothing so far."
    reason, refunded = charge.get(REASON), int(charge.get(REFUNDED) or 0)
    if reason is None:
        reason = next((span.get(REASON) for span in facts.refunds if span.get(REASON)), None)
    if refunded and reason and reason != "failed items":
        return f"All of it: {reason}." if not charge.get(KEPT) else f"{items or _credits(refunded)}: {reason}."
    if items or refunded:
        return f"{items or _credits(refunded) + ' worth of it'}."
    return "Nothing."


def _failed_items(facts: Facts) -> str:
    """The failed items by name, with what was wrong with them where the app's spans tell."""
    pictures = {
        str(span.get("demo.image.id")): str(span.get("demo.image.error"))
        for span in facts.pictures
        if span.get("demo.image.status") == "failed"
    }
    charged = [facts.charge, *facts.refunds]
    named = [str(item) for span in charged if span is not None for item in span.get(ITEMS) or ()]
    names = list(dict.fromkeys(named)) or list(pictures)
    shown = [f"{name} ({pictures[name]})" if pictures.get(name) else name for name in names[:SHOWN_ITEMS]]
    more = ["…"] if len(names) > SHOWN_ITEMS else []
    return ", ".join(shown + more)


def _came_back(facts: Facts) -> str:
    charge = facts.charge
    if charge is not None and charge.get(OUTCOME) == "not run":
        if _declined(facts):
            return "Nothing: nothing had been taken."
        if _nothing_sent(facts):
            return "Nothing: no attempt ever reached the service, so nothing had been taken."
        return _came_of(_work(facts)) or "Not known yet: the deduction is to be voided, as soon as the service answers."
    if told := _came_of(_work(facts)):
        return told
    if charge is None:
        if facts.died:
            return "Nothing yet: the charge is on record in the journal, and the next process gives it back."
        return "Nothing yet: it is still running."
    if not int(charge.get(REFUNDED) or 0):
        return "Nothing: there was nothing to give back."
    return f"Nothing yet: {_credits(charge.get(REFUNDED))} to come, on record in the journal."


def _retried(facts: Facts) -> str:
    attempts = facts.attempts_of(facts.deduct)
    parts: list[str] = []
    if any(span.get(RESEND) for span in attempts):
        parts.append(f"Yes: {len(attempts)} attempts at the deduction, under one key ({_each(attempts)}).")
    for name in (REFUND, VOID):
        tries = max((int(span.get(TRIES) or 1) for span in _work(facts) if span.name == name), default=1)
        if tries > 1:
            parts.append(f"{'The' if parts else 'Yes: the'} {name.removeprefix(PREFIX)} took {tries} attempts so far.")
    for name in dict.fromkeys(span.name for span in facts.ledger if span.get(REPLAYED)):
        asked = sum(1 for span in facts.ledger if span.name == name)
        what = name.removeprefix(LEDGER)
        parts.append(f"The service was asked for this {what} {_times(asked)} under the same key, and did it once.")
    return " ".join(parts) if parts else "No."


def _whom(facts: Facts) -> str:
    transaction, request = facts.any_of(TRANSACTION_ID), facts.any_of(REQUEST_ID)
    named = f"transaction {transaction}" if transaction else "no transaction is known"
    return f"{_account(facts)}; {named}; request {request}." if request else f"{_account(facts)}; {named}."


def _why(facts: Facts) -> str:
    deduct, status = facts.deduct, facts.status
    if status == 402:
        balance = deduct.get(BALANCE) if deduct is not None else None
        held = f"the account held {balance}" if balance is not None else "the account held less"
        return f"It costs {_credits(facts.any_of(AMOUNT))}, and {held}. Nothing was taken, and nothing ran."
    if deduct is not None and deduct.get(OUTCOME) not in (None, "ok"):
        return f"The deduction was not confirmed: {_silence(facts)}. Nothing ran."
    raised = facts.entry.get(ERROR) if facts.entry is not None else None
    if status is not None and status >= 500 and raised and not str(raised).isdecimal():
        return f"The route raised {raised}."
    return "That is what the route answered."


def _settled_later(facts: Facts) -> str:
    if not facts.later:
        if facts.charge is None:
            died = facts.died
            return "Not yet: the next process does it." if died else f"No: {facts.own} is at work on it."
        return "Not yet: what is due is on record, and recovery does it." if _pending(facts) else "No."
    by = list(dict.fromkeys(span.process for span in facts.later))
    told = _came_of(facts.later) or "It is not through yet."
    last = facts.later[-1]
    when = f"{max(last.end_ns - facts.ended_ns, 0) / 1e9:.1f} s later"
    if by == [facts.own]:
        return f"No: by the same one, {facts.own}, in the background, {when}. {told}"
    found = _found_in(facts.later)
    return f"Yes: by {' and '.join(by)}, {when}{found}. {facts.own} had served the request. {told}"


# What was done for the charge.


def _work(facts: Facts) -> list[Span]:
    """Refunds, voids and recoveries, here and in other traces."""
    return [*filter(None, (facts.recover,)), *facts.refunds, *facts.voids, *facts.later]


def _is_back(work: Sequence[Span]) -> bool:
    return any(span.name in (REFUND, VOID) and span.get(OUTCOME) == "ok" for span in work)


def _came_of(work: Sequence[Span]) -> str | None:
    """What refunds and voids came to, as a sentence; None where there were none."""
    for span in work:
        amount = int(span.get(REFUNDED) or 0)
        if span.get(OUTCOME) != "ok":
            continue
        if span.name == REFUND:
            reason = span.get(REASON)
            why = f": {reason}" if reason and reason != "failed items" else ""
            return f"{_credits(amount)}, by a refund against the same transaction{why}."
        if span.name == VOID and amount:
            return f"{_credits(amount)}: the deduction had happened, and was voided."
        if span.name == VOID:
            return "Nothing had been taken. The deduction is voided: should it still arrive, it is refused."
    waiting = [span for span in work if span.name in (REFUND, VOID)]
    if not waiting:
        return None
    last, what = waiting[-1], waiting[-1].name.removeprefix(PREFIX)
    if last.get(OUTCOME) == "unanswered":
        why = f" ({last.message})" if last.message else ""
        return f"Nothing yet: attempt {last.get(TRIES) or 1} at the {what} got no answer{why}. It is tried again."
    return f"Nothing: the {what} ended as {last.get(OUTCOME)} ({last.message})."


def _found_in(work: Sequence[Span]) -> str:
    """The state that recovery found the charge in."""
    found = next((span.get(STATE) for span in work if span.name == RECOVER and span.get(STATE)), None)
    return f", which found the charge {found}" if found else ""


def _pending(facts: Facts) -> bool:
    charge = facts.charge
    if charge is None:
        return True
    if charge.get(OUTCOME) == "not run":
        return not (_declined(facts) or _nothing_sent(facts) or _is_back(facts.voids))
    return charge.get(OUTCOME) == "refunding" and not _is_back(facts.refunds)


# The deduction.


def _declined(facts: Facts) -> bool:
    return facts.deduct is not None and facts.deduct.get(OUTCOME) == "declined" and facts.status in (402, None)


def _nothing_sent(facts: Facts) -> bool:
    return facts.deduct is not None and facts.deduct.get(OUTCOME) == "notsent"


def _silence(facts: Facts) -> str:
    """Why a deduction was not confirmed, attempt by attempt."""
    deduct, attempts = facts.deduct, facts.attempts_of(facts.deduct)
    reason = str((deduct.get(REASON) or deduct.message or deduct.get(OUTCOME)) if deduct is not None else "unknown")
    if attempts:
        said = f"{_count(len(attempts), 'attempt')} ({_each(attempts)})"
        return f"{said}, then the circuit was open" if "circuit open" in reason else said
    if reason == "circuit open":
        return "the circuit is open after earlier failures, so nothing was sent"
    return f"nothing was sent ({reason})"


def _each(attempts: Sequence[Span]) -> str:
    return "; ".join(f"{number}. {_attempt(span)}" for number, span in enumerate(attempts, 1))


def _attempt(span: Span) -> str:
    status, error = span.get(STATUS), span.get(ERROR)
    if isinstance(status, int):
        return f"answered {status}"
    if error in NOT_SENT:
        return f"not sent, {error}"
    if "Timeout" in str(error):
        return f"no answer within {(span.end_ns - span.start_ns) / 1e9:.1f} s"
    return f"answer lost, {error}" if error else "answered"


# Words.


def _account(facts: Facts) -> str:
    tenant, user = facts.any_of(TENANT_ID), facts.any_of(USER_ID)
    return f"{tenant}/{user}" if user else f"{tenant}'s shared pool"


def _credits(amount: Any) -> str:
    return _count(amount, "credit")


def _count(number: Any, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _times(number: int) -> str:
    return {1: "once more", 2: "twice"}.get(number, f"{number} times")
