"""The app of the storm with the docs' probes: each answer says which replica gave it."""

import os

from probes import probes  # docs/examples is on the path of its process
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.chaos.app import app

REPLICA = "x-replica"


class Signed:
    """Pure ASGI: nothing else about the response changes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REPLICA] = os.environ["REPLICA"]
            await send(message)

        await self.app(scope, receive, signed)


app.include_router(probes(os.environ["METERED_BILLING_CREDITS"], os.environ["METERED_BILLING_TOKEN"]))
app.add_middleware(Signed)
