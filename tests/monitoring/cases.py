"""For each alert a case in which it fires, and cases like it in which it must not.

Series are in promtool's notation, a sample every 15 s: `0+2x40` is 0, 2, 4 … 80; `_x20` are 20 that are missing.
"""

from dataclasses import dataclass, field

CRITICAL, WARNING = "critical", "warning"


@dataclass(frozen=True)
class Case:
    """What Prometheus has scraped, and which alerts fire then, with their severities."""

    name: str
    series: dict[str, str]
    at: str
    fires: set[tuple[str, str]] = field(default_factory=set)


def anomalies(event: str, instance: str = "a") -> str:
    return f'metered_billing_anomalies_total{{job="app", instance="{instance}", metered_billing_event="{event}"}}'


def age(state: str) -> str:
    return f'metered_billing_unsettled_age_seconds{{job="app", instance="a", metered_billing_charge_state="{state}"}}'


def operations(operation: str, outcome: str) -> str:
    return (
        'metered_billing_operation_duration_seconds_count{job="app", instance="a", '
        f'metered_billing_operation="{operation}", metered_billing_outcome="{outcome}"}}'
    )


def deductions_within(le: str) -> str:
    return (
        'metered_billing_operation_duration_seconds_bucket{job="app", instance="a", '
        f'metered_billing_operation="deduct", metered_billing_outcome="ok", le="{le}"}}'
    )


def rounds(instance: str = "a") -> str:
    return f'metered_billing_recovery_rounds_total{{job="app", instance="{instance}", metered_billing_outcome="ok"}}'


def opened() -> str:
    return 'metered_billing_breaker_changes_total{job="app", instance="a", metered_billing_breaker_state="open"}'


def of_credits(kind: str) -> str:
    return f'metered_billing_credits_total{{job="app", instance="a", metered_billing_kind="{kind}"}}'


def of_ledger(outcome: str) -> str:
    return (
        'metered_billing_ledger_operation_duration_seconds_count{job="credits", instance="c", '
        f'metered_billing_operation="deduct", metered_billing_outcome="{outcome}"}}'
    )


BREAKER = 'metered_billing_breaker_state{job="app", instance="a"}'
DIFFERENCES = 'metered_billing_reconcile_differences{job="node", instance="n", metered_billing_journal="/j"}'
RECONCILED = 'metered_billing_reconcile_timestamp_seconds{job="node", instance="n", metered_billing_journal="/j"}'

ONCE = "0x40 1x400"
"""Nothing for 10 minutes, then one event."""

MONEY = [
    Case(
        "a refund is not answered",
        {age("refunding"): "0x20 0+15x100"},
        "12m",
        {("RefundsOverdue", WARNING)},
    ),
    Case(
        "a void is not answered for over an hour",
        {age("voiding"): "0x20 0+15x400"},
        "70m",
        {("RefundsOverdue", WARNING), ("RefundsOverdue", CRITICAL)},
    ),
    Case("refunds come and go", {age("refunding"): "0 4 299 3 0 1 2 2 310 0 8x400"}, "2m"),
    Case("a long request's refund takes a moment", {age("refunding"): "0x39 2000 0x400"}, "10m"),
    Case("work that takes half an hour", {age("deducted"): "0+15x120"}, "30m"),
    Case("a request hangs", {age("deducted"): "0+15x400"}, "70m", {("ChargeStuck", WARNING)}),
    Case("one charge is disputed", {anomalies("charge.disputed"): ONCE}, "11m", {("Disputed", WARNING)}),
    Case("it was disputed long ago", {anomalies("charge.disputed"): ONCE}, "90m"),
    Case(
        "disputed before the process was scraped for the first time",
        {anomalies("charge.disputed", "old"): "0x1000", anomalies("charge.disputed", "new"): "_x40 1x400"},
        "11m",
        {("Disputed", WARNING)},
    ),
    Case(
        "disputed long ago, and nothing was scraped for a while",
        {anomalies("charge.disputed"): "5x480 _x20 5x900"},
        "182m",
    ),
    Case("the books differ", {DIFFERENCES: "0x10 1x100"}, "3m", {("Drift", CRITICAL)}),
    Case("they agree again", {DIFFERENCES: "0x10 1x10 0x100"}, "8m"),
    Case("cron has stopped", {RECONCILED: "0x1000"}, "190m", {("ReconcileStale", WARNING)}),
    Case("its file is gone", {RECONCILED: "0x60 _x1000"}, "190m", {("ReconcileStale", WARNING)}),
    Case("cron runs every hour", {RECONCILED: "0x239 3600x239 7200x239 10800x239"}, "239m"),
    Case(
        "a response reports too little",
        {anomalies("charge.outcomes_mismatch"): ONCE},
        "11m",
        {("OutcomesMismatch", WARNING)},
    ),
    Case(
        "a response is too long to be read",
        {anomalies("charge.outcomes_unreadable"): ONCE},
        "11m",
        {("OutcomesUnreadable", WARNING)},
    ),
    Case(
        "a reader of outcomes raises",
        {anomalies("charge.outcomes_raised"): ONCE, anomalies("charge.disputed"): ONCE},
        "11m",
        {("OutcomesUnreadable", WARNING), ("Disputed", WARNING)},
    ),
    Case(
        "a process was stopped, and goes on",
        {anomalies("charge.ownership_lost"): ONCE},
        "11m",
        {("OwnershipLost", WARNING)},
    ),
    Case("the disk is full", {anomalies("journal.failed"): "0x40 0+3x100"}, "12m", {("JournalFailing", CRITICAL)}),
    Case(
        "a corrupt file is set aside at start-up",
        {anomalies("journal.failed"): "_x40 1x100"},
        "11m",
        {("JournalFailing", CRITICAL)},
    ),
    Case("recovery hangs", {rounds(): "0+1.5x40 60x100"}, "26m", {("RecoveryStalled", CRITICAL)}),
    Case("the last process is gone", {rounds(): "0+1.5x40 stale"}, "16m", {("RecoveryStalled", CRITICAL)}),
    Case(
        "a new process takes the old one's place", {rounds("a"): "0+1.5x40 stale", rounds("b"): "_x38 0+1.5x90"}, "30m"
    ),
    Case("a bug in a backend", {anomalies("billing.bug"): ONCE}, "11m", {("Bug", WARNING)}),
]

