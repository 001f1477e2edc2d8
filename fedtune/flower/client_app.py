"""The client as a Flower `ClientApp`: messages in, the client's machine, messages out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import fedtune.flower.internals  # isort: skip  # noqa: F401  # sets Flower's switches first
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.errors import FedtuneError, WireError
from fedtune.flower.envelope import CLIENT_FAILED, CLIENT_REFUSED, failure, reply, unwrap
from fedtune.round.machine import Machine

logger = logging.getLogger(__name__)


def make_client_app(
    machine_of: Callable[[Context], Machine], disclose_errors: bool = False
) -> ClientApp:
    """A Flower client app; `machine_of` finds the client that a node's context stands for.

    No exception leaves the app: Flower would send its text to the server, and a text can hold
    data. What is sent is the error's own one line for errors of fedtune, and only the kind of
    exception for any other, unless `disclose_errors`: in a simulation the server is you.
    """
    app = ClientApp()

    def answer(message: Message, context: Context, step: Step) -> Message:
        try:
            return reply(message, step(machine_of(context), unwrap(message)))
        except WireError as error:
            return failure(message, CLIENT_REFUSED, str(error))
        except FedtuneError as error:
            return failure(message, CLIENT_FAILED, str(error))
        except Exception as error:  # a user's own data set or loss may raise anything
            if disclose_errors:
                logger.debug("a client raised", exc_info=True)
                return failure(message, CLIENT_FAILED, f"raised {type(error).__name__}: {error}")
            logger.exception("a client raised")
            return failure(message, CLIENT_FAILED, f"raised {type(error).__name__}")

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return answer(message, context, lambda machine, payload: machine.hello(payload))

    @app.query("secagg")
    def converse(message: Message, context: Context) -> Message:
        return answer(message, context, lambda machine, payload: machine.converse(payload))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, context, lambda machine, payload: machine.train(payload))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, lambda machine, payload: machine.evaluate(payload))

    return app


Step = Callable[[Machine, bytes], bytes]
