"""The app on AWS Lambda, behind an HTTP API, a REST API, a load balancer or a function URL.

The app's lifespan begins when an instance does, and never ends: Lambda tells nobody before it takes an instance away.
(Mangum's own `lifespan="auto"` would start and stop the app with each request.)
"""

from mangum import Mangum
from mangum.protocols import LifespanCycle

from .app import app

LifespanCycle(app, "on").__enter__()

handler = Mangum(app, lifespan="off")
