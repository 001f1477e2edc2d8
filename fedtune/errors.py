"""Every exception that fedtune raises on purpose.

::

    FedtuneError
    ├── UsageError            wrong usage or configuration: exit code 2, nothing was written
    │   ├── ConfigError       a key, a value or a flag
    │   ├── DataError         a data file, a column, a partition
    │   ├── BaseModelError    a base model folder
    │   ├── ArtifactError     edge artifacts: missing, damaged, or of another federation
    │   ├── KeyFileError      a key file, certificate or roster
    │   ├── RunFolderError    a run folder that exists, is missing, or is in use
    │   └── AuditLogError     an audit log that is in use, or cannot be gone on with
    │       └── BrokenAuditLog a line of it is not what its writer wrote there
    ├── WireError             bytes that are not a message of this federation
    │   ├── MalformedMessage  not the wire format, or larger than the limit
    │   ├── BadSignature      a signature, seal or public key that does not verify
    │   ├── ProtocolViolation well formed and genuine, but not to be accepted at this point
    │   └── ContextMismatch   well formed, but of another run, round, base model, manifest or config
    │       └── LateMessage   of an earlier round of the same run
    ├── NetworkError          a server and a client that do not come together
    │   ├── ServerUnreachable nobody answers, or not now; trying again may help
    │   └── ServerRefused     one side does not accept the other; trying again does not help
    ├── PolicyRefusal         the site's own policy forbids what the server asks for
    ├── AuditWriteError       an entry cannot be written; whoever writes the log stops
    └── JobError              the job itself failed: exit code 1
        ├── TrainingError     local training went wrong at one client (not finite, a crash)
        │   ├── BaseUnreachable  no answer of the base model's server in time; later maybe
        │   └── BaseRefused      it and this client do not accept each other; later neither
        ├── ClientFailure     one client's round failed; the round goes on without it
        ├── TooFewClients     fewer clients than `rounds.min-clients` are left
        ├── UnmaskingFailed   the shares that were revealed do not give the masks back
        ├── RoundLost         a round can neither end nor be repeated; the next one can begin
        └── BudgetExceeded    the privacy budget does not allow another release

The text of an error says what was wrong, with which input, and what to do.
"""

from __future__ import annotations


class FedtuneError(Exception):
    """Base of every exception of this package."""


class UsageError(FedtuneError):
    """Wrong usage or configuration; nothing was written."""


class ConfigError(UsageError):
    """A configuration key, value or command-line flag is wrong."""


class DataError(UsageError):
    """A data file, column or partition is wrong."""


class BaseModelError(UsageError):
    """A base model folder is missing, broken or not of a supported kind."""


class ArtifactError(UsageError):
    """Edge artifacts are missing, damaged, or of another federation."""


class KeyFileError(UsageError):
    """A key file, a certificate or a roster is missing, broken, or readable by others."""


class RunFolderError(UsageError):
    """A run folder exists already, is missing, is not a run, or is in use."""


class AuditLogError(UsageError):
    """An audit log is in use, cannot be opened, or is not as its writer wrote it."""


class BrokenAuditLog(AuditLogError):
    """A line of an audit log is not what its writer wrote there; lines count from 1."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line, self.reason = line, reason


class WireError(FedtuneError):
    """Bytes that are not an acceptable message of this federation."""


class MalformedMessage(WireError):
    """The bytes are not the wire format, or are larger than the limit."""


class BadSignature(WireError):
    """A signature, a seal or a public key does not verify."""


class ProtocolViolation(WireError):
    """A well-formed, genuine message that must not be accepted at this point of the protocol."""


class ContextMismatch(WireError):
    """A well-formed message of another run, round, base model, manifest or config."""


class LateMessage(ContextMismatch):
    """A message of an earlier round of the same run; ignoring it is enough."""


class NetworkError(FedtuneError):
    """A server and a client do not come together."""


class ServerUnreachable(NetworkError):
    """Nobody answers, or not now; trying again may help."""


class ServerRefused(NetworkError):
    """One side does not accept the other; trying again does not help."""


class PolicyRefusal(FedtuneError):
    """The site's own policy forbids what the server asks for."""


class AuditWriteError(FedtuneError):
    """An entry cannot be written; nothing may be done that is not in the audit log."""


class JobError(FedtuneError):
    """The job failed; exit code 1."""


class TrainingError(JobError):
    """Local training went wrong at one client."""


class BaseUnreachable(TrainingError):
    """The server of the base model gave no answer in all the time that a client has for it."""


class BaseRefused(TrainingError):
    """A client and the server of its base model do not accept each other, or what is asked."""


class ClientFailure(JobError):
    """One client's round failed; the round goes on without that client."""


class TooFewClients(JobError):
    """Fewer clients than `rounds.min-clients` are left in a round."""


class UnmaskingFailed(JobError):
    """The shares that clients revealed do not give the committed masks back."""


class RoundLost(JobError):
    """A round can neither end nor be repeated without telling clients apart: on with the next."""


class BudgetExceeded(JobError):
    """The privacy budget does not allow another release."""
