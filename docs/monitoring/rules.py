"""The alert rules: money first, then the service, then cost.

A lone event alerts where it is about money that nobody else will see to; anything else has to last.
"""

import re
from dataclasses import dataclass
from typing import Any

from metered_billing.cli.monitoring import RUNBOOK

from .hurry import Pace

PREFIX = "MeteredBilling"

_OLDEST = (
    "max by (job, metered_billing_charge_state) "
    '(metered_billing_unsettled_age_seconds{metered_billing_charge_state=~"%s"})'
)
_ANOMALIES = "metered_billing_anomalies_total"
_OPERATIONS = "metered_billing_operation_duration_seconds"
_LEDGER = "metered_billing_ledger_operation_duration_seconds"
_ROUNDS = 'metered_billing_recovery_rounds_total{metered_billing_outcome="ok"}'


@dataclass(frozen=True)
class Alert:
    """One rule.

    Attributes:
        name: Without the prefix; two rules of one name differ in severity, and share a page.
        severity: `critical`: somebody gets up at night. `warning`: somebody looks during the day.
        lasting: How long it has to be true; empty: not at all.
        description: What it means for customers' money.
    """

    name: str
    severity: str
    expr: str
    lasting: str
    summary: str
    description: str

    @property
    def page(self) -> str:
        """The name of its page in the runbook."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", self.name).lower() + ".md"

    def rule(self) -> dict[str, Any]:
        """As Prometheus has it."""
        return {
            "alert": PREFIX + self.name,
            "expr": self.expr + "\n",
            **({"for": self.lasting} if self.lasting else {}),
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": " ".join(self.description.split()),
                "runbook_url": f"{RUNBOOK}/{self.page}",
            },
        }


def groups(pace: Pace) -> dict[str, list[Alert]]:
    """All rules, by group, in the order in which they matter."""
    return {"money": money(pace), "service": service(pace), "cost": cost(pace)}


def document(pace: Pace) -> dict[str, Any]:
    """The rules file."""
    return {
        "groups": [
            {"name": f"metered-billing: {name}", "rules": [alert.rule() for alert in alerts]}
            for name, alerts in groups(pace).items()
        ]
    }


def _count(event: str) -> str:
    comparison = "=~" if "|" in event else "="
    return f'{_ANOMALIES}{{metered_billing_event{comparison}"{event}"}}'


def _new(event: str, span: str) -> str:
    """Events within the span; also those of a process that had them before it was scraped for the first time."""
    count = _count(event)
    return f"""\