SERVICE = [
    Case(
        "one deduction in ten gets no answer",
        {
            operations("deduct", "ok"): "0+18x100",
            operations("deduct", "unknown"): "0+2x100",
            anomalies("credits.unavailable"): "0+2x100",
        },
        "10m",
        {("CreditsUnavailable", CRITICAL)},
    ),
    Case(
        "none does, from the first on",
        {operations("deduct", "notsent"): "_x10 1+2x100", anomalies("credits.unavailable"): "0x10 1+2x100"},
        "6m",
        {("CreditsUnavailable", CRITICAL)},
    ),
    Case(
        "a lone one gets none, and there are few",
        {operations("deduct", "ok"): "0x39 1x100", anomalies("credits.unavailable"): ONCE},
        "12m",
    ),
    Case(
        "a hundredth gets none",
        {operations("deduct", "ok"): "0+500x100", anomalies("credits.unavailable"): "0+5x100"},
        "10m",
    ),
    Case(
        "the token was rotated",
        {anomalies("credits.token_rejected"): "0x40 0+1x100"},
        "12m",
        {("TokenRejected", CRITICAL)},
    ),
    Case("a proxy refuses one call", {anomalies("credits.token_rejected"): ONCE}, "12m"),
    Case(
        "the circuit opens again and again",
        {BREAKER: "0x40 2 2 1 2 2 2 1 2x100", opened(): "0x40 1+0.5x100"},
        "14m",
        {("CircuitOpen", WARNING)},
    ),
    Case("it opened once, and nobody has called since", {BREAKER: "0x40 2x100", opened(): ONCE}, "20m"),
    Case("it opened often, and is closed", {BREAKER: "0x40 2x20 0x100", opened(): "0x40 1+0.5x20 11x100"}, "18m"),
    Case("the ledger's database is away", {of_ledger("unavailable"): "0+1x100"}, "8m", {("LedgerFailing", CRITICAL)}),
    Case("accounts are empty", {of_ledger("insufficient-credits"): "0+5x100"}, "8m"),
    Case(
        "a cost function raises",
        {anomalies("billing.misconfigured"): "0x40 0+1x100"},
        "12m",
        {("Misconfigured", WARNING)},
    ),
    Case("it raised once", {anomalies("billing.misconfigured"): ONCE}, "12m"),
    Case(
        "one deduction in ten takes two seconds",
        {
            deductions_within("0.5"): "0+9x200",
            deductions_within("2.5"): "0+10x200",
            deductions_within("+Inf"): "0+10x200",
            operations("deduct", "ok"): "0+10x200",
        },
        "20m",
        {("SlowDeductions", WARNING)},
    ),
    Case(
        "a lone one does, and there are few",
        {
            deductions_within("0.5"): "0x200",
            deductions_within("2.5"): ONCE,
            deductions_within("+Inf"): ONCE,
            operations("deduct", "ok"): ONCE,
        },
        "16m",
    ),
]

COST = [
    Case(
        "four items in ten fail",
        {
            of_credits("deducted"): "0+100x400",
            of_credits("refunded"): "0+40x400",
            operations("refund", "ok"): "0+10x400",
        },
        "80m",
        {("RefundShareHigh", WARNING)},
    ),
    Case(
        "one in ten fails",
        {
            of_credits("deducted"): "0+100x400",
            of_credits("refunded"): "0+10x400",
            operations("refund", "ok"): "0+10x400",
        },
        "80m",
    ),
    Case(
        "the only request of the night fails",
        {
            of_credits("deducted"): "0x40 10x400",
            of_credits("refunded"): "0x40 10x400",
            operations("refund", "ok"): ONCE,
        },
        "40m",
    ),
]

CASES = [*MONEY, *SERVICE, *COST]
