"""How a command fails: one sentence and an exit code."""


class Failure(Exception):
    """What went wrong, in a sentence for a person.

    Args:
        exit_code: 1: it failed or was refused; 2: it was asked for wrongly.
    """

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code