sum by (job) (increase({count}[{span}])) > 0
or
sum by (job) ({count} unless max_over_time({count}[{span}] offset {span})) > 0"""


def money(pace: Pace) -> list[Alert]:
    """Credits of customers that are not where they belong, or may not be."""
    overdue = _OLDEST % "refunding|voiding"
    stuck = _OLDEST % "opened|deducted"
    return [
        Alert(
            "RefundsOverdue",
            "critical",
            f"{overdue} > {pace.seconds('1h')}",
            pace("1m"),
            "{{ $labels.job }}: customers have been waiting for credits for over an hour",
            """Credits that are due back to customers of {{ $labels.job }} have not gone back: the oldest charge in
            state {{ $labels.metered_billing_charge_state }} is {{ $value | humanizeDuration }} old. Nothing is
            lost: they are on record, and are tried again until they go through. But these customers' balances are
            too low meanwhile.""",
        ),
        Alert(
            "RefundsOverdue",
            "warning",
            f"{overdue} > {pace.seconds('5m')}",
            pace("1m"),
            "{{ $labels.job }}: refunds or voids have been waiting for over 5 minutes",
            """Credits that are due back to customers of {{ $labels.job }} have not gone back yet: the oldest charge in
            state {{ $labels.metered_billing_charge_state }} is {{ $value | humanizeDuration }} old. Nothing is
            lost: they are on record, and are tried again until they go through.""",
        ),
        Alert(
            "ChargeStuck",
            "warning",
            f"{stuck} > {pace.seconds('1h')}",
            pace("5m"),
            "{{ $labels.job }}: a charge has been open for over an hour",
            """A customer of {{ $labels.job }} has paid, or is about to, and for {{ $value | humanizeDuration }} nobody
            has said what for: the oldest charge in state {{ $labels.metered_billing_charge_state }}. A request that
            runs so long, or one that hangs.""",
        ),
        Alert(
            "Disputed",
            "warning",
            _new("charge.disputed", pace("1h")),
            "",
            "{{ $labels.job }}: a charge is disputed, and a person has to decide",
            """{{ $value | printf "%.0f" }} charges of {{ $labels.job }} became disputed within an hour: the service
            refused a refund for good, or the app could not tell what was delivered. The customers have paid in full
            until somebody decides. Nothing decides by itself.""",
        ),
        Alert(
            "Drift",
            "critical",
            "metered_billing_reconcile_differences > 0",
            "",
            "The journal and the credits service disagree about customers' credits",
            """{{ $value | printf "%.0f" }} differences between the journal {{ $labels.metered_billing_journal }} and
            the credits service: what customers were charged is not what is on record. Somebody changed one of them
            by hand, a backup was restored, or there is a bug.""",
        ),
        Alert(
            "ReconcileStale",
            "warning",
            f"time() - max_over_time(metered_billing_reconcile_timestamp_seconds[{pace('6h')}]) > {pace.seconds('3h')}",
            pace("5m"),
            "Nobody has compared the journal with the credits service for {{ $value | humanizeDuration }}",
            """The last whole comparison of the journal {{ $labels.metered_billing_journal }} with the credits service
            is {{ $value | humanizeDuration }} old. If customers' credits were wrong, you would not know.""",
        ),
        Alert(
            "OutcomesMismatch",
            "warning",
            f"sum by (job) (increase({_count('charge.outcomes_mismatch')}[{pace('15m')}])) > 0",
            "",
            "{{ $labels.job }}: responses do not report what was paid for",
            """{{ $value | printf "%.0f" }} responses of {{ $labels.job }} reported other items than were paid for.
            What a response does not mention is refunded, what it mentions beyond that is not charged: customers may
            have got work for nothing.""",
        ),
        Alert(
            "OutcomesUnreadable",
            "warning",
            "sum by (job, metered_billing_event) "
            f"(increase({_count('charge.outcomes_unreadable|charge.outcomes_raised')}[{pace('15m')}])) > 0",
            "",
            "{{ $labels.job }}: nobody can tell what some customers got for their credits",
            """{{ $value | printf "%.0f" }} responses of {{ $labels.job }} could not be read
            ({{ $labels.metered_billing_event }}). Customers may have paid for items that failed.""",
        ),
        Alert(
            "OwnershipLost",
            "warning",
            f"sum by (job) (increase({_count('charge.ownership_lost')}[{pace('15m')}])) > 0",
            "",
            "{{ $labels.job }}: charges were taken over from a process that was still alive",
            """{{ $value | printf "%.0f" }} charges of {{ $labels.job }} were taken over by another process while their
            own still worked on them. Their customers get all credits back, also for work that they have received.""",
        ),
        Alert(
            "JournalFailing",
            "critical",
            _new("journal.failed", pace("15m")),
            "",
            "{{ $labels.job }}: charges cannot be put on record",
            """The journal of {{ $labels.job }} failed {{ $value | printf "%.0f" }} times within 15 minutes. What
            cannot be put on record is not charged: customers get 503. Where an outcome could not be written, the
            customer gets all credits back once the journal works again.""",
        ),
        Alert(
            "RecoveryStalled",
            "critical",
            f"""\
sum by (job, instance) (increase({_ROUNDS}[{pace("10m")}])) == 0
or
count by (job) (max_over_time({_ROUNDS}[{pace("1h")}])) unless count by (job) ({_ROUNDS})""",
            pace("5m"),
            "{{ $labels.job }}: nobody looks for refunds that are due",
            """No recovery has looked through the journal of {{ $labels.job }} {{ $labels.instance }} for 10 minutes,
            or no process is left. Credits that are due back to customers stay where they are until one does.""",
        ),
        Alert(
            "Bug",
            "warning",
            _new("billing.bug", pace("1h")),
            "",
            "{{ $labels.job }}: something raised in billing that must not",
            """{{ $value | printf "%.0f" }} times within an hour something raised in the billing of {{ $labels.job }}.
            The charges it was about are on record and are tried again; until that goes well their customers wait.""",
        ),
    ]


