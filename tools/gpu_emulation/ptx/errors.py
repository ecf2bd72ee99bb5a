"""Errors in the text (`PtxError` from `parse`) or in a thread (`Fault`, which `run` turns into a `PtxError`)."""


class PtxError(Exception):
    """PTX that is not supported, or an execution that breaks a rule of the PTX machine."""


class Fault(Exception):
    """Raised by an instruction for one lane of the batch; `run` turns it into a `PtxError` with block and thread."""

    def __init__(self, message: str, lane: int | None = None):
        super().__init__(message)
        self.message, self.lane = message, lane


class PartialWarp(Fault):
    """Some lanes of a warp have reached a convergent instruction. This is an error unless the others can still
    arrive."""
