"""Exceptions that a user can meet. Each message names the file or tensor and the way out."""


class LutraError(Exception):
    """Base of every error that is the input's or the environment's fault, not a bug of ours."""


class CheckpointError(LutraError):
    """A checkpoint on disk is damaged, incomplete, unsafe or of an unsupported kind."""


class SchemeError(LutraError):
    """A method, option, bit width, group size or format name that does not exist or cannot work."""


class CalibrationError(LutraError):
    """Calibration or evaluation text that is missing or too short."""


class ResourceError(LutraError):
    """Not enough disk space or memory, or a destination that must not be overwritten."""


class KernelError(LutraError):
    """A kernel that was asked for by name cannot run here."""
