"""The Flower strategy: Flower's loop and messages around `fedtune.round.Federation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

import fedtune.flower.internals  # isort: skip  # noqa: F401  # sets Flower's switches first
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtune.errors import LateMessage, RoundLost, TooFewClients, WireError
from fedtune.flower.envelope import (
    CLIENT_GONE,
    CLIENT_REFUSED,
    CONVERSATION,
    FAREWELL,
    record_of,
    unwrap,
    wrap,
)
from fedtune.flower.observer import Failure, Observer
from fedtune.round.federation import Federation, Score
from fedtune.round.server import Exchange, ServerRound, reasons
from fedtune.types import Float32Vector
from fedtune.wire import codec
from fedtune.wire.context import check_context

JOIN_POLL_SECONDS = 0.5
FAREWELL_SECONDS = 5.0
TRAINING, EVALUATION = "train", "evaluate"
# Says who, as a rehearsal, is not there any more: round, stage, names of the cohort.
Absences = Callable[[int, str, list[str]], Iterable[str]]
_FAILURES: dict[int, Failure] = {CLIENT_GONE: "disconnected", CLIENT_REFUSED: "refused"}


class FederatedFineTuning(Strategy):
    """Rounds of a `Federation`, driven by Flower's own loop (`Strategy.start`).

    The federation knows which round is next, so a resumed run goes on where the journal ends
    although Flower counts from 1 again. Replies are consumed one at a time.
    """

    def __init__(
        self,
        federation: Federation,
        observer: Observer,
        evaluate: Callable[[Float32Vector], Score] | None = None,
        absences: Absences | None = None,
    ) -> None:
        """`evaluate` uses the server's test set; None: clients evaluate on their own."""
        self._absences = absences
        self._federation = federation
        self._observer = observer
        self._evaluate = evaluate
        self._nodes: dict[str, int] = {}
        self._greeted: set[int] = set()
        self._refused: dict[str, str] = {}
        self._open: ServerRound | None = None

    def run(self, grid: Grid, clients: int, patience: float | None = None) -> None:
        """Run all rounds that are left with `clients` clients, which may come and go.

        With `patience`, the first round waits so many seconds for all of them, each round for as
        many as it takes, however long. Without, all must connect within `rounds.timeout`.
        """
        self._expected, self._patience = clients, patience
        self.start(
            grid,
            initial_arrays=_arrays(self._federation.adapter),
            num_rounds=self._federation.rounds_left,
            timeout=self._federation.config.rounds.timeout,
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """All exchanges before training, then one request to train for each client."""
        self._gather(grid)
        self._started = time.perf_counter()
        self._grid = grid
        self._lost = ""
        self._open, exchange = self._federation.open_round()
        following: Exchange | None = exchange
        try:
            while following is not None and following.stage != TRAINING:
                following = self._hold(following)
        except RoundLost as error:
            self._lost = str(error)
        return self._requests(following) if following is not None and not self._lost else []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Count each reply as it comes, hold what exchanges are left, then close the round."""
        try:
            if not self._lost:
                self._adapter = self._finish(replies)
        except RoundLost as error:
            self._lost = str(error)
        if self._lost:
            self._adapter = self._federation.give_up(self._lost)
            self._observer.round_lost(self._lost)
        return _arrays(self._adapter), MetricRecord()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Requests to evaluate, where clients have test sets and the server has none."""
        opened = self._require_open()
        if self._evaluate or not self._federation.evaluates(opened.context.round):
            return []
        testers = [member for member in self._federation.members if member.test_examples]
        request = codec.encode_evaluate_request(
            codec.EvaluateRequest(opened.context, self._adapter.astype("<f4").tobytes())
        )
        opened.bytes_down += len(request) * len(testers)
        names = [member.name for member in testers]
        self._observer.round_running(opened.context.round, EVALUATION, names, len(names))
        return self._messages(dict.fromkeys(names, request), MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord:
        """Score the new adapter and commit the round."""
        opened = self._require_open()
        score = None
        if self._federation.evaluates(opened.context.round):
            score = self._score(self._evaluate) if self._evaluate else self._merge(replies)
        seconds = time.perf_counter() - self._started
        record = self._federation.commit(opened, score, opened.bytes_down, seconds)
        self._open = None
        self._observer.round_committed(record)
        return MetricRecord()

    def summary(self) -> None:
        """Flower asks for a log of settings; the run folder has them."""

    def _gather(self, grid: Grid) -> None:
        """Take in who has come, let go of who has left, and wait until there are enough."""
        begun = time.monotonic()
        told = -1
        while True:
            online = set(grid.get_node_ids())
            for name in [name for name, node in self._nodes.items() if node not in online]:
                del self._nodes[name]
                self._federation.dismiss(name)
                self._observer.client_left(name)
            if fresh := online - self._greeted:
                self._greet(grid, sorted(fresh))
            self._greeted &= online  # whoever comes back is greeted again
            waited = time.monotonic() - begun
            if self._enough(len(online), waited):
                return
            if len(self._nodes) != told:
                told = len(self._nodes)
                self._observer.waiting(told, self._expected)
            time.sleep(JOIN_POLL_SECONDS)

    def _enough(self, online: int, waited: float) -> bool:
        """Whether a round can begin; raises `TooFewClients` where nobody waits any longer."""
        found = len(self._nodes)
        if self._patience is not None:
            first = self._federation.round == 0
            patience = self._patience if first else 0.0
            enough = found >= self._federation.fewest_to_begin(self._expected)
            return found >= self._expected or (enough and waited > patience)
        if online < self._expected and waited <= self._federation.config.rounds.timeout:
            return False
        if online < self._expected:
            raise TooFewClients(f"{online} of {self._expected} clients have connected")
        if not found:
            raise TooFewClients(f"no client takes part ({reasons(self._refused)})")
        return True

    def _greet(self, grid: Grid, nodes: list[int]) -> None:
        """Ask nodes who they are."""
        content = wrap(codec.encode_hello_request(self._federation.run_id))
        messages = [Message(content, node, MessageType.QUERY) for node in nodes]
        patience = self._federation.config.rounds.timeout
        if self._patience is not None:
            patience = min(patience, self._federation.config.secagg.stage_timeout)
        self._refused = {}
        for message in grid.send_and_receive(messages, timeout=patience):
            node = message.metadata.src_node_id
            self._greeted.add(node)
            try:
                if message.has_error():
                    raise WireError(message.error.reason)
                name = self._federation.admit(unwrap(message)).name
                self._nodes[name] = node
                self._observer.client_joined(name)
            except WireError as error:
                self._refused[f"node {node}"] = str(error)
                self._observer.client_refused(node, str(error))

    def _finish(self, replies: Iterable[Message]) -> Float32Vector:
        opened = self._require_open()
        self._collect(replies, self._federation.config.rounds.timeout)
        following = opened.proceed() if self._stage == TRAINING else None
        while following is not None:
            following = self._hold(following)
        return self._federation.close_round(opened)

    def _hold(self, exchange: Exchange) -> Exchange | None:
        """Ask and wait for the answers; the exchange that follows."""
        patience = self._federation.config.secagg.stage_timeout
        requests = self._requests(exchange)
        self._collect(self._grid.send_and_receive(requests, timeout=patience), patience)
        return self._require_open().proceed()

    def _requests(self, exchange: Exchange) -> list[Message]:
        opened = self._require_open()
        self._stage = exchange.stage
        self._tell_progress(opened, len(exchange.requests))
        requests = dict(exchange.requests)
        if self._absences is not None:
            cohort = [member.name for member in opened.cohort]
            for name in self._absences(opened.context.round, exchange.stage, cohort):
                if requests.pop(name, None) is not None:
                    self._fail(opened, name, "disconnected", "absent, as rehearsed")
        for name in [name for name in requests if name not in self._nodes]:
            # A round that is taken up after a restart may miss some of those who began it.
            del requests[name]
            self._fail(opened, name, "disconnected", "not connected")
        opened.bytes_down += sum(map(len, requests.values()))
        kind = MessageType.TRAIN if self._stage == TRAINING else CONVERSATION
        return self._messages(requests, kind)

    def _collect(self, replies: Iterable[Message], patience: float) -> None:
        """Take in the answers to the open exchange; who has given none has failed."""
        opened = self._require_open()
        names = {self._nodes[name]: name for name in opened.pending}
        for message in replies:
            client = names.get(message.metadata.src_node_id)
            if client is None or client not in opened.pending:
                continue  # late for another round, or a second answer: never counted
            self._count(opened, client, message)
            self._tell_progress(opened, len(names))
        for client in opened.pending:
            self._fail(opened, client, "late", f"no answer within {patience:g} s")

    def _count(self, opened: ServerRound, client: str, message: Message) -> None:
        if message.has_error():
            failure = _FAILURES.get(message.error.code, "failed")
            reason = message.error.reason or "failed without a reason"
            self._fail(opened, client, failure, reason)
            return
        try:
            opened.receive(client, unwrap(message))
        except LateMessage:
            return  # its answer to this round may still come
        except WireError as error:
            self._fail(opened, client, "invalid", str(error))

    def _fail(self, opened: ServerRound, client: str, failure: Failure, reason: str) -> None:
        opened.fail(client, reason)
        self._observer.client_failed(client, failure)

    def _tell_progress(self, opened: ServerRound, total: int) -> None:
        number = opened.context.round
        self._observer.round_running(number, self._stage, opened.pending, total)

    def _messages(self, requests: Mapping[str, bytes], message_type: str) -> list[Message]:
        contents: dict[int, RecordDict] = {}
        messages = []
        for name, payload in requests.items():
            # One payload in memory, however many clients get it.
            if id(payload) not in contents:
                contents[id(payload)] = wrap(payload)
            content = contents[id(payload)]
            group = str(self._federation.round + 1)
            messages.append(Message(content, self._nodes[name], message_type, group_id=group))
        return messages

    def _score(self, evaluate: Callable[[Float32Vector], Score]) -> Score:
        self._observer.round_running(self._federation.round + 1, EVALUATION, [], 0)
        return evaluate(self._adapter)

    def _merge(self, replies: Iterable[Message]) -> Score | None:
        opened = self._require_open()
        examples, correct, loss_sum = 0, 0, 0.0
        answers = {}
        members = [member for member in self._federation.members if member.test_examples]
        testers = {self._nodes[member.name]: member.test_examples for member in members}
        waiting_for = {self._nodes[member.name]: member.name for member in members}
        for message in replies:
            node = message.metadata.src_node_id
            waiting_for.pop(node, None)
            names = list(waiting_for.values())
            self._observer.round_running(opened.context.round, EVALUATION, names, len(testers))
            if message.has_error() or node in answers:
                continue  # the round stands; the score says what the others found
            try:
                payload = unwrap(message)
                reply = codec.decode_evaluate_reply(payload)
                check_context(reply.context, opened.context)
            except WireError as error:
                self._observer.client_refused(node, str(error))
                continue
            # The greeting settled the weight: nobody can grow its say in the score.
            if reply.examples == testers.get(node):
                answers[node] = reply
                opened.bytes_up += len(payload)
        for _, reply in sorted(answers.items()):
            examples += reply.examples
            correct += reply.correct
            loss_sum += reply.loss_sum
        if not examples:
            return None
        classes = self._federation.config.has_labels
        return Score(loss_sum / examples, correct / examples if classes else None)

    def _require_open(self) -> ServerRound:
        if self._open is None:
            raise RuntimeError("no round is open")
        return self._open


def farewell(grid: Grid, words: str) -> None:
    """Tell all who are connected that the run is over."""
    content = wrap(words.encode())
    messages = [Message(content, node, FAREWELL) for node in sorted(grid.get_node_ids())]
    for _ in grid.send_and_receive(messages, timeout=FAREWELL_SECONDS):
        pass


def _arrays(adapter: Float32Vector) -> ArrayRecord:
    return record_of(adapter.astype("<f4").tobytes())
