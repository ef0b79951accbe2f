"""One instance of the function in a process of its own: `python -m tests.aws_lambda.instance MODULE`.

As Lambda's runtime does, it loads the handler, and then calls it with one event after another: those on its standard
input, a line each. What the handler returns stands on its standard output.
"""

import importlib
import json
import sys

from tests.aws_lambda.events import Context


def main(module: str) -> None:
    handler = importlib.import_module(module).handler
    sys.stdout.write("up\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(handler(json.loads(line), Context())) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
