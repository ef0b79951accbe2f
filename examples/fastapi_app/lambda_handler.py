"""The app on AWS Lambda, behind an HTTP API, a REST API, a load balancer or a function URL.

The app's lifespan begins when an instance does, and never ends: Lambda tells nobody before it takes an instance away.
(Mangum's own `lifespan="auto"` would start and stop the app with each request.)
"""

from mangum import Mangum
from mangum.adapter import DEFAULT_TEXT_MIME_TYPES
from mangum.protocols import LifespanCycle

from .app import app

LifespanCycle(app, "on").__enter__()

# A 402 is text, too. As Mangum has it, it is returned in base64, and a REST API may hand it on like that.
TEXT = [*DEFAULT_TEXT_MIME_TYPES, "application/problem+json", "application/x-ndjson"]

handler = Mangum(app, lifespan="off", text_mime_types=TEXT)