def service(pace: Pace) -> list[Alert]:
    """Customers that cannot buy."""
    unavailable = f"sum by (job) (increase({_count('credits.unavailable')}[{pace('5m')}]))"
    deduct = 'metered_billing_operation="deduct"'
    answered = f'{deduct}, metered_billing_outcome=~"ok|declined"'
    opened = 'metered_billing_breaker_changes_total{metered_billing_breaker_state="open"}'
    failing = 'metered_billing_outcome=~"unavailable|corrupt|error"'
    return [
        Alert(
            "CreditsUnavailable",
            "critical",
            f"""\
{unavailable} / sum by (job) (increase({_OPERATIONS}_count{{{deduct}}}[{pace("5m")}])) > 0.05
and
{unavailable} > 2""",
            pace("1m"),
            "{{ $labels.job }}: {{ $value | humanizePercentage }} of deductions get no answer",
            """Credits cannot be deducted, so {{ $labels.job }} answers 503 and does no work. Nobody is charged: what
            may have been deducted without an answer is undone.""",
        ),
        Alert(
            "TokenRejected",
            "critical",
            f"sum by (job) (increase({_count('credits.token_rejected')}[{pace('15m')}])) > 2",
            "",
            "{{ $labels.job }}: the credits service does not accept the app's token",
            """The credits service answered 401 or 403 {{ $value | printf "%.0f" }} times within 15 minutes. Customers
            of {{ $labels.job }} get 503, and refunds wait until the token is right. Nothing is lost.""",
        ),
        Alert(
            "CircuitOpen",
            "warning",
            f"""\
count by (job) (
  max by (job, instance) (metered_billing_breaker_state) > 0
  and
  sum by (job, instance) (increase({opened}[{pace("15m")}])) > 1.5
)""",
            pace("2m"),
            "{{ $labels.job }}: the circuit to the credits service does not close",
            """In {{ $value | printf "%.0f" }} processes of {{ $labels.job }} the credits service has failed five calls
            in a row, and then every probe. While the circuit is open customers get 503 at once, and refunds wait.""",
        ),
        Alert(
            "LedgerFailing",
            "critical",
            f"sum by (job) (increase({_LEDGER}_count{{{failing}}}[{pace('5m')}])) > 2",
            pace("1m"),
            "{{ $labels.job }}: the credits service cannot reach its ledger, or not read it",
            """{{ $value | printf "%.0f" }} operations failed within 5 minutes in the credits service
            {{ $labels.job }}. It confirms nothing that it has not written, so nobody is charged in vain; but nobody
            can buy.""",
        ),
        Alert(
            "Misconfigured",
            "warning",
            f"sum by (job) (increase({_count('billing.misconfigured')}[{pace('15m')}])) > 2",
            "",
            "{{ $labels.job }}: the app's own billing functions are wrong",
            """{{ $value | printf "%.0f" }} requests to {{ $labels.job }} within 15 minutes were answered 500, or got
            no refund yet: `cost`, `price`, `account` or a contract of the app's own raised, or returned nonsense.
            Nobody is charged for these requests.""",
        ),
        Alert(
            "SlowDeductions",
            "warning",
            f"""\
histogram_quantile(0.95, sum by (job, le) (rate({_OPERATIONS}_bucket{{{answered}}}[{pace("10m")}]))) > 1
and
sum by (job) (increase({_OPERATIONS}_count{{{answered}}}[{pace("10m")}])) > 60""",
            pace("5m"),
            "{{ $labels.job }}: one deduction in twenty takes over a second",
            """Every metered request to {{ $labels.job }} waits for its deduction: one in twenty for more than
            {{ $value | humanizeDuration }}. Nobody is charged wrongly. A call is given up after 2 s: soon there
            will be 503s.""",
        ),
    ]


def cost(pace: Pace) -> list[Alert]:
    """What the work is worth."""
    credit = 'metered_billing_credits_total{metered_billing_kind="%s"}'
    refunds = f'{_OPERATIONS}_count{{metered_billing_operation="refund", metered_billing_outcome="ok"}}'
    hour = pace("1h")
    return [
        Alert(
            "RefundShareHigh",
            "warning",
            f"""\
sum by (job) (increase({credit % "refunded"}[{hour}])) / sum by (job) (increase({credit % "deducted"}[{hour}])) > 0.3
and
sum by (job) (increase({refunds}[{hour}])) > 20""",
            pace("15m"),
            "{{ $labels.job }}: {{ $value | humanizePercentage }} of the credits taken go back",
            """Customers of {{ $labels.job }} get back {{ $value | humanizePercentage }} of what they pay, because the
            work fails. They pay for nothing that failed, but do not get what they came for, and you have done the
            work for nothing.""",
        ),
    ]
