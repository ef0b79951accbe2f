"""AWS Systems Manager Parameter Store, as far as settings need it: the parameters right under a prefix. Extra `ssm`.

Region, credentials and endpoint are whatever AWS's own variables and files say.
"""

import os
import re
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 3.0
"""To connect, and for each read: botocore's own 60 s would hold up a start for minutes."""

ATTEMPTS = 3

MAX_PAGES = 100

# The rest of a message may hold what was signed, the session's token with it, or be a proxy's.
_DENIED = re.compile(
    r"User: arn:[\w:/+=,.@-]{1,300} is not authorized to perform: [\w:]{1,100}"
    r"( on resource: arn:[\w:/+=,.@*-]{1,300})?( because [a-z -]{1,100})?"
)

_MEANS = {
    "Expired": "these AWS credentials have expired",
    "UnrecognizedClient": "it does not know these AWS credentials",
    "InvalidClientTokenId": "it does not know these AWS credentials",
    "Signature": "the AWS secret key is wrong, or this machine's clock",
    "Throttling": "too many ask at the same time",
}
"""By a word in the code of its answer."""

_FACTS = ("profile", "provider", "cred_var", "path", "region_name")
_URLS = ("endpoint_url", "proxy_url")
"""What of an error of botocore's names no secret; of URLs, the host alone."""

_PREFIX = re.compile(r"(/[A-Za-z0-9_.-]+)+")


class ParametersUnreadable(Exception):
    """The parameters cannot be had. Its text may be logged: it shows no value."""


class Parameters:
    """The parameters right under a prefix. Used by one thread at a time.

    Args:
        prefix: `/metered-billing/prod`, say; a slash at its end means nothing.

    Raises:
        ValueError: It is no such path.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix.rstrip("/")
        if not _PREFIX.fullmatch(self.prefix):
            raise ValueError("it must be a path such as /metered-billing/prod: letters, digits, and any of _ . - /")
        self._client: Any = None

    def read(self) -> dict[str, str]:
        """What there is now, decrypted, by name without the prefix. It blocks, for some seconds at the most.

        Raises:
            ParametersUnreadable: There are none, or they could not be had.
            ImportError: Without `metered-billing[ssm]`.
        """
        try:
            import botocore.exceptions as failures
        except ImportError as error:
            raise ImportError(
                "settings in AWS SSM Parameter Store need boto3: pip install 'metered-billing[ssm]'"
            ) from error
        try:
            # Kept, since making one takes a tenth of a second; it renews AWS's own credentials by itself.
            self._client = self._client or _new_client()
            found = self._read()
        except failures.ClientError as error:
            raise ParametersUnreadable(self._refused(error)) from None
        except failures.NoRegionError:
            raise ParametersUnreadable("AWS SSM needs a region: set AWS_REGION") from None
        except failures.NoCredentialsError:
            raise ParametersUnreadable("there are no AWS credentials to ask SSM with") from None
        except (failures.BotoCoreError, failures.HTTPClientError, ValueError) as error:
            raise ParametersUnreadable(f"AWS SSM could not be asked ({_kind(error)})") from None
        if not found:
            raise ParametersUnreadable(f"there is no parameter under {self.prefix}/ in AWS SSM")
        return found

    def _read(self) -> dict[str, str]:
        found: dict[str, str] = {}
        request: dict[str, Any] = {"Path": self.prefix, "WithDecryption": True}
        for _ in range(MAX_PAGES):  # a page may be empty and yet have a next one
            page = self._client.get_parameters_by_path(**request)
            for parameter in page["Parameters"]:
                found[parameter["Name"].removeprefix(f"{self.prefix}/")] = parameter["Value"]
            if not page.get("NextToken"):
                return found
            request["NextToken"] = page["NextToken"]
        raise ParametersUnreadable(f"the parameters under {self.prefix}/ in AWS SSM have no end")

    def _refused(self, error: Any) -> str:
        code = str(error.response.get("Error", {}).get("Code", "without a code"))[:100]
        needs = (
            f": these AWS credentials need ssm:GetParametersByPath on {self.prefix} and {self.prefix}/*, and"
            " kms:Decrypt where a key of your own encrypts them"
        )
        denied = _DENIED.match(str(error.response.get("Error", {}).get("Message", "")))
        if denied is not None:
            needs += f". AWS says: {denied[0]}"
        if "AccessDenied" in code or code == "403":
            return f"AWS SSM answered {code}{needs}"
        return f"AWS SSM answered {code}" + next((f": {why}" for word, why in _MEANS.items() if word in code), "")


def _kind(error: Exception) -> str:
    """What an error of botocore's is, and where. Its text may have a proxy's password, or what a program printed."""
    given = getattr(error, "kwargs", {})
    facts = [f"{name.replace('_', ' ')} {str(given[name])[:100]}" for name in _FACTS if name in given]
    for name in _URLS:
        host = _host(str(given.get(name, "")))
        if host:
            facts.append(f"{name.removesuffix('_url')} {host}")
    return ": ".join([type(error).__name__, *([", ".join(facts)] if facts else [])])


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return ""
    return f"{parts.hostname}{port}" if parts.hostname else ""


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()
    return session.client(
        "ssm",
        # boto3 itself knows only AWS_DEFAULT_REGION and the profile's; containers of AWS may have only this one.
        region_name=session.region_name or os.environ.get("AWS_REGION"),
        config=Config(
            connect_timeout=TIMEOUT_S,
            read_timeout=TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        ),
    )
