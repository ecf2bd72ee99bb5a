"""What goes wrong: in the text (`PtxError` from `parse`) or in a thread (`Fault`, which `run` completes)."""


class PtxError(Exception):
    """PTX that is not supported, or an execution that breaks a rule of the PTX machine."""


class Fault(Exception):
    """Raised by an instruction for one lane of the batch; `run` turns it into a `PtxError` with block and thread."""

    def __init__(self, message: str, lane: int | None = None):
        super().__init__(message)
        self.message, self.lane = message, lane


class PartialWarp(Fault):
    """A convergent instruction met by some lanes of a warp: an error unless the others are still on their way."""
