"""The tree of errors. Every refusal and every failed check of flashdp is a FlashDPError.

FlashDPError derives from the one exception class that torch.compile hands to the user unwrapped, so what is raised
inside a compiler pass is what `except flashdp_compile.FlashDPError` catches around the model's call.
"""

from flashdp_compile.compat import UnwrappedCompilerError


class FlashDPError(UnwrappedCompilerError):
    """Base of all errors raised by flashdp_compile."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionError(FlashDPError):
    """An option is unknown, has a value that is not allowed, or contradicts another."""


class Refusal(FlashDPError):
    """A graph, or what runs beside it, cannot be proved to keep samples apart, so it is not compiled, or not run."""


class InputError(FlashDPError):
    """The batch axis of an input cannot be told."""


class UnprotectedGradientError(FlashDPError):
    """A gradient reached the optimizer without one clipped and noised release behind it. Gradients were cleared."""


class BudgetExhaustedError(FlashDPError):
    """A step would spend more than the run may. Nothing was released by it."""


class RanksError(FlashDPError):
    """Processes that train one model together do not agree, or one of them has failed. The text says whether a step was
    counted; nothing was released unless it was."""


class InternalError(FlashDPError):
    """flashdp failed, or a rewritten graph failed its own verification. Nothing was released; this is a bug in it."""
