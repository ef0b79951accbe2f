"""How a command fails: one sentence and an exit code."""


class Failure(Exception):
    """What went wrong, in a sentence for a person.

    Args:
        exit_code: 1: it failed or was refused; 2: it was asked for wrongly.
        in_doubt: It may have happened nevertheless.
    """

    def __init__(self, sentence: str, exit_code: int = 1, *, in_doubt: bool = False) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code
        self.in_doubt = in_doubt
